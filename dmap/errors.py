"""Every error that dmap raises on its own account, under one root.

::

    DmapError
    ├── NoServer          no job server could be reached
    ├── NoWorker          no worker can do this function
    ├── Busy              a server is at a limit of count or bytes
    ├── AuthError         a key was refused
    ├── InsecureBind      a server without keys would listen to strangers
    ├── ProtocolError     a peer broke the rules of the wire
    ├── WorkerLost        the worker died under this item, every time
    ├── RemoteError       the function's exception, which would not travel
    ├── ClosureError      something could not be pickled      (also a pickle.PicklingError)
    ├── JobTimeout        the time that the caller gave is up (also a TimeoutError)
    └── JobCancelled      somebody cancelled the job          (also a futures.CancelledError)

    UserWarning
    └── DmapWarning       degraded, and a person may want to know

What the user's function raises keeps its own type (`dmap.raised`). An exception that ends a map,
of whichever kind, carries ``results``: a dict from the index of each finished item to its value.
All of these can be pickled and copied with their attributes.
"""

from __future__ import annotations

from concurrent.futures import CancelledError
from pickle import PicklingError

from jobserver.errors import DmapError, InsecureBind, ProtocolError

__all__ = [
    "DmapError",
    "NoServer",
    "NoWorker",
    "Busy",
    "AuthError",
    "InsecureBind",
    "ProtocolError",
    "WorkerLost",
    "RemoteError",
    "ClosureError",
    "JobTimeout",
    "JobCancelled",
    "DmapWarning",
]

# The names are what the caller reads in an `except`; "Error" at the end would add nothing.


class NoServer(DmapError):
    """No job server answered within the bound that the message states.

    The message lists the addresses that were tried. Start a server there (``jobserver``), correct
    the addresses (``DMAP_SERVERS``, ``servers=``), or name none and have a local cluster.
    """


class NoWorker(DmapError):
    """No worker that a server knows can do this function: its name, labels or Python version.

    Start one (``dmap-worker --servers ...``), with the module that registers the function
    (``--import``) or under the Python version that the message names.
    """


class Busy(DmapError):
    """A server is at a limit of jobs or bytes and takes no more for now.

    Nothing was lost and nothing was accepted. Try again later, or give the server more room.
    """


class AuthError(DmapError):
    """A server refused this key, or this side refused the server's.

    Use the key file that was made for this cluster (``dmap keys``) on both sides.
    """


class WorkerLost(DmapError):
    """The worker that ran this item died, or fell silent, in every attempt that the item had.

    The function, or the host, is at fault: a crash in C code, ``os._exit``, or the kernel's
    out-of-memory killer (SIGKILL that nobody sent). Run the item alone to see it.

    Attributes:
        index: Which item of the map; None for a job that is no item.
        host: Where the last attempt ran.
        attempts: How many attempts were lost.
        exit: How the last one ended, such as ``"SIGKILL"`` or ``"exit code 3"``.
    """

    def __init__(self, index: int | None, host: str, attempts: int, exit: str) -> None:
        super().__init__(index, host, attempts, exit)
        self.index = index
        self.host = host
        self.attempts = attempts
        self.exit = exit

    def __str__(self) -> str:
        subject = "the job" if self.index is None else f"item {self.index}"
        times = "" if self.attempts == 1 else f" {self.attempts} times, the last time"
        text = f"{subject} lost its worker{times} on {self.host} ({self.exit})"
        if self.exit == "SIGKILL":
            text += "; if nobody killed it, that host ran out of memory: use fewer processes there"
        return text


class RemoteError(DmapError):
    """The function raised an exception that could not travel as itself; this tells what it was.

    If at least its class could travel, what arrives is of both classes, so that
    ``except TheirType`` and ``except RemoteError`` both catch it. What would steer the caller's
    program instead of telling it something (SystemExit, KeyboardInterrupt, StopIteration and their
    like) arrives as this class alone.

    Attributes:
        type_name: Dotted name of the exception's class.
        message: Its ``str()``, bounded.
        traceback: The text of the remote traceback, bounded.
    """

    def __init__(self, type_name: str, message: str, traceback: str) -> None:
        super().__init__(type_name, message, traceback)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}" if self.message else self.type_name


class ClosureError(DmapError, PicklingError):
    """A function, an item or a result cannot be pickled, or cannot be loaded where it arrived.

    The message names the type, for a function also the captured variable, and what to do.

    Attributes:
        index: Which item of the map; None where it is not about an item.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class JobTimeout(DmapError, TimeoutError):
    """The time that the caller gave (``timeout`` or ``item_timeout``, in seconds) is up.

    The function is slower than expected, or nothing runs it: see ``dmap jobs``.
    """


class JobCancelled(DmapError, CancelledError):
    """The job was cancelled before it had a result, by this caller or by somebody else."""


class DmapWarning(UserWarning):
    """Something works less well than it should; the message says what and what to do."""
