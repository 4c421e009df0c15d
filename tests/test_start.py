"""How worker processes come to be: copies of their supervisor, and new programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import wait_for
from fake_server import FakeServer, Running, running_worker

from dmap import work
from dmap.start import Forked
from jobserver.protocol import GrabJobs, Hello, WorkComplete

pytestmark = pytest.mark.slow

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux only")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with tempfile.TemporaryDirectory(prefix="dmap-") as name, FakeServer(Path(name)) as fake:
        yield fake


def value_of(server: FakeServer, function: Callable[..., Any], *args: Any) -> Any:
    """Have a worker call a function, and return what that returns."""
    job = server.make("dmap", work.dump_call(args, {}), blobs=server.put(function))
    server.assign_to_next(job)
    done = server.wait(WorkComplete, lambda message: message.jobs[0].handle == job.handle)
    return work.load_result(done.bodies[0])


def argv_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def is_forked(worker: Running, child: int) -> bool:
    return argv_of(child) == argv_of(worker.process.pid)


def look_around() -> dict[str, object]:
    """Return what a process has of those that started it."""
    import gc
    import os
    import re
    import signal
    import sys
    import threading

    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{name}") or name in "012":
            link = os.readlink(f"/proc/self/fd/{name}")
            descriptors.append(re.sub(r"\[\d+\]", "", link) if int(name) > 2 else link)
    return {
        "descriptors": sorted(descriptors),
        "blocks on them": [os.get_blocking(fd) for fd in range(3)],
        "leads its session": os.getsid(0) == os.getpid(),
        "folder": os.getcwd(),
        "path": sys.path,
        "argv": sys.argv,
        "main": sorted({*vars(sys.modules["__main__"])} - {"sys", "main"}),
        "environment": dict(os.environ),
        "handlers": [repr(signal.getsignal(number))[:16] for number in signal.valid_signals()],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "threads": [thread.name for thread in threading.enumerate()],
        "collects": (gc.isenabled(), gc.get_threshold()),
    }


@needs_fork
@pytest.mark.parametrize("safe_path", ["", "1"])
def test_a_forked_child_is_as_one_that_is_a_new_program(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, safe_path: str
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    stray = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(stray, True)
    try:
        with running_worker([server], stdin=subprocess.PIPE, pass_fds=(stray,)) as worker:
            os.close(stray)
            stray = -1
            server.wait(Hello, lambda hello: hello.child == 1)
            (first,) = worker.children()
            assert is_forked(worker, first)
            of_forked = value_of(server, look_around)
            os.kill(first, signal.SIGKILL)
            server.wait(Hello, lambda hello: hello.child == 2)
            server.heard.clear()  # of the first one's grab
            (second,) = worker.children()
            assert not is_forked(worker, second)
            of_new = value_of(server, look_around)
    finally:
        if stray >= 0:
            os.close(stray)
    assert of_forked == of_new


@needs_fork
def test_forked_children_hold_nothing_of_each_other(server: FakeServer) -> None:
    with running_worker([server], "--processes", "3") as worker:
        server.wait_until(lambda: len(server.hellos) == 4)
        children = worker.children()
        assert [is_forked(worker, child) for child in children] == [True] * 3
        holders: dict[tuple[str, int], set[int]] = {}  # a page or a socket -> who holds it
        for child in children:
            for link in Path(f"/proc/{child}/fd").iterdir():
                kind = os.readlink(link).partition("[")[0].removesuffix(" (deleted)")
                if kind in ("/memfd:dmap-page", "socket:"):
                    holders.setdefault((kind, link.stat().st_ino), set()).add(child)
    assert {len(pids) for pids in holders.values()} == {1}
    assert [kind for kind, _ in holders].count("/memfd:dmap-page") == 3


@needs_fork
def test_a_forked_child_dies_with_its_supervisor(server: FakeServer) -> None:
    with running_worker([server], "--processes", "2") as worker:
        server.wait(GrabJobs)
        children = worker.children()
        assert all(is_forked(worker, child) for child in children)
        worker.process.kill()
        worker.process.wait()
        wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


@needs_fork
def test_what_is_imported_for_the_jobs_is_not_in_the_supervisor(
    server: FakeServer, tmp_path: Path
) -> None:
    (tmp_path / "registers.py").write_text(
        "import os\nfrom dmap import job\nwhere = os.getpid()\n"
        "@job('where')\ndef find() -> int:\n    return where\n"
    )
    with running_worker([server], "--import", "registers", cwd=tmp_path) as worker:
        server.assign_to_next(server.make("where", work.dump_named((), {})))
        where = work.load_result(server.wait(WorkComplete).bodies[0])
        assert [where] == worker.children()
        assert is_forked(worker, where)


@needs_fork
def test_forked_children_do_not_share_their_chance(server: FakeServer) -> None:
    def draw() -> tuple[int, float]:
        import os
        import random
        import time

        time.sleep(0.05)  # so that the other one has its turn
        return os.getpid(), random.random()

    with running_worker([server], "--processes", "2") as worker:
        server.wait_until(lambda: len({hello.peer for hello in server.hellos}) == 3)
        drawn = dict(value_of(server, draw) for _ in range(2))
        while len(drawn) < 2:
            drawn.update([value_of(server, draw)])
        assert set(drawn) == set(worker.children())
    assert len(set(drawn.values())) == 2


def test_a_program_that_calls_main_is_not_copied(server: FakeServer) -> None:
    code = (
        "import sys; from dmap.supervisor import main\n"
        f"sys.exit(main(['--servers', {server.address!r}, '--processes', '1']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        pid = value_of(server, os.getpid)
        assert argv_of(pid) != argv_of(process.pid)
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    ("code", "returncode"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)],
)
def test_how_a_forked_process_ended_is_told_as_often_as_one_asks(
    code: str, returncode: int
) -> None:
    argv = [sys.executable, "-c", f"input()\n{code}"]
    read, write = os.pipe()
    pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
    os.close(read)
    process = Forked(pid)
    assert process.poll() is None
    os.write(write, b"\n")
    os.close(write)
    assert [process.wait(), process.poll(), process.wait()] == [returncode] * 3
    process.send_signal(signal.SIGTERM)  # to nobody
