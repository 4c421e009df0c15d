"""Compiled code as a token of `dmap.canonical`: what it does, not where it stands.

Instructions, constants, names and the rest of what runs, of nested code too; no file names, no line
numbers, and not in what it was defined. ``co_code`` is what the compiler made, whatever
the interpreter has put in its place since. In one thing it depends on the rest of the file: a
method of ``name`` is called by other instructions if the file imports something by that name.
"""

from __future__ import annotations

import functools
from types import CodeType
from typing import Final

from dmap.canonical import FROZENSET, NOTHING, TUPLE, Unidentifiable, scalar, solid

__all__ = ["code_token"]

MAX_CACHED: Final = 4096

CODE: Final = b"\xc0"
SLICE: Final = b"\xc1"

_UNSAID: Final = frozenset(("__firstlineno__", "__static_attributes__"))


@functools.lru_cache(MAX_CACHED)
def code_token(code: CodeType) -> bytes:
    """Return the token of code: equal for what does the same, wherever it stands."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    # Without its qualified name: code that differs in that alone is equal, for the cache too.
    parts = [
        *map(_constant, (code.co_code, code.co_exceptiontable, code.co_name, *counts, *names)),
    ]
    unsaid = _unsaid_constants(code)
    for n, constant in enumerate(code.co_consts):
        parts.append(NOTHING if n in unsaid else _constant(constant))
    return solid(CODE, parts)


def _constant(value: object) -> bytes:
    token = scalar(value)
    if token is not None:
        return token
    match value:
        case tuple():
            return solid(TUPLE, [_constant(each) for each in value])
        case frozenset():
            return solid(FROZENSET, [_constant(each) for each in value], 1)
        case CodeType():
            return code_token(value)
        case slice():
            return solid(SLICE, [_constant(each) for each in (value.start, value.stop, value.step)])
    raise Unidentifiable(f"is a {type(value).__qualname__} among the constants of code")


def _unsaid_constants(code: CodeType) -> set[int]:
    """Return which constants of a class's body say where it stands (since Python 3.13).

    Its line number, and a tuple of attributes in the order of a set.
    """
    if _UNSAID.isdisjoint(code.co_names):
        return set()
    import dis

    unsaid: set[int] = set()
    said: set[int] = set()
    before: int | None = None
    for instruction in dis.get_instructions(code):
        if before is not None:
            is_unsaid = instruction.opname == "STORE_NAME" and instruction.argval in _UNSAID
            (unsaid if is_unsaid else said).add(before)
        before = None
        if "CONST" in instruction.opname and instruction.arg is not None:
            before = instruction.arg
    return unsaid - said
