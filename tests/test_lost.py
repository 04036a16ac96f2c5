"""Nothing is lost: what these scripts did not write stays, a kill leaves something that goes on, a damaged file is one
sentence. tests/breaking.py does the same in hundreds."""
import functools, json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch

import compress, distill, sample, train
from data import UserError, machine
from data.console import run, sentence
from data.files import reading
from data.prepare import prepare
from data.runs import read_log

if os.name != "posix":
    pytest.skip("forks, signals and file modes of POSIX", allow_module_level=True)
import breaking

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    breaking.make(folder)
    return folder


@pytest.fixture
def place(made, tmp_path):
    for name in ("data", "examples", "model", "text"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def quick(place, *flags):
    return [*map(str, flags), *breaking.TINY]


# --- what these scripts did not write ---

@pytest.mark.parametrize("ending", [".old", ".new", ".part", ".stages"])
def test_what_lies_beside_stays(place, ending):
    for out in ("m", "d"):
        shutil.copytree(place / ("model" if out == "m" else "data"), place / (out + ending))              # put aside by hand
    kept = {p: p.read_bytes() for out in ("m", "d") for p in (place / (out + ending)).iterdir()}
    prepare(inputs=[place / "text"], out=place / "d", tokenizer="bytes")
    for more in ([], ["--overwrite"]):
        compress.main([str(place / "model"), "int8", "--out", str(place / "m"), *more])
    prepare(inputs=[place / "text"], out=place / "d", tokenizer="bytes", seed=1, overwrite=True)
    assert {p: p.read_bytes() for p in kept} == kept


def test_overwrite_replaces_only_what_is_ours(place):
    for kind, command in (("model", lambda out: compress.main([str(place / "model"), "int8", "--out", str(out), "--overwrite"])),
                          ("data", lambda out: prepare(inputs=[place / "text"], out=out, tokenizer="bytes", seed=1, overwrite=True))):
        for i, foreign in enumerate((".git/HEAD", "thesis.txt", "sub/notes.md")):
            out = Path(shutil.copytree(place / kind, place / f"{kind}{i}"))
            (out / foreign).parent.mkdir(exist_ok=True)
            (out / foreign).write_text("mine", encoding="utf-8")
            with pytest.raises(UserError, match=foreign.split("/")[0].replace(".", r"\.")):
                command(out)
            assert (out / foreign).read_text(encoding="utf-8") == "mine"
    hub = Path(shutil.copytree(place / "model", place / "hub"))                          # a model that others wrote
    config = json.loads((hub / "config.json").read_text(encoding="utf-8"))
    del config["slm_format"]
    (hub / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="something else than a model that these scripts wrote"):
        compress.main([str(place / "model"), "int8", "--out", str(hub), "--overwrite"])


def test_an_input_in_what_would_be_replaced(place):
    with pytest.raises(UserError, match="lies in examples, which would be replaced"):
        prepare(inputs=[place / "examples" / "val.jsonl"], out=place / "examples", tokenizer="bytes", overwrite=True)
    assert (place / "examples" / "val.jsonl").exists()


def test_the_folder_of_a_cache_of_a_report_of_a_run_is_not_anybodys(place):
    (place / "docs").mkdir()
    for name in ("log.jsonl", "report.md", "thesis.txt"):
        (place / "docs" / name).write_text("mine", encoding="utf-8")
    teach = ["--data", str(place / "data"), "--student-layers", "1", *breaking.TINY[6:]]
    for command, match in (
            (lambda: distill.main([str(place / "model"), *teach, "--cache", "--cache-dir", str(place / "docs"), "--out", str(place / "s")]),
             "log.jsonl, which would be deleted: move it away, or give another --cache-dir"),
            (lambda: distill.main([str(place / "model"), *teach, "--out", str(place / "docs")]), "holds log.jsonl, which is no part of a run"),
            (lambda: train.main(quick(place, "--data", place / "data", "--out", place / "docs", "--overwrite")), "holds log.jsonl"),
            (lambda: compress.main(["--measure", str(place / "model"), "--data", str(place / "data"), "--out", str(place / "docs"),
                                    "--overwrite"]), "holds report.md, which is not of a report")):
        with pytest.raises(UserError, match=match):
            command()
    assert all(p.read_text(encoding="utf-8") == "mine" for p in (place / "docs").iterdir()) and len(list((place / "docs").iterdir())) == 3


def test_an_old_run_stays_until_the_new_one_is_saved(place, monkeypatch):
    flags = quick(place, "--data", place / "data", "--out", place / "out")
    train.main(flags)
    kept = breaking.contents(place / "out") | {"log": (place / "out" / "log.jsonl").read_bytes()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "save", full)
    with pytest.raises(OSError):
        train.main([*flags, "--seed", "1", "--overwrite"])
    assert breaking.contents(place / "out") | {"log": (place / "out" / "log.jsonl").read_bytes()} == kept
    monkeypatch.undo()
    train.main([*flags, "--seed", "1", "--overwrite"])
    assert breaking.contents(place / "out").keys() == kept.keys() - {"log"} and breaking.contents(place / "out") != kept
    assert len(read_log(place / "out" / "log.jsonl")) == 6 and not (place / "out" / "log.jsonl.new").exists()


def test_a_link_is_followed_not_replaced(place):
    (place / "far").mkdir()
    (place / "link").symlink_to(place / "far" / "m")
    compress.main([str(place / "model"), "int8", "--out", str(place / "link")])
    assert (place / "link").is_symlink() and (place / "far" / "m" / "config.json").exists()


# --- kills, and files that are damaged ---

def test_killed_commands_go_on_to_the_same_bytes(tmp_path):
    assert breaking.kills(tmp_path, 18, seed=3) == []


def test_a_damaged_file_is_one_sentence(tmp_path):
    assert breaking.mutations(tmp_path, 40, seed=5) == []


# --- what the system says ---

@pytest.mark.parametrize("number, said", [(28, "disk is full"), (122, "disk is full"), (27, "larger than this system allows"),
                                          (13, "Permission denied"), (5, "Input/output error")])
def test_every_error_of_the_system_is_one_sentence(number, said, capsys):
    def main():
        raise OSError(number, os.strerror(number))
    with pytest.raises(SystemExit) as end:
        run(main)
    text = capsys.readouterr().err
    assert end.value.code == 2 and said in text and text.count("\n") == 1 and text.startswith("error: ")


@pytest.mark.parametrize("script, argv, said", [(train, ["--steps", "2"], "lower --micro-batch or --batch-size or --context"),
                                                (sample, ["out", "--prompt", "a"], "lower --samples or --max-new-tokens")])
def test_memory_that_is_full_names_the_flags_of_the_command(script, argv, said, capsys):
    parse = sample.sample_arguments if script is sample else functools.partial(train.parse, train.TrainConfig, "")

    def main():
        parse(argv)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB")
    with pytest.raises(SystemExit) as end:
        run(main)
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("\n") == 1 and "memory of this GPU" in text and said in text


def test_closed_streams_newlines_and_sizes_that_no_machine_has(place):
    def script(argv, **options):
        return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=60,
                              **options)
    talk = ["sample.py", place / "model", "--prompt", "a", "--max-new-tokens", "3"]
    for number in (0, 1, 2):
        assert script(talk, preexec_fn=lambda: os.close(number)).returncode == 0
    for argv in (["sample.py", "a\nb", "--prompt", "x"], ["train.py", "--data", place / "data", "--out", place / "x", "--width", 10 ** 9],
                 ["train.py", "--data", place / "data", "--out", place / "x", "--layers", 10 ** 8],
                 ["train.py", "--data", place / "data", "--out", place / "x", *breaking.TINY, "--batch-size", 10 ** 12]):
        done = script(argv)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_out_replaces_only_answers(place, capsys):
    """A file of the user's own, and one that --eval wrote."""
    lines, out, mine = place / "lines.jsonl", place / "answers.jsonl", place / "mine.txt"
    lines.write_text('{"prompt": "a b", "response": "c"}\n', encoding="utf-8")
    mine.write_text("mine\n", encoding="utf-8")
    argv = [str(place / "model"), "--eval", str(lines), "--overwrite", "--out"]
    with pytest.raises(UserError, match="mine.txt is not a file that --eval wrote"):
        sample.main([*argv, str(mine)])
    assert mine.read_text(encoding="utf-8") == "mine\n"
    for _ in range(2):
        sample.main([*argv, str(out)])
        assert json.loads(out.read_text(encoding="utf-8"))["response"] == "c"


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(place, monkeypatch):
    monkeypatch.setattr(machine, "memory_of_machine", lambda: 10 ** 8)
    with pytest.raises(UserError, match="billion parameters .* lower --width"):
        train.main([*map(str, ("--data", place / "data", "--out", place / "out", "--width", 2048))])


def test_errors_while_reading_name_the_file():
    with pytest.raises(OSError) as error, reading("some.jsonl"):
        os.read(os.open(".", os.O_RDONLY), 1)                                # a directory: EISDIR, without a name
    assert sentence(error.value).startswith("some.jsonl: ")


def test_what_an_older_version_left_in_a_run_goes(place):
    """last.old: weights and optimizer, 12 bytes a parameter, which a kill left beside a whole last/."""
    argv = ["--data", place / "data", "--out", place / "out", *breaking.TINY]
    train.main(list(map(str, argv)))
    shutil.copytree(place / "out" / "last", place / "out" / "last.old")
    train.main(list(map(str, ["--out", place / "out", "--resume", "--steps", 5])))
    assert {path.name for path in (place / "out").iterdir()} == {"best", "last", "log.jsonl", "loss.png"}


def test_a_damaged_log_costs_its_damaged_lines(place):
    argv = ["--data", place / "data", "--out", place / "out", *breaking.TINY]
    train.main(list(map(str, argv)))
    log = place / "out" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    whole = len(lines)
    lines[0], lines[1] = lines[0].replace(b"tokens", b"tok\xd1ns", 1), lines[1].replace(b'"loss": ', b'"loss": null, "x": ', 1)
    log.write_bytes(b"".join(lines))
    train.main(list(map(str, ["--out", place / "out", "--resume", "--steps", 5])))
    assert len(read_log(log)) == whole                                       # two lost, a step and an evaluation more
