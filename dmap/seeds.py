"""Random numbers of a seeded map: each item has its own, made of the seed and its index.

So they depend neither on how the input was cut nor on workers and retries. While an item of such a
map runs, ``random`` and NumPy's legacy state are seeded for it; ``current_job().rng`` is its own
NumPy Generator, spawned from the seed by the index as ``numpy.random.SeedSequence`` describes.
What the process had before is put back behind each chunk: the next map is not seeded by this one.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_items: list[_Item] = []  # the innermost chunk's item is the last one
_unseeded: Any = None  # this process's generator for jobs without a seed


class _Item:
    """The item that runs, and its generator once somebody asked for it."""

    __slots__ = ("index", "rng", "seed")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.index = 0
        self.rng: Any = None


@contextmanager
def seeded(function: Callable[..., Any], seed: int, first: int) -> Iterator[Callable[..., Any]]:
    """Give a function whose calls are those of the items from index ``first`` on, each seeded."""
    numpy = _numpy()
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    indices = itertools.count(first)
    item = _Item(seed)
    _items.append(item)

    def call(*args: Any) -> Any:
        item.index = next(indices)
        item.rng = None
        material = hashlib.sha256(f"{seed}:{item.index}".encode()).digest()
        random.seed(int.from_bytes(material, "big"))
        if numpy:
            numpy.random.seed(numpy.frombuffer(material, dtype=numpy.uint32))
        return function(*args)

    try:
        yield call
    finally:
        _items.pop()
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def generator() -> Any:
    """Return the generator of the item that runs; without a seed, one of this process.

    A ``numpy.random.Generator``, or a ``random.Random`` where NumPy is not installed.
    """
    global _unseeded
    if not _items:
        if _unseeded is None:
            numpy = _numpy()
            _unseeded = numpy.random.default_rng() if numpy else random.Random()
        return _unseeded
    item = _items[-1]
    if item.rng is None:
        item.rng = _generator_of(item.seed, item.index)
    return item.rng


def _generator_of(seed: int, index: int) -> Any:
    numpy = _numpy()
    if numpy is None:
        return random.Random(f"{seed}:{index}")
    sequence = numpy.random.SeedSequence(seed, spawn_key=(index,))
    return numpy.random.Generator(numpy.random.PCG64(sequence))


def _numpy() -> Any:
    """Return NumPy, or None. Imported even if the function has not yet: it may, in an item."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy
