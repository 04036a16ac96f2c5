"""Checks of a stranger's tokenizer files, and the bytes and merges behind the texts in them."""
import collections, copy, functools, heapq, json, re

import numpy as np
import torch

from data import UserError


MOST_IDS = 1 << 24  # a larger id in a file is a mistake: the list of all tokens would fill the memory


def is_id(value):
    return type(value) is int and 0 <= value < MOST_IDS


def must(right, message):
    if not right:
        raise UserError(message)


def no_constant(name):
    raise ValueError(f"{name} is not a number")


def pairs(model):
    """The merges of a tokenizer.json, each [left, right]: older files have "left right"."""
    return [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or []]


def check_tokenizer(data):
    """Raises UserError if a part of tokenizer.json that is used here has the wrong type, size or number."""
    def objects(value):
        return isinstance(value, list) and all(isinstance(v, dict) for v in value)

    model = data.get("model") if isinstance(data, dict) else None
    must(isinstance(model, dict), "tokenizer.json has no model (an object with a vocabulary)")
    for name, inner in ("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders"), (
            "post_processor", "processors"):
        part = data.get(name)
        must(part is None or isinstance(part, dict) and objects(part.get(inner, [])),
             f"tokenizer.json: {name} must be an object, and its {inner} a list of objects")
    vocab, merges, added = model.get("vocab"), model.get("merges"), data.get("added_tokens")
    if isinstance(vocab, list):  # Unigram: [token, log probability], by id
        must(all(isinstance(v, list) and len(v) == 2 and isinstance(v[0], str) and type(v[1]) in (int, float)
                 and abs(v[1]) < 1e30 for v in vocab), "tokenizer.json: vocab must hold pairs of a text and a number")
        vocab = {v[0]: i for i, v in enumerate(vocab)}
        must(len(vocab) == len(model["vocab"]), "tokenizer.json: a token stands twice in vocab")
    must(isinstance(vocab, dict), "tokenizer.json: vocab must be an object of tokens and ids")
    for token, i in vocab.items():
        must(is_id(i), f"tokenizer.json: the id of {token!r} is {i!r:.40}; it must be from 0 to {MOST_IDS - 1:,}")
    tokens = {i: token for token, i in vocab.items()}
    must(len(tokens) == len(vocab), "tokenizer.json: two tokens of vocab have the same id")
    must(merges is None or isinstance(merges, list) and all(
        len(m) == 2 and all(isinstance(t, str) and t for t in m) if isinstance(m, list)
        else isinstance(m, str) and re.fullmatch(r"[^ ]+ [^ ]+", m) for m in merges),
        "tokenizer.json: merges must be a list of pairs of tokens")
    must(added is None or objects(added), "tokenizer.json: added_tokens must be a list of objects")
    names = set()
    for t in added or []:
        name, i = t.get("content"), t.get("id")
        must(isinstance(name, str) and name, f"tokenizer.json: an added token's content is {name!r:.40}, not a text")
        must(is_id(i), f"tokenizer.json: the id of the added token {name!r:.80} is {i!r:.40}; it must be from 0 to "
                       f"{MOST_IDS - 1:,}")
        must(name not in names and tokens.setdefault(i, name) == name,
             f"tokenizer.json: the added token {name!r:.80} or its id {i} stands there twice")
        must(all(isinstance(t.get(k, False), bool) for k in ("special", "lstrip", "rstrip", "single_word",
                                                             "normalized")),
             f"tokenizer.json: a flag of the added token {name!r:.80} is neither true nor false")
        names.add(name)


def check_tokenizer_config(config, file="tokenizer_config.json"):
    """Raises UserError if a part of tokenizer_config.json that is used here has the wrong type."""
    must(isinstance(config, dict), f"{file} must hold an object")
    for key in ("eos_token", "bos_token", "unk_token", "pad_token"):
        name = config.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        must(name is None or isinstance(name, str), f"{file}: {key} must be a text, not {name!r:.40}")
    chat, longest = config.get("chat_template"), config.get("model_max_length")
    must(chat is None or isinstance(chat, str) or isinstance(chat, list) and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str)
        for t in chat), f"{file}: chat_template must be a text, or a list of objects with name and template")
    must(longest is None or type(longest) in (int, float), f"{file}: model_max_length must be a number")


def end_ids(config, file):
    """The ids of eos_token_id in generation_config.json or config.json: none, one or a list."""
    ids = config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    must(all(map(is_id, ids)), f"{file}: eos_token_id must be an id or a list of ids, not {ids!r:.60}")
    return ids


def is_panic(error):
    return type(error).__name__ == "PanicException"  # pyo3_runtime's, which cannot be imported


def border(function):
    """Turns what the Rust libraries raise into UserError: their panics are BaseExceptions, their errors Exception."""
    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except BaseException as e:
            if type(e) is Exception or is_panic(e):
                reason = " ".join(str(e).split())[:200]
                raise UserError(f"the tokenizer's library gave up ({reason}): the regex or the vocabulary in "
                                "tokenizer.json is broken, take the model's own file anew") from None
            raise
    return guarded


def said_in(said, text):
    """Whether a text holds what was said, if it is compared without spaces, marks and case, or as JSON."""
    squeezed = lambda x: re.sub(r"[\W_]+", "", x).casefold()
    return bool(squeezed(said)) and squeezed(said) in squeezed(text) or json.dumps(
        said, ensure_ascii=False)[1:-1] in text


@functools.lru_cache(1)
def byte_alphabet():
    """GPT-2's table of one printable character per byte, so that a vocabulary of bytes can be written as JSON text.

    Returns a list of 256 characters: bytes that print well stand for themselves, the others for chr(256), chr(257), ...
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def spell(token):
    """Bytes as text of byte_alphabet."""
    return "".join(byte_alphabet()[b] for b in token)


@functools.lru_cache(1)
def byte_values():
    """For str.translate: a character of byte_alphabet to its byte, any other to one that latin-1 cannot write."""
    return {**dict.fromkeys(range(256), 0xFFFF), **{ord(c): b for b, c in enumerate(byte_alphabet())}}


def unspell(text):
    """Bytes of a token spelled in byte_alphabet; of any other (an added token) its utf-8."""
    try:
        return text.translate(byte_values()).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8")


def from_sentencepiece(token):
    """Bytes of one of SentencePiece's tokens: <0x0A> is a byte, U+2581 a space."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode("utf-8")


def merges_of(tokens):
    """The merge list [[left, right], ...], spelled, behind `tokens` (bytes by rank): the last merge that makes each."""
    ranks, merges = {token: rank for rank, token in enumerate(tokens)}, []
    for token in tokens[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= ranks[token]:
                break  # no way to it by merges: only the lookup of whole words (ignore_merges) finds it
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append([spell(part) for part in parts])
    return merges


def tokenizer_json(vocab, merges, specials, pattern=None):
    """The Hub's tokenizer.json as a dict; pattern None is GPT-2's, which ByteLevel has built in."""
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


def cut_tokenizer(tokenizer, counts, size):
    """(ids that stay (n,), the Tokenizer of n ids that they become), by how often each id is used.

    One id goes after another until `size` are left: of those that no merge builds on the least used one, and its uses
    become uses of the two that it is built from. Bytes and added tokens stay. Raises UserError if those are more.
    """
    data = copy.deepcopy(tokenizer.data)
    bpe, added, counts = data["model"], {t["content"] for t in data.get("added_tokens") or []}, counts.tolist()
    if "merges" not in bpe or (data.get("decoder") or {}).get("type") != "ByteLevel":
        raise UserError("vocab: the tokenizer is not a byte-level BPE, and of others no id can be left out")
    vocab, made, builds, gone = bpe["vocab"], collections.defaultdict(list), collections.Counter(), set()
    for pair in map(tuple, pairs(bpe)):
        made["".join(pair)].append(pair)
        builds.update(pair)
    leaves = [(counts[i], -i, t) for t, i in vocab.items() if not builds[t] and len(t) > 1 and t not in added]
    heapq.heapify(leaves)
    for _ in range(len(vocab.keys() | added) - size):
        if not leaves:
            raise UserError(f"vocab: {size} ids are fewer than the bytes and special tokens, which stay: keep more")
        count, _, token = heapq.heappop(leaves)
        gone.add(token)
        for pair in made[token]:
            for part in pair:
                builds[part] -= 1
                counts[vocab[part]] += count if pair is made[token][0] else 0
                if not builds[part] and len(part) > 1 and part not in added:
                    heapq.heappush(leaves, (counts[vocab[part]], -vocab[part], part))
    kept = sorted({i for t, i in vocab.items() if t not in gone} | {t["id"] for t in data.get("added_tokens") or []})
    new = {old: i for i, old in enumerate(kept)}
    bpe.update(vocab={t: new[i] for t, i in vocab.items() if t not in gone},
               merges=[pair for pair in pairs(bpe) if "".join(pair) not in gone])
    for token in data.get("added_tokens") or []:
        token["id"] = new[token["id"]]
    post = data.get("post_processor") or {}
    for token in (t for p in post.get("processors", [post]) for t in (p.get("special_tokens") or {}).values()):
        token["ids"] = [new[i] for i in token["ids"]]
    return torch.tensor(kept), type(tokenizer)(data, tokenizer.config, [new[i] for i in tokenizer.eos_ids])


def any_of(texts):
    """A regex that finds any of `texts`, the longest first; None for none."""
    texts = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None


def reencoded(ids, theirs, ours):
    """A stream of one tokenizer's ids, documents with an end-of-text id after each, in another's."""
    ids, result = np.asarray(ids), []
    for document in map(np.ndarray.tolist, np.split(ids, np.flatnonzero(ids == theirs.eos_id) + 1)):
        ended = document[-1:] == [theirs.eos_id]
        result += ours.encode(theirs.decode(document[:-1] if ended else document)) + [ours.eos_id] * ended
    return result
