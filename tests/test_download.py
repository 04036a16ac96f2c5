"""data/download.py against a real server on this machine that cuts, lies, forgets and changes its mind. No other network."""
import errno, hashlib, http.server, io, json, os, signal, subprocess, sys, threading, time, urllib.parse
from pathlib import Path

import numpy as np
import pytest

from data import UserError, download
from data.prepare import find, prepare
from data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BODY = np.random.default_rng(0).bytes(3_000_000)


class Server(http.server.ThreadingHTTPServer):
    """`moods` says how the next requests are answered, one word each, then "well"; `asked` are (path, Range) so far."""
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.etag, self.moods, self.asked, self.released = {}, '"1"', [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        s, wanted, path = self.server, self.headers["Range"], self.path.lstrip("/")
        mood = s.moods.pop(0) if s.moods else "well"
        s.asked.append((path, wanted))
        if mood.isdigit():
            self.send_response(int(mood))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if path.startswith("rows"):
            offset = int(urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)["offset"][0])
            body = json.dumps({"rows": [{"row": {"text": f"row {i} é\n", "n": i}}
                                        for i in range(offset, min(offset + 100, 250))]}).encode("utf-8")
        else:
            body = s.bodies[path]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if mood == "ignores range" or (mood != "ignores if-range" and self.headers["If-Range"] != s.etag):
            start = 0
        length = len(body) + 1000 * (mood == "lies")
        if start >= length:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if s.etag:
            self.send_header("ETag", s.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
        self.send_header("Content-Length", str(length - start))
        self.end_headers()
        self.wfile.write(body[start:start + (len(body) - start) // 2] if mood in ("cuts", "stalls") else body[start:])
        if mood == "stalls":
            self.wfile.flush()
            s.released.wait(20)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.001)
    server = Server()
    server.bodies["file"] = BODY
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def fetched(server, path):
    download.download(server.url + "file", path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


@pytest.mark.parametrize("moods, ranges", [
    ([], [None]),
    (["cuts", "cuts"], [None, 1_500_000, 2_250_000]),                       # each time half of what is left
    (["cuts", "ignores range"], [None, 1_500_000]),
    (["503", "503", "cuts", "500"], [None, None, None, 1_500_000, 1_500_000])])
def test_a_cut_connection_is_taken_up_where_it_was(server, tmp_path, moods, ranges):
    server.moods = moods
    assert fetched(server, tmp_path / "file") == BODY
    assert [r for _, r in server.asked] == [r and f"bytes={r}-" for r in ranges]


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path, honours_if_range, monkeypatch):
    server.moods = ["cuts"]
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(download.Failed, match="1,500,000 of 3,000,000 bytes"):
        download.download(server.url + "file", tmp_path / "file")
    monkeypatch.undo()
    monkeypatch.setattr(download, "WAIT", 0.001)
    server.bodies["file"], server.etag = BODY[::-1][:2_000_000], '"2"'
    server.moods = [] if honours_if_range else ["ignores if-range"]
    assert fetched(server, tmp_path / "file") == BODY[::-1][:2_000_000]
    assert len(server.asked) == (2 if honours_if_range else 3)


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_without_a_strong_etag_nothing_is_taken_up(server, tmp_path, etag):
    server.moods, server.etag = ["cuts"], etag
    assert fetched(server, tmp_path / "file") == BODY
    assert [r for _, r in server.asked] == [None, None]


def test_a_server_that_lies_about_the_length_is_not_believed(server, tmp_path):
    server.moods = ["lies"] * 99
    with pytest.raises(download.Failed, match="3,000,000 of 3,001,000 bytes came"):
        download.download(server.url + "file", tmp_path / "file")
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").read_bytes() == BODY
    server.moods = []
    assert fetched(server, tmp_path / "file") == BODY       # all is there: 416 says so, and nothing is sent again
    assert len(server.asked) == download.TRIES + 1


def test_what_does_not_pass_is_not_tried_again(server, tmp_path):
    for state in ("404", "403"):
        server.moods, server.asked = [state], []
        with pytest.raises(download.Failed, match=state):
            download.download(server.url + "file", tmp_path / "file")
        assert len(server.asked) == 1
    server.moods, server.asked = ["503"] * 99, []
    with pytest.raises(download.Failed, match="503"):
        download.download(server.url + "file", tmp_path / "file")
    assert len(server.asked) == download.TRIES and list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_came(server, tmp_path):
    if os.name == "nt":
        pytest.skip("no SIGINT to send")
    server.moods = ["stalls"]
    code = "import signal, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from data import download; from data.console import run; " \
           "signal.signal(signal.SIGINT, signal.default_int_handler); " \
           "run(lambda: download.download(sys.argv[2], Path(sys.argv[3])))"
    # A background shell ignores Ctrl-C, and its children inherit that: hence the handler.
    process = subprocess.Popen([sys.executable, "-c", code, ROOT, server.url + "file", tmp_path / "file"],
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 20
    part = tmp_path / "file.part"
    while not (part.exists() and part.stat().st_size > 1_400_000) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.endswith("stopped\n") and "Traceback" not in said
    came = part.stat().st_size
    assert 1_400_000 < came <= 1_500_000 and part.read_bytes() == BODY[:came]
    assert fetched(server, tmp_path / "file") == BODY and server.asked[-1][1] == f"bytes={came}-"


def test_a_full_disk_keeps_what_came(server, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk],
                                            capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(OSError) as error:
            download.download(server.url + "file", disk / "file")
        assert error.value.errno == errno.ENOSPC and len(server.asked) == 1
        came = (disk / "file.part").stat().st_size
        assert came > 1_000_000
        subprocess.run(["mount", "-o", "remount,size=5m", disk], check=True)
        assert fetched(server, disk / "file") == BODY and server.asked[-1][1] == f"bytes={came}-"
    finally:
        subprocess.run(["umount", "-l", disk])


# --- named corpora: their own table, but the addresses are this server's ---

@pytest.fixture
def here(server, tmp_path, monkeypatch):
    """The folder for downloads, and all corpora at `server`."""
    monkeypatch.setattr(download, "FOLDER", tmp_path / "downloads")
    for name, (_, files) in download.CORPORA.items():
        monkeypatch.setitem(download.CORPORA, name, (server.url + "rows?offset=" * (not files), files))
    return tmp_path / "downloads"


def test_git_knows_a_file_by_this_id(tmp_path):
    (tmp_path / "x").write_bytes(b"hello\n")                # `echo hello | git hash-object --stdin`
    assert download.digests(tmp_path / "x") == (hashlib.sha256(b"hello\n").hexdigest(),
                                                "ce013625030ba8dba906f756967f9e9ca394464a")


def test_another_content_than_the_known_one_is_refused(server, here):
    server.bodies["input.txt"] = b"First Citizen:\n"
    for _ in range(2):                                      # fetched, and then there
        with pytest.raises(UserError, match=r"input.txt is not the file of .*7dcb3a2d4cc3.*remove it"):
            download.files("shakespeare")
    assert len(server.asked) == 1


def test_offline_one_sentence_says_what_to_put_where_and_that_works(server, here, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.CORPORA, "shakespeare", ("http://127.0.0.1:9/", {"input.txt": None}))
    for _ in range(2):
        with pytest.raises(UserError) as error:
            prepare("shakespeare", out=tmp_path / "out", tokenizer="bytes")
        said = str(error.value)
        assert "http://127.0.0.1:9/" in said and "put input.txt" in said and str(here / "shakespeare") in said
        assert "\n" not in said
    (here / "shakespeare" / "input.txt").write_text("To be, or not to be\n" * 100, encoding="utf-8")
    out = prepare("shakespeare", out=tmp_path / "out", tokenizer="bytes")
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert meta["name"] == "shakespeare" and meta["source"] == ["shakespeare"]
    assert sum(s["bytes"] for s in meta["splits"].values()) == 2000


def test_stories_are_documents_and_the_validation_file_is_validation(server, here, tmp_path):
    stories = [f"Once {i} é.\n\nThe end." for i in range(30)]
    server.bodies["TinyStoriesV2-GPT4-train.txt"] = "\n<|endoftext|>\n".join([*stories, ""]).encode("utf-8")
    server.bodies["TinyStoriesV2-GPT4-valid.txt"] = b"Once 7 \xc3\xa9.\n\nThe end.\n<|endoftext|>\nNew.\n<|endoftext|>\n"
    server.moods = ["cuts"]
    out = prepare("tinystories", out=tmp_path / "out", tokenizer="bytes")
    text = {s: Tokenizer.load(out).decode(np.fromfile(out / f"{s}.bin", "<u2").tolist()) for s in ("train", "val")}
    assert text["train"].split("<|endoftext|>") == stories[:7] + stories[8:] + [""]
    assert text["val"].split("<|endoftext|>") == [stories[7], "New.", ""]


def test_web_pages_are_the_first_of_a_parquet_file(server, here, tmp_path, monkeypatch, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pages, content = [f"page {i:03} é\n" for i in range(300)], io.BytesIO()               # 12 bytes each
    parquet.write_table(pyarrow.table({"text": pages, "id": list(range(300))}), content, row_group_size=100)
    server.bodies["013_00000.parquet"] = content.getvalue()
    with pytest.raises(UserError, match="013_00000.parquet is not the file of .*sha256 b393f51fefab, but here"):
        prepare("fineweb-edu", out=tmp_path / "out", tokenizer="bytes")
    known = {"013_00000.parquet": hashlib.sha256(content.getvalue()).hexdigest()}
    monkeypatch.setitem(download.CORPORA, "fineweb-edu", (server.url, known))
    out = prepare("fineweb-edu", out=tmp_path / "out", tokenizer="bytes", size=1200)
    text = b"".join((out / f"{split}.bin").read_bytes() for split in ("train", "val"))
    words = Tokenizer.load(out).decode(np.frombuffer(text, "<u2").tolist()).split("<|endoftext|>")
    assert sorted(words) == ["", *pages[:100]] and len(server.asked) == 1
    monkeypatch.setitem(download.SIZES, "fineweb-edu", 2400)                # without --size
    out = prepare("fineweb-edu", out=tmp_path / "out", tokenizer="bytes", overwrite=True)
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert sum(s["bytes"] for s in meta["splits"].values()) == 2400 and "read as records: 1 .parquet" in capsys.readouterr().out


def test_without_pyarrow_no_parquet_is_fetched(server, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="fineweb-edu: Parquet needs a package: pip install pyarrow"):
        download.files("fineweb-edu")
    assert server.asked == []


def test_training_downloads_nothing(server, here, tmp_path):
    for name in download.CORPORA:
        with pytest.raises(UserError, match=f"--data {name} is not here yet: python data/prepare.py {name} downloads"):
            find(name)
    assert server.asked == [] and not here.exists()
