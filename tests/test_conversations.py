"""Conversations: what records are read as, which tokens are learned, what is scored and saved; against independent references."""
import functools, io, json, re, sys, time

import numpy as np
import pytest
import torch

import sample
from data import UserError, conversation, corpora, heldout
from data.conversation import Names
from data.encoding import encode_conversations
from data.loader import FIRST, IGNORE, LEARNED, Windows
from data.measure import evaluate, response_loss
from data.prepare import encode_example, prepare
from data.template import CHATML, PLAIN
from data.tokenizer import Tokenizer
from model import Config, Transformer, save
from test_tokenizers import LLAMA3, QWEN2, byte_level, sentencepiece

# The templates of real families, shortened, with what is peculiar in each. {A} ... {B} stand around what the assistant says:
# the marks {% generation %} for one test, nothing for the others.
ALTERNATE = ("{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}")
FAMILIES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{A}{{ m.content + '<|im_end|>' }}"
              "{B}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
              "{% if m.role == 'assistant' %}{A}{{ m.content | trim + '<|eot_id|>' }}{B}{% else %}{{ m.content | trim + '<|eot_id|>' }}"
              "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             "{% for m in messages %}" + ALTERNATE + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
             "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}{A}{{ m.content | trim + '<end_of_turn>' }}{B}{{ '\n' }}"
             "{% else %}{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
               "{% elif m.role == 'assistant' %}{A}{{ ' ' + m.content + eos_token }}{B}"
               "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}\n{% if m.role == 'assistant' %}\n{{ '<|assistant|>\n' }}{A}{{ m.content + eos_token }}{B}{{ '\n' }}"
              "{% else %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n{% endif %}\n"
              "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    # ends the whole text with another end token, which is not there once the conversation goes on
    "phi3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{A}{{ m.content + '<|end|>' }}{B}{{ '\n' }}"
            "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    # thoughts are shown in the last turn only, and an empty one is put before an answer without
    "qwen3": "{% set ns = namespace(last=messages|length - 1, open=true) %}{% for m in messages[::-1] %}"
             "{% set index = (messages|length - 1) - loop.index0 %}{% if ns.open and m.role == 'user' %}{% set ns.open = false %}"
             "{% set ns.last = index %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}"
             "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}{% set content = m.content %}{% set thought = '' %}"
             "{% if '</think>' in m.content %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
             "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% endif %}"
             "{% if loop.index0 > ns.last %}{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
             "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "zephyr": "</s>",
        "phi3": "<|end|>", "qwen3": "<|im_end|>"}
TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
          "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CORPUS = [f"user\n\n{w} is it? assistant\nIt is {w} [INST] model\n\n" * 9 for w in "one two three red green blue".split()]


def turns(*contents, system=None):
    """Messages of user and assistant in turn."""
    said = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}] * (system is not None) + said


CHATS = [turns("what is it?", "It is one."), turns("what is it?", "It is one.", "and two", "two 2, two\n", "x", "last é 日本"),
         turns(" a ", "b", "", "c\n\n\nd", "e", "f", system="Be brief."), turns("q", "a", "q", "a", "q", "a")]


@functools.cache
def vocabulary(kind, strips):
    """A tokenizer.json: byte-level BPE (tiktoken encodes, or the library), or SentencePiece's."""
    if kind.startswith("spm"):
        # no newline in the corpus: or a token would span the border of a turn, which is another test
        return sentencepiece([text.replace("\n", " ") for text in CORPUS], metaspace=kind == "spm-metaspace",
                             specials=[(token, {"rstrip": strips}) for token in TOKENS[2:]])
    return byte_level(CORPUS, {"llama3": LLAMA3, "qwen2": QWEN2, "library": None}[kind], TOKENS, digits=kind == "library",
                      bos="<s>" if kind == "llama3" else None)


def build(family, kind, marked=False):
    """A small tokenizer with the template of a family; Phi-3's tokens take the white space behind them away."""
    template = FAMILIES[family].replace("{A}", "{% generation %}" * marked).replace("{B}", "{% endgeneration %}" * marked)
    data = json.loads(json.dumps(vocabulary(kind, family == "phi3")))
    return Tokenizer(data, {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template})


def takes(family, messages):
    return family not in ("gemma", "mistral") or messages[0]["role"] == "user"


def runs(mask, bit=LEARNED):
    """[(start, end)] of the tokens in a row that have the bit."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], (mask & bit > 0).astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


# ------------------------------------------------------------------------------------------- what is learned

@pytest.mark.parametrize("kind", ["llama3", "qwen2", "spm-metaspace"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3"])
def test_ids_and_mask_are_those_of_transformers(family, kind, tmp_path):
    """Its mask comes from the marks {% generation %} in the template, ours from what the template writes for each turn."""
    transformers = pytest.importorskip("transformers")
    ours = build(family, kind, marked=True)
    ours.save(tmp_path)
    auto, chats = transformers.AutoTokenizer.from_pretrained(tmp_path), [m for m in CHATS if takes(family, m)]
    assert len(chats) >= 3
    for messages in chats:
        (ids, mask), = encode_conversations(ours, [messages])
        whole = auto.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        begin = int(ids[0] == ours.bos_id != whole["input_ids"][0])            # a chat has the start token, too
        ids, learned, expected = ids[begin:].tolist(), (mask[begin:] & LEARNED).tolist(), whole["assistant_masks"]
        n = len(ids)
        if family == "phi3":                                                   # the end of the whole text is learned, too
            last = n - expected[:n][::-1].index(1)
            assert ids[last:n] == ours.encode("\n</s>", special=True)[-(n - last):]
            expected[last:n] = [1] * (n - last)
        assert ids == whole["input_ids"][:n] and learned == expected[:n] and not any(expected[n:])
        assert len(runs(mask)) == len(conversation.answers(messages)) and len(runs(mask, FIRST)) == 1


def said_by(family, content):
    """What a template writes for a turn of the assistant, by hand."""
    if family == "qwen3":
        thought, _, words = content.rpartition("</think>")
        return f"<think>\n{thought.removeprefix('<think>').strip(chr(10))}\n</think>\n\n{words.lstrip(chr(10))}<|im_end|>"
    words = content.strip() if family in ("llama3", "gemma") else content
    return " " * (family == "mistral") + words + ENDS[family]


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "library", "spm-metaspace", "spm-prepend"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_is_learned_behind_what_a_chat_shows(family, kind):
    """By brute force: each run of learned tokens, decoded, is a turn, and the tokens before are the prompt of a chat."""
    tokenizer = build(family, kind)
    plain = lambda ids: tokenizer.decode_bytes(ids.tolist()).decode("utf-8")
    thoughts = [turns("q", "<think>\nhm\n</think>\n\none", "and", "<think>\nyes\n</think>\n\ntwo", "x", "three")] * (family == "qwen3")
    for messages in filter(lambda m: takes(family, m), CHATS + thoughts):
        (ids, mask), = encode_conversations(tokenizer, [messages])
        firsts, learned, at = np.flatnonzero(mask & FIRST).tolist(), runs(mask), conversation.answers(messages)
        assert len(learned) == len(at) and firsts[0] == 0
        assert len(firsts) == (len(at) if family == "qwen3" else 1)
        for i, (start, end), begun in zip(at, learned, [0, *(end for _, end in learned)]):
            expected = said_by(family, messages[i]["content"])
            if family == "phi3":                                               # SentencePiece's loses white space behind tokens
                expected = " " * (kind == "spm-prepend") + expected
                expected += ("</s>" if kind.startswith("spm") else "\n</s>") * (i == at[-1])
            assert plain(ids[start:end]) == expected
            first = max(f for f in firsts if f <= start)
            shown = tokenizer.encode(tokenizer.render(messages[:i]), special=True, bos=True)
            if (family, kind) == ("llama3", "library"):                        # GPT-2's two newlines are one token at a text's end
                assert plain(ids[first:start]).encode() == tokenizer.decode_bytes(shown)
                shown, first = shown[len(shown) - (start - begun):], begun
            assert ids[first:start].tolist() == shown
        if family == "qwen3" and messages in thoughts:
            assert "hm" not in plain(ids[firsts[1]:]) and plain(ids).count("yes") == 1


@pytest.mark.parametrize("answer", ["x", " x", "\n\nx", "  \n x", "é", "\u0301x", "1", "'s", "<|im_end|>", "<|im_start|>user\nhi"])
@pytest.mark.parametrize("template", [CHATML, PLAIN, FAMILIES["qwen3"].replace("{A}", "").replace("{B}", "")])
def test_the_border_of_a_turn_and_texts_of_special_tokens(template, answer):
    """A token that would span the border is cut there, in every turn; no message can end a turn."""
    tokenizer = Tokenizer.train(["assistant\n\nx user\n  x 's\n" * 50], 400)
    tokenizer.chat_template = template
    (ids, mask), = encode_conversations(tokenizer, [turns("q", answer, "and", answer, "or", answer + answer)])
    end, more = ("<|im_end|>", "") if template is not PLAIN else ("<|endoftext|>", " ")
    lead = "<think>\n\n</think>\n\n" if template not in (CHATML, PLAIN) else more
    words = [a.lstrip("\n") if lead.startswith("<") else a for a in (answer, answer, answer + answer)]
    assert [tokenizer.decode(ids[a:b].tolist()) for a, b in runs(mask)] == [lead + w + end for w in words]
    assert all(ids[b - 1] == tokenizer.special_tokens[end] for _, b in runs(mask))
    a, _ = runs(mask)[0]
    assert ids[:a].tolist() == tokenizer.encode(tokenizer.render(turns("q")), special=True, bos=True)


def test_one_turn_is_what_it_was():
    """The plain definition of one turn: the prompt's tokens, then those of the answer."""
    for family in ("chatml", "llama3", "zephyr"):
        tokenizer = build(family, "llama3")
        for messages in (turns("what is it?", "It is one."), turns(" a ", "b \n")):
            prompt, whole = tokenizer.render(messages[:1]), tokenizer.render(messages, False)
            head, both = (tokenizer.encode(t, special=True, bos=True) for t in (prompt, whole))
            ids, mask = encode_example(tokenizer, *(m["content"] for m in messages))
            last = len(both) - both[::-1].index(tokenizer.special_tokens[ENDS[family]])
            assert ids.tolist() == both[:last] and both[:len(head)] == head
            assert mask.tolist() == [FIRST, *[0] * (len(head) - 1), *[LEARNED] * (last - len(head))]


def test_a_template_without_end_tokens_gives_an_example_for_each_turn():
    """The end token, which a chat does not show in the past, is put behind each turn."""
    tokenizer = Tokenizer.from_bytes()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    (ids, mask), = encode_conversations(tokenizer, [turns("a", "b", "c", "d")])
    assert tokenizer.decode(ids.tolist()) == "user: a\nassistant: b\n<|endoftext|>user: a\nassistant: b\nuser: c\nassistant: d\n<|endoftext|>"
    assert [tokenizer.decode(ids[a:b].tolist()) for a, b in runs(mask)] == ["b\n<|endoftext|>", "d\n<|endoftext|>"]


def test_long_conversations_take_seconds():
    """200 turns by a stranger's template, which is rendered up to each turn."""
    tokenizer, start = build("zephyr", "qwen2"), time.process_time()
    messages = turns(*(f"turn {i} says this and more" for i in range(200)))
    (ids, mask), = encode_conversations(tokenizer, [messages])
    assert len(runs(mask)) == 100 and len(runs(mask, FIRST)) == 1 and time.process_time() - start < 5


# ------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("template, messages, says", [
    ("gemma", CHATS[2], "failed: System role not supported; if it takes no system message, put that text at the"),
    ("mistral", turns("a", "b") + turns("c", "d")[1:], "must alternate.*; if it wants user and assistant in turn, join neighbouring"),
    ("{% for m in messages if m.role != 'system' %}{{ m.role + m.content + eos_token }}{% endfor %}"
     "{% if add_generation_prompt %}assistant{% endif %}", CHATS[2], "loses the text of the message of system .*first question"),
    ("{% for m in messages %}{{ m.role + m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
     "{% if add_generation_prompt %}assistant{% endif %}", turns("a", "<think>much</think>b"), "loses the text of the message of assistant"),
    ("{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant<think>\n{% endif %}",
     turns("a", "b"), "does not write an answer right after its generation prompt .*thought"),
    ("{% for m in messages %}{{ m.role + (m.content if m.role == 'user' else '') + eos_token }}{% endfor %}"
     "{% if add_generation_prompt %}assistant{% endif %}", turns("yes", "yes"), "loses the text of the message of assistant")])
def test_templates_that_cannot_take_a_conversation_are_refused(template, messages, says, tmp_path):
    tokenizer = build(template if template in FAMILIES else "chatml", "qwen2")
    tokenizer.chat_template = template if template not in FAMILIES else tokenizer.chat_template
    rows = [{"messages": turns(f"question {i}", f"answer {i}")} for i in range(20)] + [{"messages": messages}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match=f"x.jsonl, line [0-9]+: the tokenizer's chat template.*{says}") as error:
        prepare(inputs=[tmp_path / "x.jsonl"], out=tmp_path / "out", tokenizer=tokenizer)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- records

QA = turns("q", "a")


@pytest.mark.parametrize("fields, names, messages, shape", [
    ({"messages": QA}, (), QA, "conversations from messages"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, (), QA, "conversations from conversations"),
    ({"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]}, (), QA, "conversations from conversations"),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, (),
     turns("q", "a", system="s"), "conversations from conversations"),
    ({"conversations": QA, "system": "s"}, (), turns("q", "a", system="s"), "conversations from conversations, with system"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}, QA[1]]}, (),
     turns("qr", "a"), "conversations from messages"),
    ({"conversations": [{"from": "gpt", "value": "hello"}, *QA, *QA[:1]]}, (), QA,
     "conversations from conversations, without the opening turn of the assistant"),
    ({"messages": turns("q", "a", "later")}, (), QA, "conversations from messages"),
    ({"messages": turns("q"), "prompt": "q"}, (), [], "conversations from messages"),
    ({"instruction": "q", "input": "more", "output": "a", "text": "all"}, (), turns("q\n\nmore", "a"),
     "examples from the fields instruction + input -> output"),
    ({"instruction": "q", "input": "", "output": "a"}, (), QA, "examples from the fields instruction + input -> output"),
    ({"instruction": "q", "output": "a", "system": "s"}, (), turns("q", "a", system="s"),
     "examples from the fields instruction -> output, with system"),
    ({"prompt": "q", "completion": "a"}, (), QA, "examples from the fields prompt -> completion"),
    ({"prompt": "q", "response": "a", "messages": None}, (), QA, "examples from the fields prompt -> response"),
    ({"Question": "q", "Answer": "a"}, (), QA, "examples from the fields Question -> Answer"),
    ({"frage": "q", "antwort": "a", "text": "t"}, (None, "frage", "antwort"), QA, "examples from the fields frage -> antwort"),
    ({"frage": "q", "response": "a"}, (None, "frage", None), QA, "examples from the fields frage -> response"),
    ({"messages": QA}, (None, "frage", "antwort"), QA, "conversations from messages"),
    ({"messages": turns("x", "y"), "frage": "q", "antwort": "a"}, (None, "frage", "antwort"), QA,
     "examples from the fields frage -> antwort"),
    ({"instruction": "q", "input": "more", "antwort": "a"}, (None, None, "antwort"), turns("q\n\nmore", "a"),
     "examples from the fields instruction + input -> antwort"),
    ({"prompt": "q", "response": "a", "body": "t"}, ("body",), "t", "texts from the field body"),
    ({"text": "t\ud83d", "prompt": "q"}, (), "t\ufffd", "texts from the field text")])
def test_records_are_read_as_what_they_are(fields, names, messages, shape):
    skipped = corpora.Skipped()
    _, parts = corpora.document_of("x, line 1", fields, Names(*names), skipped)
    assert (parts.messages if isinstance(parts, tuple) else "".join(parts)) == messages and dict(skipped.shapes) == {shape: 1}


@pytest.mark.parametrize("fields, names, says", [
    ({"msgs": [], "topic": "x"}, (), 'needs the string field "text", or .* it has "msgs", "topic": name other fields by --text-field'),
    ({}, (), "it has none: name"), ({"prompt": "q", "response": ["a"]}, (), 'it has "prompt", "response"'),
    ({"text": "t"}, (None, "frage", None), 'needs the string fields "frage" and "response", or the list "messages"; it has "text"'),
    ({"text": "t"}, ("body",), 'needs the string field "body"; it has "text"'),
    ({"messages": [*QA, {"role": "tool", "content": "4"}]}, (), "a turn has the role 'tool', and the roles are system, user"),
    ({"messages": [*QA, {"role": "function", "content": "4"}]}, (), "the role 'function'.* rename the role, or leave out"),
    ({"conversations": [{"value": "4"}]}, (), "the role None"), ({"messages": ["hi"]}, (), "a turn of the conversation is no object"),
    ({"messages": [QA[0], {"role": "assistant", "content": None}]}, (), "a turn of assistant has no text as content"),
    ({"messages": [QA[0], {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, (), "a turn of assistant calls a tool"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, (), "a part of the type 'image_url'")])
def test_other_records_are_refused_with_the_place(fields, names, says):
    with pytest.raises(UserError, match=f"^x.jsonl, line 7: .*{says}") as error:
        corpora.document_of("x.jsonl, line 7", fields, Names(*names), corpora.Skipped())
    assert "\n" not in str(error.value)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_shapes_may_be_mixed_and_what_cannot_be_learned_is_counted(tmp_path, capsys):
    rows = [{"messages": turns(f"question {i}", f"first answer {i}", "more", f"second answer {i}", system="s")} for i in range(12)]
    rows += [{"instruction": f"do {i}", "input": "", "output": f"done with {i}"} for i in range(12)]
    rows += [{"messages": turns("nobody answers")}, {"messages": turns("q", "a", "q", " ")}, rows[0]]
    out = prepare(inputs=[write(tmp_path / "x.jsonl", rows)], out=tmp_path / "out", tokenizer="bytes", val_fraction=0.3)
    said = capsys.readouterr().out
    assert "--input: 15 conversations from messages, 12 examples from the fields instruction + input -> output\n" in said
    meta, tokenizer = json.loads((out / "meta.json").read_text(encoding="utf-8")), Tokenizer.load(out)
    assert meta["skipped"] == {"conversation without an answer of the assistant to the user": 1, "empty response": 1, "exact duplicate": 1}
    assert sum(split["documents"] for split in meta["splits"].values()) == 24 and meta["kind"] == "examples"
    learned = set()
    for split in ("train", "val"):
        ids, mask = np.fromfile(out / f"{split}.bin", "<u2"), np.fromfile(out / f"{split}.mask.bin", np.uint8)
        texts = [tokenizer.decode(ids[a:b].tolist()) for a, b in runs(mask)]
        assert sum(len(t.encode()) - len("<|im_end|>") for t in texts) == meta["splits"][split]["response_bytes"]
        assert meta["splits"][split]["response_tokens"] == (mask & LEARNED).sum()
        learned |= set(texts)
    assert learned == {f"{n} answer {i}<|im_end|>" for n in ("first", "second") for i in range(12)} | {f"done with {i}<|im_end|>" for i in range(12)}


def test_prepare_says_when_a_template_needs_an_example_for_each_turn(tmp_path, capsys):
    rows = [{"messages": turns(f"question {i}", f"first {i}", "more", f"second {i}")} for i in range(20)]
    for family, times in (("chatml", 1), ("qwen3", 2)):
        out = prepare(inputs=[write(tmp_path / "x.jsonl", rows)], out=tmp_path / family, tokenizer=build(family, "qwen2"), val_fraction=0.2)
        splits = json.loads((out / "meta.json").read_text(encoding="utf-8"))["splits"]
        said = capsys.readouterr().out
        for split, counts in splits.items():
            assert np.count_nonzero(np.fromfile(out / f"{split}.mask.bin", np.uint8) & FIRST) == times * counts["documents"]
            assert (f"{split}: the chat template shows a turn in another way" in said) == ("examples" in counts) == (times == 2)
    (tmp_path / "a.txt").write_text("some text\n" * 100, encoding="utf-8")
    with pytest.raises(UserError, match="name fields of records, and there are none"):
        prepare(inputs=[tmp_path / "a.txt"], out=tmp_path / "out", tokenizer="bytes", names=Names(prompt="x"))


def test_held_out_conversations_keep_their_fields_and_are_read_again(tmp_path):
    """Also those whose fields have names that only the flags of prepare.py know."""
    rows = [{"frage": f"what is {i}?", "antwort": f"a number, {i}", "site": i} for i in range(30)]
    out = prepare(inputs=[write(tmp_path / "x.jsonl", rows)], out=tmp_path / "a", tokenizer="bytes", val_fraction=0.2,
                  names=Names(prompt="frage", response="antwort"))
    lines = heldout.read(out / "val.jsonl")
    assert len(lines) > 2 and all({k: line.fields[k] for k in rows[0]} in rows for line in lines)
    assert all((line.prompt, line.response) == (turns(line.fields["frage"]), line.fields["antwort"]) for line in lines)
    rows = [{"messages": turns(f"q{i}", f"a{i}", "more", f"last {i}", system="s"), "site": i} for i in range(30)]
    out = prepare(inputs=[write(tmp_path / "y.jsonl", rows)], out=tmp_path / "b", tokenizer="bytes", val_fraction=0.2)
    for line in heldout.read(out / "val.jsonl"):
        i = line.fields["site"]
        assert line.fields == rows[i] and line.messages == rows[i]["messages"] and line.response == f"last {i}"


# ------------------------------------------------------------------------------------------- windows, scores, the chat

@pytest.mark.parametrize("context", [16, 40, 64])
def test_windows_score_every_learned_token_once_and_hold_no_piece_without(context):
    tokenizer, rng = Tokenizer.from_bytes(), np.random.default_rng(0)
    chats = [turns(*("x" * int(n) for n in rng.choice([1, 5, 90, 200], 2 * rng.integers(1, 5)))) for _ in range(30)]
    w = Windows.of(encode_conversations(tokenizer, chats), context)
    scored = np.zeros(len(w.tokens), int)
    for start, fresh, end in w.pieces:
        own = np.arange(max(fresh, start + 1), end)
        scored[own] += w.mask[own] & LEARNED
        assert (w.mask[own] & LEARNED).any() and end - start <= context + 1
        assert fresh - start >= min(context // 2, fresh - np.flatnonzero(w.mask[:start + 1] & FIRST)[-1])
    assert (scored == (w.mask & LEARNED)).all()
    assert sum(int((b.targets != IGNORE).sum()) for b in w.evaluation_batches(3)) == scored.sum()


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """(directory, model, tokenizer) of a random model with a window of 200 bytes."""
    model = Transformer(Config(vocab_size=259, hidden_size=32, num_hidden_layers=1, max_position_embeddings=200)).initialize()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    path = tmp_path_factory.mktemp("talker") / "m"
    save(model, path, Tokenizer.from_bytes())
    return path, model.eval(), Tokenizer.from_bytes()


def answered(talker, messages):
    """The greedy answer to messages, by whole forwards."""
    _, model, tokenizer = talker
    ids = tokenizer.encode(tokenizer.render(messages), special=True)
    for n in range(9):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in tokenizer.eos_ids:
            return tokenizer.decode(ids[-n - 1:-1])
    return tokenizer.decode(ids[-9:])


def test_the_last_turn_is_scored_and_answered_given_the_others(talker, tmp_path):
    _, model, tokenizer = talker
    messages = turns("hi", "an answer", "and then?", "the end", system="Be brief.")
    line, = heldout.read(write(tmp_path / "x.jsonl", [{"messages": messages}]))
    row, = evaluate(model, tokenizer, [line], (0,), 9)
    prompt = tokenizer.encode(tokenizer.render(messages[:-1]), special=True)
    last = tokenizer.encode("the end<|im_end|>", special=True)
    logp = model(torch.tensor([prompt + last]))[0].log_softmax(-1).detach()
    nats = -sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(last))
    assert row["nats"] == pytest.approx(nats, abs=1e-3) and row["tokens"] == len(last) and row["bytes"] == len("the end")
    assert row["answer"] == answered(talker, messages[:-1]).strip()
    assert response_loss(model, tokenizer, line.prompt, line.response, tokenizer.token_bytes())[0] == pytest.approx(nats, abs=1e-3)


def talk(talker, capsys, monkeypatch, text, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    sample.main([str(talker[0]), "--chat", "--temperature", "0", "--max-new-tokens", "9", *map(str, flags)])
    return capsys.readouterr()


def test_a_system_message_stays_and_a_saved_chat_is_data(talker, capsys, monkeypatch, tmp_path):
    first = answered(talker, turns("hello", system="Be brief."))
    second = answered(talker, turns("hello", first, "more", system="Be brief."))
    again = answered(talker, turns("hello", system="Be brief."))
    file, text = tmp_path / "said.jsonl", "hello\nmore\n/save {}\n/reset\nhello\n"
    said = talk(talker, capsys, monkeypatch, text.format(file), "--system", "Be brief.")
    assert said.out == f"{first}\n{second}\n{again}\n" and f"wrote 4 messages to {file}" in said.err
    saved = turns("hello", first, "more", second, system="Be brief.")
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [{"messages": saved}]
    (_, parts), = corpora.documents(corpora.source([file]), corpora.Skipped())
    assert parts.messages == saved


def test_the_system_message_stays_when_the_oldest_turns_leave(talker, capsys, monkeypatch):
    lines, said, system = [c * 30 for c in "abcd"], [], "Be brief."
    for line in lines:
        while len(talker[2].encode(talker[2].render(turns(*said, line, system=system)), special=True)) > 191:
            del said[:2]
        said += [line, answered(talker, turns(*said, line, system=system))]
    assert len(said) < 8
    out = talk(talker, capsys, monkeypatch, "\n".join(lines), "--system", system).out
    assert out.endswith(f"{said[-1]}\n") and out.splitlines()[-1] == said[-1]


@pytest.mark.parametrize("family, flags, says", [
    ("gemma", ["--chat", "--system", "x"], "--system: the tokenizer's chat template failed: System role not supported; if it takes no"),
    ("chatml", ["--system", "x"], "--system is the text of a system message, and goes with --chat"),
    ("chatml", ["--chat", "--system", " "], "--system is the text of a system message")])
def test_a_system_message_that_cannot_be_is_refused(family, flags, says, tmp_path, monkeypatch):
    tokenizer = build(family, "qwen2")
    save(Transformer(Config(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1)).initialize(), tmp_path / "m", tokenizer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    with pytest.raises(UserError, match=re.escape(says)):
        sample.main([str(tmp_path / "m"), *flags])
