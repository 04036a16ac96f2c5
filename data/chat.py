"""Text as it comes: a stream of ids as text, and a conversation on standard input."""
import codecs, contextlib, json, sys
from pathlib import Path

from data import UserError


def readable_pieces(tokenizer, ids, stop=()):
    """Yields the text of a stream of ids in pieces; incomplete characters wait."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if i in stop:
            break
        yield decoder.decode(tokenizer.decode_bytes([i]))
    yield decoder.decode(b"", final=True)


def speak(tokenizer, ids, pieces=None):
    """Prints the text of a stream of ids, up to an end token, and adds it to the list `pieces`.

    Returns whether there was an end token.
    """
    last = []

    def remembered():
        for i in ids:
            last[:] = [i]
            yield i
    for text in readable_pieces(tokenizer, remembered(), tokenizer.eos_ids):
        print(text, end="", flush=True)
        if pieces is not None:
            pieces.append(text)
    print()
    return bool(last) and last[0] in tokenizer.eos_ids


HELP = ("/reset forgets what was said, /save FILE.jsonl writes it as data/prepare.py --input reads it, /quit ends, and "
        "so does Ctrl-C, which during an answer ends only that; put a space before a / that is meant")


def lines():
    """Yields lines of standard input. On a terminal, sample.py has imported readline: arrow keys work."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "")


def obey(line, messages, system):
    """Carries out a command, a line that begins with /; returns the sentence to show."""
    command, _, file = line.strip().partition(" ")
    if command == "/reset":
        messages.clear()
        return "what was said is forgotten"
    if command != "/save":
        return HELP if command == "/help" else f"there is no {command}: {HELP}"
    if not messages:
        return "nothing was said yet that could be saved"
    if Path(file.strip()).suffix not in (".jsonl", ".json"):
        return "/save FILE.jsonl: give a name with this ending, by which data/prepare.py knows a chat"
    try:
        with open(file.strip(), "x", encoding="utf-8") as out:
            out.write(json.dumps({"messages": system + messages}, ensure_ascii=False) + "\n")
        return f"wrote {len(messages)} messages to {file}"
    except OSError as error:
        return f"{line}: {error.strerror}"


def fitting(messages, first, tokenizer, room, system):
    """(first, text): the list `system`, and the messages from `first` on that fit into `room` tokens."""
    text = tokenizer.render(system + messages[first:])
    while first < len(messages) - 1 and len(tokenizer.encode(text, special=True)) > room:
        first += 2                                               # a question and the answer to it
        text = tokenizer.render(system + messages[first:])
    return first, text


def opening_of(system, tokenizer):
    """The messages before a conversation, a list. Raises UserError if the template takes none."""
    if not system:
        return []
    messages = [{"role": "system", "content": system}]
    try:
        tokenizer.render(messages + [{"role": "user", "content": "hello"}])
    except UserError as error:
        raise UserError(f"--system: {error}") from None
    return messages


def converse(prompt, tokenizer, window, max_new_tokens, answer, name, system=None):
    """Answers a prompt, or else each line of standard input; the oldest turns leave a full window.

    answer   function (text, number of the turn) -> a stream of ids
    name     of the model, for the greeting on a terminal
    system   text of a system message, which stays, or None

    Raises UserError if the template takes no system message.
    """
    messages, first, turn, system = [], 0, 0, opening_of(system, tokenizer)
    if not prompt and sys.stdin is not None and sys.stdin.isatty():
        print(f"{name}: a window of {window} tokens, answers of at most {max_new_tokens} (--max-new-tokens). "
              "/help lists what else there is, Ctrl-D ends.", file=sys.stderr)
    for line in [prompt] if prompt else lines():
        if line.startswith("/") and not prompt:
            if line.strip() == "/quit":
                return
            print(obey(line, messages, system), file=sys.stderr)
            first = min(first, len(messages))
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        was_full, pieces = first > 0, []
        first, text = fitting(messages, first, tokenizer, max(1, window - max_new_tokens), system)
        if first and not was_full:
            print(f"the window of {window} tokens, with {max_new_tokens} kept free for the answer, is full: from now "
                  "on the oldest turns are forgotten (fewer --max-new-tokens leave more room)", file=sys.stderr)
        length = len(tokenizer.encode(text, special=True))
        if length > window:
            print(f"this turn has {length} tokens, the window {window}: only its end is read", file=sys.stderr)
        try:
            if not speak(tokenizer, map(int, answer(text, turn)), pieces):
                print(f"[cut after {max_new_tokens} tokens: --max-new-tokens allows more]", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        messages.append({"role": "assistant", "content": "".join(pieces)})
        turn += 1
