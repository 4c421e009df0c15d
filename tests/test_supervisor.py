"""The supervisor: children that die, hang, hold too much, and how it all ends."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Heard, Job, Running, running_worker

from dmap import work
from dmap.cores import n_cores
from dmap.supervisor import exit_text, main
from dmap.versions import cloudpickle_label
from jobserver.protocol import (
    CancelJob,
    CanDo,
    ChildLost,
    Error,
    FetchBlob,
    GiveBack,
    Goodbye,
    GrabJobs,
    Hello,
    LaneId,
    Message,
    Range,
    WorkAccepted,
    WorkComplete,
    WorkException,
    WorkFail,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dmap-") as name:
        yield Path(name)


@pytest.fixture
def server(folder: Path) -> Iterator[FakeServer]:
    with FakeServer(folder) as fake:
        yield fake


@pytest.fixture
def worker(server: FakeServer) -> Iterator[Running]:
    with running_worker([server]) as run:
        yield run


def closure(server: FakeServer, function: Callable[..., Any], *args: Any, **fields: Any) -> Job:
    return server.make("dmap", work.dump_call(args, {}), blobs=server.put(function), **fields)


def chunk(server: FakeServer, function: Callable[..., Any], items: list[Any], **fields: Any) -> Job:
    argument = work.dump_chunk(False, items)
    return server.make("dmap", argument, n_items=len(items), blobs=server.put(function), **fields)


def value_of(server: FakeServer, job: Job) -> Any:
    done = server.wait(WorkComplete, lambda message: message.jobs[0].handle == job.handle)
    return work.load_result(done.bodies[0])


def touch_and_wait(path: str) -> str:
    """Say that the job runs, and let it run until its file is gone."""
    import os
    import time

    with open(path, "w"):
        pass
    while os.path.exists(path):
        time.sleep(0.005)
    return "waited"


def touch_and_hold_the_gil(path: str) -> None:
    import itertools

    with open(path, "w"):
        pass
    sum(itertools.repeat(1))  # for ever, in C


def touch_and_swallow(path: str) -> None:
    """Run on whatever is thrown."""
    import time

    with open(path, "w"):
        pass
    while True:
        try:
            time.sleep(10)
        except BaseException:
            continue


# --- deaths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "argument", "exit"),
    [
        (os._exit, 3, "exit code 3"),
        (os._exit, 0, "exit code 0"),
        (lambda number: os.kill(os.getpid(), number), signal.SIGKILL, "SIGKILL"),
        (lambda address: __import__("ctypes").string_at(address), 1, "SIGSEGV"),
    ],
)
def test_a_job_that_ends_its_process_is_named_with_how_it_ended(
    server: FakeServer, worker: Running, function: Callable[..., Any], argument: Any, exit: str
) -> None:
    job = closure(server, function, argument)
    server.assign_to_next(job)
    lost = server.wait(ChildLost).message
    assert lost == ChildLost(1, [job.handle], 0, 1, exit)


def test_a_child_that_died_is_replaced_by_another(server: FakeServer, worker: Running) -> None:
    server.assign_to_next(closure(server, os._exit, 3))
    server.wait(ChildLost)
    server.heard.clear()
    job = closure(server, os.getpid)
    server.assign_to_next(job)
    assert value_of(server, job) in worker.children()
    numbers = [hello.message.child for hello in server.hellos if hello.message.role == "worker"]
    assert numbers == [1, 2]


def test_a_death_names_the_item(server: FakeServer, worker: Running) -> None:
    def kill_at_seventeen(item: int) -> int:
        import os
        import time

        time.sleep(0.002)  # so that no two items are in one slice
        if item == 17:
            os._exit(1)
        return item

    job = chunk(server, kill_at_seventeen, list(range(40)))
    server.assign_to_next(job)
    lost = server.wait(ChildLost).message
    assert (lost.running, lost.item, lost.n_items) == ([job.handle], 17, 1)


def test_what_a_dead_child_had_not_started_is_not_named(
    server: FakeServer, worker: Running
) -> None:
    jobs = [closure(server, os._exit, 3) for _ in range(3)]
    server.assign_to_next(*jobs)
    assert server.wait(ChildLost).message.running == [jobs[0].handle]


def test_a_job_whose_end_was_not_accepted_is_told_as_ended(
    server: FakeServer, worker: Running
) -> None:
    server.accepts = False
    first, second = closure(server, abs, -1), closure(server, os._exit, 3)
    server.assign_to_next(first, second)
    lost = server.wait(ChildLost).message
    assert (lost.running, lost.ended) == ([second.handle], [first.handle])


def test_that_a_later_end_was_accepted_says_nothing_of_an_earlier_one(
    server: FakeServer, worker: Running
) -> None:
    server.accepts = False
    jobs = [closure(server, abs, -1), closure(server, abs, -2), closure(server, os._exit, 3)]
    for job in jobs[:2]:
        peer = server.assign_to_next(job)
        value_of(server, job)
    server.say(peer, WorkAccepted([Range(2, 1)]))
    server.assign_to_next(jobs[2])
    lost = server.wait(ChildLost).message
    handles = [job.handle for job in jobs]
    assert (lost.running, lost.ended) == (handles[2:], handles[:2])


def test_an_idle_child_that_is_killed_is_replaced(server: FakeServer, worker: Running) -> None:
    server.wait(GrabJobs)
    (pid,) = worker.children()
    os.kill(pid, signal.SIGKILL)
    assert server.wait(ChildLost).message == ChildLost(1, [], 0, 0, "SIGKILL")
    server.wait(Hello, lambda hello: hello.child == 2)


def test_a_death_is_told_again_after_a_broken_link(server: FakeServer, worker: Running) -> None:
    job = closure(server, os._exit, 3)
    server.assign_to_next(job)
    server.wait(ChildLost)
    boot = server.boot
    server.restart()
    server.boot = boot  # the same server: it was only the link
    assert server.wait(ChildLost).message.running == [job.handle]


# --- giving back ------------------------------------------------------------------------------


def test_what_a_busy_child_has_not_started_is_given_back(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    jobs = [closure(server, touch_and_wait, str(folder / "a"))]
    jobs += [closure(server, abs, -number) for number in (1, 2)]
    server.assign_to_next(*jobs)
    assert server.wait(GiveBack).message.handles == [jobs[1].handle, jobs[2].handle]
    server.wait_until((folder / "a").exists)  # it may have taken 10 ms to load the function
    (folder / "a").unlink()
    assert value_of(server, jobs[0]) == "waited"
    later = closure(server, abs, -7)
    server.assign_to_next(later)
    assert value_of(server, later) == 7
    assert not server.find(WorkComplete)


def test_a_child_that_holds_the_gil_is_relieved(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    jobs = [closure(server, touch_and_hold_the_gil, str(folder / "a")), closure(server, abs, -1)]
    server.assign_to_next(*jobs)
    assert server.wait(GiveBack).message.handles == [jobs[1].handle]


def test_what_is_done_does_not_wait_for_a_long_job_behind_it(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    def wait_at(place: str) -> str:
        return touch_and_wait(place) if place else "passed"

    short, long = closure(server, wait_at, ""), closure(server, wait_at, str(folder / "a"))
    server.assign_to_next(short, long)
    assert value_of(server, short) == "passed"
    server.wait_until((folder / "a").exists)
    (folder / "a").unlink()
    assert value_of(server, long) == "waited"


# --- cancel and time limits -------------------------------------------------------------------


def start(server: FakeServer, job: Job, mark: Path) -> None:
    server.assign_to_next(job)
    server.wait_until(mark.exists)


def cancel(server: FakeServer, job: Job, child: int = 1) -> None:
    supervisor = next(hello for hello in server.hellos if hello.message.role == "supervisor")
    server.say(supervisor.peer, CancelJob(child, job.handle))


def test_a_cancelled_job_is_interrupted_and_its_process_lives_on(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    job = closure(server, touch_and_wait, str(folder / "a"))
    start(server, job, folder / "a")
    before = worker.children()
    cancel(server, job)
    fail = server.wait(WorkFail).message
    assert (fail.handle, fail.code) == (job.handle, "cancelled")
    later = closure(server, os.getpid)
    server.assign_to_next(later)
    assert [value_of(server, later)] == before


def test_a_cancelled_job_is_interrupted_also_while_it_talks(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    def talk(path: str) -> None:
        from dmap import current_job

        with open(path, "w"):
            pass
        while True:
            current_job().status(1, 2)

    job = closure(server, talk, str(folder / "a"))
    start(server, job, folder / "a")
    cancel(server, job)
    server.wait(WorkFail)
    later = closure(server, abs, -1)
    server.assign_to_next(later)
    assert value_of(server, later) == 1
    assert not server.find(ChildLost)


@pytest.mark.parametrize("stubborn", [touch_and_hold_the_gil, touch_and_swallow])
def test_a_cancelled_job_that_does_not_stop_is_killed_and_nothing_counts_as_lost(
    server: FakeServer, worker: Running, folder: Path, stubborn: Callable[[str], None]
) -> None:
    job = closure(server, stubborn, str(folder / "a"))
    start(server, job, folder / "a")
    cancel(server, job)
    assert server.wait(WorkFail).message.code == "cancelled"
    assert server.wait(ChildLost).message == ChildLost(1, [], 0, 0, "SIGKILL")


def test_a_cancelled_job_that_may_have_been_inside_the_client_costs_its_process(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    """What it left half done there must not be met by the next job."""

    def use_the_client(path: str) -> None:
        import atexit

        import dmap.connection  # noqa: F401

        atexit.register(touch_and_hold_the_gil, path)  # an end that never comes
        touch_and_wait(path)

    job = closure(server, use_the_client, str(folder / "a"))
    start(server, job, folder / "a")
    cancel(server, job)
    assert server.wait(WorkFail).message.code == "cancelled"
    assert server.wait(ChildLost).message == ChildLost(1, [], 0, 0, "exit code 0")
    server.wait(Hello, lambda hello: hello.child == 2)


def test_programs_that_a_stubborn_job_started_are_killed_with_it(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    def start_program(path: str) -> None:
        import subprocess

        program = subprocess.Popen(["sleep", "1000"])
        with open(path + ".pid", "w") as file:
            file.write(str(program.pid))
        touch_and_swallow(path)

    job = closure(server, start_program, str(folder / "a"))
    start(server, job, folder / "a")
    program = int((folder / "a.pid").read_text())
    cancel(server, job)
    server.wait(ChildLost)
    server.wait_until(lambda: gone(program))


def test_a_cancel_that_comes_ahead_of_its_job_is_kept_for_it(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    server.wait(Hello, lambda hello: hello.role == "supervisor")
    peer = server.wait(GrabJobs).peer
    job = closure(server, touch_and_wait, str(folder / "a"))
    cancel(server, job)
    server.assign(peer, job)
    fail = server.wait(WorkFail).message
    assert (fail.handle, fail.code) == (job.handle, "cancelled")
    server.wait(GrabJobs)


def test_a_cancel_of_a_job_that_ended_disturbs_nobody(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    first = closure(server, abs, -1)
    server.assign_to_next(first)
    assert value_of(server, first) == 1
    second = closure(server, touch_and_wait, str(folder / "a"))
    start(server, second, folder / "a")
    cancel(server, first)
    (folder / "a").unlink()
    assert value_of(server, second) == "waited"
    assert not server.find(WorkFail)


def test_a_job_that_exceeds_its_time_fails_and_its_process_lives_on(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    job = closure(server, touch_and_wait, str(folder / "a"), timeout=0.2)
    server.assign_to_next(job)
    fail = server.wait(WorkFail).message
    assert (fail.handle, fail.code) == (job.handle, "timeout")
    assert "0.2 seconds" in fail.text
    later = closure(server, abs, -1)
    server.assign_to_next(later)
    assert value_of(server, later) == 1
    assert not server.find(ChildLost)


def test_an_item_that_exceeds_its_time_is_named(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    def wait_at_three(item: int) -> int:
        import time

        if item == 3:
            time.sleep(100)
        return item

    job = chunk(server, wait_at_three, list(range(6)), item_timeout=0.3)
    server.assign_to_next(job)
    fail = server.wait(WorkFail).message
    assert (fail.code, fail.item, fail.n_items) == ("timeout", 3, 1)


def test_items_that_keep_their_time_may_take_long_together(
    server: FakeServer, worker: Running
) -> None:
    def nap(item: int) -> int:
        import time

        time.sleep(0.02)
        return item

    job = chunk(server, nap, list(range(60)), item_timeout=1.0)
    server.assign_to_next(job)
    assert value_of(server, job) == list(range(60))


def test_a_job_that_holds_the_gil_is_timed_out(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    job = closure(server, touch_and_hold_the_gil, str(folder / "a"), timeout=0.2)
    server.assign_to_next(job)
    assert server.wait(WorkFail).message.code == "timeout"
    assert server.wait(ChildLost).message.running == []


# --- starting ---------------------------------------------------------------------------------


def test_every_child_says_hello_under_its_supervisors_session(server: FakeServer) -> None:
    with running_worker([server], "--processes", "3", "--name", "papag", "--labels", "gpu,big"):
        server.wait_until(lambda: len(server.hellos) == 4)
    hellos = [hello.message for hello in server.hellos]
    assert len({hello.session for hello in hellos}) == 1
    assert {hello.name for hello in hellos} == {"papag"}
    workers = [hello for hello in hellos if hello.role == "worker"]
    assert {hello.child for hello in workers} == {1, 2, 3}
    assert {hello.labels for hello in workers} == {("gpu", "big", cloudpickle_label())}


THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def threads_of_a_child(server: FakeServer, processes: int) -> dict[str, str]:
    """Return what a job finds in those variables, in one of so many worker processes."""
    with running_worker([server], "--processes", str(processes)):
        job = closure(server, subprocess.check_output, "env")
        server.assign_to_next(job)
        lines = value_of(server, job).decode().splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    return {name: found[name] for name in THREADS if name in found}


@pytest.mark.parametrize("processes", [1, n_cores() + 1])
def test_libraries_start_a_childs_share_of_the_cores_in_threads(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    share = str(n_cores() if processes == 1 else 1)
    assert threads_of_a_child(server, processes) == dict.fromkeys(THREADS, share)


def test_a_number_of_threads_that_the_user_has_set_stands(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in THREADS:
        monkeypatch.setenv(name, "7")
    assert threads_of_a_child(server, 1) == dict.fromkeys(THREADS, "7")


def test_a_module_that_is_not_there_ends_it_with_its_name(server: FakeServer) -> None:
    with running_worker([server], "--import", "no_such_module", "--processes", "2") as run:
        assert run.exit_code() == 1
        assert run.process.stderr is not None
        text = run.process.stderr.read()
    assert text.count("No module named 'no_such_module'") == 1
    assert "cannot import no_such_module" in text


def test_a_function_that_nobody_registers_ends_it_with_its_name(server: FakeServer) -> None:
    with running_worker([server], "--only", "resize") as run:
        assert run.exit_code() == 1
        assert run.process.stderr is not None
        assert "'resize'" in run.process.stderr.read()


def test_with_modules_to_import_all_children_start_too(server: FakeServer, folder: Path) -> None:
    (folder / "fine.py").touch()
    with running_worker([server], "--import", "fine", "--processes", "3", cwd=folder):
        for _ in range(3):
            server.wait(CanDo)


def test_a_child_that_cannot_start_any_more_is_tried_again(
    server: FakeServer, folder: Path
) -> None:
    module = folder / "sometimes.py"
    module.touch()
    with running_worker([server], "--import", "sometimes", cwd=folder):
        server.wait(GrabJobs)
        module.write_text("raise OSError('out of order')")
        peer = next(hello.peer for hello in server.hellos if hello.message.role == "worker")
        server.assign(peer, closure(server, os._exit, 3))
        server.wait(ChildLost, lambda lost: lost.child == 2)
        module.write_text("")
        server.wait(CanDo)
        server.wait(GrabJobs)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--servers", "a b"], "not an address of a server"),
        (["--servers", ""], "no server is named"),
        (["--servers", "a", "--processes", "0"], "say 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert complaint in capsys.readouterr().err


# --- blobs ------------------------------------------------------------------------------------


sealed_memory = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="this system has no memory that can be sealed"
)


class SlowServer(FakeServer):
    """It answers for blobs only when the test says so."""

    withholds = True

    def _on_message(self, peer: bytes, message: Message, bodies: tuple[Any, ...]) -> None:
        if isinstance(message, FetchBlob) and self.withholds:
            self.heard.append(Heard(peer, message, bodies))
        else:
            super()._on_message(peer, message, bodies)

    def answer(self, fetch: Heard[FetchBlob]) -> None:
        self.withholds = False
        super()._on_message(fetch.peer, fetch.message, ())
        self.heard.pop()  # it was waited for already


@pytest.fixture
def slow_server(folder: Path) -> Iterator[SlowServer]:
    with SlowServer(folder, "slow") as fake:
        yield fake


def calls(server: FakeServer, function: Callable[..., Any], *arguments: Any) -> list[Job]:
    """Make jobs of one closure, which are a call with each argument."""
    blobs = server.put(function)
    return [server.make("dmap", work.dump_call((one,), {}), blobs=blobs) for one in arguments]


def n_fetches(server: FakeServer) -> int:
    n = 0
    while server.find(FetchBlob):
        n += 1
    return n


def test_a_closure_comes_to_a_host_once_by_its_supervisor(server: FakeServer, folder: Path) -> None:
    with running_worker([server], "--processes", "3"):
        marks = [folder / name for name in "abc"]
        jobs = calls(server, touch_and_wait, *map(str, marks))
        for job, mark in zip(jobs, marks, strict=True):
            start(server, job, mark)
        for job, mark in zip(jobs, marks, strict=True):
            mark.unlink()
            assert value_of(server, job) == "waited"
        supervisor = next(hello for hello in server.hellos if hello.message.role == "supervisor")
        assert server.wait(FetchBlob).peer == supervisor.peer
        assert n_fetches(server) == 0


def test_children_that_want_a_closure_at_the_same_time_have_it_fetched_once(
    slow_server: SlowServer, folder: Path
) -> None:
    server = slow_server
    with running_worker([server], "--processes", "2"):
        marks = [folder / name for name in "ab"]
        jobs = calls(server, touch_and_wait, *map(str, marks))
        for job in jobs:
            server.assign_to_next(job)
        server.answer(server.wait(FetchBlob))
        server.wait_until(lambda: all(mark.exists() for mark in marks))
        for job, mark in zip(jobs, marks, strict=True):
            mark.unlink()
            assert value_of(server, job) == "waited"
        assert n_fetches(server) == 0


def test_a_job_that_waits_for_jobs_gets_their_closures_also_in_a_drain(
    slow_server: SlowServer, folder: Path
) -> None:
    server = slow_server
    lane = LaneId(b"n" * 16, 1)
    inside = folder / "inside"

    def wait_for_a_job(path: str) -> str:
        import os
        import time

        from dmap import registry

        worker = registry.current_worker()
        assert worker is not None
        worker.run_nested(
            [lane],
            until=lambda: os.path.exists(path),
            wait=lambda seconds: time.sleep(0.001),
        )
        return "waited"

    large = bytes(200_000)  # no child keeps it for itself

    def be_that_job(path: str) -> None:
        import os

        assert len(large) == 200_000
        os.mkdir(path)

    with running_worker([server]) as worker:
        outer = closure(server, wait_for_a_job, str(inside))
        server.assign_to_next(outer)
        server.answer(server.wait(FetchBlob))
        server.withholds = True
        peer = server.wait(GrabJobs, lambda grab: bool(grab.lanes)).peer
        server.assign(peer, closure(server, be_that_job, str(inside), lane=lane))
        fetch = server.wait(FetchBlob)
        worker.terminate()
        server.wait_until(worker.is_draining)
        server.answer(fetch)
        assert value_of(server, outer) == "waited"


def array_in_maps(array: Any) -> str:
    """Return the inode of the memory that an array lies in, as the kernel tells this process."""
    address = array.ctypes.data
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, _, _, inode, *name = line.split()
            start, end = (int(number, 16) for number in span.split("-"))
            if start <= address < end and "memfd:dmap-" in "".join(name):
                return inode
    return "memory of its own"


@sealed_memory
def test_a_large_blob_lies_in_the_memory_of_a_host_once(server: FakeServer, folder: Path) -> None:
    np = pytest.importorskip("numpy")
    large = np.arange(2**22)  # 32 MiB
    find = array_in_maps

    def look(path: str) -> str:
        touch_and_wait(path)
        assert large[-1] == 2**22 - 1
        return find(large)

    with running_worker([server], "--processes", "2"):
        marks = [folder / name for name in "ab"]
        jobs = calls(server, look, *map(str, marks))
        assert len(jobs[0].assigned.blobs) > 1
        for job, mark in zip(jobs, marks, strict=True):
            start(server, job, mark)
        for mark in marks:
            mark.unlink()
        inodes = {value_of(server, job) for job in jobs}
        assert len(inodes) == 1
        assert inodes != {"memory of its own"}
        assert n_fetches(server) == len(jobs[0].assigned.blobs)


def test_a_closure_is_asked_for_again_when_the_link_broke(
    slow_server: SlowServer, folder: Path
) -> None:
    server = slow_server
    with running_worker([server]):
        job = closure(server, abs, -3)
        server.assign_to_next(job)
        server.wait(FetchBlob)
        boot = server.boot
        server.restart()
        server.boot = boot  # the same server: it was only the link
        server.answer(server.wait(FetchBlob))
        assert value_of(server, job) == 3


def test_a_job_of_a_server_that_restarted_is_dropped_while_its_closure_is_fetched(
    slow_server: SlowServer, folder: Path
) -> None:
    server = slow_server
    with running_worker([server]):
        server.assign_to_next(closure(server, abs, -3))
        server.wait(FetchBlob)
        server.blobs.clear()  # as a server that restarted
        server.restart()
        server.answer(server.wait(FetchBlob))
        job = closure(server, len, "four")
        server.assign_to_next(job)
        assert value_of(server, job) == 4
        assert not server.find(WorkFail)


def test_a_closure_outlives_the_child_that_wanted_it(slow_server: SlowServer) -> None:
    server = slow_server
    with running_worker([server]) as worker:
        job = closure(server, abs, -3)
        server.assign_to_next(job)
        fetch = server.wait(FetchBlob)
        (child,) = worker.children()
        os.kill(child, signal.SIGKILL)
        server.wait(ChildLost)
        server.answer(fetch)
        server.assign_to_next(job)
        assert value_of(server, job) == 3
        assert n_fetches(server) == 0


def holders(inode: str) -> list[int]:
    """Return the processes that have this memory mapped, or a descriptor of it."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [link.stat() for link in Path(f"/proc/{pid}/fd").iterdir()]
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:  # it has ended, or is not ours
            continue
        if any(line.split()[4] == inode and "memfd:dmap-" in line for line in maps) or any(
            str(status.st_ino) == inode and status.st_nlink == 0 for status in links
        ):
            found.append(int(pid))
    return found


@sealed_memory
@pytest.mark.parametrize("victim", ["supervisor", "child"])
def test_memory_that_was_shared_ends_with_its_processes_however_they_die(
    server: FakeServer, folder: Path, victim: str
) -> None:
    np = pytest.importorskip("numpy")
    large = np.arange(2**18)
    find = array_in_maps

    def hold(path: str) -> None:
        with open(path + ".inode", "w") as file:
            file.write(find(large))
        touch_and_wait(path)

    with running_worker([server]) as worker:
        start(server, closure(server, hold, str(folder / "a")), folder / "a")
        inode = (folder / "a.inode").read_text()
        supervisor, (child,) = worker.process.pid, worker.children()
        assert sorted(holders(inode)) == sorted([supervisor, child])
        os.kill(supervisor if victim == "supervisor" else child, signal.SIGKILL)
        server.wait_until(lambda: gone(child))
        if victim == "child":
            assert holders(inode) == [supervisor]
            worker.process.kill()
        server.wait_until(lambda: not holders(inode))


# --- restarts of a server ---------------------------------------------------------------------


def test_a_server_that_restarted_is_told_what_runs_since_before(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    job = closure(server, touch_and_wait, str(folder / "a"), uniq=b"u")
    start(server, job, folder / "a")
    server.restart()
    hello = server.wait(Hello, lambda hello: hello.role == "supervisor" and bool(hello.running))
    (running,) = hello.message.running
    assert (running.origin, running.function, running.uniq) == (job.assigned.origin, "dmap", b"u")
    assert hello.message.boot != server.boot
    (folder / "a").unlink()
    done = server.wait(WorkComplete).message
    assert done.origins == [job.assigned.origin]


def test_a_child_that_died_while_the_server_was_away_is_told_to_its_next_life(
    server: FakeServer, worker: Running
) -> None:
    server.wait(GrabJobs)
    (child,) = worker.children()
    server.stop()
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while worker.children() in ([], [child]):  # until another one is started in its place
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.start()
    assert server.wait(ChildLost).message == ChildLost(1, [], 0, 0, "SIGKILL")


def test_a_supervisor_that_a_server_does_not_know_says_hello_again(
    server: FakeServer, worker: Running
) -> None:
    hello = server.wait(Hello, lambda hello: hello.role == "supervisor")
    server.say(hello.peer, Error("hello_first", "who are you?"))
    again = server.wait(Hello, lambda hello: hello.role == "supervisor")
    assert again.peer == hello.peer


# --- the end ----------------------------------------------------------------------------------


def test_sigterm_lets_the_running_item_finish_and_ends_with_zero(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    job = closure(server, touch_and_wait, str(folder / "a"))
    start(server, job, folder / "a")
    worker.terminate()
    (folder / "a").unlink()
    assert value_of(server, job) == "waited"
    server.wait_until(lambda: worker.process.poll() is not None)
    assert worker.exit_code() == 0
    n_goodbyes = 0
    while server.find(Goodbye):
        n_goodbyes += 1
    assert n_goodbyes == 2


def test_a_child_whose_job_changed_what_sigterm_does_leaves_all_the_same(
    server: FakeServer, worker: Running
) -> None:
    job = closure(server, signal.signal, signal.SIGTERM, signal.SIG_IGN)
    server.assign_to_next(job)
    server.wait(WorkException)  # what it returns, a method of the worker, cannot be pickled
    worker.terminate()
    server.wait_until(lambda: worker.process.poll() is not None)
    assert worker.exit_code() == 0


def test_a_second_sigterm_hands_the_running_job_back(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    job = closure(server, touch_and_wait, str(folder / "a"))
    start(server, job, folder / "a")
    worker.terminate()
    server.wait_until(worker.is_draining)
    worker.terminate()
    assert worker.exit_code() == 0
    assert server.wait(ChildLost).message.running == []
    assert not server.find(WorkComplete)


def test_ctrl_c_drains_as_sigterm_does_and_does_not_reach_the_jobs(
    server: FakeServer, folder: Path
) -> None:
    with running_worker([server], start_new_session=True) as worker:
        job = closure(server, touch_and_wait, str(folder / "a"))
        start(server, job, folder / "a")
        os.killpg(worker.process.pid, signal.SIGINT)
        (folder / "a").unlink()
        assert value_of(server, job) == "waited"
        assert worker.exit_code() == 0


def gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("job", [touch_and_wait, touch_and_hold_the_gil])
def test_a_killed_supervisors_children_go_with_it(
    server: FakeServer, folder: Path, job: Callable[[str], Any]
) -> None:
    with running_worker([server], "--processes", "2") as worker:
        start(server, closure(server, job, str(folder / "a")), folder / "a")
        server.wait_until(lambda: len(worker.children()) == 2)
        children = worker.children()
        worker.process.kill()
        server.wait_until(lambda: all(map(gone, children)))


def test_the_end_of_the_lifeline_is_the_end_of_everything(server: FakeServer, folder: Path) -> None:
    read, write = os.pipe()
    with running_worker([server], "--lifeline", str(read), pass_fds=(read,)) as worker:
        os.close(read)
        start(server, closure(server, touch_and_hold_the_gil, str(folder / "a")), folder / "a")
        children = worker.children()
        os.close(write)
        assert worker.exit_code() == 0
        assert all(map(gone, children))


def test_a_supervisor_at_rest_uses_less_than_a_hundredth_of_a_core(
    server: FakeServer, worker: Running
) -> None:
    server.wait(GrabJobs)

    def cpu_seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    pids = [worker.process.pid, *worker.children()]
    before = sum(map(cpu_seconds, pids))
    deadline = time.monotonic() + 4.0  # no waiting for anything: rest is what is measured
    while (left := deadline - time.monotonic()) > 0:
        server.pump(left)
    # The kernel counts in hundredths of a second; the bound is some five times the promise.
    assert sum(map(cpu_seconds, pids)) - before <= 0.2


def test_the_way_a_process_ended_is_said_in_words() -> None:
    assert [exit_text(code) for code in (0, 3, -9, -15)] == [
        "exit code 0",
        "exit code 3",
        "SIGKILL",
        "SIGTERM",
    ]
