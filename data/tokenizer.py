"""
Text <-> token ids: byte-level BPE, and the other BPE and Unigram tokenizers of the Hub.

    tokenizer = Tokenizer.train(texts, vocab_size=4096)    # or .from_bytes(), .gpt2(), .load(DIR)
    ids = tokenizer.encode("def f(x):")
    text = tokenizer.decode(ids)

BPE is from Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909), over bytes from GPT-2
(Radford et al., 2019). The stored form is the Hub's tokenizer.json. Where tiktoken is proven to
give the same ids (tiktoken_plan.py), a `tiktoken.Encoding` encodes, several times faster than the
`tokenizers` library. That library encodes everywhere else.
"""

import functools, hashlib, json, re, unicodedata
from pathlib import Path

import numpy as np
import tiktoken

from data import UserError, template
from data.template import CHATML, PLAIN
from data.tiktoken_plan import QWEN2, tiktoken_plan
from data.tokenizer_files import check_tokenizer, check_tokenizer_config, is_panic, library_errors, must, read_tokenizer
from data.vocabulary import any_of, byte_alphabet, from_sentencepiece, merges_of, pairs, spell, tokenizer_json, unspell

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DECODERS = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
GUARD = "\ufdd0"  # a Unicode noncharacter: render() puts it inside an "<|im_end|>" that a message contains
PROBE = "a A1½_-!'s\n\r\n\t \u00a0e\u0301日🙂\x00  x  "  # a character of each kind that a regex tells apart
LONG_RUN = 100_000  # tiktoken's regex engine overflows its stack on about 1,000,000 whitespace characters in a row
LONGEST_WORD = 500  # characters, in training: the trainer's time grows with the square of a word's length


class Tokenizer:
    """A tokenizer of the Hub: encodes text, decodes ids, renders chats.

    data, config    the contents of tokenizer.json and tokenizer_config.json
    ends            further ids for eos_ids
    vocab_size      largest id + 1; ids of a model beyond that are padding
    eos_id          the end-of-text token, which follows every document
    eos_ids         all ids at which generation stops
    bos_id          the token that the post-processor puts before a text, or None
    special_tokens  {text: id}
    chat_template   Jinja, as on the Hub
    pattern         the regex that cuts words; None where the `tokenizers` library encodes
    hash            identity: sha256 over ids, bytes, merges, pattern and special tokens

    Any valid UTF-8 round-trips exactly through byte-level BPE, unless the tokenizer asks for NFC
    (Qwen). SentencePiece puts a space before a text: `decode` takes that space away,
    `decode_bytes` keeps it (the ids may be the middle of a text), `token_bytes` counts it.
    Raises UserError for a tokenizer that neither engine can read.
    """

    def __init__(self, data, config, ends=()):
        check_tokenizer(data)
        check_tokenizer_config(config)
        self.data, self.config = data, config
        ranks = self._read_vocabulary()
        self._choose_engine(ranks)
        self._read_end_tokens(ends)
        self.bos_id = self._read_bos()
        self.chat_template = self._read_template()

    def _read_vocabulary(self):
        """Sets special tokens and the bytes of each id. Returns {bytes: id}, added tokens apart."""
        vocab, decoders = supported_vocabulary(self.data)
        added = self.data.get("added_tokens") or []
        self.special_tokens = {t["content"]: t["id"] for t in added if t.get("special")}
        self._added = {t["content"]: t["id"] for t in added}  # also those that are not special, such as Phi's spaces
        self._find = {True: any_of(self._added), False: any_of(self._added.keys() - self.special_tokens.keys())}
        self.vocab_size = max([*vocab.values(), *self._added.values()]) + 1
        self._bytes = [b""] * self.vocab_size
        to_bytes = unspell if "ByteLevel" in decoders else from_sentencepiece
        for token, i in vocab.items():
            self._bytes[i] = to_bytes(token)
        ranks = {self._bytes[i]: i for token, i in vocab.items() if token not in self._added}
        for token, i in self._added.items():
            self._bytes[i] = token.encode("utf-8")
        return ranks

    def _choose_engine(self, ranks):
        """Sets up tiktoken if tiktoken_plan proves the ids equal, else the `tokenizers` library."""
        self.pattern, self.normalizer = tiktoken_plan(self.data) or (None, None)
        self._engines = {}
        if self.pattern:
            # some vocabularies lack bytes: texts with one go to the library, which drops the byte
            missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
            ranks.update((b, self.vocab_size + i) for i, b in enumerate(missing))
            self._rare = re.compile(b"[" + re.escape(b"".join(missing)) + b"]") if missing else None
            # without a special token tiktoken finds "" at every character: 1.4 times as slow
            self._encoding = tiktoken.Encoding("slm", pat_str=self.pattern, mergeable_ranks=ranks,
                                               special_tokens={GUARD: self.vocab_size + 256})
            probed = self._encoding.encode(PROBE, disallowed_special=())
            if self._encoding.decode_bytes(probed) != PROBE.encode("utf-8"):
                self.pattern = self.normalizer = None  # tiktoken drops text outside the regex, the library keeps it
        if not self.pattern:
            self._library(False)  # now, so that a broken file is an error at once

    def _read_end_tokens(self, ends):
        """Sets eos_token, eos_id, eos_ids, and the tokens that no message may contain."""
        usual = (t for t in ("<|endoftext|>", "<|end_of_text|>", "</s>") if t in self._added)
        self.eos_token = self._named_token("eos_token") or next(usual, None)
        if self.eos_token not in self._added:
            raise UserError(f"tokenizer_config.json has no usable eos_token (it says {self.eos_token!r})")
        self.eos_id = self._added[self.eos_token]
        turns = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
        turns = [self._added.get(t, -1) for t in turns]
        self.eos_ids = list(dict.fromkeys(i for i in [self.eos_id, *turns, *ends] if 0 <= i < self.vocab_size))
        ending = [t for t, i in self._added.items() if i in self.eos_ids]
        self._ends, unsafe = any_of(ending), [*self.special_tokens, *ending]
        self._unsafe = any_of(t for t in unsafe if len(t) > 1 and GUARD not in t)  # GUARD needs two characters

    def _read_bos(self):
        """The id that the post-processor puts before a text, or None (as in transformers)."""
        post = self.data.get("post_processor") or {}
        first = [p["single"][0] for p in post.get("processors", [post]) if p.get("type") == "TemplateProcessing"]
        names = [part["SpecialToken"]["id"] for part in first if "SpecialToken" in part]
        return self._added.get(names[0]) if names else None

    def _read_template(self):
        """The chat template of tokenizer_config.json, or one of ours."""
        chat = self.config.get("chat_template")
        if isinstance(chat, list):  # older directories name several
            chat = {t["name"]: t["template"] for t in chat}.get("default")
        return chat or (CHATML if {"<|im_start|>", "<|im_end|>"} <= self._added.keys() else PLAIN)

    def _named_token(self, key):
        value = self.config.get(key)
        return value.get("content") if isinstance(value, dict) else value

    @functools.cached_property
    def hash(self):
        """The tokenizer's identity: sha256 (hex) of the content, not of the file."""
        # byte fields as byte_alphabet text: one-to-one, so equal text is equal bytes
        model = self.data["model"]
        vocab = model["vocab"]
        identity = [sorted(vocab.items(), key=lambda x: x[1]) if isinstance(vocab, dict) else vocab,
                    [list(m) for m in pairs(model)], self.pattern, self.normalizer,
                    sorted(self.special_tokens.items()), sorted(self._added.items())]
        if not self.pattern:
            identity += [{k: v for k, v in model.items() if k not in ("vocab", "merges")},
                         *(self.data.get(k) for k in ("normalizer", "pre_tokenizer", "decoder", "added_tokens"))]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()

    # ----------------------------------------------------------------------- encode and decode

    @library_errors
    def encode_array(self, text, special=False):
        """Like `encode`, as a uint32 array (tokens,): no Python integer per token."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair is no text: it becomes U+FFFD
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
            text = data.decode("utf-8")
        if not self.pattern or self._rare and self._rare.search(data) or has_long_run(text):
            engine = self._library(special)
            ids = np.array(engine.encode(text, add_special_tokens=False).ids, np.uint32)
            return ids[ids != engine.token_to_id(GUARD)] if special and GUARD in text else ids
        parts, ids = self._find[special].split(text) if self._find[special] else [text], []  # text, token, text, ...
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(np.array([self._added[part]], np.uint32))
            elif part:
                part = part.replace(GUARD, "") if special else part
                part = unicodedata.normalize(self.normalizer, part) if self.normalizer else part
                ids.append(self._encoding.encode_to_numpy(part, disallowed_special=()))
        return np.concatenate(ids) if ids else np.zeros(0, np.uint32)

    def _library(self, special):
        """The library's tokenizer, made on first use; special=True knows GUARD as a token."""
        if special not in self._engines:
            import tokenizers
            engine = tokenizers.Tokenizer.from_str(json.dumps(self.data))
            engine.no_truncation()
            engine.no_padding()
            engine.encode_special_tokens = not special
            if special:
                engine.add_special_tokens([tokenizers.AddedToken(GUARD, special=True, normalized=False)])
            self._engines[special] = engine
        return self._engines[special]

    def encode(self, text, special=False, bos=False):
        """Ids of `text`, a list of int.

        special=False: the text of a special token is plain text, so no document can end itself.
        special=True: special tokens are recognised, in a text from `render`, which guards messages.
        bos=True: bos_id first, if there is one and the text, as templates often do, has none yet.
        """
        ids = self.encode_array(text, special).tolist()
        return [self.bos_id] + ids if bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def decode_bytes(self, ids):
        """The bytes of any `ids` of a text: unused ids give none, special tokens their text."""
        return b"".join([self._bytes[i] for i in ids])

    @library_errors
    def decode(self, ids):
        """The text of the first `ids` of a text; half a character (tokens are bytes) is U+FFFD."""
        if not self.pattern:
            return self._library(False).decode([int(i) for i in ids], skip_special_tokens=False)
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """Number of UTF-8 bytes per id, int32 (vocab_size,); 0 for special and unused ids."""
        special = set(self.special_tokens.values())
        return np.array([0 if i in special else len(b) for i, b in enumerate(self._bytes)], np.int32)

    def render(self, messages, add_generation_prompt=True):
        """Renders a chat [{"role", "content"}, ...] for encode(special=True): see render_all."""
        return next(self.render_all([(messages, add_generation_prompt)]))

    def render_all(self, chats):
        """Renders chats (messages, add_generation_prompt) by the template: yields a str for each.

        Where a message contains the text of a special token, GUARD is put inside, and encode takes
        GUARD out again: no message can end the turn. Raises UserError if the template fails.
        """
        tokens = {k: self._named_token(k) for k in ("bos_token", "unk_token", "pad_token") if self._named_token(k)}
        tokens.update(tools=None, documents=None, eos_token=self.eos_token)
        for some in template.requests(chats):
            some = [(self._guard(messages), prompt) for messages, prompt in some]
            try:
                texts = template.render(self.chat_template, [
                    {**tokens, "messages": messages, "add_generation_prompt": prompt} for messages, prompt in some])
            except ValueError as e:
                raise UserError(f"the tokenizer's chat template failed: {e}{template.way_out(some)}") from None
            for text, (messages, _) in zip(texts, some):
                lost = next((m for m in template.fresh(messages) if isinstance(m.get("content"), str)
                             and not template.shows(text, m["content"])), None)
                if lost:
                    role, hint = lost.get("role"), template.way_out([([lost], False)])
                    raise UserError(f"the tokenizer's chat template loses the text of the message of {role} (it may "
                                    f"want parts, or other names){hint}; or {template.OTHER}")
                yield text

    def first_end(self, text):
        """(place behind the first end token of a rendered text, that token); (0, "") without one."""
        found = self._ends.search(text)
        return (found.end(), found[0]) if found else (0, "")

    def unguarded(self, text):
        """A rendered text as it was said, without GUARD."""
        return text.replace(GUARD, "")

    def _guard(self, value):
        """A copy of messages in which no text holds a special token."""
        if isinstance(value, dict):
            return {k: self._guard(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guard(v) for v in value]
        # in rounds, because special tokens may overlap
        while isinstance(value, str) and self._unsafe and self._unsafe.search(value):
            value = self._unsafe.sub(lambda m: m[0][0] + GUARD + m[0][1:], value)
        return value

    # ---------------------------------------------------------------------- save, load and train

    def save(self, directory, model_max_length=None):
        """Writes tokenizer.json and tokenizer_config.json; transformers gives the same ids."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # or transformers guesses another one from the model type
            "eos_token": self.eos_token, "pad_token": self._named_token("pad_token") or self.eos_token,
            **{k: self._named_token(k) for k in ("bos_token", "unk_token") if self._named_token(k)},
            "model_max_length": model_max_length or self.config.get("model_max_length") or 1_000_000,
            "model_input_names": ["input_ids", "attention_mask"],  # or generate() is handed token_type_ids
            "clean_up_tokenization_spaces": False,  # or decoding eats the space in "a ."
            "chat_template": self.chat_template,
        }
        for name, content in ("tokenizer.json", self.data), ("tokenizer_config.json", config):
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (directory / name).write_text(text, encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, directory):
        """Loads tokenizer.json (and tokenizer_config.json), or GPT-2's vocab.json and merges.txt.

        Raises UserError if the directory has neither, or holds a broken or unsupported tokenizer.
        """
        directory = Path(directory)
        data, config, ends = read_tokenizer(directory)
        try:
            return cls(data, config, ends)
        except UserError as e:
            raise UserError(f"{directory}: {e}") from None
        except BaseException as e:  # the tokenizers library raises no narrower class than Exception
            if not isinstance(e, Exception) and not is_panic(e):
                raise
            raise UserError(f"{directory / 'tokenizer.json'} is not a tokenizer that can be read ({e!r})") from None

    @classmethod
    def _build(cls, tokens):
        """From `tokens`, bytes by id, the 256 single bytes first; SPECIALS get the last ids."""
        vocab = {spell(token): i for i, token in enumerate(tokens)}
        specials = {name: len(tokens) + i for i, name in enumerate(SPECIALS)}
        return cls(tokenizer_json(vocab, merges_of(tokens), specials, QWEN2), {"eos_token": SPECIALS[0]})

    @classmethod
    def from_bytes(cls):
        """Makes a tokenizer of one id per byte and SPECIALS: about four times the tokens of BPE."""
        return cls._build([bytes([b]) for b in range(256)])

    @classmethod
    @library_errors
    def train(cls, texts, vocab_size):
        """Learns BPE from an iterator of str.

        vocab_size (at least 259) counts bytes and SPECIALS. A small corpus may give fewer ids.
        """
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        # a "word" of a megabyte costs minutes and teaches nothing: it is removed, a shorter one cut
        endless = re.compile(r"[^\W\d_]{2000,}|\s{2000,}|(?:[^\w\s]|_){2000,}")
        words = QWEN2.replace("+", f"{{1,{LONGEST_WORD}}}").replace("*", f"{{0,{LONGEST_WORD}}}")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        bpe.train_from_iterator((endless.sub("", text) for text in texts), trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIALS), initial_alphabet=byte_alphabet(), show_progress=False))
        learned = [unspell(t) for t, _ in sorted(bpe.get_vocab().items(), key=lambda x: x[1])]
        return cls._build([bytes([b]) for b in range(256)] + [t for t in learned if len(t) > 1])

    @classmethod
    def gpt2(cls):
        """Makes GPT-2's tokenizer, which tiktoken downloads once. Raises UserError."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests' errors, without importing requests
            raise UserError(f"--tokenizer gpt2: the download failed ({type(e).__name__}); set TIKTOKEN_CACHE_DIR to a "
                            "folder that holds tiktoken's copy, or give --tokenizer DIR with vocab.json and merges.txt"
                            ) from None
        ranks = encoding._mergeable_ranks
        vocab, specials = {spell(t): i for t, i in ranks.items()}, dict(encoding._special_tokens)
        return cls(tokenizer_json({**vocab, **specials}, merges_of(sorted(ranks, key=ranks.get)), specials), {})


def has_long_run(text):
    """Whether a text may hold LONG_RUN whitespace characters in a row.

    Such a run covers 7 neighbours of every (LONG_RUN / 8)th character. A look at all characters
    would take as long as to encode them.
    """
    return len(text) > LONG_RUN and re.search(r"\s{7}", text[::LONG_RUN // 8]) is not None


def supported_vocabulary(data):
    """({token: id}, types of decoders) of a tokenizer.json. Raises UserError for other kinds."""
    model, decoder = data["model"], data.get("decoder") or {}
    decoders = {d.get("type") for d in decoder.get("decoders", [decoder])}
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind not in ("BPE", "Unigram") or not decoders <= DECODERS:
        raise UserError(f"the tokenizer is {kind} with the decoders {sorted(map(str, decoders))}; supported: BPE "
                        f"and Unigram with {sorted(DECODERS)} (Llama, Mistral, Qwen, GPT-2, Phi)")
    must(model["vocab"], "tokenizer.json: the vocabulary is empty")
    return model["vocab"] if kind == "BPE" else {t: i for i, (t, _) in enumerate(model["vocab"])}, decoders
