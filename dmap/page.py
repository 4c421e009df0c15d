"""What a supervisor shares with a child: settings that it reads once, and a page of memory.

The child writes what it runs and what it holds; the supervisor reads that while the child is deep
in user code, and writes what must reach it there. Both change it only under a record lock, which
the kernel frees when its holder dies::

    flags | cancel: the job to stop | claims: the running jobs, outermost first | held jobs

    held jobs:   accepted | started, the end not yet accepted | not started (some of them taken)
                          ^ reported                          ^ next                           ^ n

A child *claims* a job before it starts it, and says at which item it is before each item, or before
each slice of items that it expects to take less than a millisecond together. Whatever the child has
not claimed the supervisor may *take*, to give it back; a claim of a job that was taken fails. So a
job is started or given back, never both.

The lock is a POSIX record lock: it belongs to the process, and closing any descriptor of the page
in it frees it. Times are ``time.monotonic()``, which all processes of a host share.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import signal
import struct
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

import msgspec

from jobserver.protocol import Assigned, Origin

CANCEL_SIGNAL: Final = signal.SIGUSR2
"""Tells a child to look at the page, for a job that it should stop."""

CANNOT_START: Final = 69
"""Exit code of a child that could not import what it should, or was asked for what it has not."""

MAX_DEPTH: Final = 64
"""Jobs that run one inside the other."""

MAX_HELD: Final = 512
"""Held jobs that are written down. More may be held; they cannot be taken."""

_DRAINING, _WATCHED, _READY = 0, 1, 2  # offsets of the flags, one byte each
_CANCEL: Final = 8
_COUNTS: Final = 32
_CLAIMS: Final = 64

_KEY: Final = struct.Struct("=QQI")  # handle, boot, server
_NO_KEY: Final = bytes(_KEY.size)
_COUNT: Final = struct.Struct("=IIII")  # depth, reported, next, n
_CLAIM: Final = struct.Struct("=QQI I16sQd dHH QQdd")
_AT: Final = struct.Struct("=QQdd")
_AT_OFFSET: Final = _CLAIM.size - _AT.size
_TEXT_NBYTES: Final = 1024 + 256  # of a function's name and a uniq
_CLAIM_NBYTES: Final = -(-(_CLAIM.size + _TEXT_NBYTES) // 8) * 8
_HELD: Final = _CLAIMS + MAX_DEPTH * _CLAIM_NBYTES
_ENTRY: Final = struct.Struct("=QQII")  # handle, boot, server, taken
NBYTES: Final = -(-(_HELD + MAX_HELD * _ENTRY.size) // mmap.PAGESIZE) * mmap.PAGESIZE


class Key(NamedTuple):
    """A job, for the processes of one worker: its handle there, and there."""

    handle: int
    boot: int  # as ``boot_key`` returns it
    server: int


class Claim(NamedTuple):
    """A job that a child runs, at one of ``n_items`` items from ``item`` on.

    Deadlines are 0.0 where there is none.
    """

    key: Key
    attempt: int
    origin: Origin
    function: str
    uniq: bytes
    since: float
    deadline: float
    item: int
    n_items: int
    item_since: float
    item_deadline: float


class View(NamedTuple):
    """What a page said at one moment."""

    claims: tuple[Claim, ...]  # the innermost first
    ended: tuple[Key, ...]  # started and ended, the end perhaps not known to its server
    unclaimed: tuple[Key, ...]  # not started and not taken


def boot_key(boot: str) -> int:
    """Return a server's boot id as a number that is as good as unique."""
    return int.from_bytes(blake2b(boot.encode(), digest_size=8).digest(), "little")


class Settings(msgspec.Struct):
    """What a supervisor tells its child at its start."""

    servers: list[str]
    name: str
    host: str
    session: bytes
    child: int
    parent: int  # pid of the supervisor
    notify_fd: int  # a pipe: what is written there makes the supervisor look at its pages
    blobs_fd: int = -1  # a socket: there the supervisor is asked for blobs
    labels: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    log_level: int = logging.WARNING


def make_page(settings: Settings) -> int:
    """Return a descriptor of a new page, with the settings behind it for the child to read."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("dmap-page")
    else:
        with tempfile.TemporaryFile(prefix="dmap-page-") as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, NBYTES)
    os.pwrite(fd, msgspec.msgpack.encode(settings), NBYTES)
    return fd


def read_settings(fd: int) -> Settings:
    """Return the settings that lie behind a page."""
    packed = os.pread(fd, os.fstat(fd).st_size - NBYTES, NBYTES)
    return msgspec.msgpack.decode(packed, type=Settings)


def python_version() -> str:
    """Return the version that closures depend on: X.Y."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


class _Lock:
    """The lock of a page, for a with statement; one made by contextlib takes twice as long."""

    __slots__ = ("_fd", "_flags")

    def __init__(self, fd: int, flags: int) -> None:
        self._fd = fd
        self._flags = flags

    def __enter__(self) -> None:
        fcntl.lockf(self._fd, self._flags, 1)

    def __exit__(self, *error: object) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)


class Page:
    """One end of a page.

    The supervisor's methods raise BlockingIOError when the child has the page locked: it was
    stopped, or the machine is very busy. Try again later.

    Args:
        fd: as ``make_page`` returned it; it stays open until ``close``.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, NBYTES)
        self._lock = _Lock(fd, fcntl.LOCK_EX)
        self._lock_nowait = _Lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Give up the page."""
        self._memory.close()
        os.close(self.fd)

    # --- flags: single bytes, which need no lock ----------------------------------------------

    @property
    def draining(self) -> bool:
        """Whether the child should finish its item and leave. Either side sets it."""
        return self._memory[_DRAINING] != 0

    def set_draining(self) -> None:
        """Ask the child to leave; a signal must wake it."""
        self._memory[_DRAINING] = 1

    @property
    def ready(self) -> bool:
        """Whether the child has come as far as its servers."""
        return self._memory[_READY] != 0

    def set_ready(self) -> None:
        """Say that the child has imported what it should and runs."""
        self._memory[_READY] = 1

    @property
    def watched(self) -> bool:
        """Whether the supervisor looks at this page every few milliseconds."""
        return self._memory[_WATCHED] != 0

    def set_watched(self, watched: bool) -> None:
        """Say whether the supervisor looks often."""
        self._memory[_WATCHED] = watched

    # --- the child's side ---------------------------------------------------------------------

    def hold(self, keys: Sequence[Key]) -> set[Key]:
        """Write down what is held and not started, in order.

        What is claimed at once needs not be written down.

        Returns:
            Those of them that the supervisor has taken meanwhile; the others are held.
        """
        with self._lock:
            depth, reported, start, n = self._counts()
            entries = list(self._entries(reported, n))
            ended = entries[: start - reported]
            taken = {key for key, is_taken in entries[start - reported :] if is_taken}
            room = MAX_HELD - len(ended)
            held = [key for key in keys if key not in taken][:room]
            self._write_entries(0, [*(key for key, _ in ended), *held])
            self._set_counts(depth, 0, len(ended), len(ended) + len(held))
        return taken.intersection(keys)

    def unhold(self) -> set[Key]:
        """Hold nothing any more, to give it back. Returns what the supervisor has taken already."""
        with self._lock:
            depth, reported, start, n = self._counts()
            taken = {key for key, is_taken in self._entries(start, n) if is_taken}
            self._set_counts(depth, reported, start, start)
        return taken

    def claim(self, key: Key, job: Assigned, now: float, *, instead: bool = False) -> bool:
        """Claim a job, inside those that are claimed already, or return False: it was taken.

        Args:
            key: the job.
            job: what is shown of it.
            now: since when it runs.
            instead: in the place of the innermost one, which has ended. That is ``release`` and
                ``claim`` for the price of one.

        Raises:
            RecursionError: too many jobs run inside each other.
        """
        function = job.function.encode()
        session, ticket = job.origin
        deadline = now + job.timeout if job.timeout else 0.0
        n_items = job.n_items
        fields = (
            *key,
            job.attempt,
            session,
            ticket,
            now,
            deadline,
            len(function),
            len(job.uniq),
            0,
            n_items,
            now,
            0.0,
        )
        with self._lock:
            depth, reported, start, n = self._counts()
            if instead:
                depth -= 1
                self._end_cancel(depth)
            if depth == MAX_DEPTH:
                raise RecursionError(f"more than {MAX_DEPTH} jobs wait inside each other")
            if start == n:  # it was not written down, being the only one
                if reported == start:
                    reported = start = n = 0
                if n < MAX_HELD:
                    _ENTRY.pack_into(self._memory, _HELD + n * _ENTRY.size, *key, 0)
                    start = n = n + 1
            # What was taken lies in front of it; if it is not there, it was one too many to write.
            at = start
            while at < n:
                held, is_taken = self._entry(at)
                at += 1
                if held == key:
                    start = at
                    if is_taken:
                        self._set_counts(depth, reported, start, n)
                        return False
                    break
                if not is_taken:
                    break
            offset = _CLAIMS + depth * _CLAIM_NBYTES
            _CLAIM.pack_into(self._memory, offset, *fields)
            text = offset + _CLAIM.size
            end = text + len(function) + len(job.uniq)
            self._memory[text:end] = function + job.uniq
            # Last: who reads this page after our death finds a claim whole or not at all.
            self._set_counts(depth + 1, reported, start, n)
        return True

    def at(self, item: int, n_items: int, now: float, deadline: float = 0.0) -> None:
        """Say that the innermost job is at one of ``n_items`` items from ``item`` on."""
        with self._lock:
            depth = self._counts()[0]
            offset = _CLAIMS + (depth - 1) * _CLAIM_NBYTES + _AT_OFFSET
            _AT.pack_into(self._memory, offset, item, n_items, now, deadline)

    def release(self) -> None:
        """End the claim of the innermost job."""
        with self._lock:
            depth, reported, start, n = self._counts()
            self._end_cancel(depth - 1)
            self._set_counts(depth - 1, reported, start, n)

    def reported(self) -> None:
        """Say that the servers know of all that ended."""
        with self._lock:
            depth, _, start, n = self._counts()
            self._set_counts(depth, start, start, n)

    # --- the supervisor's side ----------------------------------------------------------------

    def view(self) -> View:
        """Return what the page says now."""
        with self._lock_nowait:
            return self.view_unlocked()

    def view_unlocked(self) -> View:
        """Return what the page says, where the child has ended."""
        depth, reported, start, n = self._counts()
        claims = tuple(self._claim(index) for index in reversed(range(depth)))
        running = {claim.key for claim in claims}
        ended = tuple(key for key, _ in self._entries(reported, start) if key not in running)
        unclaimed = tuple(key for key, is_taken in self._entries(start, n) if not is_taken)
        return View(claims, ended, unclaimed)

    def take(self, wanted: Collection[Key] | None = None) -> list[Key]:
        """Take from the child what it has not started: of these, or all. Returns what was taken."""
        taken: list[Key] = []
        with self._lock_nowait:
            _, _, start, n = self._counts()
            for index, (key, is_taken) in enumerate(self._entries(start, n), start):
                if not is_taken and (wanted is None or key in wanted):
                    _ENTRY.pack_into(self._memory, _HELD + index * _ENTRY.size, *key, 1)
                    taken.append(key)
        return taken

    def cancel(self, key: Key, claim: Claim | None = None) -> bool:
        """Ask the child to stop a job, if it runs it now; a signal must follow.

        Args:
            key: the job.
            claim: if given, the child must still be at that item of it.

        Returns:
            Whether it runs it (at that item).
        """
        with self._lock_nowait:
            for index in range(self._counts()[0]):
                found = self._claim(index)
                if found.key == key and (claim is None or found == claim):
                    _KEY.pack_into(self._memory, _CANCEL, *key)
                    return True
        return False

    # --- both ---------------------------------------------------------------------------------

    @property
    def cancelled(self) -> Key | None:
        """The job that should stop, while the child runs it. Needs no lock in the child."""
        if self._memory[_CANCEL : _CANCEL + _KEY.size] == _NO_KEY:
            return None
        return Key(*_KEY.unpack_from(self._memory, _CANCEL))

    def _end_cancel(self, index: int) -> None:
        """Forget a cancel of the claim at this index."""
        cancelled = self._memory[_CANCEL : _CANCEL + _KEY.size]
        if cancelled != _NO_KEY:
            offset = _CLAIMS + index * _CLAIM_NBYTES
            if self._memory[offset : offset + _KEY.size] == cancelled:
                self._memory[_CANCEL : _CANCEL + _KEY.size] = _NO_KEY

    def _counts(self) -> tuple[int, int, int, int]:
        depth, reported, start, n = _COUNT.unpack_from(self._memory, _COUNTS)
        return depth, reported, start, n

    def _set_counts(self, depth: int, reported: int, start: int, n: int) -> None:
        _COUNT.pack_into(self._memory, _COUNTS, depth, reported, start, n)

    def _entries(self, start: int, end: int) -> Iterator[tuple[Key, bool]]:
        return (self._entry(index) for index in range(start, end))

    def _entry(self, index: int) -> tuple[Key, bool]:
        handle, boot, server, taken = _ENTRY.unpack_from(self._memory, _HELD + index * _ENTRY.size)
        return Key(handle, boot, server), taken != 0

    def _write_entries(self, start: int, keys: Iterable[Key]) -> None:
        packed = b"".join(_ENTRY.pack(*key, 0) for key in keys)
        offset = _HELD + start * _ENTRY.size
        self._memory[offset : offset + len(packed)] = packed

    def _claim(self, index: int) -> Claim:
        offset = _CLAIMS + index * _CLAIM_NBYTES
        (
            handle,
            boot,
            server,
            attempt,
            session,
            ticket,
            since,
            deadline,
            n_function,
            n_uniq,
            item,
            n_items,
            item_since,
            item_deadline,
        ) = _CLAIM.unpack_from(self._memory, offset)
        text = offset + _CLAIM.size
        function = self._memory[text : text + n_function].decode()
        uniq = self._memory[text + n_function : text + n_function + n_uniq]
        return Claim(
            Key(handle, boot, server),
            attempt,
            Origin(session, ticket),
            function,
            uniq,
            since,
            deadline,
            item,
            n_items,
            item_since,
            item_deadline,
        )
