"""Functions of every kind, each mapped by real workers: what comes back must be what `map` gives.

Run as a script, by ``python -c``, by ``python -m``, cell by cell as in a notebook, or imported; it
prints as JSON what became of each case. A case is a function that returns what to map and over
which items.
"""

# %%
from __future__ import annotations

import abc
import asyncio
import collections
import contextlib
import dataclasses
import enum
import functools
import itertools
import json
import math
import operator
import re
import string
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

import dmap

CASES = {}
RATE = 3
TABLE = {"a": 1, "b": [2, 3]}
T = typing.TypeVar("T")


def case(make):
    CASES[make.__name__] = make
    return make


# %% lambdas and plain functions
@case
def a_lambda():
    return lambda x: x * 2, [1, 2, 3]


@case
def a_lambda_over_a_local():
    by = 5
    return lambda x: x + by, [1, 2, 3]


@case
def a_lambda_over_a_global():
    return lambda x: x * RATE, [1, 2]


@case
def a_lambda_over_a_container():
    return lambda key: TABLE[key], ["a", "b"]


@case
def a_lambda_in_a_lambda():
    return (lambda a: lambda x: (lambda y: y + a)(x))(10), [1, 2]


@case
def a_lambda_with_defaults():
    return lambda x, by=RATE, *, plus=1: x * by + plus, [1, 2]


@case
def lambdas_of_a_loop():
    late = [lambda x: x + n for n in range(3)]  # noqa: B023
    return late[0], [1, 2]


def double(x):
    return 2 * x


@case
def a_function():
    return double, [1, 2]


@case
def a_function_that_calls_another():
    def quadruple(x):
        return double(double(x))

    return quadruple, [1, 2]


@case
def a_function_with_a_mutable_default():
    def count(x, seen=[]):  # noqa: B006
        return [*seen, x]

    return count, [1, 2]


@case
def a_function_with_many_arguments():
    def total(x, *args, by=2, **kwargs):
        return x * by + len(args) + len(kwargs)

    return total, [1, 2]


@case
def a_function_with_annotations():
    def length(text: Sequence[str] | None = None) -> dict[str, int]:  # noqa: F821
        return {"n": len(text)}

    return length, ["ab", "c"]


@case
def a_function_with_attributes():
    def weigh(x):
        return x * weigh.by

    weigh.by = 7
    return weigh, [1, 2]


@case
def a_function_that_imports():
    def circle(r):
        import cmath
        from decimal import Decimal

        return round(cmath.pi * r, 3), str(Decimal(r))

    return circle, [1, 2]


@case
def a_function_with_a_comprehension():
    base = [1, 2, 3]
    return lambda x: [{n: x * n for n in base if n != x}, set(base)], [1, 2]


@case
def a_function_that_uses_a_module():
    return lambda x: math.floor(x) + len(string.digits), [1.5, 2.5]


@case
def a_function_that_raises():
    def fail(x):
        raise ValueError(f"no {x}")

    return fail, [1]


@case
def an_exec_made_function():
    namespace = {"OFFSET": 100}
    exec("def made(x):\n    return x + OFFSET", namespace)
    return namespace["made"], [1, 2]


@case
def an_eval_made_lambda():
    return eval("lambda x: x - 1"), [1, 2]


# %% recursion
def factorial(n):
    return 1 if n < 2 else n * factorial(n - 1)


def is_even(n):
    return n == 0 or is_odd(n - 1)


def is_odd(n):
    return n != 0 and is_even(n - 1)


@case
def recursion():
    return factorial, [1, 5]


@case
def local_recursion():
    def fibonacci(n):
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    return fibonacci, [1, 10]


@case
def mutual_recursion():
    return is_even, [4, 7]


@case
def local_mutual_recursion():
    def ping(n):
        return "ping" if n == 0 else pong(n - 1)

    def pong(n):
        return "pong" if n == 0 else ping(n - 1)

    return ping, [2, 3]


# %% closures
@case
def a_closure_over_a_closure():
    def adder(a):
        def add(b):
            return a + b

        return add

    add2, add3 = adder(2), adder(3)
    return lambda x: add2(add3(x)), [1, 2]


@case
def a_closure_that_counts():
    def counter():
        n = 0

        def count():
            nonlocal n
            n += 1
            return n

        return count

    def call(x):
        count = counter()
        return [count() for _ in range(x)]

    return call, [1, 3]


@case
def a_closure_over_an_array():
    table = np.arange(300_000.0)
    return lambda i: float(table[i] + table.sum()), [1, 2]


@case
def a_closure_over_a_set():
    known = {"a", "b", "c"}
    return lambda x: x in known, ["a", "z"]


@case
def a_closure_over_a_class():
    class Shop:
        rate = 2

        @staticmethod
        def price(x):
            return x * Shop.rate

    return lambda x: Shop.price(x), [1, 2]


# %% decorators
def twice(func):
    @functools.wraps(func)
    def wrapper(*args):
        return [func(*args), func(*args)]

    return wrapper


def times(n):
    def decorate(func):
        @functools.wraps(func)
        def wrapper(x):
            return [func(x)] * n

        return wrapper

    return decorate


@twice
def decorated_double(x):
    return 2 * x


@times(3)
def tripled(x):
    return x


@functools.lru_cache(maxsize=10)
def cached(x):
    return x * x


@functools.singledispatch
def kind(x):
    return "other"


@kind.register
def _(x: int):
    return "int"


@contextlib.contextmanager
def doubled(x):
    yield 2 * x


@case
def a_decorated_function():
    return decorated_double, [1, 2]


@case
def a_decorator_with_arguments():
    return tripled, [1, 2]


@case
def a_cached_function():
    return cached, [1, 2]


@case
def a_local_cached_function():
    @functools.cache
    def square(x):
        return x * x

    return square, [1, 2]


@case
def a_single_dispatch_function():
    return lambda x: kind(x), [1, "a"]


@case
def a_context_manager():
    def use(x):
        with doubled(x) as value:
            return value

    return use, [1, 2]


# %% partials, operators, builtins, C
@case
def a_partial():
    return functools.partial(pow, 2), [1, 2]


@case
def a_partial_of_a_lambda():
    return functools.partial(lambda a, b, c=0: (a, b, c), 1, c=3), [1, 2]


@case
def a_partial_of_a_partial():
    return functools.partial(functools.partial(max, 5), 7), [1, 9]


@case
def a_builtin():
    return len, ["a", "bc"]


@case
def a_builtin_class():
    return int, ["1", "2"]


@case
def a_method_of_a_builtin_class():
    return str.upper, ["a", "b"]


@case
def a_bound_method_of_a_builtin():
    return "-".join, [["a", "b"], ["c"]]


@case
def an_item_getter():
    return operator.itemgetter(1), ["ab", [1, 2]]


@case
def an_attribute_getter():
    return operator.attrgetter("real"), [1j, 2]


@case
def a_method_caller():
    return operator.methodcaller("split", ","), ["a,b"]


@case
def a_function_in_c():
    return math.sqrt, [4, 9]


@case
def a_ufunc():
    return np.sqrt, [4.0, 9.0]


@case
def a_reducing_ufunc():
    return np.add.reduce, [[1, 2], [3, 4]]


@case
def a_numpy_function():
    return np.linalg.norm, [[3.0, 4.0]]


@case
def a_compiled_pattern():
    word = re.compile(r"\w+")
    return lambda text: word.findall(text), ["a b", "c"]


@case
def a_method_of_a_compiled_pattern():
    return re.compile("b+").sub.__self__.split, ["abbc"]


# %% classes
class Account:
    rate = 2

    def __init__(self, start=0):
        self.start = start

    def add(self, x):
        return self.start + x

    @classmethod
    def scaled(cls, x):
        return cls.rate * x

    @staticmethod
    def negated(x):
        return -x

    @property
    def balance(self):
        return self.start

    def __call__(self, x):
        return self.add(x) + self.balance


class Savings(Account):
    def add(self, x):
        return super().add(x) + 1


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a, b):
        self.a = a
        self.b = b

    def sum(self, x):
        return self.a + self.b + x


class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self, by): ...


class Square(Shape):
    def __init__(self, side):
        self.side = side

    def area(self, by):
        return self.side**2 * by


class Registry(type):
    def __new__(mcs, name, bases, namespace):
        cls = super().__new__(mcs, name, bases, namespace)
        cls.tag = name.lower()
        return cls


class Registered(metaclass=Registry):
    def name(self, x):
        return self.tag + str(x)


class Color(enum.Enum):
    RED = 1
    BLUE = 2

    def shifted(self, x):
        return self.value + x


class Mode(enum.IntFlag):
    READ = enum.auto()
    WRITE = enum.auto()


@dataclass
class Point:
    x: int
    y: int = 0
    tags: list[str] = field(default_factory=list)

    def moved(self, by):
        return Point(self.x + by, self.y, [*self.tags, "moved"])


@dataclass(frozen=True, slots=True)
class Pair:
    first: int
    second: int


class Item(typing.NamedTuple):
    name: str
    price: int = 1

    def total(self, n):
        return self.price * n


Old = collections.namedtuple("Old", ["a", "b"])


class Box(typing.Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value

    def get(self, default: T) -> T:
        return self.value or default


class Greeter(typing.Protocol):
    def greet(self, name: str) -> str: ...


class Polite:
    def greet(self, name: str) -> str:
        return f"good day, {name}"


class Config(typing.TypedDict):
    depth: int


class Descriptor:
    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, instance, owner):
        return self if instance is None else f"{self.name} of {instance.number}"


class Described:
    label = Descriptor()

    def __init__(self, number):
        self.number = number


class Cached:
    @functools.cached_property
    def value(self):
        return 42


class Deep:
    class Inner:
        class Most:
            depth = 3


@case
def a_bound_method():
    return Account(10).add, [1, 2]


@case
def a_class_method():
    return Account.scaled, [1, 2]


@case
def a_static_method():
    return Account.negated, [1, 2]


@case
def a_callable_object():
    return Account(5), [1, 2]


@case
def a_method_that_calls_super():
    return Savings(10).add, [1, 2]


@case
def an_unbound_method():
    return Account.add, [(Account(1), 2), (Savings(1), 2)], True


@case
def a_class_as_a_function():
    return lambda x: Account(x).balance, [1, 2]


@case
def a_slotted_object():
    return Slotted(1, 2).sum, [3, 4]


@case
def an_abstract_base_class():
    return Square(3).area, [1, 2]


@case
def a_metaclass():
    return Registered().name, [1, 2]


@case
def an_enum_member():
    return Color.BLUE.shifted, [1, 2]


@case
def an_enum_as_item_and_result():
    return lambda c: Color((c.value % 2) + 1) is not c and Color.RED in Color, list(Color)


@case
def a_flag():
    return lambda m: (m | Mode.WRITE).value, [Mode.READ, Mode.WRITE]


@case
def a_dataclass():
    return lambda p: dataclasses.astuple(p.moved(1)), [Point(1), Point(2, 3, ["a"])]


@case
def a_dataclass_comes_back():
    return Point, [1, 2], False, lambda p: (type(p) is Point, p.x, p.tags)


@case
def a_frozen_dataclass_with_slots():
    return lambda p: dataclasses.replace(p, first=9).first + hash(p) - hash(p), [Pair(1, 2)]


@case
def a_typed_named_tuple():
    return lambda item: (item.total(3), item._replace(price=2).price), [Item("a", 5), Item("b")]


@case
def an_old_named_tuple():
    return lambda t: Old(t.b, t.a)._asdict(), [Old(1, 2)]


@case
def a_generic_class():
    return lambda x: Box[int](x).get(7), [0, 3]


@case
def a_protocol_class():
    greeter: Greeter = Polite()
    return greeter.greet, ["Ann"]


@case
def a_typed_dict():
    return lambda n: Config(depth=n), [1, 2]


@case
def a_descriptor():
    return lambda n: Described(n).label, [1, 2]


@case
def a_cached_property():
    return lambda n: Cached().value + n, [1, 2]


@case
def a_nested_class():
    return lambda n: Deep.Inner.Most.depth * n, [1, 2]


@case
def a_local_class_with_inheritance():
    class Base:
        def name(self):
            return "base"

    class Derived(Base):
        def name(self):
            return "derived from " + super().name()

    return lambda n: Derived().name() * n, [1]


@case
def an_exception_class():
    class Refused(Exception):
        def __init__(self, code, why):
            super().__init__(code, why)
            self.code = code

    def check(x):
        try:
            raise Refused(x, "because")
        except Refused as error:
            return error.code

    return check, [1, 2]


@case
def an_operator_overload():
    class Vector:
        def __init__(self, *xs):
            self.xs = xs

        def __add__(self, other):
            return Vector(*map(operator.add, self.xs, other.xs))

        def __matmul__(self, other):
            return sum(map(operator.mul, self.xs, other.xs))

    unit = Vector(1, 1)
    return lambda x: (Vector(x, x) + unit) @ unit, [1, 2]


@case
def a_type_alias():
    Pairs: typing.TypeAlias = list[tuple[int, str]]

    def count(pairs: Pairs) -> int:
        return len(typing.cast("Pairs", pairs)) + len(typing.get_args(Pairs))

    return count, [[(1, "a")]]


# %% generators and coroutines
@case
def a_function_that_uses_a_generator():
    def squares(n):
        for i in range(n):
            yield i * i

    return lambda n: sum(squares(n)), [3, 4]


@case
def a_generator_expression_inside():
    return lambda n: max(i * RATE for i in range(n)), [3]


@case
def an_iterator_chain():
    return lambda n: list(itertools.chain(range(n), itertools.islice(itertools.count(), 2))), [2]


@case
def a_generator_function():
    def numbers(n):
        yield from range(n)

    return numbers, [3]


@case
def an_async_function():
    async def later(x):
        return x

    return later, [1]


@case
def a_function_that_runs_a_coroutine():
    async def later(x):
        await asyncio.sleep(0)
        return x + 1

    return lambda x: asyncio.run(later(x)), [1, 2]


# %% values
@case
def fractions_and_numbers():
    third = Fraction(1, 3)
    return lambda x: str(third * x), [1, 2.5, 10**30]


@case
def a_default_dict():
    words = collections.defaultdict(list, a=[1])
    return lambda k: [*words[k], *words[2 * k]], ["a", "b"]


@case
def a_cyclic_capture():
    loop = [1, 2]
    loop.append(loop)
    return lambda x: loop[2][2][0] + x, [1]


@case
def a_captured_type():
    kinds: list[type] = [int, str, Account, list[int]]
    return lambda n: [getattr(k, "__name__", str(k)) for k in kinds][n], [0, 2, 3]


@case
def a_captured_iterator_function():
    def count(n: int) -> Iterator[int]:
        return iter(range(n))

    call: Callable[[int], list[int]] = lambda n: list(count(n))  # noqa: E731
    return call, [3]


# %%
def outcome(run, after=None):
    try:
        values = run()
        for coroutine in filter(asyncio.iscoroutine, values):
            coroutine.close()
        return ["values", repr([after(v) for v in values] if after else values)]
    except Exception as error:
        return ["error", type(error).__name__, str(error).partition("\n")[0]]


def main():
    found = {}
    for name, make in CASES.items():
        func, items, star, after = (*make(), False, None)[:4]
        here = itertools.starmap if star else map
        there = dmap.starmap if star else dmap.dmap
        found[name] = [
            outcome(lambda here=here, f=func, i=items: list(here(f, i)), after),
            outcome(lambda there=there, f=func, i=items: there(f, i), after),
        ]
    json.dump(found, sys.stdout)


# %%
if __name__ == "__main__":
    main()
