"""
Text <-> token ids: byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; over bytes as in GPT-2),
and whatever else a tokenizer.json of the Hub holds.

    tokenizer = Tokenizer.train(texts, vocab_size=4096)     # or .from_bytes(), .gpt2(), .load(DIRECTORY)
    ids = tokenizer.encode("def f(x):")
    text = tokenizer.decode(ids)

What is stored is the Hub's tokenizer.json. What encodes is a `tiktoken.Encoding` built from it, several times faster
than the `tokenizers` library, where its ids are known to be the same, and that library itself everywhere else.
"""

import functools, hashlib, json, re, unicodedata
from pathlib import Path

import numpy as np
import tiktoken

from data import UserError, template
from data.tiktoken_plan import QWEN2, tiktoken_plan
from data.tokenizer_files import (any_of, border, byte_alphabet, check_tokenizer_config, check_tokenizer, end_ids,
                                  from_sentencepiece, is_panic, merges_of, must, no_constant, pairs, said_in, spell,
                                  tokenizer_json, unspell)


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# What stands between the generation marks, the assistant's words and the end of its turn, is what trainers learn from.
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
          "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
          "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# For tokenizers that have no chat tokens. No space after the last colon: " The" is one token, " " + "The" are two.
PLAIN = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Assistant:' }}{% generation %}"
         "{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
         "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}"
         "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")

GUARD = "\ufdd0"  # a Unicode noncharacter: render() puts it inside an "<|im_end|>" that a message wrote
PROBE = "a A1½_-!'s\n\r\n\t \u00a0e\u0301日🙂\x00  x  "  # a character of each kind that a regex tells apart
LONG_RUN = 100_000  # tiktoken's regex engine overflows its stack on about 1,000,000 whitespace characters in a row
LONGEST_WORD = 500  # characters, in training: the trainer's time grows with the square of a word's length


# ----------------------------------------------------------------------------------------- files are not believed


class Tokenizer:
    """`data` is the content of tokenizer.json, `config` that of tokenizer_config.json, `ends` further ids in eos_ids.

    vocab_size      largest id + 1; ids a model has beyond it are padding
    eos_id          the end-of-text token, which follows every document; `eos_ids`: all at which generation stops
    bos_id          what the tokenizer's post-processor puts before a text, or None; encode adds it only if asked to
    special_tokens  {text: id}
    chat_template   Jinja, as on the Hub
    pattern         the regex that cuts words, None where the `tokenizers` library encodes
    hash            identity: sha256 over ids, bytes, merges, pattern and special tokens, not over the file's bytes

    Any valid UTF-8 round-trips exactly through byte-level BPE (unless the tokenizer asks for NFC, as Qwen's does).
    SentencePiece's kind puts a space before a text: `decode` takes it away, `decode_bytes` does not (its ids may be the
    middle of a text) and `token_bytes` counts it. Raises UserError for what neither back-end can read.
    """

    def __init__(self, data, config, ends=()):
        check_tokenizer(data)
        check_tokenizer_config(config)
        self.data, self.config, model = data, config, data["model"]
        decoder = data.get("decoder") or {}
        kinds = {d.get("type") for d in decoder.get("decoders", [decoder])}
        kind = model.get("type") or ("BPE" if "merges" in model else None)
        known = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
        if kind not in ("BPE", "Unigram") or not kinds <= known:
            raise UserError(f"the tokenizer is {kind} with the decoders {sorted(map(str, kinds))}; supported: BPE and "
                            f"Unigram with {sorted(known)} (Llama, Mistral, Qwen, GPT-2, Phi)")
        added = data.get("added_tokens") or []
        self.special_tokens = {t["content"]: t["id"] for t in added if t.get("special")}
        self._added = {t["content"]: t["id"] for t in added}  # also those that are not special, such as Phi's spaces
        vocab = model["vocab"] if kind == "BPE" else {t: i for i, (t, _) in enumerate(model["vocab"])}
        must(vocab, "tokenizer.json: the vocabulary is empty")
        self.vocab_size = max([*vocab.values(), *self._added.values()]) + 1
        self._bytes = [b""] * self.vocab_size
        to_bytes = unspell if "ByteLevel" in kinds else from_sentencepiece
        for token, i in vocab.items():
            self._bytes[i] = to_bytes(token)
        ranks = {self._bytes[i]: i for t, i in vocab.items() if t not in self._added}
        for token, i in self._added.items():
            self._bytes[i] = token.encode("utf-8")

        self.pattern, self.normalizer = tiktoken_plan(data) or (None, None)
        self._engines = {}
        if self.pattern:
            # some vocabularies lack bytes; the library has its own way with them, so it gets the texts that hold one
            missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
            ranks.update((b, self.vocab_size + i) for i, b in enumerate(missing))
            self._rare = re.compile(b"[" + re.escape(b"".join(missing)) + b"]") if missing else None
            # a special token that is never asked for: with none tiktoken finds "" at every character, 1.4 x the time
            self._encoding = tiktoken.Encoding("slm", pat_str=self.pattern, mergeable_ranks=ranks,
                                               special_tokens={GUARD: self.vocab_size + 256})
            probed = self._encoding.encode(PROBE, disallowed_special=())
            if self._encoding.decode_bytes(probed) != PROBE.encode("utf-8"):
                self.pattern = self.normalizer = None  # tiktoken drops what a regex leaves out, the library keeps it
        if not self.pattern:
            self._library(False)  # now, so that a broken file is an error at once
        always = self._added.keys() - self.special_tokens.keys()
        self._find = {True: any_of(self._added), False: any_of(always)}

        self.eos_token = self._name("eos_token") or next(
            (t for t in ("<|endoftext|>", "<|end_of_text|>", "</s>") if t in self._added), None)
        if self.eos_token not in self._added:
            raise UserError(f"tokenizer_config.json has no usable eos_token (it says {self.eos_token!r})")
        self.eos_id = self._added[self.eos_token]
        turns = [self._added.get(t, -1) for t in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>")]
        self.eos_ids = list(dict.fromkeys(i for i in [self.eos_id, *turns, *ends] if 0 <= i < self.vocab_size))
        unsafe = [*self.special_tokens, *(t for t, i in self._added.items() if i in self.eos_ids)]
        self._unsafe = any_of(t for t in unsafe if len(t) > 1 and GUARD not in t)  # those that GUARD can break

        # transformers goes by tokenizer.json too, whatever tokenizer_config.json says of add_bos_token
        post = data.get("post_processor") or {}
        first = [p["single"][0] for p in post.get("processors", [post]) if p.get("type") == "TemplateProcessing"]
        names = [part["SpecialToken"]["id"] for part in first if "SpecialToken" in part]
        self.bos_id = self._added.get(names[0]) if names else None

        chat = config.get("chat_template")
        if isinstance(chat, list):  # older directories name several
            chat = {t["name"]: t["template"] for t in chat}.get("default")
        self.chat_template = chat or (CHATML if {"<|im_start|>", "<|im_end|>"} <= self._added.keys() else PLAIN)

    @functools.cached_property
    def hash(self):
        # byte fields as byte_alphabet text: one-to-one, so equal text is equal bytes
        vocab, model = self.data["model"]["vocab"], self.data["model"]
        identity = [sorted(vocab.items(), key=lambda x: x[1]) if isinstance(vocab, dict) else vocab,
                    [list(m) for m in pairs(model)], self.pattern, self.normalizer,
                    sorted(self.special_tokens.items()), sorted(self._added.items())]
        if not self.pattern:
            identity += [{k: v for k, v in model.items() if k not in ("vocab", "merges")},
                         *(self.data.get(k) for k in ("normalizer", "pre_tokenizer", "decoder", "added_tokens"))]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()

    # ---------------------------------------------------------------------------------------------- encode and decode

    @border
    def encode_array(self, text, special=False):
        """Like `encode`, as a uint32 array (no Python integer per token)."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair is no text: it becomes U+FFFD
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
            text = data.decode("utf-8")
        # a run of LONG_RUN covers 7 neighbours of this sample; looking at all characters would take as long as encoding
        if (not self.pattern or self._rare and self._rare.search(data)
                or len(text) > LONG_RUN and re.search(r"\s{7}", text[::LONG_RUN // 8])):
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
        """The `tokenizers` library's own tokenizer, made on first use; special=True knows GUARD as one more token."""
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

        special=False: text that looks like a special token is plain text, so no document can end itself.
        special=True: special tokens are recognised; for text from `render`, where those in messages are guarded.
        bos=True: bos_id first, if there is one and the text does not begin with it (as chat templates' often does).
        """
        ids = self.encode_array(text, special).tolist()
        return [self.bos_id] + ids if bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def decode_bytes(self, ids):
        """The bytes of `ids`, piece by piece as they come: unused ids give none, special tokens their text."""
        return b"".join([self._bytes[i] for i in ids])

    @border
    def decode(self, ids):
        """The text of `ids`, from its beginning; half a character (tokens are bytes) becomes U+FFFD."""
        if not self.pattern:
            return self._library(False).decode([int(i) for i in ids], skip_special_tokens=False)
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """int32 (vocab_size,): utf-8 bytes of text each id stands for, 0 for special and unused ids (bits per byte)."""
        special = set(self.special_tokens.values())
        return np.array([0 if i in special else len(b) for i, b in enumerate(self._bytes)], np.int32)

    def render(self, messages, add_generation_prompt=True):
        """Chat messages [{"role", "content"}, ...] as one text by the chat template; `encode(..., special=True)` it.

        See render_all.
        """
        return self.render_all([(messages, add_generation_prompt)])[0]

    def render_all(self, chats):
        """The texts of chats [(messages, add_generation_prompt), ...], together: see data/template.py.

        Where a message contains the text of a special token a noncharacter (GUARD) is put into it, which encode takes
        out again: no message can end its own turn. Raises UserError if the template fails.
        """
        names = {k: self._name(k) for k in ("bos_token", "unk_token", "pad_token") if self._name(k)}
        names.update(tools=None, documents=None, eos_token=self.eos_token)
        chats = [(self._guard(messages), prompt) for messages, prompt in chats]
        try:
            texts = template.render(
                self.chat_template, [{**names, "messages": m, "add_generation_prompt": prompt} for m, prompt in chats],
                trusted=self.chat_template in (CHATML, PLAIN))
        except ValueError as e:
            raise UserError(f"the tokenizer's chat template failed: {e}") from None
        for text, (messages, _) in zip(texts, chats):
            said = messages[-1].get("content") if messages else None
            if isinstance(said, str) and said.strip() not in text and not said_in(said, text):
                raise UserError(
                    f"the tokenizer's chat template loses the text of the message of {messages[-1].get('role')} (it may"
                    " want parts, or other names): give the model a template for plain text, as chat_template in "
                    "tokenizer_config.json or as chat_template.jinja")
        return texts

    def _guard(self, value):
        """A copy of messages in which no text holds a special token (several rounds, as they may overlap)."""
        if isinstance(value, dict):
            return {k: self._guard(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guard(v) for v in value]
        while isinstance(value, str) and self._unsafe and self._unsafe.search(value):
            value = self._unsafe.sub(lambda m: m[0][0] + GUARD + m[0][1:], value)
        return value

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
            "model_input_names": ["input_ids", "attention_mask"],  # or generate() is handed token_type_ids
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

        def text_of(name):
            try:
                return (directory / name).read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as e:
                raise UserError(f"{directory / name} is not UTF-8 text ({e.reason} at byte {e.start})") from None

        def read(name):
            if not (directory / name).is_file():
                return None
            try:
                content = json.loads(text_of(name), parse_constant=no_constant)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{directory / name} is not valid JSON ({e})") from None
            must(isinstance(content, dict), f"{directory / name} must hold a JSON object")
            return content

        data, config = read("tokenizer.json"), read("tokenizer_config.json") or {}
        names = read("special_tokens_map.json") or {}
        check_tokenizer_config(names, directory / "special_tokens_map.json")
        for key in ("eos_token", "bos_token", "unk_token", "pad_token"):
            if config.get(key) is None and names.get(key) is not None:
                config[key] = names[key]
        ends = [i for name in ("generation_config.json", "config.json")
                for i in end_ids(read(name) or {}, directory / name)]
        if (directory / "chat_template.jinja").is_file():
            config["chat_template"] = text_of("chat_template.jinja")
        if data is None and (directory / "merges.txt").is_file() and (vocab := read("vocab.json")):
            lines = text_of("merges.txt").splitlines()
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            data = tokenizer_json(vocab, merges, {t: vocab[t] for t in ["<|endoftext|>"] if t in vocab})
        if data is None:
            raise UserError(f"{directory} holds no tokenizer.json, nor vocab.json with merges.txt"
                            " (a tokenizer.model alone, SentencePiece, is not supported)")
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
        """From `tokens`: bytes by id, the 256 single bytes first; SPECIALS get the ids after them."""
        vocab = {spell(token): i for i, token in enumerate(tokens)}
        specials = {name: len(tokens) + i for i, name in enumerate(SPECIALS)}
        return cls(tokenizer_json(vocab, merges_of(tokens), specials, QWEN2), {"eos_token": SPECIALS[0]})

    @classmethod
    def from_bytes(cls):
        """256 ids, each the value of its byte, then SPECIALS: nothing to train, about four times the tokens."""
        return cls._build([bytes([b]) for b in range(256)])

    @classmethod
    @border
    def train(cls, texts, vocab_size):
        """Learn BPE from an iterator of str; vocab_size counts the 256 bytes and SPECIALS (which get the last ids).

        A corpus too small for that many merges gives fewer ids. vocab_size is at least 259.
        """
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        # one "word" of a megabyte costs the trainer minutes and teaches nothing; whatever is left is cut
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


