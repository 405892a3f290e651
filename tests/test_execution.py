"""The sandbox: what code says and how it ends is told truly, and it gets nowhere. The laws are tried by code that wants out."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from nanochat.execution import run_code

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel guards are Linux's")
unix = pytest.mark.skipif(os.name != "posix", reason="limits are Unix's")
# undo the audit hook from inside, as hostile code would, so that a test reaches the kernel's own guards
PAST_THE_HOOK = "import sys; g = sys._getframe(1).f_globals; g['REFUSED'] = ('none of it',); g['CHANGES'] = {}; g['set'] = lambda x: frozenset(); "
# and a second copy of what starts programs, without our refusal in it
PAST_THE_REFUSAL = PAST_THE_HOOK + "del sys.modules['_posixsubprocess']; "

# Python to begin with where the kernel gives namespaces and refuses to map our user in them
READ_ONLY_PROC = """
import ctypes, os
from nanochat.execution import map_user
libc, uid, gid = ctypes.CDLL(None), os.getuid(), os.getgid()
assert libc.unshare(0x10020000) == 0 and map_user(uid, gid) and libc.mount(b"none", b"/", None, 0x44000, None) == 0
assert libc.syscall(442, -100, b"/proc", 0x8000, (ctypes.c_uint64 * 4)(1, 0, 0, 0), 32) == 0 and not os.access("/proc/self/uid_map", os.W_OK)
"""


def running(marker):
    """Is there a process with this in its command line?"""
    return any(marker in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def need(*guards):
    held = run_code("pass", timeout=30).guards
    missing = [guard for guard in guards if guard not in held]
    if missing:
        pytest.skip(f"this machine's kernel does not give us {', '.join(missing)} (it gives {', '.join(held)})")


def test_what_it_prints_and_that_it_ended():
    result = run_code("import sys\nprint('out', 1 + 1)\nprint('Größe', file=sys.stderr)", timeout=30)
    assert (result.ok, result.stdout, result.stderr, result.error) == (True, "out 2\n", "Größe\n", None)


@pytest.mark.parametrize("code, error", [
    ("1/0", "ZeroDivisionError"), ("def f(:", "SyntaxError"), ("assert 1 == 2, 'no'", "AssertionError: no"), ("f = lambda: f()\nf()", "RecursionError"),
    ("import sys; sys.exit(0)", "SystemExit"), ("raise SystemExit", "SystemExit"), ("import os; os._exit(0)", "left by itself"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"), ("import numpy", "ModuleNotFoundError"), ("\0", "SyntaxError"),
    ("import os, signal; os._exit(3)", "exit code 3"), ("import sys; sys.stderr.close(); 1/0", "ZeroDivisionError"),
])
def test_only_code_that_reaches_its_end_is_ok(code, error):
    result = run_code(code, timeout=30)
    assert not result.ok and (error in result.error or (code == "\0" and "null bytes" in result.error)), result


@pytest.mark.parametrize("code", ["import os; os.ftruncate(2, 0); os._exit(0)", "import sys; sys.stderr.seek(0); sys.stderr.write('x' * 300); sys.exit()"])
def test_code_cannot_look_as_if_it_had_never_been_started(code):
    """The guards were told in stderr's first line, which code could wipe: its own end was then taken for a sandbox that did not start."""
    result = run_code(code, timeout=30)
    assert not result.ok and result.guards == run_code("pass", timeout=30).guards and not result.error.startswith("sandbox"), result


def test_a_script_is_main_and_may_use_its_folder():
    result = run_code("import os\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 3\n"
                      "os.makedirs('a/b')\nopen('a/b/c.txt', 'w').write('hi')\nos.rename('a/b/c.txt', 'd.txt')\n"
                      "import tempfile\ntempfile.NamedTemporaryFile('w').write('x')\n"
                      "if __name__ == '__main__':\n    print(A().x, open('d.txt').read(), sorted(os.listdir()))", timeout=30)
    assert result.ok and result.stdout == "3 hi ['a', 'd.txt']\n", result


def test_time_is_limited_and_nothing_stays_behind():
    start = time.perf_counter()
    result = run_code("import time\nprint('before', flush=True)\ntime.sleep(60)", timeout=1.0)
    assert time.perf_counter() - start < 10
    assert not result.ok and result.error.startswith("timeout") and result.stdout == "before\n"
    assert not running(os.path.join("nanochat", "execution.py"))


@unix
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit address space")
def test_memory_is_limited():
    result = run_code("x = bytearray(10**9)", timeout=30, memory_mb=128)
    assert not result.ok and result.error.startswith("memory")
    assert run_code("x = bytearray(10**8)", timeout=30, memory_mb=256).ok


@unix
def test_output_is_limited():
    result = run_code("while True: print('x' * 100000)", timeout=30)
    assert not result.ok and "File too large" in result.error and len(result.stdout) <= 20_000


@pytest.mark.parametrize("attempt", [
    "open({path!r}, 'w')", "open({path!r}, 'ab')", "import os; os.open({path!r}, os.O_WRONLY | os.O_CREAT)", "import os; os.mkdir({path!r})",
    "open('../../escape', 'w')", "import os; os.symlink({folder!r}, 'link'); open('link/escape', 'w')", "import os; os.remove({victim!r})",
    "import os; os.rename({victim!r}, 'mine')", "import os; os.chmod({victim!r}, 0)", "import os; os.truncate({victim!r}, 0)",
    "import sqlite3; sqlite3.connect({path!r}).execute('create table t (x)')", "import shutil; shutil.rmtree({folder!r})",
    "import os; os.utime({victim!r}, (0, 0))", "import os; os.link({victim!r}, 'mine')", "import pathlib; pathlib.Path({path!r}).write_text('x')",
    "import os; d = os.open({folder!r}, os.O_RDONLY); os.unlink('victim', dir_fd=d)",
])
@pytest.mark.parametrize("past", ["", PAST_THE_HOOK], ids=["hook", "kernel"])
def test_no_writes_outside_the_folder(tmp_path, attempt, past):
    if past or "dir_fd" in attempt:
        need("landlock") if "utime" not in attempt and "chmod" not in attempt else need("files")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    before = os.stat(victim)
    result = run_code(past + "\n" + attempt.format(path=str(tmp_path / "escape"), folder=str(tmp_path), victim=str(victim)), timeout=30)
    assert not result.ok and ("Error" in result.error), result
    assert os.listdir(tmp_path) == ["victim"] and victim.read_text() == "precious"
    assert (os.stat(victim).st_mode, os.stat(victim).st_mtime, os.stat(victim).st_nlink) == (before.st_mode, before.st_mtime, 1)


@pytest.mark.parametrize("past", ["", PAST_THE_HOOK], ids=["hook", "kernel"])
def test_no_network(past):
    if past:
        need("network")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"{past}\nimport socket\nsocket.create_connection(('127.0.0.1', {port}), 2).send(b'secret')"
        result = run_code(code, timeout=30)
        assert not result.ok and "Error" in result.error
        with pytest.raises(TimeoutError if sys.version_info >= (3, 10) else socket.timeout):
            server.accept()


@linux
@pytest.mark.parametrize("attempt", [
    "s = socket.socket(socket.AF_UNIX)\ns.connect({stream!r})\ns.send(b'secret')", "socket.socket(type=socket.SOCK_DGRAM).sendto(b'secret', ('127.0.0.1', {port}))",
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'secret', {datagrams!r})",
], ids=["unix", "udp", "pair"])
def test_seccomp_alone_shuts_what_no_other_guard_does(tmp_path, attempt):
    """A Unix socket on disk was reached from another network namespace and past landlock; where there are no namespaces, UDP went out too."""
    need("seccomp")
    with socket.socket(socket.AF_UNIX) as stream, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams, socket.socket(type=socket.SOCK_DGRAM) as udp:
        for server, address in ((stream, str(tmp_path / "stream")), (datagrams, str(tmp_path / "datagrams")), (udp, ("127.0.0.1", 0))):
            server.bind(address)
            server.setblocking(False)
        stream.listen()
        code = "\nimport socket\n" + attempt.format(stream=stream.getsockname(), datagrams=datagrams.getsockname(), port=udp.getsockname()[1])
        alone = [sys.executable, "-c", "from nanochat.execution import seccomp\nassert seccomp()" + code] # no hook, no namespace, no landlock
        for error in (run_code(PAST_THE_HOOK + code, timeout=30).error, subprocess.run(alone, capture_output=True, text=True).stderr):
            assert error and "Operation not permitted" in error
        for arrived in (stream.accept, lambda: datagrams.recv(1), lambda: udp.recv(1)):
            with pytest.raises(BlockingIOError):
                arrived()


@pytest.mark.parametrize("attempt", ["import subprocess; subprocess.run(['ls'])", "import os; os.system('ls')", "import os; os.fork()",
                                     "import ctypes; ctypes.CDLL(None)", "import os; os.execv('/bin/ls', ['ls'])"])
def test_no_processes_and_no_native_calls(attempt):
    assert "sandbox" in run_code(attempt, timeout=30).error


SPAWN = "\nimport multiprocessing.util as u, os, time\nu.spawnv_passfds(b'/bin/sh', [b'sh', b'-c', b'echo out > escape'], [])"


@unix
@pytest.mark.parametrize("past", ["", PAST_THE_REFUSAL], ids=["python", "kernel"])
def test_pythons_own_way_to_start_a_program_is_shut(past):
    """
    The fork_exec that multiprocessing calls raises no audit event: a shell ran and wrote a file, and six children had 1.1 GB between them under a
    limit of 256 MB, which is one process's.
    """
    if past:
        need("seccomp")
    result = run_code(past + "import os\ntry:" + SPAWN.replace("\n", "\n    ") + "\nfinally:\n    import time; time.sleep(0.2); print(os.listdir())", timeout=30)
    assert result.stdout == "[]\n" and ("not permitted" in result.error if past else "sandbox: _posixsubprocess.fork_exec" in result.error), result


@linux
@pytest.mark.parametrize("attempt", ["os.fork()", "os.posix_spawn('/bin/ls', ['ls'], {})", "os.execv('/bin/ls', ['ls'])", "os.memfd_create('memory that no limit counts')"])
def test_the_kernel_refuses_processes_and_memory_beside_the_limit(attempt):
    need("seccomp")
    assert "Operation not permitted" in run_code(PAST_THE_HOOK + "\nimport os\n" + attempt, timeout=30).error


@linux
def test_neither_an_open_socket_nor_a_ring_is_of_use():
    """Without the filter the kernel says what is wrong with the arguments: no such descriptor, no such address."""
    need("seccomp")
    calls = "lambda: libc.connect(-1, None, 0), lambda: libc.syscall(425, 1, None)" # io_uring_setup has this number on every machine
    result = run_code(PAST_THE_HOOK + f"\nimport ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint([(call(), ctypes.get_errno()) for call in ({calls})])", timeout=30)
    assert result.stdout == f"[(-1, {errno.EPERM}), (-1, {errno.EPERM})]\n", result


@linux
def test_no_other_number_or_flag_of_a_call_gets_through():
    """A process by each name that the kernel has for it (clone3, clone without a thread's flag, x86-64's second numbers), and memory shared."""
    need("seccomp")
    calls = "libc.fork(), libc.vfork(), libc.shmget(0, 4096, 0o1600), libc.syscall(435, 0, 0)"
    if os.uname().machine == "x86_64":
        calls += ", libc.syscall(56, 17, 0, 0, 0, 0), libc.syscall(1 << 30 | 57)"
    result = run_code(PAST_THE_HOOK + f"\nimport ctypes\nlibc = ctypes.CDLL(None)\nprint({{*({calls})}})", timeout=30)
    assert result.stdout == "{-1}\n", result


def test_threads_may_start():
    result = run_code("from concurrent.futures import ThreadPoolExecutor\nprint(*ThreadPoolExecutor(3).map(abs, range(-3, 0)))", timeout=30)
    assert result.ok and result.stdout == "3 2 1\n", result


@unix
def test_without_seccomp_a_limit_refuses_processes():
    """Root is above it, so it is tried as somebody else."""
    code = "import os, resource\nfrom nanochat.execution import no_processes\nos.getuid() or os.setuid(65534)\nno_processes()\ntry:\n    os.fork()\nexcept OSError:\n    print('refused')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "refused\n"


@linux
def test_it_cannot_see_or_signal_us_and_leaves_no_orphans(tmp_path):
    need("processes", "files")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        code = PAST_THE_HOOK + f"\nimport os\nprint(os.getpid(), os.listdir('/proc'))\nos.kill({victim.pid}, 9)"
        result = run_code(code, timeout=30)
        assert result.stdout == "1 []\n" and ("ProcessLookupError" in result.error or "PermissionError" in result.error), result
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
    marker = "987654321.25"
    code = PAST_THE_HOOK + f"\nimport os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['sleep', '{marker}'])\ntime.sleep(0.3)"
    result = run_code(code, timeout=30)
    assert result.ok or "not permitted" in result.error # where there is seccomp it does not get as far as an orphan
    assert not running(marker)


@linux
def test_what_the_kernel_shut_cannot_be_opened_again():
    need("files")
    code = PAST_THE_HOOK + ("\nimport ctypes\nlibc = ctypes.CDLL(None)\n"
                            "print(libc.mount(b'none', b'/', None, 32 | 4096, None), libc.umount(b'/proc'), libc.sethostname(b'x', 1))")
    assert run_code(code, timeout=30).stdout == "-1 -1 -1\n"


@linux
def test_where_our_user_cannot_be_mapped_the_other_guards_hold():
    """Namespaces allowed and /proc read-only, or AppArmor against the map: the sandbox died of the OSError, and HumanEval's every answer was wrong."""
    need("network", "processes", "files")
    code = PAST_THE_HOOK + "\nimport os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('hi')\nprint(os.getpid(), open('a/b/c').read())"
    code = READ_ONLY_PROC + f"from nanochat.execution import run_code\nresult = run_code({code!r}, timeout=30)\nprint(result.stdout, *result.guards, result.error)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    held = [guard for guard in run_code("pass", timeout=30).guards if guard != "files"]
    assert said.stdout == f"1 hi\n {' '.join(held)} None\n", said


@linux
@pytest.mark.parametrize("before", ["", READ_ONLY_PROC], ids=["mapped", "not mapped"])
def test_namespaces_alone_shut_network_and_processes(tmp_path, before):
    """Without seccomp and the hook, which would refuse the same earlier."""
    need("network", "processes", *(["files"] if before else []))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        code = (f"from nanochat.execution import isolate\nprint(*isolate({str(tmp_path)!r}))\nimport ctypes, os, socket\n"
                f"print(os.getpid(), ctypes.CDLL(None).unshare({0x40000000}))\n" # no capability is left to make another network with
                f"for reach in (lambda: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2), lambda: os.kill({os.getpid()}, 0)):\n"
                f"    try:\n        reach()\n    except OSError as error:\n        print(type(error).__name__, error.errno)")
        said = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True)
        assert said.stdout == f"network processes{'' if before else ' files'}\n1 -1\nOSError {errno.ENETUNREACH}\nProcessLookupError {errno.ESRCH}\n", said
        with pytest.raises(BlockingIOError):
            server.accept()


def test_our_environment_stays_with_us(monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    assert "hunter2" not in run_code("import os; print(os.environ)", timeout=30).stdout


def test_it_runs_in_any_thread():
    results = [None] * 4
    def work(i):
        results[i] = run_code(f"print({i})", timeout=60).stdout
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == ["0\n", "1\n", "2\n", "3\n"]


@pytest.mark.parametrize("options", [dict(timeout=0), dict(memory_mb=1)])
def test_limits_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        run_code("pass", **options)
