"""Run a map's chunks on simulated workers, to see what sizes are worth without a clock.

One client cuts chunks as a `ChunkSizer` says and submits them to one server, which gives them in
order to whoever is free:

    client --latency/2--> server's queue --> worker: overhead + items / speed --latency/2--> client
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

from dmap.chunks import MOST_ITEMS, OVERRUN, ChunkSizer


@dataclass(frozen=True)
class Worker:
    """A worker of the simulation.

    Attributes:
        speed: seconds of item cost that it works off in a second.
        joins_at: seconds after the start of the map.
        leaves_after: items, after which it takes nothing more and hands back what it has.
    """

    speed: float = 1.0
    joins_at: float = 0.0
    leaves_after: float = inf


@dataclass
class Outcome:
    """What one simulated map did.

    Attributes:
        makespan: seconds from the start until the client has the last result.
        sizes: items of each chunk, in the order in which they were cut.
        runs: how often each item was run to its end.
        most_out: the most chunks that were out at once.
    """

    makespan: float = 0.0
    sizes: list[int] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    most_out: int = 0


def run_map(
    costs: Sequence[float],
    workers: Sequence[Worker],
    sizer: ChunkSizer,
    *,
    latency: float = 0.0006,
    overhead: float = 0.0007,
    overrun: float = OVERRUN,
    both_ends: bool = True,
) -> Outcome:
    """Map over items of the given costs and tell how it went.

    Args:
        costs: seconds that each item takes at speed 1.
        workers: at least one of them joins and never leaves.
        sizer: fresh; its `n_workers` is kept up to date here.
        latency: seconds from a worker's last item until the client's next chunk could be there.
        overhead: seconds a chunk that the worker is busy with anything but items.
        overrun: seconds; a chunk that has taken longer after an item comes home in part.
        both_ends: whether chunks may be cut from the end of the input too.

    Raises:
        AssertionError: the sizer said something that it must never say.
    """
    outcome = Outcome(runs=[0] * len(costs))
    input_ = range(len(costs))
    uncut: deque[tuple[bool, range]] = deque()  # what came back
    sides: dict[int, bool] = {}  # start of a chunk -> whether it is from the end
    ready: deque[range] = deque()
    free: deque[int] = deque()
    budgets = [worker.leaves_after for worker in workers]
    events: list[tuple[float, int, str, int, range, int, float]] = []
    serials = count()
    sizer.n_workers = n_out = n_chunks_out = 0

    def post(
        at: float, what: str, worker: int, chunk: range = range(0), n_done: int = 0, work: float = 0
    ) -> None:
        heapq.heappush(events, (at, next(serials), what, worker, chunk, n_done, work))

    for index, worker in enumerate(workers):
        post(worker.joins_at, "join", index)
    while True:
        while uncut or input_:
            from_end = uncut[0][0] if uncut else both_ends and sizer.from_end()
            size = sizer.next_size(n_out, n_chunks_out, from_end=from_end)
            again = sizer.next_size(n_out, n_chunks_out, from_end=from_end)
            assert size == again, "asking changed the answer"
            assert size >= 1 or n_chunks_out, "stuck: nothing is out and nothing may be cut"
            assert 0 <= size <= MOST_ITEMS
            if size == 0:
                break
            if uncut:
                _, run = uncut.popleft()
                chunk, rest = run[:size], run[size:]
                if rest:
                    uncut.appendleft((from_end, rest))
            elif from_end:
                chunk, input_ = input_[-size:], input_[:-size]
            else:
                chunk, input_ = input_[:size], input_[size:]
            sizer.cut(len(chunk), from_end=from_end)
            sides[chunk.start] = from_end
            outcome.sizes.append(len(chunk))
            n_out += len(chunk)
            n_chunks_out += 1
            outcome.most_out = max(outcome.most_out, n_chunks_out)
            post(outcome.makespan + latency / 2, "arrive", -1, chunk)
        if not n_chunks_out:
            return outcome
        now, _, what, index, chunk, n_done, work = heapq.heappop(events)
        match what:
            case "join":
                sizer.n_workers += 1
                free.append(index)
            case "arrive":
                ready.append(chunk)
            case "finish":
                post(now + latency / 2, "home", index, chunk, n_done, work)
                if budgets[index] > 0:
                    free.append(index)
            case "home":
                outcome.makespan = now
                n_out -= len(chunk)
                n_chunks_out -= 1
                from_end = sides.pop(chunk.start)
                sizer.done(n_done, work, from_end=from_end)
                if n_done < len(chunk):
                    sizer.returned(len(chunk) - n_done, from_end=from_end)
                    uncut.appendleft((from_end, chunk[n_done:]))
                if budgets[index] <= 0:
                    sizer.n_workers -= 1
        while ready and free:
            index, chunk = free.popleft(), ready.popleft()
            n_done, work = 0, 0.0
            for item in chunk:
                if budgets[index] <= 0:
                    break
                budgets[index] -= 1
                outcome.runs[item] += 1
                n_done += 1
                seconds = costs[item] / workers[index].speed
                work += seconds
                if work > overrun:
                    break
            post(now + overhead + work, "finish", index, chunk, n_done, work)


def longest_first(costs: Sequence[float], n_workers: int) -> float:
    """Return the makespan if each free worker took the longest item left, at no overhead."""
    free_at = [0.0] * n_workers
    for seconds in sorted(costs, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)
