"""Kinds of things that stay in their process: how each is known, and what to do instead.

A kind is known by the names of a type and its bases, so that nothing has to be imported: who holds
a connection has imported its library. The names are read past metaclasses, whose code may be
anybody's.
"""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType
from typing import Any, Final, NamedTuple

from dmap import pickling

__all__ = [
    "Kind",
    "bounded_reason",
    "described",
    "kind_of",
    "kind_of_type",
    "mro_of",
    "names_of",
    "type_name",
    "unknown_kind",
]

MAX_REASON: Final = 300  # characters


class Kind(NamedTuple):
    """Something that stays where it is.

    Attributes:
        noun: What it is, with its article.
        why: Why it stays, as a relative clause.
        hint: What to do, in one clause.
        anchor: The heading in docs/closures.md that says more.
    """

    noun: str
    why: str
    hint: str
    anchor: str


_HERE: Final = "which exists in this process only"
_OPEN: Final = "which is open in this process only"
_WHERE: Final = "where it is used: inside the function, or once a worker process with @per_worker"
_MAKE: Final = f"make it {_WHERE}"
_CONNECT: Final = f"send the address and connect {_WHERE}"
_FILE: Final = "send its path and open it where it is used"
_RETURN: Final = "let the function return what would go through it"
_ONCE: Final = "which can be gone through only once, and only here"
_LIST: Final = "make a list of it first"
_LOOP: Final = "which belongs to an event loop of this process"
_RUN: Final = "make it inside the function, in what asyncio.run() runs there"
_WEAK: Final = "which would keep nothing alive where it arrives"
_REFER: Final = "hold the object itself in its place, or make it where it is used"
_REMAKE: Final = (
    "send what it is made from (a path, an address, plain values) and make it where it is used"
)

# Kind, and "module.qualname" of the types that are of it, or whose subclasses are
_TABLE: Final[tuple[tuple[Kind, str], ...]] = (
    (
        Kind("a lock", _HERE, _MAKE, "locks"),
        "_thread.lock _thread.RLock threading._RLock multiprocessing.synchronize.SemLock",
    ),
    (
        Kind("a condition", _HERE, _MAKE, "locks"),
        "threading.Condition multiprocessing.synchronize.Condition",
    ),
    (
        Kind("a semaphore", _HERE, _MAKE, "locks"),
        "threading.Semaphore multiprocessing.synchronize.Semaphore",
    ),
    (
        Kind("an event", _HERE, _MAKE, "locks"),
        "threading.Event multiprocessing.synchronize.Event",
    ),
    (Kind("a barrier", _HERE, _MAKE, "locks"), "threading.Barrier"),
    (
        Kind("a queue", _HERE, _RETURN, "locks"),
        "queue.Queue queue._PySimpleQueue _queue.SimpleQueue multiprocessing.queues.Queue "
        "multiprocessing.queues.SimpleQueue",
    ),
    (Kind("a socket", _OPEN, _CONNECT, "sockets"), "_socket.socket socket.SocketIO"),
    (
        Kind("an end of a pipe", _OPEN, _RETURN, "sockets"),
        "multiprocessing.connection._ConnectionBase",
    ),
    (
        Kind("a file", _OPEN, _FILE, "files"),
        "_io._IOBase tempfile._TemporaryFileWrapper tempfile.SpooledTemporaryFile zipfile.ZipFile "
        "tarfile.TarFile codecs.StreamReaderWriter codecs.StreamReader codecs.StreamWriter "
        "h5py._hl.files.File",
    ),
    (Kind("a file in memory", _OPEN, _FILE, "files"), "mmap.mmap"),
    (Kind("a generator", _ONCE, _LIST, "generators"), "builtins.generator"),
    (
        Kind("an iterator", _ONCE, _LIST, "generators"),
        "builtins.map builtins.filter builtins.zip builtins.enumerate builtins.callable_iterator "
        "_csv.reader posix.ScandirIterator",
    ),
    (
        Kind(
            "a thread-local",
            "whose values belong to threads of this process",
            f"set it {_WHERE}",
            "thread-locals",
        ),
        "_thread._local",
    ),
    (
        Kind("a context variable", _HERE, "send its value: .get() it first", "thread-locals"),
        "_contextvars.ContextVar _contextvars.Context _contextvars.Token",
    ),
    (
        Kind("a weak reference", _WEAK, _REFER, "weakrefs"),
        "weakref.ReferenceType weakref.WeakMethod",
    ),
    (
        Kind("a weak dictionary", _WEAK, _REFER, "weakrefs"),
        "weakref.WeakValueDictionary weakref.WeakKeyDictionary",
    ),
    (
        Kind(
            "a coroutine",
            _LOOP,
            "send the async function and its arguments, and asyncio.run() it inside the function",
            "asyncio",
        ),
        "builtins.coroutine builtins.coroutine_wrapper",
    ),
    (Kind("an async generator", _LOOP, _RUN, "asyncio"), "builtins.async_generator"),
    (
        Kind("an event loop", _HERE, "call asyncio.run() inside the function", "asyncio"),
        "asyncio.events.AbstractEventLoop",
    ),
    (
        Kind(
            "a client",
            "which is connected from this process only",
            "make a Client inside the function, or call dmap() there",
            "handles",
        ),
        "dmap.client.Client",
    ),
    (
        Kind("a job", _HERE, "send its result(), or its handle to attach() to", "handles"),
        "dmap.jobs.Job",
    ),
    (Kind("a future", _HERE, "send its result()", "handles"), "concurrent.futures._base.Future"),
    (
        Kind("a pool", _HERE, "make it inside the function, or call dmap() there", "handles"),
        "concurrent.futures._base.Executor multiprocessing.pool.Pool",
    ),
    (Kind("a thread", _HERE, "start it inside the function", "handles"), "threading.Thread"),
    (
        Kind("a process", _HERE, "start it inside the function", "handles"),
        "multiprocessing.process.BaseProcess subprocess.Popen multiprocessing.managers.BaseManager",
    ),
    (
        Kind("shared memory", _HERE, "send its .value, and return what changes", "handles"),
        "multiprocessing.sharedctypes.SynchronizedBase",
    ),
    (
        Kind(
            "a library in C", "which is loaded in this process only", f"load it {_WHERE}", "handles"
        ),
        "ctypes.CDLL _ctypes.CFuncPtr",
    ),
    (
        Kind("a pointer", _HERE, "send what it points to, as plain values", "handles"),
        "_ctypes._Pointer builtins.PyCapsule",
    ),
    (
        Kind(
            "memory of C code",
            "which has a pointer in it, or a type that workers cannot find by its name",
            "send its .value, or bytes() of it",
            "handles",
        ),
        "_ctypes._CData",
    ),
    (
        Kind(
            "a module",
            "which workers cannot import by its name",
            "put it into a file that they can import",
            "modules",
        ),
        "builtins.module",
    ),
    (
        Kind(
            "a traceback",
            "which holds the frames of this process",
            "send it as text: traceback.format_exc()",
            "other",
        ),
        "builtins.traceback",
    ),
    (
        Kind("a frame", _HERE, "send those values of its variables that are wanted", "other"),
        "builtins.frame",
    ),
    (
        Kind(
            "a handler of logs",
            _HERE,
            "call logging.getLogger() inside the function, and set handlers up in the worker",
            "other",
        ),
        "logging.Handler",
    ),
    (
        Kind(
            "a memoryview",
            "whose memory is another object's",
            "send bytes() of it, or an array",
            "other",
        ),
        "builtins.memoryview",
    ),
)
_KINDS: Final = {name: kind for kind, names in _TABLE for name in names.split()}

_CURSOR: Final = Kind("a database cursor", _OPEN, _CONNECT, "databases")
_CONNECTION: Final = Kind("a database connection", _OPEN, _CONNECT, "databases")
_DATABASES: Final = frozenset(
    (
        *("sqlite3", "psycopg", "psycopg_c", "psycopg_binary", "psycopg_pool", "psycopg2"),
        *("pymysql", "mysql", "MySQLdb", "_mysql", "asyncpg", "pyodbc", "oracledb", "cx_Oracle"),
        *("duckdb", "_duckdb", "sqlalchemy", "redis", "pymongo"),
    )
)
_CONNECTED: Final = (
    *("conn", "engine", "session", "pool", "client", "redis", "database", "collection"),
    *("pipeline", "pubsub", "relation", "transaction"),
)
"""In the name of a database's type, in small letters; its rows and models have none of these."""

_GPU: Final = "which is in the memory of this machine's GPU"
_TENSOR: Final = Kind(
    "a CUDA tensor",
    _GPU,
    "send .cpu() of it, and move it to the worker's GPU inside the function",
    "cuda",
)
_FROM_GPU: Final = {
    "cupy": "send .get() of it, and cupy.asarray() that inside the function",
    "jax": "send numpy.asarray() of it",
    "jaxlib": "send numpy.asarray() of it",
}

_C_TYPE: Final = Kind(
    "a type of C data",
    "which workers cannot find by its name",
    "define it at the top of a module that they can import",
    "modules",
)
_TYPE_IN_C: Final = Kind(
    "a type made in C",
    "which no module has by its name",
    "send plain values in place of what is of it",
    "handles",
)
_BY_NAME: Final = "define it at the top of a module that workers can import"

# What Python, Cython and ctypes say of an object whose state is not in Python.
_IN_C: Final = (
    "cannot pickle '",
    "no default __reduce__",
    "cannot be converted to a Python object for pickling",
    "ctypes objects containing pointers",
)

_module_of: Any = vars(type)["__module__"].__get__
_qualname_of: Any = vars(type)["__qualname__"].__get__
_mro_of: Any = vars(type)["__mro__"].__get__


def kind_of(value: object, error: BaseException) -> Kind | None:
    """Return the kind of a value that cannot be pickled, or None if it is no known one.

    Args:
        value: The value. None of its code runs.
        error: What pickling it raised.
    """
    if issubclass(type(value), type):
        in_c = any(names_of(base) == ("_ctypes", "_CData") for base in mro_of(value))
        return _C_TYPE if in_c else None
    kind = kind_of_type(type(value))
    if kind is _TENSOR and "CUDA" not in pickling.reason(error):
        return None
    return kind


def kind_of_type(cls: type) -> Kind | None:
    """Return the kind that instances of a type are of, if they cannot be pickled."""
    names = [names_of(base) for base in mro_of(cls)]
    for module, qualname in names:
        if (kind := _KINDS.get(f"{module}.{qualname}")) is not None:
            return kind
    for module, qualname in names:
        if (kind := _of_library(module, qualname)) is not None:
            return kind
    return None


def unknown_kind(value: object, error: BaseException) -> Kind:
    """Return what can be said of a value of no known kind, by what pickling it raised."""
    reason = bounded_reason(error)
    if isinstance(error, TypeError | ValueError) and any(words in reason for words in _IN_C):
        return Kind("an object of C code", _HERE, _REMAKE, "handles")
    if issubclass(type(value), type) and "made in C" in reason:
        return _TYPE_IN_C
    noun = "an object"
    if issubclass(type(value), type | FunctionType | BuiltinFunctionType):
        noun = "a class" if issubclass(type(value), type) else "a function"
        if "Can't pickle" in reason:  # what pickle says of names that lead elsewhere or nowhere
            why = f"which workers cannot find by its name ({reason})"
            return Kind(noun, why, _BY_NAME, "modules")
    return Kind(noun, f"whose pickling raises {reason}", _REMAKE, "other")


def described(value: Any, kind: Kind) -> str:
    """Return the words for a value: what it is, of which type, and why it stays."""
    cls = value if issubclass(type(value), type) else type(value)
    return f"{kind.noun} ({type_name(cls)}), {kind.why}"


def bounded_reason(error: BaseException) -> str:
    """Return the type and message of an error, of whatever length that is."""
    text = pickling.reason(error)
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."


def type_name(cls: type) -> str:
    """Return the dotted name of a class, without the functions that it was defined in."""
    module, qualname = names_of(cls)
    name = pickling.short_name(qualname)
    return name if module in ("", "builtins", "__main__") else f"{module}.{name}"


def names_of(cls: object) -> tuple[str, str]:
    """Return the names of a class's module and of the class in it."""
    module, qualname = _module_of(cls), _qualname_of(cls)
    return module if type(module) is str else "", qualname


def mro_of(cls: object) -> tuple[type, ...]:
    """Return a class and its bases, in the order of look-up."""
    bases: tuple[type, ...] = _mro_of(cls)
    return bases


def _of_library(module: str, qualname: str) -> Kind | None:
    """Return the kind of a type that is known by its library and a word in its name."""
    library, _, rest = module.partition(".")
    name = qualname.lower()
    if library in _DATABASES:
        if "cursor" in name:
            return _CURSOR
        if any(word in name for word in _CONNECTED):
            return _CONNECTION
    elif library == "zmq" and qualname in ("Socket", "Context", "Poller", "Frame"):
        return Kind(f"a ZeroMQ {name}", _HERE, _CONNECT, "sockets")
    elif library in ("asyncio", "_asyncio") and rest != "protocols":
        return Kind(f"an asyncio {name}", _LOOP, _RUN, "asyncio")
    elif library == "itertools":
        return Kind("an iterator", _ONCE, _LIST, "generators")
    elif library == "_cffi_backend":
        return Kind("memory of C code", _HERE, _MAKE, "handles")
    elif library == "torch" and name == "tensor":
        return _TENSOR
    elif library in _FROM_GPU and name in ("ndarray", "array", "arrayimpl"):
        return Kind("an array on a GPU", _GPU, _FROM_GPU[library], "cuda")
    return None
