"""The vocabulary of a tokenizer.json: bytes as text, merges, fewer ids, another tokenizer's ids."""
import collections, copy, functools, heapq, re

import numpy as np
import torch

from data import UserError


@functools.lru_cache(1)
def byte_alphabet():
    """GPT-2's table of one printable character per byte: a list of 256 str.

    With the table a vocabulary of bytes is JSON text. Bytes that print well stand for themselves,
    others for chr(256), chr(257), ...
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def spell(token):
    """Bytes as text of byte_alphabet."""
    return "".join(byte_alphabet()[b] for b in token)


@functools.lru_cache(1)
def byte_values():
    """A table for str.translate: byte_alphabet to bytes, others to one that latin-1 lacks."""
    return {**dict.fromkeys(range(256), 0xFFFF), **{ord(c): b for b, c in enumerate(byte_alphabet())}}


def unspell(text):
    """Bytes of a token spelled in byte_alphabet; of any other (an added token) the UTF-8 bytes."""
    try:
        return text.translate(byte_values()).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8")


def from_sentencepiece(token):
    """Bytes of one of SentencePiece's tokens: <0x0A> is a byte, U+2581 a space."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode("utf-8")


def pairs(model):
    """The merges of a tokenizer.json's model, each [left, right]; old files write "left right"."""
    return [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or []]


def merges_of(tokens):
    """The merges [[left, right], ...], spelled, of `tokens` (bytes by rank), the last of each."""
    ranks, merges = {token: rank for rank, token in enumerate(tokens)}, []
    for token in tokens[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            candidates = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            best = min(range(len(candidates)), key=candidates.__getitem__)
            if candidates[best] >= ranks[token]:
                break  # no merges make this token: only the lookup of whole words (ignore_merges) finds it
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append([spell(part) for part in parts])
    return merges


def tokenizer_json(vocab, merges, specials, pattern=None):
    """The Hub's tokenizer.json of a byte-level BPE, as a dict.

    vocab, specials: {text: id}; pattern: the regex that cuts words, None for GPT-2's.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": t, **flags} for t, i in sorted(specials.items(), key=lambda x: x[1])],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]} if pattern else byte_level,
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": pattern is not None, "vocab": vocab, "merges": merges},
    }


def any_of(texts):
    """A regex that finds any of `texts`, the longest first; None for none."""
    texts = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None


def rarest_tokens(model, added, counts, number):
    """The `number` tokens (a set of str) that a byte-level BPE can lose, least used first.

    Only a token on which no merge builds can go. Each use of that token becomes a use of the two
    tokens of the merge. Bytes and `added` tokens stay. counts: uses by id, a list that changes.
    Raises UserError if too few tokens can go.
    """
    vocab, removed = model["vocab"], set()
    merges, builds = collections.defaultdict(list), collections.Counter()  # builds: merges that build on a token
    for pair in map(tuple, pairs(model)):
        merges["".join(pair)].append(pair)
        builds.update(pair)
    can_go = lambda token: not builds[token] and len(token) > 1 and token not in added
    heap = [(counts[i], -i, token) for token, i in vocab.items() if can_go(token)]
    heapq.heapify(heap)
    for _ in range(number):
        if not heap:
            size = len(vocab.keys() | added) - number
            raise UserError(f"vocab: {size} ids are fewer than the bytes and special tokens, which stay: keep more")
        count, _, token = heapq.heappop(heap)
        removed.add(token)
        for pair in merges[token]:
            for part in pair:
                builds[part] -= 1
                if pair is merges[token][0]:
                    counts[vocab[part]] += count
                if can_go(part):
                    heapq.heappush(heap, (counts[vocab[part]], -vocab[part], part))
    return removed


def cut_tokenizer(tokenizer, counts, size):
    """Removes the least used ids of a byte-level BPE until `size` ids are left (see rarest_tokens).

    counts: uses of each id. Returns (the old id of each new one (size,), the new Tokenizer).
    Raises UserError if the bytes and added tokens, which stay, are more.
    """
    data = copy.deepcopy(tokenizer.data)
    model, added = data["model"], data.get("added_tokens") or []
    if "merges" not in model or (data.get("decoder") or {}).get("type") != "ByteLevel":
        raise UserError("vocab: the tokenizer is not a byte-level BPE, and of others no id can be left out")
    names = {t["content"] for t in added}
    removed = rarest_tokens(model, names, counts.tolist(), len(model["vocab"].keys() | names) - size)
    new_ids = remove_tokens(data, removed)
    ends = [new_ids[i] for i in tokenizer.eos_ids]
    return torch.tensor(list(new_ids)), type(tokenizer)(data, tokenizer.config, ends)


def remove_tokens(data, removed):
    """Removes tokens (a set of str) from a tokenizer.json in place. Returns {old id: new id}."""
    model, added = data["model"], data.get("added_tokens") or []
    vocab = {token: i for token, i in model["vocab"].items() if token not in removed}
    new_ids = {old: new for new, old in enumerate(sorted({*vocab.values(), *(t["id"] for t in added)}))}
    model["vocab"] = {token: new_ids[i] for token, i in vocab.items()}
    model["merges"] = [pair for pair in pairs(model) if "".join(pair) not in removed]
    for token in added:
        token["id"] = new_ids[token["id"]]
    post = data.get("post_processor") or {}
    for processor in post.get("processors", [post]):
        for token in (processor.get("special_tokens") or {}).values():
            token["ids"] = [new_ids[i] for i in token["ids"]]
    return new_ids


def reencoded(ids, old, new):
    """Ids of tokenizer `old`, an end-of-text id after each document, as a list of ids of `new`."""
    ids, result = np.asarray(ids), []
    for document in map(np.ndarray.tolist, np.split(ids, np.flatnonzero(ids == old.eos_id) + 1)):
        complete = document[-1:] == [old.eos_id]
        result += new.encode(old.decode(document[:-1] if complete else document)) + [new.eos_id] * complete
    return result
