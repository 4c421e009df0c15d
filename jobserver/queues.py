"""Ready jobs in order: a queue for each (function, needs), and in it lanes that take turns.

::

    Queue ("dmap", python 3.11)
      HIGH    (no lane)
      NORMAL  lane A  [1 2 3 4 5 ... 1,000,000]     one map
              lane B  [7 8]                         another session's single jobs
      LOW     lane C  [9]

A pop takes one job of the first lane and sends that lane to the back, so a million-item map does
not make its neighbour's two jobs wait. A merged job stands in the lane of everyone who wants it,
so an entry is only a hint: what counts is the job's own state, and entries of jobs that are not
ready any more are passed over when they come up. A queue is swept when it has twice the entries
that the last sweep left, and emptied when its last ready job goes; so time and memory are O(1) a
job, a job being counted once for each lane where it stands.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from jobserver.protocol import N_PRIORITIES, LaneId

if TYPE_CHECKING:
    from jobserver.jobs import Function, Job, Worker

_SLACK = 64
"""So many entries are never worth a sweep."""


class Needs(NamedTuple):
    """What a job asks of its worker beside the function. An empty ``python`` is any."""

    python: str
    labels: frozenset[str]

    def met_by(self, worker: Worker) -> bool:
        """Tell whether this worker will do."""
        return (not self.python or self.python == worker.python) and self.labels <= worker.labels


@lru_cache(maxsize=256)
def needs_of(python: str, labels: tuple[str, ...]) -> Needs:
    """Return the needs that a client has said."""
    return Needs(python, frozenset(labels))


class Lane:
    """The jobs of one map, or of one session's single jobs, at one priority of one queue."""

    __slots__ = ("id", "jobs")

    def __init__(self, lane: LaneId) -> None:
        self.id = lane
        self.jobs: deque[Job] = deque()


class Queue:
    """The ready jobs of one function with one set of needs, and the workers that fit."""

    __slots__ = (
        "_n_entries",
        "_sweep_at",
        "_turns",
        "function",
        "lanes",
        "n_live",
        "n_ready",
        "n_woken",
        "needs",
        "ready",
        "served",
        "sleepers",
        "workers",
    )

    def __init__(self, function: Function, needs: Needs) -> None:
        self.function = function
        self.needs = needs
        self.workers: dict[Worker, None] = {}  # those that can do it
        self.sleepers: OrderedDict[Worker, None] = OrderedDict()  # of these, the longest first
        self.n_woken = 0  # of the workers, how many were woken and have not grabbed yet
        self.n_live = 0  # jobs of this queue in any state
        self.n_ready = 0  # of these, how many are ready
        self.ready = [0] * N_PRIORITIES  # priority -> how many ready jobs stand there
        self.served = 0  # when it last gave a job, in grabs of the whole server
        self.lanes: list[dict[LaneId, Lane]] = [{} for _ in range(N_PRIORITIES)]
        self._turns: list[deque[Lane]] = [deque() for _ in range(N_PRIORITIES)]
        self._n_entries = 0
        self._sweep_at = _SLACK

    def push(self, job: Job, lane: LaneId, priority: int, *, front: bool = False) -> None:
        """Let a ready job stand in a lane (also in this one, if it stands elsewhere already)."""
        if self._n_entries > self._sweep_at:
            self._sweep()
        found = self.lanes[priority].get(lane)
        if found is None:
            found = self.lanes[priority][lane] = Lane(lane)
            self._turns[priority].append(found)
        if front:
            found.jobs.appendleft(job)
        else:
            found.jobs.append(job)
        self._n_entries += 1
        if not job.stands_at:
            self.n_ready += 1
        if not job.stands_at & 1 << priority:
            job.stands_at |= 1 << priority
            self.ready[priority] += 1

    def push_all(self, jobs: Sequence[Job], lane: LaneId, priority: int) -> None:
        """Let these jobs, none of which stands anywhere, stand at the back of a lane."""
        self.push(jobs[0], lane, priority)
        bit = 1 << priority
        for job in jobs:
            job.stands_at = bit
        self.lanes[priority][lane].jobs.extend(jobs[1:])
        more = len(jobs) - 1
        self._n_entries += more
        self.n_ready += more
        self.ready[priority] += more

    def leave(self, job: Job) -> None:
        """Note that a job is not ready any more. Its entries are passed over from now on."""
        self._unstand(job)
        if not self.n_ready:
            self._empty()

    def first_priority(self) -> int | None:
        """Return the most urgent priority at which a job is ready."""
        for priority in range(N_PRIORITIES):
            if self.ready[priority]:
                return priority
        return None

    def pop(self, priority: int, nbytes: int | None = None) -> Job | None:
        """Take the next job of the lane whose turn it is, or None.

        With ``nbytes``, a job whose argument is larger stays, and the answer is None.
        """
        turns = self._turns[priority]
        job = None
        while turns and job is None:
            lane = turns[0]
            job = self._pop_lane(lane, nbytes)
            if not lane.jobs:
                turns.popleft()
                del self.lanes[priority][lane.id]
            elif job is None:
                break
            else:
                turns.rotate(-1)
        if not self.n_ready:
            self._empty()
        return job

    def pop_more(self, jobs: list[Job], priority: int, n: int, nbytes: int) -> None:
        """Take what comes behind these jobs, until they are ``n``.

        The arguments of what is added have at most ``nbytes`` together. Nothing comes behind a job
        that may run only once: its result, not sent yet, would be lost with the worker if the next
        one killed that.
        """
        turns = self._turns[priority]
        while len(jobs) < n and nbytes > 0 and jobs[-1].terms.attempts > 1:
            if len(turns) == 1:
                # No turns to take: the same as below, of one lane, without a call for each.
                self._pop_run(jobs, priority, n, nbytes)
                return
            job = self.pop(priority, nbytes)
            if job is None:
                return
            jobs.append(job)
            nbytes -= job.nbytes

    def _pop_run(self, jobs: list[Job], priority: int, n: int, nbytes: int) -> None:
        lane = self._turns[priority][0]
        waiting = lane.jobs
        bit = 1 << priority
        n_entries = len(waiting)
        n_ready = 0
        may_follow = True
        while waiting and may_follow and len(jobs) < n and nbytes > 0:
            job = waiting[0]
            if not job.stands_at:
                waiting.popleft()
                continue
            if job.nbytes > nbytes:
                break
            waiting.popleft()
            if job.stands_at == bit:
                job.stands_at = 0
                n_ready += 1
            else:
                self._unstand(job)
            jobs.append(job)
            nbytes -= job.nbytes
            may_follow = job.terms.attempts > 1
        self._n_entries -= n_entries - len(waiting)
        self.ready[priority] -= n_ready
        self.n_ready -= n_ready
        if not waiting:
            self._turns[priority].popleft()
            del self.lanes[priority][lane.id]
        if not self.n_ready:
            self._empty()

    def pop_of(self, lane: LaneId) -> Job | None:
        """Take the next job of this one lane, whoever's turn it is, or None.

        O(lanes) when it was the lane's last.
        """
        for lanes, turns in zip(self.lanes, self._turns, strict=True):
            found = lanes.get(lane)
            if found is None:
                continue
            job = self._pop_lane(found, None)
            if not found.jobs:
                del lanes[lane]
                turns.remove(found)
            if job is not None:
                if not self.n_ready:
                    self._empty()
                return job
        return None

    def _pop_lane(self, lane: Lane, nbytes: int | None) -> Job | None:
        jobs = lane.jobs
        while jobs:
            job = jobs[0]
            if job.stands_at:
                if nbytes is not None and job.nbytes > nbytes:
                    return None
                jobs.popleft()
                self._n_entries -= 1
                self._unstand(job)
                return job
            jobs.popleft()
            self._n_entries -= 1
        return None

    def _unstand(self, job: Job) -> None:
        for priority in range(N_PRIORITIES):
            if job.stands_at & 1 << priority:
                self.ready[priority] -= 1
        job.stands_at = 0
        self.n_ready -= 1

    def _empty(self) -> None:
        for lanes, turns in zip(self.lanes, self._turns, strict=True):
            lanes.clear()
            turns.clear()
        self._n_entries = 0
        self._sweep_at = _SLACK

    def _sweep(self) -> None:
        self._n_entries = 0
        for priority, turns in enumerate(self._turns):
            for lane in turns:
                lane.jobs = deque(job for job in lane.jobs if job.stands_at)
                self._n_entries += len(lane.jobs)
            left = [lane for lane in turns if lane.jobs]
            self._turns[priority] = deque(left)
            self.lanes[priority] = {lane.id: lane for lane in left}
        self._sweep_at = _SLACK + 2 * self._n_entries

    def check(self) -> None:
        """Assert what must hold of the lanes."""
        n_entries = 0
        standing: dict[int, set[Job]] = {priority: set() for priority in range(N_PRIORITIES)}
        for priority, (lanes, turns) in enumerate(zip(self.lanes, self._turns, strict=True)):
            assert len(turns) == len(lanes), "each lane has exactly one turn"
            for lane in turns:
                assert lanes[lane.id] is lane, "a lane is found by its id"
                assert lane.jobs, "a lane exists only while it has entries"
                n_entries += len(lane.jobs)
                standing[priority].update(job for job in lane.jobs if job.stands_at)
        assert n_entries == self._n_entries, "the entries are counted"
        for priority, jobs in standing.items():
            counted = [job for job in jobs if job.stands_at & 1 << priority]
            assert len(counted) == self.ready[priority], "the ready jobs of a priority are counted"
        everyone = set().union(*standing.values())
        assert len(everyone) == self.n_ready, "the ready jobs are counted"
        assert self.n_ready or not n_entries, "an empty queue holds nothing on to"
