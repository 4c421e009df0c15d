"""Values to bodies and back: cloudpickle where it must be, bare pickle where it may be.

A body is one of two things, told apart by its first byte::

    80 ...                                      a pickle: its own first opcode (PROTO) is the mark
    01 | n | nbytes of pickle | n x nbytes      a pickle with its n buffers out of band (PEP 574)
       | pickle | pad | buffer | pad | buffer ...

Each buffer starts at a multiple of 64 bytes, so that an array over it is as aligned as the body
itself is. Integers are little-endian, 64 bits but for ``n`` (32). The highest bit of a length says
that this buffer is *external*: it is not in the body, and whoever loads that gives it.

By reference or by value: bare pickle writes an instance of a class of ``__main__`` *without an
error*, as a reference that no worker can follow. So it is used only for what holds no class at
all: exact builtin scalars, and short containers of them. Everything else goes through a Pickler
(in C) whose ``reducer_override`` sees every class and function. Classes and functions that
can be imported go by reference, others by value.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import io
import pickle
import struct
import sys
from collections.abc import Callable, Collection, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeAlias, cast

from dmap.errors import ClosureError, ProtocolError

if TYPE_CHECKING:
    from jobserver.protocol import Body, Buffer

    Reduced: TypeAlias = str | tuple[Any, ...]

__all__ = ["Seen", "dump", "dump_function", "dumps", "dumps_items", "loads"]

PROTOCOL: Final = 5
PROTO_OPCODE: Final = 0x80
WITH_BUFFERS: Final = 0x01
ALIGNMENT: Final = 64

INLINE_NBYTES: Final = 4096
"""Smaller buffers are copied into the pickle: up to here a copy costs less than a buffer of its own
(20 arrays of 4 KiB, both ways: 49 us inline, 56 us out of band; of 16 KiB: 210 us and 63 us)."""

JOINED_NBYTES: Final = 2**20
"""Shorter bodies are returned as one piece of memory; longer ones are not copied."""

EXTERNAL_NBYTES: Final = 2**20
"""A function's buffers from this size on are shared: by its later versions, and on a host."""

_HEADER: Final = struct.Struct("<BxxxIQ")
_EXTERNAL: Final = 1 << 63
_ZEROS: Final = bytes(ALIGNMENT)

_PLAIN: Final = frozenset((int, float, bool, type(None), str, complex, range))
_DISPATCHING: Final = cast("Any", functools.singledispatch(len)).__code__
_IMMUTABLE: Final = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE

# Modules and classes: libraries of ctypes could not be loaded, and a connection would come with the
# number of a file that is open here, and close what has that number over there.
_ARRIVE_BROKEN: Final = (
    ("ctypes", "CDLL"),
    ("ctypes", "PyDLL"),
    ("multiprocessing.connection", "Connection"),
)
_SHORT: Final = 8  # up to this length, looking at each element costs less than making a Pickler


class _Write(Protocol):
    """What a Pickler wants of a file."""

    def write(self, part: Any, /) -> object: ...


class _Parts:
    """What a Pickler writes, as it is: frames of some 64 KiB, larger bytes objects uncopied."""

    __slots__ = ("buffers", "external", "inline_nbytes", "max_external", "pickled", "write")

    def __init__(self, inline_nbytes: int, max_external: int = 0) -> None:
        self.pickled: list[Buffer] = []
        self.write = self.pickled.append
        self.buffers: list[memoryview] = []
        self.external: set[int] = set()  # places in ``buffers``
        self.inline_nbytes = inline_nbytes
        self.max_external = max_external

    def take(self, buffer: pickle.PickleBuffer) -> bool:
        """Keep a buffer out of band, or return true to have it in the pickle."""
        raw = buffer.raw()
        if raw.nbytes < self.inline_nbytes:
            return True
        if raw.nbytes >= EXTERNAL_NBYTES and len(self.external) < self.max_external:
            self.external.add(len(self.buffers))
        self.buffers.append(raw)
        return False

    def body(self) -> Body:
        """Return the body that was written, without what is external."""
        parts = self.pickled
        if self.buffers:
            parts = self._lay_out()
        elif len(parts) == 1 and type(parts[0]) is bytes:
            return parts[0]
        if sum(memoryview(part).nbytes for part in parts) < JOINED_NBYTES:
            return b"".join(parts)
        return tuple(parts)

    def _lay_out(self) -> list[Buffer]:
        pickle_nbytes = sum(len(part) for part in self.pickled)
        lengths = [
            buffer.nbytes | (_EXTERNAL if n in self.external else 0)
            for n, buffer in enumerate(self.buffers)
        ]
        head = _HEADER.pack(WITH_BUFFERS, len(lengths), pickle_nbytes)
        head += struct.pack(f"<{len(lengths)}Q", *lengths)
        parts: list[Buffer] = [head, *self.pickled]
        end = len(head) + pickle_nbytes
        for n, buffer in enumerate(self.buffers):
            if n in self.external:
                continue
            if pad := -end % ALIGNMENT:
                parts.append(_ZEROS[:pad])
            parts.append(buffer)
            end += pad + buffer.nbytes
        return parts


class Seen:
    """What a pickle counts on, and what it took along.

    Attributes:
        modules: Names of modules that it refers to, or that its functions may import.
        functions: Those that went by value.
        by_value: Whether any function or class did: only cloudpickle's own kind can load it.
    """

    __slots__ = ("by_value", "functions", "modules")

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.functions: list[FunctionType] = []
        self.by_value = False


def dump(value: object, seen: Seen | None = None) -> Body:
    """Pickle a value, and let whatever its own code raises through.

    Args:
        value: What to pickle.
        seen: Is told what the pickle counts on.

    Returns:
        Bytes if it is short, else a tuple of parts in order. The parts may be the value's own
        memory: send them, or join them, before anyone changes the value.
    """
    if type(value) in _PLAIN or _is_plain(value):
        return pickle.dumps(value, PROTOCOL)
    file = _Parts(INLINE_NBYTES)
    _picklers()[0](file, file.take, seen).dump(value)
    return file.body()


def dump_scalars(value: object, values: Sequence[object]) -> bytes | None:
    """Pickle a value that holds nothing but these, if they are a few scalars; else return None."""
    if len(values) <= _SHORT and _PLAIN.issuperset(map(type, values)):
        return pickle.dumps(value, PROTOCOL)
    return None


def split_off(
    body: tuple[Buffer, ...], is_wanted: Callable[[Buffer], bool], most: int
) -> tuple[Body, list[memoryview]]:
    """Make buffers of a body external.

    Args:
        body: What `dump` returned, or a copy of each of its parts.
        is_wanted: Tells of a part whether it is to be external.
        most: So many of them at most.

    Returns:
        The body without them, and they themselves.
    """
    if body[0][0] != WITH_BUFFERS:
        return body, []
    head, *parts = body
    split = _Parts(0)
    lengths = _lengths(memoryview(head))
    end = _HEADER.unpack_from(head)[2]
    remaining = iter(parts)
    n_pickled = 0
    while n_pickled < end:
        split.write(part := next(remaining))
        n_pickled += len(part)
    end += len(head)
    for nbytes in lengths:
        if end % ALIGNMENT:
            next(remaining)
        part = next(remaining)
        end += -end % ALIGNMENT + nbytes
        if len(split.external) < most and is_wanted(part):
            split.external.add(len(split.buffers))
        split.buffers.append(memoryview(part))
    if not split.external:
        return body, []
    return split.body(), [split.buffers[n] for n in sorted(split.external)]


def dump_function(value: object, seen: Seen, max_external: int = 0) -> tuple[Body, list[Buffer]]:
    """Pickle a function, with every array out of band: `loads` can make all of them read-only.

    Args:
        value: The function, and what goes with it.
        seen: Is told what the pickle counts on.
        max_external: So many of its buffers of at least EXTERNAL_NBYTES may be external.

    Returns:
        The body, as `dump` does, and the external buffers.
    """
    file = _Parts(0, max_external)
    _picklers()[1](file, file.take, seen).dump(value)
    return file.body(), [file.buffers[n] for n in sorted(file.external)]


def dumps(value: object, what: str = "the value", seen: Seen | None = None) -> Body:
    """Pickle a value for the other side; see `dump` for the shape and ownership of the body.

    Args:
        value: What to pickle.
        what: What the message of an error calls it.
        seen: Is told what the pickle counts on.

    Raises:
        ClosureError: it cannot be pickled; the reason is chained.
    """
    if type(value) in _PLAIN:
        return pickle.dumps(value, PROTOCOL)
    try:
        return dump(value, seen)
    except MemoryError:
        raise
    except Exception as error:  # the value's own code runs
        raise ClosureError(refusal(what, value, error)) from error


def dumps_items(
    items: Sequence[object],
    start: int = 0,
    what: str = "item",
    head: tuple[object, ...] = (),
    seen: Seen | None = None,
) -> Body:
    """Pickle consecutive items, or their results, into one body.

    It loads as the sequence, or with ``head`` as the tuple ``(*head, items)``. A list, tuple or
    range is loaded as the same type, any other sequence as a list.

    Args:
        items: Consecutive ones of a map.
        start: Index of the first of them in the map, for errors.
        what: What the message of an error calls one of them.
        head: What goes before them.
        seen: Is told what the pickle counts on.

    Raises:
        ClosureError: one cannot be pickled. Its ``index`` says which.
    """
    if type(items) not in (list, tuple, range):
        items = list(items)
    try:
        return dump((*head, items) if head else items, seen)
    except MemoryError:
        raise
    except Exception as error:  # the items' own code runs
        for index, item in enumerate(items, start):
            try:
                dump(item)
            except Exception as own:
                raise ClosureError(refusal(f"{what} {index}", item, own), index) from own
        # Each goes alone: the list around it was the one level of nesting too many, say.
        raise ClosureError(refusal(f"the list from {what} {start} on", items, error)) from error


def loads(body: Body | Buffer, readonly: bool = False, external: Sequence[Buffer] = ()) -> Any:
    """Load what `dump` or `dump_function` made.

    Args:
        body: Bytes, a contiguous view, or the parts of a body in order.
        readonly: If true, arrays are read-only views of the body and nothing is copied. Else they
            are writable. A long writable body is then not copied either: it may become the memory
            of the array that fills most of it, so the caller gives it away.
        external: The external buffers, in order. Arrays are views of them in any case.

    Raises:
        ProtocolError: this is no body, or a part of one, or an external buffer, is missing.
        Exception: whatever the value's own code raises on loading.
    """
    if type(body) is not bytes and isinstance(body, tuple):
        body = bytearray().join(body)
    if body and body[0] == PROTO_OPCODE:
        return pickle.loads(body)

    view = memoryview(body)
    lengths = _lengths(view)
    start = _HEADER.size + 8 * len(lengths)
    end = start + _HEADER.unpack_from(view)[2]
    pickled = view[start:end]
    buffers: list[Buffer] = []
    others = iter(external)
    for nbytes in lengths:
        if nbytes & _EXTERNAL:
            other = next(others, b"")
            if memoryview(other).nbytes != nbytes ^ _EXTERNAL:
                raise ProtocolError(
                    f"a body's external buffer of {nbytes ^ _EXTERNAL} bytes is missing"
                )
            buffers.append(memoryview(other).toreadonly() if readonly else other)
            continue
        first = end + -end % ALIGNMENT
        end = first + nbytes
        buffer = view[first:end]
        if readonly:
            buffers.append(buffer.toreadonly())
        elif view.readonly or 2 * nbytes < view.nbytes:
            # Memory of its own: a small array that the user keeps must not keep the body alive.
            buffers.append(bytearray(buffer))
        else:
            buffers.append(buffer)
    if end != view.nbytes:
        raise ProtocolError(f"a body of {view.nbytes} bytes should have {end}")
    return pickle.loads(pickled, buffers=buffers)


def count_external(body: bytes | memoryview) -> int:
    """Return how many external buffers a body wants.

    Raises:
        ProtocolError: this is no body.
    """
    view = memoryview(body)
    if view.nbytes and view[0] == PROTO_OPCODE:
        return 0
    return sum(1 for nbytes in _lengths(view) if nbytes & _EXTERNAL)


def refusal(what: str, value: object, error: Exception) -> str:
    """Say that ``value`` cannot be pickled, what in it is in the way, and what its owner can do.

    Takes a while, in rare cases seconds: see `dmap.culprit.find`.
    """
    from dmap import culprit  # wanted on failure only

    name = short_name(type.__dict__["__qualname__"].__get__(type(value)))
    return culprit.explain(f"{what} ({name})", what, value, error)


def short_name(qualname: str) -> str:
    """Return a qualified name without the functions that it was defined in."""
    return qualname.rpartition("<locals>.")[2]


def reason(error: BaseException) -> str:
    """Return the type and message of an error whose ``__str__`` may be the user's."""
    try:
        return f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException:
        return type(error).__name__


def _lengths(view: memoryview) -> tuple[int, ...]:
    """Return the lengths of a body's buffers, as its header has them."""
    if view.nbytes < _HEADER.size or view[0] != WITH_BUFFERS:
        raise ProtocolError(f"a body of {view.nbytes} bytes starts with neither of its two marks")
    n_buffers = _HEADER.unpack_from(view)[1]
    if view.nbytes < _HEADER.size + 8 * n_buffers:
        raise ProtocolError(f"a body of {view.nbytes} bytes is cut short in its header")
    lengths: tuple[int, ...] = struct.unpack_from(f"<{n_buffers}Q", view, _HEADER.size)
    return lengths


def _is_plain(value: object, depth: int = 2) -> bool:
    """Return whether looking at a few elements is enough to know that no class is among them."""
    kind = type(value)
    if kind is dict:
        mapping = cast("dict[object, object]", value)
        if len(mapping) > _SHORT or not _PLAIN.issuperset(map(type, mapping)):
            return False
        elements: Collection[object] = mapping.values()
    elif kind is tuple or kind is list:
        elements = cast("Collection[object]", value)
        if len(elements) > _SHORT:
            return False
    else:
        return False
    if _PLAIN.issuperset(map(type, elements)):
        return True
    if depth == 1:
        return False
    # No all(): its generator would cost as much as is won.
    for element in elements:
        kind = type(element)
        if kind in _PLAIN or (kind is bytes and len(cast("bytes", element)) < INLINE_NBYTES):
            continue
        if not _is_plain(element, depth - 1):
            return False
    return True


@functools.cache
def _picklers() -> tuple[Callable[..., pickle.Pickler], Callable[..., pickle.Pickler]]:
    """Make the classes of Picklers, for values and for functions, on first use.

    cloudpickle takes 15 ms to import.
    """
    import cloudpickle

    registered = copyreg.dispatch_table.get
    tensor: Any = None  # torch's, if that is imported
    n_modules = 0  # of which it was looked up

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        """cloudpickle's, less its cost for objects that are neither class nor function.

        A list of 100 dates takes 35 us instead of 103 (bare pickle: 27).
        """

        # Theirs is a ChainMap with copyreg's table, searched in Python for each object.
        dispatch_table: ClassVar[dict[type, Callable[[Any], Any]]] = dict(
            cloudpickle.Pickler.dispatch_table.maps[0]
        )
        dispatch_table[type(functools.lru_cache(len))] = _reduce_cached
        dispatch_table[CodeType] = functools.partial(_reduce_code, dispatch_table[CodeType])
        dispatch_table[functools.cached_property] = _reduce_cached_property
        dispatch_table[io.TextIOWrapper] = _reduce_stream
        dispatch_table[memoryview] = _reduce_view

        def __init__(
            self,
            file: _Write,
            buffer_callback: Callable[[pickle.PickleBuffer], bool],
            seen: Seen | None,
        ) -> None:
            super().__init__(file, PROTOCOL, buffer_callback)
            self.seen = seen
            nonlocal tensor, n_modules
            # Whoever holds an array has imported numpy; nobody else pays for it.
            ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
            if ndarray is not None:
                self.dispatch_table[ndarray] = _reduce_array
            for stream in (sys.stdin, sys.stdout, sys.stderr):  # pytest's or a notebook's own kind
                if type(stream) not in self.dispatch_table:
                    self.dispatch_table[type(stream)] = _reduce_stream
            if len(sys.modules) != n_modules:
                n_modules = len(sys.modules)
                tensor = getattr(sys.modules.get("torch"), "Tensor", None)
                for module, name in _ARRIVE_BROKEN:
                    broken = getattr(sys.modules.get(module), name, None)
                    if broken is not None:
                        self.dispatch_table[broken] = _refuse

        def reducer_override(self, obj: object) -> Any:
            kind = type(obj)
            if kind is FunctionType or issubclass(kind, type):
                reduced = super().reducer_override(obj)
                if reduced is not NotImplemented and kind is not FunctionType:
                    _refuse_type_of_c(cast("type", obj), reduced)
                if kind is FunctionType and cast("FunctionType", obj).__code__ is _DISPATCHING:
                    return _reduce_dispatching(obj, reduced)
                if self.seen is not None:
                    reduced = _note(self.seen, obj, reduced)
                elif kind is FunctionType and reduced is not NotImplemented:
                    reduced = _in_its_module(cast("FunctionType", obj), reduced)
                return reduced
            if kind is ModuleType:
                if self.seen is not None:
                    self.seen.modules.add(cast("ModuleType", obj).__name__)
                return _reduce_module(cast("ModuleType", obj))
            if tensor is not None and issubclass(kind, tensor) and cast("Any", obj).is_cuda:
                raise pickle.PicklingError("a CUDA tensor is in the memory of this machine's GPU")
            reduce = registered(kind)
            return NotImplemented if reduce is None else reduce(obj)

    class FunctionPickler(Pickler):
        """For functions, whose arrays arrive read-only."""

        def reducer_override(self, obj: object) -> Any:
            ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
            if type(obj) is ndarray and ndarray is not None:
                return obj.__reduce_ex__(PROTOCOL)
            return super().reducer_override(obj)

    return Pickler, FunctionPickler


def _note(seen: Seen, obj: Any, reduced: Any) -> Any:
    """Note what a function or class counts on; return how it is to be reduced."""
    if reduced is NotImplemented:
        module = getattr(obj, "__module__", None)
        if isinstance(module, str):
            seen.modules.add(module)
        return reduced
    seen.by_value = True
    if not isinstance(obj, FunctionType):
        return reduced
    seen.functions.append(obj)
    from dmap import bytecode  # where only values go, nobody needs it

    seen.modules |= bytecode.imports(obj.__code__, obj.__globals__.get("__package__"))
    return _in_its_module(obj, reduced, seen)


def _in_its_module(func: FunctionType, reduced: Any, seen: Seen | None = None) -> Any:
    """Have a function by value of a local module, which travels too, use that module's globals.

    cloudpickle would copy the globals that it uses: each function would have a module state of its
    own, and none of it could be a lock, say.
    """
    name = func.__globals__.get("__name__")
    if not isinstance(name, str) or name == "__main__":
        return reduced
    module = sys.modules.get(name)
    if module is None or vars(module) is not func.__globals__:
        return reduced
    import cloudpickle

    from dmap import local_code

    # Who asked cloudpickle for copies gets them.
    if not local_code.is_local(name) or name in cloudpickle.list_registry_pickle_by_value():
        return reduced
    if seen is not None:
        seen.modules.add(name)
    _, (code, _, _, _, closure), (state, slots), *rest = reduced
    slots = {**slots, "__globals__": {}}
    return _function_of, (name, code, closure), (state, slots), *rest


def _function_of(module: str, code: CodeType, closure: tuple[Any, ...] | None) -> FunctionType:
    return FunctionType(code, vars(importlib.import_module(module)), None, None, closure)


def _reduce_array(array: Any) -> Reduced:
    # Out of band, a read-only array would be read-only where it arrives. A row of a captured array
    # is one, and the user who gets it as a result wants to write to it.
    reduced: Reduced = array.__reduce_ex__(PROTOCOL if array.flags.writeable else 4)
    return reduced


def _reduce_stream(stream: Any) -> Reduced:
    # cloudpickle would send what is in an open file, and that as a StringIO.
    for name in ("stdin", "stdout", "stderr"):
        if stream is getattr(sys, name):
            return getattr, (sys, name)
    if type(stream) is io.TextIOWrapper:
        raise pickle.PicklingError("an open file is open in its process only")
    reduced: Reduced = stream.__reduce_ex__(PROTOCOL)
    return reduced


def _reduce_view(view: memoryview) -> Reduced:
    # It arrives as bytes. Of anything but bytes that would be other values.
    if view.format != "B" or view.ndim != 1:
        raise pickle.PicklingError(
            f"a memoryview of {view.ndim} dimensions and format {view.format!r} is no bytes"
        )
    return bytes, (view.tobytes(),)


def _refuse(value: object) -> Reduced:
    raise pickle.PicklingError(f"a {type(value).__name__} would arrive broken")


def _refuse_type_of_c(cls: type, reduced: tuple[Any, ...]) -> None:
    # A class made in its likeness, which is what would arrive, has none of its methods.
    if len(reduced) > 2 and cls.__flags__ & _IMMUTABLE:
        raise pickle.PicklingError(f"no module has the type {cls.__qualname__}, made in C")


def reduce_by_name(value: object) -> tuple[Any, ...] | None:
    """Return how to reduce a value to the place where it can be imported, or None if it cannot.

    For objects that stand where a function was defined. The module goes as itself, so that what
    a pickle counts on is known.
    """
    name, module = getattr(value, "__qualname__", None), getattr(value, "__module__", None)
    if not isinstance(name, str) or not isinstance(module, str) or module == "__main__":
        return None
    home = found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return (_attribute_of, (home, name)) if found is value else None


def _attribute_of(value: object, name: str) -> Any:
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _reduce_module(module: ModuleType) -> Any:
    # By a function that is there without cloudpickle.
    if sys.modules.get(module.__name__) is module:
        return importlib.import_module, (module.__name__,)
    return NotImplemented


def _reduce_cached(cached: Any) -> Reduced:
    # Its own __reduce__ is a reference by name, also into __main__.
    by_name = reduce_by_name(cached)
    return by_name or (_cache_anew, (cached.__wrapped__, cached.cache_parameters()))


def _reduce_code(reduce: Callable[[CodeType], Any], code: CodeType) -> Reduced:
    # Theirs forgets the file, which tracebacks name, and by which they find the source.
    make, arguments = reduce(code)
    return make, (*arguments[:10], code.co_filename, *arguments[11:])


def _reduce_cached_property(cached: functools.cached_property[Any]) -> Reduced:
    # Its lock, up to Python 3.11, is the process's own; the name is given by the class only once.
    return functools.cached_property, (cached.func,), {"attrname": cached.attrname}


def _reduce_dispatching(func: Any, reduced: Any) -> Any:
    """Reduce a function of `functools.singledispatch`, whose cache is of weak references.

    Empty at first, since what it dispatches to may refer to it.
    """
    if reduced is NotImplemented:
        return reduced
    state, slots = reduced[2]
    state = {name: state[name] for name in state.keys() - {"register", "dispatch", "_clear_cache"}}
    state["registry"] = dict(func.registry)
    return _dispatch_anew, (), (state, slots["__name__"], slots["__doc__"]), None, None, _dispatch


def _dispatch_anew() -> Callable[..., Any]:
    anew: Callable[..., Any] = functools.singledispatch(_take_anything)
    return anew


def _take_anything(value: object) -> None: ...


def _dispatch(func: Any, state: tuple[dict[str, Any], str, str | None]) -> None:
    attributes, func.__name__, func.__doc__ = state
    for cls, implementation in attributes.pop("registry").items():
        func.register(cls, implementation)
    vars(func).update(attributes)


def _cache_anew(func: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    cached: Callable[..., Any] = functools.lru_cache(**parameters)(func)
    return cached
