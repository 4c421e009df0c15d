import bisect
import copyreg
import ctypes
import datetime
import fractions
import functools
import io
import json
import math
import multiprocessing
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmap import pickling
from dmap.errors import ClosureError, ProtocolError

ROOT = Path(__file__).parent.parent
MIB = 2**20


def joined(body: object) -> bytes:
    """Return a body as the other side has it after the wire."""
    return body if isinstance(body, bytes) else b"".join(body)  # type: ignore[arg-type]


def round_trip(value: object) -> Any:
    return pickling.loads(joined(pickling.dumps(value)))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(plain)
def test_plain_values_come_back_equal(value: object) -> None:
    assert round_trip(value) == value


@given(st.lists(st.integers(0, 3 * pickling.INLINE_NBYTES), max_size=6))
def test_arrays_of_any_sizes_come_back_equal(lengths: list[int]) -> None:
    arrays = [np.arange(length, dtype=np.uint8) for length in lengths]
    back = round_trip({"arrays": arrays})["arrays"]
    assert all(map(np.array_equal, arrays, back))
    assert len(arrays) == len(back)


@pytest.mark.parametrize(
    "value",
    [5, 1.5, None, True, "text", 3j, range(7), (1, "a"), [1, 2], {"a": 1}, ((5,), {}), (1, [2])],
    ids=repr,
)
def test_short_plain_values_are_bare_pickles(value: object) -> None:
    assert pickling.dumps(value) == pickle.dumps(value, 5)


@pytest.mark.parametrize("nbytes", [0, 1, 255, 256, 65_535, 65_536, MIB - 1, MIB, 3 * MIB])
def test_a_bytes_object_of_any_length_comes_back(nbytes: int) -> None:
    assert round_trip(bytes(nbytes)) == bytes(nbytes)


def test_a_large_bytes_object_is_not_copied() -> None:
    large = bytes(2 * MIB)
    parts = pickling.dumps([large])
    assert any(part is large for part in parts)


def test_a_large_array_is_not_copied() -> None:
    array = np.zeros(2 * MIB, np.uint8)
    parts = pickling.dumps(array)
    assert isinstance(parts, tuple)
    assert np.shares_memory(np.frombuffer(parts[-1], np.uint8), array)


def test_a_short_body_is_one_bytes_object() -> None:
    assert type(pickling.dumps(np.zeros(pickling.JOINED_NBYTES // 2, np.uint8))) is bytes


def test_the_buffers_of_a_body_are_aligned() -> None:
    body = joined(pickling.dumps([np.full(5000, 7, np.uint8), np.full(5001, 8, np.uint8)]))
    assert body.index(bytes([7]) * 5000) % 64 == 0
    assert body.index(bytes([8]) * 5001) % 64 == 0


def test_a_body_may_come_in_parts() -> None:
    body = joined(pickling.dumps(np.arange(1000)))
    assert pickling.loads((body[:10], memoryview(body)[10:]))[-1] == 999


@pytest.mark.parametrize("length", [10, 100_000])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_results_are_writable(kind: Callable[[bytes], Any], length: int) -> None:
    array = pickling.loads(kind(joined(pickling.dumps(np.arange(length)))))
    array[0] = 5
    assert array[0] == 5


@pytest.mark.parametrize("length", [10, 100_000])
def test_a_row_of_a_read_only_array_is_a_writable_result(length: int) -> None:
    captured = np.zeros((2, length))
    captured.flags.writeable = False
    assert round_trip(captured[1]).flags.writeable


@pytest.mark.parametrize("length", [1, 10, 100_000])
def test_captured_arrays_are_read_only(length: int) -> None:
    body = joined(pickling.dump_function(np.arange(length), pickling.Seen())[0])
    assert not pickling.loads(bytearray(body), readonly=True).flags.writeable


def test_a_captured_array_is_a_view_of_the_body() -> None:
    body = joined(pickling.dump_function(np.arange(10), pickling.Seen())[0])
    array = pickling.loads(body, readonly=True)
    assert np.shares_memory(array, np.frombuffer(body, np.uint8))


def test_a_large_captured_array_is_external() -> None:
    small, large = np.arange(10), np.arange(200_000)
    body, external = pickling.dump_function([small, large], pickling.Seen(), max_external=1)
    assert len(joined(body)) < 1000
    assert len(external) == 1
    assert pickling.count_external(joined(body)) == 1
    shared = bytes(external[0])
    loaded = pickling.loads(body, readonly=True, external=[shared])
    assert np.array_equal(loaded[1], large)
    assert not loaded[1].flags.writeable
    assert np.shares_memory(loaded[1], np.frombuffer(shared, np.uint8))


def test_no_more_buffers_are_external_than_may_be() -> None:
    arrays = [np.arange(200_000), np.arange(200_000) + 1]
    body, external = pickling.dump_function(arrays, pickling.Seen(), max_external=1)
    assert len(external) == 1
    assert np.array_equal(pickling.loads(body, readonly=True, external=external)[1], arrays[1])


@pytest.mark.parametrize("external", [[], [b"short"]])
def test_a_missing_external_buffer_is_refused(external: list[bytes]) -> None:
    body, _ = pickling.dump_function(np.arange(200_000), pickling.Seen(), max_external=1)
    with pytest.raises(ProtocolError, match="external buffer of 1600000 bytes is missing"):
        pickling.loads(body, external=external)


def test_a_read_only_array_that_is_captured_is_not_copied_into_the_pickle() -> None:
    array = np.arange(200_000)
    array.flags.writeable = False
    body, external = pickling.dump_function(array, pickling.Seen(), max_external=1)
    assert len(joined(body)) < 1000
    assert len(external) == 1


def test_what_a_pickle_counts_on_is_told() -> None:
    seen = pickling.Seen()
    pickling.dump([fractions.Fraction(1, 2), math], seen)
    assert {"fractions", "math"} <= seen.modules
    assert not seen.by_value


def test_what_goes_by_value_is_told_with_what_it_may_import() -> None:
    def func() -> object:
        import colorsys

        return colorsys

    seen = pickling.Seen()
    pickling.dump(func, seen)
    assert seen.functions == [func]
    assert seen.by_value
    assert "colorsys" in seen.modules


def test_the_array_that_fills_a_writable_body_is_a_view_of_it() -> None:
    body = bytearray(joined(pickling.dumps(np.arange(100_000))))
    assert np.shares_memory(pickling.loads(body), np.frombuffer(body, np.uint8))


def test_a_small_array_does_not_keep_the_body() -> None:
    body = bytearray(joined(pickling.dumps([np.arange(1000), np.arange(100_000)])))
    small, _ = pickling.loads(body)
    assert not np.shares_memory(small, np.frombuffer(body, np.uint8))


def test_arrays_that_are_not_contiguous_travel() -> None:
    array = np.arange(20_000).reshape(100, 200)[::2, ::3]
    assert np.array_equal(round_trip(array), array)


def test_a_user_may_pass_a_pickle_buffer() -> None:
    assert bytes(round_trip(pickle.PickleBuffer(bytearray(b"x" * 10_000)))) == b"x" * 10_000


@dataclass
class Point:
    x: int


class Registered:
    def __init__(self, x: int) -> None:
        self.x = x


@functools.lru_cache(maxsize=7)
def cached(x: int) -> int:
    return x + 1


def test_what_can_be_imported_goes_by_reference() -> None:
    assert round_trip(Point) is Point
    assert round_trip(Point(3)) == Point(3)
    assert round_trip(cached) is cached


def test_a_copyreg_reducer_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = lambda value: (Registered, (value.x + 1,))  # noqa: E731
    monkeypatch.setitem(copyreg.dispatch_table, Registered, reduce)
    assert round_trip([Registered(3)])[0].x == 4


def test_a_local_class_goes_by_value() -> None:
    class Local:
        x = 4

    value = pickling.dumps(Local())
    assert round_trip(Local()).x == 4
    assert b"Local" in joined(value)


@pytest.mark.parametrize(
    "around",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: (x, 1),
        lambda x: {x: 1},
        lambda x: {1: x},
        lambda x: ([x], {}),
    ],
    ids=["alone", "list", "tuple", "key", "value", "nested"],
)
def test_a_local_class_goes_by_value_alone_and_in_a_short_container(
    around: Callable[[Any], Any],
) -> None:
    class Number(int):
        pass

    # Equal to an int, and no int: what looks at values instead of types is deceived.
    assert round_trip(around(Number(3))) == around(3)


def test_a_cached_local_function_goes_by_value_with_its_bound() -> None:
    step = 2
    back = round_trip(functools.lru_cache(maxsize=3, typed=True)(lambda x: x + step))
    assert back(1) == 3
    assert back.cache_parameters() == {"maxsize": 3, "typed": True}


MAIN = """
import enum, functools, collections, dataclasses, subprocess, sys
from dmap import pickling

@dataclasses.dataclass
class Item:
    x: int
class Colour(enum.Enum):
    RED = 1
Pair = collections.namedtuple("Pair", "a b")
class Number(int):
    pass
@functools.cache
def cached(x):
    return x + 1
def by_name(x):
    return x * 2

values = [Item(1), Colour.RED, Pair(1, Item(2)), Number(3), cached, by_name, Item, {Number(3): 1}]
code = '''
import sys
from dmap import pickling
pickled = sys.stdin.buffer.read()
values = pickling.loads(pickled)
assert values[4](1) == 2 and values[5](4) == 8
sys.stdout.buffer.write(b"".join([pickling.dumps(values)]))
'''
for value in [*values, values]:
    body = pickling.dumps(value)
    if type(value) is list:
        out = subprocess.run([sys.executable, "-c", code], input=body, stdout=-1, check=True)
        back = pickling.loads(out.stdout)
        equal = back[:4] == values[:4] and back[7] == values[7]
        print(equal, back[6] is Item, [type(one).__name__ for one in back])
"""


def test_what_main_defines_goes_to_another_process_and_comes_back_as_itself() -> None:
    out = subprocess.run(
        [sys.executable, "-c", MAIN], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    names = ["Item", "Colour", "Pair", "Number", "_lru_cache_wrapper", "function", "type", "dict"]
    assert (out.stdout, out.stderr) == (f"True True {names}\n", "")


def test_cloudpickle_is_loaded_only_when_something_needs_it() -> None:
    code = (
        "import sys; from dmap import pickling; pickling.loads(pickling.dumps((1, 'a'))); "
        "assert 'cloudpickle' not in sys.modules; pickling.dumps(sys.intern); "
        "assert 'cloudpickle' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_standard_stream_is_that_of_the_process_where_it_arrives(
    name: str, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if replaced:
        monkeypatch.setattr(sys, name, io.StringIO())
    body = pickling.dumps([getattr(sys, name)])
    there = io.StringIO()
    monkeypatch.setattr(sys, name, there)
    assert pickling.loads(joined(body))[0] is there


def test_text_in_memory_travels_while_such_a_text_is_the_standard_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert round_trip(io.StringIO("text")).read() == "text"


def test_an_open_text_file_is_refused_instead_of_read() -> None:
    with open(__file__) as file, pytest.raises(ClosureError, match=r"\(TextIOWrapper\) .* a file"):
        pickling.dumps(file)


def test_a_memoryview_arrives_as_its_bytes_or_not_at_all() -> None:
    assert round_trip(memoryview(b"abc")) == b"abc"
    for view in (memoryview(b"12345678").cast("I"), memoryview(b"1234").cast("B", (2, 2))):
        with pytest.raises(ClosureError, match="a memoryview"):
            pickling.dumps(view)


@pytest.mark.parametrize("make", [lambda: ctypes.CDLL(None), lambda: ctypes.PyDLL(None)])
def test_a_library_that_could_not_be_loaded_again_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ClosureError, match="a library in C"):
        pickling.dumps(make())


def test_an_end_of_a_pipe_is_refused() -> None:
    for end in multiprocessing.Pipe():
        # A copy would close a file of the process where it is dropped.
        with end, pytest.raises(ClosureError, match="an end of a pipe"):
            pickling.dumps(end)


@pytest.mark.parametrize("value", [type(iter([])), type({}.keys()), sys.flags, ctypes.c_int * 3])
def test_a_type_made_in_c_that_no_module_has_is_refused(value: object) -> None:
    with pytest.raises(pickle.PicklingError, match="no module has the type"):
        pickling.dump([value])


def test_types_made_in_c_travel_by_their_names() -> None:
    values = [dict, type(None), types.FunctionType, type(datetime.date.today), ctypes.c_int]
    assert round_trip(values) == values


class Tensor:
    """As torch has it, as far as pickling looks at it."""

    def __init__(self, is_cuda: bool) -> None:
        self.is_cuda = is_cuda


class Parameter(Tensor):
    pass


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch")
    module.Tensor = Tensor  # type: ignore[attr-defined]
    monkeypatch.setattr(Tensor, "__module__", "torch")
    monkeypatch.setitem(sys.modules, "torch", module)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("kind", [Tensor, Parameter])
def test_a_cuda_tensor_is_refused(kind: type[Tensor]) -> None:
    with pytest.raises(ClosureError, match=r"\['w'\] is a CUDA tensor .*; send \.cpu\(\) of it"):
        pickling.dumps({"w": kind(is_cuda=True)})


@pytest.mark.usefixtures("torch")
def test_other_tensors_travel() -> None:
    assert round_trip([Tensor(is_cuda=False)])[0].is_cuda is False


def test_without_torch_nothing_is_a_tensor() -> None:
    assert round_trip([Tensor(is_cuda=True)])[0].is_cuda is True


class Refuses:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> str:
        raise self.error


TOO_DEEP = 100_000  # nested lists for any Python; where the limit is differs


def nested(depth: int) -> list[Any]:
    outer: list[Any] = []
    for _ in range(depth):
        outer = [outer]
    return outer


def generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (threading.Lock(), "lock"),
        (generator(), "generator, which cannot be pickled: make a list"),
        (map(str, [threading.Lock()]), "map, which cannot be pickled: make a list"),
        (nested(TOO_DEEP), "nested too deeply"),
        (Refuses(ZeroDivisionError("at no time")), "ZeroDivisionError: at no time"),
        (functools.partial(print, threading.Lock()), r"\(partial\) .* -> argument 0 is a lock"),
    ],
    ids=["lock", "generator", "map", "deep", "reduce", "partial"],
)
def test_what_cannot_be_pickled_is_refused_in_plain_words(value: object, words: str) -> None:
    with pytest.raises(ClosureError, match=words) as caught:
        pickling.dumps(value)
    assert isinstance(caught.value.__cause__, Exception)
    assert caught.value.index is None


class SilentError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def test_an_error_without_a_text_is_reported_by_its_type() -> None:
    with pytest.raises(ClosureError, match="SilentError"):
        pickling.dumps(Refuses(SilentError()))


def test_running_out_of_memory_is_not_the_fault_of_the_value() -> None:
    with pytest.raises(MemoryError):
        pickling.dumps(Refuses(MemoryError()))
    with pytest.raises(MemoryError):
        pickling.dumps_items([Refuses(MemoryError())])


@pytest.mark.parametrize(
    "items", [[1, 2], (1, 2), range(5), [], [datetime.date(2005, 6, 2)]], ids=repr
)
def test_items_come_back_as_the_sequence_they_were(items: Any) -> None:
    back = pickling.loads(joined(pickling.dumps_items(items)))
    assert (type(back), back) == (type(items), items)


def test_items_of_another_sequence_come_back_as_a_list() -> None:
    assert pickling.loads(joined(pickling.dumps_items("abc"))) == ["a", "b", "c"]


def test_items_come_back_behind_their_head() -> None:
    body = joined(pickling.dumps_items([1, 2], head=("map", True)))
    assert pickling.loads(body) == ("map", True, [1, 2])


def test_the_item_that_cannot_be_pickled_is_named_by_its_index_in_the_map() -> None:
    with pytest.raises(ClosureError, match=r"result of item 102 \(lock\)") as caught:
        pickling.dumps_items([1, 2, threading.Lock(), 4], start=100, what="result of item")
    assert caught.value.index == 102
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_list_whose_items_could_go_alone_names_no_item() -> None:
    def index_of(item: list[Any]) -> int | None:
        try:
            pickling.dumps_items([item], start=7)
        except ClosureError as error:
            return error.index
        return -1

    # From some depth on the list around the item is too much, and from the next on the item.
    # Which one differs from Python to Python.
    depths = range(100, TOO_DEEP)
    edge = depths[bisect.bisect(depths, 0, key=lambda depth: index_of(nested(depth)) != -1)]
    assert {index_of(nested(depth)) for depth in range(edge - 10, edge + 10)} == {-1, None, 7}


body = joined(pickling.dumps([np.arange(5000), np.arange(6000)]))


@pytest.mark.parametrize(
    "bad",
    [b"", b"\x01", b"\x02" * 100, body[:17], body[:-1], body + b"x", b"\x01" + b"\xff" * 100],
    ids=["empty", "short", "mark", "header", "cut", "long", "absurd"],
)
def test_what_is_no_body_is_refused(bad: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"a body of \d+ bytes"):
        pickling.loads(bad)


def test_the_protocol_of_json_is_no_body() -> None:
    with pytest.raises(ProtocolError):
        pickling.loads(json.dumps({"a": 1}).encode())
