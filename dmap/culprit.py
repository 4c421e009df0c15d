"""What is in the way when something cannot be pickled: the path to it, what it is, what to do.

Runs after a failure only. What pickle raises names a type and no place: ``cannot pickle
'_thread.lock' object``. So the value is taken apart (`dmap.anatomy`), breadth first, which finds
shortest paths, in two ways:

1. By type. Most of what cannot be pickled is of a few known kinds (`dmap.kinds`), and seen without
   pickling all that lies around it. Only a part of such a type is pickled, to be sure that it
   fails.
2. By trying. The parts of what fails are pickled alone, and those that fail too are taken apart in
   turn, until something is of a known kind, or fails although none of its parts does. What can be
   pickled stays in the memo of one Pickler, which knows it from then on: what many parts share is
   pickled once. After a failure that memo is worthless, since an object is in it before its parts.

All of it runs the user's code, which may raise anything and be slow. KeyboardInterrupt passes; the
rest is a failure like any other. The clock is looked at whenever a Pickler meets an object, so only
a single call of the user's can outlast it. When a bound is hit, the message has the path up to
there, and what the Pickler met last, which is what failed.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from dmap.anatomy import Anatomist, Group, TimeUp, make_probe
from dmap.kinds import (
    Kind,
    bounded_reason,
    described,
    kind_of,
    kind_of_type,
    type_name,
    unknown_kind,
)

__all__ = ["Culprit", "explain", "find"]

SECONDS: Final = 2.0
MAX_DEPTH: Final = 64
MAX_NODES: Final = 10_000

MAX_FAILING: Final = 4
"""Of one value's parts that fail, so many are followed."""

MAX_SHOWN: Final = 16  # steps of a path; a longer one is shown without its middle

_DOCS: Final = "docs/closures.md#"

# ids of types that are no culprits and hold none
_PLAIN: Final = frozenset(
    map(id, (int, float, bool, type(None), str, complex, range, bytes, bytearray))
)


class Culprit(NamedTuple):
    """What is in the way.

    Attributes:
        path: The way to it from the root's name, or the part of it that is known.
        value: What is at the end of the path.
        kind: What is known of the culprit.
        words: What follows the path in a sentence.
    """

    path: str
    value: object
    kind: Kind
    words: str


def explain(what: str, root_name: str, value: object, error: Exception) -> str:
    """Return the message for something that cannot be pickled: what is in the way, what to do.

    Takes as long as `find`.

    Args:
        what: What the message calls it: "the function f", "item 3 (Point)".
        root_name: What paths in it begin with: "f", "item 3".
        value: What could not be pickled.
        error: What that raised.
    """
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        return (
            f"{what} is nested too deeply to be pickled: flatten it, or raise "
            f"sys.setrecursionlimit() (now {sys.getrecursionlimit()}; {_DOCS}nested)"
        )
    kind = kind_of(value, error)
    if kind is not None and kind.anchor == "generators":
        name = type_name(type(value))
        return (
            f"{root_name} is a {name}, which cannot be pickled: {kind.hint} ({_DOCS}{kind.anchor})"
        )
    culprit = find(root_name, value, error)
    if culprit is None:  # alone, and now, it can
        words = f"raises {bounded_reason(error)} when it is pickled"
        culprit = Culprit(root_name, value, unknown_kind(None, error), words)
    subject = "it" if culprit.path == root_name else culprit.path
    return (
        f"{what} cannot be pickled: {subject} {culprit.words}; {culprit.kind.hint} "
        f"({_DOCS}{culprit.kind.anchor})"
    )


def find(root_name: str, value: object, error: BaseException) -> Culprit | None:
    """Return what in a value is in the way, or None if it can be pickled after all.

    Takes at most SECONDS, and as long as one call of the value's own code may take.

    Args:
        root_name: What the path begins with.
        value: What could not be pickled.
        error: What that raised.
    """
    root = _Place(value, error)
    if kind_of(value, error) is not None:
        return _culprit(root_name, root)
    search = _Search()
    try:
        place = search.by_type(root) or search.by_trying(root)
    except TimeUp:
        return _holder(root_name, search.deepest or root)
    return None if place is None else _culprit(root_name, place)


class _Place:
    """A part of a value, and the way to it.

    Attributes:
        value: The part.
        error: What pickling it alone raises; where that was not tried, what it raised around it.
        depth: Steps from the root.
        met: What a Pickler met last before it failed, if one was asked.
    """

    __slots__ = ("value", "error", "depth", "met", "_parent", "_group", "_n")

    def __init__(
        self,
        value: object,
        error: BaseException,
        parent: _Place | None = None,
        group: Group | None = None,
        n: int = 0,
        met: object = None,
    ) -> None:
        self.value = value
        self.error = error
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.met = met
        self._parent = parent
        self._group = group
        self._n = n

    def path(self, root_name: str) -> str:
        """Return the way from the root to this place."""
        steps: list[str] = []
        place = self
        while place._parent is not None and place._group is not None:
            steps.append(place._group.label(place._n))
            place = place._parent
        steps.reverse()
        if len(steps) > MAX_SHOWN:
            half = MAX_SHOWN // 2
            steps[half:-half] = [f"({len(steps) - 2 * half} more)"]
        return " -> ".join((root_name, *steps))


def _culprit(root_name: str, place: _Place) -> Culprit:
    kind = kind_of(place.value, place.error) or unknown_kind(place.value, place.error)
    return Culprit(place.path(root_name), place.value, kind, f"is {described(place.value, kind)}")


def _holder(root_name: str, place: _Place) -> Culprit:
    path, met, error = place.path(root_name), place.met, place.error
    if met is None:
        words = f"holds something that cannot be ({bounded_reason(error)})"
        return Culprit(path, place.value, unknown_kind(met, error), words)
    kind = kind_of(met, error) or unknown_kind(met, error)
    return Culprit(path, place.value, kind, f"holds {described(met, kind)}")


class _Search:
    """A search in one value; each way of it returns the place of the culprit.

    Attributes:
        deepest: The deepest place that is known to fail, but for the root.
    """

    def __init__(self) -> None:
        now = time.monotonic()
        self._deadline = now + SECONDS
        self._soon = now + SECONDS / 4
        self._probe = make_probe(self._deadline)
        self._anatomist = Anatomist(self._deadline)
        self._met: object = None  # what the Pickler met last before it failed
        self._known: dict[int, bool] = {}  # id of a type -> whether it is of a known kind
        self.deepest: _Place | None = None

    def by_type(self, root: _Place) -> _Place | None:
        """Look for something of a known kind, near the root and for a quarter of the time."""
        seen = {id(root.value): root.value}  # which keeps the id its own
        waiting = deque([root])
        while waiting and time.monotonic() < self._soon:
            place = waiting.popleft()
            for group in self._groups(place):
                types = {id(cls): cls for cls in map(type, group.parts)}
                known = {key for key, cls in types.items() if self._is_known(cls)}
                if not known and _PLAIN.issuperset(types):
                    continue
                for n, part in enumerate(group.parts):
                    key = id(type(part))
                    if key in _PLAIN or id(part) in seen:
                        continue
                    # By the root's error: a tensor is of a known kind if that is about CUDA.
                    if key in known and kind_of(part, root.error) is not None:
                        error = self._why_not(part)
                        if error is not None and kind_of(part, error) is not None:
                            return _Place(part, error, place, group, n)
                    if len(seen) < MAX_NODES and place.depth + 1 < MAX_DEPTH:
                        seen[id(part)] = part
                        waiting.append(_Place(part, root.error, place, group, n))
                    elif not known:
                        break
        return None

    def by_trying(self, root: _Place) -> _Place | None:
        """Look for what fails; None if the root does not.

        Raises:
            TimeUp: A bound was hit.
        """
        followed = {id(root.value): root.value}  # which keeps the id its own
        waiting = deque([root])
        while waiting:
            place = waiting.popleft()
            if kind_of(place.value, place.error) is not None:
                return place
            if place.depth == MAX_DEPTH or len(followed) > MAX_NODES:
                break
            is_leaf = True
            for part in self._failing_parts(place):
                is_leaf = False
                if id(part.value) not in followed:
                    followed[id(part.value)] = part.value
                    waiting.append(part)
                    if self.deepest is None or part.depth > self.deepest.depth:
                        self.deepest = part
            if is_leaf and place is root:
                error = self._why_not(root.value)
                return None if error is None else _Place(root.value, error)
            if is_leaf:
                return place
        raise TimeUp

    def _groups(self, place: _Place) -> list[Group]:
        groups: list[Group] = []
        try:
            groups.extend(self._anatomist.groups_of(place.value))
        except (KeyboardInterrupt, TimeUp):
            raise
        except BaseException:  # the value's own code; what it gave up to there is looked at
            pass
        return groups

    def _failing_parts(self, place: _Place) -> Iterator[_Place]:
        for group in self._groups(place):
            start = 0
            for _ in range(MAX_FAILING):
                found = self._first_failing(group.parts, start)
                if found is None:
                    break
                n, error = found
                yield _Place(group.parts[n], error, place, group, n, self._met)
                if time.monotonic() > self._soon:  # better one path than a shorter one too late
                    return
                start = n + 1

    def _first_failing(
        self, parts: Sequence[object], start: int
    ) -> tuple[int, BaseException] | None:
        """Return the index of the first part from ``start`` on that fails alone, and its error."""
        feed = _Feed(parts, start)
        if self._why_not(feed) is None:
            return None
        # The Pickler asks for one more, at times, before it pickles what it has.
        for n in range(max(start, feed.end - 2), feed.end):
            error = self._why_not(parts[n])
            if error is not None:
                return n, error
        return None

    def _is_known(self, cls: type) -> bool:
        known = self._known.get(id(cls))
        if known is None:
            known = self._known[id(cls)] = kind_of_type(cls) is not None
        return known

    def _why_not(self, value: object) -> BaseException | None:
        """Return what pickling a value raises, or None."""
        try:
            self._probe.dump(value)
        except (KeyboardInterrupt, TimeUp):
            raise
        except BaseException as error:
            self._met = self._probe.last
            self._probe = make_probe(self._deadline)
            return error
        return None


class _Feed:
    """Pickles as a list of parts, and knows how far that came."""

    def __init__(self, parts: Sequence[object], start: int) -> None:
        self._parts = parts
        self.end = start

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (), None, self

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> object:
        if self.end >= len(self._parts):
            raise StopIteration
        self.end += 1
        return self._parts[self.end - 1]
