"""What makes two items the same: equal in type and value, in all depths, and nothing else."""

import array
import collections
import contextlib
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import math
import operator
import pathlib
import pickle
import random
import re
import struct
import sys
import textwrap
import threading
import time
import types
import typing
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmap import arrays, canonical, codes, definitions, identity, values
from dmap.identity import Definitions, Unidentifiable, closure_id, item_id

NAN = float("nan")
OTHER_NAN = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_0000_0001))[0]


class Color(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796
    BLUE = "blue"


class Hue(enum.Enum):
    RED = 1


class Access(enum.IntFlag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Point:
    x: float
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    first: object
    second: object = None


class Slotted:
    __slots__ = ("a", "unset")

    def __init__(self, a: object) -> None:
        self.a = a


Old = collections.namedtuple("Old", ["x", "y"])


class New(typing.NamedTuple):
    x: int
    y: int = 0


class Tags(set[Any]):
    pass


class Words(dict[str, int]):
    pass


class Name(str):
    pass


class Trouble(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Own:
    """Says itself what it is."""

    def __init__(self, key: object, rest: object = None) -> None:
        self.key = key
        self.rest = rest

    def __dmap_identity__(self) -> Any:
        if isinstance(self.key, Exception):
            raise self.key
        return self.key


class Reduced:
    """Is pickled as it is told."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return tuple(list(part) if type(part) is list else part for part in self.reduced)


def walked_id(value: object) -> bytes:
    """Return what a value's id would be without the shortcut for what is short."""
    part = definitions.ValueWalk(Definitions()).token(value)
    return canonical.digest_of(canonical.close(part) if isinstance(part, canonical.Node) else part)


def refusal(value: object) -> str:
    """Return why a value has no id."""
    with pytest.raises(Unidentifiable) as caught:
        item_id(value)
    return str(caught.value)


# Properties over plain data ----------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(max_size=100),
    st.text(min_size=40, max_size=60),
)
OTHERS = st.one_of(
    st.decimals(allow_nan=False),
    st.fractions(),
    st.dates(),
    st.datetimes(timezones=st.sampled_from([None, datetime.UTC])),
    st.timedeltas(),
    st.uuids(),
    st.sampled_from([*Color, *Access, Access.READ | Access.WRITE]),
    st.builds(pathlib.PurePosixPath, st.text("ab/.", max_size=5)),
    st.builds(range, st.integers(-3, 3), st.integers(-3, 3)),
    st.builds(slice, st.integers(-3, 3), st.none() | st.integers(-3, 3)),
    st.builds(bytearray, st.binary()),
)
KEYS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.binary()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
        st.lists(inner, max_size=3).map(collections.deque),
        st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict),
        st.dictionaries(KEYS, inner, max_size=3).map(
            lambda known: collections.defaultdict(list, known)
        ),
        st.builds(Point, inner, st.lists(inner, max_size=2)),
        st.builds(Pair, inner, inner),
        st.builds(Old, inner, inner),
        st.builds(Slotted, inner),
        st.builds(types.SimpleNamespace, a=inner),
        st.builds(functools.partial, st.just(print), inner, sep=inner),
    )


VALUES = st.recursive(SCALARS | OTHERS, containers, max_leaves=12)

# Few of them, and alike, so that two that are drawn are often equal.
NEAR = st.recursive(
    st.sampled_from(
        [0, 0.0, -0.0, False, 1, 1.0, True, 0j, complex(0.0, -0.0), "", b"", "1", b"1", None, NAN]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.frozensets(st.sampled_from([0, 0.0, False, 1, True, "1", b"1"]), max_size=2),
        st.dictionaries(st.sampled_from([0, 0.0, False, "1", b"1", ()]), inner, max_size=2),
    ),
    max_leaves=3,
)


def alike(one: Any, other: Any) -> bool:
    """Tell whether two plain values are equal in type and value: what `item_id` promises."""
    if type(one) is not type(other):
        return False
    match one:
        case float():
            both_nan = one != one and other != other
            return both_nan or (one == other and math.copysign(1, one) == math.copysign(1, other))
        case complex():
            return alike(one.real, other.real) and alike(one.imag, other.imag)
        case list() | tuple():
            return len(one) == len(other) and all(map(alike, one, other))
        case dict():
            return len(one) == len(other) and all(
                any(alike(key, k) and alike(one[key], other[k]) for k in other) for key in one
            )
        case frozenset():
            return len(one) == len(other) and all(any(alike(e, o) for o in other) for e in one)
    return bool(one == other)


@given(VALUES)
def test_a_copy_has_the_same_id(value: object) -> None:
    assert item_id(copy.deepcopy(value)) == item_id(value)


@given(VALUES)
def test_what_comes_out_of_a_pickle_has_the_same_id(value: object) -> None:
    assert item_id(pickle.loads(pickle.dumps(value))) == item_id(value)


@given(VALUES)
def test_the_shortcut_for_short_values_gives_what_the_long_way_gives(value: object) -> None:
    assert item_id(value) == walked_id(value)
    assert item_id((value,)) == walked_id((value,))


@given(NEAR, NEAR)
def test_two_values_have_one_id_if_and_only_if_they_are_equal_in_type_and_value(
    one: object, other: object
) -> None:
    assert (item_id(one) == item_id(other)) is alike(one, other)


def rebuilt(value: Any) -> Any:
    """Return an equal value whose dicts and sets were filled in the other order."""
    match value:
        case dict() if type(value) in (dict, collections.defaultdict):
            back = copy.copy(value)
            back.clear()
            back.update((rebuilt(k), rebuilt(v)) for k, v in reversed(value.items()))
            return back
        case set() | frozenset():
            # More elements make another table, in which the rest is in another order.
            back = set(range(10_000, 10_200)) | {rebuilt(each) for each in value}
            return type(value)(back - set(range(10_000, 10_200)))
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(map(rebuilt, value))
    return value


@given(VALUES)
def test_the_order_in_which_dicts_and_sets_were_filled_does_not_count(value: object) -> None:
    assert item_id(rebuilt(value)) == item_id(value)


def spots(value: Any) -> Iterator[Callable[[Any], Any]]:
    """Yield, for each place in a value, a function that gives the value with another one there."""

    def put(key: Any, new: Any) -> Any:
        match value:
            case list() | tuple():
                return type(value)([*value[:key], new, *value[key + 1 :]])
            case dict():
                return {**value, key: new}
        return dataclasses.replace(value, **{key: new})

    yield lambda new: new
    inner: dict[Any, Any] = {}
    if type(value) in (list, tuple):
        inner = dict(enumerate(value))
    elif type(value) is dict:
        inner = value
    elif isinstance(value, (Point, Pair)):
        inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for key, each in inner.items():
        for spot in spots(each):
            yield lambda new, key=key, spot=spot: put(key, spot(new))


@given(VALUES, st.data())
def test_any_change_gives_another_id(value: object, data: st.DataObject) -> None:
    spot = data.draw(st.sampled_from(list(spots(value))))
    assert item_id(spot(Name("no one else has this"))) != item_id(value)


@given(st.lists(SCALARS, max_size=3), st.lists(SCALARS, max_size=3))
def test_where_one_element_ends_and_the_next_begins_counts(
    one: list[object], other: list[object]
) -> None:
    assert (item_id([one, other]) == item_id([[], one + other])) is (not one)


# Pairs ---------------------------------------------------------------------------------------

DISTINCT: list[list[Any]] = [
    [1, 1.0, True, 1j, "1", b"1", decimal.Decimal(1), fractions.Fraction(1), Access.READ, [1]],
    [0, 0.0, -0.0, False, None, 0j, complex(-0.0, 0), "", b"", (), [], {}, set(), frozenset()],
    [NAN, math.inf, -math.inf, complex(NAN, 0), complex(0, NAN), complex(NAN, NAN)],
    [0j, complex(0, -0.0), complex(-0.0, 0), complex(-0.0, -0.0)],
    [["a" * 50, "b" * 50], ["a" * 50 + "S" + "b" * 50], ["a" * 50 + "S" + "b" * 50, ""]],
    [[b"a" * 50, b"b" * 50], [b"a" * 50 + b"B" + b"b" * 50], ["a" * 50, b"b" * 50]],
    [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 2**200, -(2**200)],
    ["a" * n for n in (47, 48, 49, 50)] + [b"a" * n for n in (47, 48, 49, 50)],
    ["\udcff", "\\udcff", "ÿ", b"\xff", bytearray(b"\xff"), memoryview(b"\xff")],
    [["ab", "c"], ["a", "bc"], ["abc"], ["a", ["bc"]], [["ab"], "c"], ["ab", ["c"]]],
    [{"a": 1}, {"a": 2}, {"b": 1}, {1: "a"}, {"a", 1}, ("a", 1), [("a", 1)], {"a": 1, "b": 1}],
    [{"a": 1, "b": 2}, {"a": 2, "b": 1}],
    [
        collections.OrderedDict(a=1, b=2),
        collections.OrderedDict(b=2, a=1),
        {"a": 1, "b": 2},
        collections.Counter(a=1, b=2),
        collections.defaultdict(int, a=1, b=2),
        collections.defaultdict(list, a=1, b=2),
        Words(a=1, b=2),
        types.MappingProxyType({"a": 1, "b": 2}),
        types.SimpleNamespace(a=1, b=2),
    ],
    [[1, 2], (1, 2), {1, 2}, frozenset((1, 2)), collections.deque((1, 2)), Old(1, 2), New(1, 2)],
    [collections.deque((1,)), collections.deque((1,), 5), collections.deque((1,), 6)],
    [{"a"}, Tags({"a"}), Tags({"b"}), frozenset({"a"})],
    ["a", Name("a"), pathlib.PurePosixPath("a"), pathlib.Path("a"), re.compile("a")],
    [re.compile("a"), re.compile("a", re.IGNORECASE), re.compile(b"a"), re.compile("b")],
    [range(3), range(0, 3, 2), range(1, 3), slice(3), slice(0, 3, 2), slice(None)],
    [
        Color.RED,
        Color.BLUE,
        Hue.RED,
        1,
        "blue",
        "RED",
        Access.READ,
        Access.WRITE,
        Access(3),
        Access(0),
    ],
    [Point(1, ["a"]), Point(1.0, ["a"]), Point(1, ["b"]), Pair(1, ["a"]), Pair(1), Slotted(1)],
    [
        ValueError("a"),
        ValueError("b"),
        TypeError("a"),
        ValueError("a", "b"),
        Trouble(1),
        Trouble(2),
    ],
    [datetime.date(2024, 2, 1), datetime.date(2024, 2, 2), datetime.datetime(2024, 2, 1)],
    [
        datetime.datetime(2024, 1, 1),
        datetime.datetime(2024, 1, 1, fold=1),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
    ],
    [decimal.Decimal("1.0"), decimal.Decimal("1.00"), decimal.Decimal("-0"), decimal.Decimal(0)],
    [uuid.UUID(int=1), uuid.UUID(int=2)],
    [array.array("i", [1]), array.array("l", [1]), array.array("i", [2])],
    [
        memoryview(b"abcd"),
        memoryview(b"abcd").cast("i"),
        memoryview(b"abcd").cast("b"),
        memoryview(b"abcd").cast("B", (2, 2)),
    ],
    [
        functools.partial(pow, 2),
        functools.partial(pow, 3),
        functools.partial(max, 2),
        functools.partial(pow, exp=2),
    ],
    [
        "a".upper,
        "b".upper,
        "a".lower,
        str.upper,
        [].append,
        {}.get,
        Point(1).__eq__,
        Point(1).__repr__,
        Point(2).__eq__,
    ],
    [len, print, math.sqrt, operator.add, operator.itemgetter(1), operator.itemgetter(2)],
    [dict.fromkeys, collections.OrderedDict.fromkeys, Words.fromkeys],
    [
        int,
        bool,
        float,
        type(None),
        types.FunctionType,
        type,
        object,
        Color,
        Point,
        collections.deque,
    ],
    [list, list[int], list[str], dict[str, int], typing.Any, list[list[int]]],
    [list[int], typing.List[int]],  # noqa: UP006
    [int | str, int | None, typing.Callable[..., int], typing.Callable[..., str]],
    [int | None, typing.Optional[int]],  # noqa: UP045
    [sys, math, len, "sys"],
    [Ellipsis, NotImplemented, None, "Ellipsis"],
    [Own(b"a"), Own(b"b"), Own(b""), b"a"],
    [
        Reduced(list, ()),
        Reduced(tuple, ()),
        Reduced(list, (1,)),
        Reduced(list, (), {"a": 1}),
        Reduced(list, (), None, [1]),
        Reduced(list, (), None, None, {1: 2}.items()),
        Reduced(list, (), {"a": 1}, None, None, setattr),
        Reduced(list, (), {"a": 1}, None, None, delattr),
    ],
]


@pytest.mark.parametrize("group", DISTINCT, ids=lambda group: repr(group[0])[:20])
def test_what_differs_has_another_id(group: list[Any]) -> None:
    ids = [item_id(value) for value in group]
    assert len(set(ids)) == len(group)
    assert all(len(one) == 32 for one in ids)


@pytest.mark.parametrize("group", DISTINCT, ids=lambda group: repr(group[0])[:20])
def test_what_differs_makes_what_holds_it_differ(group: list[Any]) -> None:
    assert len({item_id([{"a": value}]) for value in group}) == len(group)


SAME: list[tuple[Any, Any]] = [
    (NAN, OTHER_NAN),
    (complex(NAN, 1), complex(OTHER_NAN, 1)),
    ([NAN], [OTHER_NAN]),
    (Color.RED, Color.CRIMSON),
    (Access.READ | Access.WRITE, Access(3)),
    ("ab", "".join(["a", "b"])),
    (pathlib.Path("a/b"), pathlib.Path("a//./b/")),
    (Own(b"a", 1), Own(b"a", threading.Lock())),
    (memoryview(b"abcd")[::2], memoryview(b"a-c-")[::2]),
    (Tags([0, 8, 16]), Tags([16, 8, 0])),  # in one place of a small table
    (Words(a=1, b=2), Words(b=2, a=1)),
    (collections.Counter("aab"), collections.Counter("baa")),
    (random.random, __import__("random").random),
    (iter([1, 2]), iter([1, 2])),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=lambda each: repr(each)[:20])
def test_what_is_equal_has_one_id(one: object, other: object) -> None:
    assert item_id(one) == item_id(other)


def test_random_functions_are_told_by_their_names_not_by_the_generators_state() -> None:
    from random import randint, random

    before = item_id(random), item_id(randint)
    assert item_id(random) != item_id(randint)
    random()
    assert (item_id(random), item_id(randint)) == before


def test_whether_parts_are_one_object_does_not_count() -> None:
    part = [1, {"a": "b"}]
    assert item_id([part, part]) == item_id([part, copy.deepcopy(part)])


def test_what_copyreg_has_a_reducer_for_goes_by_that() -> None:
    class Held:
        def __init__(self, key: int) -> None:
            self.key = key
            self.lock = threading.Lock()

    import copyreg

    copyreg.pickle(Held, lambda held: (Pair, (held.key,)))  # type: ignore[arg-type]
    try:
        assert item_id(Held(1)) == item_id(Held(1)) != item_id(Held(2))
    finally:
        del copyreg.dispatch_table[Held]


def test_the_first_pickle_of_an_instance_changes_no_id() -> None:
    class Fresh:
        __slots__ = ("a",)

    before = item_id(Fresh())
    copy.copy(Fresh())  # leaves __slotnames__ in the class
    assert item_id(Fresh()) == before


def test_what_an_object_makes_for_its_pickle_only_is_not_taken_for_another() -> None:
    ids = {item_id([Reduced(list, (), [n, m]) for n in (1, m)]) for m in range(100)}
    assert len(ids) == 100


# Circles -------------------------------------------------------------------------------------


def loop(n: int, value: object = None) -> list[Any]:
    """Return a list that contains itself after n lists."""
    first: list[Any] = [value]
    last = first
    for _ in range(n - 1):
        last.append([value])
        last = last[-1]
    last.append(first)
    return first


def test_data_that_contains_itself_has_an_id() -> None:
    assert item_id(loop(3)) == item_id(loop(3)) == item_id(copy.deepcopy(loop(3)))
    assert item_id(loop(3)) != item_id(loop(3, 1))


def test_a_circle_is_told_by_what_can_be_seen_in_it() -> None:
    assert item_id(loop(1)) == item_id(loop(2)) == item_id(loop(7))


def test_an_id_does_not_depend_on_where_a_circle_was_entered() -> None:
    first: list[Any] = ["first"]
    second: list[Any] = ["second", first]
    first.append(second)
    assert item_id((first, second)) != item_id((second, first))
    other: list[Any] = ["second"]
    other.append(["first", other])
    assert item_id(second) == item_id(other)
    assert item_id([second, first]) == item_id([other, other[1]])


def test_a_change_anywhere_in_a_circle_gives_another_id() -> None:
    def ring(names: str) -> Any:
        nodes = [types.SimpleNamespace(name=name) for name in names]
        for node, following in zip(nodes, nodes[1:] + nodes[:1], strict=True):
            node.next = following
            node.seen = {"all": nodes}
        return nodes[0]

    ids = {item_id(ring(names)) for names in ("abcd", "abce", "abdc", "aacd", "abcdabc", "aaaa")}
    assert len(ids) == 6
    assert item_id(ring("abab")) == item_id(ring("abab"))


def test_a_set_in_a_circle_has_no_order() -> None:
    def knot(names: list[str]) -> Any:
        nodes = {name: types.SimpleNamespace(name=name) for name in names}
        for node in nodes.values():
            node.others = {each: nodes[each] for each in names}
        return nodes["a"]

    assert item_id(knot(["a", "b", "c"])) == item_id(knot(["c", "a", "b"]))


def test_methods_that_their_objects_hold_are_told_apart_in_circles() -> None:
    class Held:
        def call(self) -> None: ...

    def held(leads_to: str) -> Any:
        one, two = Held(), Held()
        one.name, two.name = "one", "two"  # type: ignore[attr-defined]
        methods = {"one": one.call, "two": two.call}
        one.itself, one.other = methods["one"], methods["two"]  # type: ignore[attr-defined]
        two.itself, two.back = methods["two"], methods[leads_to]  # type: ignore[attr-defined]
        return methods["one"]

    assert item_id(held("one")) == item_id(held("one")) != item_id(held("two"))


def test_where_an_exception_was_raised_does_not_count() -> None:
    error = ValueError("a")
    with contextlib.suppress(ValueError):
        raise error
    assert item_id(error) == item_id(ValueError("a"))


def test_much_sharing_costs_little() -> None:
    value: Any = ["leaf"]
    for _ in range(80):
        value = [value, value]
    assert item_id(value) == item_id(copy.deepcopy(value))


def test_much_sharing_in_circles_costs_little() -> None:
    top: list[Any] = ["top"]
    value: Any = top
    for _ in range(80):
        value = [value, value]
    top.append(value)
    assert item_id(top) == item_id(copy.deepcopy(top))


# What cannot be identified --------------------------------------------------------------------


def a_generator() -> Iterator[int]:
    yield 1


class RaisesOnReduce:
    def __reduce__(self) -> Any:
        raise KeyError("no")


class ReducesToNothing:
    def __reduce__(self) -> Any:
        return 3


class Endless:
    def __reduce__(self) -> Any:
        return Endless, (), {"more": Endless()}


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (threading.Lock, "is a _thread.lock"),
        (threading.RLock, "is a _thread.RLock"),
        (threading.local, "is a _thread._local"),
        (a_generator, "is a generator"),
        (lambda: map(str, a_generator()), "is a generator"),
        (lambda: weakref.ref(Color), "is a weakref.ReferenceType"),
        (lambda: iter({1, 2}), "is a set_iterator"),
        (lambda: {}.keys(), "is a dict_keys"),
        (RaisesOnReduce, "(KeyError: 'no')"),
        (ReducesToNothing, "neither a string nor a tuple"),
        (Endless, "nested too deeply"),
        (lambda: types.ModuleType("nowhere"), "is the module nowhere"),
        (lambda: Own("text"), "must return bytes"),
        (lambda: Own(KeyError("no")), "(KeyError: 'no')"),
        (lambda: sys._getframe(), "is a frame"),
    ],
)
def test_what_has_no_stable_identity_is_refused(make: Callable[[], Any], what: str) -> None:
    assert what in refusal(make())
    assert what in refusal([make()])


def test_an_open_file_is_refused() -> None:
    with open(__file__) as file:
        assert "is a _io.TextIOWrapper" in refusal(file)


def test_the_error_has_the_path_to_what_is_in_the_way() -> None:
    held = types.SimpleNamespace(lock=threading.Lock())
    text = refusal(Point(1, [("a", {"key": held})]))  # type: ignore[list-item]
    assert text.startswith("Point -> .tags -> [0] -> [1] -> ['key'] -> .lock is a _thread.lock")


def test_the_path_goes_through_slots_partials_and_keys() -> None:
    lock = threading.Lock()
    assert "Slotted -> .a -> .args -> [0] is a" in refusal(Slotted(functools.partial(pow, lock)))
    assert "[<unlocked _thread.lock object" in refusal({lock: 1})


def test_a_long_path_is_cut_in_its_middle() -> None:
    value: Any = threading.Lock()
    for _ in range(100):
        value = [value]
    text = refusal(value)
    assert " -> ... -> " in text
    assert len(text) < 300


def test_what_is_nested_too_deeply_is_refused() -> None:
    value: list[Any] = []
    for _ in range(5 * sys.getrecursionlimit()):
        value = [value]
    assert "list is nested too deeply" in refusal(value)
    with pytest.raises(Unidentifiable, match="nested too deeply"):
        closure_id(lambda: value)


def test_what_could_not_be_identified_once_can_be_when_it_has_changed() -> None:
    known = Definitions()
    value: Any = [1, [2, threading.Lock()]]
    with pytest.raises(Unidentifiable):
        item_id(value, known)
    value[1][1] = 3
    assert item_id(value, known) == item_id([1, [2, 3]])


def test_a_dict_that_changes_meanwhile_is_refused_this_time() -> None:
    shared: dict[Any, Any] = {}

    class Grows:
        def __dmap_identity__(self) -> bytes:
            shared[len(shared)] = 1
            return b""

    shared[0] = Grows()
    assert "changed size" in refusal(shared)


class Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


@pytest.mark.parametrize("kind", [Own, Raises])
def test_memory_that_runs_out_is_said_to_have_run_out(kind: type) -> None:
    with pytest.raises(MemoryError):
        item_id(kind(MemoryError()))


@pytest.mark.parametrize("kind", [Own, Raises])
def test_depth_is_what_is_blamed_for_a_recursion_error(kind: type) -> None:
    assert refusal(kind(RecursionError())).startswith(f"{kind.__name__} is nested too deeply")


# Uniqs ---------------------------------------------------------------------------------------


def test_a_uniq_is_of_function_item_and_seed() -> None:
    function, item = b"f" * 32, item_id(1)
    uniqs = {
        identity.item_uniq(function, item),
        identity.item_uniq(b"g" * 32, item),
        identity.item_uniq(function, item_id(2)),
        identity.item_uniq(function, item, (0, 0)),
        identity.item_uniq(function, item, (0, 1)),
        identity.item_uniq(function, item, (1, 0)),
        identity.item_uniq(b"", item),
    }
    assert {len(uniq) for uniq in uniqs} == {32}
    assert len(uniqs) == 7
    assert identity.item_uniq(function, item, (2**70, 1)) == identity.item_uniq(
        function, item, (2**70, 1)
    )


def test_the_uniq_of_a_named_call_is_that_of_its_arguments() -> None:
    uniq = identity.argument_uniq
    assert uniq((1,), {"a": 1, "b": 2}) == uniq((1,), {"b": 2, "a": 1})
    assert len({uniq((1,), {}), uniq((1.0,), {}), uniq((), {"a": 1}), uniq((), {})}) == 4
    with pytest.raises(Unidentifiable):
        uniq((threading.Lock(),), {})


# What is known of classes ----------------------------------------------------------------------


def test_what_is_known_of_a_class_is_what_would_be_found_out() -> None:
    known = Definitions()
    for value in (Point(1), [Point(2), Pair(3), Color.RED], Point, len, Trouble(1), Old(1, 2)):
        assert item_id(value, known) == item_id(value)
        assert item_id([value], known) == item_id([value])


def test_a_class_is_looked_at_once_by_who_knows_it_then() -> None:
    class Rated:
        rate = 1

    known = Definitions()
    before = item_id(Rated(), known)
    Rated.rate = 2
    assert item_id(Rated(), known) == before
    assert item_id(Rated()) != before


def test_what_a_class_leads_to_may_be_the_item_itself() -> None:
    class Kept:
        every: list[Any] = []  # noqa: RUF012

    Kept.every += [Kept(), Kept()]
    known = Definitions()
    first = item_id(Kept.every, known)
    assert item_id(Kept.every, known) == item_id(Kept.every) == first
    assert item_id(Kept, known) == item_id(Kept)


def test_all_kinds_of_things_have_tags_of_their_own() -> None:
    tags = [
        value
        for module in (canonical, codes, values, arrays, definitions)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, bytes) and len(value) == 1 and value[0] >= 0x80
        if module is canonical or vars(canonical).get(name) is not value
        if module is values or vars(values).get(name) is not value
    ]
    assert len(tags) > 40
    assert len(set(tags)) == len(tags)


def test_a_short_item_takes_some_two_microseconds() -> None:
    def seconds(value: object) -> float:
        start = time.perf_counter()
        for _ in range(1000):
            item_id(value)
        return (time.perf_counter() - start) / 1000

    # Ten times what it takes: this is to notice a shortcut that is no more.
    for value in (5, "short", (1, "abc", 2.0)):
        assert min(seconds(value) for _ in range(5)) < 20e-6


# Fingerprints ----------------------------------------------------------------------------------


def test_a_function_is_the_same_until_something_that_it_uses_is_another() -> None:
    scope: dict[str, Any] = {"__name__": "__main__", "rate": 1}
    exec("def priced(x):\n    return x * rate", scope)
    before = identity.fingerprint(scope["priced"])
    assert before is not None
    assert before.holds()
    scope["rate"] = 2
    assert not before.holds()
    after = identity.fingerprint(scope["priced"])
    assert after is not None
    assert after.holds()
    del scope["rate"]
    assert not after.holds()


def _define_a_global(scope: dict[str, Any]) -> None:
    scope["hidden"] = 1


def _take_another_code(scope: dict[str, Any]) -> None:
    scope["f"].__code__ = (lambda y: lambda x: y)(2).__code__


def _take_another_default(scope: dict[str, Any]) -> None:
    scope["f"].__defaults__ = (2,)


def _take_an_attribute(scope: dict[str, Any]) -> None:
    scope["f"].rate = 2


def _fill_a_cell(scope: dict[str, Any]) -> None:
    scope["f"].__closure__[0].cell_contents = 3


def _empty_a_cell(scope: dict[str, Any]) -> None:
    del scope["f"].__closure__[0].cell_contents


@pytest.mark.parametrize(
    "change",
    [
        _define_a_global,
        _take_another_code,
        _take_another_default,
        _take_an_attribute,
        _fill_a_cell,
        _empty_a_cell,
    ],
)
def test_a_fingerprint_holds_until_something_of_its_function_changes(
    change: Callable[[dict[str, Any]], None],
) -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    text = "def make(y):\n    def f(x, z=1):\n        return x + y + z + hidden\n    return f\n"
    exec(text + "f = make(2)\nother = make", scope)
    fingerprint = identity.fingerprint(scope["f"])
    assert fingerprint is not None
    assert fingerprint.holds()
    scope["other"] = 1
    assert fingerprint.holds()
    change(scope)
    assert not fingerprint.holds()


def test_a_fingerprint_does_not_hold_when_a_module_has_something_else_by_that_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fingerprint = identity.fingerprint(textwrap.dedent)
    assert fingerprint is not None
    assert fingerprint.holds()
    monkeypatch.setattr(textwrap, "dedent", len)
    assert not fingerprint.holds()


def test_a_function_over_what_may_change_unseen_has_no_fingerprint() -> None:
    rates = [1]
    assert identity.fingerprint(lambda x: x * rates[0]) is None
