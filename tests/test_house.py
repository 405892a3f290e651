"""
The house rules, read off the files themselves: who may import whom, how long a file may be, and what must never be committed
(secrets, addresses of package registries, paths of somebody's machine). Each checker is also shown an offender of its own making.
"""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanochat", "megacontext", "tasks", "scripts", "tests", "bench")
MAY_IMPORT = {"nanochat": set(), "megacontext": {"nanochat"}, "tasks": {"nanochat"}, "scripts": {"nanochat", "megacontext", "tasks"}}


def imports(source):
    """{(package, module)} of ours that a file imports anywhere, inside functions too; module "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names = [node.module] if "." in node.module else [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {tuple((name + ".").split(".")[:2]) for name in names if name.split(".")[0] in PACKAGES}
    return found


def breaches(package, order, sources):
    """Lines that say which file of a package imports what it must not. order: its files, top first; sources: {file: text}."""
    found = []
    for n, name in enumerate(order):
        for other, module in sorted(imports(sources[name])):
            if other == package:
                if module not in order[:n]:
                    found.append(f"{package}/{name}.py imports {module}, which is not above it")
            elif other not in MAY_IMPORT[package]:
                found.append(f"{package}/{name}.py imports {other}")
    return found


def order_of(package):
    """The files of a package in the order of its README."""
    return re.findall(r"^\| `(\w+)\.py` \| \S", (ROOT / package / "README.md").read_text(), re.M)


def sources_of(package):
    return {path.stem: path.read_text() for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}


@pytest.mark.parametrize("package", ["nanochat", "megacontext"])
def test_a_file_imports_only_from_files_above_it(package):
    order, sources = order_of(package), sources_of(package)
    assert sorted(order) == sorted(sources), "each file has one line in the README of its package"
    assert not breaches(package, order, sources)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_look_down_only(package):
    """Any order inside a package will do here: scripts share a few modules, and nobody but a script imports a script."""
    sources = sources_of(package)
    assert not [line for line in breaches(package, list(sources), sources) if "not above" not in line]


def test_scripts_share_helpers_and_no_script_runs_another():
    shared = {module for source in sources_of("scripts").values() for package, module in imports(source) if package == "scripts"}
    commands = {name for name, source in sources_of("scripts").items() if '__name__ == "__main__"' in source}
    assert not shared & commands


def test_the_readme_has_a_phrase_for_each_script():
    listed = re.findall(r"^\| `(\w+\.\w+)` \| \S", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "scripts").iterdir() if path.is_file() and path.name != "__init__.py")


def test_every_path_that_a_readme_names_is_there():
    """Words in backquotes that look like one of our paths."""
    for readme in [*ROOT.glob("*/README.md"), ROOT / "README.md", ROOT / "runs/multinode.md"]:
        for name in re.findall(r"`((?:nanochat|megacontext|scripts|tasks|tests|runs|bench|rustbpe)/[\w/.]*\w)`", readme.read_text()):
            assert (ROOT / name).exists() or name == "rustbpe/dist", f"{readme.relative_to(ROOT)} names {name}"


def test_an_offender_is_found():
    sources = {"a": "import torch\n", "b": "from nanochat import a\nfrom nanochat.c import x\n", "c": "def f():\n    import megacontext.tree\n    from tasks import common\n"}
    assert breaches("nanochat", ["a", "b", "c"], sources) == [
        "nanochat/b.py imports c, which is not above it", "nanochat/c.py imports megacontext", "nanochat/c.py imports tasks"]


def test_nanochat_lives_without_megacontext():
    """Every module of it loads where megacontext, tasks and scripts cannot be imported at all."""
    code = ("import importlib, sys\nfor name in ('megacontext', 'tasks', 'scripts'):\n    sys.modules[name] = None\n"
            f"for name in {sorted(sources_of('nanochat'))}:\n    importlib.import_module('nanochat.' + name)\n")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


WITHOUT_UNIX = """
import builtins, importlib, mmap, os, signal, sys, types
absent = {os: "fork getuid getgid setuid setgid setsid killpg uname sysconf pread pwrite posix_fallocate posix_fadvise fdatasync sched_getaffinity getloadavg fchmod chown O_DIRECTORY O_NONBLOCK",
          signal: "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGQUIT SIGXCPU alarm setitimer pthread_sigmask", mmap: "MADV_DONTNEED MAP_PRIVATE MAP_SHARED PROT_READ"}
seen_by_us = dict.fromkeys(("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"))
for module, names in absent.items():
    seen_by_us[module.__name__] = types.ModuleType(module.__name__)
    vars(seen_by_us[module.__name__]).update({name: value for name, value in vars(module).items() if name not in names.split()})
real = builtins.__import__
def windows(name, globals=None, *args, **settings):
    if name in seen_by_us and (globals or {}).get("__name__", "").startswith(("nanochat.", "megacontext.", "tasks.", "scripts.", "bench.")):
        if seen_by_us[name] is None:
            raise ModuleNotFoundError(f"No module named {name!r}, for {globals['__name__']}", name=name)
        return seen_by_us[name]
    return real(name, globals, *args, **settings)
builtins.__import__ = windows
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_every_module_is_imported_where_there_is_no_unix(tmp_path):
    """Windows, as far as an import can tell: modules of ours get its os, signal and mmap, and no fcntl or resource. An offender is stopped. (Two said not even their --help.)"""
    names = [f"{package}.{name}" for package in ("nanochat", "megacontext", "tasks", "scripts", "bench") for name in sorted(sources_of(package))]
    subprocess.run([sys.executable, "-c", WITHOUT_UNIX, *names], cwd=ROOT, check=True)
    (tmp_path / "nanochat").mkdir()
    for source, said in (("import fcntl", "No module named 'fcntl', for nanochat.offender"), ("import signal\nsignal.SIGKILL", "has no attribute 'SIGKILL'"), ("from os import pread", "cannot import name 'pread'")):
        (tmp_path / "nanochat" / "offender.py").write_text(source)
        found = subprocess.run([sys.executable, "-c", WITHOUT_UNIX, "nanochat.offender"], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
        assert found.returncode == 1 and said in found.stderr


def test_the_plan_is_told_where_there_is_no_unix_and_a_run_is_refused(tmp_path):
    speedrun = WITHOUT_UNIX + "\nfrom nanochat.common import run_main\nfrom scripts.speedrun import main\nrun_main(main)\n"
    for flags, code, said, told in (("--plan", 0, "\npython -m scripts.tok_train ", ""), ("--brief", 0, " cores, RAM unknown, ", ""), ("", 2, "", "error: no run here: expected a system with flock")):
        command = [sys.executable, "-c", speedrun.replace("sys.argv[1:]", "()"), *flags.split()]
        found = subprocess.run(command, cwd=ROOT, env={"NANOCHAT_BASE_DIR": str(tmp_path), "PATH": "", "TIER": "cpu"}, capture_output=True, text=True)
        assert found.returncode == code and said in found.stdout and found.stderr.startswith(told) and found.stderr.count("\n") == bool(told), found
    assert not (tmp_path / "stages" / "lock").exists()


def too_long(name, source):
    """Files are asked to be two at some 400 lines, functions at some 60; here is where asking ends."""
    lines = source.count("\n")
    found = [f"{name}: {lines} lines"] if lines > 450 else []
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return found + [f"{name}, {node.name}: {node.end_lineno - node.lineno + 1} lines" for node in functions if node.end_lineno - node.lineno >= 80]


def test_files_and_functions_stay_short():
    assert not [line for package in MAY_IMPORT for name, source in sources_of(package).items() for line in too_long(f"{package}/{name}.py", source)]
    assert too_long("x", "def f():\n" + "    pass\n" * 80) == ["x, f: 81 lines"] and too_long("x", "\n" * 451) == ["x: 451 lines"]


# ---------------------------------------------------------------------------------------------------------------------
# What must never be committed. Patterns are written so that they do not match themselves.

SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{60}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[0-9A-Za-z_-]{35}|\bxox[abpr]-[0-9A-Za-z-]{10,}",
    "a web token": r"\beyJ[A-Za-z0-9_-]{15,}\.eyJ[A-Za-z0-9_-]{15,}\.",
    "a password in an address": r"\w+://[^/\s:@'\"{}]+:[^/\s:@'\"{}]{3,}@",
    "a secret by name": r"(?i)\b(?:wandb_api_key|hf_token|api_key|secret_key|password|passwd)\s*[=:]\s*['\"]?[A-Za-z0-9+/_-]{16,}",
}
HOSTS = r"(?i)\b(?:py[p]i\.org|pythonhoste[d]\.org|crate[s]\.io|static\.rust-lan[g]\.org|npmj[s]\.(?:org|com)|proxy\.golan[g]\.org|repo1?\.mave[n]|anacond[a]\.(?:com|org)|deb\.debia[n]\.org|download\.pytorc[h]\.org)"
PLACES = r"(?<![\w.])/(?:roo[t]|wor[k]|opt/wheel[s]|home/[a-z]\w*|Users/[A-Za-z]\w*|mnt/[a-z]\w*)/\w"


def offences(text):
    found = [what for what, pattern in SECRETS.items() if re.search(pattern, text)]
    found += [f"a package registry: {match[0]}" for match in re.finditer(HOSTS, text)]
    return found + [f"a place on one machine: {match[0]}" for match in re.finditer(PLACES, text)]


def tracked():
    """Paths of all files that git tracks, or would after `git add`."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so nobody says which files are part of the project")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_is_tracked_that_must_not_be():
    found = []
    for path in tracked():
        data = path.read_bytes()
        found += [f"{path.relative_to(ROOT)}: {what}" for what in offences(data.decode("utf-8", errors="ignore"))]
        if len(data) > 1_000_000:
            found.append(f"{path.relative_to(ROOT)}: {len(data):,} bytes, more than a source file has")
    assert not found


@pytest.mark.parametrize("text", [
    "-----BEGIN RSA " + "PRIVATE KEY-----", "AKIA" + "ABCDEFGHIJKLMNOP", "ghp_" + "a1" * 18, "hf_" + "Ab1" * 11, "sk-" + "proj-" + "a1b2" * 6, "https://me:" + "hunter2@example.org/x",
    "WANDB_API_KEY=" + "0123456789abcdef" * 2, "password = '" + "correct-horse-battery" + "'", "pip install -i https://pypi" + ".org/simple", "index.crates" + ".io", "cd /root" + "/project", "/home" + "/alice/data"])
def test_an_offence_is_seen(text):
    assert offences(f"before {text} after")


@pytest.mark.parametrize("text", ["https://huggingface.co/datasets/x/resolve/main", "http://127.0.0.1:8000", "~/.cache/nanochat", "tasks-3", "dir:/path/to/texts", "password = getpass()", "work/root/home", "sk-learn"])
def test_what_is_harmless_is_let_be(text):
    assert not offences(text)


def test_the_scripts_of_the_shell_parse():
    for name in (".ci/run", "runtests.sh", "speedrun.sh", "runs/setup.sh", "runs/gpu_check.sh"):
        subprocess.run(["bash", "-n", name], cwd=ROOT, check=True)
        assert (ROOT / name).read_text().startswith("#!/usr/bin/env bash\n")
