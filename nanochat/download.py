"""
Fetch the reference shards: parquet files from the Hugging Face data hub, each checked before it gets its name.

In:  which shards, a folder, a number of workers
Out: shard_00000.parquet, ... in the folder. A file with its final name is whole and checked, so it is never fetched twice.
The idea: the hub tells size and sha256 of a file before it is fetched. Bytes go to <name>.part; an interrupted one is
continued where it ended (HTTP Range), and only when size and sha256 agree is it renamed. Trouble that may pass
(connection lost, 429, 5xx, wrong bytes) is tried again after 1, 2, 4, ... seconds, the rest is an error at once.
The data set is karpathy/climbmix-400b-shuffle: 6,543 shards, the last of which is the validation split (nanochat).
"""

import hashlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock
from tqdm import tqdm

from nanochat.common import UserError

TRIES = 6


@dataclass(frozen=True)
class Shards:
    url: str     # of the folder that holds them
    shards: int

    def shard(self, i):
        return f"shard_{i:05d}.parquet"


CLIMBMIX = Shards("https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6543)


class TryAgain(Exception):
    """Trouble that may pass. wait = seconds the server asked for, if it did."""

    def __init__(self, why, wait=None):
        super().__init__(why)
        self.wait = wait


class Stopped(Exception):
    """The user interrupted the program while a worker was busy."""


class DiskError(UserError):
    """No file can be written there: trouble of one shard that is trouble of all."""


@contextmanager
def disk(place):
    """A disk that is full, gone or closed to us is the user's to mend; what was written before stays, for the next time."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write to {place} ({error.strerror or error}): make room there, or choose another folder") from error


def check_status(response):
    """Sort an answer that carries no data: pass, TryAgain, or the user's business."""
    code = response.status_code
    if code == 429 or code >= 500:
        wait = response.headers.get("retry-after", "")
        raise TryAgain(f"the server answered {code}", float(wait) if wait.isdigit() else None)
    if code >= 400:
        raise UserError(f"{response.url} answered {code}: expected a file there. Check the address and your access to it")


def describe(client, url):
    """
    (size, sha256 or None) of a file, as its server tells. The hub answers with a redirect that has both in X-Linked-*
    headers; the storage behind it has other etags, so an etag counts only when it comes from the address we asked.
    """
    etag, seen = None, url
    for hop in range(10):
        response = client.head(seen, follow_redirects=False, headers={"Accept-Encoding": "identity"})
        check_status(response)
        headers = response.headers
        etag = headers.get("x-linked-etag", etag if hop else headers.get("etag"))
        size = headers.get("x-linked-size") or (None if response.is_redirect else headers.get("content-length"))
        if size is not None:
            sha = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', etag or "")
            return int(size), sha and sha[1]
        if not response.is_redirect:
            raise UserError(f"{url} does not tell its size, so it cannot be checked: expected a Content-Length")
        seen = str(response.next_request.url)
    raise UserError(f"{url} was redirected 10 times: check the address")


def fetch_once(client, url, path, progress, stop):
    """One attempt, starting from the bytes that an earlier one left. `progress(bytes that are here)`."""
    size, sha = describe(client, url)
    part = path.with_name(path.name + ".part")
    have, digest = part.stat().st_size if part.exists() else 0, hashlib.sha256()
    if have > size: # of another version of the file
        part.unlink()
        have = 0
    if have:
        with open(part, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    progress(have)
    if have < size:
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        with client.stream("GET", url, headers=headers, follow_redirects=True) as response:
            check_status(response)
            if response.status_code == 200: # all of it, whether we asked for the rest or not
                have, digest = 0, hashlib.sha256()
            elif not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
                raise TryAgain(f"asked for the bytes from {have} on, got {response.headers.get('content-range')!r}")
            with open(part, "ab" if have else "wb") as file:
                for data in response.iter_bytes():
                    if stop.is_set():
                        raise Stopped()
                    file.write(data)
                    digest.update(data)
                    have += len(data)
                    progress(have)
                file.flush()
                os.fsync(file.fileno())
    if have < size:
        raise TryAgain(f"got {have:,} of {size:,} bytes")
    if have > size or sha and digest.hexdigest() != sha:
        part.unlink()
        raise TryAgain(f"got {have:,} bytes of sha256 {digest.hexdigest()[:12]}, expected {size:,} of {(sha or 'any')[:12]}")
    os.replace(part, path)


def fetch(client, url, path, progress=lambda have: None, stop=None, sleep=None):
    """Fetch url to path, trying TRIES times. Nothing happens if path is there. Two programs may do this at once."""
    stop = stop or threading.Event()
    with disk(path), FileLock(str(path) + ".lock"):
        for attempt in range(TRIES):
            if path.exists():
                return
            try:
                fetch_once(client, url, path, progress, stop)
            except (TryAgain, httpx.TransportError) as error:
                if attempt + 1 == TRIES:
                    raise UserError(f"{url} failed {TRIES} times, last with: {error or type(error).__name__}. What arrived "
                                    f"is kept; run again to continue")
                (sleep or stop.wait)(getattr(error, "wait", None) or 2**attempt)
                if stop.is_set():
                    raise Stopped()


def download(numbers, folder, source=CLIMBMIX, workers=4, quiet=False, sleep=None):
    """
    Fetch shards into a folder. One that fails does not stop the others, unless the disk is the reason; a UserError at the end names
    all that failed. Returns the paths.
    """
    folder = Path(folder)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / source.shard(i) for i in numbers]
    missing, failed, stop = [path for path in paths if not path.exists()], [], threading.Event()
    lock, here = threading.Lock(), {}
    with (httpx.Client(timeout=30) as client, ThreadPoolExecutor(workers) as pool,
          tqdm(unit="B", unit_scale=True, disable=quiet) as bar):
        def one(path):
            def progress(have):
                with lock:
                    bar.update(have - here.get(path, 0))
                    here[path] = have

            try:
                fetch(client, f"{source.url}/{path.name}", path, progress, stop, sleep)
            except DiskError:
                raise
            except UserError as error:
                failed.append(str(error))
            with lock:
                bar.set_description(f"{sum(path.exists() for path in paths)} of {len(paths)} shards")

        futures = [pool.submit(one, path) for path in missing]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException: # an interrupt above all: let no worker begin or go on with a shard
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} shards failed: " + "; ".join(sorted(failed)))
    return paths
