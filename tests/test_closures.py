import functools
import operator
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmap import closures
from dmap.errors import ClosureError

ROOT = Path(__file__).parent.parent
LOCK = threading.Lock()


def round_trip(func: Callable[..., Any]) -> Callable[..., Any]:
    return closures.load_function(closures.dump_function(func))


class Scale:
    """A callable object, whose bound methods travel too."""

    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, x: int) -> int:
        return x * self.by

    def method(self, x: int) -> int:
        return x * self.by + 1

    @classmethod
    def of_class(cls, x: int) -> str:
        return f"{cls.__name__} {x}"


def triple(x: int) -> int:
    return 3 * x


def test_a_lambda_takes_along_what_it_closes_over() -> None:
    x = 1
    assert [round_trip(lambda v: v + x)(v) for v in range(3)] == [1, 2, 3]


def test_a_local_function_takes_along_the_functions_that_it_calls() -> None:
    def inner(v: int) -> int:
        return v + offset

    def outer(v: int) -> int:
        return inner(v) * 2

    offset = 10
    assert round_trip(outer)(1) == 22


def test_an_importable_function_goes_by_reference() -> None:
    assert round_trip(triple) is triple


@pytest.mark.parametrize(
    ("func", "argument", "value"),
    [
        (Scale(3), 2, 6),
        (Scale(3).method, 2, 7),
        (Scale.of_class, 2, "Scale 2"),
        (functools.partial(pow, 2), 3, 8),
        (functools.partial(lambda a, b: a - b, b=1), 3, 2),
        (len, "abc", 3),
        (str.upper, "abc", "ABC"),
        ("a,b".split, ",", ["a", "b"]),
        (operator.itemgetter(1), "abc", "b"),
        (operator.attrgetter("real"), 3j, 0.0),
        (np.sqrt, 9.0, 3.0),
        (functools.cache(triple), 2, 6),
        (functools.cache(lambda x: x), 2, 2),
        (int, "3", 3),
    ],
    ids=repr,
)
def test_every_kind_of_callable_travels(
    func: Callable[[Any], Any], argument: object, value: object
) -> None:
    assert round_trip(func)(argument) == value


def test_a_class_travels_as_a_function() -> None:
    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

    assert round_trip(Local)(3).x == 3


def test_a_captured_array_is_a_read_only_view_of_the_blob() -> None:
    small, large = np.arange(3), np.arange(100_000)
    blob = closures.dump_function(lambda: (small, large))
    for array in closures.load_function(blob)():
        assert not array.flags.writeable
        assert np.shares_memory(array, np.frombuffer(blob, np.uint8))


def test_the_same_function_has_the_same_bytes() -> None:
    x = [1, 2, 3]
    func = lambda v: v + x  # noqa: E731
    assert closures.dump_function(func) == closures.dump_function(func)


def test_a_blob_is_named_by_its_sha256() -> None:
    assert closures.blob_id(b"abc").hex().startswith("ba7816bf8f01cfea414140de5dae2223")
    assert len(closures.blob_id(b"")) == 32


MAIN = """
import subprocess, sys
from dmap import closures

class Base:
    rate = 3
class Item(Base):
    def price(self, x):
        return super().rate * x + OFFSET
OFFSET = 1
def helper(x):
    return Item().price(x)
def func(x):
    return helper(x) if x else recursive(3)
def recursive(n):
    return n and 1 + recursive(n - 1)

code = '''
import sys
from dmap import closures
func = closures.load_function(sys.stdin.buffer.read())
print(func(0), func(2))
'''
blob = closures.dump_function(func)
subprocess.run([sys.executable, "-c", code], input=blob, check=True)
"""


def test_a_function_of_main_runs_in_another_process() -> None:
    out = subprocess.run(
        [sys.executable, "-c", MAIN], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (out.stdout, out.stderr) == ("3 7\n", "")


def unpicklable_captures() -> list[Any]:
    lock = threading.Lock()

    def closing(x: int) -> Any:
        return lock, x

    def by_global(x: int) -> Any:
        return [LOCK for _ in range(x)]

    def by_default(x: int, guard: Any = lock) -> Any:
        return guard, x

    def by_keyword(x: int, *, guard: Any = lock) -> Any:
        return guard, x

    # Those of an importable module would go by reference.
    namespace: dict[str, Any] = {"LOCK": LOCK, "__name__": "__main__"}
    moved = type(by_global)(by_global.__code__, namespace, "by_global")
    scale = Scale(3)
    scale.lock = lock  # type: ignore[attr-defined]
    return [
        pytest.param(closing, r"captured variable 'lock' of closing \(lock\)", id="closure"),
        pytest.param(moved, r"global 'LOCK' of by_global \(lock\)", id="global"),
        pytest.param(by_default, r"a default of by_default \(lock\)", id="default"),
        pytest.param(by_keyword, r"the default of 'guard' of by_keyword", id="keyword"),
        pytest.param(functools.partial(print, 1, lock), "argument 1 of partial", id="partial"),
        pytest.param(functools.partial(print, end=lock), "argument 'end' of partial", id="named"),
        pytest.param(functools.partial(closing), "the function of partial", id="partial of"),
        pytest.param(scale, r"attribute 'lock' of Scale \(lock\)", id="attribute"),
        pytest.param(scale.method, r"the object of Scale.method \(Scale\)", id="method"),
    ]


@pytest.mark.parametrize(("func", "words"), unpicklable_captures())
def test_a_capture_that_cannot_be_pickled_is_named(func: Callable[..., Any], words: str) -> None:
    with pytest.raises(ClosureError, match=words) as caught:
        closures.dump_function(func)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_variable_without_a_value_yet_hides_no_culprit() -> None:
    def func() -> Any:
        return early, lock

    lock = threading.Lock()
    with pytest.raises(ClosureError, match="captured variable 'lock'"):
        closures.dump_function(func)
    early = 1


def test_a_deeper_culprit_is_reported_with_the_function() -> None:
    class Opaque:
        __slots__ = ()

        def __call__(self) -> None: ...

        def __reduce__(self) -> str:
            raise ZeroDivisionError("at no time")

    with pytest.raises(
        ClosureError, match=r"the function Opaque \(Opaque\) .*ZeroDivisionError: at no time"
    ):
        closures.dump_function(Opaque())


def test_a_missing_module_is_named_with_the_host_and_its_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_at_the_client.py").write_text("def func(x): return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_at_the_client  # type: ignore[import-not-found]

    blob = closures.dump_function(only_at_the_client.func)
    monkeypatch.undo()
    del sys.modules["only_at_the_client"]
    with pytest.raises(
        ClosureError, match=rf"module 'only_at_the_client', which .* \(Python {sys.version[:4]}"
    ):
        closures.load_function(blob)


def test_a_function_that_is_not_in_its_module_here_is_a_closure_error() -> None:
    blob = closures.dump_function(triple).replace(b"triple", b"treble")
    with pytest.raises(ClosureError, match=r"cannot be loaded on .*treble"):
        closures.load_function(blob)


class AsyncCall:
    async def __call__(self, x: int) -> int:
        return x

    async def method(self, x: int) -> int:
        return x


async def coroutine(x: int) -> int:
    return x


async def generator(x: int) -> Any:
    yield x


@pytest.mark.parametrize(
    "func",
    [coroutine, generator, functools.partial(coroutine, 1), AsyncCall(), AsyncCall().method],
    ids=repr,
)
def test_an_async_function_is_refused(func: Callable[..., Any]) -> None:
    with pytest.raises(ClosureError, match="is an async function"):
        closures.check_callable(func)


@pytest.mark.parametrize("func", [len, triple, Scale, Scale(3), AsyncCall, functools.partial(len)])
def test_what_can_be_called_passes(func: Callable[..., Any]) -> None:
    closures.check_callable(func)


class NoRepr:
    def __repr__(self) -> str:
        raise ValueError("no repr")


@pytest.mark.parametrize("value", [[1, 2], None, "len", 3, NoRepr(), ["x" * 1000]])
def test_what_cannot_be_called_is_a_type_error_that_says_what_it_is(value: object) -> None:
    with pytest.raises(
        TypeError, match=f"must be a function, not {type(value).__name__}"
    ) as caught:
        closures.check_callable(value)
    assert len(str(caught.value)) < 200


def blobs(n: int) -> list[bytes]:
    return [closures.dump_function(functools.partial(int, str(i))) for i in range(n)]


def fill(cache: closures.FunctionCache, n: int) -> list[bytes]:
    ids = []
    for blob in blobs(n):
        ids.append(closures.blob_id(blob))
        cache.load(ids[-1], blob)
    return ids


def test_a_cached_function_is_the_one_that_was_loaded() -> None:
    cache = closures.FunctionCache()
    [blob] = blobs(1)
    func = cache.load(b"id", blob)
    assert cache.get(b"id") is func
    assert func() == 0


def test_an_unknown_blob_is_not_in_the_cache() -> None:
    assert closures.FunctionCache().get(b"id") is None


def test_the_least_recently_used_function_makes_room() -> None:
    cache = closures.FunctionCache(max_functions=2)
    first, second = fill(cache, 2)
    cache.get(first)
    cache.load(b"third", blobs(1)[0])
    assert (first in cache, second in cache, b"third" in cache) == (True, False, True)


def test_the_cache_is_bounded_by_the_bytes_of_its_blobs() -> None:
    nbytes = len(blobs(1)[0])
    cache = closures.FunctionCache(max_nbytes=2 * nbytes)
    ids = fill(cache, 4)
    assert [blob_id in cache for blob_id in ids] == [False, False, True, True]
    assert cache.nbytes == 2 * nbytes


def test_a_function_larger_than_the_cache_stays_alone() -> None:
    cache = closures.FunctionCache(max_nbytes=1)
    ids = fill(cache, 3)
    assert (len(cache), ids[-1] in cache) == (1, True)


def test_a_function_loaded_twice_counts_once() -> None:
    cache = closures.FunctionCache()
    [blob] = blobs(1)
    cache.load(b"id", blob)
    cache.load(b"id", blob)
    assert (len(cache), cache.nbytes) == (1, len(blob))


def test_what_does_not_load_changes_nothing() -> None:
    cache = closures.FunctionCache()
    with pytest.raises(ClosureError):
        cache.load(b"id", b"no body")
    assert (len(cache), cache.nbytes) == (0, 0)
