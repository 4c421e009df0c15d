"""What users' code sees of the worker that runs it: ``job`` and ``current_job``.

Functions are registered under a name by the module that has them, and any client may ask for them
by that name, without having the code::

    @job("resize", timeout=30)
    def resize(path: str) -> str:
        current_job().status(1, 2)
        ...

    $ dmap-worker --servers sammy --import app.pictures

What a job does with ``current_job()`` goes through the worker that runs it (``Host``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from dmap import seeds, work
from jobserver.protocol import Ability, Assigned, LaneId, Origin

P = ParamSpec("P")
R = TypeVar("R")


class Registered(NamedTuple):
    """A function that has a name."""

    function: Callable[..., Any]
    merge: bool
    timeout: float | None


_registered: dict[str, Registered] = {}  # name -> function


def job(
    name: str, merge: bool = False, timeout: float | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function under a name, for workers that import its module.

    Args:
        name: what clients ask for, at most 256 characters.
        merge: whether calls with equal arguments that are made while one waits or runs join that
            one and share its result. Say True only of what may well run once for many callers.
        timeout: seconds that one run may take; None for any time.

    Returns:
        A decorator that returns the function as it is.

    Raises:
        ValueError: the name is no name, another function has it, or the timeout is not positive.
    """
    if not 1 <= len(name) <= 256 or not name.isprintable():
        raise ValueError(f"{name!r} is no name for a function: 1 to 256 printable characters")
    if name == work.FUNCTION:
        raise ValueError(f"the name {name!r} is taken: it is what runs closures")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"a timeout of {timeout} seconds lets nothing run; None is no limit")

    def register(function: Callable[P, R]) -> Callable[P, R]:
        other = _registered.get(name)
        if other is not None and _place(other.function) != _place(function):
            raise ValueError(
                f"two functions are registered as {name!r}: "
                f"{'.'.join(_place(other.function))} and {'.'.join(_place(function))}"
            )
        _registered[name] = Registered(function, merge, timeout)
        return function

    return register


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    """A module that is loaded again registers its functions again."""
    return function.__module__, getattr(function, "__qualname__", repr(function))


def find(name: str) -> Callable[..., Any] | None:
    """Return the function of that name, if there is one here."""
    found = _registered.get(name)
    return found.function if found else None


def abilities(only: Sequence[str] = ()) -> list[Ability]:
    """Return what this process can do: all that is registered, and closures.

    Args:
        only: if not empty, no other functions than these.

    Raises:
        ValueError: one of ``only`` is not registered; the message names those that are.
    """
    can_do = {work.FUNCTION: Ability(work.FUNCTION)}
    for name, registered in _registered.items():
        can_do[name] = Ability(name, registered.timeout or 0.0, registered.merge)
    unknown = [name for name in only if name not in can_do]
    if unknown:
        raise ValueError(
            f"no function {', '.join(map(repr, unknown))} is registered here; "
            f"there are {', '.join(map(repr, can_do))}: is --import missing?"
        )
    return [can_do[name] for name in dict.fromkeys(only or can_do)]


class Host(Protocol):
    """The worker process, as the job that it runs needs it."""

    name: str

    def innermost(self) -> Assigned | None:
        """Return the job that runs now."""

    def text_handle(self, job: Assigned) -> str:
        """Return a job's handle as people write it."""

    def say_status(self, job: Assigned, numerator: int, denominator: int) -> None:
        """Tell a job's listeners how far it is."""

    def say_data(self, job: Assigned, value: object) -> None:
        """Send a job's listeners a partial result."""

    def say_warning(self, job: Assigned, text: str) -> None:
        """Send a job's listeners a warning."""

    def is_cancelled(self, job: Assigned) -> bool:
        """Tell whether a running job should stop."""

    def cant_do(self, function: str) -> None:
        """Own a function no longer."""

    def run_nested(
        self,
        lanes: Sequence[LaneId],
        until: Callable[[], bool],
        wait: Callable[[float], None],
    ) -> None:
        """Run jobs of these lanes, in the running job's place, until what it waits for is there.

        Args:
            lanes: where the jobs are that it waits for.
            until: whether the wait is over. Asked between any two jobs.
            wait: blocks for at most so many seconds, and comes back early when something
                happened. Called when no job of the lanes is ready.
        """


_host: Host | None = None
_pid = 0


def set_host(host: Host | None) -> None:
    """Say which worker this process is."""
    global _host, _pid
    _host = host
    _pid = os.getpid()


def _current() -> tuple[Host, Assigned] | None:
    # A process that a job forks has the worker's memory, but is not the worker.
    if _host is None or os.getpid() != _pid:
        return None
    running = _host.innermost()
    return (_host, running) if running is not None else None


def current_worker() -> Host | None:
    """Return the worker whose job this thread is running, or None.

    A thread that a job started is not the job: only the worker's main thread can run jobs.
    """
    current = _current()
    if current is None or threading.current_thread() is not threading.main_thread():
        return None
    return current[0]


def current_job() -> CurrentJob:
    """Return the job in which this code runs.

    Raises:
        RuntimeError: it does not run inside a job.
    """
    current = _current()
    if current is None:
        raise RuntimeError(
            "current_job() was called outside a job: it is there while a worker runs a function, "
            "in the worker's own process"
        )
    return CurrentJob(*current)


class CurrentJob:
    """A job that is running, seen from inside.

    Attributes:
        function: the name by which it was called; ``dmap`` for closures.
        handle: its handle, as ``dmap jobs`` shows it.
        attempt: 1, or more when earlier attempts lost their worker.
        worker: the name of the worker, which is its host's unless it was given one.
    """

    def __init__(self, host: Host, job: Assigned) -> None:
        self._host = host
        self._job = job
        self.function = job.function
        self.handle = host.text_handle(job)
        self.attempt = job.attempt
        self.worker = host.name

    def status(self, numerator: int, denominator: int) -> None:
        """Tell all who listen to this job that it is at ``numerator`` of ``denominator``.

        Raises:
            ValueError: a number is negative.
        """
        if numerator < 0 or denominator < 0:
            raise ValueError(f"a status of {numerator} of {denominator} is less than nothing")
        self._host.say_status(self._job, int(numerator), int(denominator))

    def data(self, value: object) -> None:
        """Send a partial result to all who listen to this job.

        Raises:
            ClosureError: it cannot be pickled.
            TypeError: the client speaks raw bytes, and this is something else.
        """
        self._host.say_data(self._job, value)

    def warning(self, text: str) -> None:
        """Send a warning to all who listen to this job."""
        self._host.say_warning(self._job, text)

    @property
    def cancelled(self) -> bool:
        """Whether this job was cancelled, or ran out of its time.

        It is then interrupted, and its process killed half a second later if it goes on. Only code
        that catches the interruption, or runs in another thread, comes to see True.
        """
        return self._host.is_cancelled(self._job)

    @property
    def rng(self) -> Any:
        """The random numbers of this item: a ``numpy.random.Generator``.

        In a map with a ``seed`` they are made of the seed and the item's index, and of nothing
        else. Otherwise they are this process's own. Where NumPy is not installed it is a
        ``random.Random``.
        """
        return seeds.generator()

    def cant_do(self, function: str) -> None:
        """Have this worker process take no more jobs of a function. What it has it finishes."""
        self._host.cant_do(function)

    @property
    def _ancestors(self) -> tuple[Origin, ...]:
        """This job and those in which it was submitted, the outermost first."""
        return (*self._job.ancestors, self._job.origin)

    def __repr__(self) -> str:
        return f"<job {self.handle} of {self.function!r}, attempt {self.attempt}>"
