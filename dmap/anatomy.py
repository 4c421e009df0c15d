"""Values taken apart as pickle takes them apart, each part with the words for its place.

Runs the values' own code where pickling would run it: ``__reduce_ex__`` and its kin, no property,
and no ``__getattr__`` where ``__dict__`` and slots are all there is.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, Final, NamedTuple, TypeAlias

from dmap import pickling
from dmap.kinds import mro_of, names_of, type_name

__all__ = ["Anatomist", "Group", "TimeUp", "make_probe"]

MAX_KEY: Final = 40  # characters

_dict_of: Any = vars(type)["__dict__"].__get__
_CACHED: Final = type(functools.lru_cache(len))
_NEW: Final = vars(copyreg)["__newobj__"]
_NEW_EX: Final = vars(copyreg)["__newobj_ex__"]


_Named: TypeAlias = list[tuple[str, object]]  # labels and parts


class TimeUp(BaseException):
    """It took long enough. No error that the values' own code could have raised."""


class Group(NamedTuple):
    """Parts of a value, and what the place of each is called."""

    parts: Sequence[object]
    label: Callable[[int], str]


def make_probe(deadline: float) -> Any:
    """Return a Pickler that writes nothing, and raises `TimeUp` after the deadline.

    Its ``last`` is the object that it met last: after a failure, what failed. Builtin scalars and
    containers, which never fail themselves, do not count.
    """
    return _probe_class()(deadline)


@functools.cache
def _probe_class() -> Any:
    pickler: Any = pickling._picklers()[0]
    override = pickler.reducer_override
    now = time.monotonic

    class Probe(pickler):  # type: ignore[misc]  # its base is made when it is first used
        def __init__(self, deadline: float) -> None:
            super().__init__(self, self.drop, None)
            self.deadline = deadline
            self.last: object = None

        def write(self, part: object) -> None:
            _look_at_the_clock(self.deadline)

        def drop(self, buffer: pickle.PickleBuffer) -> bool:
            buffer.raw()  # raises if it is not contiguous, as it would for others
            return False

        def reducer_override(self, obj: object) -> Any:
            self.last = obj
            if now() > self.deadline:
                raise TimeUp
            return override(self, obj)

    return Probe


class Anatomist:
    """Takes values apart as pickle does.

    Args:
        deadline: When what it iterates over is left, by `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._pickler = make_probe(deadline)

    def groups_of(self, value: Any) -> Iterator[Group]:
        """Yield the parts of a value. Its own code may raise anything.

        Raises:
            TimeUp: An iterator of the value's took too long.
        """
        cls = type(value)
        if issubclass(cls, type):
            yield from self._of_class(value)
        elif cls is FunctionType:
            yield from self._of_function(value)
        elif cls is list or cls is tuple:
            yield _indexed(list(value))
        elif cls is dict:
            yield from _of_pairs(list(value), list(value.values()))
        elif cls is set or cls is frozenset:
            elements = list(value)
            yield Group(elements, lambda n: f"element {_key(elements[n])}")
        elif names_of(cls) == ("numpy", "ndarray"):
            if value.dtype.hasobject:
                yield _indexed(value.ravel().tolist(), "" if value.ndim == 1 else ".flat")
        elif cls is _CACHED:
            _, args, *_ = self._reduced(value)
            if any(arg is value.__wrapped__ for arg in args):  # else it goes by reference
                yield _named([(".__wrapped__", value.__wrapped__)])
        elif (named := _of_wrapper(value)) is not None:
            yield _named(named)
        elif cls in self._pickler.dispatch_table or cls in copyreg.dispatch_table:
            yield from self._of_reduced(self._reduced(value))
        elif issubclass(cls, tuple) and _has_default(cls, "__reduce_ex__", "__reduce__"):
            elements = list(tuple.__iter__(value))
            fields = _member(cls, "_fields")
            if type(fields) is tuple and len(fields) == len(elements):  # a namedtuple
                yield Group(elements, lambda n: _attribute(fields[n]))
            else:
                yield _indexed(elements)
            yield _named([*_attributes(value), (_class_label(cls), cls)])
        elif _has_default(cls, *_REDUCERS):
            yield _named([*_attributes(value), (_class_label(cls), cls)])
            if issubclass(cls, list):
                yield _indexed(list(list.__iter__(value)))
            elif issubclass(cls, dict):
                yield from _of_pairs(list(dict.keys(value)), list(dict.values(value)))
        else:
            yield from self._of_reduced(self._reduced(value))

    def _of_function(self, func: Any) -> Iterator[Group]:
        reduced = self._reduced(func)
        if type(reduced) is not tuple:  # by reference
            return
        match reduced[2]:
            case dict() as attributes, dict() as slots:
                code = func.__code__
                captured = []
                for name, cell in zip(code.co_freevars, func.__closure__ or (), strict=False):
                    with suppress(ValueError):  # not assigned yet
                        captured.append((name, cell.cell_contents))
                names = code.co_varnames[: code.co_argcount]
                defaults = [
                    *zip(reversed(names), reversed(func.__defaults__ or ()), strict=False),
                    *(func.__kwdefaults__ or {}).items(),
                ]
                annotations = slots.get("__annotations__") or {}
                yield _named(
                    [
                        *_worded("closure", captured),
                        *_worded("global", slots["__globals__"].items()),
                        *_worded("default of", defaults),
                        *_attributed(attributes),
                        *_worded("annotation of", annotations.items()),
                    ]
                )
            case dict() as attributes, str(), _:  # of functools.singledispatch
                yield _named(_attributed(attributes))
            case _:
                yield from self._of_reduced(reduced)

    def _of_class(self, cls: Any) -> Iterator[Group]:
        reduced = self._reduced(cls)
        if type(reduced) is not tuple or len(reduced) < 3:
            return
        _, args, (attributes, _), *_ = reduced
        named = _attributed(attributes)
        for arg in args:
            if type(arg) is tuple:
                named += [(f"base {n}", base) for n, base in enumerate(arg)]
            elif type(arg) is dict:  # slots, or the members of an enum
                named += _attributed(arg)
            elif issubclass(type(arg), type):
                named.append(("metaclass", arg))
        yield _named(named)

    def _reduced(self, value: Any) -> Any:
        cls = type(value)
        reduced = self._pickler.reducer_override(value)
        if reduced is not NotImplemented:
            return reduced
        if cls is FunctionType or issubclass(cls, type):
            return ""
        reduce = self._pickler.dispatch_table.get(cls)
        return value.__reduce_ex__(pickling.PROTOCOL) if reduce is None else reduce(value)

    def _of_reduced(self, reduced: Any) -> Iterator[Group]:
        """Yield what a reducer returned: ``(func, args, state, items, pairs)``."""
        if type(reduced) is not tuple:  # by reference
            return
        func, args, state, items, pairs, *_ = (*reduced, None, None, None)
        if func is _NEW:
            func, *args = args
        elif func is _NEW_EX:
            func, args, keywords = args
            args = (*args, *keywords.values())
        if issubclass(type(func), type):
            name = pickling.short_name(names_of(func)[1])
            yield _named([(_class_label(func), func)])
        else:
            plain = type(func) is FunctionType or type(func) is BuiltinFunctionType
            name = func.__name__ if plain else "its maker"
            yield _named([(f"function {_key(name)}", func)])
        yield Group(list(args), lambda n: f"argument {n} of {name}()")
        states = state if type(state) is tuple and len(state) == 2 else (state,)
        if all(part is None or type(part) is dict for part in states):
            for part in states:
                yield _named(_attributed(part or {}))
        else:
            yield _named([("state", state)])
        if items is not None:
            yield _indexed(self._taken(items))
        if pairs is not None:
            yield from _of_pairs(*map(list, zip(*self._taken(pairs), strict=True)))

    def _taken(self, iterator: Iterable[Any]) -> list[Any]:
        taken = []
        for element in iterator:
            taken.append(element)
            _look_at_the_clock(self._deadline)
        return taken


def _look_at_the_clock(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeUp


def _of_wrapper(value: Any) -> _Named | None:
    """Return the parts of an object around another one that Python itself makes, or None."""
    cls = type(value)
    if cls is functools.partial:
        arguments = _worded("argument", [*enumerate(value.args), *value.keywords.items()])
        return [(".func", value.func), *arguments, *_attributed(vars(value))]
    if cls is MethodType:
        return [(".__self__", value.__self__), (".__func__", value.__func__)]
    if cls is BuiltinFunctionType or cls is MethodWrapperType:
        # A module here is the one that a function is in.
        owner = value.__self__
        return [] if owner is None or type(owner) is ModuleType else [(".__self__", owner)]
    if cls is classmethod or cls is staticmethod:
        return [(".__func__", value.__func__)]
    if cls is property:
        return [(".fget", value.fget), (".fset", value.fset), (".fdel", value.fdel)]
    if cls is CellType:
        with suppress(ValueError):  # not assigned yet
            return [(".cell_contents", value.cell_contents)]
    return None


def _of_pairs(keys: Sequence[Any] = (), values: Sequence[Any] = ()) -> Iterator[Group]:
    yield Group(values, lambda n: f"[{_key(keys[n])}]")
    yield Group(keys, lambda n: f"key {_key(keys[n])}")


def _indexed(values: Sequence[Any], of: str = "") -> Group:
    return Group(values, lambda n: f"{of}[{n}]")


def _named(named: _Named) -> Group:
    return Group([value for _, value in named], lambda n: named[n][0])


def _worded(word: str, pairs: Iterable[tuple[object, object]]) -> _Named:
    return [(f"{word} {_key(key)}", value) for key, value in pairs]


def _attributed(attributes: dict[Any, Any]) -> _Named:
    return [(_attribute(name), value) for name, value in attributes.items()]


_REDUCERS: Final = (
    "__reduce_ex__",
    "__reduce__",
    "__getstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
)


def _has_default(cls: type, *names: str) -> bool:
    """Return whether these methods are those of ``object``, or are not at all."""
    return all(_member(cls, name) is vars(object).get(name) for name in names)


def _member(cls: type, name: str) -> object:
    """Return what a class or its bases have under a name; None if that is nothing."""
    for base in mro_of(cls):
        if name in _dict_of(base):
            member: object = _dict_of(base)[name]
            return member
    return None


def _attributes(value: object) -> _Named:
    """Return what is in an object's slots and ``__dict__``. No code of its own runs."""
    found: _Named = []
    for base in mro_of(type(value)):
        members = _dict_of(base)
        for name, member in members.items():
            if type(member) is MemberDescriptorType:
                with suppress(AttributeError):  # not assigned yet
                    found.append((_attribute(name), member.__get__(value)))
        member = members.get("__dict__")
        if type(member) is GetSetDescriptorType:
            found += _attributed(member.__get__(value))
    return found


def _class_label(cls: type) -> str:
    return f"class {_key(pickling.short_name(names_of(cls)[1]))}"


def _attribute(name: object) -> str:
    if type(name) is str and name.isidentifier() and len(name) <= MAX_KEY:
        return f".{name}"
    return f"[{_key(name)}]"


def _key(key: object) -> str:
    """Return a key as it is shown: no code of its own runs, and no length of it is taken whole."""
    if type(key) is int and key.bit_length() <= 4 * MAX_KEY:
        text = repr(key)
    elif type(key) is str:
        text = repr(key[:MAX_KEY])
        if len(key) > MAX_KEY:
            return f"{text[: MAX_KEY - 4]}...{text[-1]}"
    else:
        text = f"<{type_name(type(key))}>"
    return text if len(text) <= MAX_KEY else f"{text[: MAX_KEY - 3]}..."
