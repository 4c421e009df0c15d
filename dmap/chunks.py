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
  last one (four times while that one is worth less than FLOOR), and of all that were measured
  lately, so a wrong guess costs little.
* **Steady.** A chunk should take TARGET seconds by a careful estimate of what an item costs: the
  greater of a long mean, which remembers the rare dear item among cheap ones, and of the worst of
  the last few chunks, which sees at once that items became dearer. A chunk that turns out too short
  costs one message more; one that turns out too long may keep everyone waiting at the end.
* **Share.** Guided self-scheduling (C. D. Polychronopoulos and D. J. Kuck, IEEE Transactions on
  Computers C-36(12), 1987) gives each chunk an even share of what is left: the rest divided by the
  number of workers, anew each time. That is too much where costs vary or fall; factoring
  (S. F. Hummel, E. Schonberg and L. E. Flynn, Communications of the ACM 35(8), 1992) divides only
  half of the rest, and so does this. Chunks of less than FLOOR seconds are mostly message and even
  out what nobody sees, so there a whole even share is cut. Endless input has no rest to share.
* **Ahead.** One chunk a worker runs and one waits at the server, where whoever is free first takes
  it. More would not make a worker busier, and would be sized by older measurements.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import Literal

TARGET = 0.03  # seconds of work in a chunk: some hundred times what its messages cost
FLOOR = 0.001  # seconds of work in a chunk, where an even share of the rest is as much
MOST_ITEMS = 65_536  # in a chunk that sizes itself: bounds what is lost with it and cut up anew
SHARES = 2  # a worker: the parts into which the rest is divided
CHUNKS_AHEAD = 2  # a worker: one runs, one waits
RECENT = 8  # chunks of which the worst counts: a few, for one slow chunk shrinks as many after it
# What each chunk that comes home leaves of the long mean, which so spans some 128 chunks. Longer,
# and a slow first call on each of 500 workers (an import) keeps the chunks small for the whole map.
MEMORY = 127 / 128

# Chunks of a fixed size may be far shorter than a message's way; then more of them are ahead.
SECONDS_AHEAD = 0.002  # a worker: some there-and-backs between client and worker
MOST_CHUNKS_AHEAD = 32  # a worker: bounds how many chunks are lost, or cancelled, with it


class ChunkSizer:
    """Say how many items the next chunk of one map should have. Every call is O(1).

    The driver asks `next_size` whenever it could submit, and reports what it did and saw with
    `cut`, `done` and `returned`.

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
        self._last = 1  # items in the last chunk cut
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # (items, seconds an item)
        self._seconds = 0.0  # of work that came home, fading by MEMORY
        self._n_items = 0.0  # likewise

    def next_size(self, n_out: int, n_chunks_out: int) -> int:
        """Return how many items the next chunk should have, or 0 to wait until one comes home.

        With nothing out it is at least 1. Asking changes nothing.

        Args:
            n_out: items that are out, in chunks submitted and not yet home.
            n_chunks_out: those chunks.
        """
        if self._is_enough(n_out, n_chunks_out):
            return 0
        if self._fixed is not None:
            return self._fixed
        if not self._recent:
            return 1
        cost = self._cost()
        most: float = min(MOST_ITEMS, ceil(self._growth(cost) * min(self._last, self._n_items)))
        if self._uncut is not None:
            even = self._uncut / max(1, self.n_workers)
            most = min(most, max(ceil(even / SHARES), min(ceil(even), _n_items_in(FLOOR, cost))))
        return max(1, int(min(most, _n_items_in(TARGET, cost))))

    def cut(self, n_items: int) -> None:
        """Note that a chunk of `n_items` was cut: as many as `next_size` said, or fewer."""
        self._last = n_items
        if self._uncut is not None:
            self._uncut -= n_items

    def done(self, n_items: int, seconds: float) -> None:
        """Note that a chunk, or the first part of one, came home.

        Args:
            n_items: the items whose results came; 0 tells nothing and is ignored.
            seconds: of work in the worker on these items, without the chunk's way.
        """
        if n_items > 0:
            self._recent.append((n_items, seconds / n_items))
            self._seconds = MEMORY * self._seconds + seconds
            self._n_items = MEMORY * self._n_items + n_items

    def returned(self, n_items: int) -> None:
        """Note that `n_items` came back undone and will be cut anew; after `done` of their chunk.

        Where chunks keep coming home in part (one item in ten raises, say), sizes start again from
        the largest that lately did come home, so that few items travel in vain.
        """
        if self._uncut is not None:
            self._uncut += n_items
        if self._recent:
            self._last = min(self._last, max(n for n, _ in self._recent))

    def _is_enough(self, n_out: int, n_chunks_out: int) -> bool:
        n_workers = max(1, self.n_workers)
        if n_chunks_out < CHUNKS_AHEAD * n_workers:
            return False
        if self._fixed is None or not self._recent:
            return True
        if n_chunks_out >= MOST_CHUNKS_AHEAD * n_workers:
            return True
        return n_out * self._cost() >= SECONDS_AHEAD * n_workers

    def _cost(self) -> float:
        """Estimate the seconds an item takes; something has come home."""
        return max(self._seconds / self._n_items, max(cost for _, cost in self._recent))

    def _growth(self, cost: float) -> int:
        return 4 if self._last * cost < FLOOR else 2


def _n_items_in(seconds: float, cost: float) -> float:
    return seconds / cost if cost > 0 else float(MOST_ITEMS)
