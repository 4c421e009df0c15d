"""What holds for every test: it leaves nothing behind.

A process that a test starts is known by a mark in its environment, or by its being a child of this
one; a file by its place: TMPDIR is a folder of this run alone. So runs can stand side by side, and
a process that was re-parented to init is found all the same.
"""

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

PROC = Path("/proc")
GRACE = 2.0  # seconds that what is ending may take to be gone
MARK = f"DMAP_TEST_MARK={secrets.token_hex(8)}"
KEEP = "DMAP_TEST_KEEP=1"

Litter = int | Path  # a process or a file

bystanders: set[int] = set()  # pids that were here before us and are none of ours
stale: set[Litter] = set()  # files that an earlier run left
outside = Path(tempfile.gettempdir())


def pytest_configure(config: pytest.Config) -> None:
    """Mark the environment, give this run a temp folder of its own, and choose the profile."""
    bystanders.update(pids())
    name, _, value = MARK.partition("=")
    os.environ[name] = value
    os.environ.pop("DMAP_SERVERS", None)  # no test reaches the developer's own cluster
    # pytest's tmp_path stays where people look for it. Ours is short: a socket's path has at most
    # 107 bytes.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(outside))
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="dt-", dir=outside)
    stale.update(files())

    # A shared machine is no reason to fail: nothing here depends on how fast an example ran.
    common = hypothesis.settings(
        deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.register_profile("dev", common)
    hypothesis.settings.register_profile("ci", common, derandomize=True, database=None)
    hypothesis.settings.load_profile("ci" if "CI" in os.environ else "dev")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if what was kept for longer than a test is there at its end."""
    if dmap := sys.modules.get("dmap"):
        dmap.shutdown()
    left = wait_gone(stale, kept=True)
    if left:
        print("\nleft at the end of the run:", *left, sep="\n  ", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    """Remove this run's temp folder, also after a run that only collected or failed to start."""
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves a process, a `dmap-*` in the temp folder, or shared memory.

    What was there before the test (from a fixture of its module) does not count, nor does what is
    `kept`.
    """
    before = litter(kept=False)
    yield
    if left := wait_gone(before, kept=False):
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="module")
def kept() -> Iterator[None]:
    """Let what is started from here on live as long as its module, say a local cluster.

    Its processes are known by DMAP_TEST_KEEP=1 in their environment.
    """
    before = litter(kept=True)
    name, _, value = KEEP.partition("=")
    os.environ[name] = value
    yield
    del os.environ[name]
    if left := wait_gone(before, kept=True):
        pytest.fail("left behind by its module:\n  " + "\n  ".join(left), pytrace=False)


def wait_gone(before: set[Litter], *, kept: bool) -> list[str]:
    """Wait until nothing is there but `before`; kill, remove and describe what stays."""
    deadline = time.monotonic() + GRACE
    while left := litter(kept=kept) - before:
        if time.monotonic() > deadline:
            return sorted(end(what) for what in left)
        time.sleep(0.01)
    return []


def litter(*, kept: bool) -> set[Litter]:
    """Find the processes and files of this run, with or without those that are kept."""
    name = KEEP.partition("=")[0]
    return {*processes(kept=kept), *(files() if kept or name not in os.environ else ())}


def end(what: Litter) -> str:
    """Kill a process or remove a file, and say what it was."""
    if isinstance(what, Path):
        shutil.rmtree(what) if what.is_dir() else what.unlink(missing_ok=True)
        return str(what)
    argv = read(what, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    with contextlib.suppress(ProcessLookupError):
        os.kill(what, signal.SIGKILL)
    return f"process {what}: {argv or 'ended, but nobody waited for it'}"


def processes(*, kept: bool) -> Iterator[int]:
    """Find the live processes of this run, with or without those that are kept."""
    here = pids()
    bystanders.intersection_update(here)
    for pid in here - bystanders:
        environment = read(pid, "environ").split(b"\0")
        ours = MARK.encode() in environment or parent(pid) == os.getpid()
        if not ours or (not kept and KEEP.encode() in environment):
            continue
        # multiprocessing has one of these a process, until that ends
        if b"multiprocessing.resource_tracker" not in read(pid, "cmdline"):
            yield pid


def pids() -> set[int]:
    """Return the pids of this machine; none where there is no /proc."""
    return {int(name) for name in os.listdir(PROC) if name.isdigit()} if PROC.is_dir() else set()


def parent(pid: int) -> int:
    """Return the pid of a process's parent, 0 if it has gone."""
    stat = read(pid, "stat")
    # pid (name, which may hold spaces and brackets) state parent ...
    return int(stat.rpartition(b")")[2].split()[1]) if stat else 0


def read(pid: int, name: str) -> bytes:
    """Return a file of a process's folder in /proc; empty if that has gone or is not ours."""
    try:
        return (PROC / str(pid) / name).read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def files() -> Iterator[Path]:
    """Find the files and folders that count as litter."""
    yield from Path(os.environ["TMPDIR"]).glob("dmap-*")
    shared = Path("/dev/shm")
    yield from shared.glob("dmap*")
    yield from shared.glob("psm_*")  # multiprocessing.shared_memory
