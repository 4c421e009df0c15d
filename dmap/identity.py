"""What makes two jobs the same, and two sights of one function.

Two jobs are the same if their functions are and their items are: by what they are, in whatever
process. `dmap.canonical` has how values become digests, `dmap.definitions` how functions do.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, Final, cast

from dmap import pickling
from dmap.canonical import Node, Unidentifiable, close, digest_of, digest_quickly
from dmap.definitions import Definitions, ValueWalk
from dmap.values import too_deep

__all__ = [
    "Definitions",
    "Fingerprint",
    "Unidentifiable",
    "argument_uniq",
    "closure_id",
    "fingerprint",
    "item_id",
    "item_uniq",
]

_FIXED: Final = (int, float, complex, str, bytes, type(None), ModuleType)
"""What cannot change, or goes by reference."""
_MISSING: Final = object()


class Fingerprint:
    """All that a function's pickle depends on, as it was when this was made.

    It is asked at each submit, so it looks at the same few places again instead of making another.
    """

    __slots__ = ("_by_name", "_cells", "_code", "_defaults", "_func", "_globals")

    def __init__(
        self,
        func: Callable[..., Any],
        cells: Sequence[tuple[CellType, object]] = (),
        known: Sequence[tuple[str, object]] = (),
        by_name: Sequence[object] = (),
    ) -> None:
        self._func = func
        self._code = getattr(func, "__code__", None)
        self._defaults = getattr(func, "__defaults__", None)
        self._cells = cells  # each with what it held
        self._globals = known  # those that its code looks up, or would
        self._by_name = by_name  # what goes by reference, and would not if its module changed

    def holds(self) -> bool:
        """Tell whether all of it is still the same: then the pickle is still right."""
        for value in self._by_name:
            if not _goes_by_reference(value):
                return False
        if self._by_name and self._by_name[0] is self._func:
            return True
        func = cast("FunctionType", self._func)
        if (
            func.__code__ is not self._code
            or func.__defaults__ is not self._defaults
            or func.__dict__
            or func.__kwdefaults__
        ):
            return False
        try:
            for cell, value in self._cells:
                if cell.cell_contents is not value:
                    return False
        except ValueError:  # it was deleted
            return False
        if self._globals:
            get = func.__globals__.get
            for name, value in self._globals:
                if get(name, _MISSING) is not value:
                    return False
        return True


def closure_id(func: Callable[..., Any]) -> bytes:
    """Return 32 bytes that tell what a function is, the same in every process.

    Its code without line numbers and file names, its defaults, attributes and captured values, the
    globals that its code looks up, and what these lead to, as all of it is now. Functions and
    classes of installed modules go by their names.

    Args:
        func: A function, class or other callable.

    Raises:
        Unidentifiable: it leads to something that cannot be told from others in every process. The
            message has the path.
    """
    return item_id(func)


def item_id(value: object, definitions: Definitions | None = None) -> bytes:
    """Return 32 bytes that are equal for values that are equal in type and value, in all depths.

    They are the same in every process of one Python X.Y.

    Args:
        value: Any value.
        definitions: What is known of the functions and classes that values have led to. Without it
            the class of an instance, say, is looked at in each call.

    Raises:
        Unidentifiable: there is something in it that cannot be told from others in every process.
            The message has the path.
    """
    digest = digest_quickly(value)
    if digest is not None:
        return digest
    try:
        part = ValueWalk(Definitions() if definitions is None else definitions).token(value)
        return digest_of(close(part) if isinstance(part, Node) else part)
    except MemoryError:
        raise
    except Unidentifiable as error:
        if not isinstance(value, (FunctionType, type)):
            error.inside(_name_of(value))
        raise
    except RecursionError as error:
        why = too_deep()
        why.inside(_name_of(value))
        raise why from error
    except Exception as error:  # its own code runs, and other threads may change it meanwhile
        what = f"cannot be looked at ({pickling.reason(error)})"
        raise Unidentifiable(what, _name_of(value)) from error


def item_uniq(closure: bytes, item: bytes, seeding: tuple[int, int] | None = None) -> bytes:
    """Return the uniq under which equal items of equal functions meet.

    Args:
        closure: The id of the function; empty for a named one.
        item: The id of the item.
        seeding: The seed of the map and the item's index in it, if it has a seed.
    """
    digest = digest_quickly((closure, item, *map(int, seeding or ())))
    assert digest is not None
    return digest


def argument_uniq(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return the uniq of a call of a named function, which is that of its arguments.

    Raises:
        Unidentifiable: one of them cannot be told from others in every process.
    """
    return item_uniq(b"", item_id((args, kwargs)))


def fingerprint(func: Callable[..., Any]) -> Fingerprint | None:
    """Return all that a function's pickle depends on, or None if some of that may change unseen."""
    if _goes_by_reference(func):
        return Fingerprint(func, by_name=(func,))
    if not isinstance(func, FunctionType) or func.__dict__ or func.__kwdefaults__:
        return None
    try:
        cells = [(cell, cell.cell_contents) for cell in func.__closure__ or ()]
    except ValueError:  # one is not assigned yet
        return None
    get = func.__globals__.get
    known = [(name, get(name, _MISSING)) for name in _names(func.__code__)]
    values = [*(func.__defaults__ or ()), *(value for _, value in cells)]
    values += [value for _, value in known if value is not _MISSING]
    by_name = [value for value in values if not isinstance(value, _FIXED)]
    if not all(map(_goes_by_reference, by_name)):
        return None
    return Fingerprint(func, cells, known, by_name)


def _name_of(value: object) -> str:
    return pickling.short_name(type(value).__qualname__)


def _goes_by_reference(value: object) -> bool:
    """Tell whether a pickle of it says no more than where it can be imported."""
    if not isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return False
    module = getattr(value, "__module__", None)
    if not isinstance(module, str) or module == "__main__":
        return False
    found: object = sys.modules.get(module)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


@functools.lru_cache(maxsize=256)
def _names(code: CodeType) -> frozenset[str]:
    """Return the names that code looks up, that of its inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return frozenset(names)
