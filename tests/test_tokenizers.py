"""Other people's tokenizers: small ones in the exact structure of each family, against the reference."""

import json
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from data import UserError
from data.tiktoken_plan import QWEN2
from data.tokenizer import Tokenizer
from data.vocabulary import byte_alphabet

tokenizers = pytest.importorskip("tokenizers")
models, trainers = tokenizers.models, tokenizers.trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT}|\p{{N}}{{1,3}}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

TEXTS = [
    "", " ", "\n", "It's a plain sentence, isn't it? They'LL say: \"don't!\"",
    "  def f(x):\n\t\treturn x ** 2  # squared\n\n\n",
    "3.14159 12345678 ½ ² ⅷ ٣٤ 1,000", "👩‍👩‍👧 🙂🙂 🇩🇪", "日本語のテキスト。中文字符，한국어",
    "e\u0301\u0323 a\u030a ﬁ Å", "a    b        c" + " " * 37 + "d",
    "one\r\ntwo\r\n\r\nthree \r\n", "ÀÉÎ straße STRASSE ǅ ʼn 'ſ 'S",
    "\x00\x7f\x85\u2028\ufeff\u200b\u3000 x", "HTTPServer/getURL//\n/ x_y-z",
    "<s>a</s> b<s>  c", "Γειά σου Κόσμε, Привет мир, שלום, नमस्ते दुनिया", "▁ literal ▁▁ <0x41> <0x0A>",
    "<|endoftext|>x<|im_start|>user\nhi<|im_end|>\n", "<|end|> <|user|> \n x<|eot_id|>>[INST] y [/INST]\u0338",
    "a<|endoftext|>\u0338b",
]


@pytest.fixture(scope="session")
def corpus():
    """400 kB of the standard library's source and some of other scripts."""
    library, text = Path(sysconfig.get_paths()["stdlib"]), ""
    for file in sorted(library.glob("*.py")):
        text += file.read_text(encoding="utf-8", errors="ignore")[:20_000]
        if len(text) > 400_000:
            break
    return [text[i:i + 4000] for i in range(0, len(text), 4000)] + TEXTS[3:] * 20


def flags(content, i, special=True, **more):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special, **more}


def template(bos, bos_id):
    """TemplateProcessing that puts `bos` before a text; None: nothing."""
    a = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, a] if bos else [a]
    return {"type": "TemplateProcessing", "single": single, "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}} if bos else {}}


def byte_level(corpus, regex, specials, *, normalizer=None, digits=False, converted=False, inside=False, bos=None):
    """The tokenizer.json of a byte-level family: BPE learned behind `regex` (None: GPT-2's), specials at the end.

    converted: as Hugging Face writes a tiktoken file: every pair that makes a token is a merge,
    sorted by what it makes.
    inside: the specials have the first ids, and are in the vocabulary as well.
    """
    from tokenizers import pre_tokenizers as pre
    bpe, last = tokenizers.Tokenizer(models.BPE()), pre.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    first = [pre.Split(tokenizers.Regex(regex), "isolated")] if regex else [pre.Digits(individual_digits=True)] * digits
    bpe.pre_tokenizer = pre.Sequence([*first, last])
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=byte_alphabet(), show_progress=False))
    data = json.loads(bpe.to_str())
    if not first:
        data["pre_tokenizer"] = data["pre_tokenizer"]["pretokenizers"][0]
    vocab = data["model"]["vocab"]
    if converted:
        vocab["Ġunreachable"] = len(vocab)  # found as a whole word only
        data["model"]["merges"] = sorted(
            ([t[:i], t[i:]] for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab),
            key=lambda m: (vocab[m[0] + m[1]], vocab[m[0]], vocab[m[1]]))
    data["model"]["ignore_merges"] = converted
    ids = {t: len(vocab) + i for i, t in enumerate(specials)}
    if inside:
        ids = {t: i for i, t in enumerate(specials)}
        data["model"]["vocab"] = {**ids, **{t: i + len(ids) for t, i in vocab.items()}}
    data["normalizer"] = normalizer and {"type": normalizer}
    data["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    data["added_tokens"] = [flags(t, i, special=not t.startswith("<think")) for t, i in ids.items()]
    byte = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    data["post_processor"] = byte
    if bos:
        data["post_processor"] = {"type": "Sequence", "processors": [byte, template(bos, ids[bos])]}
    return data


def sentencepiece(corpus, *, metaspace, specials=(), bos="<s>"):
    """Llama 2's tokenizer.json (Prepend and Replace as normalizers), or with a Metaspace pre-tokenizer instead."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1200, limit_alphabet=150, show_progress=False))
    learned = json.loads(bpe.to_str())["model"]
    for token in sorted(learned["vocab"], key=learned["vocab"].get):
        vocab.setdefault(token, len(vocab))
    data = json.loads(bpe.to_str())
    data["model"].update(vocab=vocab, merges=learned["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    data["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False} if metaspace else None
    data["normalizer"] = None if metaspace else {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    data["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    data["added_tokens"] = [flags(t, vocab[t]) for t in ("<unk>", "<s>", "</s>")]
    data["added_tokens"] += [flags(t, len(vocab) + i, **more) for i, (t, more) in enumerate(specials)]
    data["post_processor"] = template(bos, 1)
    return data


def unigram(corpus):
    data = tokenizers.Tokenizer(models.Unigram())
    data.pre_tokenizer, data.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    data.train_from_iterator(corpus[:12], trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False))
    return json.loads(data.to_str())


def two_splits(corpus):
    """As DeepSeek's: several regexes, one after the other."""
    data = byte_level(corpus, QWEN2, ["<|endoftext|>", "<s>"])
    steps = data["pre_tokenizer"]["pretokenizers"]
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
    data["pre_tokenizer"]["pretokenizers"] = [split, *steps]
    return data


CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PHI3 = [("<|endoftext|>", {}), ("<|assistant|>", {"rstrip": True}),
        ("<|end|>", {"rstrip": True}), ("<|user|>", {"rstrip": True})]
# name: (tokenizer.json, which back-end, eos_token, what bos_id stands for)
FAMILIES = {
    "gpt2": (lambda c: byte_level(c, None, CHAT[:1]), "tiktoken", CHAT[0], None),
    "smollm2": (lambda c: byte_level(c, None, CHAT, digits=True, inside=True), "tiktoken", CHAT[2], None),
    "qwen2": (lambda c: byte_level(c, QWEN2, CHAT + ["<think>"], normalizer="NFC"), "tiktoken", CHAT[2], None),
    "llama3": (lambda c: byte_level(c, LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>"],
                                    converted=True, bos="<|begin_of_text|>"),
               "tiktoken", "<|end_of_text|>", "<|begin_of_text|>"),
    "nemo": (lambda c: byte_level(c, TEKKEN, ["<s>", "</s>", "[INST]", "[/INST]"], converted=True, inside=True,
                                  bos="<s>"),
             "tiktoken", "</s>", "<s>"),
    "phi4": (lambda c: byte_level(c, GPT4O, ["<|endoftext|>", "<|user|>", "<|end|>"]), "tiktoken", CHAT[0], None),
    "llama2": (lambda c: sentencepiece(c, metaspace=False), "tokenizers", "</s>", "<s>"),
    "metaspace": (lambda c: sentencepiece(c, metaspace=True), "tokenizers", "</s>", "<s>"),
    "phi3": (lambda c: sentencepiece(c, metaspace=False, specials=PHI3, bos=None), "tokenizers", CHAT[0], None),
    "unigram": (unigram, "tokenizers", "</s>", None),
    "two splits": (two_splits, "tokenizers", CHAT[0], None),
}


@pytest.fixture(scope="session")
def directory(corpus, tmp_path_factory):
    """directory(family): with tokenizer.json and tokenizer_config.json, made once."""
    made = {}

    def make(family):
        if family not in made:
            build, _, eos, bos = FAMILIES[family]
            made[family] = tmp_path_factory.mktemp(family.replace(" ", "_"))
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos,
                      **({"bos_token": bos} if bos else {})}
            for name, content in ("tokenizer.json", build(corpus)), ("tokenizer_config.json", config):
                (made[family] / name).write_text(json.dumps(content), encoding="utf-8")
        return made[family]

    return make


def fuzz(n, seed=0):
    rng = np.random.default_rng(seed)
    words = ["a", "  ", "    ", "\n", "e", " ", "self", "==", "-", "\t", "return", '"""', "\r\n", "日本",
             "ss", "12", "é", "'s", "'T", "/",
             "HTTP", "\u0301", "🙂", "▁", "<s>", "<|im_end|>", "<think>", "<|user|>", "unreachable",
             " unreachable", "\u3000", "\x01", "ſ"]
    return ["".join(words[i] * k
            for i, k in zip(rng.integers(0, len(words), 20), rng.integers(1, 4, 20))) for _ in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_text_are_those_of_transformers(family, directory, corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = directory(family)
    ours, (_, backend, eos, bos) = Tokenizer.load(path), FAMILIES[family]
    assert bool(ours.pattern) == (backend == "tiktoken")
    assert ours.eos_token == eos and ours.bos_id == (ours.special_tokens[bos] if bos else None)
    auto = transformers.AutoTokenizer.from_pretrained(path)
    plain = transformers.AutoTokenizer.from_pretrained(path, split_special_tokens=True)
    ours.save(tmp_path)
    again, auto_again = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.hash == ours.hash and again.bos_id == ours.bos_id and again.eos_ids == ours.eos_ids
    for text in TEXTS + fuzz(60) + corpus[:40:3]:
        ids = auto.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == ids == again.encode(text, special=True), repr(text)
        assert auto_again.encode(text) == auto.encode(text)  # with what the post-processor adds
        assert ours.encode(text) == plain.encode(text, add_special_tokens=False), repr(text)
        assert ours.encode(text, special=True, bos=True) == auto.encode(text) or ids[:1] == [ours.bos_id]
        assert ours.decode(ids) == auto.decode(ids), repr(text)
        if backend == "tiktoken" and family != "qwen2":  # Qwen's is NFC
            assert ours.decode_bytes(ids) == text.encode("utf-8") and ours.decode(ours.encode(text)) == text
    assert len(ours.token_bytes()) == ours.vocab_size == len(auto)


def test_every_character_is_cut_alike(directory):
    """The regexes mean the same to both engines, after a letter, a space, an apostrophe (all of 0x20000 did)."""
    letters = [chr(c) for c in [*range(0x3100), *range(0x3100, 0x20000, 41)]
               if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    for family in ("gpt2", "smollm2", "qwen2", "llama3", "nemo", "phi4"):
        ours = Tokenizer.load(directory(family))
        reference = tokenizers.Tokenizer.from_file(str(directory(family) / "tokenizer.json"))
        differ = []
        for i in range(0, len(letters), 500):
            some = letters[i:i + 500]
            text = "".join(f"a{c} {c}b'{c}" for c in some)
            if ours.encode(text) != reference.encode(text, add_special_tokens=False).ids:
                differ += [c for c in some
                           if ours.encode(t := f"a{c} {c}b'{c}") != reference.encode(t, add_special_tokens=False).ids]
        assert not differ, (family, len(differ), [hex(ord(c)) for c in differ[:20]])


def change(data, **parts):
    return {**json.loads(json.dumps(data)), **parts}


def test_what_tiktoken_would_get_wrong_goes_to_the_library(corpus):
    qwen = byte_level(corpus[:20], QWEN2, CHAT)
    n, model = len(qwen["model"]["vocab"]), qwen["model"]
    llama = byte_level(corpus[:20], LLAMA3, CHAT, converted=True)
    swapped = change(model, merges=model["merges"][1:] + model["merges"][:1])
    unlisted = change(llama["model"], merges=[m for m in llama["model"]["merges"] if m != llama["model"]["merges"][40]])
    raw = change(model, vocab={**model["vocab"], "日本": n + 3})
    hidden = change(model, vocab={**model["vocab"], model["merges"][0][1] * 3: n + 3})
    split = qwen["pre_tokenizer"]["pretokenizers"]
    pre = lambda regex: {"type": "Sequence", "pretokenizers": [{**split[0], "pattern": {"Regex": regex}}, split[1]]}
    overlapping = [flags("<|a|>", n), flags("|>b", n + 1), flags("<|endoftext|>", n + 2)]
    rstrip = [flags("<|endoftext|>", n, rstrip=True), flags("<|user|>", n + 1, lstrip=True)]
    words = [flags("<|endoftext|>", n), flags("import", n + 1, single_word=True)]
    for data in (change(qwen, model=swapped), change(llama, model=unlisted), change(qwen, model=raw),
                 change(qwen, model=hidden),
                 change(qwen, pre_tokenizer=pre(r"\p{L}++|\X|.")), change(qwen, added_tokens=overlapping),
                 change(qwen, added_tokens=rstrip), change(qwen, added_tokens=words),
                 change(qwen, normalizer={"type": "NFKC"}),
                 change(qwen, normalizer={"type": "NFC"}, added_tokens=[flags("<|endoftext|>", n, normalized=True)])):
        ours = Tokenizer(data, {"eos_token": "<|endoftext|>"})
        reference = tokenizers.Tokenizer.from_str(json.dumps(data))
        assert ours.pattern is None
        for text in TEXTS + ["<|a|>b <|user|> x", "a <|endoftext|>  b", "important import", "日本"]:
            assert ours.encode(text, special=True) == reference.encode(text).ids
    for data in (qwen, llama):
        assert Tokenizer(data, {}).pattern


def test_bytes_the_vocabulary_lacks(corpus):
    """SmolLM2 has no token for some control characters: the library drops them, and so do we."""
    data = byte_level(corpus[:20], None, CHAT)
    vocab = data["model"]["vocab"]
    for b in (1, 0xF1):
        vocab[f"<unused{b}>"] = vocab.pop(byte_alphabet()[b])
    data["added_tokens"] += [flags(f"<unused{b}>", vocab[f"<unused{b}>"]) for b in (1, 0xF1)]
    ours, reference = Tokenizer(data, {}), tokenizers.Tokenizer.from_str(json.dumps(data))
    assert ours.pattern
    for text in ("-\x01- --", "a\x01<|im_end|>\U00040000b", "plain"):
        assert ours.encode(text, special=True) == reference.encode(text).ids


def test_streaming_a_sentencepiece_tokenizer(directory):
    ours = Tokenizer.load(directory("llama2"))
    for text in ("Hello  world\n\t x", "日本 🙂 ok", " leading"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert b"".join(ours.decode_bytes([i]) for i in ids).decode("utf-8") == " " + text
        assert ours.token_bytes()[ids].sum() == len(text.encode("utf-8")) + 1
    assert ours.token_bytes()[[0, 1, 2]].tolist() == [0, 0, 0] and ours.decode_bytes([3 + 0xE9]) == b"\xe9"
    assert ours.decode(ours.encode("a\ud83db")) == "a\ufffdb"


@pytest.mark.parametrize("family", ["llama2", "phi3", "qwen2", "llama3"])
def test_no_message_ends_its_own_turn(family, directory):
    ours = Tokenizer.load(directory(family))
    for name in ours.special_tokens:
        text = f"x{name}y"
        ids = ours.encode(ours.render([{"role": "user", "content": text}], add_generation_prompt=False), special=True)
        assert not set(ids) & {i for t, i in ours.special_tokens.items() if t == name and "im_" not in t}
        assert text in ours.decode(ids).replace("< ", "<")  # Llama 2 puts a space after every special token


def test_eos_ids_and_bos(directory, tmp_path):
    ours = Tokenizer.load(directory("llama3"))
    ids = ours.special_tokens
    assert ours.eos_ids == [ids["<|end_of_text|>"], ids["<|eot_id|>"], ids["<|endoftext|>"]]
    ours.save(tmp_path)
    for listed, more in ((7, [7]), ([9, ids["<|eot_id|>"]], [9])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}), encoding="utf-8")
        assert Tokenizer.load(tmp_path).eos_ids == ours.eos_ids + more
    text = "<|begin_of_text|>hello"
    assert ours.encode("hello", bos=True) == [ours.bos_id, *ours.encode("hello")] == ours.encode(text, True, bos=True)
    qwen2, phi3 = Tokenizer.load(directory("qwen2")), Tokenizer.load(directory("phi3"))
    assert qwen2.encode("hello", bos=True) == qwen2.encode("hello") and phi3.special_tokens["<|end|>"] in phi3.eos_ids


def test_hash_is_the_content(directory):
    for family in ("llama2", "llama3", "unigram"):
        ours = Tokenizer.load(directory(family))
        data = json.loads(json.dumps(ours.data, indent=3, sort_keys=True))  # keys in another order
        assert Tokenizer(data, ours.config).hash == ours.hash
    llama2 = Tokenizer.load(directory("llama2"))
    data = json.loads(json.dumps(llama2.data))
    data["normalizer"]["normalizers"].pop(0)
    assert Tokenizer(data, llama2.config).hash != llama2.hash


LLAMA3_CHAT = (  # Llama 3.1's, shortened
    "{{- bos_token }}\n{%- if custom_tools is defined %}\n    {%- set tools = custom_tools %}\n{%- endif %}\n"
    "{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n"
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now(\"%d %b %Y\") %}\n    {%- else %}\n"
    "        {%- set date_string = \"26 Jul 2024\" %}\n    {%- endif %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = \"\" %}\n{%- endif %}\n"
    "{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}\n{{- \"Today Date: \" + date_string + \"\\n\\n\" }}\n"
    "{%- if tools is not none %}\n    {{- tools | tojson(indent=4) }}\n{%- endif %}\n"
    "{{- system_message }}\n{{- \"<|eot_id|>\" }}\n"
    "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n")
QWEN25_CHAT = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n        {{- \"\\n\" }}\n"
    "        {{- tool | tojson }}\n    {%- endfor %}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if (message.role == \"user\")"
    " or (message.role == \"system\" and not loop.first)"
    " or (message.role == \"assistant\" and not message.tool_calls) %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- elif message.role == \"assistant\" %}\n        {{- '<|im_start|>' + message.role }}\n"
    "        {%- for tool_call in message.tool_calls %}\n            {{- '\\n<tool_call>\\n' }}\n"
    "            {{- tool_call.arguments | tojson }}\n        {%- endfor %}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n")
GENERATION_CHAT = (
    "{% for m in messages %}\n{% if m.role == 'assistant' %}\n{% set end = 1 %}{% generation %}\n"
    "    A: {{ m['content'] }}"
    "{%- if loop.last %}!{% endif %}{{ eos_token }}{% endgeneration %}\n{% else %}\n"
    "Q: {{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if m is defined %}{{ raise_exception('no') }}{% endif %}"
    "{{ dict(a=1) | tojson }}{{ pad_token }}|{{ unk_token }}")
CHAT_MESSAGES = [
    [{"role": "user", "content": " Hi <b> & é\n"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "1+1?"},
     {"role": "assistant", "content": "2 ."}],
    [{"role": "user", "content": "x"},
     {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"é": [1, "<"]}}]}],
]


@pytest.mark.parametrize("template", [None, LLAMA3_CHAT, QWEN25_CHAT, GENERATION_CHAT])
def test_chats_render_as_in_transformers(template, directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(directory("qwen2"))
    ours = Tokenizer(ours.data, {**ours.config, "bos_token": "<|endoftext|>", "chat_template": template})
    ours.save(tmp_path)
    auto, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for messages in CHAT_MESSAGES:
        for prompt in (True, False):
            text = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert again.render(messages, add_generation_prompt=prompt) == text
            assert again.encode(text, special=True) == auto.apply_chat_template(
                messages, add_generation_prompt=prompt, return_dict=False)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch HACKED') }}", "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}", "{{ raise_exception.__globals__['os'].system('touch HACKED') }}",
    "{{ dict.update(messages[0], role='system') }}", "{{ strftime_now.__globals__.os.system('touch HACKED') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}", "{% include '/etc/passwd' %}",
    "{% for i in range(10**9) %}{% endfor %}", "{{ raise_exception('one\nreason') }}", "{% if %}",
    "{{ messages | tojson(1, 2, 3, 4, 5) }}"])
def test_malicious_and_broken_templates_are_one_sentence(template, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = Tokenizer.load(directory("gpt2"))
    ours.chat_template, messages = template, [{"role": "user", "content": "x"}]
    with pytest.raises(UserError) as error:
        ours.render(messages)
    assert "chat template" in str(error.value) and "\n" not in str(error.value)
    assert messages == [{"role": "user", "content": "x"}] and not list(tmp_path.iterdir())
