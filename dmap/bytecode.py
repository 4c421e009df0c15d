"""What compiled code looks up and imports, read from its instructions.

Pure, and quick to import: the standard ``dis`` makes an object an instruction, and imports half of
``inspect``'s world first. What is needed here is small and the same on Python 3.11, 3.12 and 3.13:
two bytes a unit, the instruction and its argument; ``EXTENDED_ARG`` before it has the argument's
higher bytes; units of ``CACHE`` follow some instructions and mean nothing. ``co_code`` is what the
compiler made, whatever the interpreter has put in its place since.

All of it looks at nested code too (inner functions, lambdas, classes, comprehensions).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from opcode import hasconst, opmap
from types import CodeType
from typing import Final

__all__ = [
    "all_codes",
    "attribute_paths",
    "global_names",
    "imports",
    "is_same",
    "module_attributes",
    "resolve",
]

MAX_CACHED: Final = 4096

_EXTENDED_ARG: Final = opmap["EXTENDED_ARG"]
_CACHE: Final = opmap["CACHE"]
_LOAD_CONST: Final = opmap["LOAD_CONST"]
_LOAD_SMALL_INT: Final = opmap.get("LOAD_SMALL_INT", 256)  # since 3.14
_STORE_NAME: Final = opmap["STORE_NAME"]
_IMPORT_NAME: Final = opmap["IMPORT_NAME"]


def _shifts(**bits: int) -> dict[int, int]:
    """Return opcode -> how far its argument is shifted, for those that this Python has."""
    # Above 255 are names that only the compiler uses: LOAD_METHOD since 3.12.
    return {opmap[name]: n for name, n in bits.items() if opmap.get(name, 256) < 256}


# The lowest bit of these two says whether something else goes on the stack, too.
_LOAD_GLOBAL: Final = _shifts(LOAD_GLOBAL=1, LOAD_NAME=0, LOAD_FROM_DICT_OR_GLOBALS=0)
_LOAD_ATTRIBUTE: Final = _shifts(LOAD_ATTR=1 if "LOAD_FROM_DICT_OR_GLOBALS" in opmap else 0)
_LOAD_ATTRIBUTE.update(_shifts(LOAD_METHOD=0))
_CHANGE_GLOBAL: Final = _shifts(STORE_GLOBAL=0, DELETE_GLOBAL=0)


def all_codes(code: CodeType) -> Iterator[CodeType]:
    """Yield this code and all that is nested in it."""
    waiting = [code]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [const for const in code.co_consts if type(const) is CodeType]


@functools.lru_cache(MAX_CACHED)
def global_names(code: CodeType) -> frozenset[str]:
    """Return the names that the code reads, sets or deletes as globals; no attribute's.

    In the body of a class a name may be the class's own: those are among them.
    """
    names: set[str] = set()
    for each in all_codes(code):
        known = each.co_names
        for op, arg in _instructions(each):
            shift = _LOAD_GLOBAL.get(op)
            if shift is not None:
                names.add(known[arg >> shift])
            elif op in _CHANGE_GLOBAL:
                names.add(known[arg])
    return frozenset(names)


def module_attributes(code: CodeType, name: str) -> frozenset[str] | None:
    """Return the attributes that the code reads from a global, if it does nothing else with it.

    Returns:
        ``{"f", "CONST"}`` for code that says ``name.f(x) + name.CONST``, nothing for code without
        ``name``. None if the code passes the global on, sets an attribute of it, or makes the name
        mean something else: then it may have to do with any attribute.
    """
    paths = attribute_paths(code, name)
    return None if () in paths else frozenset(path[0] for path in paths)


@functools.lru_cache(MAX_CACHED)
def attribute_paths(code: CodeType, name: str) -> frozenset[tuple[str, ...]]:
    """Return the chains of attributes that the code reads from a global.

    ``name.a.b(x) + name.c`` gives ``("a", "b")`` and ``("c",)``; whatever else is done with
    ``name`` gives ``()``.
    """
    paths: set[tuple[str, ...]] = set()
    for each in all_codes(code):
        known = each.co_names
        if name not in known:
            continue
        path: tuple[str, ...] | None = None  # of the load that is being followed
        for op, arg in _instructions(each):
            shift = _LOAD_ATTRIBUTE.get(op)
            if path is not None and shift is not None:
                path = (*path, known[arg >> shift])
                continue
            if path is not None:
                paths.add(path)
                path = None
            shift = _LOAD_GLOBAL.get(op)
            if shift is not None:
                path = () if known[arg >> shift] == name else None
            elif op in _CHANGE_GLOBAL and known[arg] == name:
                paths.add(())
    return frozenset(paths)


@functools.lru_cache(MAX_CACHED)
def imports(code: CodeType, package: str | None) -> frozenset[str]:
    """Return the absolute names of the modules that the code's import statements may import.

    ``from a import b`` gives ``a`` and ``a.b``, which may be a module or not.

    Args:
        code: Of a function, or of a whole module.
        package: What relative imports start from; without one they give nothing.
    """
    names: set[str] = set()
    for each in all_codes(code):
        if _IMPORT_NAME not in each.co_code:  # nor as an argument
            continue
        # The constants before an IMPORT_NAME: how many dots, and the names after ``import``.
        before: tuple[object, object] = (0, None)
        for op, arg in _instructions(each):
            if op == _LOAD_CONST:
                before = (before[1], each.co_consts[arg])
            elif op == _LOAD_SMALL_INT:
                before = (before[1], arg)
            elif op == _IMPORT_NAME:
                level, wanted = before
                module = resolve(each.co_names[arg], level, package)
                if not module:
                    continue
                names.add(module)
                if isinstance(wanted, tuple):
                    names.update(f"{module}.{part}" for part in wanted if part != "*")
    return frozenset(names)


def resolve(name: str, level: object, package: str | None) -> str | None:
    """Return the absolute name of what ``from <level dots>name`` means in a package.

    None if it means nothing: there are more dots than packages, or no package.
    """
    if not isinstance(level, int) or level == 0:
        return name
    if not package:
        return None
    parts = package.split(".")
    if level > len(parts):
        return None
    base = ".".join(parts[: len(parts) - level + 1])
    return f"{base}.{name}" if name else base


def is_same(one: CodeType, other: CodeType) -> bool:
    """Tell whether two codes do the same, wherever they stand, in whichever file."""
    return _shape(one) == _shape(other)


def _shape(code: CodeType) -> tuple[object, ...]:
    """Return all of a code but file names and line numbers."""
    constants: list[object] = []
    for const in code.co_consts:
        if type(const) is CodeType:
            constants.append(_shape(const))
        else:
            # By repr: 1, 1.0 and True are equal, and so are both zeros. A set has no order.
            constants.append(sorted(map(repr, const)) if type(const) is frozenset else repr(const))
    instructions: object = code.co_code
    if "__firstlineno__" in code.co_names:  # since 3.13 a class knows its line, as a constant
        names = code.co_names
        found = list(_instructions(code))
        kept = []
        for n, (op, arg) in enumerate(found):
            after = found[n + 1] if n + 1 < len(found) else (0, 0)
            if after[0] == _STORE_NAME and names[after[1]] == "__firstlineno__":
                continue
            kept.append((op, constants[arg] if op in hasconst else arg))
        instructions, constants = kept, []
    return (
        instructions,
        constants,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags,
        code.co_exceptiontable,
        code.co_qualname,
    )


def _instructions(code: CodeType) -> Iterator[tuple[int, int]]:
    """Yield opcodes with their whole arguments, less caches and what extends arguments."""
    raw = code.co_code
    higher = 0
    for at in range(0, len(raw), 2):
        op = raw[at]
        if op == _CACHE:
            continue
        arg = higher | raw[at + 1]
        if op == _EXTENDED_ARG:
            higher = arg << 8
            continue
        higher = 0
        yield op, arg
