"""Tokenizers of strangers: broken values, panics, endless chat templates, SentencePiece's examples, end tokens."""

import json
import sys
import time
from pathlib import Path

import pytest

from data import UserError, template
from data.prepare import encode_example
from data.template import CHATML
from data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ASK = [{"role": "user", "content": "hi there"}]


@pytest.fixture
def folder(tmp_path):
    """Of the smallest tokenizer: 256 bytes and three special tokens."""
    Tokenizer.from_bytes().save(tmp_path)
    return tmp_path


def edit(folder, file, change):
    data = json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).exists() else {}
    change(data)
    (folder / file).write_text(json.dumps(data), encoding="utf-8")


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        Tokenizer.load(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and all(w in message for w in words), message


# --------------------------------------------------------------------------------------------- values from files

def setting(*path, value):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value
    return change


@pytest.mark.parametrize("bad", [-1, 10**9, 2**24, 10**30, 1.5, True, "7", None, [3], {}])
def test_ids_are_whole_numbers_of_a_sane_size(folder, bad):
    original = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for path in (("added_tokens", 2, "id"), ("model", "vocab", "A")):
        edit(folder, "tokenizer.json", setting(*path, value=bad))
        start = time.perf_counter()
        refused(folder, "tokenizer.json", "id")
        assert time.perf_counter() - start < 2
        (folder / "tokenizer.json").write_text(original, encoding="utf-8")
    for file in ("generation_config.json", "config.json"):
        edit(folder, file, setting("eos_token_id", value=bad))
        if bad is None:
            assert Tokenizer.load(folder).eos_ids == [256, 258]
        elif bad == [3]:
            assert 3 in Tokenizer.load(folder).eos_ids
        else:
            refused(folder, file, "eos_token_id")
        (folder / file).unlink()


@pytest.mark.parametrize("path, value", [
    (("model",), []), (("model",), None), (("model", "vocab"), []), (("model", "vocab"), 5), (("model", "vocab"), {}),
    (("model", "vocab", "A"), 66), (("model", "merges"), {}), (("model", "merges"), [["A"]]),
    (("model", "merges"), [5]), (("model", "merges"), ["A B C"]), (("model", "merges"), [["A", 5]]),
    (("model", "merges"), ["AB"]),
    (("added_tokens",), {}), (("added_tokens",), [5]), (("added_tokens", 0), {}), (("added_tokens", 1, "id"), 256),
    (("added_tokens", 1, "id"), 65), (("added_tokens", 1, "content"), "<|endoftext|>"),
    (("added_tokens", 1, "content"), ""), (("added_tokens", 1, "content"), ["x"]),
    (("added_tokens", 1, "special"), "no"), (("added_tokens", 1, "content"), "\ud800"), (("pre_tokenizer",), []),
    (("pre_tokenizer", "pretokenizers"), [5]),
    (("pre_tokenizer", "pretokenizers"), {}), (("decoder",), "x"), (("normalizer",), 5),
    (("post_processor",), {"type": "TemplateProcessing", "single": 5}), (("model", "vocab", "A"), float("nan"))])
def test_a_broken_part_of_tokenizer_json_is_named(folder, path, value):
    edit(folder, "tokenizer.json", setting(*path, value=value))
    refused(folder, "tokenizer.json")


@pytest.mark.parametrize("key, value", [
    ("eos_token", 5), ("eos_token", ["x"]), ("eos_token", {"content": 5}), ("pad_token", 5), ("bos_token", []),
    ("chat_template", 5), ("chat_template", "\udce9"), ("chat_template", {"a": "b"}), ("chat_template", [5]), ("chat_template", [{"name": []}]),
    ("chat_template", [{"name": "default"}]), ("model_max_length", "x")])
def test_a_broken_part_of_tokenizer_config_json_is_named(folder, key, value):
    edit(folder, "tokenizer_config.json", setting(key, value=value))
    refused(folder, "tokenizer_config.json", key)


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"\"x\"", b"{", b"\xff\xfe{\0}\0", b"{\"a\": NaN}",
                                     b"[" * 100_000, b"{\"a\":" * 100_000, b"{\"a\": " + b"9" * 5000 + b"}"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json",
                                  "special_tokens_map.json"])
def test_what_is_no_json_object_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    refused(folder, file)


def test_a_template_file_that_is_not_utf8_is_named(folder):
    (folder / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    refused(folder, "chat_template.jinja", "UTF-8")


# ------------------------------------------------------------------------------------------------------- panics

@pytest.mark.parametrize("regex", ["(a+)+$", "()*", "(?=a)", "(a*)*b"])
def test_a_panic_of_a_library_is_one_sentence(folder, regex):
    edit(folder, "tokenizer.json", setting("pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": regex}))
    try:
        tokenizer = Tokenizer.load(folder)
        for text in ("a" * 60 + "!", "aaa!"):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
    except UserError as e:
        assert "tokenizer.json" in str(e) and "\n" not in str(e)


def test_stopping_is_no_panic():
    def texts():
        yield "some text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer.train(texts(), 300)


# ----------------------------------------------------------------------------------------------- chat templates

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9**(9**9) }}", "times": "{{ 'x' * 3000000000 }}", "width": "{{ '{:2000000000}'.format(1) }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "text": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "lists": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "literal": "{% for i in range(99999) %}" + "x" * 100000 + "{% endfor %}", "depth": "{{ " + "(" * 30000 + " }}"}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_no_template_runs_for_ever_or_fills_the_memory(name, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    tokenizer = Tokenizer.from_bytes()
    tokenizer.chat_template, start = ENDLESS[name], time.monotonic()
    with pytest.raises(UserError, match="chat template failed") as error:
        tokenizer.render(ASK)
    assert "\n" not in str(error.value) and time.monotonic() - start < 10
    tokenizer.chat_template = "{{ messages[0].content }}"                    # the second process starts again
    assert tokenizer.render(ASK) == ASK[0]["content"]


def test_the_second_process_takes_no_more_memory_than_it_may():
    tokenizer = Tokenizer.from_bytes()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.render(ASK)
    status = Path(f"/proc/{template.second.process.pid}/limits")
    if status.is_file():
        assert str(template.MEMORY) in next(x for x in status.read_text().splitlines() if x.startswith("Max address"))


def test_a_long_chat_stays_within_the_budget():
    """1,000 turns, and a turn of 2 MB, with a template that splits and strips as those of Qwen and DeepSeek do."""
    tokenizer = Tokenizer.from_bytes()
    tokenizer.chat_template = (
        "{% set ns = namespace(last=0) %}{% for m in messages[::-1] %}{% if m.role == 'user' and not ns.last %}"
        "{% set ns.last = (messages|length - 1) - loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1]"
        ".lstrip('\n') %}{% endif %}{{ '<' ~ m.role + '>' + content|trim|replace('\t', ' ') + eos_token }}{% endfor %}")
    many = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} says this"} for i in range(1000)]
    assert tokenizer.render(many).count("<|endoftext|>") == 1000
    assert len(tokenizer.render([{"role": "user", "content": "0123456789" * 200_000}])) > 2_000_000


def test_both_processes_give_the_same_text():
    """A space at its end makes our template a stranger's."""
    tokenizer, other = Tokenizer.from_bytes(), Tokenizer.from_bytes()
    other.chat_template = CHATML + " "
    chat = ASK + [{"role": "assistant", "content": "ja <|im_end|> é\n"}]
    for prompt in (True, False):
        assert other.render(chat, prompt) == tokenizer.render(chat, prompt) + " "


@pytest.mark.parametrize("chat", [
    "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m.role }}: {{ m.value }}{% endfor %}", "{{ 'always the same' }}",
    "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.content[:3] }}{% endfor %}"])
def test_a_template_that_loses_the_message_is_refused(chat):
    tokenizer = Tokenizer.from_bytes()
    tokenizer.chat_template = chat
    for ask in (lambda: tokenizer.render(ASK), lambda: encode_example(tokenizer, "what is red", "a colour")):
        with pytest.raises(UserError, match="chat template loses the text.*chat_template"):
            ask()


def test_a_template_may_trim_or_quote_what_was_said():
    tokenizer, said = Tokenizer.from_bytes(), [{"role": "user", "content": ' He said:\n\n "é". '}]
    for change in ("|trim", "|tojson", "|upper", "|replace('\n', ' ')"):
        tokenizer.chat_template = "{{ messages[0].content" + change + " }}"
        assert tokenizer.render(said)


# ------------------------------------------------------------------------------------------------------ examples

def sentencepiece(folder, template, prepend):
    """Llama-2's kind: a space before the text becomes part of the first word."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {}
    for token in ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁",
                  *"abcdefghijklmnopqrstuvwxyz[]/INST:", "▁y", "▁ye", "▁yes"]:
        vocab.setdefault(token, len(vocab))
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s")]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend:
        engine.normalizer = tokenizers.normalizers.Sequence([
            tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    else:
        engine.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    engine.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    specials = [tokenizers.AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")]
    engine.add_special_tokens(specials)
    engine.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(folder), engine


TURN = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}")
NEWLINE = TURN.replace("' ' + m.content + ' '", "m.content")  # nothing between the prompt and the response
SPACE = NEWLINE.replace("' [/INST]'", "' [/INST] '")  # the prompt ends with a space: one token with a response's begin


@pytest.mark.parametrize("prepend", [True, False])
@pytest.mark.parametrize("template, learned", [
    (TURN, ["▁yes", "▁", "</s>"]), (NEWLINE, ["y", "e", "s", "</s>"]), (SPACE, ["y", "e", "s", "</s>"])])
def test_no_space_enters_a_response(tmp_path, template, learned, prepend):
    ours, engine = sentencepiece(tmp_path, template, prepend)
    ids, mask = encode_example(ours, "is it", "yes")
    assert [engine.id_to_token(int(i)) for i in ids[mask & 1 > 0]] == learned
    prompt = ours.encode(ours.render([{"role": "user", "content": "is it"}]), special=True, bos=True)
    assert ids[:len(prompt)].tolist() == prompt and (mask[:len(prompt)] & 1 == 0).all()
    whole = ours.render([{"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes"}], False)
    if template is not SPACE:
        assert ids.tolist() == engine.encode(whole, add_special_tokens=False).ids


@pytest.mark.parametrize("response", ["x", " x", "\n\nx", "  \n x", "é", "\u0301x", "1", "'s"])
def test_an_example_of_byte_level_bpe_begins_as_the_chat_does(response):
    tokenizer = Tokenizer.train(["assistant\n\nx user\n  x 's\n" * 50], 400)
    ids, mask = encode_example(tokenizer, "q", response)
    prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": "q"}]), special=True, bos=True)
    assert ids[:len(prompt)].tolist() == prompt
    assert tokenizer.decode(ids[mask & 1 > 0].tolist()) == response + "<|im_end|>"
    assert mask[0] == 2 and (mask[1:len(prompt)] == 0).all() and (mask[len(prompt):] == 1).all()


# ---------------------------------------------------------------------------------------------------- end tokens

def test_end_tokens_of_every_file_are_honoured(folder):
    assert Tokenizer.load(folder).eos_ids == [256, 258]
    edit(folder, "config.json", setting("eos_token_id", value=[256, 65]))
    assert Tokenizer.load(folder).eos_ids == [256, 258, 65]
    edit(folder, "generation_config.json", setting("eos_token_id", value=66))
    assert Tokenizer.load(folder).eos_ids == [256, 258, 66, 65]
    edit(folder, "config.json", setting("eos_token_id", value=10**6))  # beyond the vocabulary: never generated
    assert Tokenizer.load(folder).eos_ids == [256, 258, 66]


@pytest.mark.parametrize("name", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_an_end_token_only_in_special_tokens_map_json(folder, name):
    edit(folder, "tokenizer_config.json", lambda c: c.pop("eos_token"))
    edit(folder, "special_tokens_map.json", setting("eos_token", value=name))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_id == 258


# ------------------------------------------------------------------------------------------------------ training

@pytest.mark.parametrize("run", ["_", "1", "a", "-", " ", "\n", "e\u0301", "\u0301", "👩\u200d", "_-", "\x1c!", "日",
                                 "aGk5_", "½", "ab"])
def test_training_ends_on_runs_of_one_character(run):
    start = time.process_time()
    tokenizer = Tokenizer.train(["some words here\n" * 3000 + run * 60_000, run * 1_999], 400)
    assert time.process_time() - start < 5
    assert tokenizer.decode(tokenizer.encode("some words here")) == "some words here"
