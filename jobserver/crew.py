"""The workers, what they can do, and who of them sleeps.

A server cannot push work at a sleeping worker: it is not the only server, and two might choose
the same one while another is free. It wakes a worker, who then grabs, here or elsewhere. What must
hold at all times is that *nobody sleeps through work*: a queue with ready jobs has no sleeper, or
at least as many woken workers as ready jobs. "Wake one sleeper per submit" looks right and is
wrong: the woken worker may die before it grabs, may grab a job of another function, may announce
a new ability in its sleep, or may have found work on another server. So whatever changes one side
of that sentence asks ``to_wake`` again.

Which workers fit which queue is worked out when a queue or an ability is new, never for a job.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from jobserver.jobs import Function, Sleep, Worker
from jobserver.protocol import Ability
from jobserver.queues import Needs, Queue

_IDLE_QUEUES = 1024
"""So many queues without a job are kept, because their next job is likely to come."""

_WEIGHT = 0.2
"""Of the newest measurement in a function's running average."""


class Crew:
    """All workers of one server, matched with its queues."""

    def __init__(self) -> None:
        self.workers: dict[Worker, None] = {}
        self.functions: dict[str, Function] = {}
        self._idle: OrderedDict[Queue, None] = OrderedDict()  # queues without a live job
        self._n_grabs = 0

    # --- queues -----------------------------------------------------------------------------

    def require_function(self, name: str) -> Function:
        """Find or create a function."""
        function = self.functions.get(name)
        if function is None:
            function = self.functions[name] = Function(name)
        return function

    def require_queue(self, name: str, needs: Needs) -> Queue:
        """Find or create a queue. O(workers of the function) when it is new."""
        function = self.require_function(name)
        queue = function.queues.get(needs)
        if queue is None:
            queue = function.queues[needs] = Queue(function, needs)
            for worker in function.workers:
                if needs.met_by(worker):
                    self._join(worker, queue)
            self._keep_idle(queue)
        return queue

    def count_in(self, queue: Queue, n: int = 1) -> None:
        """Note that so many jobs now belong to this queue."""
        if not queue.n_live:
            self._idle.pop(queue, None)
        queue.n_live += n

    def count_out(self, queue: Queue, n: int = 1) -> None:
        """Note that so many jobs of this queue have ended."""
        queue.n_live -= n
        if not queue.n_live:
            self._keep_idle(queue)

    def _keep_idle(self, queue: Queue) -> None:
        self._idle[queue] = None
        if len(self._idle) > _IDLE_QUEUES:
            oldest, _ = self._idle.popitem(last=False)
            for worker in list(oldest.workers):
                self._part(worker, oldest)
            del oldest.function.queues[oldest.needs]
            self._forget_if_unused(oldest.function)

    def _forget_if_unused(self, function: Function) -> None:
        if not function.workers and not function.queues:
            del self.functions[function.name]

    # --- workers ----------------------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        """Take in a worker that can do nothing yet."""
        self.workers[worker] = None

    def remove(self, worker: Worker) -> list[Queue]:
        """Forget a worker. Returns the queues to look at again with ``to_wake``."""
        queues = list(worker.queues)
        self.cant_do(worker, list(worker.abilities))
        del self.workers[worker]
        return queues

    def can_do(self, worker: Worker, abilities: Iterable[Ability]) -> list[Queue]:
        """Add abilities. Returns the queues to look at again with ``to_wake``."""
        joined: list[Queue] = []
        for ability in abilities:
            function = self.require_function(ability.function)
            function.merge = ability.merge
            function.workers[worker] = None
            worker.abilities[ability.function] = ability
            for queue in function.queues.values():
                if queue not in worker.queues and queue.needs.met_by(worker):
                    self._join(worker, queue)
                    joined.append(queue)
        return joined

    def cant_do(self, worker: Worker, functions: Iterable[str]) -> list[Queue]:
        """Take abilities away. Returns the queues to look at again with ``to_wake``."""
        parted: list[Queue] = []
        for name in functions:
            if worker.abilities.pop(name, None) is None:
                continue
            function = self.functions[name]
            del function.workers[worker]
            for queue in list(function.queues.values()):
                if queue in worker.queues:
                    self._part(worker, queue)
                    parted.append(queue)
            self._forget_if_unused(function)
        return parted

    def _join(self, worker: Worker, queue: Queue) -> None:
        worker.queues[queue] = None
        queue.workers[worker] = None
        self._count_sleep(worker, queue, worker.sleep, 1)

    def _part(self, worker: Worker, queue: Queue) -> None:
        self._count_sleep(worker, queue, worker.sleep, -1)
        del worker.queues[queue]
        del queue.workers[worker]

    # --- sleep ------------------------------------------------------------------------------

    def set_sleep(self, worker: Worker, sleep: Sleep, now: float) -> None:
        """Change how a worker sleeps, in all places that know of it. O(abilities)."""
        if sleep == worker.sleep:
            return
        for queue in worker.queues:
            self._count_sleep(worker, queue, worker.sleep, -1)
            self._count_sleep(worker, queue, sleep, 1)
        worker.sleep = sleep
        worker.since = now

    @staticmethod
    def _count_sleep(worker: Worker, queue: Queue, sleep: Sleep, by: int) -> None:
        if sleep in ("asleep", "waiting"):
            if by > 0:
                queue.sleepers[worker] = None
            else:
                del queue.sleepers[worker]
        elif sleep == "woken":
            queue.n_woken += by

    def to_wake(self, queue: Queue) -> Worker | None:
        """Return the worker to wake now for this queue, the one that slept longest, or None."""
        if queue.n_woken < queue.n_ready and queue.sleepers:
            return next(iter(queue.sleepers))
        return None

    # --- which job next ---------------------------------------------------------------------

    def choose(self, worker: Worker) -> tuple[Queue, int] | None:
        """Return the queue and priority from which this worker should get a job. O(abilities).

        The most urgent priority of any of its functions comes first; among equals the queue
        that gave longest ago.
        """
        best: tuple[int, int, Queue] | None = None
        for queue in worker.queues:
            if queue.n_ready:
                priority = queue.first_priority()
                assert priority is not None
                if best is None or (priority, queue.served) < best[:2]:
                    best = (priority, queue.served, queue)
        if best is None:
            return None
        self._n_grabs += 1
        best[2].served = self._n_grabs
        return best[2], best[0]

    def measured(self, function: Function, seconds: float, n: int = 1) -> None:
        """Take the measured time of ``n`` jobs, which took as long each, into the average."""
        if function.seconds is None:
            function.seconds = seconds
        else:
            weight = _WEIGHT if n == 1 else 1 - (1 - _WEIGHT) ** n
            function.seconds += weight * (seconds - function.seconds)

    def check(self) -> None:
        """Assert what must hold of workers and queues."""
        for name, function in self.functions.items():
            assert function.name == name
            assert function.workers or function.queues, "a function exists while it is of use"
            for worker in function.workers:
                assert name in worker.abilities, "an ability is known to both sides"
            for needs, queue in function.queues.items():
                assert queue.needs == needs
                fit = {worker for worker in function.workers if queue.needs.met_by(worker)}
                assert set(queue.workers) == fit, "a queue knows the workers that fit"
                asleep = {worker for worker in fit if worker.sleep in ("asleep", "waiting")}
                assert set(queue.sleepers) == asleep, "a queue knows its sleepers"
                n_woken = sum(worker.sleep == "woken" for worker in fit)
                assert queue.n_woken == n_woken, "a queue counts its woken workers"
                assert not queue.sleepers or queue.n_woken >= queue.n_ready, (
                    "nobody sleeps through work"
                )
                assert (queue in self._idle) == (not queue.n_live), "idle queues have no jobs"
                queue.check()
        for worker in self.workers:
            for name in worker.abilities:
                assert worker in self.functions[name].workers, "an ability is known to both sides"
            for queue in worker.queues:
                assert worker in queue.workers, "a worker and its queues know each other"
            assert (worker.grab is not None) == (worker.sleep == "waiting"), (
                "a grab stands exactly while its worker waits"
            )
