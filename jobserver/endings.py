"""Ended jobs, remembered for a while: so that "done" and "never existed" can be told apart.

Of jobs that others may still ask for (merged ones, background ones) the result is kept too, under
a budget of bytes: a resubmit after the loss of a server may join a job that has just ended here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from jobserver.jobs import Ended, Limits, Untaken


class Endings:
    """The last ended jobs, oldest first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.nbytes = 0
        self._ended: dict[int, Ended] = {}  # handle -> how it ended
        self._handles: deque[int] = deque()  # the same, oldest first
        self._by_uniq: dict[tuple[str, bytes], int] = {}  # (function, uniq) -> handle, newest

    def __len__(self) -> int:
        return len(self._ended)

    def remember(self, handle: int, ended: Ended) -> None:
        """Keep this, at the cost of the oldest when there are too many."""
        self._ended[handle] = ended
        self._handles.append(handle)
        if ended.end is not None:
            self.nbytes += ended.end.nbytes
            if ended.uniq:
                self._by_uniq[ended.function, ended.uniq] = handle
        self._forget_too_many()

    def remember_all(self, handles: Sequence[int], ended: Ended) -> None:
        """Keep of several jobs that they ended like this, and no result."""
        self._ended.update(dict.fromkeys(handles, ended))
        self._handles.extend(handles)
        self._forget_too_many()

    def get(self, handle: int) -> Ended | None:
        """Return how the job with this handle ended."""
        return self._ended.get(handle)

    def of_uniq(self, function: str, uniq: bytes) -> int | None:
        """Return the handle of the newest ended job of this uniq whose result is kept."""
        return self._by_uniq.get((function, uniq))

    def result_of(self, function: str, uniq: bytes) -> Untaken | None:
        """Return the result of that job, if it is kept."""
        handle = self._by_uniq.get((function, uniq))
        return None if handle is None else self._ended[handle].end

    def forget_before(self, at: float) -> None:
        """Drop what ended before that moment."""
        while self._handles and self._ended[self._handles[0]].at < at:
            self._forget_oldest()

    def _forget_too_many(self) -> None:
        limits = self._limits
        n_ended, ended_nbytes = limits.n_ended, limits.ended_nbytes
        while len(self._ended) > n_ended or self.nbytes > ended_nbytes:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        handle = self._handles.popleft()
        ended = self._ended.pop(handle)
        if ended.end is not None:
            self.nbytes -= ended.end.nbytes
            if self._by_uniq.get((ended.function, ended.uniq)) == handle:
                del self._by_uniq[ended.function, ended.uniq]

    def check(self) -> None:
        """Assert what must hold of the memory."""
        assert list(self._ended) == list(self._handles), "the oldest goes first"
        kept = [ended.end.nbytes for ended in self._ended.values() if ended.end is not None]
        assert self.nbytes == sum(kept), "the kept bytes are counted"
        for (function, uniq), handle in self._by_uniq.items():
            ended = self._ended[handle]
            assert (ended.function, ended.uniq) == (function, uniq)
            assert ended.end is not None, "what is found by its uniq has its result kept"
