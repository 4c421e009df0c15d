"""Writes that would vanish: what a function changes in the process that runs it, and not here.

``total += x`` on a global and ``seen.append(x)`` on a captured list do nothing for the caller of a
map. `lost_writes` says so where it is plain. It reads bytecode, since a REPL has no sources, and
runs none of the user's code.

A false alarm is worse than a miss, so *reads* decide. A container that is also read is a memo or a
buffer of the function's own; a variable that is also tested is set up lazily. A read is whatever is
not understood as a write, in each function and method that may run along, and by each name that
leads to the same container. Three steps, each dearer than the one before:

1. Is there an instruction, or the name of a method, that may change something, and something to be
   changed? For most functions there is not.
2. Each load of a captured variable is followed, on the stack and through the jumps of an
   expression, to the instructions that use it. This gives what is written, and where.
3. If anything is: what else, among all that the captured values hold, may read it?

The variables are cells that exist at the call, and globals of ``__main__``. The globals of a module
are its own business, as is what installed packages and the standard library write.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from dis import Instruction

    Stack: TypeAlias = tuple[str, ...]
    State: TypeAlias = tuple[int, Stack]

__all__ = ["lost_writes"]

MAX_FUNCTIONS: Final = 100
MAX_READERS: Final = 300
MAX_LAYERS: Final = 20
MAX_VALUES: Final = 5000
MAX_DEPTH: Final = 5
MAX_STATES: Final = 500
"""Beyond these bounds everything counts as read."""

FIRST_MEMBERS: Final = 100
"""Of a captured container only these are looked at, and a tenth of them further down."""

_LIST: Final = {"append", "clear", "extend", "insert", "remove", "reverse"}
_DICT: Final = {"clear", "update"}
_SET: Final = {"add", "clear", "discard", "remove", "update"}

# type -> its methods that change it and return nothing
_IN_PLACE: Final[dict[type, set[str]]] = {
    list: _LIST | {"sort"},
    bytearray: _LIST,
    deque: _LIST | {"appendleft", "extendleft", "rotate"},
    dict: _DICT,
    defaultdict: _DICT,
    OrderedDict: _DICT | {"move_to_end"},
    Counter: _DICT | {"subtract"},
    set: _SET | {"difference_update", "intersection_update", "symmetric_difference_update"},
}
_OF_ARRAYS: Final = {"fill", "itemset", "partition", "put", "resize", "sort"}
_IF_DROPPED: Final = {"pop", "popitem", "popleft", "setdefault"}
_CHANGING: Final = frozenset(set().union(*_IN_PLACE.values(), _OF_ARRAYS, _IF_DROPPED))

# By id: to look a class up would run the `__hash__` of its metaclass.
_METHODS: Final = {id(kind): methods for kind, methods in _IN_PLACE.items()}

# What reaches a variable by its name at run time: functions, and names of any kind.
_BY_NAME: Final = frozenset(("__import__", "eval", "exec", "globals", "locals", "vars"))
_TO_GLOBALS: Final = frozenset(("__main__", "__globals__", "f_globals", "modules"))

_HERE: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep
_NOT_THE_USERS: Final = (_HERE, os.path.dirname(os.path.abspath(os.__file__)) + os.sep, "<frozen ")
_INSTALLED: Final = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")

# Past any property, `__getattribute__` or metaclass of the user's.
_mro: Final[Any] = type.__dict__["__mro__"].__get__
_names_of_class: Final[Any] = type.__dict__["__dict__"].__get__
_qualname: Final[Any] = type.__dict__["__qualname__"].__get__
_names_of_module: Final[Any] = vars(ModuleType)["__dict__"].__get__
_func_of_partial: Final[Any] = functools.partial.__dict__["func"].__get__
_factory: Final[Any] = defaultdict.__dict__["default_factory"].__get__

_CACHED: Final[type] = type(functools.lru_cache(len))
_names_of_cached: Final[Any] = _CACHED.__dict__["__dict__"].__get__

_SCALARS: Final = {id(kind) for kind in (type(None), bool, int, float, complex, str, bytes)}
_IMMUTABLE: Final = _SCALARS | {id(tuple), id(frozenset)}
# A call of these runs no function of the user's, or is none: there is no use in a closer look.
_NOT_CALLED: Final = _SCALARS | {
    id(kind) for kind in (list, tuple, dict, set, type, ModuleType, BuiltinFunctionType)
}

# Not the user's own types, but what they hold is the user's.
_COLLECTIONS: Final = (dict, list, tuple, set, frozenset, deque)
_HOLDERS: Final = (
    *_COLLECTIONS,
    *(type, property, staticmethod, classmethod, MethodType, CellType, SimpleNamespace),
    *(functools.partial, functools.partialmethod, functools.cached_property),
)

# id -> the code that was looked at, while it lives; its own hash would take as long as the look
_seen: dict[int, weakref.ref[CodeType]] = {}


def lost_writes(func: object) -> list[str]:
    """Return what to warn of before ``func`` is mapped: the texts, usually none.

    At most one for each variable. Each code is looked at once a process: functions of the same
    code, with whatever they capture, have no second text. Never raises, and never runs code of the
    user's. A first look takes some microseconds, or, if the function may write something, some
    hundreds, and once the milliseconds that ``dis`` takes to import.
    """
    if type(func) is FunctionType and id(func.__code__) in _seen and not func.__dict__:
        return []
    try:
        layers = _layers(func)
        if not layers:
            return []
        # That of a decorator is shared by all that it decorates.
        code = layers[-1].__code__
        if id(code) in _seen:
            return []
        _remember(code)
        return _Look(func, layers).texts() if _may_write(layers) else []
    except Exception:  # a failed look must not cost the map
        return []


def _remember(code: CodeType) -> None:
    key = id(code)
    if key not in _seen:
        _seen[key] = weakref.ref(code, functools.partial(_seen.pop, key))


# What is called, and whose it is


def _layers(value: Any) -> list[FunctionType]:
    """Return the functions that a call of this value runs, from the outermost inwards."""
    found: list[FunctionType] = []
    for _ in range(MAX_LAYERS):
        kind = type(value)
        if id(kind) in _NOT_CALLED:
            break
        if kind is FunctionType:
            if _is_by_reference(value, value.__module__, value.__qualname__):
                break
            found.append(value)
            if value.__code__.co_filename.startswith(_HERE):
                break
            value = dict.get(value.__dict__, "__wrapped__")
        elif kind is _CACHED:
            names = _names_of_cached(value)
            if _is_by_reference(value, names.get("__module__"), names.get("__qualname__")):
                break
            value = names.get("__wrapped__")
        elif kind is MethodType:
            value = value.__func__
        elif issubclass(kind, functools.partial):
            value = _func_of_partial(value)
        else:
            value = None
            for names in map(_names_of_class, _mro(kind)):
                if "__call__" in names:
                    value = names["__call__"]
                    break
            if type(value) is not FunctionType:
                break
    return found


def _is_by_reference(value: object, module: object, qualname: object) -> bool:
    """Return whether a module other than ``__main__`` has it under its name."""
    if type(module) is not str or type(qualname) is not str:
        return False
    if module == "__main__" or "<locals>" in qualname:
        return False
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        if issubclass(type(found), ModuleType):
            found = dict.get(_names_of_module(found), part)
        elif issubclass(type(found), type):
            found = _names_of_class(found).get(part)
        else:
            return False
    if type(found) in (staticmethod, classmethod):
        found = found.__func__
    return found is value


def _is_users(function: FunctionType) -> bool:
    """Return whether what this function itself writes is to be looked at."""
    return not _is_installed(function.__code__.co_filename)


@functools.lru_cache
def _is_installed(filename: str) -> bool:
    return filename.startswith(_NOT_THE_USERS) or any(part in filename for part in _INSTALLED)


def _is_of_main(function: FunctionType) -> bool:
    name = dict.get(function.__globals__, "__name__")
    return type(name) is str and name == "__main__"


def _cells(function: FunctionType) -> Iterator[tuple[str, CellType]]:
    return zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _codes(function: FunctionType) -> list[tuple[CodeType, frozenset[str]]]:
    """Return a function's code and all within it, each with the captured ones of its variables.

    Its other free variables belong to a function around it that is within as well.
    """
    found = [(function.__code__, frozenset(function.__code__.co_freevars))]
    for code, captured in found:
        for const in code.co_consts:
            if type(const) is CodeType:
                found.append((const, captured.intersection(const.co_freevars)))
    return found


def _methods(value: object) -> set[str] | None:
    """Return the methods that change a container; None if it is none that is known."""
    methods = _METHODS.get(id(type(value)))
    if methods is None:
        numpy = sys.modules.get("numpy")  # whoever holds an array has imported it
        if type(numpy) is ModuleType and type(value) is _names_of_module(numpy).get("ndarray"):
            return _OF_ARRAYS
    return methods


# The first step


def _may_write(layers: list[FunctionType]) -> bool:
    """Return whether there is a store to a captured variable, or a change and what to change."""
    rebinding, storing, changing = _opcodes()
    changes = False
    values: list[object] = []
    known = set(map(id, layers))
    for function in (todo := list(layers)):
        if len(todo) > MAX_FUNCTIONS or not _is_users(function):
            continue
        own = [_content(cell) for cell in function.__closure__ or ()]
        names = function.__globals__ if _is_of_main(function) else None
        for code, captured in _codes(function):
            opcodes = code.co_code[::2]
            if captured and storing in opcodes:
                return True
            if names is not None:
                if rebinding in opcodes:
                    return True
                own += [dict.get(names, name) for name in code.co_names]
            if not (_CHANGING.isdisjoint(code.co_names) and changing.isdisjoint(opcodes)):
                changes = True
        for value in own:
            for inner in _layers(value):
                if id(inner) not in known:
                    known.add(id(inner))
                    todo.append(inner)
        values += own
    return changes and any(_methods(value) is not None for value in values)


@functools.cache
def _opcodes() -> tuple[int, int, frozenset[int]]:
    """Return those that store globals and cells, and those that may change a container.

    An addition in place to a variable is among the first: what comes out is stored there again.
    """
    from opcode import opmap

    names = ("STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR")
    changing = frozenset(opmap[name] for name in names if name in opmap)
    return opmap["STORE_GLOBAL"], opmap["STORE_DEREF"], changing


# The second step: what each load comes to

# What a use of a variable is called, if it is no method that changes it.
_READ: Final = "read"
_STORE: Final = "store"
_SUM: Final = "sum"  # or "sum +1", if that is the operand
_SUBSCRIPT: Final = "[]"

# What is on the stack. A method that is about to be called is "value.append".
_OTHER: Final = "other"
_EMPTY: Final = "empty"  # a new list or dict
_VALUE: Final = "value"  # the variable's
_MEMBER: Final = "member"  # value[key]
_DEFAULT: Final = "setdefault"  # value.setdefault(key, [])
_OLD: Final = "old"  # value[key], in value[key] += 1
_NEW: Final = "new"  # the sum of it

_OWNERS: Final = frozenset((_VALUE, _MEMBER, _DEFAULT))
_UNKNOWING: Final = frozenset((_OTHER, _EMPTY))

# How many an instruction takes from the stack, or touches there -> such instructions
_TAKING: Final = {
    0: "NOP RESUME EXTENDED_ARG PRECALL KW_NAMES PUSH_NULL NOT_TAKEN MAKE_CELL "
    "LOAD_CONST LOAD_SMALL_INT LOAD_COMMON_CONSTANT LOAD_NAME LOAD_GLOBAL LOAD_DEREF LOAD_CLOSURE "
    "LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_AND_CLEAR LOAD_FAST_BORROW LOAD_FAST_LOAD_FAST "
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW JUMP_FORWARD JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT",
    1: "POP_TOP STORE_FAST STORE_DEREF STORE_GLOBAL STORE_NAME STORE_FAST_LOAD_FAST LOAD_ATTR "
    "LOAD_METHOD GET_ITER FOR_ITER TO_BOOL UNARY_NEGATIVE UNARY_NOT UNARY_INVERT UNARY_POSITIVE "
    "UNPACK_SEQUENCE UNPACK_EX LIST_TO_TUPLE CALL_INTRINSIC_1 CONVERT_VALUE FORMAT_SIMPLE",
    2: "BINARY_OP BINARY_SUBSCR COMPARE_OP IS_OP CONTAINS_OP DELETE_SUBSCR STORE_FAST_STORE_FAST "
    "SET_FUNCTION_ATTRIBUTE FORMAT_WITH_SPEC POP_ITER",
    3: "STORE_SUBSCR BINARY_SLICE",
    4: "STORE_SLICE",
}
# The same for those that take so many more than their argument says.
_TAKING_MORE: Final = {
    0: "BUILD_TUPLE BUILD_LIST BUILD_SET BUILD_STRING BUILD_SLICE",
    1: "LIST_APPEND LIST_EXTEND SET_ADD SET_UPDATE DICT_UPDATE DICT_MERGE BUILD_CONST_KEY_MAP",
    2: "MAP_ADD CALL",
    3: "CALL_KW",
}
_TAKES: Final = {name: n for n, names in _TAKING.items() for name in names.split()}
_TAKES_MORE: Final = {name: n for n, names in _TAKING_MORE.items() for name in names.split()}

# opcode -> whether it is about a global, and what it does if that is the same always
_ACCESS: Final = {
    "LOAD_DEREF": (False, ""),
    "LOAD_GLOBAL": (True, ""),
    "STORE_DEREF": (False, _STORE),
    "STORE_GLOBAL": (True, _STORE),
    **dict.fromkeys(("DELETE_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"), (False, _READ)),
    **dict.fromkeys(("DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"), (True, _READ)),
}


class _Use(NamedTuple):
    """What code does with a variable: a word from above, or the name of a method."""

    name: str
    is_global: bool
    how: str
    line: int
    code: CodeType


def _uses(function: FunctionType, is_of_main: bool) -> Iterator[_Use]:
    """Yield what a function does with its cells, and with globals if they are those of main."""
    for code, captured in _codes(function):
        if not captured and not is_of_main:
            continue
        flow = _Flow(code)
        accesses = [
            (n, instruction, *_ACCESS[instruction.opname])
            for n, instruction in enumerate(flow.instructions)
            if instruction.opname in _ACCESS
        ]
        found = []
        for n, instruction, is_global, how in accesses:
            if is_of_main if is_global else instruction.argval in captured:
                found.append((n, instruction, is_global, how or flow.follow(n)))
        for n, instruction, is_global, how in found:
            if how == _STORE:
                if n in flow.sums:
                    continue
                if any(each.opname.startswith("IMPORT_") for each in flow.instructions[n - 3 : n]):
                    how = _READ
            line = instruction.positions and instruction.positions.lineno
            yield _Use(instruction.argval, is_global, how, line or code.co_firstlineno, code)


class _Flow:
    """The instructions of a code, along which a value can be followed.

    Attributes:
        instructions: All but the caches.
        sums: Those that store what a variable was, plus something, in the same variable; known for
            the loads that were followed.
    """

    def __init__(self, code: CodeType) -> None:
        import dis  # slow to import, and few functions come this far

        self.instructions = list(dis.get_instructions(code))
        self.sums: set[int] = set()
        self._effect = dis.stack_effect
        self._jumps = {*dis.hasjrel, *dis.hasjabs}
        self._index = {each.offset: n for n, each in enumerate(self.instructions)}

    def follow(self, start: int) -> str:
        """Return what the value that is loaded at ``start`` is used for, on every path."""
        load = self.instructions[start]
        if load.opname == "LOAD_GLOBAL" and self._effect(load.opcode, load.arg) == 2:
            return _READ  # it is called
        todo: list[State] = [(start + 1, (_VALUE,))]
        known: set[State] = set()
        found: set[str] = set()
        while todo:
            state = todo.pop()
            if state in known:
                continue
            known.add(state)
            step = self._step(*state, load)
            if isinstance(step, list):
                todo += step
            else:
                found.add(step)
            if len(known) > MAX_STATES:
                return _READ
        if len(found) == 1:
            return found.pop()
        return _SUM if found and all(how.startswith(_SUM) for how in found) else _READ

    def _step(self, n: int, stack: Stack, load: Instruction) -> str | list[State]:
        """Return the states after an instruction, or what it uses the value for.

        The stack begins with the value; what lies below is not known.
        """
        instruction = self.instructions[n]
        opname, arg = instruction.opname, instruction.arg or 0
        if opname == "COPY":
            return [(n + 1, (*stack, stack[-arg] if arg <= len(stack) else _OTHER))]
        if opname == "SWAP":
            if arg > len(stack):
                return _READ
            swapped = list(stack)
            swapped[-1], swapped[-arg] = stack[-arg], stack[-1]
            return [(n + 1, tuple(swapped))]
        n_taken = self._n_taken(instruction)
        if n_taken is None:
            return _READ
        rest, taken = stack[: max(0, len(stack) - n_taken)], stack[-n_taken:] if n_taken else ()
        if not _UNKNOWING.issuperset(taken):
            taken = (_OTHER,) * (n_taken - len(taken)) + taken
            used = self._used(n, taken, rest, load)
            return used if isinstance(used, str) else [(n + 1, rest + used)]
        if instruction.opcode in self._jumps:
            return self._jump(n, rest, n_taken)
        n_put = n_taken + self._effect(instruction.opcode, instruction.arg)
        if opname in ("CALL", "PRECALL"):  # 3.11 tells the effect of the first with the second
            n_put = int(opname == "CALL")
        if opname in ("BUILD_LIST", "BUILD_MAP") and arg == 0:
            return [(n + 1, (*rest, _EMPTY))]
        return [(n + 1, rest + (_OTHER,) * n_put)]

    def _n_taken(self, instruction: Instruction) -> int | None:
        opname, arg = instruction.opname, instruction.arg or 0
        if opname in _TAKES_MORE:
            return arg + _TAKES_MORE[opname]
        if opname == "BUILD_MAP":
            return 2 * arg
        if opname == "FORMAT_VALUE":
            return 2 if arg & 4 else 1
        if opname == "MAKE_FUNCTION":  # until 3.12 with what its flags say
            return 1 - self._effect(instruction.opcode, instruction.arg)
        if opname == "END_FOR":
            return -self._effect(instruction.opcode, instruction.arg)
        if opname.startswith(("POP_JUMP_", "JUMP_IF_")):
            return 1
        return _TAKES.get(opname)

    def _jump(self, n: int, rest: Stack, n_taken: int) -> str | list[State]:
        if _SUM in "".join(rest) or _OLD in rest or _NEW in rest:
            return _READ  # a sum that is not stored for certain
        instruction = self.instructions[n]
        states: list[State] = []
        for jump in (True, False):
            if jump or not instruction.opname.startswith(("JUMP_FORWARD", "JUMP_BACKWARD")):
                effect = self._effect(instruction.opcode, instruction.arg, jump=jump)
                target = self._index[instruction.argval] if jump else n + 1
                states.append((target, rest + (_OTHER,) * (n_taken + effect)))
        return states

    def _used(self, n: int, taken: Stack, rest: Stack, load: Instruction) -> str | Stack:
        """Return what an instruction that takes the value puts on the stack, or uses it for."""
        instruction = self.instructions[n]
        others = [what for what in taken if what not in _UNKNOWING]
        match instruction.opname, *taken:
            case (("LOAD_METHOD" | "LOAD_ATTR"), owner) if owner in _OWNERS:
                if self._effect(instruction.opcode, instruction.arg) == 1:  # to be called
                    return f"{owner}.{instruction.argval}", _OTHER
            case (("CALL" | "CALL_KW"), method, *_) if "." in method and len(others) == 1:
                return self._called(n, method, taken[-1])
            case (("STORE_SUBSCR" | "STORE_SLICE"), _, owner, *_) | ("DELETE_SUBSCR", owner, _) if (
                owner in _OWNERS
            ):
                return _SUBSCRIPT if owner == _VALUE else owner
            case (("BINARY_SUBSCR" | "BINARY_SLICE"), owner, *_) if others == [owner]:
                return self._subscripted(owner, rest)
            case "BINARY_OP", left, _ if len(others) == 1:
                operator = instruction.argrepr
                if operator.startswith("["):  # since 3.14
                    return self._subscripted(left, rest)
                if left == _OLD and operator.endswith("="):
                    return (_NEW,)
                if others == [_VALUE]:
                    before = self.instructions[n - 1]
                    is_plain = left == _VALUE and before.opname.startswith("LOAD_")
                    if is_plain and type(before.argval) is int:
                        return (f"{_SUM} {operator[0]}{before.argval}",)
                    return (_SUM,)
                if others[0].startswith(_SUM):
                    return (_SUM,)
            case (("STORE_GLOBAL" | "STORE_DEREF"), what) if what.startswith(_SUM):
                to_same = load.argval == instruction.argval
                if to_same and load.opname[len("LOAD") :] == instruction.opname[len("STORE") :]:
                    self.sums.add(n)
                    return what
        return _READ

    def _called(self, n: int, method: str, last: str) -> str | Stack:
        owner, _, name = method.partition(".")
        is_dropped = self.instructions[n + 1].opname == "POP_TOP"
        if name == "setdefault" and owner == _VALUE and last == _EMPTY and not is_dropped:
            return (_DEFAULT,)
        if name not in _CHANGING or (name in _IF_DROPPED and not is_dropped):
            return _READ
        return name if owner == _VALUE else owner

    def _subscripted(self, owner: str, rest: Stack) -> str | Stack:
        if owner in _OWNERS and owner in rest:  # COPY left one there, to store into
            return (_OLD,)
        return (_MEMBER,) if owner == _VALUE else _READ


# All steps together


class _Variable:
    """A captured variable and what is done with it. Two that have the same container are one."""

    __slots__ = ("value", "writes", "is_read")

    def __init__(self, value: object) -> None:
        self.value = value
        # with the code of the function to tell of, None if it is not sure to be called
        self.writes: list[tuple[_Use, CodeType | None]] = []
        self.is_read = False

    def add(self, use: _Use, owner: CodeType | None) -> None:
        if use.how == _STORE or use.how.startswith(_SUM) or _is_change(self.value, use.how):
            self.writes.append((use, owner))
        else:
            self.is_read = True

    def lost(self, is_read: bool) -> tuple[_Use, CodeType] | None:
        """Return the first write that nobody sees the effect of, and whose it is."""
        told = [(use, owner) for use, owner in self.writes if owner is not None]
        hows = {use.how for use, _ in self.writes}
        if is_read and (id(type(self.value)) not in _IMMUTABLE or _STORE in hows):
            return None  # a memo, a buffer, a variable that is set before it is used
        if any(f"{_SUM} +{how[5:]}" in hows for how in hows if how.startswith(f"{_SUM} -")):
            return None  # a depth, which comes back to what it was
        return told[0] if told else None


class _Look:
    """One look at a function and all that may run along with it."""

    def __init__(self, func: object, layers: list[FunctionType]) -> None:
        self.func = func
        self.root = layers[-1].__code__
        self.called = layers  # grows
        self.looked_at = set(map(id, layers))
        # kind, id of container, cell or globals, and name -> variable
        self.variables: dict[tuple[str, int, str], _Variable] = {}
        self.has_lost_track = False

    def texts(self) -> list[str]:
        """Return a sentence for each variable whose changes would vanish."""
        for function in self.called:
            if len(self.called) > MAX_FUNCTIONS:
                self.has_lost_track = True
                break
            if _is_users(function):
                for value in self._record(function, True):
                    for inner in _layers(value):
                        if id(inner) not in self.looked_at:
                            self.looked_at.add(id(inner))
                            self.called.append(inner)
        if any(variable.writes for variable in self.variables.values()):
            self._find_readers()
        texts = []
        for variable in self.variables.values():
            lost = variable.lost(variable.is_read or self.has_lost_track)
            if lost is not None and (lost[1] is self.root or id(lost[1]) not in _seen):
                texts.append((_text(lost[0], variable.value), lost[1]))
        for _, owner in texts:
            _remember(owner)
        return [text for text, _ in texts]

    def _record(self, function: FunctionType, is_called: bool) -> list[object]:
        """Take down what a function does with its variables, and return their values."""
        names = function.__globals__
        cells = dict(_cells(function))
        values = []
        is_of_main = _is_of_main(function)
        for code, _ in _codes(function):
            words = (const for const in code.co_consts if type(const) is str)
            if not (_TO_GLOBALS.isdisjoint(code.co_names) and _TO_GLOBALS.isdisjoint(words)):
                self.has_lost_track = True
        for use in _uses(function, is_of_main):
            if use.is_global:
                value = dict.get(names, use.name)
                key = ("global", id(names), use.name)
                if use.name in _BY_NAME:
                    self.has_lost_track = True
            else:
                value = _content(cells[use.name])
                key = ("cell", id(cells[use.name]), "")
            if _methods(value) is not None:
                key = ("container", id(value), "")
            if key not in self.variables:
                self.variables[key] = _Variable(value)
                values.append(value)
            self.variables[key].add(use, function.__code__ if is_called else None)
        return values

    def _find_readers(self) -> None:
        """Look at all that the captured values hold for what else may read the variables."""
        containers = {
            of: variable
            for (kind, of, _), variable in self.variables.items()
            if kind == "container"
        }
        values: dict[int, object] = {}  # kept, so that no id is used again
        todo = deque(chain.from_iterable(map(_held, self.called)))
        if type(self.func) is not FunctionType:
            todo.append((self.func, 0))
        while todo and not self.has_lost_track:
            value, depth = todo.popleft()
            if depth and id(value) in containers:
                containers[id(value)].is_read = True
            if id(value) in values:
                continue
            values[id(value)] = value
            if type(value) is FunctionType:
                if id(value) not in self.looked_at:
                    if _is_users(value):
                        self.looked_at.add(id(value))
                        self._record(value, False)
                    todo.extend(_held(value))
            elif depth < MAX_DEPTH:
                below = depth + 1 if _is_open(type(value)) else MAX_DEPTH
                todo.extend(
                    (inner, below)
                    for inner in _inside(value, depth)
                    if id(type(inner)) not in _SCALARS
                )
            if len(values) > MAX_VALUES or len(self.looked_at) > MAX_READERS:
                self.has_lost_track = True


def _held(function: FunctionType) -> Iterator[tuple[object, int]]:
    """Yield what a function holds, with 0 for the variables that its code tells all about."""
    is_users = _is_users(function)
    for _, cell in _cells(function):
        yield _content(cell), 0 if is_users else 1
    if is_users and _is_of_main(function):
        for code, _ in _codes(function):
            for name in code.co_names:
                yield dict.get(function.__globals__, name), 0
    for names in (function.__kwdefaults__ or {}, function.__dict__):
        for value in dict.values(names):
            yield value, 1
    for value in function.__defaults__ or ():
        yield value, 1


def _inside(value: Any, depth: int) -> Iterable[object]:
    """Return what a value holds, or the first of it."""
    kind = type(value)
    if issubclass(kind, ModuleType):
        return ()
    if issubclass(kind, type):
        names = _names_of_class(value).values() if _is_users_class(value) else ()
        return (*names, *_mro(value)[1:])
    few = FIRST_MEMBERS if depth < 2 else FIRST_MEMBERS // 10
    if issubclass(kind, dict):
        members: Iterable[object] = dict.values(value)
    elif issubclass(kind, _COLLECTIONS):
        base: Any = next(base for base in _COLLECTIONS if issubclass(kind, base))
        members = base.__iter__(value)
    else:
        few = FIRST_MEMBERS
        referents = gc.get_referents(value)
        members = chain(referents, *(each.values() for each in referents if type(each) is dict))
    return (kind, *islice(members, few))


def _is_open(kind: type) -> bool:
    """Return whether what its instances hold is worth more than one look."""
    return issubclass(kind, _HOLDERS) or _is_users_class(kind)


def _is_users_class(cls: type) -> bool:
    module = _names_of_class(cls).get("__module__")
    return (type(module) is str and module == "__main__") or "<locals>" in _qualname(cls)


def _is_change(value: object, how: str) -> bool:
    """Return whether that changes a value, as a container of a type that is known."""
    methods = _methods(value)
    if methods is None:
        return False
    if how == _MEMBER:
        return type(value) is defaultdict and id(_factory(value)) in _METHODS
    return how in methods or how in _IF_DROPPED or how == _SUBSCRIPT


def _text(use: _Use, value: object) -> str:
    names = use.code.co_qualname.split(".<locals>.")
    while len(names) > 1 and names[-1].startswith("<") and names[-1] != "<lambda>":
        names.pop()  # a comprehension
    name = "a lambda" if names[-1] == "<lambda>" else names[-1]
    what = f"{use.name!r}"
    if use.how != _STORE and not use.how.startswith(_SUM):
        kind = type(value).__name__
        what = f"the {'array' if kind == 'ndarray' else kind} {what} in place"
    return (
        f"{name} ({os.path.basename(use.code.co_filename)}, line {use.line}) changes {what}, which "
        "stays as it is here: the function runs in other processes; return the value and combine "
        "what comes back (docs/closures.md#writes-that-would-vanish)"
    )
