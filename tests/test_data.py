"""data/: numbers from real files and tokenizers, nothing mocked. Needs no network."""

import json
import lzma
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import UserError, corpora, encoding
from data.prepare import find, prepare
from data.tokenizer import GUARD, SPECIALS, Tokenizer
from data.vocabulary import merges_of, tokenizer_json

ROOT = Path(__file__).resolve().parent.parent
HARD = ["", "\n", "a\r\nb\r\n\r\n", "日本語のテキスト。123", "👩‍👩‍👧 e\u0301\u0323 \u200d ﷽", "\x00\x7f\u0085\u2028\ufeff",
        "a  b\t\tc \n\n  d", "it's IT'S don'T 3.14159", "".join(SPECIALS), "<|endoftext|", GUARD, " " * 50]


def stdlib_texts():
    texts = []
    for file in corpora.source([], "stdlib"):
        try:
            texts.append(file.path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            pass
    return texts


@pytest.fixture(scope="session")
def texts():
    return stdlib_texts()


@pytest.fixture(scope="session")
def bpe(texts):
    return Tokenizer.train(iter(texts[:120]), 1500)


def tokens(out, split):
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    return np.fromfile(out / f"{split}.bin", np.dtype(meta["dtype"]).newbyteorder("<")).tolist(), meta


def documents(out, split):
    """The documents of a split as text, from its ids."""
    tokenizer = Tokenizer.load(out)
    text = tokenizer.decode(tokens(out, split)[0])
    return text.split(tokenizer.eos_token)[:-1]


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_any_text_round_trips(bpe):
    for tokenizer in (bpe, Tokenizer.from_bytes()):
        for text in [*HARD, " " * 1_000_000, "x" + "\n \t" * 200_000 + "y", "é" * 200_000, "ab" * 200_000]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
            assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))
        assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"  # half a surrogate pair
    assert Tokenizer.from_bytes().encode("é!") == [0xC3, 0xA9, 0x21]


def test_ids_are_those_of_tokenizers_and_transformers(bpe, texts, tmp_path):
    import tokenizers
    bpe.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    sample = texts[::5] + [t for t in HARD if not any(s in t for s in SPECIALS)]
    ours = [bpe.encode(t) for t in sample]
    assert [e.ids for e in reference.encode_batch(sample)] == ours
    rng = np.random.default_rng(0)
    words = ["a", "  ", "    ", "\n", "e", " ", "self", "==", "-", "\t", "return", '"""', "\r\n", "日本", "ss", "12", "é"]
    for _ in range(500):
        text = "".join(words[i] * n for i, n in zip(rng.integers(0, len(words), 30), rng.integers(1, 9, 30)))
        assert reference.encode(text).ids == bpe.encode(text)

    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto.eos_token_id == bpe.eos_id and len(auto) == bpe.vocab_size == 1500
    for text, ids in zip(texts[:400], map(bpe.encode, texts[:400])):
        if not any(s in text for s in SPECIALS):
            assert auto.encode(text) == ids
            assert auto.decode(ids) == text
    chat = [{"role": "user", "content": "Why?\n"}, {"role": "assistant", "content": "So ."}]
    for prompt in (True, False):
        text = bpe.render(chat, add_generation_prompt=prompt)
        assert text == auto.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert bpe.encode(text, special=True) == auto.encode(text)


def test_other_pre_tokenizers_match_the_reference(texts):
    """GPT-2's pattern, GPT-2 after single digits (SmolLM), and added tokens that are not special (Phi)."""
    import tokenizers
    learned = Tokenizer.train(iter(texts[:20]), 600).data["model"]
    learned["ignore_merges"] = False
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for steps in ([], [{"type": "Digits", "individual_digits": True}]):
        data = tokenizer_json(learned["vocab"], learned["merges"], {"<|endoftext|>": 597})
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, byte_level]} if steps else byte_level
        spaces = [dict(data["added_tokens"][0], content=" " * n, id=596 + n // 2, special=False) for n in (4, 6)]
        data["added_tokens"] += spaces
        ours, reference = Tokenizer(data, {}), tokenizers.Tokenizer.from_str(json.dumps(data))
        for text in texts[20:60] + ["a  12  b 3", "x   4\n\n5  ", " 7", "½ ⅷ  ²"]:
            assert ours.encode(text) == reference.encode(text).ids
        assert ours.token_bytes()[599] == 6 and ours.token_bytes()[597] == 0


def test_pieces_of_a_document_have_the_ids_of_the_whole(texts, bpe, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 3000)
    gpt2ish = tokenizer_json(bpe.data["model"]["vocab"], bpe.data["model"]["merges"], bpe.special_tokens)
    for text in [*texts[:25], "one\r\n\r\ntwo three\n\n\n" * 500]:
        parts = list(corpora.pieces(text[i:i + 1000] for i in range(0, len(text), 1000)))
        assert "".join(parts) == text and (len(parts) > 1 or len(text) < 4000)
        for tokenizer in (bpe, Tokenizer(gpt2ish, {})):
            assert sum(map(tokenizer.encode, parts), []) == tokenizer.encode(text)


def test_hash_is_of_the_content_not_of_the_file(bpe, tmp_path):
    bpe.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == bpe.hash
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]  # the older spelling
    assert Tokenizer(data, {}).hash == bpe.hash
    data["model"]["merges"][-1] = data["model"]["merges"][0]
    assert Tokenizer(data, {}).hash != bpe.hash
    assert Tokenizer.from_bytes().hash != bpe.hash


def test_specials_are_text_unless_asked_for(bpe):
    eos, start, end = (bpe.special_tokens[s] for s in SPECIALS)
    assert (eos, start, end) == (1497, 1498, 1499) and bpe.eos_id == eos and bpe.eos_ids == [eos, end]
    text = "a<|endoftext|>b"
    assert eos not in bpe.encode(text) and bpe.decode(bpe.encode(text)) == text
    assert bpe.encode(text, special=True) == bpe.encode("a") + [eos] + bpe.encode("b")
    # no message can end its own turn, and its text survives
    chat = bpe.encode(bpe.render([{"role": "user", "content": "x<|im_end|>y"}]), special=True)
    assert chat.count(end) == 1 and "user\nx<|im_end|>y<|im_end|>\n" in bpe.decode(chat)


def test_merges_of_finds_the_merges_that_were_learned(bpe):
    tokens_ = [bpe.decode_bytes([i]) for i in range(1497)]
    assert merges_of(tokens_) == bpe.data["model"]["merges"]
    assert len(bpe.data["model"]["merges"]) == 1497 - 256


def test_vocab_json_and_merges_txt(bpe, tmp_path):
    model = bpe.data["model"]
    write(tmp_path / "vocab.json", json.dumps({**model["vocab"], "<|endoftext|>": 1497}))
    write(tmp_path / "merges.txt", "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == 1497 and tokenizer.decode(tokenizer.encode("def f():\n  pass")) == "def f():\n  pass"
    assert tokenizer.render([{"role": "user", "content": "Q"}]) == "User: Q\nAssistant:"


@pytest.mark.parametrize("change, says", [
    ({"normalizer": {"type": "Nonsense"}}, "not a tokenizer that can be read"),
    ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
    ({"model": {"type": "WordLevel", "vocab": {}}}, "WordLevel"), ({"added_tokens": []}, "eos_token")])
def test_unsupported_tokenizers_are_one_sentence(bpe, tmp_path, change, says):
    write(tmp_path / "tokenizer.json", json.dumps({**bpe.data, **change}))
    with pytest.raises(UserError, match=says):
        Tokenizer.load(tmp_path)


# ------------------------------------------------------------------------------------------------------------- datasets


def test_prepare_is_deterministic_and_counts(texts, tmp_path):
    a = prepare("stdlib", out=tmp_path / "a", vocab_size=500, smoke=True)
    b = prepare("stdlib", out=tmp_path / "b", vocab_size=500, smoke=True)
    for name in ("train.bin", "val.bin", "tokenizer.json", "tokenizer_config.json", "meta.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    for split in ("train", "val"):
        ids, meta = tokens(a, split)
        stats, tokenizer = meta["splits"][split], Tokenizer.load(a)
        assert stats["tokens"] == len(ids) and stats["documents"] == ids.count(tokenizer.eos_id)
        assert stats["bytes"] == tokenizer.token_bytes()[ids].sum()
        assert set(documents(a, split)) <= {t.replace("\r\n", "\n") for t in texts}
    assert meta["tokenizer_hash"] == tokenizer.hash and meta["python"] and meta["kind"] == "text"
    assert str(tmp_path) not in (a / "meta.json").read_text(encoding="utf-8")
    assert not set(documents(a, "train")) & set(documents(a, "val"))
    assert find(str(a)) == a


def test_line_ends_empty_files_and_byte_order_marks(tmp_path):
    for i in range(12):
        write(tmp_path / f"{i}.txt", f"\ufeffnumber {i}\r\nx\r\r\n\n")
    write(tmp_path / "empty.md", "")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\x00\x01")
    (tmp_path / "latin.txt").write_bytes("café au lait".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("é".encode("utf-8")[:1])
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "config", "hidden")
    out = prepare("x", [tmp_path], out=tmp_path / "out", tokenizer="bytes", val_fraction=0.2)
    both = documents(out, "train") + documents(out, "val")
    assert sorted(both) == sorted(f"number {i}\r\nx\r\r\n\n" for i in range(12))
    skipped = tokens(out, "val")[1]["skipped"]
    assert skipped == {"binary (has NUL bytes)": 1, "not UTF-8": 2, "empty": 1}
    assert 1 <= len(documents(out, "val")) <= 3


def test_loops_of_links_end(tmp_path):
    write(tmp_path / "a.txt", "some text")
    try:
        os.symlink(tmp_path, tmp_path / "loop", target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert [f.name for f in corpora.source([tmp_path, tmp_path / "a.txt"])] == ["a.txt"]


def test_duplicates_never_straddle_the_split(tmp_path):
    rng = np.random.default_rng(0)
    lines = lambda n: [" ".join(f"w{x}" for x in rng.integers(0, 5000, 8)) for _ in range(n)]
    for i in range(40):
        base = lines(30)
        for copy in range(3):  # three near copies (one line differs) and an exact one
            changed = base.copy()
            changed[7] = f"family {i} copy {copy}"
            write(tmp_path / f"{copy}-{i}.txt", "\n".join(changed))
        write(tmp_path / f"9-{i}.txt", "\n".join(changed))
    out = prepare("x", [tmp_path], out=tmp_path / "out", tokenizer="bytes", val_fraction=0.2)
    train, val = documents(out, "train"), documents(out, "val")
    family = lambda docs: Counter(re.search(r"family (\d+)", d)[1] for d in docs)
    assert not family(train).keys() & family(val).keys()
    assert set((family(train) + family(val)).values()) == {3}
    assert tokens(out, "val")[1]["skipped"] == {"exact duplicate": 40}
    assert 20 <= len(val) <= 30  # a fifth of 120
    for file in tmp_path.glob("*.txt"):  # other names, other order: the same split
        file.rename(tmp_path / f"{zlib_name(file.name)}.txt")
    again = prepare("x", [tmp_path], out=tmp_path / "out2", tokenizer="bytes", val_fraction=0.2)
    assert sorted(documents(again, "val")) == sorted(val)
    other = prepare("x", [tmp_path], out=tmp_path / "out3", tokenizer="bytes", val_fraction=0.2, seed=1)
    assert sorted(documents(other, "val")) != sorted(val)


def zlib_name(name):
    import zlib
    return zlib.crc32(name.encode("utf-8"))


def test_few_documents_are_split_inside(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(1000))
    out = prepare("x", [write(tmp_path / "a.txt", text)], out=tmp_path / "out", tokenizer="bytes", val_fraction=0.1)
    (train,), (val,) = documents(out, "train"), documents(out, "val")
    assert train + val == text and val.startswith("line 9") and abs(len(val) / len(text) - 0.1) < 0.01


def test_val_is_taken_whole_and_out_of_train(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.txt", f"document {i}")
    val = write(tmp_path / "val.jsonl", '{"text": "document 3"}\n\n{"text": "held out"}\n')
    inputs = sorted(tmp_path.glob("*.txt"))
    out = prepare("x", inputs, [val], out=tmp_path / "out", tokenizer="bytes")
    assert documents(out, "val") == ["document 3", "held out"]
    assert documents(out, "train") == [f"document {i}" for i in (0, 1, 2, 4)]
    assert tokens(out, "val")[1]["skipped"] == {"identical to a validation document": 1}


def test_mask_is_exactly_the_response(bpe, tmp_path):
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}, a number.\n<|im_end|> {i}é"} for i in range(30)]
    rows += [{"prompt": "same?", "response": "one and the same long answer"}, {"prompt": "again?", **rows[-1]}]
    rows += [{"prompt": "also?", "response": "one and the same long answer"}] + rows[:1]
    rows += [{"prompt": "nothing", "response": ""}]
    file = write(tmp_path / "qa.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    model = json.loads(json.dumps(bpe.data))
    plain = Tokenizer(dict(model, added_tokens=model["added_tokens"][:1]), {})
    for tokenizer, end in (bpe, "<|im_end|>"), (plain, "<|endoftext|>"):
        out = prepare("x", [file], out=tmp_path / f"out{end[2:4]}", tokenizer=tokenizer, val_fraction=0.2)
        sides, seen = {}, 0
        for split in ("train", "val"):
            ids, meta = tokens(out, split)
            mask = np.fromfile(out / f"{split}.mask.bin", np.uint8)
            starts = np.flatnonzero(mask & 2).tolist()
            assert len(mask) == len(ids) and starts[0] == 0 and len(starts) == meta["splits"][split]["documents"]
            for a, b in zip(starts, [*starts[1:], len(ids)]):
                learned = (mask[a:b] & 1).astype(bool)
                assert (np.diff(learned.astype(int)) != 0).sum() == 1 and not learned[0] and learned[-1]
                text = tokenizer.decode(np.array(ids[a:b])[learned].tolist())
                assert ids[b - 1] == tokenizer.special_tokens[end] and text.endswith(end)
                text = text[:-len(end)].removeprefix("" if tokenizer is bpe else " ")
                prompt = tokenizer.decode(np.array(ids[a:b])[~learned].tolist())
                match = [r for r in rows if r["response"] == text and r["prompt"] in prompt]
                assert match and prompt == tokenizer.render([{"role": "user", "content": match[0]["prompt"]}])
                sides.setdefault(text, set()).add(split)
                seen += 1
            assert meta["kind"] == "examples"
            assert meta["splits"][split]["response_tokens"] == int((mask & 1).sum())
        assert seen == 32 and all(len(s) == 1 for s in sides.values())
        assert meta["skipped"] == {"empty response": 1, "exact duplicate": 2}


@pytest.mark.parametrize("vocab_size, dtype", [(65535, "uint16"), (65536, "uint32")])
def test_uint16_until_ids_need_more(bpe, tmp_path, vocab_size, dtype):
    data = json.loads(json.dumps(bpe.data))
    data["added_tokens"].append(dict(data["added_tokens"][0], content="<|last|>", id=vocab_size - 1))
    tokenizer = Tokenizer(data, {"eos_token": "<|last|>"})
    text = write(tmp_path / "a.txt", "some text\n" * 100)
    out = prepare("x", [text], out=tmp_path / "out", tokenizer=tokenizer)
    ids, meta = tokens(out, "train")
    assert meta["dtype"] == dtype and meta["vocab_size"] == vocab_size and ids[-1] == vocab_size - 1
    assert len(tokenizer.token_bytes()) == vocab_size and tokenizer.decode([vocab_size - 2]) == ""


@pytest.mark.parametrize("content, says", [
    ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"), ('{"text": "a"}\n{"txt": "b"}\n', "line 2: needs the"),
    ('{"text": "a"}\n{"prompt": "b", "response": "c"}\n', "bad.jsonl, line 2 is a prompt"),
    ('{"prompt": "b", "response": 3}\n', "line 1: needs the"), ("[1]\n", "line 1: needs the")])
def test_broken_jsonl_names_the_line_and_the_old_dataset_stays(tmp_path, content, says):
    good, bad = write(tmp_path / "good.txt", "good text\n" * 50), write(tmp_path / "bad.jsonl", content)
    out = prepare("x", [good], out=tmp_path / "out", tokenizer="bytes")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError, match=re.escape(says)):
        prepare("x", [bad], out=out, tokenizer="bytes", overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_interrupted_at_any_time_the_old_dataset_stays(tmp_path, monkeypatch):
    good = write(tmp_path / "good.txt", "good text\n" * 50)
    out = prepare("x", [good], out=tmp_path / "out", tokenizer="bytes")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def stop(*_, **__):
        raise KeyboardInterrupt

    for place in ("data.tokenizer.Tokenizer.save", "data.tokenizer.Tokenizer.encode_array", "pathlib.Path.rename"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, stop)
            prepare("x", [good], out=out, tokenizer="bytes", overwrite=True)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
        assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"out", ".out.part"}
    prepare("x", [good], out=out, tokenizer="bytes", overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["out"]
    out.rename(tmp_path / ".out.old")  # killed between the two renames
    assert find(tmp_path / "out") == out and {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.fixture
def corpus(tmp_path, texts, monkeypatch):
    """prepare()'s arguments by kind of data, with steps so small that there are about a hundred."""
    monkeypatch.setattr(encoding, "TASK", 2000)
    monkeypatch.setattr(encoding, "SAVE_EVERY", 5)
    monkeypatch.setattr(corpora, "PIECE", 3000)
    (tmp_path / "in").mkdir()
    for i in range(12):
        write(tmp_path / "in" / f"{i}.py", texts[i][:10_000])
    write(tmp_path / "in" / "long.txt", "".join(texts[12:20])[:100_000])
    write(tmp_path / "in" / "more.jsonl", "".join(json.dumps({"text": t[:1500]}) + "\n" for t in texts[40:70]))
    write(tmp_path / "qa.jsonl", "".join(json.dumps({"prompt": f"What is {i}?", "response": f"{i} is {t[100:900]}"}) + "\n"
                                         for i, t in enumerate(texts[:250])))
    return {"text": dict(name="x", inputs=[tmp_path / "in"], vocab_size=300),
            "examples": dict(name="x", inputs=[tmp_path / "qa.jsonl"], tokenizer="bytes")}


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("kind", ["text", "examples"])
def test_killed_at_any_time_the_same_command_goes_on_to_the_same_bytes(corpus, kind, tmp_path, monkeypatch, capsys):
    arguments, out = corpus[kind], tmp_path / "out"
    whole = contents(prepare(**arguments, out=tmp_path / "whole"))
    encode, encoded = encoding.encode, []
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import data.prepare as p; "
            "from data import encoding as e; e.TASK, e.SAVE_EVERY = 2000, 5; "
            "p.corpora.PIECE = 3000; from pathlib import Path, PosixPath, WindowsPath; encode = e.encode; "
            "e.encode = lambda *a: time.sleep(0.02) or encode(*a); "          # so that the kill finds it at work
            "p.prepare(**eval(sys.argv[2]), out=Path(sys.argv[3]))")
    tasks = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, ROOT, repr(arguments), out], stdout=subprocess.DEVNULL)
        deadline, before = time.time() + 30, tasks
        while tasks < before + 10 and process.poll() is None and time.time() < deadline:
            try:
                tasks = json.loads((tmp_path / ".out.part" / "progress.json").read_text(encoding="utf-8")).get("tasks", 0)
            except OSError:
                pass
        process.kill()
        assert process.wait() not in (0, 1), "it came to its end before it was killed"
    assert tasks >= 20 and not out.exists()
    monkeypatch.setattr(encoding, "encode", lambda *a: encoded.append(1) or encode(*a))
    capsys.readouterr()
    assert contents(prepare(**arguments, out=out)) == whole
    said = capsys.readouterr().out
    assert "going on from what an interrupted run left in .out.part" in said and "training a byte-level" not in said
    rest = len(encoded)
    prepare(**arguments, out=tmp_path / "again")
    assert rest <= len(encoded) - rest - tasks
    assert not (tmp_path / ".out.part").exists()


def test_what_does_not_fit_what_is_there_begins_anew(corpus, tmp_path, monkeypatch):
    """A file that changed, another flag, files cut by a power failure: never a mixture."""
    arguments, encode, calls = {**corpus["text"], "vocab_size": None, "tokenizer": "bytes"}, encoding.encode, []

    def interrupted():
        def stop(*a):
            calls.append(1)
            if len(calls) > 40:
                raise KeyboardInterrupt
            return encode(*a)
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(encoding, "encode", stop)
            prepare(**arguments, out=tmp_path / "out", overwrite=True)
        assert json.loads((tmp_path / ".out.part" / "progress.json").read_text(encoding="utf-8"))["tasks"] >= 20

    interrupted()
    os.truncate(tmp_path / ".out.part" / "train.bin", 1000)
    assert contents(prepare(**arguments, out=tmp_path / "out")) == contents(prepare(**arguments, out=tmp_path / "whole"))
    interrupted()
    other = dict(arguments, seed=1)
    assert contents(prepare(**other, out=tmp_path / "out", overwrite=True)) == contents(prepare(**other, out=tmp_path / "seed"))
    interrupted()
    write(tmp_path / "in" / "0.py", "something else\n" * 1000)
    assert (contents(prepare(**arguments, out=tmp_path / "out", overwrite=True))
            == contents(prepare(**arguments, out=tmp_path / "changed")))


def test_a_full_disk_loses_nothing(corpus, tmp_path):
    disk, source = tmp_path / "disk", str(corpus["text"]["inputs"][0])
    disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk],
                                            capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        command = [sys.executable, ROOT / "data" / "prepare.py", "--tokenizer", "bytes", "--out", disk / "ds", "--input"]
        run = lambda *args: subprocess.run([*command, *args], capture_output=True, encoding="utf-8")
        assert run(write(tmp_path / "small.txt", "some text\n" * 100)).returncode == 0
        before = contents(disk / "ds")
        full = run(source, "--overwrite")
        assert full.returncode == 2 and full.stderr.startswith("error: the disk is full") and full.stderr.count("\n") == 1
        assert contents(disk / "ds") == before and "the same command goes on" in full.stdout
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        assert "going on" in run(source, "--overwrite").stdout
        assert contents(disk / "ds") == contents(prepare("ds", [source], out=tmp_path / "ds", tokenizer="bytes"))
        assert [p.name for p in disk.iterdir()] == ["ds"]
    finally:
        subprocess.run(["umount", "-l", disk])


def test_mistakes_are_one_sentence(tmp_path):
    binary = tmp_path / "b.bin"
    binary.write_bytes(bytes(range(256)))
    blank = write(tmp_path / "blank.txt", "\n \n")
    text = write(tmp_path / "a.txt", "text\n" * 99)
    for says, kwargs in [
        ("1 binary", dict(name="x", inputs=[binary])), ("1 empty", dict(name="x", inputs=[blank])),
        ("no such file", dict(name="x", inputs=[tmp_path / "nowhere"])), ("did you mean 'stdlib'", dict(name="stdlb")),
        ("--val-fraction", dict(name="x", inputs=[text], val_fraction=0.9)),
        ("--name", dict(name="a/b", inputs=[text])),
        ("--vocab-size 100", dict(name="x", inputs=[text], vocab_size=100)),
        ("no such directory", dict(name="x", inputs=[text], tokenizer="byte")),
        ("nothing to train on", dict(name="x", inputs=[text], val=[text])),
        ("is not a dataset", dict(name="x", inputs=[text], out=tmp_path, overwrite=True)),
    ]:
        with pytest.raises(UserError, match=re.escape(says)):
            prepare(**{"out": tmp_path / "out", **kwargs})
    (tmp_path / "mixed").mkdir()
    lines = write(tmp_path / "mixed" / "faq.jsonl", ''.join(f'{{"prompt": "Why {i}?", "response": "So {i}."}}\n' for i in range(30)))
    write(lines.with_name("empty.txt"), "")
    assert json.loads((prepare("x", [lines.parent], out=tmp_path / "out", tokenizer="bytes") / "meta.json").read_text())["kind"] == "examples"
    write(lines.with_name("notes.txt"), "text\n" * 99)
    with pytest.raises(UserError, match="faq.jsonl.* line 1 is a prompt .*two datasets|notes.txt is text"):
        prepare("x", [lines.parent], out=tmp_path / "out", tokenizer="bytes", overwrite=True)
    with pytest.raises(UserError, match="did you mean 'stdlib'"):
        find("stdlip")
    with pytest.raises(UserError, match="not a prepared dataset"):
        find(tmp_path)


def test_command_names_every_encoding(tmp_path):
    """As a user runs it, from another folder; reading or writing with the machine's own encoding is an error."""
    write(tmp_path / "notes.txt", "naïve café 日本\n" * 200)
    env = {**os.environ, "PYTHONWARNDEFAULTENCODING": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-W", "error::EncodingWarning", str(ROOT / "data" / "prepare.py")]

    def command_line(*args):
        return subprocess.run([*command, *args], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")

    done = command_line("--input", "notes.txt", "--out", "ds", "--vocab-size", "300")
    assert done.returncode == 0 and "bytes per token" in done.stdout, done.stderr
    assert done.stdout.endswith("Next: python train.py --data ds --out out-ds\n")
    again = command_line("--input", "notes.txt", "--out", "ds")
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert command_line("--input", "none.txt").stderr == "error: --input none.txt: there is no such file or folder\n"


def test_prepare_tells_text_that_repeats_itself_from_text_that_does_not(tmp_path, capsys):
    """`repetition` is xz's, by hand; the sentence names the other road only where text is new."""
    random = np.random.default_rng(0)
    said = [" ".join(map(str, random.integers(0, 1000, 40))) for _ in range(20)]
    for name, texts in (("same", random.choice(said, 400)), ("new", [" ".join(map(str, random.integers(0, 1000, 40)))
                                                                   for _ in range(400)])):
        lines = [json.dumps({"prompt": f"Question {i}?", "response": text}) for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        out = prepare(name, [tmp_path / f"{name}.jsonl"], tokenizer="bytes", out=tmp_path / name)
        meta, printed = json.loads((out / "meta.json").read_text(encoding="utf-8")), capsys.readouterr().out
        known, held_out = (learned_text(out, split) for split in ("train", "val"))
        by_hand = 8 * (len(lzma.compress(known + held_out)) - len(lzma.compress(known))) / len(held_out)
        assert meta["repetition"] == pytest.approx(by_hand, abs=1e-3)
        assert (meta["repetition"] < 0.5) == (name == "same") == ("--init-from" not in printed)


def learned_text(directory, split):
    tokens, mask = (np.fromfile(directory / f"{split}{ending}", dtype) for ending, dtype in ((".bin", "<u2"), (".mask.bin", "u1")))
    return Tokenizer.load(directory).decode_bytes(tokens[mask & 1 > 0].tolist())
