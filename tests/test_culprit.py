import asyncio
import collections
import concurrent.futures
import contextlib
import copyreg
import ctypes
import dataclasses
import enum
import functools
import gc
import io
import itertools
import logging
import multiprocessing
import queue
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import types
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from dmap import culprit, pickling
from dmap.anatomy import Anatomist
from dmap.culprit import Culprit

LOCK = threading.Lock()


def find(value: object, root: str = "f") -> Culprit:
    """Return what is in the way of a value that cannot be pickled."""
    found = culprit.find(root, value, failure(value))
    assert found is not None
    return found


def failure(value: object) -> Exception:
    """Return what pickling a value raises."""
    try:
        pickling.dump(value)
    except Exception as error:
        return error
    pytest.fail("this can be pickled")


def script(source: str, **names: Any) -> dict[str, Any]:
    """Return the globals of a script, run with these names."""
    namespace = {"__name__": "__main__", **names}
    exec(source, namespace)
    return namespace


class Box:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Slots:
    __slots__ = ("empty", "held")


class Bag(list[Any]):
    pass


class Table(dict[Any, Any]):
    pass


class Reducing:
    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return Reducing, self.args


class Stating:
    """Its property is no part of its state."""

    def __getstate__(self) -> dict[str, Any]:
        return {"count": 1, "inner": LOCK}

    @property
    def first(self) -> object:
        raise AssertionError("nobody may ask")


Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Point:
    x: object
    y: object


def slots(held: object) -> Slots:
    made = Slots()
    made.held = held
    return made


def closure(held: object) -> Callable[[], object]:
    def helper() -> object:
        return held

    return lambda: helper()


def default(held: object) -> Callable[..., object]:
    return lambda a, b=1, c=held, *, d=2: (a, b, c, d)


def keyword(held: object) -> Callable[..., object]:
    return lambda a, *, d=held: (a, d)


def attribute(held: object) -> Callable[..., object]:
    func = lambda: 1  # noqa: E731
    func.held = held  # type: ignore[attr-defined]
    return func


def wrapped(held: object) -> Callable[..., object]:
    return functools.wraps(lambda: held)(lambda: 1)


def of_script(source: str) -> Callable[[object], object]:
    return lambda held: script(source, held=held)["f"]


def local_class(held: object) -> object:
    class Local:
        shared = held

        def method(self) -> None: ...

    return Local()


def local_base(held: object) -> object:
    class Base:
        shared = held

    class Derived(Base):
        pass

    return Derived


def local_method(held: object) -> object:
    class Local:
        def method(self) -> object:
            return held

    return Local


def local_enum(held: object) -> object:
    class Colour(enum.Enum):
        RED = held

    return Colour


PLACES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("itself", lambda x: x, "f"),
    ("list", lambda x: [1, x], "f -> [1]"),
    ("tuple", lambda x: (1, 2, [x]), "f -> [2] -> [0]"),
    ("key", lambda x: {"main": x}, "f -> ['main']"),
    ("number", lambda x: {1: 2, -3: x}, "f -> [-3]"),
    ("other key", lambda x: {(1, 2): x}, "f -> [<tuple>]"),
    ("long key", lambda x: {"k" * 500: x}, f"f -> ['{'k' * 35}...']"),
    ("as key", lambda x: {Pair(1, x): 1}, "f -> key <test_culprit.Pair> -> .right"),
    ("set", lambda x: {1, x}, "f -> element <_thread.lock>"),
    ("attribute", lambda x: Box(pool={"main": [x]}), "f -> .pool -> ['main'] -> [0]"),
    ("odd attribute", lambda x: Box(**{"not a name": x}), "f -> ['not a name']"),
    ("slot", slots, "f -> .held"),
    ("dataclass", lambda x: Point(1, Point(x, 2)), "f -> .y -> .x"),
    ("namedtuple", lambda x: Pair(1, x), "f -> .right"),
    ("list's subclass", lambda x: Bag([1, x]), "f -> [1]"),
    ("dict's subclass", lambda x: Table(a=x), "f -> ['a']"),
    ("defaultdict", lambda x: collections.defaultdict(int, a=x), "f -> ['a']"),
    ("ordered", lambda x: collections.OrderedDict(a=x), "f -> ['a']"),
    ("deque", lambda x: collections.deque([1, x]), "f -> [1]"),
    ("namespace", lambda x: types.SimpleNamespace(a=x), "f -> .a"),
    ("reduce", lambda x: Reducing(1, x), "f -> argument 1 of Reducing()"),
    ("state", lambda x: Stating(), "f -> .inner"),
    ("exception", lambda x: ValueError(1, x), "f -> argument 1 of ValueError()"),
    ("list iterator", lambda x: iter([x]), "f -> argument 0 of iter() -> [0]"),
    ("array", lambda x: array([1, x]), "f -> [1]"),
    ("table", lambda x: array([[1, x], [2, 3]]), "f -> .flat[1]"),
    ("closure", closure, "f -> closure 'helper' -> closure 'held'"),
    ("global", of_script("def g(): return held\ndef f(): g()"), "f -> global 'g' -> global 'held'"),
    ("nested code", of_script("def f(): return lambda: [held for _ in ()]"), "f -> global 'held'"),
    ("default", default, "f -> default of 'c'"),
    ("keyword default", keyword, "f -> default of 'd'"),
    ("attribute of a function", attribute, "f -> .held"),
    ("wrapped", wrapped, "f -> .__wrapped__ -> closure 'held'"),
    ("cached", lambda x: functools.cache(lambda: x), "f -> .__wrapped__ -> closure 'x'"),
    ("partial", lambda x: functools.partial(print, 1, x), "f -> argument 1"),
    ("partial's keyword", lambda x: functools.partial(print, end=x), "f -> argument 'end'"),
    ("partial's function", lambda x: functools.partial(default(x)), "f -> .func -> default of 'c'"),
    ("method", lambda x: types.MethodType(len, Box(a=x)), "f -> .__self__ -> .a"),
    ("method in C", lambda x: [1, x].append, "f -> .__self__ -> [1]"),
    ("class", local_class, "f -> class 'Local' -> .shared"),
    ("base", local_base, "f -> base 0 -> .shared"),
    ("method of a class", local_method, "f -> .method -> closure 'held'"),
    ("enum", local_enum, "f -> .RED"),
    (
        "property",
        lambda x: property(closure(x)),
        "f -> .fget -> closure 'helper' -> closure 'held'",
    ),
]


def array(values: Any) -> Any:
    return pytest.importorskip("numpy").array(values, dtype=object)


@pytest.mark.parametrize(
    ("make", "path"), [row[1:] for row in PLACES], ids=[row[0] for row in PLACES]
)
def test_the_path_leads_to_what_is_in_the_way(make: Callable[[Any], Any], path: str) -> None:
    found = find(make(threading.Lock()))
    assert found.path == path
    assert type(found.value) is type(LOCK)
    assert found.kind.anchor == "locks"


def test_the_message_has_the_path_the_type_the_hint_and_where_to_read_on() -> None:
    class Pool:
        def __init__(self) -> None:
            self._lock = threading.Lock()

    pool = {"main": Pool()}
    holder = Box(pool=pool)

    def helper() -> object:
        return holder

    def f() -> object:
        return helper()

    assert culprit.explain("the function f", "f", f, failure(f)) == (
        "the function f cannot be pickled: f -> closure 'helper' -> closure 'holder' -> .pool -> "
        "['main'] -> ._lock is a lock (_thread.lock), which exists in this process only; make it "
        "where it is used: inside the function, or once a worker process with @per_worker "
        "(docs/closures.md#locks)"
    )


def test_what_is_itself_in_the_way_has_no_path() -> None:
    text = culprit.explain("item 3 (lock)", "item 3", LOCK, failure(LOCK))
    assert text.startswith("item 3 (lock) cannot be pickled: it is a lock (_thread.lock), which")


def test_the_shortest_of_several_paths_is_told() -> None:
    lock = threading.Lock()
    assert find({"a": [[[lock]]], "b": [lock], "c": [[lock]]}).path == "f -> ['b'] -> [0]"
    assert find({"a": [[threading.Lock()]], "b": [threading.Lock()]}).path == "f -> ['b'] -> [0]"


def test_what_is_not_pickled_is_not_looked_at() -> None:
    class Careful:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.kept = [threading.Lock()]

        def __getstate__(self) -> object:
            return {"kept": self.kept}

    assert find(Careful()).path == "f -> .kept -> [0]"


def test_globals_that_are_not_used_are_not_looked_at() -> None:
    names = script("def f(): return used", used=[LOCK], unused=LOCK)
    assert find(names["f"]).path == "f -> global 'used' -> [0]"


BY_REFERENCE = functools.cache(default(LOCK))
BY_REFERENCE.__qualname__ = "BY_REFERENCE"  # type: ignore[attr-defined]


def test_what_goes_by_reference_is_not_looked_into() -> None:
    value = [BY_REFERENCE, functools.partial(find), culprit, [[[threading.Lock()]]]]
    assert find(value).path == "f -> [3] -> [0] -> [0] -> [0]"


def test_a_copyreg_reducer_says_what_the_parts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = lambda box: (Box, (), {"kept": box.kept})  # noqa: E731
    monkeypatch.setitem(copyreg.dispatch_table, Box, reduce)
    assert find(Box(lock=LOCK, kept=[threading.Lock()])).path == "f -> .kept -> [0]"


def test_numbers_in_an_array_are_no_parts() -> None:
    numpy = pytest.importorskip("numpy")
    assert list(Anatomist(0).groups_of(numpy.zeros(3))) == []


def test_tensors_are_not_pickled_one_by_one_unless_one_is_on_a_gpu() -> None:
    seen = []

    def reduce(self: object) -> str:
        seen.append(self)
        raise ValueError

    tensor = of_library("torch", "Tensor", __reduce__=reduce)
    assert find([[threading.Lock()], tensor]).path == "f -> [0] -> [0]"
    assert not seen


def test_cycles_do_not_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culprit, "SECONDS", 20.0)
    start = time.process_time()
    one, two = Box(), Box()
    one.two, two.one, two.list = two, one, [one, two]  # type: ignore[attr-defined]
    two.list.append(LOCK)  # type: ignore[attr-defined]
    assert find(one).path == "f -> .two -> .list -> [2]"
    two.list[2] = zlib.compressobj()  # type: ignore[attr-defined]
    assert find(one).path == "f -> .two -> .list -> [2]"

    def recursive(n: int) -> object:
        return recursive(n - 1) if n else LOCKED

    LOCKED = threading.Lock()  # noqa: N806
    assert find(recursive).path == "f -> closure 'LOCKED'"
    assert time.process_time() - start < 3


def test_the_last_of_a_million_is_found_in_a_moment() -> None:
    start = time.process_time()
    assert find([*range(1_000_000), LOCK]).path == "f -> [1000000]"
    assert find({**dict.fromkeys(range(1_000_000)), "z": [LOCK]}).path == "f -> ['z'] -> [0]"
    assert time.process_time() - start < 5


def test_two_in_a_long_list_of_objects_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culprit, "SECONDS", 60.0)
    values: list[object] = [Point(n, n) for n in range(10_000)]
    values[7_000] = Box(a=[Fresh()])
    values[8_000] = Box(a=Fresh())
    assert find(values).path.startswith("f -> [8000] -> .a")


def test_parts_are_tried_before_all_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culprit, "SECONDS", 2.0)
    value = [zlib.compressobj(), *[Spinning() for _ in range(1000)]]
    found = culprit.find("f", value, ValueError())
    assert found is not None
    assert (found.path, found.kind.noun) == ("f -> [0]", "an object of C code")


def test_what_lies_beside_much_else_is_found_without_pickling_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(culprit, "SECONDS", 60.0)
    much = [Spinning() for _ in range(500)]
    value = Box(much=much, inner=Box(much=much, event=threading.Event()))
    start = time.process_time()
    found = culprit.find("f", value, ValueError())
    assert time.process_time() - start < 3
    assert found is not None
    assert (found.path, found.kind.noun) == ("f -> .inner -> .event", "an event")


class Fresh:
    """Has another lock at each look."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Reducing, (threading.Lock(),)


def nested(depth: int, value: object) -> object:
    for _ in range(depth):
        value = [value]
    return value


def test_a_long_path_is_shown_without_its_middle() -> None:
    steps = ["[0]"] * 8
    assert find(nested(40, LOCK)).path == " -> ".join(["f", *steps, "(24 more)", *steps])


def test_what_lies_too_deep_is_told_with_the_path_up_to_there() -> None:
    value = nested(200, LOCK)
    found = find(value)
    assert found.path.count("[0]") == 16
    assert "(48 more)" in found.path
    text = culprit.explain("item 1 (list)", "item 1", value, failure(value))
    assert "[0] holds a lock (_thread.lock), which exists in this process only; make it" in text


class Spinning:
    def __reduce__(self) -> tuple[Any, ...]:
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass
        return Spinning, ()


def test_a_search_that_takes_too_long_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culprit, "SECONDS", 0.2)
    value = Box(a=[*[Spinning() for _ in range(1000)], zlib.compressobj()])
    error = failure(zlib.compressobj())
    start = time.monotonic()
    text = culprit.explain("item 1 (Box)", "item 1", value, error)
    assert time.monotonic() - start < 2
    assert text.startswith(
        "item 1 (Box) cannot be pickled: it holds something that cannot be "
        "(TypeError: cannot pickle 'zlib.Compress' object); send"
    )


def test_a_nest_that_is_too_deep_for_pickle_is_told_to_be_flattened() -> None:
    value = nested(100_000, 1)
    text = culprit.explain("item 1 (list)", "item 1", value, failure(value))
    assert text.startswith("item 1 (list) is nested too deeply to be pickled: flatten it, or raise")
    assert text.endswith("docs/closures.md#nested)")


@pytest.mark.parametrize("make", [lambda: (n for n in ()), lambda: map(str, [LOCK])])
def test_of_what_is_gone_through_once_a_list_is_to_be_made(make: Callable[[], object]) -> None:
    value = make()
    name = type(value).__name__
    assert culprit.explain(f"item 1 ({name})", "item 1", value, failure(value)) == (
        f"item 1 is a {name}, which cannot be pickled: make a list of it first "
        "(docs/closures.md#generators)"
    )
    found = find({"rows": value})
    assert (found.path, found.kind.anchor) == ("f -> ['rows']", "generators")


class OrderError(BaseException):
    pass


class Hostile:
    """Is pickled by none of its code without an error, and lies about its class."""

    def __init__(self, error: BaseException) -> None:
        object.__setattr__(self, "error", error)

    def __reduce__(self) -> str:
        raise object.__getattribute__(self, "error")

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return int

    def __repr__(self) -> str:
        raise OrderError

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise OrderError

    def __getattr__(self, name: str) -> object:
        raise OrderError


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), OrderError(), MemoryError()])
def test_whatever_an_object_raises_is_a_failure_like_others(error: BaseException) -> None:
    value = {"a": 1, "b": [Hostile(error)]}
    found = culprit.find("f", value, ValueError())
    assert found is not None
    assert found.path == "f -> ['b'] -> [0]"
    assert f"whose pickling raises {type(error).__name__}" in found.words
    assert type(found.value) is Hostile


def test_an_object_that_lies_of_its_class_is_told_by_its_type() -> None:
    text = culprit.explain("item 1", "item 1", [Hostile(ValueError("no"))], ValueError())
    assert "is an object (test_culprit.Hostile), whose pickling raises ValueError: no;" in text


def test_a_hostile_key_is_shown_by_its_type() -> None:
    assert find({Hostile(ValueError()): LOCK}).path in (
        "f -> [<test_culprit.Hostile>]",
        "f -> key <test_culprit.Hostile>",
    )


class Interrupting(threading.Thread):
    def __reduce__(self) -> str:
        raise KeyboardInterrupt


@pytest.mark.parametrize("make", [lambda: Hostile(KeyboardInterrupt()), Interrupting])
def test_keyboard_interrupt_passes(make: Callable[[], object]) -> None:
    with pytest.raises(KeyboardInterrupt):
        culprit.find("f", [make()], ValueError())


class SilentError(Exception):
    def __str__(self) -> str:
        raise OrderError


def test_an_error_without_a_text_is_told_by_its_type() -> None:
    text = culprit.explain("item 1", "item 1", [Hostile(SilentError())], ValueError())
    assert "whose pickling raises SilentError;" in text


def test_an_error_with_a_long_text_is_cut() -> None:
    text = culprit.explain("item 1", "item 1", [Hostile(ValueError("x" * 10**6))], ValueError())
    assert "xxx..." in text
    assert len(text) < 1000


class Shy(type):
    def __getattribute__(cls, name: str) -> Any:
        raise OrderError


def test_a_class_whose_metaclass_hides_its_name_is_named() -> None:
    value = Shy("Hidden", (Hostile,), {})(ValueError("no"))
    assert "Hidden), whose pickling raises" in culprit.explain(
        "item 1", "item 1", [value], OSError()
    )


class Guarded:
    """Can be watched for whether anybody looks at its attributes."""

    watched = False

    def __init__(self) -> None:
        vars(self)["held"] = [LOCK]

    @property
    def held(self) -> object:
        raise AssertionError("nobody may ask")

    def __getattribute__(self, name: str) -> object:
        if Guarded.watched:
            raise AssertionError("nobody may ask")
        return object.__getattribute__(self, name)


def test_no_code_of_a_plain_object_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    value = Guarded()
    error = failure(value)
    monkeypatch.setattr(Guarded, "watched", True)
    found = culprit.find("f", value, error)
    assert found is not None
    assert found.path == "f -> .held -> [0]"


def test_what_can_be_pickled_after_all_has_no_culprit() -> None:
    assert culprit.find("f", [1], ValueError()) is None
    assert culprit.explain("item 1 (list)", "item 1", [1], ValueError("once")) == (
        "item 1 (list) cannot be pickled: it raises ValueError: once when it is pickled; send what "
        "it is made from (a path, an address, plain values) and make it where it is used "
        "(docs/closures.md#other)"
    )


def test_a_name_that_leads_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        def __reduce__(self) -> str:
            return "LOCK"

    found = find([Elsewhere()])
    assert "whose pickling raises PicklingError: Can't pickle" in found.words

    builtin = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", zlib.adler32)
    found = find([builtin])
    assert found.words.startswith(
        "is a function (builtin_function_or_method), which workers cannot"
    )
    assert found.kind.anchor == "modules"


def test_a_search_keeps_nothing() -> None:
    class Local:
        pass

    value = Local()
    value.held = [LOCK]  # type: ignore[attr-defined]
    watch = weakref.ref(value)
    culprit.explain("item 1", "item 1", value, failure(value))
    del value
    gc.collect()
    assert watch() is None


@contextlib.contextmanager
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def entered(make: Callable[[], Any]) -> Callable[[contextlib.ExitStack], Any]:
    return lambda stack: stack.enter_context(make())


def plain(make: Callable[[], Any]) -> Callable[[contextlib.ExitStack], Any]:
    return lambda stack: make()


def ended(make: Callable[[], Any], end: str = "close") -> Callable[[contextlib.ExitStack], Any]:
    def made(stack: contextlib.ExitStack) -> Any:
        value = make()
        stack.callback(getattr(value, end))
        return value

    return made


async def coroutine() -> None: ...


async def async_generator() -> Any:
    yield 1


def traceback() -> Any:
    try:
        raise ValueError
    except ValueError as error:
        return error.__traceback__


KINDS: list[tuple[Callable[[contextlib.ExitStack], Any], str, str]] = [
    (plain(threading.Lock), "a lock", "locks"),
    (plain(threading.RLock), "a lock", "locks"),
    (plain(threading.Event), "an event", "locks"),
    (plain(threading.Condition), "a condition", "locks"),
    (plain(threading.BoundedSemaphore), "a semaphore", "locks"),
    (plain(lambda: threading.Barrier(2)), "a barrier", "locks"),
    (plain(multiprocessing.Lock), "a lock", "locks"),
    (plain(multiprocessing.Event), "an event", "locks"),
    (plain(queue.Queue), "a queue", "locks"),
    (plain(queue.SimpleQueue), "a queue", "locks"),
    (entered(socket.socket), "a socket", "sockets"),
    (ended(zmq.Context, "term"), "a ZeroMQ context", "sockets"),
    (ended(lambda: zmq.Context.instance().socket(zmq.PUSH)), "a ZeroMQ socket", "sockets"),
    (entered(functools.partial(open, __file__)), "a file", "files"),
    (entered(functools.partial(open, __file__, "rb")), "a file", "files"),
    (entered(functools.partial(open, __file__, "rb", buffering=0)), "a file", "files"),
    (entered(tempfile.TemporaryFile), "a file", "files"),
    (entered(tempfile.NamedTemporaryFile), "a file", "files"),
    (entered(functools.partial(tempfile.NamedTemporaryFile, "w+")), "a file", "files"),
    (plain(lambda: (n for n in ())), "a generator", "generators"),
    (plain(lambda: map(str, [LOCK])), "an iterator", "generators"),
    (plain(lambda: itertools.chain([LOCK])), "an iterator", "generators"),
    (ended(lambda: sqlite3.connect(":memory:")), "a database connection", "databases"),
    (plain(lambda: ctypes.CDLL(None)), "a library in C", "handles"),
    (plain(lambda: ctypes.CDLL(None).getpid), "a library in C", "handles"),
    (plain(lambda: ctypes.pointer(ctypes.c_int(1))), "a pointer", "handles"),
    (plain(lambda: (ctypes.c_int * 3)()), "memory of C code", "handles"),
    (plain(zlib.compressobj), "an object of C code", "handles"),
    (plain(lambda: type(iter([]))), "a type made in C", "handles"),
    (plain(threading.local), "a thread-local", "thread-locals"),
    (plain(lambda: weakref.ref(test_cycles_do_not_loop)), "a weak reference", "weakrefs"),
    (plain(weakref.WeakValueDictionary), "a weak dictionary", "weakrefs"),
    (plain(weakref.WeakKeyDictionary), "a weak dictionary", "weakrefs"),
    (ended(coroutine), "a coroutine", "asyncio"),
    (plain(async_generator), "an async generator", "asyncio"),
    (entered(loop), "an event loop", "asyncio"),
    (lambda stack: stack.enter_context(loop()).create_future(), "an asyncio future", "asyncio"),
    (plain(lambda: threading.Thread(target=print)), "a thread", "handles"),
    (plain(threading.current_thread), "a thread", "handles"),
    (plain(lambda: multiprocessing.Process(target=print)), "a process", "handles"),
    (entered(lambda: concurrent.futures.ThreadPoolExecutor(1)), "a pool", "handles"),
    (plain(concurrent.futures.Future), "a future", "handles"),
    (plain(traceback), "a traceback", "other"),
    (plain(sys._getframe), "a frame", "other"),
    (plain(lambda: logging.StreamHandler(io.StringIO())), "a handler of logs", "other"),
    (plain(lambda: memoryview(b"12345678").cast("I")), "a memoryview", "other"),
]


@pytest.mark.parametrize(("make", "noun", "anchor"), KINDS)
def test_what_stays_in_its_process_is_known_by_its_kind(
    make: Callable[[contextlib.ExitStack], Any], noun: str, anchor: str
) -> None:
    with contextlib.ExitStack() as stack:
        value = make(stack)
        found = find(Box(held=[value]))
        assert found.path == "f -> .held -> [0]"
        assert (found.kind.noun, found.kind.anchor) == (noun, anchor)
        assert found.words.startswith(f"is {noun} (")
        assert found.value is value


def test_a_cursor_is_told_as_one() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        assert find(connection.cursor()).kind.noun == "a database cursor"


def test_both_ends_of_a_pipe_are_told() -> None:
    for end in multiprocessing.Pipe():
        with end:
            found = find([end])
            assert (found.kind.noun, found.kind.anchor) == ("an end of a pipe", "sockets")


def test_a_subclass_is_of_the_kind_of_its_base() -> None:
    class Worker(threading.Thread):
        pass

    assert find(Worker()).kind.noun == "a thread"


def of_library(module: str, name: str, *bases: type, **attributes: Any) -> Any:
    """Make an object of a type with this name, as a library that is not here would."""
    return type(name, bases or (Holder,), {"__module__": module, **attributes})()


class Holder:
    def __init__(self) -> None:
        self.inner = [threading.Lock()]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("psycopg", "Connection"),
        ("psycopg_pool.pool", "ConnectionPool"),
        ("psycopg2.extensions", "connection"),
        ("pymysql.connections", "Connection"),
        ("mysql.connector.connection", "MySQLConnection"),
        ("MySQLdb.connections", "Connection"),
        ("asyncpg.connection", "Connection"),
        ("pyodbc", "Connection"),
        ("oracledb.connection", "Connection"),
        ("duckdb", "DuckDBPyConnection"),
        ("sqlalchemy.engine.base", "Engine"),
        ("sqlalchemy.orm.session", "Session"),
        ("redis.client", "Redis"),
        ("pymongo.mongo_client", "MongoClient"),
    ],
)
def test_a_connection_to_a_database_is_told_and_not_what_is_in_it(module: str, name: str) -> None:
    found = find({"db": of_library(module, name)})
    assert found.path == "f -> ['db']"
    assert (found.kind.noun, found.kind.anchor) == ("a database connection", "databases")


def test_a_row_of_a_database_is_no_connection() -> None:
    assert find(of_library("sqlalchemy.orm.decl_api", "Row")).path == "f -> .inner -> [0]"


@pytest.mark.parametrize(("module", "name"), [("cupy", "ndarray"), ("jaxlib._jax", "ArrayImpl")])
def test_an_array_on_a_gpu_that_fails_is_told(module: str, name: str) -> None:
    found = find([of_library(module, name)])
    assert (found.path, found.kind.anchor) == ("f -> [0]", "cuda")


def test_a_protocol_of_asyncio_is_the_users_own() -> None:
    assert find(of_library("asyncio.protocols", "Protocol")).path == "f -> .inner -> [0]"


def test_a_module_that_workers_cannot_import_is_told() -> None:
    module = types.ModuleType("nowhere_to_be_found")
    module.lock = LOCK  # type: ignore[attr-defined]
    found = find(script("def f(): return plug", plug=module)["f"])
    assert (found.path, found.kind.anchor) == ("f -> global 'plug'", "modules")


def test_a_structure_of_ctypes_that_workers_cannot_import_is_told() -> None:
    class Local(ctypes.Structure):
        _fields_ = (("a", ctypes.c_int),)

    found = find(lambda: Local)
    assert (found.path, found.kind.noun) == ("f -> closure 'Local'", "a type of C data")


def test_a_hint_is_one_clause() -> None:
    with contextlib.ExitStack() as stack:
        hints = {find(make(stack)).kind.hint for make, _, _ in KINDS}
    assert len(hints) > 15
    assert not any(hint.endswith(".") or ";" in hint or hint[0].isupper() for hint in hints)
