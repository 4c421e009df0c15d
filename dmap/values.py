"""Values taken apart for `dmap.canonical`, into parts whose tokens make theirs.

What is common or has no order has an encoder here, arrays and data frames in `dmap.arrays`. All
else is taken apart as pickle does it (``__reduce_ex__``): what it is made by, arguments, state,
elements. A type may say itself what its instances are: ``__dmap_identity__()`` returns bytes.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from hashlib import sha256
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any, Final, TypeAlias

from dmap.canonical import (
    FROZENSET,
    NOTHING,
    SCALARS,
    TUPLE,
    Node,
    Part,
    Unidentifiable,
    solid,
    text,
)

__all__ = ["Encoder", "Made", "Walk", "too_deep"]

MAX_KEY: Final = 40  # characters

LIST: Final = b"\x90"
SET: Final = b"\x91"
DICT: Final = b"\x92"
ORDERED: Final = b"\x93"
OBJECT: Final = b"\x94"
BYTEARRAY: Final = b"\x95"
MEMORY: Final = b"\x96"
MEMBER: Final = b"\x97"
PARTIAL: Final = b"\x98"
PROXY: Final = b"\x99"
CELL: Final = b"\x9a"
PROPERTY: Final = b"\x9b"
METHOD_KIND: Final = b"\x9c"
CACHED_PROPERTY: Final = b"\x9d"
PATH: Final = b"\x9e"
OWN: Final = b"\x9f"
SUBSET: Final = b"\xa0"

Made: TypeAlias = tuple[bytes, list[Part], int]
"""A tag, parts, and how many of these belong together; see `solid`."""

Encoder: TypeAlias = "Callable[[Any, Any], Part | Made]"

_BUSY: Final = b""
"""Stands for what is being looked at, and may turn out to contain itself."""

_SET_ITERATOR: Final = type(iter(set[object]()))


class Walk:
    """Goes through values. What it has seen stays alive as long as it does.

    Args:
        encoders: type -> how its instances are taken apart, as far as was found out before.
    """

    def __init__(self, encoders: dict[type, Encoder]) -> None:
        self._encoders = encoders
        self._memo: dict[int, Part] = {}  # id -> token or node
        self._kept: list[object] = []  # whose ids these are

    def define(self, value: Any) -> Part:
        """Return a function, class, module or code object as a part."""
        raise NotImplementedError

    def refer(self, value: object, name: str) -> Part:
        """Return what is pickled as no more than a name in its module as a part."""
        raise NotImplementedError

    def token(self, value: Any) -> Part:
        """Return the token of a value, or the node that it is.

        Raises:
            Unidentifiable: there is something in it that cannot be identified.
            RecursionError: it is nested too deeply.
        """
        kind = type(value)
        encode = SCALARS.get(kind)
        if encode is not None:
            return encode(value)
        memo = self._memo
        key = id(value)
        found = memo.get(key)
        if found is not None:
            if found is _BUSY:
                found = memo[key] = Node()
            return found
        memo[key] = _BUSY
        try:
            encoder = _ENCODERS.get(kind) or self._encoders.get(kind)
            if encoder is None:
                encoder = self._encoders[kind] = _encoder_of(kind)
            made = encoder(self, value)
        except BaseException as error:
            found = memo.pop(key)
            if type(found) is Node:  # something else has it as a part
                memo[key] = found
                self._kept.append(value)
                found.error = _copy_of(error)
            raise
        self._kept.append(value)
        found = memo[key]
        if isinstance(found, Node):  # it is in itself
            if isinstance(made, Node):
                made = made.tag, made.parts, made.n_together
            if isinstance(made, tuple):
                found.fill(*made)
                return found
        part = memo[key] = self.made(*made) if isinstance(made, tuple) else made
        return part

    def made(self, tag: bytes, parts: list[Part], n_together: int = 0) -> Part:
        """Return what is made of these parts: closed if all of them are, else a node."""
        try:
            return solid(tag, parts, n_together)
        except TypeError:
            node = Node()
            node.fill(tag, parts, n_together)
            return node

    def tokens(self, values: Iterable[Any]) -> list[Part]:
        """Return the tokens of elements. What is in the way is said to be in ``[n]``."""
        parts: list[Part] = []
        try:
            for value in values:
                encode = SCALARS.get(type(value))
                parts.append(self.token(value) if encode is None else encode(value))
        except Unidentifiable as error:
            error.inside(f"[{len(parts)}]")
            raise
        return parts

    def pairs(self, pairs: Iterable[tuple[Any, Any]], step: str = "[{!r}]") -> list[Part]:
        """Return the tokens of keys and values in turn."""
        parts: list[Part] = []
        key: object = None
        try:
            for key, value in pairs:
                encode = SCALARS.get(type(key))
                parts.append(self.token(key) if encode is None else encode(key))
                encode = SCALARS.get(type(value))
                parts.append(self.token(value) if encode is None else encode(value))
        except Unidentifiable as error:
            error.inside(_shown(step, key))
            raise
        return parts

    def attribute(self, value: Any, name: str) -> Part:
        """Return the token of an attribute."""
        try:
            return self.token(getattr(value, name))
        except Unidentifiable as error:
            error.inside(f".{name}")
            raise

    def attributes(self, scope: dict[str, object]) -> Part:
        """Return the token of what an object has in its ``__dict__``."""
        return self.made(DICT, self.pairs(scope.items(), ".{}"), 2) if scope else NOTHING

    # --- kinds of values ----------------------------------------------------------------------

    def _list(self, value: list[Any]) -> Made:
        return LIST, self.tokens(value), 0

    def _tuple(self, value: tuple[Any, ...]) -> Made:
        return TUPLE, self.tokens(value), 0

    def _set(self, value: set[Any]) -> Made:
        return SET, self.tokens(value), 1

    def _frozenset(self, value: frozenset[Any]) -> Made:
        return FROZENSET, self.tokens(value), 1

    def _dict(self, value: dict[Any, Any]) -> Made:
        return DICT, self.pairs(value.items()), 2

    def _proxy(self, value: MappingProxyType[Any, Any]) -> Made:
        return PROXY, [self.made(DICT, self.pairs(value.items()), 2)], 0

    def _bytearray(self, value: bytearray) -> Made:
        return BYTEARRAY, [sha256(value).digest()], 0

    def _memoryview(self, value: memoryview) -> Made:
        raw = value if value.c_contiguous else value.tobytes()
        parts = self.tokens((value.format, value.shape))
        return MEMORY, [*parts, sha256(raw).digest()], 0

    def _cell(self, value: CellType) -> Made:
        try:
            contents = value.cell_contents
        except ValueError:  # not assigned yet
            return CELL, [], 0
        return CELL, [self.token(contents)], 0

    def _partial(self, value: functools.partial[Any]) -> Made:
        parts = self._attributes_of(value, "func", "args", "keywords")
        return PARTIAL, [*parts, self.attributes(vars(value))], 0

    def _property(self, value: property) -> Made:
        return PROPERTY, self._attributes_of(value, "fget", "fset", "fdel"), 0

    def _method_kind(self, value: Any) -> Made:
        """A staticmethod or classmethod."""
        return METHOD_KIND, self._attributes_of(value, "__func__"), 0

    def _cached_property(self, value: Any) -> Made:
        # Until Python 3.12 there is a lock in it.
        return CACHED_PROPERTY, self._attributes_of(value, "func", "attrname"), 0

    def _member(self, value: enum.Enum) -> Made:
        return MEMBER, self._attributes_of(value, "_name_", "_value_"), 0

    def _attributes_of(self, value: Any, *names: str) -> list[Part]:
        """Return the token of a value's type and those of some attributes."""
        return [self.token(type(value)), *(self.attribute(value, name) for name in names)]

    def _path(self, value: Any) -> Made:
        # In its pickle are the parts that it was joined from.
        state = getattr(value, "__dict__", {})
        return PATH, [self.define(type(value)), text(str(value)), self.attributes(state)], 0

    def _own(self, value: Any) -> Made:
        try:
            identity = type(value).__dmap_identity__(value)
        except (Unidentifiable, RecursionError, MemoryError):
            raise
        except Exception as error:  # its own code runs
            raise _refusal(value, f"{type(error).__name__}: {error}") from error
        if not isinstance(identity, bytes):
            raise _refusal(value, "its __dmap_identity__ must return bytes")
        return OWN, [identity], 0

    def _subset(self, value: Any) -> Made:
        """An instance of a class that inherits from set or frozenset."""
        made, (elements, *_), state = self._reduce(value)[:3]
        contents = self.made(SET, self.tokens(elements), 1)
        return SUBSET, [self.token(made), contents, self._state(state)], 0

    def reduced(self, value: Any) -> Part | Made:
        """Take a value apart as pickle does."""
        reduced = self._reduce(value)
        if isinstance(reduced, str):
            return self.refer(value, reduced)
        made, args, state, elements, pairs, setter = (*reduced, *[None] * 4)[:6]
        parts = [
            self.token(made),
            self._arguments(args),
            NOTHING if state is None else self._state(state),
            NOTHING if elements is None else self.made(LIST, self.tokens(elements)),
        ]
        if pairs is None:
            parts.append(NOTHING)
        elif isinstance(value, OrderedDict):
            parts.append(self.made(ORDERED, self.pairs(pairs)))
        else:
            parts.append(self.made(DICT, self.pairs(pairs), 2))
        if setter is not None:
            parts.append(self.token(setter))
        return OBJECT, parts, 0

    def _reduce(self, value: Any) -> Any:
        kind = type(value)
        reduce = copyreg.dispatch_table.get(kind)
        try:
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except (RecursionError, MemoryError):
            raise
        except Exception as error:  # its own code runs
            raise _refusal(value, f"{type(error).__name__}: {error}") from error
        if not isinstance(reduced, str) and not (type(reduced) is tuple and len(reduced) >= 2):
            raise _refusal(value, "its __reduce_ex__ returns neither a string nor a tuple")
        return reduced

    def _arguments(self, args: Any) -> Part:
        parts: list[Part] = []
        try:
            for arg in args:
                parts.append(self.token(arg))
        except Unidentifiable as error:
            if not isinstance(arg, type):  # the class of an object needs no step to it
                error.inside(f"argument {len(parts)}")
            raise
        return self.made(TUPLE, parts)

    def _state(self, state: Any) -> Part:
        if type(state) is dict:
            return self.attributes(state)
        if type(state) is tuple and len(state) == 2 and type(state[1]) is dict:
            # The second are slots.
            return self.made(TUPLE, [self._state(state[0]), self.attributes(state[1])])
        return self.token(state)

    def _once(self, value: object) -> Part:
        raise _refusal(value, "its order is another in each process")


def too_deep() -> Unidentifiable:
    """Return the error that says so."""
    return Unidentifiable(
        f"is nested too deeply: flatten it, or raise sys.setrecursionlimit() "
        f"(now {sys.getrecursionlimit()})"
    )


def _copy_of(error: BaseException) -> Unidentifiable:
    if isinstance(error, Unidentifiable):
        return Unidentifiable(error.what, *error.steps)  # the path of that one grows on
    return too_deep()


def _refusal(value: object, why: str) -> Unidentifiable:
    return Unidentifiable(f"is a {_name(type(value))} ({why})")


def _name(cls: type) -> str:
    name = cls.__qualname__.rpartition("<locals>.")[2]
    return name if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{name}"


def _shown(step: str, key: object) -> str:
    try:
        shown = step.format(key)
    except Exception:  # its own __repr__ runs
        return f"[a {_name(type(key))}]"
    return shown if len(shown) <= MAX_KEY else f"{shown[: MAX_KEY - 4]}...{shown[-1]}"


def _encoder_of(kind: type) -> Encoder:
    """Return how instances of a type are taken apart that is not among the most common ones."""
    if any("__dmap_identity__" in vars(base) for base in kind.__mro__):
        return Walk._own
    for base, encoder in _BASES:
        if issubclass(kind, base):
            return encoder
    if issubclass(kind, (set, frozenset)) and _inherits(kind, "__reduce__", set, frozenset):
        return Walk._subset
    pathlib = sys.modules.get("pathlib")
    if pathlib is not None and issubclass(kind, pathlib.PurePath):
        return Walk._path
    from dmap import arrays

    return arrays.encoder_of(kind) or Walk.reduced


def _inherits(kind: type, method: str, *bases: type) -> bool:
    """Tell whether a type has one of these bases' method, and no ``__reduce_ex__`` of its own."""
    theirs = [getattr(base, method) for base in bases]
    own: Any = kind
    return getattr(own, method) in theirs and own.__reduce_ex__ is object.__reduce_ex__


def _define(walk: Walk, value: Any) -> Part:
    return walk.define(value)


_ENCODERS: Final[dict[type, Encoder]] = {
    list: Walk._list,
    tuple: Walk._tuple,
    set: Walk._set,
    frozenset: Walk._frozenset,
    dict: Walk._dict,
    bytearray: Walk._bytearray,
    memoryview: Walk._memoryview,
    CellType: Walk._cell,
    MappingProxyType: Walk._proxy,
    functools.partial: Walk._partial,
    _SET_ITERATOR: Walk._once,
    type: _define,
    BuiltinFunctionType: _define,
    CodeType: _define,
    FunctionType: _define,
    MethodType: _define,
}

_BASES: Final[tuple[tuple[type, Encoder], ...]] = (
    (type, _define),
    (ModuleType, _define),
    (type(functools.lru_cache(len)), _define),
    (enum.Enum, Walk._member),
    (property, Walk._property),
    (staticmethod, Walk._method_kind),
    (classmethod, Walk._method_kind),
    (functools.cached_property, Walk._cached_property),
)
