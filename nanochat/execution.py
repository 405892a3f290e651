"""
Run Python that a model wrote: code in, what became of it out. HumanEval is what needs it.

    run_code("print(1 + 1)") -> Result(ok=True, stdout="2\n", stderr="", error=None, guards=("limits", "network", ...))

The code runs in a process of its own, in an empty folder that is deleted afterwards, without our environment variables.
What keeps it there, layer on layer; `Result.guards` names those that held on this machine:
    limits     memory, processor time, file size (Unix), and everywhere a wall-clock timeout that kills the whole group
    network    Linux: a network namespace with nothing in it
    processes  Linux: a process namespace; it can signal nobody else, and nothing it starts outlives it
    files      Linux: a mount namespace where all is read-only but the folder, /proc is empty (so it sees no other process), the folder is 64 MB of memory
    landlock   Linux: the kernel refuses writes outside the folder, TCP, and signals to others, also where namespaces are forbidden
    seccomp    Linux on x86-64 and 64-bit ARM: the kernel refuses new processes and programs, sockets of every kind, and memory that no limit counts
    audit      everywhere: a Python audit hook refuses sockets, processes, ctypes, and writes outside the folder

What it does not cover. Files that our user may read can be read (with `seccomp` held no socket carries them away). The audit
hook lives in the process that it watches and can be undone from there: where only it held (macOS, Windows), it stops
accidents, not attackers; network alone leaves Unix sockets on disk open, landlock alone UDP too. Windows has no memory limit,
macOS none on address space. A memory limit is one process's, and holds as long as there is one: without seccomp a Unix is told to
allow no other, which it does not hold root to.
Processor caches, kernel bugs and code that guesses our end marker are out of scope: for code from strangers use a
virtual machine. The standard library is there, installed packages are not.
"""

import json
import os
import sys

FOLDER_MB = 64     # what the code may write, in memory
OUTPUT_MB = 4      # longest file, stdout and stderr included
OPEN_FILES = 64    # at once
KEEP_CHARS = 20_000 # of stdout and of stderr that we hand back


def run_code(code, timeout=5.0, memory_mb=256):
    """
    Run `code` as a script. ok means: it came to its last line, without an exception, within its limits. Code that
    leaves early (sys.exit) is not ok, so that nothing passes a test by never reaching it.

    timeout    seconds on the clock, start of Python included
    memory_mb  address space; Python itself needs about 30
    """
    import secrets
    import subprocess
    import tempfile
    if timeout <= 0 or memory_mb < 32:
        raise ValueError(f"got timeout {timeout} and memory_mb {memory_mb}: expected more than 0 s, and at least 32 MB for Python itself")
    nonce = secrets.token_hex(16)
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    if os.name == "nt":
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"] # without it Python does not start
    with tempfile.TemporaryDirectory(prefix="nanochat-run-", ignore_cleanup_errors=True) as outer:
        folder = os.path.join(os.path.realpath(outer), "work")
        os.mkdir(folder)
        environment.update({name: folder for name in ("HOME", "TMPDIR", "TEMP", "TMP")})
        with (open(os.path.join(outer, "stdout"), "w+b") as out, open(os.path.join(outer, "stderr"), "w+b") as err,
              open(os.path.join(outer, "guards"), "w+b") as told):
            request = json.dumps(dict(code=code, folder=folder, told=told.name, memory_mb=memory_mb, timeout=timeout, nonce=nonce)).encode()
            process = subprocess.Popen([sys.executable, "-I", "-S", os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=out,
                                       stderr=err, cwd=folder, env=environment, start_new_session=os.name == "posix")
            late = False
            try:
                process.communicate(request, timeout=timeout)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                kill_group(process)
            return read_result(process.returncode, late, nonce, tuple(read(told).split()), read(out), read(err), timeout, memory_mb)


def read_result(code, late, nonce, guards, stdout, stderr, timeout, memory_mb):
    """Our last line of stderr says that the end was reached; what comes before is the code's own. No guards: it never ran."""
    done = stderr.endswith(f"{nonce} done\n")
    stderr = stderr.removesuffix(f"{nonce} done\n")
    if done and code == 0 and not late:
        error = None
    elif not guards:
        error = f"sandbox: it did not start {f'in {timeout:g} s' if late else f'(exit code {code})'} {' '.join(stderr.split())[-500:]}".strip()
    elif late:
        error = f"timeout: still running after {timeout:g} s"
    elif "MemoryError" in stderr[-200:]:
        error = f"memory: it wanted more than {memory_mb} MB"
    elif code < 0:
        error = f"killed by signal {-code}"
    else:
        lines = stderr.strip().splitlines()
        error = lines[-1] if lines else f"it left by itself with exit code {code}"
    return Result(error is None, stdout[:KEEP_CHARS], stderr[-KEEP_CHARS:], error, guards)


class Result:
    """ok; stdout and stderr (start and end of them, if long); error: None or one line; guards: the layers that held."""

    def __init__(self, ok, stdout, stderr, error, guards):
        self.ok, self.stdout, self.stderr, self.error, self.guards = ok, stdout, stderr, error, guards

    def __repr__(self):
        return f"Result(ok={self.ok}, stdout={self.stdout!r}, stderr={self.stderr!r}, error={self.error!r}, guards={self.guards})"


def read(file):
    file.seek(0)
    return file.read(OUTPUT_MB * 2**20).decode("utf-8", errors="replace").replace("\r\n", "\n")


def kill_group(process):
    """End the process and all it started; it may have ended already."""
    if os.name == "posix":
        import signal
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError): # PermissionError: macOS, for a group that has just ended
            pass
    else:
        process.kill()
    process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# In the child, from here on

def child():
    """Shut every door, then run the code. Started as a script by run_code, with a request on stdin."""
    request = json.loads(sys.stdin.buffer.read())
    folder, nonce = request["folder"], request["nonce"]
    told = open(request["told"], "w") # outside the folder and closed before the code runs: it cannot take back that it was started
    guards = limit(request["memory_mb"], request["timeout"])
    if sys.platform == "linux":
        guards += isolate(folder) # what follows may run in a forked process
        guards += landlock(folder)
        guards += seccomp()
    if os.name == "posix":
        if "seccomp" not in guards:
            no_processes()
        refuse_fork_exec()
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    report = os.dup(2) # the code may close its stderr
    sys.addaudithook(audit_hook(folder))
    with told:
        told.write(" ".join(guards + ["audit"]))

    import traceback
    import types
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    streams, last = (sys.stdout, sys.stderr), f"{nonce} done\n"
    try:
        exec(compile(request["code"], "<code>", "exec"), main.__dict__)
    except BaseException as error: # also SystemExit and KeyboardInterrupt: whatever it is, it is the code's own end
        error.__traceback__ = error.__traceback__.tb_next # without our own frame
        last = "".join(traceback.format_exception(error))
    for stream in streams:
        if not stream.closed:
            stream.flush()
    os.write(report, last.encode("utf-8", errors="replace"))
    os._exit(0) # threads and exit handlers of the code have no say


def limit(memory_mb, timeout):
    if os.name != "posix":
        return []
    import math
    import resource
    seconds = math.ceil(timeout) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT_MB * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES)) # a pipe holds memory too
    if sys.platform != "darwin": # macOS has the call but refuses it
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20,) * 2)
    return ["limits"]


def isolate(folder):
    """
    Linux namespaces, by an ordinary user: new user, network, process, IPC and mount namespaces; then all capabilities are
    dropped, so nothing of it can be undone. Returns the guards that held; [] where the system forbids it (as in many
    containers). Returns in a fork that is process 1 of its namespace; the process that was called waits for it.
    """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NEWUSER | NEWNET | NEWPID | NEWIPC | NEWNS) != 0:
        return []
    guards = ["network", "processes"]
    if map_user(uid, gid) and read_only_but(libc, folder): # a user who is not mapped could make nothing in a file system of ours
        guards.append("files")

    pid = os.fork()
    if pid > 0:
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    PDEATHSIG, SIGKILL = 1, 9
    libc.prctl(PDEATHSIG, SIGKILL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0) # capability version 3, this process
    dropped = libc.capset(header, (ctypes.c_uint32 * 6)()) == 0
    return guards if dropped else []


def map_user(uid, gid):
    """Stay who we are in our own user namespace. False where that is refused: /proc read-only, as in some containers, or AppArmor (Ubuntu 24.04)."""
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def read_only_but(libc, folder):
    """In our own mount namespace: everything read-only, an empty /proc, and a small file system in memory at `folder`."""
    import ctypes
    PRIVATE, RECURSIVE_MOUNT, RECURSIVE, RDONLY, HERE, MOUNT_SETATTR = 0x40000, 0x4000, 0x8000, 1, -100, 442
    attributes = (ctypes.c_uint64 * 4)(RDONLY, 0, 0, 0) # set, clear, propagation, user namespace
    return (libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE_MOUNT, None) == 0
            and libc.syscall(MOUNT_SETATTR, HERE, b"/", RECURSIVE, attributes, ctypes.sizeof(attributes)) == 0
            and libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={FOLDER_MB}m,mode=700".encode()) == 0
            and libc.mount(b"none", b"/proc", b"tmpfs", RDONLY, b"size=4k") == 0)


def landlock(folder):
    """Landlock (Linux 5.13 and later, any user): from here on this process may write beneath `folder` only."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    CREATE, ADD, RESTRICT, NO_NEW_PRIVS = 444, 445, 446, 38
    version = libc.syscall(CREATE, None, 0, 1)
    if version < 1:
        return []
    writes = 1 << 1 | sum(1 << bit for bit in range(4, 13)) # write a file; remove and make everything there is
    writes |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) # move between folders; truncate
    rules = (ctypes.c_uint64 * 3)(writes, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0) # files; TCP; sockets, signals
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(CREATE, rules, size, 0)
    if ruleset < 0:
        return []
    for path, allowed in ((folder, writes), (os.devnull, writes & (1 << 1 | 1 << 14))):
        place = os.open(path, os.O_PATH)
        rule = allowed.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        if libc.syscall(ADD, ruleset, 1, rule, 0) != 0:
            return []
        os.close(place)
    held = libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.syscall(RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return ["landlock"] if held else []


# By machine: its number for the kernel; clone, refused where it does not make a thread; clone3, whose flags a filter cannot see; what is
# refused always: fork, vfork, execve, execveat, memfd_create, memfd_secret, shmget; socket, connect, socketpair (a pair of datagrams sends to any
# path), io_uring_setup (a ring makes sockets without a call)
CALLS = {"x86_64": (0xC000003E, 56, 435, (57, 58, 59, 322, 319, 447, 29, 41, 42, 53, 425)),
         "aarch64": (0xC00000B7, 220, 435, (221, 281, 279, 447, 194, 198, 203, 199, 425))}


def seccomp():
    """A filter before every call to the kernel, for good: threads may start, processes and programs may not, nor sockets be made. [] on a machine not in CALLS."""
    import ctypes
    import struct
    if os.uname().machine not in CALLS or sys.maxsize < 2**32:
        return []
    machine, clone, clone3, refused = CALLS[os.uname().machine]
    LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
    ALLOW, REFUSE, UNKNOWN, THREAD = 0x7FFF0000, 0x50000 | 1, 0x50000 | 38, 0x10000 # EPERM; ENOSYS: the C library then takes clone
    # (operation, steps skipped where it holds, where it does not, operand); a call's number is at 0, its machine at 4, its first argument at 16
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, 1 << 30), (RETURN, 0, 0, REFUSE)] # x86-64 has each call a second time, up there
    for call in refused:
        steps += [(EQUAL, 0, 1, call), (RETURN, 0, 0, REFUSE)]
    steps += [(EQUAL, 0, 1, clone3), (RETURN, 0, 0, UNKNOWN)]
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, THREAD), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(packed))
    libc = ctypes.CDLL(None, use_errno=True)
    NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2
    held = libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.prctl(SECCOMP, FILTER, program, 0, 0) == 0
    return ["seccomp"] if held else []


def no_processes():
    """Where there is no seccomp: at most as many processes of our user as there are (on Linux also threads). Root may have more."""
    import resource
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def refuse_fork_exec():
    """What subprocess and multiprocessing start programs with has no audit event: a refusal takes its place before they import it."""
    import _posixsubprocess

    def fork_exec(*arguments):
        raise PermissionError("sandbox: _posixsubprocess.fork_exec is not allowed")
    _posixsubprocess.fork_exec = fork_exec


REFUSED = ("socket.", "subprocess.", "ctypes.", "pty.", "winreg.", "_winapi.", "webbrowser.", "os.system", "os.exec", "os.fork", "os.spawn",
           "os.posix_spawn", "os.startfile", "os.kill", "signal.pthread_kill", "sqlite3.load_extension", "syslog.")
CHANGES = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1, "os.utime": 1,
           "os.chmod": 1, "os.chown": 1, "os.chflags": 1, "os.setxattr": 1, "os.removexattr": 1, "sqlite3.connect": 1} # event: paths among its arguments


def audit_hook(folder):
    """Python calls it before it does anything that matters (PEP 578); raising refuses."""
    realpath, fsdecode, devnull, separator = os.path.realpath, os.fsdecode, os.devnull, os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def check(path, event):
        if isinstance(path, int) or path in (devnull, ":memory:"):
            return # a file that is open already was checked when it was opened
        path = realpath(fsdecode(path))
        if path != folder and not path.startswith(folder + separator):
            raise PermissionError(f"sandbox: {event} outside the folder: {path}")

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if path is not None and (flags & writing or (isinstance(mode, str) and set(mode) & set("wax+"))):
                check(path, event)
        elif event in CHANGES:
            for path in arguments[:CHANGES[event]]:
                check(path, event)
        elif event.startswith(REFUSED):
            raise PermissionError(f"sandbox: {event} is not allowed")

    return hook


if __name__ == "__main__":
    child()
