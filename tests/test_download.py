"""A small hub on the loopback, with every kind of trouble, and the law: a file with its final name is whole and right."""

import hashlib
import random
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from nanochat import download as module
from nanochat.common import UserError
from nanochat.dataset import main
from nanochat.download import CLIMBMIX, TRIES, Shards, describe, download, fetch

BODY = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


class Hub:
    """
    Answers /main/<name> like the hub, with a redirect to /storage/<name> that tells size and sha256 of `files[name]`.
    trouble: list of things that go wrong with the next GETs of the data, one each.
    """

    def __init__(self, files):
        self.files, self.trouble, self.log, self.ranges, self.plain, self.sha = dict(files), [], [], True, False, None

    def answer(self, request, body):
        name = request.path.rsplit("/", 1)[1].split("?")[0]
        data = self.files.get(name)
        asked = request.headers.get("Range")
        if request.path.startswith("/main/") and not self.plain and data is not None:
            sha = self.sha or hashlib.sha256(data).hexdigest()
            return self.head(request, 302, {"Location": f"/storage/{name}?signed=1", "X-Linked-Size": len(data),
                                            "X-Linked-ETag": f'"{sha}"', "Content-Length": 0})
        if body:
            self.log.append((name, asked))
        trouble = self.trouble.pop(0) if body and self.trouble else None
        if data is None:
            return self.head(request, 404, {"Content-Length": 0})
        if isinstance(trouble, int):
            return self.head(request, trouble, {"Content-Length": 0, "Retry-After": "7"} if trouble == 429 else {"Content-Length": 0})
        start = int(asked.split("=")[1].rstrip("-")) if asked and self.ranges else 0
        if start >= len(data):
            return self.head(request, 416, {"Content-Length": 0})
        headers = {"Content-Length": len(data) - start, "ETag": '"' + "0" * 64 + '"'} # the storage's own, not a sha256
        if start:
            headers["Content-Range"] = f"bytes {start if trouble != 'range' else 0}-{len(data) - 1}/{len(data)}"
        self.head(request, 206 if start else 200, headers)
        if body:
            part = data[start:]
            if trouble == "wrong":
                part = part[:-1] + bytes([part[-1] ^ 1])
            if name == "slow":
                for i in range(0, len(part), 5000):
                    request.wfile.write(part[i:i + 5000])
                    time.sleep(0.1)
            else:
                request.wfile.write(part[:len(part) // 2] if trouble == "cut" else part)
            request.close_connection = True

    @staticmethod
    def head(request, code, headers):
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, str(value))
        request.end_headers()


@contextmanager
def serve(files):
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        do_GET = lambda self: hub.answer(self, body=True)
        do_HEAD = lambda self: hub.answer(self, body=False)
        log_message = lambda self, *args: None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None # a client that hangs up is part of the game
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}/main"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub():
    with serve({"a": BODY}) as hub:
        yield hub


@pytest.fixture
def get(hub, tmp_path):
    """fetch `a`; returns the seconds slept between attempts."""
    def get():
        slept = []
        with httpx.Client(trust_env=False) as client:
            fetch(client, f"{hub.url}/a", tmp_path / "a", sleep=slept.append)
        assert (tmp_path / "a").read_bytes() == hub.files["a"]
        assert not (tmp_path / "a.part").exists()
        return slept
    return get


def test_size_and_checksum_come_from_the_hub_not_from_its_storage(hub):
    with httpx.Client(trust_env=False) as client:
        assert describe(client, f"{hub.url}/a") == (len(BODY), SHA)
        hub.plain = True # a plain server: a size, and an etag that is 64 hex digits here by the hub's own doing
        assert describe(client, f"{hub.url}/a") == (len(BODY), "0" * 64)


def test_a_file_is_fetched_once(hub, get):
    assert get() == [] and get() == []
    assert hub.log == [("a", None)]


def test_what_was_interrupted_is_continued_where_it_ended(hub, get, tmp_path):
    hub.trouble = ["cut", "cut"]
    assert get() == [1, 2]
    half = len(BODY) // 2
    starts = [int(asked.split("=")[1][:-1]) if asked else 0 for _, asked in hub.log]
    assert starts[0] == 0 < starts[1] <= half and starts[1] < starts[2] < len(BODY)


@pytest.mark.parametrize("trouble, slept", [([500], [1]), ([503, 502, 500], [1, 2, 4]), ([429], [7]), (["wrong"], [1]),
                                            (["cut", "wrong"], [1, 2]), (["cut", "range"], [1, 2]), (["cut", 500, "cut"], [1, 2, 4])])
def test_trouble_that_passes(hub, get, trouble, slept):
    hub.trouble = list(trouble)
    assert get() == slept and not hub.trouble


@pytest.mark.parametrize("left", [b"", BODY[:1000], BODY, b"x" * 1000, BODY + b"more", b"y" * len(BODY)])
def test_whatever_lies_in_the_partial_file_the_result_is_right(hub, get, tmp_path, left):
    (tmp_path / "a.part").write_bytes(left)
    get()
    if left == BODY:
        assert hub.log == [], "all bytes were here, only the name was missing"


def test_a_server_without_ranges_starts_over(hub, get):
    hub.ranges, hub.trouble = False, ["cut"]
    assert get() == [1]


def test_trouble_that_stays_is_told_and_what_arrived_is_kept(hub, get, tmp_path):
    hub.trouble = ["cut"] + [500] * TRIES
    with pytest.raises(UserError, match=f"failed {TRIES} times.*500"):
        get()
    assert not (tmp_path / "a").exists() and (tmp_path / "a.part").stat().st_size == len(BODY) // 2
    hub.trouble = []
    get()
    assert hub.log[-1] == ("a", f"bytes={len(BODY) // 2}-")


def test_a_file_that_never_matches_its_checksum_never_gets_its_name(hub, get, tmp_path):
    hub.sha = "1" * 64
    with pytest.raises(UserError, match="sha256"):
        get()
    assert not (tmp_path / "a").exists()


def test_a_missing_file_is_an_error_at_once(hub, get):
    del hub.files["a"]
    with pytest.raises(UserError, match="404"):
        get()
    hub.files["a"] = BODY
    hub.trouble = [403]
    with pytest.raises(UserError, match="403"):
        get()


def test_no_server_is_an_error_after_some_tries(tmp_path):
    slept = []
    with httpx.Client(trust_env=False) as client, pytest.raises(UserError, match="failed"):
        fetch(client, "http://127.0.0.1:9/a", tmp_path / "a", sleep=slept.append)
    assert slept == [2**i for i in range(TRIES - 1)]


def test_shards_in_parallel_with_one_that_fails(tmp_path):
    files = {CLIMBMIX.shard(i): random.Random(i).randbytes(50_000 + i) for i in range(6)}
    with serve(files) as hub:
        source = Shards(hub.url, 6)
        paths = download(range(5), tmp_path, source, workers=3, quiet=True)
        assert [path.read_bytes() for path in paths] == [files[path.name] for path in paths]
        del hub.files["shard_00005.parquet"]
        (tmp_path / "shard_00000.parquet").unlink()
        with pytest.raises(UserError, match="1 of 6 shards failed.*shard_00005"):
            download(range(6), tmp_path, source, workers=2, quiet=True)
        assert (tmp_path / "shard_00000.parquet").read_bytes() == files["shard_00000.parquet"], "the others go on"


def test_a_folder_that_cannot_be_is_told(tmp_path):
    """--data-dir below a file was a NotADirectoryError; the file is the user's."""
    (tmp_path / "file").touch()
    with serve({"a": BODY}) as hub, pytest.raises(UserError, match=r"cannot write to .*/file/below/climbmix \(Not a directory\).*another folder"):
        download(["a"], tmp_path / "file" / "below" / "climbmix", OneFile(hub.url, 1), quiet=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_told_and_stops_the_rest(tmp_path):
    """It was a traceback, of every worker. Nothing gets its name, and no other shard is begun."""
    names = [f"shard{i}" for i in range(60)]
    for name in names:
        (tmp_path / f"{name}.part").symlink_to("/dev/full")
    with serve(dict.fromkeys(names, BODY)) as hub:
        with pytest.raises(UserError, match=r"cannot write to .*/shard\d+ \(No space left on device\): make room"):
            download(names, tmp_path, OneFile(hub.url, 60), workers=2, quiet=True)
        assert not [name for name in names if (tmp_path / name).exists()] and len({name for name, _ in hub.log}) < 60


def test_two_programs_at_once_fetch_it_once(hub, tmp_path):
    threads = [threading.Thread(target=download, args=(["a"], tmp_path, OneFile(hub.url, 1)), kwargs={"quiet": True})
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() == BODY and len(hub.log) == 1


class OneFile(Shards):
    def shard(self, i):
        return i


def test_an_interrupt_stops_the_workers(hub, tmp_path, monkeypatch):
    """Ctrl-C, played by the progress bar: the worker busy with the slow file must end soon, and what it has must stay."""
    hub.files["slow"] = BODY

    class Bar:
        def __init__(self, **_): self.total = 0
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def set_description(self, text): pass
        def update(self, n):
            self.total += n
            if self.total > 290_000: # a is nearly here, slow has begun
                self.total = -10**9
                raise KeyboardInterrupt
    monkeypatch.setattr(module, "tqdm", Bar)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        download(["slow", "a", "slow2"], tmp_path, OneFile(hub.url, 1), workers=2)
    assert time.monotonic() - start < 3, "to the end it takes 6 seconds"
    assert not (tmp_path / "slow").exists() and (tmp_path / "slow.part").stat().st_size < len(BODY)


def test_the_command(tmp_path, monkeypatch, capsys):
    names = [CLIMBMIX.shard(i) for i in (0, 1, 6542)]
    monkeypatch.setenv("NANOCHAT_DATA_DIR", "") # the flag sets it
    with serve({name: name.encode() * 99 for name in names}) as hub:
        monkeypatch.setattr(sys, "argv", ["dataset", "-n", "2", "-w", "2", "--url", hub.url, "--data-dir", str(tmp_path)])
        main()
    assert sorted(path.name for path in (tmp_path / "climbmix").glob("*.parquet")) == names
    out = capsys.readouterr().out
    assert f"3 shards in {tmp_path}/climbmix\n" in out
    assert f"--source climbmix --data-dir {tmp_path}, or NANOCHAT_DATA_DIR={tmp_path}" in out, "or the next script will not find them"
    monkeypatch.setattr(sys, "argv", ["dataset", "-n", "7000"])
    with pytest.raises(UserError, match="-n"):
        main()
