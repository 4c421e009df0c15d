"""What makes two functions or classes the same, in this process and in any other one."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmap.canonical import Node, close
from dmap.identity import Definitions, Unidentifiable, closure_id, item_id

WITHIN = 60.0

# A script with all kinds of functions and classes, and two modules beside it. -------------------

SCRIPT = '''
import abc, collections, dataclasses, enum, functools, math, typing
import helper
from helper import weigh, Scale
import parts.inner as inner

RATE = 3
TABLE = {"a": [1, 2.5], "b": {"x", "y", "z"}, "c": frozenset(("red", "green", "blue"))}
SECRET = "unused"
T = typing.TypeVar("T")

def double(x):
    return 2 * x

def priced(x):
    return double(x) * RATE

def listed(x, by=2, *, plus=(1, "a"), name={"k": 1}):
    return [x * by, plus, name, TABLE]

def member(x):
    """In the constants of this one is a frozenset."""
    return x in {"red", "green", "blue", "grey"} and x not in (0.0, "a")

def ping(n):
    return n and pong(n - 1)

def pong(n):
    return n and ping(n - 1)

def make(n, word):
    hidden = [n, {word, "other"}]
    def inner(x):
        def innermost():
            return [x, hidden, word]
        return innermost
    return inner

captured = make(7, "word")

def twice(func):
    @functools.wraps(func)
    def wrapper(x):
        return func(func(x))
    return wrapper

@twice
def wrapped(x):
    return x + 1

@functools.lru_cache(maxsize=8)
def cached(x):
    return x * RATE

@functools.singledispatch
def kind(x):
    return "other"

@kind.register
def _(x: int):
    return "int"

bound = functools.partial(listed, by=5)

def with_attribute(x):
    return with_attribute.factor * x
with_attribute.factor = 4

class Base(abc.ABC):
    rate = 2
    @abc.abstractmethod
    def price(self, x): ...

class Shop(Base):
    """A shop."""
    __slots__ = ("a", "b")
    def price(self, x):
        return super().price(x) or double(x) + self.rate
    @property
    def name(self):
        return "shop"
    @staticmethod
    def negated(x):
        return -x
    @classmethod
    def made(cls, x):
        return cls()
    @functools.cached_property
    def costly(self):
        return RATE

def shopping(x):
    return Shop().price(x)

@dataclasses.dataclass
class Point:
    x: int
    y: "float" = 0.5
    tags: list[str] = dataclasses.field(default_factory=list, metadata={"unit": "m"})

@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Pair:
    first: int
    second: int = 2

class Color(enum.Enum):
    RED = 1
    BLUE = {"x", "y", "z"}
    def shade(self):
        return RATE

class Mode(enum.IntFlag):
    READ = enum.auto()
    WRITE = enum.auto()

Old = collections.namedtuple("Old", "x y", defaults=[1])

class New(typing.NamedTuple):
    x: int
    y: int = 2

class Box(typing.Generic[T]):
    def get(self):
        return self.value

class Noted:
    width: int

class Config(typing.TypedDict):
    depth: int

class Meta(type):
    def __call__(cls, *args):
        return super().__call__(*args)

class Made(metaclass=Meta):
    class Inside:
        deep = 1

def classy(x):
    class Local:
        attribute = x
        def method(self):
            self.own = 1
            self.other = 2
            self.third = 3
    return Local

local_class = classy(1)

def weighed(x):
    return weigh(x)

def helped(x):
    return helper.half(x) + helper.LIMIT

def guarded(x):
    return helper.guarded(x)

def passed_on(x):
    return vars(helper)

def importing(x):
    import late
    from parts import other
    return late.f(x)

def deep_in_parts(x):
    return inner.leaf(x)

def using_math(x):
    return math.floor(x)
'''

HELPER = """
import threading

LIMIT = 10
FACTOR = 0.5
UNUSED = 1
LOCK = threading.Lock()

def half(x):
    return x * FACTOR

def weigh(x):
    return half(x) + 1

def guarded(x):
    with LOCK:
        return half(x)

class Scale:
    unit = "kg"
    lock = threading.Lock()
    def read(self):
        return self.unit
"""

FILES = {
    "script.py": SCRIPT,
    "helper.py": HELPER,
    "late.py": "def f(x):\n    return x\n",
    "parts/__init__.py": "",
    "parts/inner.py": "from . import other\n\ndef leaf(x):\n    return other.value()\n",
    "parts/other.py": "RATIO = 2\n\ndef value():\n    return RATIO\n",
}

NAMES = [
    "double",
    "priced",
    "listed",
    "member",
    "ping",
    "pong",
    "captured",
    "wrapped",
    "cached",
    "kind",
    "bound",
    "with_attribute",
    "Base",
    "Shop",
    "shopping",
    "Point",
    "Pair",
    "Color",
    "Mode",
    "Old",
    "New",
    "Box",
    "Noted",
    "Config",
    "Made",
    "local_class",
    "weighed",
    "helped",
    "guarded",
    "passed_on",
    "importing",
    "deep_in_parts",
    "using_math",
    "Scale",
]

# Run for each folder in a process of its own, as the script there, and say what is what.
DRIVER = """
import abc, collections, dataclasses, enum, functools, json, math, os, sys, typing
from dmap import identity, local_code

local_code.is_local("dis")  # finds out where what is installed lies

def ids():
    found = {}
    for name in json.loads(os.environ["NAMES"]):
        try:
            found[name] = identity.closure_id(vars(sys.modules["__main__"])[name]).hex()
        except identity.Unidentifiable as error:
            found[name] = str(error)
    return found

for folder in sys.argv[1:]:
    if os.fork():
        if os.wait()[1]:
            sys.exit("failed in " + folder)
        continue
    sys.path.insert(0, folder)
    with open(folder + "/script.py") as file:
        code = compile(file.read(), folder + "/script.py", "exec")
    exec(code, vars(sys.modules["__main__"]))
    with open(folder + "/found.json", "w") as file:
        json.dump(ids(), file)
    os._exit(0)
"""

Files = dict[str, str]


def ids_of(folder: Path, versions: dict[str, Files], seed: int = 0) -> dict[str, dict[str, str]]:
    """Return what each version's script finds out: name -> id, as hexadecimal digits."""
    for name, files in versions.items():
        for path, text in files.items():
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    folders = [str(folder / name) for name in versions]
    subprocess.run(
        [sys.executable, "-c", DRIVER, *folders],
        env={**os.environ, "PYTHONHASHSEED": str(seed), "NAMES": json.dumps(NAMES)},
        check=True,
        timeout=WITHIN,
    )
    return {name: json.loads((folder / name / "found.json").read_text()) for name in versions}


def edited(*edits: tuple[str, str, str]) -> Files:
    """Return the files with some text replaced: file, old text, new text."""
    files = dict(FILES)
    for path, old, new in edits:
        assert old in files[path], old
        files[path] = files[path].replace(old, new)
    return files


# The same script as far as any function can tell, written and filled in another way.
ALIKE = edited(
    (
        "script.py",
        "import abc, coll",
        "import helper, parts.other, late as already, math\nimport abc, coll",
    ),
    (
        "script.py",
        "def double(x)",
        "class Unrelated:\n    pass\n\n\n" + 40 * "# \n" + "def double(x)",
    ),
    ("script.py", "def double(x):", "def unrelated(x):\n    return x\n\n\ndef double(x):"),
    ("script.py", '"unused"', '"still unused"'),
    (
        "script.py",
        'TABLE = {"a": [1, 2.5], "b": {"x", "y", "z"}, ',
        'TABLE = {"".join(["b"]): {*"zyxw"} - {"w"}, chr(97): [1, 5 / 2], ',
    ),
    ("script.py", '("red", "green", "blue")', '["".join(["bl", "ue"]), "green", "red"]'),
    ("script.py", 'make(7, "word")', 'make(3 + 4, "".join(["w", "ord"]))'),
    ("script.py", '{"x", "y", "z"}\n    def shade', '{*"zyx"}\n    def shade'),
    ("script.py", '"""A shop."""', '"""Another text."""'),
    ("script.py", 'y: "float"', "y: float"),
    ("script.py", "x: int\n    y: int = 2", "x: int | float\n    y: int = 2"),
    ("script.py", "# \n", "#  \n"),
)

# Edit -> the names that read what it changes. There is a lock of helper.py in guarded and Scale, so
# they are what its source is; passed_on may read anything there.
SOURCE_OF_HELPER = "guarded passed_on Scale"
EDITS: dict[str, tuple[Files, str]] = {
    "a global": (
        edited(("script.py", "RATE = 3", "RATE = 4")),
        "priced cached Shop shopping Color",
    ),
    "a global's type": (
        edited(("script.py", "RATE = 3", "RATE = 3.0")),
        "priced cached Shop shopping Color",
    ),
    "a global's depth": (edited(("script.py", '"z"}, "c"', '"w"}, "c"')), "listed bound"),
    "a helper's body": (
        edited(("script.py", "return 2 * x", "return 3 * x")),
        "double priced Shop shopping",
    ),
    "a default": (edited(("script.py", "by=2, *", "by=3, *")), "listed bound"),
    "a keyword default": (edited(("script.py", 'plus=(1, "a")', "plus=(1, 2)")), "listed bound"),
    "a constant's sign": (edited(("script.py", "(0.0,", "(-0.0,")), "member"),
    "a constant's type": (edited(("script.py", "(0.0,", "(0,")), "member"),
    "an element of a constant set": (edited(("script.py", '"grey"', '"gray"')), "member"),
    "one of two that call each other": (
        edited(("script.py", "n and pong", "n or pong")),
        "ping pong",
    ),
    "a captured value": (edited(("script.py", "make(7", "make(8")), "captured"),
    "a captured string": (edited(("script.py", ', "word")', ', "words")')), "captured"),
    "nested code": (
        edited(("script.py", "return [x, hidden, word]", "return [hidden, x, word]")),
        "captured",
    ),
    "a decorator": (
        edited(("script.py", "return func(func(x))", "return func(x)")),
        "wrapped",
    ),
    "a decorated function": (edited(("script.py", "return x + 1", "return x + 2")), "wrapped"),
    "a cache's size": (edited(("script.py", "maxsize=8", "maxsize=9")), "cached"),
    "a dispatched function": (edited(("script.py", 'return "int"', 'return "i"')), "kind"),
    "a dispatched type": (edited(("script.py", "def _(x: int)", "def _(x: float)")), "kind"),
    "a bound argument": (edited(("script.py", "listed, by=5", "listed, by=6")), "bound"),
    "a function's attribute": (
        edited(("script.py", "factor = 4", "factor = 5")),
        "with_attribute",
    ),
    "a base's attribute": (
        edited(("script.py", "    rate = 2", "    rate = 3")),
        "Base Shop shopping",
    ),
    "a property": (edited(("script.py", 'return "shop"', 'return "store"')), "Shop shopping"),
    "a static method": (edited(("script.py", "return -x", "return +x")), "Shop shopping"),
    "a class method": (edited(("script.py", "return cls()", "return cls")), "Shop shopping"),
    "slots": (edited(("script.py", '("a", "b")\n', '("a", "c")\n')), "Shop shopping"),
    "a field's default": (edited(("script.py", "= 0.5", "= 0.25")), "Point"),
    "a field's factory": (edited(("script.py", "factory=list", "factory=tuple")), "Point"),
    "a field's metadata": (edited(("script.py", '"unit": "m"', '"unit": "cm"')), "Point"),
    "a field's name": (edited(("script.py", "second: int", "third: int")), "Pair"),
    "a dataclass's options": (edited(("script.py", ", order=True", "")), "Pair"),
    "a member's value": (edited(("script.py", "RED = 1", "RED = 2")), "Color"),
    "a member's method": (
        edited(("script.py", "return RATE\n\nclass Mode", "return 1\n\nclass Mode")),
        "Color",
    ),
    "a flag": (edited(("script.py", "WRITE = enum.auto()", "EXEC = enum.auto()")), "Mode"),
    "a named tuple's field": (edited(("script.py", '"x y"', '"x z"')), "Old"),
    "a named tuple's default": (edited(("script.py", "[1])", "[2])")), "Old"),
    "a typed named tuple's default": (edited(("script.py", "y: int = 2", "y: int = 3")), "New"),
    "a generic's method": (edited(("script.py", "self.value", "self.values")), "Box"),
    "a class's annotation": (edited(("script.py", "width: int", "height: int")), "Noted"),
    "a typed dict's key": (edited(("script.py", "depth: int", "level: int")), "Config"),
    "a metaclass": (
        edited(("script.py", "return super().__call__(*args)", "return 1")),
        "Made",
    ),
    "an inner class": (edited(("script.py", "deep = 1", "deep = 2")), "Made"),
    "a local class's variable": (edited(("script.py", "classy(1)", "classy(2)")), "local_class"),
    "a local class's method": (
        edited(("script.py", "self.third = 3", "self.third = 4")),
        "local_class",
    ),
    "a module's attribute": (
        edited(("script.py", "return math.floor", "return math.ceil")),
        "using_math",
    ),
    "a constant of a local module": (
        edited(("helper.py", "LIMIT = 10", "LIMIT = 11")),
        f"helped {SOURCE_OF_HELPER}",
    ),
    "what a function of a local module reads": (
        edited(("helper.py", "FACTOR = 0.5", "FACTOR = 0.25")),
        f"weighed helped {SOURCE_OF_HELPER}",
    ),
    "what nobody reads in a local module": (
        edited(("helper.py", "UNUSED = 1", "UNUSED = 2")),
        SOURCE_OF_HELPER,
    ),
    "a function of a local module": (
        edited(("helper.py", "return half(x) + 1", "return half(x) + 2")),
        f"weighed {SOURCE_OF_HELPER}",
    ),
    "a module that is imported by a call": (
        edited(("late.py", "return x", "return -x")),
        "importing",
    ),
    "a module that such a one is beside": (
        edited(("parts/other.py", "RATIO = 2", "RATIO = 3")),
        "importing deep_in_parts",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The ids of the script as it is."""
    return ids_of(tmp_path_factory.mktemp("base"), {"base": FILES})["base"]


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Edit -> the ids after it."""
    folder = tmp_path_factory.mktemp("edits")
    return ids_of(folder, {name: files for name, (files, _) in EDITS.items()})


@pytest.mark.slow
def test_everything_in_the_script_has_an_id_of_its_own(base: dict[str, str]) -> None:
    assert [text for text in base.values() if len(text) != 64] == []
    assert len(set(base.values())) == len(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 77])
def test_ids_are_the_same_in_another_process(
    base: dict[str, str], tmp_path: Path, seed: int
) -> None:
    found = ids_of(tmp_path, {"again": FILES, "alike": ALIKE}, seed)
    assert found["again"] == base
    assert {name for name in NAMES if found["alike"][name] != base[name]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_what_reads_it_and_nothing_else(
    base: dict[str, str], after: dict[str, dict[str, str]], edit: str
) -> None:
    changed = {name for name in NAMES if after[edit][name] != base[name]}
    assert changed == set(EDITS[edit][1].split())


ITEMS = """
import collections, dataclasses, datetime, enum, pathlib, sys
from decimal import Decimal
from dmap import identity

@dataclasses.dataclass(frozen=True)
class Query:
    table: str
    fields: frozenset
    limits: dict

class Color(enum.Enum):
    RED = 1

items = [
    Query("a", frozenset(("red", "green", "blue")), {"x": 1, "y": Color.RED}),
    {"red", "green", "blue", ("a", 1), None}, collections.Counter("hello"), Color.RED,
    [datetime.datetime(2024, 1, 1), pathlib.Path("a/b"), Decimal("1.5"), ValueError("no"), b"x"],
    Query, len, "a".upper, {1: {2: {3}}},
]
for item in items:
    print(identity.item_id(item).hex())
"""


@pytest.mark.slow
def test_ids_of_items_are_the_same_in_another_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", "\n" * seed + ITEMS],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            check=True,
            timeout=WITHIN,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(found) == 1
    assert len(set(found.pop().split())) == 9


# In this process -------------------------------------------------------------------------------


def of_script(text: str, **scope: Any) -> dict[str, Any]:
    """Return what a script of that text has defined."""
    scope = {"__name__": "__main__", **scope}
    exec(text, scope)
    return scope


def refusal(value: Any) -> str:
    """Return why a function has no id."""
    with pytest.raises(Unidentifiable) as caught:
        closure_id(value)
    return str(caught.value)


def test_thirty_functions_that_all_call_each_other_take_less_than_a_second() -> None:
    names = [f"f{n}" for n in range(30)]
    text = "\n".join(f"def {name}(x): return [{', '.join(names)}]" for name in names)
    start = time.perf_counter()
    first, again = of_script(text), of_script(text)
    ids = [closure_id(first[name]) for name in names]
    assert time.perf_counter() - start < 1.0
    assert ids == [closure_id(again[name]) for name in names]
    assert len(set(ids)) == 30


def test_a_long_chain_of_functions_is_not_nested_too_deeply() -> None:
    text = "\n".join(f"def f{n}(): return f{n + 1}()" for n in range(2000))
    chain = [
        closure_id(of_script(f"{text}\nend = {end}\ndef f2000(): return end")["f0"]) for end in "12"
    ]
    assert chain[0] != chain[1]


def test_a_global_that_is_only_named_like_an_attribute_does_not_count() -> None:
    text = "def f(x): return x.rate"
    assert closure_id(of_script(text, rate=1)["f"]) == closure_id(of_script(text, rate=2)["f"])


def test_whether_a_global_is_there_counts() -> None:
    text = "def f(x): return len(x)"
    assert closure_id(of_script(text)["f"]) != closure_id(of_script(text, len=None)["f"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lambda a: 1", "lambda b: 1"),
        ("lambda *a: 1", "lambda **a: 1"),
        ("lambda a: a", "lambda a, /: a"),
        ("lambda a: a", "lambda *, a: a"),
        ("lambda a: a", "lambda *a: a"),
        ("lambda a: a.x", "lambda a: a.y"),
        ("lambda a: 1", "lambda a: True"),
        ("lambda a: (1, 2)", "lambda a: (1, 2.0)"),
        ("lambda a: 0.0", "lambda a: -0.0"),
        ("lambda a: a", "lambda a: (lambda: a)"),
        ("lambda a: (lambda: 1)", "lambda a: (lambda: 2)"),
    ],
)
def test_code_that_differs_makes_another_function(one: str, other: str) -> None:
    assert closure_id(eval(one)) == closure_id(eval(f"(\n{one})")) != closure_id(eval(other))


def test_the_class_that_a_function_is_defined_in_counts() -> None:
    scope = of_script("def f(x): return x\nclass Shop:\n    def f(x): return x")
    assert closure_id(scope["f"]) != closure_id(scope["Shop"].f)


def test_an_attribute_of_an_enum_is_told_from_a_member() -> None:
    text = "import enum\nclass Color(enum.Enum):\n    RED = 1\n    BLUE = {}"
    member, other = (of_script(text.format(blue))["Color"] for blue in ("2", "enum.nonmember(2)"))
    assert closure_id(member) != closure_id(other)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="its syntax is of Python 3.12")
def test_a_class_with_type_parameters_has_an_id() -> None:
    text = "class Box[T: int]:\n    def get[S](self, x: S) -> T: return x\nBoxes = list[Box]"
    one, other = of_script(text)["Box"], of_script(text.replace("T", "U"))["Box"]
    assert closure_id(one) == closure_id(of_script(text)["Box"]) != closure_id(other)


def test_a_variable_that_is_not_assigned_yet_is_told_from_none() -> None:
    def make(assign: bool) -> Callable[[], object]:
        def inner() -> object:
            return later

        if assign:
            later = None
        return inner

    assert closure_id(make(True)) == closure_id(make(True)) != closure_id(make(False))


def test_a_function_that_refers_to_itself_has_an_id() -> None:
    def make() -> Callable[[int], int]:
        def down(n: int) -> int:
            return down(n - 1) if n else 0

        return down

    assert closure_id(make()) == closure_id(make())


def test_functions_in_data_are_found_there() -> None:
    def table(factor: int) -> Any:
        known: dict[Any, Any] = {"by": [lambda x: x * factor], len: {sum, max}}
        return lambda key: known[key]

    assert closure_id(table(1)) == closure_id(table(1)) != closure_id(table(2))


def test_a_set_of_functions_has_no_order() -> None:
    def make(n: int) -> Callable[[], int]:
        return lambda: n

    makes = [make(n) for n in range(20)]
    ids = {item_id({make(n) for n in range(20)}) for _ in range(5)}
    assert ids == {item_id(set(makes))}
    assert item_id({make(n) for n in range(21)}) not in ids

    def holder() -> Callable[[], object]:
        held = {make(n) for n in range(20)}
        return lambda: (held, holder)

    assert closure_id(holder()) == closure_id(holder())


def test_copies_of_a_function_are_one() -> None:
    def make() -> Callable[[], int]:
        return lambda: 1

    one = make()
    assert item_id([one, one]) == item_id([one, make()])

    def over(first: object, second: object) -> Callable[[], object]:
        return lambda: (first, second)

    assert closure_id(over(one, one)) == closure_id(over(one, make()))


def test_what_an_instance_is_of_counts() -> None:
    def make(rate: int) -> Any:
        class Rated:
            def price(self, x: int) -> int:
                return x * rate

        return Rated()

    assert item_id(make(1)) == item_id(make(1)) != item_id(make(2))
    assert closure_id(make(1).price) == closure_id(make(1).price) != closure_id(make(2).price)


def test_a_class_may_be_used_and_stay_the_same() -> None:
    text = """
import abc, dataclasses, enum, typing
class Shape(abc.ABC):
    pass
class Mode(enum.Flag):
    A = 1
    B = 2
class Box(typing.Generic[typing.TypeVar("T")]):
    pass
@dataclasses.dataclass(slots=True)
class Point:
    x: int
"""
    scope = of_script(text, __name__="some_script")
    before = [closure_id(scope[name]) for name in ("Shape", "Mode", "Box", "Point")]
    scope["Shape"].register(int)
    assert isinstance(3, scope["Shape"])
    assert scope["Mode"](3) == scope["Mode"].A | scope["Mode"].B
    assert scope["Box"][int]
    assert scope["Point"](1).__reduce_ex__(4)
    repr(scope["Point"](1))
    assert [closure_id(scope[name]) for name in ("Shape", "Mode", "Box", "Point")] == before


def test_what_is_installed_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = (json.dumps, json.loads, json.JSONEncoder, json.JSONEncoder.encode)
    before = [closure_id(each) for each in functions]
    assert len(set(before)) == 4
    monkeypatch.setattr(json, "_default_encoder", threading.Lock())
    assert [closure_id(each) for each in functions] == before


def test_what_a_library_has_in_its_globals_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("some_library")
    monkeypatch.setitem(sys.modules, "some_library", library)
    library.lock = LOCK  # type: ignore[attr-defined]
    exec("def make(n):\n    return lambda: (lock, n)", vars(library))
    make: Any = vars(library)["make"]
    assert closure_id(make(1)) == closure_id(make(1)) != closure_id(make(2))


def test_an_inner_function_of_a_library_is_its_code_and_what_it_captured() -> None:
    def manager(n: int) -> Any:
        import contextlib

        @contextlib.contextmanager
        def managed() -> Any:
            yield n

        return managed

    assert closure_id(manager(1)) == closure_id(manager(1)) != closure_id(manager(2))


def test_what_a_type_says_of_itself_counts_alone() -> None:
    class Tool:
        def __init__(self, key: bytes) -> None:
            self.key = key
            self.lock = threading.Lock()

        def __dmap_identity__(self) -> bytes:
            return self.key

    def over(tool: Tool) -> Callable[[], object]:
        return lambda: tool

    assert closure_id(over(Tool(b"a"))) == closure_id(over(Tool(b"a")))
    assert closure_id(over(Tool(b"a"))) != closure_id(over(Tool(b"b")))


def test_a_function_of_singledispatch_can_be_called_and_stay_the_same() -> None:
    @functools.singledispatch
    def kind(x: object) -> str:
        return "other"

    before = closure_id(kind)
    kind(1)
    assert closure_id(kind) == before
    kind.register(int, lambda x: "int")
    assert closure_id(kind) != before


def test_code_is_an_item_too() -> None:
    one, same, other = (compile(text, "<text>", "eval") for text in ("x + 1", "\nx + 1", "x + 2"))
    assert item_id(one) == item_id(same) != item_id(other)


def test_what_cannot_be_identified_is_named_with_the_way_to_it() -> None:
    scope = of_script(
        """
import threading
LOCK = threading.Lock()
class Safe:
    pool = {"main": [LOCK]}
    def get(self):
        return self
def inner(x):
    with LOCK:
        return x
def outer(x):
    return inner(x)
def safe(x, by=LOCK):
    return x
def made(x):
    return Safe()
outer_list = [outer]
def over_list(x):
    return outer_list
"""
    )
    assert refusal(scope["outer"]).startswith("outer -> inner -> LOCK is a _thread.lock")
    assert refusal(scope["safe"]).startswith("safe -> its defaults -> [0] is a _thread.lock")
    assert refusal(scope["made"]).startswith("made -> Safe -> .pool -> ['main'] -> [0] is a")
    assert "outer_list -> outer -> inner -> LOCK is a" in refusal(scope["over_list"])
    with pytest.raises(Unidentifiable, match=r"list -> \[0\] -> Safe -> \.pool -> \['main'\]"):
        item_id([scope["Safe"]()])


def test_the_script_itself_as_a_module_is_refused() -> None:
    assert "is the module __main__" in refusal(
        of_script("import __main__\ndef f(): return __main__")["f"]
    )


LOCK = threading.Lock()
HELD: dict[str, Any] = {"lock": LOCK}


RATE = 3
RING: list[Any] = [[], LOCK]
RING[0].append(RING)


def uses_circle() -> object:
    return RING


def uses_lock() -> object:
    return LOCK, RATE


def uses_what_holds_it() -> object:
    return HELD, RATE


@dataclasses.dataclass
class Locked:
    lock: Any = LOCK


class LockedToo:
    lock = LOCK


def make_guarded(lock: Any) -> Callable[[], object]:
    return lambda: lock


guarded = make_guarded(LOCK)


def uses_closure() -> object:
    return guarded


TABLE: dict[str, Any] = {"guarded": make_guarded(LOCK)}


def uses_table() -> object:
    return TABLE, RATE


def test_in_a_local_module_what_cannot_be_identified_is_the_modules_source() -> None:
    ids = [closure_id(f) for f in (uses_lock, uses_what_holds_it, uses_closure, uses_table)]
    ids += [closure_id(Locked), closure_id(LockedToo)]
    assert len(set(ids)) == 6


@pytest.mark.parametrize("func", [uses_lock, uses_what_holds_it, uses_table])
def test_what_a_local_module_is_given_later_counts_beside_a_lock(
    func: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = closure_id(func)
    monkeypatch.setitem(globals(), "RATE", 4)
    assert closure_id(func) != before


def test_that_a_local_module_has_a_way_out_gives_none_to_others() -> None:
    def over(lock: Any) -> Callable[[], object]:
        return lambda: lock

    # The module's function is looked at before z is.
    script = of_script("def f(): return uses_lock, z", uses_lock=uses_lock, z=over(LOCK))
    assert "f -> z -> lock is a _thread.lock" in refusal(script["f"])
    script = of_script("def f(): return uses_circle, z", uses_circle=uses_circle, z=over(RING[0]))
    assert "is a _thread.lock" in refusal(script["f"])


def test_what_was_captured_is_no_global() -> None:
    assert "lock is a _thread.lock" in refusal(make_guarded(LOCK))


def test_nodes_that_look_alike_are_told_apart_by_what_they_lead_to() -> None:
    def chain(*ends: bytes) -> list[Node]:
        nodes = [Node() for _ in ends]
        for n, node in enumerate(nodes):
            node.fill(b"\x80", [ends[n], nodes[(n + 1) % len(nodes)]])
        return nodes

    ring = chain(*[b"N"] * 5, b"T")
    tokens = [close(node) for node in ring]
    assert len(set(tokens)) == 6
    assert [close(node) for node in chain(*[b"N"] * 5, b"T")] == tokens
    assert {close(node) for node in chain(*[b"N"] * 5)} == {close(chain(b"N")[0])}


def test_definitions_keep_what_they_know_alive() -> None:
    known = Definitions()
    # Each is gone at once, but for what is known of it, and the next one may have its place.
    assert len({item_id(eval(f"lambda: {n}"), known) for n in range(50)}) == 50
