"""The README as a stranger follows it: every command in it runs, in order, in a fresh copy; and what the house promises."""
import importlib.util, json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from model import Config, Transformer, save

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = [p.name for p in sorted(ROOT.glob("*.py"))]


def commands(chapter):
    """The lines of its ```bash blocks that run one of our scripts."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", chapter, re.S)).replace("\\\n", " ").splitlines()
    lines = [line.split(" # ")[0].rsplit("&& ", 1)[-1].strip() for line in lines]
    return [line for line in lines if ".py" in line and ("gguf" not in line or importlib.util.find_spec("gguf"))]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tracked files, and what the README's reader has: notes/, faq.jsonl, medquad.jsonl, a general model in smollm2/."""
    root = tmp_path_factory.mktemp("clone") / "repo"
    root.mkdir()
    for item in [*SCRIPTS, "README.md", "data", "tests"]:
        source = ROOT / item
        shutil.copytree(source, root / item, ignore=lambda d, names: [n for n in names if (Path(d) / n).is_dir()]) if source.is_dir() \
            else shutil.copy(source, root / item)
    shutil.copytree(ROOT / "tests", root / "notes", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "faq.jsonl").write_text("".join(json.dumps({"prompt": f"What is {a} + {b}?", "response": f"{a} + {b} is {a + b}, of course."})
                                            + "\n" for a in range(30) for b in range(30)), encoding="utf-8")
    text = re.findall(r"[A-Za-z]{3,}", README)
    rows = [{"prompt": f"What is {text[i]} {i}?", "response": " ".join(text[i:i + 40]) + "."} for i in range(0, 1500, 5)]
    (root / "medquad.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))), encoding="utf-8")
    (root / "wikitext.txt").write_text(README, encoding="utf-8")
    tokenizer = Tokenizer.train([(ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS], 2048)
    save(Transformer(Config(vocab_size=tokenizer.vocab_size, num_hidden_layers=12, hidden_size=32, num_attention_heads=2, head_dim=16,
                            num_key_value_heads=1, intermediate_size=64, max_position_embeddings=1024)).initialize(), root / "smollm2", tokenizer)
    return root


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "error::EncodingWarning:__main__", "WANDB_MODE": "offline"}


def test_every_command_runs(copy, environment):
    def follow(chapter):
        for line in commands(chapter):
            # python and torchrun of this environment; a smoke run of each
            line = line.replace("torchrun", "python -m torch.distributed.run").replace("python ", f"{sys.executable} ") + " --smoke"
            line = re.sub(r"--nproc_per_node \d+", "--nproc_per_node 2", line)
            r = subprocess.run(line, shell=True, cwd=copy, env=environment, capture_output=True, text=True, encoding="utf-8",
                               timeout=120, stdin=subprocess.DEVNULL)
            assert r.returncode == 0, f"{line}\n{r.stdout}\n{r.stderr}"

    first, *chapters = README.split("\n## ")
    assert commands(first) and len(commands(README)) >= 30
    follow(first)                                       # makes `out`, all that a chapter needs of those before it
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(follow, chapters))


def test_the_written_directory_is_complete_and_names_no_path(copy):
    best = copy / "out" / "best"
    assert {p.name for p in best.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                                "generation_config.json", "README.md"}
    text = "".join((best / n).read_text(encoding="utf-8") for n in ("config.json", "README.md", "tokenizer_config.json"))
    assert str(copy) not in text and "val_bits_per_byte" in text
    assert (copy / "out" / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("script", [*SCRIPTS, "data/prepare.py", "data/measure.py"])
def test_help_and_smoke_exist(script, environment):
    r = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert script == "model.py" or (r.returncode == 0 and "--smoke" in r.stdout)


@pytest.mark.parametrize("script", [*SCRIPTS, *(f"data/{p.name}" for p in (ROOT / "data").glob("*.py"))])
def test_lines_fit(script):
    long = [i for i, line in enumerate((ROOT / script).read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, long
