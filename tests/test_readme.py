"""The pages as a stranger follows them: their commands run, in order, in a fresh copy; and what the house promises."""
import functools, importlib.util, json, os, re, shlex, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bench_figures
from data import UserError
from data.tokenizer import Tokenizer
from model import Config, Transformer, save

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "data/README.md", "tests/FIGURES.md", "tests/SPECIALIST.md", "tests/COURSE.md", ".github/CONTRIBUTING.md")}
README = PAGES["README.md"]
SCRIPTS = [p.name for p in sorted(ROOT.glob("*.py"))]


def commands(chapter):
    """The lines of its ```bash blocks that run one of our scripts, and its ```python blocks that import one, in order."""
    found = []
    for kind, block in re.findall(r"```(bash|python)\n(.*?)```", chapter, re.S):
        if kind == "python":
            found += [block] * ("import " in block)
            continue
        lines = [line.split(" # ")[0].rsplit("&& ", 1)[-1].strip() for line in block.replace("\\\n", " ").splitlines()]
        found += [line for line in lines if ".py" in line and ("gguf" not in line or importlib.util.find_spec("gguf"))]
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tracked files, and what the README's reader has: notes/, faq.jsonl, medquad.jsonl, a general model in smollm2/."""
    root = tmp_path_factory.mktemp("clone") / "repo"
    root.mkdir()
    for item in [*SCRIPTS, "README.md", "data", "tests"]:                    # without folders: no prepared data, no pictures
        source = ROOT / item
        shutil.copytree(source, root / item, ignore=lambda d, names: [n for n in names if (Path(d) / n).is_dir()]) if source.is_dir() \
            else shutil.copy(source, root / item)
    shutil.copytree(ROOT / "tests", root / "notes", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "faq.jsonl").write_text("".join(json.dumps({"prompt": f"What is {a} + {b}?", "response": f"{a} + {b} is {a + b}, of course."})
                                            + "\n" for a in range(30) for b in range(30)), encoding="utf-8")
    text = re.findall(r"[A-Za-z]{3,}", "".join(PAGES.values()))
    rows = [{"prompt": f"What is {text[i]} {i}?", "response": " ".join(text[i:i + 40]) + "."} for i in range(0, 1500, 5)]
    (root / "medquad.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))), encoding="utf-8")
    (root / "wikitext.txt").write_text(PAGES["data/README.md"], encoding="utf-8")
    tokenizer = Tokenizer.train([(ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS], 2048)
    save(Transformer(Config(vocab_size=tokenizer.vocab_size, num_hidden_layers=12, hidden_size=32, num_attention_heads=2, head_dim=16,
                            num_key_value_heads=1, intermediate_size=64, max_position_embeddings=1024)).initialize(), root / "smollm2", tokenizer)
    return root


ENVIRONMENT = {**os.environ, "PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "error::EncodingWarning:__main__", "WANDB_MODE": "offline"}


@functools.lru_cache
def help_of(script):
    return subprocess.run([sys.executable, script, "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8")


def test_every_command_runs(copy):
    def follow(chapter, folder=copy):
        for line in commands(chapter):
            # python and torchrun of this environment; a smoke run of each
            short = line.replace("torchrun", "python -m torch.distributed.run").replace("python ", f"{sys.executable} ") + " --smoke"
            short = re.sub(r"--nproc_per_node \d+", "--nproc_per_node 2", short)
            how = dict(args=short, shell=True) if line.startswith(("python", "torchrun")) else dict(args=[sys.executable, "-c", line])
            r = subprocess.run(**how, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8",
                               timeout=600, stdin=subprocess.DEVNULL)
            assert r.returncode == 0, f"{line}\n{r.stdout}\n{r.stderr}"

    first, *chapters = README.split("\n## ")
    _, *labs = PAGES["tests/COURSE.md"].split("\n## ")
    assert commands(first) and len(commands(README)) >= 15 and len(labs) == 8 and all(map(commands, labs))
    classroom = shutil.copytree(copy, copy.parent / "classroom")           # the labs begin with a model of their own
    follow(first)                                       # makes `out`, all that a chapter needs of those before it
    with ThreadPoolExecutor(2) as pool:
        course = pool.submit(follow, "\n".join(labs), classroom)
        list(pool.map(follow, [*chapters, PAGES["tests/SPECIALIST.md"], PAGES["data/README.md"]]))
        course.result()


@pytest.mark.parametrize("page", ["tests/FIGURES.md", ".github/CONTRIBUTING.md"])
def test_every_flag_of_a_long_command_exists(page):
    """Commands that take minutes are not run: their scripts and flags are looked up in --help, or in the bench."""
    lines = [line for line in commands(PAGES[page]) if line.startswith("python ")]
    assert lines
    for line in lines:
        script, *words = shlex.split(line)[1:]
        if script == "-m":
            continue
        text = (ROOT / script).read_text(encoding="utf-8") if script.startswith("tests/") else help_of(script).stdout
        used = {word for word in words if re.fullmatch(r"--[a-z][\w-]*", word)}
        assert used <= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)), line


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not t.startswith("http")]
        assert all((ROOT / page).parent.joinpath(target).exists() for target in targets), (page, targets)


def test_a_figure_stands_on_one_page():
    """Numbers of three decimals or more, and those of five digits, are measured: a second place would grow old."""
    places = {}
    for page in ("README.md", "tests/FIGURES.md", "tests/SPECIALIST.md", "tests/COURSE.md"):
        for number in set(re.findall(r"(?<![\d.,])\d+\.\d{3,}(?![\d.])|(?<![\d.,])\d{2,3}(?:,\d{3})+(?![\d,])", PAGES[page])):
            places.setdefault(number, []).append(page)
    assert not {number: pages for number, pages in places.items() if len(pages) > 1}


def test_the_readme_is_a_front_door():
    numbers = len(re.findall("[0-9][0-9.,]*", README))
    assert len(README.splitlines()) <= 200 and numbers <= 150 and README.count("![") <= 5 and README.count("\n\n|") <= 3
    for script, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M):
        true = len((ROOT / script).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines) - true) < 0.1 * true, (script, true)


def test_pictures_are_what_their_commands_draw(tmp_path):
    """Each picture of a page is named with its command, is small, and is drawn from the tables that stand there now."""
    pytest.importorskip("matplotlib")
    shown = {name for text in PAGES.values() for name in re.findall(r"figures/(\w+)\.png\)", text)}
    assert sum(p.stat().st_size for p in (ROOT / "tests/figures").glob("*.png")) < 600_000
    bench_figures.main(["all", "--out", str(tmp_path)])
    assert {p.stem for p in tmp_path.glob("*.png")} == shown - {"loss", "readings"}
    assert shown == {p.stem for p in (ROOT / "tests/figures").glob("*.png")}
    commands = {"tradeoff": "sweep"}
    assert all(f"bench_figures.py {commands.get(name, name)}" in PAGES["tests/FIGURES.md"] + PAGES["tests/SPECIALIST.md"] for name in shown)


def test_the_written_directory_is_complete_and_names_no_path(copy):
    best = copy / "out" / "best"
    assert {p.name for p in best.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                                "generation_config.json", "README.md"}
    text = "".join((best / n).read_text(encoding="utf-8") for n in ("config.json", "README.md", "tokenizer_config.json"))
    assert str(copy) not in text and "val_bits_per_byte" in text
    assert (copy / "out" / "loss.png").stat().st_size > 5000


def test_pictures_of_runs(tmp_path):
    pytest.importorskip("matplotlib")
    line = dict(tokens=0, seconds=1.0)
    log = [{**line, "step": n, "tokens": 8 * n, "loss": 3.0 / n} for n in range(1, 9)]
    log += [{**line, "step": n, "tokens": 8 * n, "val_loss": 3.0 / n, "val_bits_per_byte": 4.0 / n, "times_read": n / 2} for n in (4, 8)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    out = ["--out", str(tmp_path / "drawn")]
    bench_figures.main(["loss", str(tmp_path / "run"), *out])
    bench_figures.main(["readings", f"old={tmp_path / 'run'}", f"new={tmp_path / 'run'}", *out])
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["loss.png", "readings.png"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["log.jsonl"]
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log[:8]), encoding="utf-8")
    with pytest.raises(UserError, match="no evaluation that says how often the text was read"):
        bench_figures.main(["readings", str(tmp_path / "run"), *out])


@pytest.mark.parametrize("script", [*SCRIPTS, "data/prepare.py", "data/measure.py"])
def test_help_and_smoke_exist(script):
    r = help_of(script)
    assert script == "model.py" or (r.returncode == 0 and "--smoke" in r.stdout)


@pytest.mark.parametrize("script", [*SCRIPTS, *(f"data/{p.name}" for p in (ROOT / "data").glob("*.py"))])
def test_lines_fit(script):
    long = [i for i, line in enumerate((ROOT / script).read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, long
