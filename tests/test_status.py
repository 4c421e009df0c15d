"""The rows that a server shows, from a state that no socket belongs to."""

import pytest

from jobserver import protocol as wire
from jobserver.state import State
from jobserver.status import MAX_NAMES, MAX_ROWS, show

CLIENT = b"client"
WORKER = b"worker"


@pytest.fixture
def state() -> State:
    """Return a state that a client and a worker have said Hello to."""
    state = State("sammy", "b00t")
    state.on_message(CLIENT, wire.Hello(wire.MAJOR, wire.MINOR, "client", b"c" * 16), (), 0.0)
    state.on_message(WORKER, wire.Hello(wire.MAJOR, wire.MINOR, "worker", b"w" * 16), (), 0.0)
    return state


def submit(
    state: State, tickets: range, *, priority: int = wire.NORMAL, not_before: float = 0.0
) -> None:
    jobs = [wire.JobSpec(ticket, 0) for ticket in tickets]
    submit_jobs = wire.SubmitJobs("f", jobs, priority=priority, not_before=not_before)
    state.on_message(CLIENT, submit_jobs, (b"",), 0.0)


def work(state: State, *messages: wire.Message, now: float = 0.0) -> None:
    for message in messages:
        state.on_message(WORKER, message, (), now)


def test_a_function_counts_its_jobs_and_workers(state: State) -> None:
    submit(state, range(1), priority=wire.HIGH)
    submit(state, range(1, 3), priority=wire.NORMAL)
    submit(state, range(3, 6), priority=wire.LOW)
    submit(state, range(6, 10), not_before=60.0)
    work(state, wire.CanDo([wire.Ability("f"), wire.Ability("g")]), wire.GrabJobs())
    row = {
        "function": "f",
        "high": 0,
        "normal": 2,
        "low": 3,
        "delayed": 4,
        "running": 1,
        "workers": 1,
        "sleeping": 0,
        "seconds": None,
    }
    empty = {**row, "function": "g", "normal": 0, "low": 0, "delayed": 0, "running": 0}
    assert show(state, "status", 0.0) == [row, empty]


@pytest.mark.parametrize(
    ("last_word", "shown"), [(wire.PreSleep(), "asleep"), (wire.GrabJobs(wait=True), "waiting")]
)
def test_a_worker_that_sleeps_is_shown_asleep(
    state: State, last_word: wire.Message, shown: str
) -> None:
    work(state, wire.CanDo([wire.Ability("f")]), last_word, now=5.0)
    [row] = show(state, "workers", 12.0)
    assert (row["state"], row["since"]) == (shown, 7.0)
    assert show(state, "status", 0.0)[0]["sleeping"] == 1


def test_a_worker_of_many_abilities_names_some_and_counts_all(state: State) -> None:
    work(state, wire.CanDo([wire.Ability(f"f{number}") for number in range(MAX_NAMES + 5)]))
    [row] = show(state, "workers", 0.0)
    assert isinstance(row["abilities"], list)
    assert len(row["abilities"]) == MAX_NAMES
    assert row["n_abilities"] == MAX_NAMES + 5


def test_running_jobs_are_shown_first_and_the_rows_are_bounded(state: State) -> None:
    submit(state, range(MAX_ROWS))
    submit(state, range(MAX_ROWS, MAX_ROWS + 10), priority=wire.HIGH)
    work(state, wire.CanDo([wire.Ability("f")]), wire.GrabJobs())
    rows = show(state, "jobs", 0.0)
    assert len(rows) == MAX_ROWS
    assert (rows[0]["state"], rows[0]["priority"]) == ("running", "high")
    assert {row["state"] for row in rows[1:]} == {"ready"}


def test_a_job_that_waits_for_its_time_is_shown_delayed(state: State) -> None:
    submit(state, range(1), not_before=60.0)
    [row] = show(state, "jobs", 0.0)
    assert row["state"] == "delayed"


def test_a_handle_is_read_back_from_its_text() -> None:
    for name in ("sammy", "a:b", "["):
        assert wire.parse_handle(wire.handle_text(name, "b00t", 7)) == (name, "b00t", 7)


@pytest.mark.parametrize("text", ["", "7", "b00t:7", ":b00t:7", "sammy::7", "sammy:b00t:", "a:b:x"])
def test_what_is_no_handle_is_named_in_the_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a handle"):
        wire.parse_handle(text)
