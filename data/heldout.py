"""
Held-out prompts, and how much of an answer the training text already holds.

    lines = heldout.read("val.jsonl")                          # prompts, responses, choices
    shares = heldout.overlap(lines, heldout.training_text(directory, tokenizer))
    spans = heldout.verbatim(answers, heldout.training_text(directory, tokenizer))
"""
import collections, contextlib, json, re, string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import UserError
from data.conversation import asked, clean, of_record
from data.files import replacing_file
from data.loader import LEARNED, open_split
from data.records import holds_records, objects

BLOCK = 1 << 20  # tokens decoded at a time; a document across two blocks counts as two
WORDS, BYTES = 8, 50  # lengths of a span
GROUPS = ("over 50 %", "10-50 %", "under 10 %")
PRIME = 1_099_511_628_211  # FNV's


# ---------------------------------------------------------------------------------------------------------------------
# The command sample.py --eval: flags, lines, groups, results

def evaluation_flags(parser):
    """Adds the flags of sample.py --eval to a parser."""
    group = parser.add_argument_group("held-out prompts", "how well the models predict the responses, and what they "
                                      "answer; the first model is the baseline")
    group.add_argument("--eval", metavar="NAME_OR_FILE", help="the held-out examples of prepared data, or a file "
                       "(.jsonl, .json, .csv, ...) of prompt, response and, to choose from, choices; of a conversation "
                       "the last response counts")
    group.add_argument("--data", metavar="NAME_OR_DIR", help="with such a file: prepared training data, to find "
                       "repetition in the responses (groups by overlap) and in the answers")
    group.add_argument("--by", metavar="FIELD", help="groups by this field of the lines, too")
    group.add_argument("--answers", type=int, default=100, help="prompts to answer, spread over the file (100)")
    group.add_argument("--out", metavar="FILE", help="write all results and answers, a line each (.jsonl)")
    group.add_argument("--overwrite", action="store_true", help="replace that file")


def check_evaluation_flags(args):
    """Raises UserError for flags and models that need --eval, where it is not given."""
    for flag in ("data", "by", "out") if not args.eval else ():
        if getattr(args, flag):
            raise UserError(f"--{flag} is for held-out prompts: it needs --eval NAME_OR_FILE")
    if not args.eval and len(args.model) > 1:
        raise UserError(f"{' '.join(args.model)}: several models are compared with --eval NAME_OR_FILE; otherwise give "
                        "one")


def of_command(args):
    """(Lines, directory of the training data or None) for --eval and --data. Raises UserError."""
    from data.prepare import find                                # here: to read lines needs no tokenizer
    from_file = holds_records(args.eval)
    if args.out and Path(args.out).exists():
        check_replaceable(args)
    if args.data and not from_file:
        raise UserError(f"--eval {args.eval} is prepared data, with its own training text: leave out --data")
    flag, wanted = ("--data", args.data) if args.data else ("--eval", args.eval)
    directory = find(wanted, args.smoke, flag) if args.data or not from_file else None
    if directory is None and (args.data or not from_file):
        raise UserError(f"{flag} {wanted} is not prepared yet: python data/prepare.py {wanted}")
    lines = read(args.eval if from_file else directory / "val.jsonl")
    return lines[:8 if args.smoke else None], directory


def check_replaceable(args):
    """Raises UserError if the file or directory at --out must not be replaced."""
    if Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a directory: give the name of a file")
    if not args.overwrite:
        raise UserError(f"--out {args.out} is there already: give another name or --overwrite")
    if not is_answers(args.out):
        raise UserError(f"--out {args.out} is not a file that --eval wrote, so --overwrite does not replace it: give "
                        "another name")


def groups(lines, shares=None, by=None):
    """{group: line numbers}: all lines, by overlap (`shares`), and by a field of the lines.

    Groups without lines are left out. Raises UserError for a line without the field.
    """
    result = {"all": list(range(len(lines)))}
    if shares:
        result |= {f"overlap {name}": [i for i, share in enumerate(shares) if group(share) == name] for name in GROUPS}
    if by:
        lacking = next((line for line in lines if by not in line.fields), None)
        if lacking:
            raise UserError(f"{lacking.place}: it has no field {by!r}, which --by names")
        values = [str(line.fields[by]) for line in lines]
        result |= {f"{by} {v}": [i for i, value in enumerate(values) if value == v] for v in sorted(set(values))}
    return {name: numbers for name, numbers in result.items() if numbers}


def write_answers(path, lines, results, shares=None):
    """Writes the results {model: rows of `evaluate`}, a JSON line for each model and prompt."""
    with replacing_file(path) as new, open(new, "w", encoding="utf-8", newline="\n") as file:
        for name, rows in results.items():
            for i, (line, row) in enumerate(zip(lines, rows)):
                more = {"overlap": round(shares[i], 4)} if shares else {}
                file.write(json.dumps({**line.fields, "model": name, **more, **row}) + "\n")
    print(f"wrote {path}")


def is_answers(path):
    """Whether the first line of a file is one that write_answers writes."""
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        return {"model", "nats", "bytes"} <= set(json.loads(file.readline(1 << 24)))
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Lines

class Line(NamedTuple):
    """A prompt and its response, with all fields of the JSON line."""
    place: str  # file and line, for messages
    prompt: list  # the messages before the response
    response: str
    choices: list  # of str, with the response; [] without choices
    fields: dict

    @property
    def messages(self):
        """The conversation, the response at the end."""
        return [*asked(self.prompt), {"role": "assistant", "content": self.response}]


def read(path, flag="--eval"):
    """The Lines of a file of records {"prompt", "response"} and, for multiple choice, "choices".

    data/conversation.py says which other records are read. The response of a conversation is the
    last turn of the assistant.
    Raises UserError, naming the place, for a record that lacks a field, and for an empty file.
    """
    path, lines = Path(path), []
    if not path.is_file() and path.with_name("meta.json").is_file():
        raise UserError(f"{flag} {path.parent} holds text, or was prepared by an older version: prepare prompts and "
                        "responses anew, or give a .jsonl file")
    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file")
    for place, fields in objects(path, path.name):
        messages, _ = of_record(place, fields) or ([], "")
        response = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""
        check_choices(place, response, choices := fields.get("choices"))
        if not response.strip():
            raise UserError(f'{place}: needs the text fields "prompt" and "response", or "messages", and a response '
                            "that is not empty; fields of other names are for data/prepare.py --prompt-field and "
                            f"--response-field: give {flag} the name of what it prepared")
        lines.append(Line(place, messages[:-1], response, list(map(clean, choices or [])), fields))
    if not lines:
        raise UserError(f'{flag} {path} is empty: it needs lines of {{"prompt": ..., "response": ...}}')
    return lines


def check_choices(place, response, choices):
    """Raises UserError unless choices are None, or different texts and the response is one."""
    if choices is None:
        return
    if not (isinstance(choices, list) and len(set(map(str, choices))) == len(choices) > 1
            and all(isinstance(c, str) and c.strip() for c in choices)):
        raise UserError(f'{place}: "choices" must be a list of two or more different texts')
    if response not in map(clean, choices):
        raise UserError(f'{place}: it has "choices" without an answer: "response" must be one of them')


# ---------------------------------------------------------------------------------------------------------------------
# Repetition of the training text

def training_text(directory, tokenizer):
    """Yields the training text as bytes, about 4 MB at a time, a NUL between documents.

    Of examples only the responses, as only they are learned.
    """
    (_, tokens, mask), ends = open_split(directory, "train"), np.array(tokenizer.eos_ids)
    for i in range(0, len(tokens), BLOCK):
        ids = tokens[i:i + BLOCK]
        learned = ~np.isin(ids, ends)
        if mask is not None:
            learned &= mask[i:i + BLOCK] & LEARNED > 0
        edges = np.flatnonzero(np.diff(np.concatenate(([0], learned.view(np.int8), [0]))))
        yield b"\0".join(tokenizer.decode_bytes(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2]))


def word_spans(text):
    """The set of spans of WORDS words of a text; a shorter text is one span."""
    words = text.split()
    return {tuple(words[i:i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def overlap(lines, text):
    """The share (0 to 1) of word spans of each response that the training text has, too."""
    wanted = [word_spans(line.response) for line in lines]
    unseen = set().union(*wanted)
    for block in text:
        for document in block.decode("utf-8", errors="replace").split("\0"):
            unseen -= word_spans(document)
    return [1 - len(spans & unseen) / len(spans) for spans in wanted]


def group(share):
    """The one of GROUPS for an overlap: repeating is another ability than answering."""
    if share > 0.5:
        return GROUPS[0]
    return GROUPS[1] if share >= 0.1 else GROUPS[2]


def span_hashes(data):
    """uint64 of each span of BYTES bytes: a polynomial modulo 2^64 (Karp and Rabin, 1987)."""
    x = np.frombuffer(data, np.uint8).astype(np.uint64)
    if len(x) < BYTES:
        return x[:0]
    powers, inverses = (np.full(len(x), p, np.uint64).cumprod() for p in (PRIME, pow(PRIME, -1, 1 << 64)))
    sums = (x * powers).cumsum()                                      # wraps, like all arithmetic here
    sums[BYTES:] -= sums[:-BYTES].copy()
    return sums[BYTES - 1:] * inverses[:len(x) - BYTES + 1]


def verbatim(answers, text):
    """For each answer (str): (spans of 50 bytes that the training text has, all spans)."""
    hashes = [span_hashes(answer.encode("utf-8")) for answer in answers]
    wanted = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]))
    seen = np.zeros(len(wanted), bool)
    for block in text:
        seen |= np.isin(wanted, span_hashes(block))
    return [(int(seen[np.searchsorted(wanted, h)].sum()), len(h)) for h in hashes]


# ---------------------------------------------------------------------------------------------------------------------
# Answers

def words_of(text):
    """Words without case, punctuation and articles, as in SQuAD (Rajpurkar et al., 2016)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(answer, response):
    """Token F1: the harmonic mean of precision and recall of the answer's words."""
    answer, response = words_of(answer), words_of(response)
    same = sum((collections.Counter(answer) & collections.Counter(response)).values())
    return 2 * same / (len(answer) + len(response)) if same else float(answer == response)


def interval(statistic, n, resamples=1000):
    """The 95 % bootstrap interval of statistic(line numbers (n,)) over n lines (Efron, 1979).

    All models are compared on the same resampled lines: the bootstrap is paired.
    """
    generator = torch.Generator().manual_seed(0)
    values = [float(statistic(torch.randint(n, (n,), generator=generator))) for _ in range(resamples)]
    return torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()
