import functools
import operator
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, cast

import cloudpickle
import numpy as np
import pytest

from dmap import closures, functions, namespaces, pickling
from dmap.errors import ClosureError, DmapWarning
from dmap.tickets import Blob
from jobserver.machine import machine_id
from jobserver.protocol import SharedBody

ROOT = Path(__file__).parent.parent


Bodies: TypeAlias = list[bytes | memoryview]


def bodies_of(func: Callable[..., Any]) -> Bodies:
    """Return a function's blobs as they arrive."""
    return [body_of(blob) for blob in closures.Closure(func).blobs]


def body_of(blob: Blob) -> bytes | memoryview:
    return blob.body if isinstance(blob.body, bytes) else memoryview(blob.body[0])


def round_trip(func: Callable[..., Any]) -> Callable[..., Any]:
    return functions.load_function(bodies_of(func)).call


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


def test_a_function_of_an_installed_module_goes_by_reference() -> None:
    assert round_trip(textwrap.dedent) is textwrap.dedent
    assert len(closures.Closure(textwrap.dedent).blobs) == 1


def test_a_function_of_a_local_module_goes_with_its_module() -> None:
    func = round_trip(triple)
    assert func(2) == 6
    assert func is not triple
    assert len(closures.Closure(triple).blobs) == 2


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
    bodies = bodies_of(lambda: (small, large))
    for array in functions.load_function(bodies).call():
        assert not array.flags.writeable
        assert np.shares_memory(array, np.frombuffer(bodies[0], np.uint8))


def test_a_large_captured_array_is_a_blob_of_its_own() -> None:
    large = np.arange(200_000)
    bodies = bodies_of(lambda: large)
    array = functions.load_function(bodies).call()
    assert not array.flags.writeable
    assert np.shares_memory(array, np.frombuffer(bodies[-1], np.uint8))
    assert len(bodies[0]) < 10_000


def test_an_array_is_the_same_blob_in_whatever_function() -> None:
    large = np.arange(200_000)
    one, other = closures.Closure(lambda: large), closures.Closure(lambda: large + 1)
    assert one.blobs[0].id != other.blobs[0].id
    assert one.blobs[-1].id == other.blobs[-1].id


def test_what_the_user_writes_to_an_array_later_does_not_change_the_blob() -> None:
    large = np.zeros(200_000)
    closure = closures.Closure(lambda: large)
    large[0] = 1
    assert functions.blob_id(body_of(closure.blobs[-1])) == closure.blobs[-1].id


@pytest.mark.skipif(not machine_id(), reason="this system has no memory that can be shared")
def test_a_captured_array_lies_in_memory_that_is_named_to_others_while_the_closure_lives() -> None:
    large = np.zeros(200_000)
    closure = closures.Closure(lambda: large)
    body = closure.blobs[-1].body
    assert isinstance(body, SharedBody)
    assert os.fstat(body.memory.fd).st_size == large.nbytes
    del closure
    fd = body.memory.fd
    del body
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_where_no_memory_can_be_shared_a_captured_array_is_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    large = np.zeros(200_000)
    assert closures.Closure(lambda: large).blobs[-1].body == bytes(large)


def test_the_same_function_has_the_same_bytes() -> None:
    x = [1, 2, 3]
    func = lambda v: v + x  # noqa: E731
    assert closures.Closure(func).blobs == closures.Closure(func).blobs


def test_items_of_modules_that_the_function_has_need_nothing_more() -> None:
    closure = closures.Closure(triple)
    seen = pickling.Seen()
    seen.modules |= {__name__, "textwrap"}
    assert closure.blobs_for(seen) is closure.blobs


def test_items_of_another_local_module_take_it_along() -> None:
    closure = closures.Closure(textwrap.dedent)
    seen = pickling.Seen()
    pickling.dump([Scale(3)], seen)
    blobs = closure.blobs_for(seen)
    assert closure.blobs_for(seen) is blobs
    bundle = cast("bytes", blobs[1].body)
    assert __name__ in namespaces.Namespace(bundle).texts


def test_functions_with_the_same_modules_share_their_namespace() -> None:
    one, other = (functions.load_function(bodies_of(f)) for f in (triple, Scale(3).method))
    assert one.namespace is not None
    assert one.namespace is other.namespace


def test_a_function_by_value_wants_a_cloudpickle_of_the_same_kind() -> None:
    assert closures.Closure(lambda: 1).labels == (f"cloudpickle-{cloudpickle.__version__[0]}",)
    assert closures.Closure(triple).labels == ()


def test_source_lines_go_with_what_goes_by_value() -> None:
    function = functions.load_function(bodies_of(lambda: "these words"))
    (texts,) = function.sources.values()
    assert "these words" in "".join(texts.values())


def test_what_cannot_be_told_apart_is_never_merged_and_says_so_once() -> None:
    held = [threading.Lock()]
    closure = closures.Closure(len)
    with pytest.warns(DmapWarning, match=r"an item of len .*is not merged.*lock"):
        one = closure.uniq("map", held)
    assert one != closure.uniq("map", held)


def test_equal_items_have_equal_uniqs_by_the_kind_of_the_call_and_the_seed() -> None:
    uniqs = [closures.Closure(triple).uniq(kind, (1, 2)) for kind in ("map", "star", "call")]
    uniqs += [closures.Closure(triple).uniq("map", (1, 2), (7, index)) for index in range(2)]
    assert len(set(uniqs)) == 5
    assert closures.Closure(triple).uniq("map", (1, 2)) == uniqs[0]


def test_a_blob_is_named_by_its_sha256() -> None:
    assert functions.blob_id(b"abc").hex().startswith("ba7816bf8f01cfea414140de5dae2223")
    assert len(functions.blob_id(b"")) == 32


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
from dmap import functions
func = functions.load_function([sys.stdin.buffer.read()]).call
print(func(0), func(2))
'''
blob = closures.Closure(func).blobs[0]
subprocess.run([sys.executable, "-c", code], input=blob.body, check=True)
"""


def test_a_function_of_main_runs_in_another_process() -> None:
    out = subprocess.run(
        [sys.executable, "-c", MAIN], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (out.stdout, out.stderr) == ("3 7\n", "")


def test_what_is_in_the_way_is_named_with_the_path_to_it() -> None:
    pool = {"main": threading.Lock()}
    helper = lambda x: (pool, x)  # noqa: E731

    def func(x: int) -> Any:
        return helper(x)

    path = r"func -> closure 'helper' -> closure 'pool' -> \['main'\] is a lock \(_thread.lock\)"
    with pytest.raises(ClosureError, match=path) as caught:
        closures.Closure(func)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_missing_module_is_named_with_the_host_and_its_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "only_at_the_client.py").write_text("def func(x): return x\n")
    monkeypatch.syspath_prepend(folder)
    import only_at_the_client  # type: ignore[import-not-found]

    bodies = bodies_of(only_at_the_client.func)
    monkeypatch.undo()
    del sys.modules["only_at_the_client"]
    with pytest.raises(
        ClosureError, match=rf"no module only_at_the_client on .* \(Python {sys.version[:4]}"
    ):
        functions.load_function(bodies)


def test_a_function_that_is_not_in_its_module_here_is_a_closure_error() -> None:
    (body,) = bodies_of(textwrap.dedent)
    with pytest.raises(ClosureError, match=r"cannot be loaded on .*tnedef"):
        functions.load_function([bytes(body).replace(b"dedent", b"tnedef")])


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
