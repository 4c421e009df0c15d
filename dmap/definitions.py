"""Functions, classes and modules as digests, by what they are: equal in every process.

What can be imported from an installed module is its name there; that the versions are the same is
taken for granted. What is of the script, of a *local* module (`dmap.local_code`), or made at run
time is taken apart:

* a function: its code without file names and line numbers, defaults, attributes, captured values,
  and the globals that its code looks up, as they are now; local modules that it imports when it
  runs, by their source;
* a class: its name, bases, metaclass and what its body defined, without what only tells where that
  stood, or what Python keeps there for itself;
* a local module that is a global of a function: those of its attributes that the code reads, or
  its source if the code does something else with it.

In a local module a global that cannot be identified (a lock, a session) is the source of that
module, since that makes it. The script has no such way out: its source is edited all the time.

They refer to each other in circles, so a walk through them collects nodes, breadth first, and
closes them at the end; see `dmap.canonical`. The digest of a function or class depends on what it
leads to, not on what led to it.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections import deque
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Final, NamedTuple

from dmap.canonical import NOTHING, TUPLE, Node, Part, Unidentifiable, close, solid, text
from dmap.codes import code_token
from dmap.values import DICT, Encoder, Walk, too_deep

__all__ = ["Definitions", "ValueWalk"]

NAMED: Final = b"\xd0"
MODULE: Final = b"\xd1"
SOURCE: Final = b"\xd2"
FUNCTION: Final = b"\xd3"
CLASS: Final = b"\xd4"
METHOD: Final = b"\xd5"
BOUND: Final = b"\xd6"
CACHED: Final = b"\xd7"
DISPATCH: Final = b"\xd8"
OF_MODULE: Final = b"\xd9"
ATTRIBUTES: Final = b"\xda"
SINGLE: Final = b"\xdb"

_CACHED_TYPE: Final = type(functools.lru_cache(len))
_HEAPTYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made at run time, or by newer kinds of C code
_SCRIPT: Final = ("__main__", "__mp_main__")

_UNSAID: Final = frozenset(
    (
        *("__dict__", "__weakref__", "__module__", "__doc__", "__slots__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
        *("__firstlineno__", "__static_attributes__", "__classdictcell__"),
        "__slotnames__",  # copyreg's, from the first pickle on
        "__dataclass_fields__",
        *("_abc_impl", "_abc_registry", "_abc_cache", "_abc_negative_cache"),
        "_abc_negative_cache_version",
    )
)
"""In the dict of a class: what says nothing of it, and what is said in another way."""

_UNSAID_OF_ENUM: Final = frozenset(
    (
        *("_member_map_", "_member_names_", "_value2member_map_", "_unhashable_values_"),
        *("_unhashable_values_map_", "_hashable_values_"),
    )
)

_FIELD: Final = (
    *("name", "default", "default_factory", "init", "repr", "hash", "compare", "metadata"),
    *("kw_only", "_field_type"),
)
"""Attributes of a dataclass's field; its ``type`` is an annotation."""


class Definitions:
    """Functions and classes that values have led to, looked at once.

    For one map, say: whoever holds this sees them as they were when they were first met.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, tuple[object, bytes]] = {}  # id -> whose it is, and its token
        self.encoders: dict[type, Encoder] = {}


class _Place(NamedTuple):
    """Where a function or class says that it is.

    Attributes:
        module: Of which module it is, "" if it does not say.
        name: Its qualified name.
        is_found: Whether it can be imported from there.
    """

    module: str
    name: str
    is_found: bool

    @property
    def home(self) -> tuple[str, str] | None:
        """The local module whose source makes it, if that is so, and its name in there."""
        return (self.module, self.name) if self.is_found and is_local(self.module) else None


class _Definer(Walk):
    """What walks do with all but values: what has a name goes by that."""

    def require(self, value: Any, place: _Place) -> Part:
        """Return a function or class that goes by what it is."""
        raise NotImplementedError

    def define(self, value: Any) -> Part:
        """Return a function, class, module or code object as a part."""
        if isinstance(value, ModuleType):
            return _module(value)
        kind = type(value)
        if kind is CodeType:
            return code_token(value)
        if kind is MethodType or kind is BuiltinFunctionType:
            return self._bound(value)
        place = _place_of(value)
        if place.is_found and _is_installed(place.module):
            return _named(place.module, place.name)
        if kind is _CACHED_TYPE:
            return self._cached(value)
        if isinstance(value, type) and not value.__flags__ & _HEAPTYPE:
            return _named(place.module, place.name)
        return self.require(value, place)

    def refer(self, value: object, name: str) -> Part:
        """Return what is pickled as no more than a name in its module as a part."""
        kind = type(value)
        for module in (getattr(value, "__module__", None), kind.__module__):
            if isinstance(module, str) and _find(module, name) is value:
                if _is_installed(module):
                    return _named(module, name)
                break
        else:
            if kind.__module__ != "typing":  # class Box[T]: nobody can import this T
                raise Unidentifiable(f"is a {kind.__qualname__} that {name!r} does not lead to")
        return self.made(SINGLE, [self.define(kind), text(name)])

    def _bound(self, value: Any) -> Part:
        """A method with its object, or a function in C."""
        owner = value.__self__
        name = value.__name__
        of = getattr(value, "__module__", None)
        if owner is None or isinstance(owner, ModuleType):
            return _named(str(of or getattr(owner, "__name__", "")), value.__qualname__)
        # random.random is a method of an object that is another in each process.
        for module in (of, type(owner).__module__):
            if isinstance(module, str) and _find(module, name) is value and _is_installed(module):
                return _named(module, name)
        own = self.attribute(value, "__self__")
        if type(value) is MethodType:
            return self.made(METHOD, [own, self.token(value.__func__)])
        return self.made(BOUND, [own, text(name)])

    def _cached(self, value: Any) -> Part:
        parameters: dict[str, Any] = getattr(value, "cache_parameters", dict)()
        return self.made(CACHED, [self.token(value.__wrapped__), self.token(parameters)])


class ValueWalk(_Definer):
    """Goes through values, and knows the token of each function or class that it meets at once.

    Args:
        definitions: What is known of them.
    """

    def __init__(self, definitions: Definitions) -> None:
        super().__init__(definitions.encoders)
        self._known = definitions.tokens

    def define(self, value: Any) -> Part:
        """Return the token of a function, class, module or code object."""
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        part = super().define(value)
        if isinstance(part, bytes) and isinstance(value, (type, FunctionType)):
            self._known[id(value)] = value, part
        return part

    def require(self, value: Any, place: _Place) -> Part:
        """Return the token of a function or class that goes by what it is."""
        return _Graph().token_of(value, place.home)


class _Graph(_Definer):
    """Goes through what a function or class leads to, from there on."""

    def __init__(self) -> None:
        super().__init__({})
        self._waiting: deque[tuple[Node, Any]] = deque()
        self._at: Node | None = None
        self._step = ""
        self._names: dict[Node, str] = {}
        self._has_errors = False

    def token_of(self, value: Any, home: tuple[str, str] | None) -> bytes:
        """Return the token of a function or class.

        Raises:
            Unidentifiable: it leads to something that cannot be identified.
        """
        root = self._add(value, home)
        self._memo[id(value)] = root
        while self._waiting:
            node, value = self._waiting.popleft()
            self._at = node
            try:
                if isinstance(value, type):
                    node.fill(CLASS, self._class(value))
                elif _is_dispatching(value):
                    node.fill(DISPATCH, self._dispatching(value))
                elif isinstance(value, FunctionType):
                    node.fill(FUNCTION, self._function(value))
                else:
                    raise Unidentifiable(f"is a {type(value).__qualname__} without a name")
            except Unidentifiable as error:
                error.inside(*self._way_to(node))
                node.error = error
                self._has_errors = True
            except RecursionError as error:
                # How deep is too deep depends on where the walk began: nothing may follow from it.
                why = too_deep()
                why.inside(*self._way_to(node))
                raise why from error
        if self._has_errors:
            _fall_back(root)
        return close(root)

    def _way_to(self, node: Node) -> list[str]:
        """Return the steps to a function or class, from the first one on."""
        steps: list[str] = []
        while node.reached is not None:
            name = self._names[node]
            node, step = node.reached
            says_all = name in (step.strip("."), "<lambda>")
            steps[:0] = [step] if says_all else [step, name]
        return [self._names[node], *steps]

    def require(self, value: Any, place: _Place) -> Part:
        """Return the node of a function or class that goes by what it is."""
        return self._add(value, place.home)

    def _add(self, value: Any, home: tuple[str, str] | None) -> Node:
        node = Node(home)
        self._names[node] = _short(getattr(value, "__qualname__", type(value).__qualname__))
        if self._at is not None:
            node.reached = (self._at, self._step)
        self._waiting.append((node, value))
        self._kept.append(value)
        return node

    def _part(self, step: str, value: Any) -> Part:
        """Return a value as a part of what is looked at; the step to it is for errors."""
        self._step = step
        try:
            return self.token(value)
        except Unidentifiable as error:
            self._has_errors = True
            error.inside(step)
            raise

    def _in_module(self, module: str, name: str, value: Any) -> Part:
        """Return a global of a local module: at worst it is the module's source."""
        try:
            part = self._part(name, value)
        except Unidentifiable:
            return _source(module, name)
        if type(part) is Node and part.home is None:
            node = Node((module, name))
            node.fill(OF_MODULE, [part])
            return node
        return part

    # --- functions ----------------------------------------------------------------------------

    def _function(self, func: FunctionType) -> list[Part]:
        code = func.__code__
        parts: list[Part] = [
            code_token(code),
            text(func.__name__),
            text(_short(func.__qualname__)),
            self._part("its defaults", func.__defaults__),
            self._part("its defaults", func.__kwdefaults__),
        ]
        if func.__dict__:
            self._step = "its attributes"
            parts.append(self.attributes(func.__dict__))
        else:
            parts.append(NOTHING)
        for name, cell in zip(code.co_freevars, func.__closure__ or (), strict=True):
            parts.append(self._captured(name, cell))
        return parts + self._surroundings(func)

    def _captured(self, name: str, cell: Any) -> Part:
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            return NOTHING
        return self._part(name, value)

    def _surroundings(self, func: FunctionType) -> list[Part]:
        """Return the globals that a function uses, and the local modules that it imports."""
        from dmap import bytecode

        scope = func.__globals__
        name = scope.get("__name__")
        module = ""
        if isinstance(name, str) and name not in _SCRIPT:
            own = sys.modules.get(name)
            module = name if own is not None and vars(own) is scope else ""
        if module and _is_installed(module):
            return [text(module)]  # an inner function of a library: its globals are the library's
        code = func.__code__
        parts: list[Part] = []
        for each in sorted(bytecode.global_names(code) & scope.keys()):
            value = scope[each]
            parts.append(text(each))
            if isinstance(value, ModuleType) and is_local(value.__name__):
                parts.append(self._read_from(value, bytecode.module_attributes(code, each)))
            elif module:
                parts.append(self._in_module(module, each, value))
            else:
                parts.append(self._part(each, value))
        for each in sorted(bytecode.imports(code, scope.get("__package__"))):
            if is_local(each):
                parts.append(_source(each))
        return parts

    def _read_from(self, module: ModuleType, names: frozenset[str] | None) -> Part:
        """Return what code sees of a local module of which it reads these attributes only."""
        if names is None or sys.modules.get(module.__name__) is not module:
            return _module(module)
        parts: list[Part] = [text(module.__name__)]
        for name in sorted(names):
            parts.append(text(name))
            try:
                value = getattr(module, name)
            except Exception:  # a module's __getattr__ is its own code
                parts.append(NOTHING)
            else:
                parts.append(self._in_module(module.__name__, name, value))
        return self.made(ATTRIBUTES, parts)

    def _dispatching(self, func: Any) -> list[Part]:
        """A function of functools.singledispatch; in its cells is a cache of weak references."""
        pairs: list[Part] = []
        for kind, each in func.registry.items():
            step = f"[{kind.__qualname__}]"
            pairs += (self._part(step, kind), self._part(step, each))
        return [text(func.__name__), self.made(DICT, pairs, 2)]

    # --- classes ------------------------------------------------------------------------------

    def _class(self, cls: Any) -> list[Part]:
        scope = vars(cls)
        parts: list[Part] = [
            text(_short(cls.__qualname__)),
            self._part("its metaclass", type(cls)),
            self._part("its bases", cls.__bases__),
            solid(TUPLE, [text(name) for name in scope.get("__annotations__", ())]),
        ]
        slots = [name for name in scope if type(scope[name]) is MemberDescriptorType]
        parts.append(solid(TUPLE, [text(name) for name in sorted(slots)]))
        is_enum = isinstance(cls, enum.EnumMeta)
        members = scope["_member_map_"] if is_enum else {}
        unsaid = _UNSAID | _UNSAID_OF_ENUM if is_enum else _UNSAID
        pairs: list[Part] = []
        for name, member in members.items():
            pairs += (text(name), self._part(f".{name}", member._value_))
        parts.append(self.made(TUPLE, pairs))
        fields: list[Part] = []
        for field in scope.get("__dataclass_fields__", {}).values():
            self._step = f"its field {field.name}"
            fields += [self.attribute(field, each) for each in _FIELD]
        parts.append(self.made(TUPLE, fields))
        for name in sorted(scope.keys() - unsaid - members.keys()):
            value = scope[name]
            if type(value) not in (MemberDescriptorType, GetSetDescriptorType):
                parts += (text(name), self._part(f".{name}", value))
        return parts


def _fall_back(root: Node) -> None:
    """Have what cannot be identified be its source, if it or what leads to it has that.

    Raises:
        Unidentifiable: the root cannot be identified.
    """
    parents: dict[Node, list[Node]] = {root: []}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        for part in node.open_parts():
            if part not in parents:
                parents[part] = []
                waiting.append(part)
            parents[part].append(node)
    failed = [node for node in parents if node.error is not None]
    seen = set(failed)
    while failed:
        node = failed.pop()
        if node.home is not None:
            node.fill(SOURCE, [_source(*node.home)])
            node.error = None
            continue
        for parent in parents[node]:
            if parent not in seen:
                seen.add(parent)
                parent.error = node.error
                failed.append(parent)
    if root.error is not None:
        raise root.error


def _is_dispatching(value: object) -> bool:
    return (
        isinstance(value, FunctionType)
        and value.__globals__ is vars(functools)
        and {"registry", "dispatch", "__wrapped__"} <= value.__dict__.keys()
    )


# --- names ------------------------------------------------------------------------------------


def is_local(module: str) -> bool:
    """Tell whether a module is one of those that only this machine can be expected to have."""
    from dmap import local_code

    return module not in _SCRIPT and local_code.is_local(module)


def _is_installed(module: str) -> bool:
    return module not in _SCRIPT and not is_local(module)


def _short(name: str) -> str:
    """Return a qualified name without the functions that it was defined in."""
    return name.rpartition("<locals>.")[2]


def _named(module: str, name: str) -> bytes:
    return solid(NAMED, [text(module), text(name)])


def _module(module: ModuleType) -> bytes:
    name = module.__name__
    if name in _SCRIPT or name not in sys.modules:
        raise Unidentifiable(f"is the module {name}, which others cannot import by that name")
    return _source(name) if is_local(name) else solid(MODULE, [text(name)])


def _source(module: str, name: str = "") -> bytes:
    """Return the token of what the source of a local module makes."""
    from dmap import local_code

    return solid(SOURCE, [text(module), text(name), local_code.digest(module)])


def _find(module: str, name: str) -> object:
    """Return what can be imported under that name, or None."""
    found: object = sys.modules.get(module)
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except Exception:  # a metaclass's or a module's __getattr__ is its own code
        return None
    return found


def _place_of(value: Any) -> _Place:
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return _Place("", "", False)
    return _Place(module, name, _find(module, name) is value)
