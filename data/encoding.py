"""
Second pass of prepare: threads encode documents into files that can be continued after a kill.

A task is a list of (TRAIN or VAL, item). An item is a piece of text, an Example, or None at a
document's end. The tasks of the same sources are always the same, so a count says what is done.
"""
import contextlib, itertools, json, lzma, os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data import UserError, corpora
from data.conversation import answers, clean, of_record
from data.files import sync, write_json
from data.loader import FIRST, LEARNED
from data.split import BOTH, TRAIN, VAL
from data.template import OTHER, shows

TASK = 256 << 10  # bytes that a thread encodes at a time: few hand-overs, and a small queue
SAVE_EVERY = 256  # tasks (64 MB of text): the most work that a kill costs


def encode_examples(tokenizer, examples):
    """(ids uint32 (n,), mask uint8 (n,)) of each example, in the chat template: see encode_turns.

    examples   have `messages`, and a `place` that an error names. Special tokens are recognised in
               the template only.
    """
    try:
        return encode_conversations(tokenizer, [example.messages for example in examples])
    except UserError:  # the template refuses one of them
        for example in examples:
            try:
                encode_conversations(tokenizer, [example.messages])
            except UserError as error:
                raise UserError(f"{example.place}: {error}") from None
        raise


def encode_conversations(tokenizer, conversations, last_only=False):
    """(ids, mask) of each list of messages. last_only: only the last turn is learned.

    The text before a turn and the text after it come from the template, for all turns at once.
    """
    learned = [answers(messages)[-1 if last_only else 0:] for messages in conversations]
    texts = tokenizer.render_all((messages[:i + after], not after) for messages, turns in zip(conversations, learned)
                                 for i in turns for after in (0, 1))
    return [encode_turns(tokenizer, ((next(texts), next(texts), messages[i]["content"]) for i in turns))
            for messages, turns in zip(conversations, learned)]


def encode_turns(tokenizer, turns):
    """(ids, mask) of a conversation: its turns of the assistant are LEARNED, and nothing else.

    turns   (the text up to the turn with the generation prompt, the text with the turn, the words)
            for each turn of the assistant: an iterator, as all texts of a long chat fill the memory

    LEARNED is all that the template writes for a turn, up to the end token of the turn, or for the
    last turn the last end token: some templates end the text, too. Text after that is left out.

    Each turn is learned in the text that a chat shows at that turn. Mostly this text begins with
    the text of the turn before, so the conversation is one example. Some templates show a turn in
    another way once it is in the past: Qwen3's takes thoughts out. No single text has both, so the
    next turn begins an example of its own (FIRST), which shows the past as the chat does.
    """
    ids, mask, begun, end = [], [], "", ""  # begun: the text of this example up to the token `end`
    for (prompt, full, words), following in itertools.pairwise(itertools.chain(turns, [None])):
        rest = full[len(prompt):]
        if not full.startswith(prompt):
            raise UserError("the tokenizer's chat template does not write an answer right after its generation prompt "
                            f"(it may open a thought there): {OTHER}")
        if not shows(tokenizer.unguarded(rest), words):
            raise UserError(f"the tokenizer's chat template loses the text of the message of assistant: {OTHER}")
        size, token = tokenizer.first_end(rest)
        goes_on = token and following and following[0].startswith(prompt + rest[:size])
        head, tail = encode_turn(tokenizer, prompt[len(begun):], rest[:size] if goes_on else rest, end)
        if not begun and tokenizer.bos_id is not None and head[:1].tolist() != [tokenizer.bos_id]:  # as in a chat
            head = np.append(np.uint32(tokenizer.bos_id), head)
        ids += [head, tail]
        mask.append(np.repeat(np.array([0, LEARNED], np.uint8), [len(head), len(tail)]))
        mask[-1][0] |= 0 if begun else FIRST
        begun, end = (prompt + rest[:size], token) if goes_on else ("", "")
    return np.concatenate(ids), np.concatenate(mask)


def encode_turn(tokenizer, prompt, rest, end=""):
    """(head, tail): the ids of a prompt, and of the `rest` of the text up to the last end token.

    end   the end token before the prompt, which is read but not given back: tokenizers treat the
          beginning of a text, and white space behind some tokens, in another way
    """
    encoded, before_rest = lambda text: tokenizer.encode_array(text, special=True), end + prompt
    head = encoded(before_rest)
    # Where a token would span the border of prompt and response, the head stays as in a chat, and
    # the response is encoded behind a text with which it shares no token: SentencePiece would put a
    # space before a response alone.
    for before in (before_rest, "") if tokenizer.pattern else (before_rest, "\n", ".", ""):
        start, both = head if before == before_rest else encoded(before), encoded(before + rest)
        if np.array_equal(both[:len(start)], start):
            break
    tail = both[len(start):]
    ends = np.flatnonzero(np.isin(tail, tokenizer.eos_ids))
    tail = tail[:ends[-1] + 1] if len(ends) else np.append(tail, np.uint32(tokenizer.eos_id))
    if end:
        head = head[np.isin(head, tokenizer.eos_ids).argmax() + 1:]
    return head, tail


def tasks(sources, kind, stats):
    """Yields (task, bytes of text), and adds documents and bytes to `stats`, a dict per split.

    Raises UserError if a file changed since the first pass.
    """
    task, waiting = [], 0
    for source in sources:
        for name, parts, side, size in source.documents(TRAIN, VAL, BOTH):
            read = 0
            try:
                for which, piece, data in source.pieces(parts, side, size):
                    read, waiting = read + len(data), waiting + len(data)
                    stats[which]["bytes"] += len(data)
                    task.append((which, parts if piece is None else piece))
                    if waiting > TASK:
                        yield task, waiting
                        task, waiting = [], 0
            except corpora.Skip:
                read = -1
            if read != size:
                raise UserError(f"{name} changed while it was read; run it again")
            for which in (TRAIN, VAL) if side == BOTH else (side,):
                stats[which]["documents"] += 1
                if kind == "text":
                    task.append((which, None))
            if kind == "examples":
                learned = [parts.messages[i]["content"] for i in answers(parts.messages)]
                stats[which]["bytes"] -= len(parts.messages) - 1  # a \0 between two messages
                stats[which]["response_bytes"] += sum(len(text.encode("utf-8")) for text in learned)
    yield task, waiting


def encode(tokenizer, task, dtype):
    """Bytes that `task` adds to train.bin, val.bin, train.mask.bin and val.mask.bin: four."""
    added = [bytearray() for _ in range(4)]
    examples = iter(encode_examples(tokenizer, [item for _, item in task if isinstance(item, tuple)]))
    for which, item in task:
        if isinstance(item, tuple):
            ids, mask = next(examples)
            added[2 + which] += mask.tobytes()
        else:
            ids = np.array([tokenizer.eos_id]) if item is None else tokenizer.encode_array(item)
        added[which] += ids.astype(dtype).tobytes()
    return added


class Output(contextlib.ExitStack):
    """The .bin files of a dataset under way; part/progress.json has the count of tasks and sizes.

    After a kill the files are cut to these sizes. If a file is shorter, all begin again.
    """

    def __init__(self, part, progress, kind):
        super().__init__()
        self.part, self.progress = part, progress
        names = ["train.bin", "val.bin"] + ["train.mask.bin", "val.mask.bin"] * (kind == "examples")
        sizes = [(part / name).stat().st_size if (part / name).is_file() else 0 for name in names]
        if "tasks" not in progress or any(size < saved for size, saved in zip(sizes, progress["sizes"])):
            progress.update(tasks=0, sizes=[0] * len(names), learned=[0, 0], examples=[0, 0])
        self.files = [self.enter_context(open(part / name, "ab")) for name in names]
        for file, size in zip(self.files, progress["sizes"]):
            file.truncate(size)

    def append(self, added):
        """Appends the bytes of one task, as `encode` gives them."""
        for i, (file, data) in enumerate(zip(self.files, added)):
            file.write(data)
            self.progress["sizes"][i] += len(data)
            if i >= 2:
                mask = np.frombuffer(data, np.uint8)
                self.progress["learned"][i - 2] += int(np.count_nonzero(mask & LEARNED))
                self.progress["examples"][i - 2] += int(np.count_nonzero(mask & FIRST))
        self.progress["tasks"] += 1

    def save(self):
        """Writes progress.json, after everything before is on disk."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        write_json(self.part / "progress.json", self.progress)


def write(part, progress, tokenizer, sources, kind):
    """Encodes `sources`, in order, into the .bin files. Returns (meta.json's "splits", dtype name).

    Tasks that an interrupted run has done are counted only.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 65536 else "<u4")
    keys = ("documents", "tokens", "bytes") + ("response_tokens", "response_bytes") * (kind == "examples")
    stats, pending, cores = [dict.fromkeys(keys, 0) for _ in range(2)], deque(), os.cpu_count() or 1
    total = sum(source.total_bytes() for source in sources)
    with (Output(part, progress, kind) as output, ThreadPoolExecutor(cores) as pool,
          tqdm(total=total, unit="B", unit_scale=True, desc="encode", disable=None, leave=False) as bar):
        done = progress["tasks"]
        for number, (task, size) in enumerate(tasks(sources, kind, stats), 1):
            bar.update(size)
            if number <= done:
                continue
            pending.append(pool.submit(encode, tokenizer, task, dtype))
            if len(pending) > 2 * cores:
                output.append(pending.popleft().result())
            if number % SAVE_EVERY == 0:
                output.save()
        for future in pending:
            output.append(future.result())
        output.save()
    for which, counts in enumerate(stats):
        counts["tokens"] = progress["sizes"][which] // dtype.itemsize
        if kind == "examples":
            counts["response_tokens"] = progress["learned"][which]
            if progress["examples"][which] > counts["documents"]:  # see encode_turns
                counts["examples"] = progress["examples"][which]
    return dict(zip(("train", "val"), stats)), dtype.name


def repetition(part, splits, dtype, tokenizer):
    """Bits per byte of held-out text for xz, a general compressor, that has read training text.

    Of the learned tokens: the last 2^18 of the training split, the first 2^15 of the validation
    split. Returns {"repetition": bits}, or {} for a text of 20 MB and more: that is not little.
    """
    if splits["train"]["bytes"] >= 20_000_000:
        return {}

    def text(split, chosen):
        tokens = np.fromfile(part / f"{split}.bin", dtype)
        mask = part / f"{split}.mask.bin"
        if mask.exists():
            tokens = tokens[np.fromfile(mask, np.uint8) & LEARNED > 0]
        return tokenizer.decode_bytes(tokens[chosen].tolist())
    known, held_out = text("train", slice(-2 ** 18, None)), text("val", slice(2 ** 15))
    size = lambda text: len(lzma.compress(text, preset=6))
    return {"repetition": round(8 * (size(known + held_out) - size(known)) / max(1, len(held_out)), 3)}


def write_held_out(path, sources):
    """Writes the validation examples of `sources` with all their fields, a line each.

    Where the usual names of fields do not give the messages, they are added as "messages".
    """
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for source in sources:
            for _, example, _, _ in source.documents(VAL):
                usual, fields = of_record(example.place, example.fields), example.fields
                if not usual or usual[0] != example.messages:
                    fields = {**fields, "messages": example.messages}
                out.write(clean(json.dumps(fields, ensure_ascii=False)) + "\n")
    sync(path)
