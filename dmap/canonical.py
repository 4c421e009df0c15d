"""Values as digests: equal for what is equal in type and value, in every process.

A pickle will not do: its bytes depend on which of two equal strings are one object, on the order in
which a dict was filled, and on that of a set, which the hash seed decides. Here every value has a
*token*, bytes of which none is the beginning of another's:

* a scalar is its own token: a mark and what it is, long strings by their digest;
* all else is ``#`` and the sha256 of a tag and the tokens of its parts, sorted where their order
  means nothing. An object that has no tag of its own is taken apart as pickle does it
  (``__reduce_ex__``).

So equal parts have equal tokens wherever they are, and what many share is looked at once.

Two kinds of things have no token until all of the others are known: functions and classes, which
refer to each other in circles, and data that contains itself. They are *nodes*. When all parts of
all of them have been collected, the nodes are closed (`close`): in the order of Tarjan's strongly
connected components (SIAM Journal on Computing 1(2), 1972) each is a digest of its parts as any
other value, and those of one circle are refined together: all start alike, and round after round
each becomes the digest of its parts as they were the round before, until no two that were alike
come apart any more. That, as the minimisation of automata (E. F. Moore, 1956), depends on the shape
of the circle, not on where it was entered, and costs a few rounds, however many ways lead around.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from operator import add
from typing import Any, Final, TypeAlias

__all__ = [
    "Node",
    "Part",
    "Unidentifiable",
    "close",
    "digest_of",
    "digest_quickly",
    "scalar",
    "solid",
    "text",
]

MAX_SHOWN: Final = 16  # steps of a path; of a longer one both ends are shown
MAX_INLINE: Final = 48  # bytes of a string that are its token; a longer one is there by its digest


class Unidentifiable(Exception):
    """Something cannot be told from others in a way that is the same in every process.

    Attributes:
        steps: The path to it, outermost first.
        what: What it is, as the rest of a sentence.
    """

    def __init__(self, what: str, *steps: str) -> None:
        super().__init__(what, *steps)
        self.what = what
        self.steps = list(steps)

    def inside(self, *steps: str) -> None:
        """Have the path begin with these steps."""
        self.steps[:0] = steps

    def __str__(self) -> str:
        steps = self.steps
        if len(steps) > MAX_SHOWN:
            steps = [*steps[: MAX_SHOWN // 2], "...", *steps[-MAX_SHOWN // 2 :]]
        return f"{' -> '.join(steps) or 'it'} {self.what}"


class Node:
    """What gets its token when everything that it leads to is known.

    Attributes:
        tag: What it is.
        parts: What it is made of.
        n_together: See `solid`.
        token: Its token, once it is closed.
        error: Why it has none.
        home: If it cannot be identified by its parts, where the source of it is: a local module,
            and its name in there.
        reached: The node that it was first seen from, and what it is there.
    """

    __slots__ = ("error", "home", "n_together", "parts", "reached", "tag", "token")

    def __init__(self, home: tuple[str, str] | None = None) -> None:
        self.tag = b""
        self.parts: list[Part] = []
        self.n_together = 0
        self.token: bytes | None = None
        self.error: Unidentifiable | None = None
        self.home = home
        self.reached: tuple[Node, str] | None = None

    def fill(self, tag: bytes, parts: list[Part], n_together: int = 0) -> None:
        """Say what it is and is made of."""
        self.tag = tag
        self.parts = parts
        self.n_together = n_together

    def open_parts(self) -> Iterator[Node]:
        """Yield those of its parts that have no token yet."""
        for part in self.parts:
            if type(part) is Node and part.token is None:
                yield part


Part: TypeAlias = bytes | Node

# What a tag stands for is in the digest of everything that has it: those from 0x80 on are of this
# file, from 0x90 on of `values`, 0xb0 `arrays`, 0xc0 `codes`, 0xd0 `definitions`. The marks of
# scalars are ASCII.
TUPLE: Final = b"\x80"
FROZENSET: Final = b"\x81"
CIRCLE: Final = b"\x82"

NOTHING: Final = b"-"
"""The token of a part that is not there."""


# --- scalars ----------------------------------------------------------------------------------

_int64: Final = struct.Struct("<cq").pack
_float64: Final = struct.Struct("<cd").pack
_SHORT_STR: Final = [b"s" + bytes((n,)) for n in range(MAX_INLINE + 1)]
_SHORT_BYTES: Final = [b"b" + bytes((n,)) for n in range(MAX_INLINE + 1)]


def _int(value: int) -> bytes:
    try:
        return _int64(b"i", value)
    except struct.error:
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"I" + sha256(raw).digest()


def _float(value: float) -> bytes:
    return _float64(b"f", value) if value == value else b"n"


def _complex(value: complex) -> bytes:
    return b"c" + _float(value.real) + _float(value.imag)


def text(value: str) -> bytes:
    """Return the token of a string."""
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        raw = value.encode("utf-8", "surrogatepass")
    if len(raw) <= MAX_INLINE:
        return _SHORT_STR[len(raw)] + raw
    return b"S" + sha256(raw).digest()


def _bytes(value: bytes) -> bytes:
    if len(value) <= MAX_INLINE:
        return _SHORT_BYTES[len(value)] + value
    return b"B" + sha256(value).digest()


def _bool(value: bool) -> bytes:
    return b"T" if value else b"F"


SCALARS: Final[dict[type, Callable[[Any], bytes]]] = {  # type -> what makes a token of it
    int: _int,
    float: _float,
    complex: _complex,
    str: text,
    bytes: _bytes,
    bool: _bool,
    type(None): lambda _: b"N",
    type(Ellipsis): lambda _: b"E",
    type(NotImplemented): lambda _: b"!",
}


def scalar(value: object) -> bytes | None:
    """Return the token of a scalar, None of anything else."""
    encode = SCALARS.get(type(value))
    return None if encode is None else encode(value)


def solid(tag: bytes, parts: Sequence[Part], n_together: int = 0) -> bytes:
    """Return the token of what is made of these parts.

    Args:
        tag: What it is.
        parts: The tokens of its parts.
        n_together: 0 if their order counts. Else so many that follow each other belong together,
            and in whatever order these groups are, the token is the same.

    Raises:
        TypeError: a part is a node.
    """
    tokens: Iterable[Any] = parts
    if n_together == 1:
        tokens = sorted(parts)
    elif n_together == 2:
        tokens = sorted(map(add, parts[::2], parts[1::2]))
    return b"#" + sha256(tag + b"".join(tokens)).digest()


def digest_of(token: bytes) -> bytes:
    """Return the 32 bytes that tell a value by its token."""
    return token[1:] if token[0] == 0x23 else sha256(token).digest()


def digest_quickly(value: object) -> bytes | None:
    """Return the digest of a scalar or a tuple of scalars, None of anything else."""
    kind = type(value)
    encode = SCALARS.get(kind)
    if encode is not None:
        return sha256(encode(value)).digest()
    if kind is not tuple:
        return None
    joined = TUPLE
    for each in value:  # type: ignore[attr-defined]  # it is a tuple; a cast() costs 0.1 us
        encode = SCALARS.get(type(each))
        if encode is None:
            return None
        joined += encode(each)
    return sha256(joined).digest()


# --- circles ----------------------------------------------------------------------------------


def close(root: Node) -> bytes:
    """Give a node, and all that it leads to, its token, and return that. Linear but for circles.

    What leads into a circle is no part of it, even if it looks like one: for ``a = [a]``, ``[a]``
    is another value than ``a``.
    """
    order: dict[Node, int] = {}  # node -> when it was reached
    lowest: dict[Node, int] = {}  # node -> the earliest of its circle, as far as is known
    waiting: list[Node] = []  # reached, and not in a circle that is closed
    path: list[tuple[Node, Iterator[Node]]] = []

    def reach(node: Node) -> None:
        order[node] = lowest[node] = len(order)
        waiting.append(node)
        path.append((node, node.open_parts()))

    if root.token is None:
        reach(root)
    while path:
        node, parts = path[-1]
        for part in parts:
            if part not in order:
                reach(part)
                break
            if part.token is None:
                lowest[node] = min(lowest[node], order[part])
        else:
            path.pop()
            if path:
                parent = path[-1][0]
                lowest[parent] = min(lowest[parent], lowest[node])
            if lowest[node] == order[node]:
                circle = [waiting.pop()]
                while circle[-1] is not node:
                    circle.append(waiting.pop())
                _close_together(circle)
    assert root.token is not None
    return root.token


def _close_together(circle: list[Node]) -> None:
    first = circle[0]
    if len(circle) == 1 and first not in first.open_parts():
        first.token = _solid_of(first, {})
        return
    now: dict[Node, bytes] = dict.fromkeys(circle, b"@")
    n_kinds = 1
    while True:
        new = {node: _solid_of(node, now) for node in circle}
        n_before, n_kinds = n_kinds, len(set(new.values()))
        if n_kinds == n_before:
            break
        now = new
    # What each looks like, as told in terms of the others: together that is the whole circle.
    shape = sorted({now[node] + new[node] for node in circle})
    for node in circle:
        node.token = solid(CIRCLE, [new[node], *shape])


def _solid_of(node: Node, now: dict[Node, bytes]) -> bytes:
    assert node.tag, "every node has been filled"
    parts = [part if isinstance(part, bytes) else part.token or now[part] for part in node.parts]
    return solid(node.tag, parts, node.n_together)
