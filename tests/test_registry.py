"""Named functions, and what a job sees of the worker that runs it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from dmap import registry
from dmap.registry import abilities, current_job, current_worker, find, job, set_host
from jobserver.protocol import Ability, Assigned, LaneId, Origin

SESSION = b"c" * 16
RUNNING = Assigned(
    7,
    Origin(SESSION, 1),
    "resize",
    0,
    n_items=1,
    attempt=2,
    encoding="pickle",
    uniq=b"",
    timeout=0.0,
    item_timeout=0.0,
    blobs=(),
    ancestors=(Origin(SESSION, 0),),
    lane=LaneId(SESSION, 0),
)


class RecordingHost:
    """A worker that runs one job and notes what the job does."""

    name = "papag"

    def __init__(self) -> None:
        self.running: Assigned | None = RUNNING
        self.said: list[tuple[object, ...]] = []

    def innermost(self) -> Assigned | None:
        return self.running

    def text_handle(self, job: Assigned) -> str:
        return f"sammy:boot1:{job.handle}"

    def say_status(self, job: Assigned, numerator: int, denominator: int) -> None:
        self.said.append(("status", job.handle, numerator, denominator))

    def say_data(self, job: Assigned, value: object) -> None:
        self.said.append(("data", job.handle, value))

    def say_warning(self, job: Assigned, text: str) -> None:
        self.said.append(("warning", job.handle, text))

    def is_cancelled(self, job: Assigned) -> bool:
        return job.handle == 7

    def cant_do(self, function: str) -> None:
        self.said.append(("cant_do", function))

    def run_nested(
        self,
        lanes: Sequence[LaneId],
        until: Callable[[], bool],
        wait: Callable[[float], None],
    ) -> None:
        raise AssertionError("no job waits here")


@pytest.fixture
def host() -> Iterator[RecordingHost]:
    host = RecordingHost()
    set_host(host)
    yield host
    set_host(None)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def test_a_registered_function_stays_what_it_is() -> None:
    def resize(path: str) -> str:
        return path

    assert job("resize")(resize) is resize
    assert find("resize") is resize


def test_a_worker_can_do_what_is_registered_and_closures() -> None:
    job("resize", merge=True, timeout=30)(len)
    assert abilities() == [Ability("dmap"), Ability("resize", 30.0, True)]


def test_a_worker_can_be_told_to_do_less() -> None:
    job("resize")(len)
    job("shout")(str.upper)
    assert abilities(["shout"]) == [Ability("shout")]
    assert abilities(["dmap", "resize", "dmap"]) == [Ability("dmap"), Ability("resize")]


def test_a_worker_that_should_do_what_nobody_registered_says_what_there_is() -> None:
    job("resize")(len)
    with pytest.raises(ValueError, match=r"'rezise'.*'resize'"):
        abilities(["rezise"])


def test_two_functions_do_not_share_a_name() -> None:
    job("resize")(len)
    with pytest.raises(ValueError, match=r"builtins\.len.*builtins\.abs"):
        job("resize")(abs)


def test_a_module_that_is_loaded_again_registers_its_functions_again() -> None:
    def make() -> Callable[[], None]:
        def resize() -> None: ...

        return resize

    first, second = make(), make()
    job("resize")(first)
    job("resize")(second)
    assert find("resize") is second


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257, "dmap"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        job(name)


def test_a_time_limit_that_lets_nothing_run_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing run"):
        job("resize", timeout=0)


def test_a_name_that_nobody_registered_is_not_found() -> None:
    assert find("resize") is None


def test_a_job_knows_what_it_is(host: RecordingHost) -> None:
    here = current_job()
    assert (here.function, here.handle, here.attempt) == ("resize", "sammy:boot1:7", 2)
    assert here.worker == "papag"
    assert here.cancelled


def test_a_job_knows_in_which_jobs_it_was_submitted(host: RecordingHost) -> None:
    assert current_job()._ancestors == (Origin(SESSION, 0), Origin(SESSION, 1))


def test_what_a_job_says_goes_through_its_worker(host: RecordingHost) -> None:
    here = current_job()
    here.status(1, 2)
    here.data({"rows": 3})
    here.warning("no coffee")
    here.cant_do("resize")
    assert host.said == [
        ("status", 7, 1, 2),
        ("data", 7, {"rows": 3}),
        ("warning", 7, "no coffee"),
        ("cant_do", "resize"),
    ]


def test_a_status_below_nothing_is_refused(host: RecordingHost) -> None:
    with pytest.raises(ValueError, match="less than nothing"):
        current_job().status(-1, 2)


def test_outside_a_worker_there_is_no_job() -> None:
    with pytest.raises(RuntimeError, match="outside a job"):
        current_job()


def test_in_a_worker_between_two_jobs_there_is_no_job(host: RecordingHost) -> None:
    host.running = None
    with pytest.raises(RuntimeError, match="outside a job"):
        current_job()
    assert current_worker() is None


def test_a_thread_of_a_job_is_in_the_job_but_cannot_run_jobs(host: RecordingHost) -> None:
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.extend([current_job().handle, current_worker()]))
    thread.start()
    thread.join()
    assert seen == ["sammy:boot1:7", None]
    assert current_worker() is host


def test_a_forked_process_is_not_in_the_job(host: RecordingHost) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(current_worker() is not None)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
