"""What a supervisor shares with a child: settings that it reads once, and a page of memory.

The child writes what it runs and what it holds; the supervisor reads that while the child is deep
in user code, and writes what must reach it there::

    flags | cancel: the job to stop | state | claims: the running jobs, outermost first | held jobs

    held jobs:   accepted | started, the end not yet accepted | not started (some of them taken)
                          ^ reported                          ^ next                           ^ n

A child *claims* a job before it starts it, and says at which item it is before each item, or before
each slice of items that it expects to take less than a millisecond together. Whatever the child has
not claimed the supervisor may *take*, to give it back; a claim of a job that was taken fails. So a
job is started or given back, never both:

* Each held job has a *token*, a word of its own. To claim the job, and to take it, begins with one
  atomic exchange of that word by the processor (``pthread_spin_trylock``), which succeeds once. For
  whom it does has the job, whenever the other one looks, is interrupted or dies. So neither needs
  to know what the other is doing, and a job behind one that takes long can always be taken. On a
  system without such a function a claim needs the lock instead.
* The lock, which the kernel frees when its holder dies, keeps *where things are*: only under it the
  child writes held jobs, or a claim in full, and the supervisor looks.
* How much of it all counts is one word, the *state*. Only the child writes it, with one store of
  the processor: what a death leaves behind is what was before that store, or after. Held jobs are
  written into the one of two banks that does not count, and the state makes it the one that does.
* To claim one of many jobs takes no lock: that ``next`` steps over its entry *is* the claim. What
  is to be shown of it was written beside the entries when they came.
* A cancel may come late, when the child has gone on to another job. It interrupts none: it names
  its own, and handles are not used again. The next claim removes it.

The lock is a POSIX record lock: it belongs to the process, and closing any descriptor of the page
in it frees it. Times are ``time.monotonic()``, which all processes of a host share.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import mmap
import os
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import blake2b
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from jobserver.protocol import Assigned, Origin

CANCEL_SIGNAL: Final = signal.SIGUSR2
"""Tells a child to look at the page, for a job that it should stop."""

CANNOT_START: Final = 69
"""Exit code of a child that could not import what it should, or was asked for what it has not."""

MAX_DEPTH: Final = 64
"""Jobs that run one inside the other."""

MAX_HELD: Final = 1024
"""Held jobs that are written down. More may be held; they cannot be taken."""

_DRAINING, _WATCHED, _READY = 0, 1, 2  # offsets of the flags, one byte each
_CANCEL: Final = 8
_CANCEL_BOOT: Final = 2  # of the words: no boot has the key 0
_STATE: Final = 4  # of the words
_SINCE: Final = 5  # of the words: when the job began whose claim is its entry
_CLAIMS: Final = 64

_KEY: Final = struct.Struct("=QQI")  # handle, boot, server
_NO_KEY: Final = bytes(_KEY.size)
_CLAIM: Final = struct.Struct("=QQI I16sQd dHH QQdd")
_AT: Final = struct.Struct("=QQdd")
_AT_OFFSET: Final = _CLAIM.size - _AT.size
_TEXT_NBYTES: Final = 1024 + 256  # of a function's name and a uniq
_CLAIM_NBYTES: Final = -(-(_CLAIM.size + _TEXT_NBYTES) // 8) * 8
_BANKS: Final = _CLAIMS + MAX_DEPTH * _CLAIM_NBYTES
_ENTRY: Final = struct.Struct("=QQIIII")  # handle, boot, server, taken, token, -
_TAKEN: Final = struct.Struct("=I")
_TAKEN_OFFSET: Final = 20
_TOKEN_OFFSET: Final = 24
_SHOWN: Final = struct.Struct("=II")  # of which entry the first is, nbytes of all
_SHOWN_OFFSET: Final = MAX_HELD * _ENTRY.size
_MAX_SHOWN_NBYTES: Final = 2**17
_BANK_NBYTES: Final = _SHOWN_OFFSET + _SHOWN.size + _MAX_SHOWN_NBYTES
NBYTES: Final = -(-(_BANKS + 2 * _BANK_NBYTES) // mmap.PAGESIZE) * mmap.PAGESIZE

# Where in the state's 64 bits each of its fields begins.
_N: Final = 0
_NEXT: Final = 16
_REPORTED: Final = 32
_DEPTH: Final = 48
_BANK: Final = 56
_BY_ENTRY: Final = 57
_DEPTH_MASK: Final = 0xFF << _DEPTH
_ONE_BY_ENTRY: Final = 1 << _DEPTH | 1 << _BY_ENTRY


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


_State: TypeAlias = tuple[int, int, int, int, int, int]
"""n, next, reported, depth, bank, by_entry: is the innermost claim the entry in front of ``next``,
instead of one in full?"""


def _unpack(state: int) -> _State:
    return (
        state & 0xFFFF,
        state >> _NEXT & 0xFFFF,
        state >> _REPORTED & 0xFFFF,
        state >> _DEPTH & 0xFF,
        state >> _BANK & 1,
        state >> _BY_ENTRY & 1,
    )


class _Shown(msgspec.Struct, array_like=True, gc=False):
    """What a claim shows of a job, beside its key and since when it runs."""

    attempt: int
    origin: Origin
    function: str
    uniq: bytes
    n_items: int


_encode: Final = msgspec.msgpack.Encoder().encode
_split: Final = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_decode: Final = msgspec.msgpack.Decoder(_Shown).decode


@functools.cache
def _tokens() -> tuple[Callable[[int], int] | None, int]:
    """Return what takes a free token at an address (then 0), if there is such, and a free one."""
    import ctypes  # a supervisor may never need it

    libc = ctypes.PyDLL(None)  # keeps the GIL: to let it go and get it again takes longer
    try:
        init: Any = libc.pthread_spin_init
        take: Any = libc.pthread_spin_trylock
    except AttributeError:  # macOS
        return None, 1
    take.argtypes = [ctypes.c_void_p]
    token = ctypes.c_uint32()
    init(ctypes.byref(token), 1)  # PTHREAD_PROCESS_SHARED
    return take, token.value


def _address_of(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def boot_key(boot: str) -> int:
    """Return a server's boot id as a number that is as good as unique, and not 0."""
    return int.from_bytes(blake2b(boot.encode(), digest_size=8).digest(), "little") or 1


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
        with memoryview(self._memory) as whole, whole[:_CLAIMS] as head:
            self._words = head.cast("Q")
            self._times = head.cast("d")
        self._lock = _Lock(fd, fcntl.LOCK_EX)
        self._lock_nowait = _Lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._address = 0  # of the memory, once it is needed
        # The child's own: the state, as it wrote it last; the jobs that can be claimed by their
        # entry (None: this one cannot), which entry is that of the first, and its token's address.
        self._state: int = self._words[_STATE]
        self._jobs: Sequence[Assigned | None] = ()
        self._first = 0
        self._take_token: Callable[[int], int]  # once anything is held
        self._first_token = 0

    def close(self) -> None:
        """Give up the page."""
        self._words.release()
        self._times.release()
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

    @property
    def n_ended(self) -> int:
        """How many jobs are shown as ended, whose end may not be known."""
        _, start, reported, _, _, _ = _unpack(self._state)
        return start - reported

    def hold(
        self,
        keys: Sequence[Key],
        jobs: Sequence[Assigned] = (),
        unreported: Collection[Key] | None = None,
    ) -> set[Key]:
        """Write down what is held and not started, in order.

        What is claimed at once needs not be written down.

        Args:
            keys: their names.
            jobs: they themselves, to be claimed by ``claim_next``; else ``claim`` claims them.
            unreported: of what ended, or runs, the only ones whose end may not be known; None: of
                none is more known than was said by ``reported``.

        Returns:
            Those of them that the supervisor has taken meanwhile; the others are held.
        """
        take, free = _tokens()
        wanted: set[Key] = set()
        with self._lock:
            self._settle()
            n, start, reported, depth, bank, _ = _unpack(self._state)
            taken = {key for key, is_taken in self._entries(bank, start, n) if is_taken}
            if taken:
                wanted = taken.intersection(keys)
                kept = [index for index, key in enumerate(keys) if key not in taken]
                keys = [keys[index] for index in kept]
                jobs = [jobs[index] for index in kept] if jobs else ()
            ended = [
                key
                for key, _ in self._entries(bank, reported, start)
                if unreported is None or key in unreported
            ]
            first = len(ended)
            keys = keys[: MAX_HELD - first]
            jobs = jobs[: MAX_HELD - first]
            bank = 1 - bank
            offset = _BANKS + bank * _BANK_NBYTES
            pack = _ENTRY.pack
            entries = [pack(*key, 0, free, 0) for key in ended]
            entries += [pack(handle, boot, server, 0, free, 0) for handle, boot, server in keys]
            self._write(offset, b"".join(entries))
            shown = _encode(
                [
                    _Shown(job.attempt, job.origin, job.function, job.uniq, job.n_items)
                    for job in jobs
                ]
            )
            if len(shown) <= _MAX_SHOWN_NBYTES:
                self._write(offset + _SHOWN_OFFSET, _SHOWN.pack(first, len(shown)) + shown)
            else:
                jobs = ()
            # A limit needs a deadline, and its supervisor to see both at once.
            self._jobs = [None if job.timeout or job.item_timeout else job for job in jobs]
            self._first = first
            if take is None:
                self._jobs = ()
            else:
                self._take_token = take
                self._first_token = self._token(bank, first)
            self._store(first + len(keys), first, 0, depth, bank)
        return wanted

    def unhold(self) -> set[Key]:
        """Hold nothing any more, to give it back. Returns what the supervisor has taken already."""
        with self._lock:
            n, start, reported, depth, bank, by_entry = _unpack(self._state)
            taken = {key for key, is_taken in self._entries(bank, start, n) if is_taken}
            self._store(start, start, reported, depth, bank, by_entry)
        return taken

    def claim_next(self, job: Assigned, now: float, *, instead: bool = False) -> bool | None:
        """Do as ``claim`` for a job that is the next one written down, in a tenth of the time.

        Returns:
            None: this job has to be claimed by ``claim``. It is not the next one, has a limit, or
            runs inside of another one, or this system has no tokens.
        """
        state = self._state
        at = (state >> _NEXT & 0xFFFF) - self._first
        if (
            not 0 <= at < len(self._jobs)
            or self._jobs[at] is not job
            or not (instead or state & _DEPTH_MASK == 0)
            or self.is_cancelling
        ):
            return None
        is_taken = self._take_token(self._first_token + at * _ENTRY.size) != 0
        state += 1 << _NEXT
        if is_taken:
            if instead:
                state -= 1 << _DEPTH
            state &= ~(1 << _BY_ENTRY)
        else:
            if not instead:
                state += 1 << _DEPTH
            state |= 1 << _BY_ENTRY
            self._times[_SINCE] = now
        self._state = self._words[_STATE] = state
        return not is_taken

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
        with self._lock:
            if instead:
                self._drop()
            else:
                self._settle()
            self._forget_cancel()
            n, start, reported, depth, bank, _ = _unpack(self._state)
            if depth == MAX_DEPTH:
                raise RecursionError(f"more than {MAX_DEPTH} jobs wait inside each other")
            if start == n:  # it was not written down, being the only one
                self._jobs = ()
                if reported == start:
                    reported = start = n = 0
                if n < MAX_HELD:
                    _ENTRY.pack_into(self._memory, self._offset(bank, n), *key, 0, 0, 0)
                    start = n = n + 1
            # What was taken lies in front of it; if it is not there, it was one too many to write.
            at = start
            while at < n:
                held, is_taken = self._entry(bank, at)
                if held == key:
                    start = at + 1
                    if is_taken:
                        self._store(n, start, reported, depth, bank)
                        return False
                    break
                if not is_taken:
                    break
                at += 1
            self._write_claim(depth, key, job, now)
            self._store(n, start, reported, depth + 1, bank)
        return True

    def at(self, item: int, n_items: int, now: float, deadline: float = 0.0) -> None:
        """Say that the innermost job is at one of ``n_items`` items from ``item`` on."""
        with self._lock:
            self._settle()
            depth = self._state >> _DEPTH & 0xFF
            offset = _CLAIMS + (depth - 1) * _CLAIM_NBYTES + _AT_OFFSET
            _AT.pack_into(self._memory, offset, item, n_items, now, deadline)

    def release(self) -> None:
        """End the claim of the innermost job."""
        self._drop()
        if self.is_cancelling:
            with self._lock:
                self._forget_cancel()

    def reported(self) -> None:
        """Say that the servers know of all that ended."""
        n, start, _, depth, bank, by_entry = _unpack(self._state)
        self._store(n, start, start, depth, bank, by_entry)

    def _store(
        self, n: int, start: int, reported: int, depth: int, bank: int, by_entry: int = 0
    ) -> None:
        state = n << _N | start << _NEXT | reported << _REPORTED
        state |= depth << _DEPTH | bank << _BANK | by_entry << _BY_ENTRY
        self._state = self._words[_STATE] = state

    def _drop(self) -> None:
        """Let the innermost claim count no more."""
        state = (self._state - (1 << _DEPTH)) & ~(1 << _BY_ENTRY)
        self._state = self._words[_STATE] = state

    def _settle(self) -> None:
        """Write a claim in full that is an entry, and may be that no longer."""
        if self._state >> _BY_ENTRY:
            n, start, reported, depth, bank, _ = _unpack(self._state)
            job = self._jobs[start - 1 - self._first]
            assert job is not None, "only what was written down is claimed by its entry"
            key = self._entry(bank, start - 1)[0]
            self._write_claim(depth - 1, key, job, self._times[_SINCE])
            self._store(n, start, reported, depth, bank)

    def _write_claim(self, index: int, key: Key, job: Assigned, now: float) -> None:
        function = job.function.encode()
        session, ticket = job.origin
        offset = _CLAIMS + index * _CLAIM_NBYTES
        _CLAIM.pack_into(
            self._memory,
            offset,
            *key,
            job.attempt,
            session,
            ticket,
            now,
            now + job.timeout if job.timeout else 0.0,
            len(function),
            len(job.uniq),
            0,
            job.n_items,
            now,
            0.0,
        )
        self._write(offset + _CLAIM.size, function + job.uniq)

    def _forget_cancel(self) -> None:
        """Forget a cancel of a job that runs no more. No claim is an entry now."""
        cancelled = self.cancelled if self.is_cancelling else None
        if cancelled is not None:
            depth = self._state >> _DEPTH & 0xFF
            if all(self._claim(index).key != cancelled for index in range(depth)):
                self._write(_CANCEL, _NO_KEY)

    # --- the supervisor's side ----------------------------------------------------------------

    def view(self) -> View:
        """Return what the page says now."""
        with self._lock_nowait:
            return self.view_unlocked()

    def view_unlocked(self) -> View:
        """Return what the page says, where the child has ended."""
        state = _unpack(self._words[_STATE])
        n, start, reported, _, bank, _ = state
        claims = tuple(self._claims(state))
        running = {claim.key for claim in claims}
        ended = tuple(key for key, _ in self._entries(bank, reported, start) if key not in running)
        unclaimed = tuple(key for key, is_taken in self._entries(bank, start, n) if not is_taken)
        return View(claims, ended, unclaimed)

    def take(self, wanted: Collection[Key] | None = None) -> list[Key]:
        """Take from the child what it has not started: of these, or all. Returns what was taken."""
        taken: list[Key] = []
        take_token = _tokens()[0]
        with self._lock_nowait:
            n, start, _, _, bank, _ = _unpack(self._words[_STATE])
            for index, (key, is_taken) in enumerate(self._entries(bank, start, n), start):
                if is_taken or not (wanted is None or key in wanted):
                    continue
                if take_token is None or take_token(self._token(bank, index)) == 0:
                    _TAKEN.pack_into(self._memory, self._offset(bank, index) + _TAKEN_OFFSET, 1)
                    taken.append(key)
        return taken

    def is_brief(self, since: float) -> bool:
        """Tell whether one job runs, since that time or later, and without a limit.

        Needs no lock, and may be false where that is so. Jobs by the thousand are no work then.
        """
        is_one = self._words[_STATE] & (_DEPTH_MASK | 1 << _BY_ENTRY) == _ONE_BY_ENTRY
        return is_one and self._times[_SINCE] >= since

    def cancel(self, key: Key, claim: Claim | None = None) -> bool:
        """Ask the child to stop a job, if it runs it now; a signal must follow.

        Args:
            key: the job.
            claim: if given, the child must still be at that item of it.

        Returns:
            Whether it runs it (at that item).
        """
        with self._lock_nowait:
            for found in self._claims(_unpack(self._words[_STATE])):
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

    @property
    def is_cancelling(self) -> bool:
        """Whether any job should stop, or should have before it ended."""
        return self._words[_CANCEL_BOOT] != 0

    def _write(self, offset: int, packed: bytes) -> None:
        self._memory[offset : offset + len(packed)] = packed

    def _offset(self, bank: int, index: int) -> int:
        return _BANKS + bank * _BANK_NBYTES + index * _ENTRY.size

    def _entries(self, bank: int, start: int, end: int) -> Iterator[tuple[Key, bool]]:
        return (self._entry(bank, index) for index in range(start, end))

    def _entry(self, bank: int, index: int) -> tuple[Key, bool]:
        offset = self._offset(bank, index)
        handle, boot, server, taken, _, _ = _ENTRY.unpack_from(self._memory, offset)
        return Key(handle, boot, server), taken != 0

    def _token(self, bank: int, index: int) -> int:
        """Return the address of an entry's token."""
        if not self._address:
            self._address = _address_of(self._memory)
        return self._address + self._offset(bank, index) + _TOKEN_OFFSET

    def _claims(self, state: _State) -> Iterator[Claim]:
        """Yield what runs, the innermost first."""
        _, start, _, depth, bank, by_entry = state
        if by_entry:
            depth -= 1
            yield self._claim_of_entry(bank, start - 1)
        for index in reversed(range(depth)):
            yield self._claim(index)

    def _claim_of_entry(self, bank: int, index: int) -> Claim:
        key, _ = self._entry(bank, index)
        offset = self._offset(bank, 0) + _SHOWN_OFFSET
        first, nbytes = _SHOWN.unpack_from(self._memory, offset)
        offset += _SHOWN.size
        shown = _decode(_split(self._memory[offset : offset + nbytes])[index - first])
        since: float = self._times[_SINCE]
        return Claim(
            key,
            shown.attempt,
            shown.origin,
            shown.function,
            shown.uniq,
            since,
            0.0,
            0,
            shown.n_items,
            since,
            0.0,
        )

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
