"""Queues, lanes and their turns, one fact at a time."""

from __future__ import annotations

import pytest

from jobserver.jobs import Function, Job
from jobserver.protocol import HIGH, LOW, NORMAL, LaneId, SubmitJobs
from jobserver.queues import Needs, Queue

SESSION = b"a client's session"[:16]
A, B, C = (LaneId(SESSION, number) for number in (1, 2, 3))


@pytest.fixture
def queue() -> Queue:
    return Queue(Function("f"), Needs("", frozenset()))


def a_job(queue: Queue, handle: int, nbytes: int = 1) -> Job:
    terms = SubmitJobs("f", [])
    return Job(handle, handle, queue, terms, A, b"x" * nbytes, nbytes)


def push(queue: Queue, handle: int, *lanes: LaneId, priority: int = NORMAL) -> Job:
    job = a_job(queue, handle)
    for lane in lanes:
        queue.push(job, lane, priority)
    queue.check()
    return job


def pop(queue: Queue, priority: int = NORMAL, nbytes: int | None = None) -> int:
    """Return the handle of the next job; 0: none."""
    job = queue.pop(priority, nbytes)
    queue.check()
    return 0 if job is None else job.handle


def n_entries(queue: Queue) -> int:
    return sum(len(lane.jobs) for lanes in queue.lanes for lane in lanes.values())


def test_lanes_take_turns_job_by_job(queue: Queue) -> None:
    for handle, lane in enumerate((A, A, A, B, B, C), 1):
        push(queue, handle, lane)
    assert [pop(queue) for _ in range(7)] == [1, 4, 6, 2, 5, 3, 0]


def test_a_job_that_returns_stands_in_front_of_its_lane(queue: Queue) -> None:
    first = push(queue, 1, A)
    push(queue, 2, A)
    assert pop(queue) == 1
    queue.push(first, A, NORMAL, front=True)
    assert [pop(queue), pop(queue)] == [1, 2]


def test_a_job_that_is_just_small_enough_goes(queue: Queue) -> None:
    queue.push(a_job(queue, 1, nbytes=5), A, NORMAL)
    assert pop(queue, nbytes=5) == 1


def test_a_job_that_is_too_large_stays(queue: Queue) -> None:
    queue.push(a_job(queue, 1, nbytes=5), A, NORMAL)
    assert pop(queue, nbytes=4) == 0
    assert queue.n_ready == 1
    assert pop(queue) == 1


def test_a_job_that_is_too_large_does_not_cost_its_lane_the_turn(queue: Queue) -> None:
    queue.push(a_job(queue, 1, nbytes=5), A, NORMAL)
    push(queue, 2, B)
    assert pop(queue, nbytes=4) == 0
    assert pop(queue) == 1


def test_a_job_in_several_lanes_is_popped_once(queue: Queue) -> None:
    push(queue, 1, A, B, C)
    push(queue, 2, C)
    assert queue.n_ready == 2
    assert [pop(queue) for _ in range(3)] == [1, 2, 0]


def test_a_job_in_two_lanes_of_a_priority_counts_once_there(queue: Queue) -> None:
    push(queue, 1, A, B)
    pop(queue)
    assert queue.first_priority() is None


def test_a_job_at_two_priorities_is_found_at_the_more_urgent_one(queue: Queue) -> None:
    job = push(queue, 1, A, priority=LOW)
    queue.push(job, B, HIGH)
    assert queue.first_priority() == HIGH
    assert pop(queue, HIGH) == 1
    assert queue.first_priority() is None


def test_jobs_of_one_lane_can_be_taken_out_of_turn(queue: Queue) -> None:
    push(queue, 1, A)
    push(queue, 2, B)
    push(queue, 3, A)
    job = queue.pop_of(B)
    queue.check()
    assert job is not None
    assert job.handle == 2
    assert queue.pop_of(B) is None
    assert [pop(queue), pop(queue)] == [1, 3]


def more(queue: Queue, n: int, nbytes: int = 100) -> list[int]:
    """Pop a job and what comes behind it; return the handles."""
    first = queue.pop(NORMAL)
    assert first is not None
    jobs = [first]
    queue.pop_more(jobs, NORMAL, n, nbytes)
    queue.check()
    return [job.handle for job in jobs]


@pytest.mark.parametrize("lanes", [(A, A, A, A), (A, B, A, B), (A, B, B, B)])
def test_what_follows_is_what_would_have_been_popped(lanes: tuple[LaneId, ...]) -> None:
    one, other = (Queue(Function("f"), Needs("", frozenset())) for _ in range(2))
    for handle, lane in enumerate(lanes, 1):
        push(one, handle, lane)
        push(other, handle, lane)
    assert more(one, 3) == [pop(other) for _ in range(3)]
    assert pop(one) == pop(other)
    assert not one.n_ready


def test_what_does_not_fit_does_not_follow(queue: Queue) -> None:
    queue.push_all([a_job(queue, handle, nbytes=2) for handle in range(1, 6)], A, NORMAL)
    assert more(queue, 10, nbytes=5) == [1, 2, 3]
    assert more(queue, 10, nbytes=2) == [4, 5]


def test_what_was_popped_elsewhere_does_not_follow(queue: Queue) -> None:
    push(queue, 1, A)
    push(queue, 2, A, B)
    push(queue, 3, A)
    assert queue.pop_of(B) is not None
    assert more(queue, 10) == [1, 3]
    assert n_entries(queue) == 0


def test_a_job_at_two_priorities_that_follows_counts_at_neither(queue: Queue) -> None:
    first = push(queue, 1, A)
    both = push(queue, 2, A)
    queue.push(both, B, LOW)
    waiting = push(queue, 3, B, priority=LOW)
    assert more(queue, 10) == [1, 2]
    assert queue.first_priority() == LOW
    assert (first.stands_at, both.stands_at) == (0, 0)
    assert queue.ready == [0, 0, 1]
    assert waiting.stands_at


@pytest.mark.parametrize("lanes", [(A, A, A), (A, B, A)])
def test_nothing_follows_a_job_that_may_run_only_once(
    queue: Queue, lanes: tuple[LaneId, ...]
) -> None:
    for handle, lane in enumerate(lanes, 1):
        job = a_job(queue, handle)
        if handle == 2:
            job.terms = SubmitJobs("f", [], attempts=1)
        queue.push(job, lane, NORMAL)
    # Of the lanes that take turns, the last job of A comes behind that of B.
    assert more(queue, 10) == [1, 2]
    assert more(queue, 10) == [3]


def test_jobs_that_are_pushed_together_stand_one_behind_the_other(queue: Queue) -> None:
    push(queue, 1, A)
    push(queue, 2, B)
    queue.push_all([a_job(queue, handle) for handle in (3, 4)], A, NORMAL)
    queue.check()
    assert [pop(queue) for _ in range(5)] == [1, 2, 3, 4, 0]


def test_entries_of_jobs_that_are_gone_do_not_pile_up(queue: Queue) -> None:
    """Each round leaves an entry in a lane whose turn never comes."""
    waiting = push(queue, 1, C)
    for handle in range(2, 2000):
        push(queue, handle, A, B)
        assert queue.pop_of(A) is not None
    assert n_entries(queue) < 200
    assert waiting.stands_at


def test_a_sweep_keeps_the_ready_jobs_and_their_order(queue: Queue) -> None:
    for handle in range(1, 301):
        push(queue, handle, B)
        push(queue, 1000 + handle, A, C)
        assert queue.pop_of(A) is not None
    assert [pop(queue) for _ in range(301)] == [*range(1, 301), 0]


def test_a_queue_without_ready_jobs_holds_on_to_none(queue: Queue) -> None:
    job = push(queue, 1, A, B)
    queue.leave(job)
    queue.check()
    assert n_entries(queue) == 0
