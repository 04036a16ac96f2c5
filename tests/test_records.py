"""data/records.py: every format gives the same dataset, memory stays bounded, and each fault is one sentence."""
import csv, gzip, io, json, os, subprocess, sys
from pathlib import Path

import pytest

from data import UserError, corpora, encoding, heldout, records
from data.prepare import bytes_of, prepare

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [{"prompt": "Why \"now\"?", "response": "So, é;\nand 日本\t👩‍👩‍👧."}, {"prompt": "b, [1}", "response": "{\"x\": [2]}\\"},
            {"prompt": "c\r\nd", "response": "3.0"}]
TEXTS = [{"text": example["response"]} for example in EXAMPLES]


def table(rows, delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([rows[0], *(row.values() for row in rows)])
    return out.getvalue()


def in_formats(rows):
    """{file name: text} of the same records."""
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return {"a.jsonl": lines, "a.NDJSON": "\n" + lines.replace("\n", "\r\n\n") + "\n", "a.json": json.dumps(rows), "lines.json": lines,
            "pretty.json": json.dumps(rows, indent=4, ensure_ascii=False), "a.csv": table(rows, ","), "semicolon.csv": table(rows, ";"),
            "data.json": json.dumps({"data": rows, "by": [{"data": [3]}]}, indent=1),
            "rows.json": json.dumps({"features": [{"name": "text"}], "rows": rows}), "alone.json": json.dumps({"faqs": rows}), "a.tsv": table(rows, "\t"), "index.csv": table([{"": "7", **row} for row in rows], ",")}


def packings():
    """{ending: function of bytes}, of .zst where there is a package."""
    result = {"": bytes, ".gz": gzip.compress}
    try:
        result[".zst"] = records.zstd_library("").compress
    except UserError:
        pass
    return result


def dataset(path, **more):
    """The bytes of a dataset made from a path, without what names the file."""
    out = prepare("x", [path], out=path.parent / "out", tokenizer="bytes", overwrite=True, val_fraction=0.4, **more)
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".bin"}


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("rows", [EXAMPLES, TEXTS], ids=["examples", "texts"])
def test_every_format_packing_and_encoding_gives_the_same_bytes(tmp_path, rows):
    expected = dataset(write(tmp_path / "expected.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert len(expected) == (4 if rows is EXAMPLES else 2) and all(map(len, expected.values()))
    assert dataset(write(tmp_path / "a.ndjson", in_formats(rows)["a.json"][1:-1].replace("}, {", "}\r\n\n{"))) == expected
    for name, text in in_formats(rows).items():
        read = [fields for _, fields in records.objects(write(tmp_path / name, text), name)]
        assert [{key: fields[key] for key in rows[0]} for fields in read] == rows
        for encoding_name in ("utf-8-sig", "utf-16", "utf-32"):
            file = write(tmp_path / f"b{name}", text.encode(encoding_name))
            assert [fields for _, fields in records.objects(file, name)] == read, (name, encoding_name)
        for ending, pack in packings().items() if rows is EXAMPLES else [("", bytes)]:
            assert dataset(write(tmp_path / (name + ending), pack(text.encode("utf-8")))) == expected, (name, ending)


def test_parquet_gives_the_same_bytes(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import datetime
    for rows in (EXAMPLES, TEXTS):
        expected = dataset(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
        more = [{**row, "day": datetime.date(2026, 1, 2), "n": i, "raw": b"\xff", "tags": ["x"]} for i, row in enumerate(rows)]
        parquet.write_table(pyarrow.Table.from_pylist(more), tmp_path / "a.parquet", row_group_size=2)
        content = (tmp_path / "a.parquet").read_bytes()
        for ending, pack in packings().items():
            assert dataset(write(tmp_path / f"b.parquet{ending}", pack(content))) == expected
        *_, (place, last) = records.objects(tmp_path / "a.parquet", "a.parquet")
        assert place == "a.parquet, row 3" and (last["day"], last["n"], last["tags"]) == ("2026-01-02", 2, ["x"])
        for broken in (content[:-5], content[:40], b"", content[:6] + b"\xff" * 60 + content[66:]):
            with pytest.raises(UserError, match=r"^broken.parquet: cannot be read as Parquet \("):
                dataset(write(tmp_path / "broken.parquet", broken))


def test_text_is_unpacked_and_decoded_and_one_line_says_what_was_read(tmp_path, capsys):
    text = "".join(f"Zeile {i}, schön.\r\n" for i in range(40))
    expected = dataset(write(tmp_path / "a.txt", text))
    for name in ("utf-8-sig", "utf-16", "utf-32"):
        assert dataset(write(tmp_path / "b.txt", text.encode(name))) == expected
    for ending, pack in packings().items():
        assert dataset(write(tmp_path / f"b.md{ending}", pack(text.encode("utf-16")))) == expected
    mixed = write(tmp_path / "in" / "a.csv", table(TEXTS, ",")).parent
    write(mixed / "b.csv", table(TEXTS[:1], ","))
    write(mixed / "c.json", json.dumps({"name": "settings, and no text", "data": [1]}))
    write(mixed / "broken.json", "{ // a comment\n}")
    write(mixed / "figures.tsv", "x\ty\n1\t2\n")
    write(mixed / "d.txt.gz", gzip.compress(b"one"))
    write(mixed / "e", b"two")
    write(mixed / "f.pdf", b"%PDF")
    write(mixed / "g.tar.gz", gzip.compress(b"\0" * 512))
    write(mixed / "h.txt", "no mark".encode("utf-16-le"))
    write(mixed / "i.txt", b"\xff\xfea")
    capsys.readouterr()
    dataset(mixed)
    said = capsys.readouterr().out
    assert "read as records: 2 .csv; as text: 1 .txt.gz, 1 without ending\n" in said
    for reason in ("3 without text, or prompt and response (broken.json, c.json, figures.tsv)", "1 PDF, to be saved as text (f.pdf)",
                   "1 archive, to be unpacked (g.tar.gz)", "1 binary (has NUL bytes) (h.txt)", "1 not UTF-16 (i.txt)"):
        assert reason in said
    for name in ("c.json", "broken.json", "figures.tsv"):                     # named by a person, not found: an error
        with pytest.raises(UserError, match=f"^{name}, (record 1|line 2): (needs|not valid JSON)"):
            dataset(mixed / name)


PACKED = gzip.compress(json.dumps(TEXTS).encode("utf-8") * 99)
FAULTS = [
    ("a.json", '[{"text": "a"}, {"text": "b" "c"}]', r"a.json, record 2: not valid JSON \(Expecting ',' delimiter\); repair or remove it"),
    ("a.json", '[{"text": "a"}', "a.json, record 2: not valid JSON"), ("a.json", '{"text": "a', "record 1: not valid JSON"),
    ("a.json", '[{"text": "a"} {"text": "b"}]', "record 2: not valid JSON"), ("a.json", "[" * 99999, "record 1: not valid JSON"),
    ("a.json", '{"data": [{"text": "a"}, {"txt": "b"}]}', "record 2: needs the"), ("a.json", "[]", "no text to use .1 empty .a.json"),
    ("a.json", "[1, 2]", "record 1: needs the"), ("a.json", '[{"text": "%s"}' % ("x" * 3_000_000), "record 2: not valid JSON"),
    ("a.json", b'[{"text": "\xe9"}]', "record 1: not UTF-8 text"), ("a.json", '[{"text": "a"}]'.encode("utf-16-le"), "not UTF-8 text"),
    ("a.ndjson", '{"text": "a"}\n{"text": "b}\n', "a.ndjson, line 2: not valid JSON .*repair or remove the line"),
    ("a.ndjson", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.ndjson, line 2: not UTF-8 text; save the file as UTF-8"),
    ("a.csv", "text,n\na,1\n\"b\nb\",2\nc,d,3\n", "a.csv, line 5: 3 cells, but the header has 2"),
    ("a.csv", "text,n\na,1\n\"b,2\nc,3\n", "a.csv, line 3: not a valid table .unexpected end"),
    ("a.csv", "text,text\na,b\n", "a.csv, line 1: two columns have one name; add or repair the header"),
    ("a.csv", "a,b\nc,d\n", "a.csv, line 2: needs the .*; the first line of a table must name the columns"),
    ("a.csv", b"text\na\n\xe9\n", "a.csv, line 3: not UTF-8"), ("a.csv", "text\n", "no text to use .1 empty .a.csv"),
    ("a.json.gz", PACKED[:-9], r"a.json.gz: not a whole .gz file \(Compressed file ended"), ("a.csv.gz", b"text\na\n", "not a whole .gz"),
    ("a.txt.gz", PACKED[:-9], "a.txt.gz: not a whole .gz file"), ("a.txt.gz", b"plain", "not a whole .gz"), ("a.docx", b"PK", "to be saved as")]


@pytest.mark.parametrize("name, content, says", FAULTS, ids=range(len(FAULTS)))
def test_each_fault_is_a_sentence_that_names_the_place(tmp_path, name, content, says):
    with pytest.raises(UserError, match=says) as error:
        dataset(write(tmp_path / name, content))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_conversation_is_one_record(tmp_path):
    for turn in {"role": "user", "content": "a"}, {"from": "human", "value": "a"}:
        file = write(tmp_path / "a.json", json.dumps({"messages": [turn, turn]}))
        assert list(records.objects(file, "a.json")) == [("a.json, record 1", {"messages": [turn, turn]})]
        assert len(list(records.objects(write(file, json.dumps({"data": [{"messages": [turn]}] * 2})), "a.json"))) == 2


def test_zst_broken_or_missing(tmp_path, monkeypatch):
    if pack := packings().get(".zst"):
        whole = pack(os.urandom(300_000))
        for content in (whole[:-9], whole[:200_000], b"plain", b""):
            with pytest.raises(UserError, match="a.txt.zst: not a whole .zst file"):
                list(corpora.blocks(write(tmp_path / "a.txt.zst", content)))
    for name in ("compression", "backports", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, package in ("a.txt.zst", "backports.zstd"), ("a.json.zst", "backports.zstd"), ("a.parquet", "pyarrow"):
        with pytest.raises(UserError, match=f"^{name}: .* needs a package: pip install {package}"):
            dataset(write(tmp_path / name, b"PAR1"))


def test_the_command_ends_with_one_sentence_and_code_2(tmp_path):
    write(tmp_path / "faq.json.gz", PACKED[:-9])
    done = subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "--input", tmp_path / "faq.json.gz", "--out", tmp_path / "out"],
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.startswith("error: faq.json.gz: not a whole .gz file")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == [tmp_path / "faq.json.gz"]


def test_memory_stays_bounded(tmp_path):
    """Read in a second process: what a file adds to its memory, in MB; a record may have 8 million characters."""
    if not Path("/proc/self/status").exists():  # ru_maxrss would be the parent's
        pytest.skip("reads a process's peak memory from /proc")
    row = {"text": "some words of a document, " * 40}
    with open(tmp_path / "a.json", "w") as array, open(tmp_path / "b.json", "w") as wrapper, open(tmp_path / "c.csv", "w") as rows:
        array.write("[" + json.dumps(row))
        wrapper.write('{"data":[' + json.dumps(row))
        rows.write("text\n")
        for _ in range(20_000):
            array.write(",\n" + json.dumps(row, indent=1))
            wrapper.write("," + json.dumps(row))
            rows.write(f'"{row["text"]}\n"\n')
        array.write("]")
        wrapper.write("]}")
    for name, unit in (("zeros.txt.gz", b"\0"), ("spaces.json.gz", b" "), ("text.jsonl.gz", b"a"), ("text.csv.gz", b"a"), ("text.json.gz", b"[")):
        start = b'["' * (name == "text.json.gz")
        (tmp_path / name).write_bytes(gzip.compress(start) + gzip.compress(unit * ((10 << 20) // len(unit))) * 20)  # 200 MB in 0.2
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from data import UserError, corpora, records\n"
            "records.LONGEST = 8 << 20\n"
            "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) // 1024\n"
            "start = peak()\n"
            "for path in map(Path, sys.argv[2:]):\n"
            "    count, said, skipped = 0, '', corpora.Skipped()\n"
            "    try:\n"
            "        for _, parts in corpora.documents([corpora.File(path.name, path)], skipped): count += sum(map(len, parts))\n"
            "    except (UserError, corpora.Skip) as error: said = str(error)\n"
            "    print(count, peak() - start, said or skipped, sep='|')")
    kb = len(row["text"])
    wanted = [("a.json", 20_001 * kb, "", 10), ("b.json", 20_001 * kb, "", 10), ("c.csv", 20_000 * (kb + 1), "", 10),  # MB, of 21 each
              ("zeros.txt.gz", 0, "binary", 10), ("spaces.json.gz", 0, "empty", 10), ("text.jsonl.gz", 0, "line 1: longer than", 60),
              ("text.csv.gz", 0, "line 1: longer than", 60), ("text.json.gz", 0, "record 1: longer than", 60)]
    done = subprocess.run([sys.executable, "-c", code, ROOT, *(tmp_path / name for name, *_ in wanted)], capture_output=True,
                          encoding="utf-8", check=True)
    for (name, characters, says, most), line in zip(wanted, done.stdout.splitlines(), strict=True):
        count, grown, said = line.split("|")
        assert int(count) == characters and says in said and int(grown) < most, (name, line)


def test_killed_in_a_packed_file_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoding, "TASK", 2000)
    monkeypatch.setattr(encoding, "SAVE_EVERY", 5)
    rows = [{"prompt": f"What is {i}?", "response": f"{i} is {i * i}, " * 50} for i in range(200)]
    file = write(tmp_path / "a.json.gz", gzip.compress(json.dumps({"data": rows}).encode("utf-8")))
    whole, encode, calls = dataset(file), encoding.encode, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "encode", stop)
        dataset(file)
    assert json.loads((tmp_path / ".out.part" / "progress.json").read_text(encoding="utf-8"))["tasks"] >= 20
    capsys.readouterr()
    assert dataset(file) == whole and "going on from" in capsys.readouterr().out


def test_size_takes_the_first_documents(tmp_path):
    rows = [{"text": f"document {i:03} " * 25} for i in range(99)]            # 325 bytes each
    file = write(tmp_path / "a.csv", table(rows, ","))
    expected = dataset(write(tmp_path / "first.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:7])))
    assert dataset(file, size=2000) == expected and dataset(file, size=2275) == expected != dataset(file)
    assert [bytes_of("100MB"), bytes_of("1.5gb")] == [100_000_000, 1_500_000_000]
    for wrong in ("100", "0MB", "-1GB", "1 TB", "9" * 400 + "GB"):
        with pytest.raises(UserError, match=f"--size {wrong} is not a size"):
            bytes_of(wrong)


def test_held_out_prompts_of_every_format(tmp_path):
    expected = [line[1:] for line in heldout.read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, EXAMPLES))))]
    for name, text in in_formats(EXAMPLES).items():
        assert [(line.prompt, line.response) for line in heldout.read(write(tmp_path / name, text))] == [line[:2] for line in expected]
        assert records.holds_records(name) and records.holds_records(f"x/{name}.gz") and not records.holds_records(f"{name}.txt")
