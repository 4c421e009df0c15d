"""What a server has, as rows for people: the answers to ``Show``.

Pure. Strings are as peers sent them; whoever prints a row escapes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, assert_never

from jobserver.jobs import ASSIGNED, Function, Job, Worker
from jobserver.protocol import HIGH, LOW, NORMAL, handle_text

if TYPE_CHECKING:
    from jobserver.state import State

MAX_ROWS: Final = 10_000
"""No answer holds the server up for longer than some ten milliseconds."""

MAX_NAMES: Final = 100
"""Abilities named in one worker's row; ``n_abilities`` counts them all."""

PRIORITY_NAMES: Final = ("high", "normal", "low")

What: TypeAlias = Literal["status", "workers", "jobs"]
Row: TypeAlias = dict[str, object]


def show(state: State, what: What, now: float) -> list[Row]:
    """Return at most ``MAX_ROWS`` rows: functions, workers, or jobs (the running ones first).

    Durations are seconds. Cost: O(rows), for "status" O(all workers' abilities).
    """
    rows: Iterator[Row]
    match what:
        case "status":
            functions = sorted(state.crew.functions.values(), key=lambda function: function.name)
            rows = map(_row_of_function, functions)
        case "workers":
            rows = (_row_of_worker(worker, now) for worker in state.crew.workers)
        case "jobs":
            rows = (_row_of_job(state, job, now) for job in _jobs(state))
        case _:
            assert_never(what)
    return list(islice(rows, MAX_ROWS))


def _row_of_function(function: Function) -> Row:
    queues = function.queues.values()
    n_ready = sum(queue.n_ready for queue in queues)
    n_live = sum(queue.n_live for queue in queues)
    return {
        "function": function.name,
        # A merged job counts at each priority that it was submitted with.
        "high": sum(queue.ready[HIGH] for queue in queues),
        "normal": sum(queue.ready[NORMAL] for queue in queues),
        "low": sum(queue.ready[LOW] for queue in queues),
        "delayed": n_live - n_ready - function.n_running,
        "running": function.n_running,
        "workers": len(function.workers),
        "sleeping": sum(worker.sleep in ("asleep", "waiting") for worker in function.workers),
        "seconds": function.seconds,
    }


def _row_of_worker(worker: Worker, now: float) -> Row:
    return {
        "name": worker.name,
        "host": worker.host,
        "pid": worker.pid,
        "child": worker.child,
        "python": worker.python,
        "labels": sorted(worker.labels),
        "abilities": sorted(islice(worker.abilities, MAX_NAMES)),
        "n_abilities": len(worker.abilities),
        "jobs": len(worker.held),
        "state": "busy" if worker.held else worker.sleep,
        "since": now - worker.since,
    }


def _jobs(state: State) -> Iterator[Job]:
    running = (job for worker in state.crew.workers for job in worker.held.values())
    others = (job for job in state.book.jobs.values() if job.state != ASSIGNED)
    return chain(running, others)


def _row_of_job(state: State, job: Job, now: float) -> Row:
    session = state.book.sessions.get(job.lane.session)
    lane = session.lanes.get(job.lane.lane) if session else None
    return {
        "handle": handle_text(state.name, state.boot, job.handle),
        "function": job.name,
        "state": "running" if job.state == ASSIGNED else job.state,
        "priority": PRIORITY_NAMES[job.terms.priority],
        "listeners": len(job.listeners),
        "background": job.background,
        "items": job.n_items,
        "nbytes": job.nbytes,
        "attempt": job.attempt,
        "age": now - job.since,
        "worker": job.worker.name if job.worker else "",
        "host": job.worker.host if job.worker else "",
        "status": list(job.progress) if job.progress else None,
        "lane": job.lane.lane,
        "description": lane.description if lane else "",
    }
