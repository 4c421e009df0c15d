"""What makes two jobs the same, and two sights of one function.

Pure: digests and comparisons only.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, Final, TypeAlias

from jobserver.protocol import Body

Fingerprint: TypeAlias = tuple[object, ...]

_FIXED: Final = (int, float, complex, str, bytes, type(None), ModuleType)
"""What cannot change, or goes by reference."""


def item_uniq(closure: bytes, argument: Body) -> bytes:
    """Return the uniq under which equal items of equal functions meet.

    Args:
        closure: The blob id of the function.
        argument: The item, pickled.
    """
    digest = hashlib.sha256(closure)
    for part in (argument,) if isinstance(argument, bytes) else argument:
        digest.update(part)
    return digest.digest()


def argument_uniq(argument: Body) -> bytes:
    """Return the uniq of a call of a named function, whose digest is that of its argument."""
    return item_uniq(b"", argument)


def fingerprint(func: Callable[..., Any]) -> Fingerprint | None:
    """Return all that a function's pickle depends on, or None if some of that may change unseen.

    While all of it is the same (`is_same`), a pickle that was made of the function is still right.
    """
    if _goes_by_reference(func):
        return (func,)
    if not isinstance(func, FunctionType) or func.__dict__ or func.__kwdefaults__:
        return None
    values: list[object] = list(func.__defaults__ or ())
    try:
        values += [cell.cell_contents for cell in func.__closure__ or ()]
    except ValueError:  # one is not assigned yet
        return None
    known = func.__globals__
    values += [known[name] for name in _names(func.__code__) if name in known]
    for value in values:
        if not isinstance(value, _FIXED) and not _goes_by_reference(value):
            return None
    return (func.__code__, *values)


def is_same(one: Fingerprint, other: Fingerprint) -> bool:
    """Tell whether two fingerprints are of the very same things."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


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
