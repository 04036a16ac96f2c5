"""
Held-out prompts, and what of an answer the training text holds already.

    lines = heldout.read("val.jsonl")                          # prompts, responses, choices
    shares = heldout.overlap(lines, heldout.training_text(directory, tokenizer))
    found = heldout.verbatim(answers, heldout.training_text(directory, tokenizer))
"""
import collections, contextlib, json, re, string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import UserError
from data.corpora import clean, objects
from data.loader import LEARNED, open_split

BLOCK = 1 << 20  # tokens that are decoded at a time; a document across two blocks is taken as two
WORDS, BYTES = 8, 50  # a span is so long
GROUPS = ("over 50 %", "10-50 %", "under 10 %")
PRIME = 1_099_511_628_211  # FNV's


class Line(NamedTuple):
    place: str  # file and line, for messages
    prompt: str
    response: str
    choices: list  # of str, the response among them; [] if there is nothing to choose from
    fields: dict  # all of the line


def read(path, flag="--eval"):
    """The lines of a .jsonl file of {"prompt", "response"} and, where answers are to be chosen from, "choices".

    Raises UserError, naming the line, for one that lacks a field, and if there is none.
    """
    path, lines = Path(path), []
    if not path.is_file() and path.with_name("meta.json").is_file():
        raise UserError(f"{flag} {path.parent} holds text, or was prepared by an older version: prepare prompts and "
                        "responses anew, or give a .jsonl file")
    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file")
    for place, fields in objects(path, path.name):
        prompt, response, choices = (fields.get(key) for key in ("prompt", "response", "choices"))
        if choices is not None and not (isinstance(choices, list) and len(set(map(str, choices))) == len(choices) > 1
                                        and all(isinstance(c, str) and c.strip() for c in choices)):
            raise UserError(f'{place}: "choices" must be a list of two or more different texts')
        if choices is not None and response not in choices:
            raise UserError(f'{place}: it has "choices" without an answer: "response" must be one of them')
        if not isinstance(prompt, str) or not isinstance(response, str) or not response.strip():
            raise UserError(f'{place}: needs the text fields "prompt" and "response", and a response that is not empty')
        lines.append(Line(place, clean(prompt), clean(response), list(map(clean, choices or [])), fields))
    if not lines:
        raise UserError(f'{flag} {path} is empty: it needs lines of {{"prompt": ..., "response": ...}}')
    return lines


def training_text(directory, tokenizer):
    """Yield the training split's text as bytes, about 4 MB at a time, a NUL between documents; of examples only the
    responses, which are what is learned."""
    (_, tokens, mask), ends = open_split(directory, "train"), np.array(tokenizer.eos_ids)
    for i in range(0, len(tokens), BLOCK):
        ids = tokens[i:i + BLOCK]
        kept = ~np.isin(ids, ends)
        if mask is not None:
            kept &= mask[i:i + BLOCK] & LEARNED > 0
        edges = np.flatnonzero(np.diff(np.concatenate(([0], kept.view(np.int8), [0]))))
        yield b"\0".join(tokenizer.decode_bytes(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2]))


def word_spans(text):
    """The spans of WORDS words of a text, and of a shorter one the whole."""
    words = text.split()
    return {tuple(words[i:i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def overlap(lines, text):
    """For each line the share (0 to 1) of its response's different 8-word spans that stand in the training text too."""
    wanted = [word_spans(line.response) for line in lines]
    unseen = set().union(*wanted)
    for block in text:
        for document in block.decode("utf-8", errors="replace").split("\0"):
            unseen -= word_spans(document)
    return [1 - len(spans & unseen) / len(spans) for spans in wanted]


def group(share):
    """The one of GROUPS that an overlap belongs to: to repeat is another question than to say something new."""
    return GROUPS[0 if share > 0.5 else 1 if share >= 0.1 else 2]


def span_hashes(data):
    """uint64 of each span of BYTES bytes: a polynomial of its bytes modulo 2^64 (Karp and Rabin, 1987)."""
    x = np.frombuffer(data, np.uint8).astype(np.uint64)
    if len(x) < BYTES:
        return x[:0]
    powers, inverses = (np.full(len(x), p, np.uint64).cumprod() for p in (PRIME, pow(PRIME, -1, 1 << 64)))
    sums = (x * powers).cumsum()                                      # they wrap, as does all of this
    sums[BYTES:] -= sums[:-BYTES].copy()
    return sums[BYTES - 1:] * inverses[:len(x) - BYTES + 1]


def verbatim(answers, text):
    """For each of `answers` (str) how many of its spans of 50 bytes stand in the training text, and how many it has."""
    hashes = [span_hashes(answer.encode("utf-8")) for answer in answers]
    wanted = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]))
    seen = np.zeros(len(wanted), bool)
    for block in text:
        seen |= np.isin(wanted, span_hashes(block))
    return [(int(seen[np.searchsorted(wanted, h)].sum()), len(h)) for h in hashes]


def words_of(text):
    """The words of a text as SQuAD compares them (Rajpurkar et al., 2016): lower case, no punctuation, no articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(answer, response):
    """The harmonic mean of what share of the answer's words are the response's, and of the response's the answer's."""
    answer, response = words_of(answer), words_of(response)
    same = sum((collections.Counter(answer) & collections.Counter(response)).values())
    return 2 * same / (len(answer) + len(response)) if same else float(answer == response)


def interval(statistic, n, resamples=1000):
    """The 95 % interval of statistic(line numbers (n,)) over n lines drawn with replacement (Efron, 1979). Models are
    compared on the same lines each time, so it is paired."""
    generator = torch.Generator().manual_seed(0)
    values = [float(statistic(torch.randint(n, (n,), generator=generator))) for _ in range(resamples)]
    return torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()


def is_answers(path):
    """Whether the first line of a file is one that --eval --out writes."""
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        return {"model", "nats", "bytes"} <= set(json.loads(file.readline(1 << 24)))
    return False
