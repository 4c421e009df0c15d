r"""How many items go into the next chunk of a map.

A chunk is a run of consecutive items that travels in one job. Few large chunks cost few messages;
many small ones let all workers finish together. Nobody knows beforehand what an item costs, so the
sizes follow from the seconds that workers measured:

    size
     |          ______________
     |        _/              \__
     |      _/                   \__
     |    _/                        \____
     |___/                               \________   chunk after chunk
       learn    TARGET seconds each    share what is left

* **Learn.** The first chunks are single items. A chunk then has at most two times the items of the
  last one (up to sixteen times, where that is no more than FLOOR seconds of work), and of all that
  were measured lately, so a wrong guess costs little.
* **Steady.** A chunk should take TARGET seconds by a careful estimate of what an item costs: the
  greater of a mean, which remembers for some chunks the rare dear item among cheap ones, and of the
  worst of the last few chunks, which sees at once that items became dearer. Estimates need not be
  better than that, for a chunk that has taken OVERRUN seconds comes home in part.
* **Share.** Guided self-scheduling (C. D. Polychronopoulos and D. J. Kuck, IEEE Transactions on
  Computers C-36(12), 1987) gives each chunk an even share of what is left: the rest divided by the
  number of workers, anew each time. That is too much where costs vary or fall; factoring
  (S. F. Hummel, E. Schonberg and L. E. Flynn, Communications of the ACM 35(8), 1992) divides only
  half of the rest, and so does this. Chunks of less than FLOOR seconds are mostly message and even
  out what nobody sees, so there a whole even share is cut, and none is meant for less than LEAST
  seconds. Endless input has no rest to share.
* **Ahead.** One chunk a worker runs and one waits at the server, where whoever is free first takes
  it. More would not make a worker busier, and would be sized by older measurements.
* **Both ends.** Where all items are there (a list, say), chunks may be cut from the end too. Who
  has the longest items last, in a list that is sorted by size, waits for one worker at the end; who
  begins with the longest (R. L. Graham, SIAM Journal on Applied Mathematics 17(2), 1969) does not.
  So the first chunks come from the two ends in turn, and further ones from the end whose items turn
  out END_FACTOR times as dear, or else from the front. An item that is still out when others came
  home is the dearest of all that are known. Each end has an estimate of its own.
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf
from typing import Literal

# Seconds of work in a chunk. Where client and server share two cores with the workers, each chunk
# takes more than a millisecond from these, some ten times what it takes in a row.
TARGET = 0.1
OVERRUN = 0.2  # seconds after which a chunk that the sizer had meant for less comes home in part
FLOOR = 0.004  # seconds of work in a chunk, where an even share of the rest is as much
LEAST = 0.0002  # seconds of work in a chunk, where as much is left: less is all message
MOST_ITEMS = 65_536  # in a chunk that sizes itself: bounds what is lost with it and cut up anew
SHARES = 2  # a worker: the parts into which the rest is divided
CHUNKS_AHEAD = 2  # a worker: one runs, one waits
RECENT = 4  # chunks of which the worst counts: few, for one slow chunk shrinks as many after it
# What each chunk that comes home leaves of the mean, which so spans some 16 chunks. Longer, and a
# slow first call on each worker (an import), or the dear items that came first, keep chunks small.
MEMORY = 15 / 16
END_FACTOR = 2.0  # less is chance, and who prints from his function expects the front first

# Chunks of a fixed size may be far shorter than a message's way; then more of them are ahead.
SECONDS_AHEAD = 0.002  # a worker: some there-and-backs between client and worker
MOST_CHUNKS_AHEAD = 32  # a worker: bounds how many chunks are lost, or cancelled, with it


class _Side:
    """What is known of the items at one end of the input."""

    __slots__ = ("last", "n_cut", "n_items", "recent", "seconds")

    def __init__(self) -> None:
        self.n_cut = 0  # chunks
        self.last = 1  # items in the last chunk cut
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # (items, seconds an item)
        self.seconds = 0.0  # of work that came home, fading by MEMORY
        self.n_items = 0.0  # likewise

    def done(self, n_items: int, seconds: float) -> None:
        """Note what items took that came home."""
        self.recent.append((n_items, seconds / n_items))
        self.seconds = MEMORY * self.seconds + seconds
        self.n_items = MEMORY * self.n_items + n_items

    def mean(self) -> float:
        """Return the seconds of an item: infinitely many while none has come home."""
        return self.seconds / self.n_items if self.recent else inf

    def cost(self) -> float:
        """Estimate the seconds of the next item with care; something has come home."""
        return max(self.mean(), max(cost for _, cost in self.recent))

    def growth(self) -> float:
        """Return how many times the items of the last chunk the next one may have."""
        # By what came home last: what each chunk takes beside its items weighs less and less.
        return max(2.0, min(16.0, _n_items_in(FLOOR, self.last * self.recent[-1][1])))


class ChunkSizer:
    """Say how many items the next chunk of one map should have, and from which end.

    Every call is O(1). The driver asks `next_size` whenever it could submit, and reports what it
    did and saw with `cut`, `done` and `returned`, for each chunk with the end that it is from.

    Args:
        chunksize: items in every chunk, or "auto" for sizes by measured time.
        total: how many items there will be; None where nobody knows. If there are more, the map
            ends in single items; if fewer, it ends less evenly.
        n_workers: how many workers can take chunks now.

    Attributes:
        n_workers: as above; may be set at any time. Below 1 counts as 1: somebody may come.

    Raises:
        ValueError: chunksize is less than 1.
    """

    def __init__(
        self,
        *,
        chunksize: int | Literal["auto"] = "auto",
        total: int | None = None,
        n_workers: int = 1,
    ) -> None:
        if chunksize != "auto" and chunksize < 1:
            raise ValueError(f'chunksize is {chunksize}: say 1 or more, or "auto"')
        self.n_workers = n_workers
        self._fixed = None if chunksize == "auto" else chunksize
        self._uncut = total  # items, with those that came back; None: unknown
        self._sides = _Side(), _Side()  # by from_end

    def from_end(self) -> bool:
        """Tell whether the next chunk had better be taken from the end of the input.

        Asking changes nothing.
        """
        front, back = self._sides
        if not front.recent and not back.recent:
            return back.n_cut < front.n_cut
        return back.mean() > END_FACTOR * front.mean()

    def next_size(self, n_out: int, n_chunks_out: int, *, from_end: bool = False) -> int:
        """Return how many items the next chunk should have, or 0 to wait until one comes home.

        With nothing out it is at least 1. Asking changes nothing.

        Args:
            n_out: items that are out, in chunks submitted and not yet home.
            n_chunks_out: those chunks.
            from_end: whether it will be one from the end of the input.
        """
        if self._is_enough(n_out, n_chunks_out):
            return 0
        if self._fixed is not None:
            return self._fixed
        side = self._sides[from_end]
        if not side.recent:
            return 1
        cost = side.cost()
        most: float = min(MOST_ITEMS, ceil(side.growth() * min(side.last, side.n_items)))
        if self._uncut is not None:
            even = self._uncut / max(1, self.n_workers)
            share = max(ceil(even / SHARES), min(ceil(even), _n_items_in(FLOOR, cost)))
            most = min(most, max(share, _n_items_in(LEAST, cost)))
        return max(1, int(min(most, _n_items_in(TARGET, cost))))

    def cut(self, n_items: int, *, from_end: bool = False) -> None:
        """Note that a chunk of `n_items` was cut: as many as `next_size` said, or fewer."""
        side = self._sides[from_end]
        side.last = n_items
        side.n_cut += 1
        if self._uncut is not None:
            self._uncut -= n_items

    def done(self, n_items: int, seconds: float, *, from_end: bool = False) -> None:
        """Note that a chunk, or the first part of one, came home.

        Args:
            n_items: the items whose results came; 0 tells nothing and is ignored.
            seconds: of work in the worker on these items, without the chunk's way.
            from_end: whether it was one from the end of the input.
        """
        if n_items > 0:
            self._sides[from_end].done(n_items, seconds)

    def returned(self, n_items: int, *, from_end: bool = False) -> None:
        """Note that `n_items` came back undone and will be cut anew; after `done` of their chunk.

        Where chunks keep coming home in part (one item in ten raises, say), sizes start again from
        the largest that lately did come home, so that few items travel in vain.
        """
        if self._uncut is not None:
            self._uncut += n_items
        side = self._sides[from_end]
        if side.recent:
            side.last = min(side.last, max(n for n, _ in side.recent))

    def _is_enough(self, n_out: int, n_chunks_out: int) -> bool:
        n_workers = max(1, self.n_workers)
        if n_chunks_out < CHUNKS_AHEAD * n_workers:
            return False
        side = self._sides[0]
        if self._fixed is None or not side.recent:
            return True
        if n_chunks_out >= MOST_CHUNKS_AHEAD * n_workers:
            return True
        return n_out * side.cost() >= SECONDS_AHEAD * n_workers


def _n_items_in(seconds: float, cost: float) -> float:
    return seconds / cost if cost > 0 else float(MOST_ITEMS)
