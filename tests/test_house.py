"""The house: which room imports which, names that stand once, and a copy without C."""
import ast, os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("model", "sample", "train", "distill", "compress")
MODULES = [*(ROOT / f"{name}.py" for name in SCRIPTS), *sorted((ROOT / "data").glob("*.py"))]


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(nodes):
    """The names of modules that are imported by these nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_tools_do_not_import_scripts():
    """Only the commands prepare.py and measure.py may; others do it inside a function, as what a second process runs."""
    for path in sorted((ROOT / "data").glob("*.py")):
        found = {name for name in imports(parsed(path).body) if name in SCRIPTS}
        assert not found or path.name in ("prepare.py", "measure.py"), (path.name, found)


def test_scripts_import_in_one_direction():
    order = list(SCRIPTS)
    for name in SCRIPTS:
        found = {m for m in imports(ast.walk(parsed(ROOT / f"{name}.py"))) if m in SCRIPTS}
        assert all(order.index(m) < order.index(name) for m in found), (name, found)


def test_a_name_stands_in_one_file():
    places = {}
    for path in MODULES:
        for node in parsed(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
                places.setdefault(node.name, []).append(path.name)
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_attention_comes_early_and_no_room_is_too_large():
    lines = (ROOT / "model.py").read_text(encoding="utf-8").splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("class Attention")) < 200
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert max(sizes[f"{name}.py"] for name in SCRIPTS) <= 900
    assert max(size for name, size in sizes.items() if name.removesuffix(".py") not in SCRIPTS) <= 530


def test_all_works_without_the_kernels(tmp_path):
    """A copy without native.py and kernels.c trains and generates."""
    shutil.copytree(ROOT, tmp_path / "copy", ignore=lambda folder, names: [
        name for name in names if name in (".git", "tests", "native.py", "kernels.c") or name.startswith("out")
        or Path(folder, name).is_dir() and Path(folder).name == "data"])
    run = lambda *argv: subprocess.run([sys.executable, *argv], cwd=tmp_path / "copy", capture_output=True, text=True,
                                       encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    (tmp_path / "text.txt").write_text("a small text to learn, again and again\n" * 400, encoding="utf-8")
    run("data/prepare.py", "--input", tmp_path / "text.txt", "--name", "text", "--tokenizer", "bytes")
    run("train.py", "--data", "text", "--out", "run", "--steps", "4", "--layers", "1", "--width", "32", "--heads", "1",
        "--context", "32", "--evals", "1", "--eval-tokens", "64")
    assert "tokens" in run("sample.py", "run", "--prompt", "a small", "--max-new-tokens", "5").stderr
