"""What a script has set in local modules, which their sources would not give on a worker.

``helper.RATE = 3`` changes a module that travels as text. So the globals of local modules that a
function reads go along, if they are plain data and not what the text says anyway: the *constants*.
They are set in the module where it is imported for this function (``namespaces``).

To find them, the functions that one function may call are followed through local modules, as far as
that can be seen. The same walk tells whether a pickle that was made of a function is still right.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final, TypeGuard, cast

from dmap import bytecode, namespaces
from dmap.local_code import Import, Search, Source, needed, scope_of, spec_of
from dmap.namespaces import Text

__all__ = ["Watch", "constants", "stale"]

MAX_OBJECTS: Final = 10_000
"""Objects that are looked at from one function on."""
LOOK_EVERY: Final = 0.1
"""Seconds between two looks at the files behind a function that is submitted again and again."""

_OWN_NAMES: Final = frozenset(
    {*vars(ModuleType("")), "__annotations__", "__builtins__", "__cached__", "__file__", "__path__"}
)
_SCALARS: Final = frozenset((type(None), bool, int, float, complex, str, bytes, bytearray))
_CACHED: Final = type(functools.lru_cache(len))
_NOTHING: Final = object()


def constants(func: object) -> dict[str, dict[str, object]]:
    """Return the plain data that a function reads in local modules and their source does not give.

    Of several functions, in a tuple, what they read together.

    The functions and classes that it uses there are followed, as far as they can be seen: what a
    method of an item reads is not. A value that a ``try`` may have chosen at import (whether a
    module is there, say) is left to be chosen where it is imported again.

    Returns:
        module -> name -> a copy of the value
    """
    found: dict[str, dict[str, object]] = {}
    for (module, name), frozen in sorted(_Reached(func).read.items()):
        found.setdefault(module, {})[name] = namespaces.thaw(frozen)
    return found


def stale(func: Callable[..., Any]) -> str | None:
    """Say in one sentence if a file has changed between its import and its first look.

    Then the workers run its functions as they are in the file, this process as they were.
    """
    reached = _Reached(func)
    for each in reached.functions:
        source = reached.search.find(each.__globals__["__name__"])
        spec = spec_of(sys.modules.get(each.__globals__["__name__"]))
        # Other loaders may compile something else than is in the file.
        if source is None or spec is None or type(spec.loader) is not SourceFileLoader:
            continue
        code = each.__code__
        if code.co_filename == source.text.filename and not any(
            bytecode.is_same(code, other) for other in source.codes.get(code.co_qualname, ())
        ):
            name = os.path.basename(code.co_filename)
            return (
                f"{name} has changed since it was imported here: workers run it as it is now; "
                f"importlib.reload({source.name}) makes this process do so too"
            )
    return None


class Watch:
    """Tells whether some functions still read the same of local modules as when it was made.

    Quick for who asks again and again: whether a file has changed, or a module was loaded anew
    whose functions these do not read, is looked at only every LOOK_EVERY seconds.

    Args:
        functions: Those that were made ready to travel, with ``modules``.
        modules: The names that they count on.
    """

    def __init__(self, functions: Iterable[object], modules: Collection[str]) -> None:
        self._seen = _Reached(tuple(functions)).seen
        self._modules = modules
        self._texts = self._look()
        self._looked_at = time.monotonic()

    def holds(self) -> bool:
        """Return whether all is as it was."""
        for scope, name, value, frozen in self._seen:
            if scope.get(name, _NOTHING) is not value:
                return False
            if frozen is not None and namespaces.freeze(value) != frozen:
                return False
        now = time.monotonic()
        if now - self._looked_at > LOOK_EVERY:
            if self._look() != self._texts:
                return False
            self._looked_at = now
        return True

    def _look(self) -> dict[str, Text]:
        search = Search()
        names = needed(self._modules)
        return {name: source.text for name in names if (source := search.find(name))}


class _Reached:
    """The functions of local modules that one function may call, and what they read there.

    Attributes:
        functions: Those in local modules.
        read: module and name -> frozen value, where the source does not give it.
        seen: All that they read: module's globals, name, value, and that frozen if it is a
            container of plain data.
    """

    def __init__(self, func: object) -> None:
        self.search = Search()
        self.functions: list[FunctionType] = []
        self.read: dict[tuple[str, str], bytes] = {}
        self.seen: list[tuple[dict[str, Any], str, object, bytes | None]] = []
        seen: dict[int, object] = {}  # which keeps their ids
        self._waiting: deque[object] = deque([func])
        while self._waiting and len(seen) < MAX_OBJECTS:
            value = self._waiting.popleft()
            if type(value) in _SCALARS or id(value) in seen:
                continue
            seen[id(value)] = value
            with suppress(Exception):  # its own code may run
                self._look_at(value)

    def _look_at(self, value: Any) -> None:
        kind = type(value)
        wait = self._waiting.extend
        if kind is FunctionType:
            self._look_at_function(value)
        elif kind is MethodType:
            wait((value.__func__, value.__self__))
        elif issubclass(kind, functools.partial):
            wait((value.func, value.args, value.keywords))
        elif kind is staticmethod or kind is classmethod:
            wait((value.__func__,))
        elif kind is property:
            wait((value.fget, value.fset, value.fdel))
        elif kind is _CACHED:
            wait((value.__wrapped__,))
        elif kind in (tuple, list, set, frozenset):
            wait(itertools.islice(value, namespaces.MAX_ELEMENTS))
        elif kind is dict:
            wait(itertools.islice(value.values(), namespaces.MAX_ELEMENTS))
        elif issubclass(kind, type):
            if value.__module__ == "__main__" or self.search.find(value.__module__):
                wait(vars(value).values())
                wait((kind, *value.__bases__))
        elif not issubclass(kind, ModuleType):
            wait((kind,))
            wait((object.__getattribute__(value, "__dict__"),))

    def _look_at_function(self, func: FunctionType) -> None:
        code, scope = func.__code__, func.__globals__
        self._waiting.extend((func.__defaults__, func.__kwdefaults__, vars(func)))
        modules = []
        for cell in func.__closure__ or ():
            with suppress(ValueError):  # not assigned yet
                value = cell.cell_contents
                self._waiting.append(value)
                modules.append(value)
        name = scope.get("__name__")
        module = sys.modules.get(name) if isinstance(name, str) else None
        is_own = module is not None and scope_of(module) is scope
        if is_own and name != "__main__":
            if self.search.find(cast("str", name)) is None:
                return  # it is installed, and so is all that it reads
            self.functions.append(func)
        for each in bytecode.global_names(code) & scope.keys():
            value = scope[each]
            if _is_module(value):
                for path in bytecode.attribute_paths(code, each):
                    self._follow(value, path, code)
            elif is_own and name != "__main__":
                self._read(cast("ModuleType", module), each)
            else:
                self._waiting.append(value)
        package = scope.get("__package__")
        for dotted in bytecode.imports(code, package if isinstance(package, str) else None):
            modules.append(sys.modules.get(dotted))
        for module in modules:
            if _is_module(module):
                self._follow(module, (), code)

    def _follow(self, module: ModuleType, path: tuple[str, ...], code: CodeType) -> None:
        """Read what code reads of a module by this chain of attributes; by an empty one, any."""
        scope = scope_of(module)
        if self.search.find(scope["__name__"]) is None:
            return
        if path:
            value = scope.get(path[0], _NOTHING)
            if _is_module(value):
                self._follow(value, path[1:], code)
            elif value is not _NOTHING:
                self._read(module, path[0])
            return
        for each in bytecode.all_codes(code):
            for name in each.co_names:
                if name in scope and not _is_module(scope[name]):
                    self._read(module, name)

    def _read(self, module: ModuleType, name: str) -> None:
        scope = scope_of(module)
        where = scope["__name__"]
        source = self.search.find(where)
        if name in _OWN_NAMES or source is None or sys.modules.get(where) is not module:
            return
        value = scope[name]
        frozen = namespaces.freeze(value)
        self.seen.append((scope, name, value, None if type(value) in _SCALARS else frozen))
        if frozen is None:
            self._waiting.append(value)
        elif not self._is_given(source, name, frozen, value):
            self.read[where, name] = frozen

    def _is_given(
        self, source: Source, name: str, frozen: bytes, value: object, depth: int = 8
    ) -> bool:
        """Return whether the module will have this value from its own text."""
        assigned = source.assigned
        for given in assigned.get(name, assigned.get("*", ())):
            if not isinstance(given, Import):
                if given == frozen:
                    return True
                continue
            origin = self.search.find(given.module)
            imported = name if given.name == "*" else given.name
            if origin is None:
                scope = scope_of(sys.modules.get(given.module))
                if scope.get(imported, _NOTHING) is value:
                    return True
            elif depth and self._is_given(origin, imported, frozen, value, depth - 1):
                return True
        return False


def _is_module(value: object) -> TypeGuard[ModuleType]:
    return issubclass(type(value), ModuleType)
