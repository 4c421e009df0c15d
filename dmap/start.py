"""How a supervisor starts its children: the first ones by fork, later ones by exec.

An interpreter and the imports of a worker take a core a tenth of a second. A supervisor that has
just been started has paid for both, and its first children are copies of it::

    dmap-worker --+-- fork --> child 1, 2, ...       while it has one thread and no sockets
                  '-- exec --> in the place of who died, later, when it has both

Only the command itself forks, on Linux, before it has made anything that a copy could not use. No
code of users is in it at that time: what ``--import`` names is imported by the children. A forked
child has of its parent what an exec'd one would have, and nothing more: a session of its own, three
descriptors beside the standard ones, the same path to import from, an empty ``__main__``.

It returns to where its parent was started, and goes on from there as a worker; so it ends as any
Python process does.
"""

from __future__ import annotations

import builtins
import gc
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from dmap.buffers import make_pair
from dmap.page import Settings, make_page

if TYPE_CHECKING:
    import socket

_EXEC: Final = "import sys; from dmap.worker import main; sys.exit(main())"
_THREADS: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
"""Where libraries read, when they are loaded, how many threads to start; those that joblib sets."""


class Process(Protocol):
    """What a supervisor needs of a `subprocess.Popen`, which is one."""

    @property
    def pid(self) -> int:
        """Its number, which is another's as soon as its end was noticed."""

    def poll(self) -> int | None:
        """Return how it ended, as Popen does; None while it lives."""

    def wait(self) -> int:
        """Block until it has ended."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless its end was noticed already."""


class Forked:
    """A process that this one has forked; a `Process`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """Return how it ended: its exit code, or a signal as a negative number; None: it lives."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Block until it has ended."""
        returncode = self._wait(0)
        assert returncode is not None
        return returncode

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless its end was noticed already."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self._returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._returncode = os.waitstatus_to_exitcode(status)
        return self._returncode


class Started(NamedTuple):
    """A child, and what its supervisor has of it."""

    number: int
    process: Process
    page_fd: int
    blobs: socket.socket


def can_fork() -> bool:
    """Tell whether a copy of this process would be as good as a new one."""
    if sys.platform != "linux":  # macOS has libraries that do not survive it
        return False
    with suppress(OSError):
        return len(os.listdir("/proc/self/task")) == 1
    return False


def by_exec(settings: Settings, n_threads: int) -> Started:
    """Start a child as a new program.

    Args:
        settings: with the child's number.
        n_threads: that its libraries may start for a computation, unless the user has said it.

    Raises:
        OSError: no memory, too many processes or open files.
    """
    with ExitStack() as undo:
        ours, theirs = make_pair()
        undo.enter_context(ours)
        with theirs:
            settings = msgspec.structs.replace(settings, blobs_fd=theirs.fileno())
            page_fd = make_page(settings)
            undo.callback(os.close, page_fd)
            process = subprocess.Popen(
                [sys.executable, "-c", _EXEC, str(page_fd)],
                pass_fds=(page_fd, settings.notify_fd, settings.blobs_fd),
                stdin=subprocess.DEVNULL,
                env={**_limits(n_threads), **os.environ},
                start_new_session=True,  # the terminal's Ctrl-C is for the supervisor
            )
        undo.pop_all()
    return Started(settings.child, process, page_fd, ours)


def by_fork(settings: Settings, n_threads: int, siblings: Iterable[Started] = ()) -> Started | int:
    """Start a child as a copy of this process, for which ``can_fork`` must hold.

    Args:
        settings: as for ``by_exec``.
        n_threads: as for ``by_exec``.
        siblings: the children that were forked before it.

    Returns:
        In the parent the child. In the child the descriptor of its page, for ``dmap.worker.run``.

    Raises:
        OSError: as for ``by_exec``.
    """
    with ExitStack() as undo:
        ours, theirs = make_pair()
        undo.enter_context(ours)
        with theirs:
            settings = msgspec.structs.replace(settings, blobs_fd=theirs.fileno())
            page_fd = make_page(settings)
            undo.callback(os.close, page_fd)
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()  # else both processes would
            # What is here now stays for as long as either runs: no collection need touch, and so
            # copy, the pages where it lies.
            gc.freeze()
            pid = os.fork()
            if not pid:
                theirs.detach()
        undo.pop_all()
    if pid:
        return Started(settings.child, Forked(pid), page_fd, ours)
    for end in (ours, *(sibling.blobs for sibling in siblings)):
        end.close()
    _begin_anew(n_threads, keep={page_fd, settings.notify_fd, settings.blobs_fd})
    return page_fd


def _begin_anew(n_threads: int, keep: set[int]) -> None:
    """Make a forked process what it would be had it been started as a new program."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd > 2 and fd not in keep:
            with suppress(OSError):  # the one of the folder is closed by now
                os.close(fd)
    os.environ.update({**_limits(n_threads), **os.environ})
    path = sys.path if sys.flags.safe_path else sys.path[1:]
    sys.path[:] = path if os.environ.get("PYTHONSAFEPATH") else ["", *path]
    sys.modules["__main__"] = main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})


def _limits(n_threads: int) -> dict[str, str]:
    """Return what has all children together start as many threads as there are cores."""
    return dict.fromkeys(_THREADS, str(n_threads))
