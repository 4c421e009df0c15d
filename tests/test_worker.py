"""A worker process, between a supervisor and a server that does what the test says."""

from __future__ import annotations

import os
import signal
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Heard, Running, running_worker

from dmap import current_job, registry, work
from dmap.errors import ClosureError, RemoteError
from dmap.raised import Summary, restore
from jobserver.protocol import (
    Ability,
    CanDo,
    CantDo,
    ChildLost,
    FetchBlob,
    GiveBack,
    GrabJobs,
    JobAssign,
    LaneId,
    NoJob,
    Noop,
    PreSleep,
    WorkComplete,
    WorkData,
    WorkException,
    WorkFail,
    WorkStatus,
    WorkWarning,
)

pytestmark = pytest.mark.slow

MODULE = """
import os, time
from dmap import current_job, job

@job("resize", merge=True, timeout=30)
def resize(path, width=10):
    return f"{path} at {width}"

@job("shout")
def shout(text):
    return text.upper()

@job("forget")
def forget():
    current_job().cant_do("shout")

@job("talk")
def talk():
    job = current_job()
    job.status(1, 2)
    job.data({"rows": 3})
    job.warning("no coffee \N{HOT BEVERAGE}")
    return job.handle, job.attempt, job.function, job.worker, job.cancelled
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dmap-") as name:
        (Path(name) / "jobs_of_test.py").write_text(textwrap.dedent(MODULE))
        yield Path(name)


@pytest.fixture
def server(folder: Path) -> Iterator[FakeServer]:
    with FakeServer(folder) as fake:
        yield fake


@pytest.fixture
def worker(server: FakeServer, folder: Path) -> Iterator[Running]:
    with running_worker([server], "--name", "papag", "--import", "jobs_of_test", cwd=folder) as run:
        yield run


def call(server: FakeServer, function: Callable[..., Any], *args: Any) -> Any:
    """Have the next worker call a closure; return its result."""
    job = server.make("dmap", work.dump_call(args, {}), blobs=server.put(function))
    server.assign_to_next(job)
    done = server.wait(WorkComplete, lambda message: message.jobs[0].handle == job.handle)
    return work.load_result(done.bodies[0])


def test_a_result_goes_with_the_grab_for_the_next_job(server: FakeServer, worker: Running) -> None:
    assert call(server, abs, -1) == 1
    assert server.together[-1] == [WorkComplete, GrabJobs]
    assert server.hellos[-1].message.together


def run_chunk(
    server: FakeServer, function: Callable[..., Any], items: list[Any], star: bool = False
) -> None:
    argument = work.dump_chunk(star, items)
    blobs = server.put(function)
    server.assign_to_next(server.make("dmap", argument, n_items=len(items), blobs=blobs))


def exception_of(heard: Heard[WorkException]) -> BaseException:
    message = heard.message
    summary = Summary(message.type_name, message.message, message.traceback)
    pickled, _ = heard.bodies
    assert isinstance(pickled, bytes)
    return restore(summary, pickled)


# --- closures ---------------------------------------------------------------------------------


def test_a_closure_is_called_with_its_arguments(server: FakeServer, worker: Running) -> None:
    rate = 7
    assert call(server, lambda a, b: (a + b) * rate, 1, 2) == 21


def test_a_chunk_gives_the_list_of_its_items_results(server: FakeServer, worker: Running) -> None:
    run_chunk(server, lambda v: v + 1, list(range(5000)))
    done = server.wait(WorkComplete)
    assert work.load_result(done.bodies[0]) == list(range(1, 5001))
    assert done.message.jobs[0].n_items == 0
    assert done.message.seconds > 0


def test_items_of_a_starred_chunk_are_tuples_of_arguments(
    server: FakeServer, worker: Running
) -> None:
    run_chunk(server, lambda a, b: a - b, [(5, 1), (7, 2)], star=True)
    assert work.load_result(server.wait(WorkComplete).bodies[0]) == [4, 5]


def test_a_chunk_that_overran_comes_home_in_part(server: FakeServer, worker: Running) -> None:
    argument = work.dump_chunk(False, [3, 2, 1], overrun=1e-9)
    blobs = server.put(lambda v: v + 1)
    server.assign_to_next(server.make("dmap", argument, n_items=3, blobs=blobs))
    done = server.wait(WorkComplete)
    assert done.message.jobs[0].n_items == 1
    assert work.load_result(done.bodies[0]) == [4]


def test_a_closure_is_fetched_once_a_process(server: FakeServer, worker: Running) -> None:
    for number in range(3):
        assert call(server, abs, -number) == number
    assert server.find(FetchBlob)
    assert not server.find(FetchBlob)


def test_a_closure_that_the_server_does_not_have_fails_its_job(
    server: FakeServer, worker: Running
) -> None:
    server.assign_to_next(server.make("dmap", work.dump_call((), {}), blobs=(b"?" * 32,)))
    fail = server.wait(WorkFail).message
    assert fail.code == "failed"
    assert "does not have the closure" in fail.text
    assert call(server, abs, -1) == 1


def test_a_closure_that_cannot_be_loaded_here_is_an_exception(
    server: FakeServer, worker: Running
) -> None:
    server.blobs[b"b" * 32] = b"\x80\x05cno_such_module\nf\n."
    server.assign_to_next(server.make("dmap", work.dump_call((), {}), blobs=(b"b" * 32,)))
    error = exception_of(server.wait(WorkException))
    assert isinstance(error, ClosureError)
    assert "no_such_module" in str(error)


def test_a_large_argument_and_a_large_result_arrive(server: FakeServer, worker: Running) -> None:
    blobs = server.put(lambda value: value[::-1])
    argument = work.dump_call((bytes(range(256)) * 20_000,), {})
    server.assign_to_next(server.make("dmap", argument, blobs=blobs))
    result = server.wait(WorkComplete).bodies[0]
    assert isinstance(result, tuple)
    assert work.load_result(result) == bytes(reversed(range(256))) * 20_000


# --- exceptions -------------------------------------------------------------------------------


def test_an_item_that_raises_says_at_which_index_and_sends_what_was_done(
    server: FakeServer, worker: Running
) -> None:
    run_chunk(server, lambda v: 10 // v, [1, 2, 5, 0, 1])
    raised = server.wait(WorkException)
    assert isinstance(exception_of(raised), ZeroDivisionError)
    assert raised.message.n_items == 3
    assert work.load_result(raised.bodies[1]) == [10, 5, 2]


def test_the_traceback_begins_in_the_users_code(server: FakeServer, worker: Running) -> None:
    run_chunk(server, lambda v: 10 // v, [0])
    text = server.wait(WorkException).message.traceback
    assert "test_worker.py" in text
    assert "dmap/worker.py" not in text


@pytest.mark.parametrize("order", [SystemExit, KeyboardInterrupt])
def test_what_would_end_a_program_ends_the_job_only(
    server: FakeServer, worker: Running, order: type[BaseException]
) -> None:
    def give_the_order() -> None:
        raise order

    before = call(server, os.getpid)
    server.assign_to_next(
        server.make("dmap", work.dump_call((), {}), blobs=server.put(give_the_order))
    )
    error = exception_of(server.wait(WorkException))
    assert isinstance(error, RemoteError)
    assert error.type_name == order.__name__
    assert call(server, os.getpid) == before


def test_a_stop_iteration_does_not_cut_a_chunk_short(server: FakeServer, worker: Running) -> None:
    run_chunk(server, lambda it: next(it), [iter([1]), iter([]), iter([3])])
    raised = server.wait(WorkException)
    assert raised.message.n_items == 1
    assert "StopIteration" in raised.message.message


def test_a_result_that_cannot_be_pickled_is_an_error_at_its_index(
    server: FakeServer, worker: Running
) -> None:
    def maybe_a_lock(index: int) -> object:
        import threading

        return threading.Lock() if index == 2 else index

    run_chunk(server, maybe_a_lock, [0, 1, 2, 3])
    raised = server.wait(WorkException)
    assert isinstance(exception_of(raised), ClosureError)
    assert raised.message.n_items == 2
    assert work.load_result(raised.bodies[1]) == [0, 1]


def test_an_argument_that_cannot_be_loaded_is_an_exception(
    server: FakeServer, worker: Running
) -> None:
    server.assign_to_next(
        server.make("dmap", b"\x80\x05cno_such_module\nf\n.", blobs=server.put(abs))
    )
    assert isinstance(exception_of(server.wait(WorkException)), ModuleNotFoundError)


# --- named functions --------------------------------------------------------------------------


def test_a_worker_says_what_it_can_do_and_how(server: FakeServer, worker: Running) -> None:
    abilities = server.wait(CanDo).message.abilities
    assert Ability("dmap", 0.0, False) in abilities
    assert Ability("resize", 30.0, True) in abilities


def test_a_named_function_is_called_with_its_arguments(server: FakeServer, worker: Running) -> None:
    server.assign_to_next(server.make("resize", work.dump_named(("cat",), {"width": 3})))
    assert work.load_result(server.wait(WorkComplete).bodies[0]) == "cat at 3"


def test_raw_bytes_go_in_and_come_out_as_they_are(server: FakeServer, worker: Running) -> None:
    server.assign_to_next(server.make("shout", b"hello", encoding="raw"))
    assert server.wait(WorkComplete).bodies == (b"HELLO",)


def test_results_of_short_jobs_go_together(server: FakeServer, worker: Running) -> None:
    jobs = [server.make("shout", b"%d" % number, encoding="raw") for number in range(50)]
    server.assign_to_next(*jobs)
    n_messages, results = 0, b""
    while len(results) < 90:
        results += b"".join(server.wait(WorkComplete).bodies)  # type: ignore[arg-type]
        n_messages += 1
    assert results == b"".join(b"%d" % number for number in range(50))
    assert n_messages < 25


def test_a_worker_can_unown_a_function(server: FakeServer, worker: Running) -> None:
    server.assign_to_next(server.make("forget", work.dump_named((), {})))
    assert server.wait(CantDo).message.functions == ["shout"]
    server.restart()
    announced = {ability.function for ability in server.wait(CanDo).message.abilities}
    assert announced == {"dmap", "resize", "forget", "talk"}


def test_only_what_is_named_is_offered(server: FakeServer, folder: Path) -> None:
    with running_worker([server], "--import", "jobs_of_test", "--only", "shout", cwd=folder):
        assert server.wait(CanDo).message.abilities == [Ability("shout")]


# --- what a job says while it runs ------------------------------------------------------------


def test_a_job_tells_its_listeners_how_far_it_is(server: FakeServer, worker: Running) -> None:
    job = server.make("talk", work.dump_named((), {}), attempt=2)
    server.assign_to_next(job)
    assert server.wait(WorkStatus).message == WorkStatus(job.handle, 1, 2)
    assert work.load_result(server.wait(WorkData).bodies[0]) == {"rows": 3}
    assert server.wait(WorkWarning).bodies == ("no coffee \N{HOT BEVERAGE}".encode(),)
    handle, *rest = work.load_result(server.wait(WorkComplete).bodies[0])
    assert handle == f"fake:{server.boot}:{job.handle}"
    assert rest == [2, "talk", "papag", False]


def test_a_status_goes_out_while_the_job_runs(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    def wait_for(path: str) -> None:
        import os
        import time

        from dmap import current_job

        current_job().status(1, 3)
        while not os.path.exists(path):
            time.sleep(0.01)

    go = folder / "go"
    argument = work.dump_call((str(go),), {})
    server.assign_to_next(server.make("dmap", argument, blobs=server.put(wait_for)))
    server.wait(WorkStatus)
    assert not server.find(WorkComplete)
    go.touch()
    server.wait(WorkComplete)


def test_a_thread_of_a_job_may_speak_for_it(server: FakeServer, worker: Running) -> None:
    def talk_from_threads() -> None:
        from concurrent.futures import ThreadPoolExecutor

        from dmap import current_job

        job = current_job()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda number: job.status(number, 200), range(200)))

    server.assign_to_next(
        server.make("dmap", work.dump_call((), {}), blobs=server.put(talk_from_threads))
    )
    server.wait(WorkComplete)
    seen = set()
    while status := server.find(WorkStatus):
        seen.add(status.message.numerator)
    assert seen == set(range(200))


def test_a_process_that_a_job_forks_is_not_in_the_job(server: FakeServer, worker: Running) -> None:
    def fork() -> str:
        import os

        from dmap import current_job

        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                current_job()
                os.write(write, b"in a job")
            except RuntimeError:
                os.write(write, b"outside")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        return os.read(read, 100).decode()

    assert call(server, fork) == "outside"


def test_a_process_that_a_job_forks_ends_by_sigterm_and_the_worker_goes_on(
    server: FakeServer, worker: Running
) -> None:
    def terminate_a_fork() -> int:
        import os
        import signal
        import time

        pid = os.fork()
        if pid == 0:
            while True:
                time.sleep(1)
        os.kill(pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert call(server, terminate_a_fork) == -signal.SIGTERM
    assert not worker.is_draining()


def test_a_job_that_has_ended_has_nothing_to_say(server: FakeServer, worker: Running) -> None:
    def keep() -> None:
        import builtins

        from dmap import current_job

        builtins.kept_job = current_job()  # type: ignore[attr-defined]

    def use() -> str:
        import builtins

        try:
            builtins.kept_job.status(1, 1)  # type: ignore[attr-defined]
        except RuntimeError as error:
            return str(error)
        return ""

    call(server, keep)
    assert "has ended" in call(server, use)


# --- several servers --------------------------------------------------------------------------


@pytest.fixture
def servers(folder: Path) -> Iterator[list[FakeServer]]:
    with FakeServer(folder, "sammy") as sammy, FakeServer(folder, "kenny") as kenny:
        yield [sammy, kenny]


def answer_no_job(servers: list[FakeServer]) -> None:
    """Say that there is no work until the worker sleeps everywhere."""
    asleep: set[str] = set()

    def all_asleep() -> bool:
        for server in servers:
            if grab := server.find(GrabJobs):
                server.say(grab.peer, NoJob())
            if server.find(PreSleep):
                asleep.add(server.name)
        return len(asleep) == len(servers)

    servers[0].wait_until(all_asleep)


def test_a_sleeper_is_woken_by_the_second_server(servers: list[FakeServer]) -> None:
    with running_worker(servers):
        answer_no_job(servers)
        peer = next(hello.peer for hello in servers[1].hellos if hello.message.role == "worker")
        servers[1].say(peer, Noop())
        assert call(servers[1], abs, -3) == 3


def test_a_server_that_is_down_does_not_stop_the_others(server: FakeServer, folder: Path) -> None:
    with running_worker([f"ipc://{folder}/nobody", server.address]):
        assert call(server, abs, -3) == 3


def test_a_server_that_comes_later_is_worked_for(folder: Path, server: FakeServer) -> None:
    late = FakeServer(folder, "late")
    late.stop()
    with late, running_worker([server, late]):
        server.say(server.wait(GrabJobs).peer, NoJob())
        server.wait(PreSleep)
        late.start()
        assert call(late, abs, -4) == 4


def test_a_worker_comes_back_to_a_server_that_restarted(
    server: FakeServer, worker: Running
) -> None:
    assert call(server, abs, -1) == 1
    server.restart()
    assert call(server, abs, -2) == 2


def test_a_result_that_was_not_accepted_is_told_to_the_restarted_server_by_its_origin(
    server: FakeServer, worker: Running
) -> None:
    server.accepts = False
    job = server.make("shout", b"hello", encoding="raw")
    server.assign_to_next(job)
    server.wait(WorkComplete)
    boot = server.boot
    server.restart()
    again = server.wait(WorkComplete)
    assert (again.message.boot, again.message.origins) == (boot, [job.assigned.origin])
    assert again.bodies == (b"HELLO",)


# --- jobs that wait for jobs ------------------------------------------------------------------

INNER = LaneId(b"n" * 16, 1)


def wait_inside(lane: LaneId, n_results: int) -> list[str]:
    """Wait inside a job as a client does, until so many inner jobs have left a mark."""
    import builtins
    import time

    from dmap import registry

    worker = registry.current_worker()
    assert worker is not None
    builtins.marks = []  # type: ignore[attr-defined]
    worker.run_nested(
        [lane],
        until=lambda: len(builtins.marks) >= n_results,  # type: ignore[attr-defined]
        wait=lambda seconds: time.sleep(min(seconds, 0.001)),
    )
    return builtins.marks  # type: ignore[attr-defined, no-any-return]


def leave_mark(mark: str) -> str:
    import builtins

    builtins.marks.append(mark)  # type: ignore[attr-defined]
    return mark


def in_lanes(grab: GrabJobs) -> bool:
    return bool(grab.lanes)


def test_a_job_that_waits_runs_jobs_of_its_lanes_and_no_others(
    server: FakeServer, worker: Running
) -> None:
    other = server.make("shout", b"later", encoding="raw")
    argument = work.dump_call((INNER, 2), {})
    outer = server.make("dmap", argument, blobs=server.put(wait_inside))
    server.assign_to_next(outer, other)
    assert server.wait(GiveBack).message.handles == [other.handle]
    marks = server.put(leave_mark)
    grab = server.wait(GrabJobs, in_lanes)
    assert grab.message.lanes == [INNER]
    server.say(grab.peer, NoJob())
    for mark in ("a", "b"):
        inner = server.make("dmap", work.dump_call((mark,), {}), lane=INNER, blobs=marks)
        server.assign_to_next(inner, of=in_lanes)
        done = server.wait(WorkComplete)
        assert done.message.jobs[0].handle == inner.handle
        assert work.load_result(done.bodies[0]) == mark
    done = server.wait(WorkComplete)
    assert done.message.jobs[0].handle == outer.handle
    assert work.load_result(done.bodies[0]) == ["a", "b"]


def test_an_inner_job_that_raises_does_not_disturb_the_one_around_it(
    server: FakeServer, worker: Running
) -> None:
    def mark_and_raise(mark: str) -> None:
        leave_mark(mark)
        raise ValueError(mark)

    outer = server.make("dmap", work.dump_call((INNER, 1), {}), blobs=server.put(wait_inside))
    server.assign_to_next(outer)
    argument = work.dump_call(("a",), {})
    inner = server.make("dmap", argument, lane=INNER, blobs=server.put(mark_and_raise))
    server.assign_to_next(inner, of=in_lanes)
    assert server.wait(WorkException).message.handle == inner.handle
    assert server.wait(WorkComplete).message.jobs[0].handle == outer.handle


def test_a_child_that_dies_in_an_inner_job_names_both_the_innermost_first(
    server: FakeServer, worker: Running
) -> None:
    outer = server.make("dmap", work.dump_call((INNER, 1), {}), blobs=server.put(wait_inside))
    server.assign_to_next(outer)
    argument = work.dump_call((3,), {})
    inner = server.make("dmap", argument, lane=INNER, blobs=server.put(os._exit))
    server.assign_to_next(inner, of=in_lanes)
    lost = server.wait(ChildLost).message
    assert (lost.running, lost.exit) == ([inner.handle, outer.handle], "exit code 3")


def test_outside_a_job_there_is_no_job() -> None:
    assert registry.current_worker() is None
    with pytest.raises(RuntimeError, match="outside a job"):
        current_job()


# --- leaving ----------------------------------------------------------------------------------


def test_a_draining_worker_finishes_its_item_and_returns_the_rest(
    server: FakeServer, worker: Running, folder: Path
) -> None:
    def wait_for(path: str) -> str:
        import os
        import time

        open(path + ".seen", "w").close()
        while not os.path.exists(path):
            time.sleep(0.005)
        return path

    names = [str(folder / name) for name in ("a", "b", "c")]
    run_chunk(server, wait_for, names)
    server.wait_until((folder / "a.seen").exists)
    worker.terminate()
    server.wait_until(worker.is_draining)
    (folder / "a").touch()
    done = server.wait(WorkComplete)
    assert work.load_result(done.bodies[0]) == names[:1]
    assert done.message.jobs[0].n_items == 1
    assert worker.exit_code() == 0


def test_a_draining_worker_gives_back_what_it_gets(server: FakeServer, worker: Running) -> None:
    peer = server.wait(GrabJobs).peer
    server.accepts = False
    job = server.make("shout", b"hello", encoding="raw")
    server.assign(peer, job)
    server.wait(WorkComplete)
    worker.terminate()
    server.wait_until(worker.is_draining)
    late = server.make("shout", b"late", encoding="raw")
    server.say(peer, JobAssign([late.assigned]), late.argument)
    assert server.wait(GiveBack).message.handles == [late.handle]


def test_what_a_job_prints_comes_out_at_once(server: FakeServer, worker: Running) -> None:
    def say_hello() -> None:
        print("hello from a job")

    call(server, say_hello)
    assert worker.process.stdout is not None
    assert worker.process.stdout.readline() == "hello from a job\n"
