"""
Text <-> token ids: byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; over bytes as in GPT-2).

    tokenizer = Tokenizer.train(texts, vocab_size=4096)     # or .from_bytes(), .gpt2(), .load(DIRECTORY)
    ids = tokenizer.encode("def f(x):")
    text = tokenizer.decode(ids)

What is stored is the Hub's tokenizer.json; what encodes is a `tiktoken.Encoding` built from it, several times faster
than the `tokenizers` library and with the same ids.
"""

import functools
import hashlib
import json
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from data import UserError

# How text is cut into words before BPE merges bytes within them. Qwen2's: one digit at a time, newlines end a word.
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's after `Digits(individual_digits=True)` (SmolLM, StarCoder): a digit stands alone and ends what is before it
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# For tokenizers that have no chat tokens. No space after the last colon: " The" is one token, " " + "The" are two.
PLAIN = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token + '\n' }}"
         "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}"
         "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")

GUARD = "\ufdd0"  # a Unicode noncharacter: render() puts it inside an "<|im_end|>" that a message wrote
LONG_RUN = 100_000  # the regex engine overflows its stack on about 1,000,000 whitespace characters in a row


@functools.lru_cache(1)
def byte_alphabet():
    """GPT-2's table of one printable character per byte, so that a vocabulary of bytes can be written as JSON text.

    Returns a list of 256 characters: bytes that print well stand for themselves, the others for chr(256), chr(257), ...
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def spell(token):
    """Bytes as text of byte_alphabet; the way back is `{c: b for b, c in enumerate(byte_alphabet())}`."""
    return "".join(byte_alphabet()[b] for b in token)


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


class Tokenizer:
    """Byte-level BPE. `data` is the content of tokenizer.json, `config` that of tokenizer_config.json.

    vocab_size      largest id + 1; ids a model has beyond it are padding
    eos_id          the end-of-text token, which follows every document; `eos_ids`: all at which generation stops
    special_tokens  {text: id}
    chat_template   Jinja, as on the Hub
    hash            identity: sha256 over ids, bytes, merges, pattern and special tokens, not over the file's bytes

    Any valid UTF-8 round-trips exactly (unless the tokenizer, such as Qwen's, asks for NFC). Beginning-of-text tokens
    that some post-processors add are not added. Another kind of tokenizer (SentencePiece) would be a subclass with its
    own `__init__`, `encode_array` and `decode_bytes`, chosen in `load`. Raises UserError for kinds not known here.
    """

    def __init__(self, data, config):
        self.data, self.config = data, config
        self.pattern, self.normalizer = self._check(data)
        added = data.get("added_tokens") or []
        self.special_tokens = {t["content"]: t["id"] for t in added if t.get("special")}
        self._added = {t["content"]: t["id"] for t in added}  # also those that are not special, such as Phi's spaces

        value = {c: b for b, c in enumerate(byte_alphabet())}
        try:
            ranks = {bytes(value[c] for c in token): i for token, i in data["model"]["vocab"].items()
                     if token not in self._added}
        except KeyError as e:
            raise UserError(f"tokenizer.json is not byte-level BPE (its vocabulary has the character {e})") from None
        merges = [m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"]]
        made = list(dict.fromkeys(data["model"]["vocab"].get(a + b, -1) for a, b in merges))
        if made != sorted(made):  # tiktoken merges in the order of ids
            raise UserError("tokenizer.json lists its merges in another order than its ids, which is not supported")

        self.vocab_size = max([*ranks.values(), *self._added.values()]) + 1
        self._bytes = [b""] * self.vocab_size
        for token, i in [*ranks.items(), *((t.encode("utf-8"), i) for t, i in self._added.items())]:
            self._bytes[i] = token
        # some vocabularies lack bytes: transformers drops them silently, so they get ids here that encode() drops again
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self._drops = bool(missing)
        ranks.update((b, self.vocab_size + i) for i, b in enumerate(missing))
        self._encoding = tiktoken.Encoding("slm", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})

        either = lambda texts: re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")")
        always = self._added.keys() - self.special_tokens.keys()
        self._find = {True: either(self._added) if self._added else None, False: either(always) if always else None}
        self._guarded = {s[0] + GUARD + s[1:]: s for s in self._added}

        name = config.get("eos_token")
        self.eos_token = name.get("content") if isinstance(name, dict) else name
        self.eos_token = self.eos_token or ("<|endoftext|>" if "<|endoftext|>" in self._added else None)
        if self.eos_token not in self._added:
            raise UserError(f"tokenizer_config.json has no usable eos_token (it says {self.eos_token!r})")
        self.eos_id = self._added[self.eos_token]
        ends = [self.eos_id, *(self._added.get(t) for t in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>"))]
        self.eos_ids = list(dict.fromkeys(i for i in ends if i is not None))

        template = config.get("chat_template")
        if isinstance(template, list):  # older directories name several
            template = {t["name"]: t["template"] for t in template}.get("default")
        self.chat_template = template or (CHATML if {"<|im_start|>", "<|im_end|>"} <= self._added.keys() else PLAIN)
        # byte fields as byte_alphabet text: one-to-one, so equal text is equal bytes
        identity = [sorted(data["model"]["vocab"].items(), key=lambda x: x[1]), merges, self.pattern, self.normalizer,
                    sorted(self.special_tokens.items()), sorted(self._added.items())]
        self.hash = hashlib.sha256(json.dumps(identity).encode("utf-8")).hexdigest()

    @staticmethod
    def _check(data):
        """(regex, normal form or None) of a tokenizer.json that tiktoken can stand in for, UserError for any other."""
        model, normalizer = data.get("model") or {}, (data.get("normalizer") or {}).get("type")
        steps = data.get("pre_tokenizer") or {}
        steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
        kinds, last = [s.get("type") for s in steps], steps[-1]
        whole = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback") and "merges" in model
        if not whole or normalizer not in (None, "NFC") or kinds[-1] != "ByteLevel":
            raise UserError(f"the tokenizer is {model.get('type')} with normalizer {normalizer} and pre-tokenizers "
                            f"{kinds}; only byte-level BPE such as GPT-2's, Qwen's or Llama 3's is supported")
        if last.get("use_regex", True) and not last.get("add_prefix_space"):
            if kinds == ["ByteLevel"]:
                return GPT2, normalizer
            if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
                return GPT2_DIGITS, normalizer
        elif kinds == ["Split", "ByteLevel"] and not last.get("add_prefix_space"):
            if steps[0].get("behavior") == "Isolated" and "Regex" in steps[0]["pattern"]:
                return steps[0]["pattern"]["Regex"], normalizer
        raise UserError(f"the tokenizer's pre-tokenizer ({json.dumps(steps)[:200]}) is not supported; "
                        "one Split regex with ByteLevel, or GPT-2's ByteLevel, is")

    # ---------------------------------------------------------------------------------------------- encode and decode

    def encode_array(self, text, special=False):
        """Like `encode`, as a uint32 array (no Python integer per token)."""
        if self.normalizer:
            text = unicodedata.normalize(self.normalizer, text)
        parts, ids = self._find[special].split(text) if self._find[special] else [text], []  # text, token, text, ...
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(np.array([self._added[part]], np.uint32))
                continue
            if special and GUARD in part:
                for guarded, plain in self._guarded.items():
                    part = part.replace(guarded, plain)
            for piece in self._short_runs(part) if part else ():
                try:
                    ids.append(self._encoding.encode_to_numpy(piece, disallowed_special=()))
                except UnicodeEncodeError:  # half a surrogate pair is no text: it becomes U+FFFD
                    piece = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                    ids.append(self._encoding.encode_to_numpy(piece, disallowed_special=()))
        ids = np.concatenate(ids) if ids else np.zeros(0, np.uint32)
        return ids[ids < self.vocab_size] if self._drops else ids

    @staticmethod
    def _short_runs(text):
        """`text` itself, or in pieces where a run of whitespace is longer than LONG_RUN (there ids may differ from
        transformers', which has no such limit; the text still round-trips)."""
        # a run that long covers 7 neighbours of this sample; looking at every character would cost as much as encoding
        if len(text) <= LONG_RUN or not re.search(r"\s{7}", text[::LONG_RUN // 8]):
            return [text]
        cuts = [0]
        for run_ in re.finditer(r"\s{1000,}", text):
            cuts += range(run_.start() + LONG_RUN, run_.end(), LONG_RUN)
        return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)])]

    def encode(self, text, special=False):
        """Ids of `text`, a list of int.

        special=False: text that looks like a special token is plain text, so no document can end itself.
        special=True: special tokens are recognised; for text from `render`, where those in messages are guarded.
        """
        return self.encode_array(text, special).tolist()

    def encode_batch(self, texts, special=False):
        """`encode` of each text, on all cores (tiktoken lets go of the GIL): a list of lists."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(lambda text: self.encode(text, special), texts))

    def decode_bytes(self, ids):
        """The bytes of `ids`: unused ids give none, special tokens their text."""
        return b"".join([self._bytes[i] for i in ids])

    def decode(self, ids):
        """The text of `ids`; half a character (tokens are bytes) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """int32 (vocab_size,): utf-8 bytes of text each id stands for, 0 for special and unused ids (bits per byte)."""
        special = set(self.special_tokens.values())
        return np.array([0 if i in special else len(b) for i, b in enumerate(self._bytes)], np.int32)

    def render(self, messages, add_generation_prompt=True):
        """Chat messages [{"role", "content"}, ...] as one text by the chat template; `encode(..., special=True)` it.

        Where a message contains the text of a special token a noncharacter (GUARD) is put into it, which encode takes
        out again: no message can end its own turn. Raises UserError if the template fails.
        """
        messages = [dict(m, content=self._guard(m["content"])) for m in messages]
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                         eos_token=self.eos_token, bos_token=self._name("bos_token") or "")
        except Exception as e:  # a template is a program of someone else's: it can fail in any way
            raise UserError(f"the tokenizer's chat template failed: {e}") from None

    def _guard(self, text):
        return self._find[True].sub(lambda m: m[0][0] + GUARD + m[0][1:], text)

    @functools.cached_property
    def _template(self):
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # as transformers: the template may be a stranger's

        def raise_exception(message):
            raise ValueError(message)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        env.globals["raise_exception"] = raise_exception
        return env.from_string(self.chat_template)

    def _name(self, key):
        value = self.config.get(key)
        return value.get("content") if isinstance(value, dict) else value

    # ------------------------------------------------------------------------------------------------- save and load

    def save(self, directory, model_max_length=None):
        """Write tokenizer.json and tokenizer_config.json; transformers.AutoTokenizer gives the same ids from them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # or transformers guesses another one from the model type
            "eos_token": self.eos_token, "pad_token": self._name("pad_token") or self.eos_token,
            **{k: self._name(k) for k in ("bos_token", "unk_token") if self._name(k)},
            "model_max_length": model_max_length or self.config.get("model_max_length") or 1_000_000,
            "clean_up_tokenization_spaces": False,  # or decoding eats the space in "a ."
            "chat_template": self.chat_template,
        }
        for name, content in ("tokenizer.json", self.data), ("tokenizer_config.json", config):
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (directory / name).write_text(text, encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, directory):
        """From a directory with tokenizer.json (and tokenizer_config.json), or GPT-2's vocab.json and merges.txt.

        Raises UserError if there is none, it is broken, or it is of a kind not supported.
        """
        directory = Path(directory)

        def read(name):
            if not (directory / name).is_file():
                return None
            try:
                return json.loads((directory / name).read_text(encoding="utf-8"))
            except ValueError as e:
                raise UserError(f"{directory / name} is not valid JSON ({e})") from None

        data, config = read("tokenizer.json"), read("tokenizer_config.json") or {}
        if (directory / "chat_template.jinja").is_file():
            config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        if data is None and (directory / "merges.txt").is_file() and (vocab := read("vocab.json")):
            lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            data = tokenizer_json(vocab, merges, {t: vocab[t] for t in ["<|endoftext|>"] if t in vocab})
        if data is None:
            raise UserError(f"{directory} holds no tokenizer.json, nor vocab.json with merges.txt"
                            " (a tokenizer.model alone, SentencePiece, is not supported)")
        try:
            return cls(data, config)
        except UserError as e:
            raise UserError(f"{directory}: {e}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"{directory / 'tokenizer.json'} is not a tokenizer of the Hub's format ({e!r})") from None

    @classmethod
    def _build(cls, tokens):
        """From `tokens`: bytes by id, the 256 single bytes first; SPECIALS get the ids after them."""
        vocab = {spell(token): i for i, token in enumerate(tokens)}
        specials = {name: len(tokens) + i for i, name in enumerate(SPECIALS)}
        return cls(tokenizer_json(vocab, merges_of(tokens), specials, QWEN2), {"eos_token": SPECIALS[0]})

    @classmethod
    def from_bytes(cls):
        """256 ids, each the value of its byte, then SPECIALS: nothing to train, about four times the tokens."""
        return cls._build([bytes([b]) for b in range(256)])

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn BPE from an iterator of str; vocab_size counts the 256 bytes and SPECIALS (which get the last ids).

        A corpus too small for that many merges gives fewer ids. vocab_size is at least 259.
        """
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        # one "word" of a megabyte costs the trainer minutes and teaches nothing
        endless = re.compile(r"[^\W\d_]{2000,}|\s{2000,}|[^\w\s]{2000,}")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        bpe.train_from_iterator((endless.sub("", text) for text in texts), trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIALS), initial_alphabet=byte_alphabet(), show_progress=False))
        value = {c: b for b, c in enumerate(byte_alphabet())}
        learned = [bytes(value[c] for c in t) for t, _ in sorted(bpe.get_vocab().items(), key=lambda x: x[1])]
        return cls._build([bytes([b]) for b in range(256)] + [t for t in learned if len(t) > 1])

    @classmethod
    def gpt2(cls):
        """GPT-2's 50,257 ids. The only method that may use the network: tiktoken downloads them once, then caches."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests' errors, without importing requests
            raise UserError(f"--tokenizer gpt2: the download failed ({type(e).__name__}); set TIKTOKEN_CACHE_DIR to a "
                            "folder that holds tiktoken's copy, or give --tokenizer DIR with vocab.json and merges.txt"
                            ) from None
        ranks = encoding._mergeable_ranks
        vocab, specials = {spell(t): i for t, i in ranks.items()}, dict(encoding._special_tokens)
        return cls(tokenizer_json({**vocab, **specials}, merges_of(sorted(ranks, key=ranks.get)), specials), {})


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
