"""Each fact holds on every Python that this runs on: their instructions differ."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path
from types import CodeType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmap import bytecode

ROOT = Path(__file__).parent.parent


def code(text: str) -> CodeType:
    """Compile the text of a module."""
    return compile(textwrap.dedent(text), "somewhere.py", "exec")


def body(text: str) -> CodeType:
    """Compile the text of a function's body."""
    function = code(f"def f(x):\n{textwrap.indent(textwrap.dedent(text), '    ')}")
    return next(const for const in function.co_consts if isinstance(const, CodeType))


MANY = "\n".join(f"a{n} = 'text {n}'" for n in range(300))


# Names


def test_globals_that_are_read_set_and_deleted_are_names() -> None:
    found = bytecode.global_names(body("global b, c\nb = 1\ndel c\nreturn a(x)"))
    assert found == {"a", "b", "c"}


def test_attributes_and_locals_are_no_names() -> None:
    assert bytecode.global_names(body("y = x.b.c(1)\nx.d = y\nreturn y.e")) == set()


@pytest.mark.parametrize(
    "inner",
    [
        "return lambda: a",
        "return [a for y in x]",
        "return (a for y in x)",
        "def g(y=1):\n    return a + y",
        "class C:\n    b = a",
        "class C:\n    def g(self):\n        return a",
        "return lambda: (lambda: a)",
        "async def g():\n    return a",
    ],
)
def test_names_of_nested_code_count(inner: str) -> None:
    assert "a" in bytecode.global_names(body(inner))


def test_modules_and_classes_look_names_up_otherwise() -> None:
    assert bytecode.global_names(code("a.b\nclass C:\n    c = d")) >= {"a", "d"}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax is of 3.12")
def test_names_in_type_parameters_count() -> None:
    assert "a" in bytecode.global_names(body("class C[T: a]:\n    def g(self, y: T) -> a: ..."))


def test_what_a_name_means_does_not_change_when_the_code_has_run_often() -> None:
    def often() -> float:
        return len([abs(-1), abs(-2)]) + ast.AST.__basicsize__

    before = bytecode.global_names.__wrapped__(often.__code__)
    for _ in range(1000):
        often()
    assert bytecode.global_names.__wrapped__(often.__code__) == before == {"abs", "len", "ast"}


def test_names_beyond_the_first_256_are_found() -> None:
    text = "\n".join(f"b{n}" for n in range(600)) + "\nreturn m.f(1) + m.g.h"
    assert bytecode.global_names(body(text)) == {f"b{n}" for n in range(600)} | {"m"}
    assert bytecode.attribute_paths(body(text), "m") == {("f",), ("g", "h")}


# Attributes


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("return m.f(x) + m.CONST", {"f", "CONST"}),
        ("return m.sub.f(x)", {"sub"}),
        ("m.f(x)(m.g)\nreturn [m.h for y in m.i]", {"f", "g", "h", "i"}),
        ("return lambda: m.f", {"f"}),
        ("with m.lock:\n    return m.table[x]", {"lock", "table"}),
        ("match x:\n    case m.A: ...", {"A"}),
        ("m.sub.value = x", {"sub"}),
        ("m = 3\nreturn m.real", set()),
        ("return x", set()),
    ],
)
def test_attributes_of_a_module_are_told(text: str, attributes: set[str]) -> None:
    assert bytecode.module_attributes(body(text), "m") == attributes


@pytest.mark.parametrize(
    "text",
    [
        "return x(m)",
        "m.RATE = 3",
        "del m.RATE",
        "return m",
        "m.f()\nreturn lambda: m",
        "return m.f if m else x",
        "global m\nm = x\nm.f()",
        "return (m or x).f",
    ],
)
def test_a_module_that_is_used_otherwise_may_have_any_attribute(text: str) -> None:
    assert bytecode.module_attributes(body(text), "m") is None


def test_chains_of_attributes_are_told_beside_other_uses() -> None:
    found = bytecode.attribute_paths(body("m.a.b(m.c)\nreturn m"), "m")
    assert found == {("a", "b"), ("c",), ()}


# Imports


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import a", {"a"}),
        ("import a.b.c", {"a.b.c"}),
        ("import a.b as c, d", {"a.b", "d"}),
        ("from a import b, c as d", {"a", "a.b", "a.c"}),
        ("from a.b import c", {"a.b", "a.b.c"}),
        ("from a import *", {"a"}),
        ("from . import x", {"p.q", "p.q.x"}),
        ("from .x import y", {"p.q.x", "p.q.x.y"}),
        ("from .. import x", {"p", "p.x"}),
        ("from ..x.y import z", {"p.x.y", "p.x.y.z"}),
        ("from ... import x", set()),
        ("from ....x import y", set()),
        ("def f():\n    def g():\n        from . import x", {"p.q", "p.q.x"}),
        ("if False:\n    import a\nelse:\n    import b", {"b"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a", {"a"}),
        ("try:\n    import a\nexcept ImportError:\n    import b as a", {"a", "b"}),
        (f"{MANY}\nfrom .x import y", {"p.q.x", "p.q.x.y"}),
        ("x = 1, ('a',)\nimport b", {"b"}),
    ],
)
def test_import_statements_name_what_they_may_import(text: str, names: set[str]) -> None:
    found = bytecode.imports(code(text), "p.q")
    assert found - {"typing", "typing.TYPE_CHECKING"} == names


def test_relative_imports_outside_of_a_package_name_nothing() -> None:
    assert bytecode.imports(code("from . import a\nfrom .b import c"), None) == set()
    assert bytecode.imports(code("from . import a\nfrom .b import c"), "") == set()


@given(st.integers(0, 5), st.sampled_from(["", "a", "a.b"]), st.sampled_from(["p", "p.q", "p.q.r"]))
def test_relative_names_mean_what_python_says(level: int, name: str, package: str) -> None:
    from importlib.util import resolve_name

    if level == 0 or not level + len(name):
        return
    try:
        wanted = resolve_name("." * level + name, package)
    except ImportError:
        wanted = None
    assert bytecode.resolve(name, level, package) == wanted


# Sameness


FUNCTION = """
def f(x):
    class C:
        one = 4
        def g(self, y=(1, 2)):
            return x in {1, 2, 3} and self.h + 1.0
    return C
"""


def test_code_is_the_same_wherever_it_stands() -> None:
    other = compile("\n\n\n" + FUNCTION.replace("\n    ", "\n\n    "), "elsewhere.py", "exec")
    assert bytecode.is_same(code(FUNCTION), other)


@pytest.mark.parametrize("n", range(8))
def test_a_class_whose_constant_is_its_line_is_the_same_elsewhere(n: int) -> None:
    assert bytecode.is_same(code(FUNCTION), code("\n" * n + FUNCTION))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.0", "1"),
        ("1.0", "2.0"),
        ("+ 1.0", "- 1.0"),
        ("self.h", "self.i"),
        ("(1, 2)", "(1, True)"),
        ("(1, 2)", "(1, 0.0)"),
        ("{1, 2, 3}", "{1, 2, 4}"),
        ("one = 4", "one = 5"),
        ("one", "two"),
        ("y=", "z="),
        ("def g(self, y", "def g(self, /, y"),
        ("def g", "async def g"),
    ],
)
def test_code_that_does_something_else_is_another(old: str, new: str) -> None:
    assert not bytecode.is_same(code(FUNCTION), code(FUNCTION.replace(old, new)))


def test_arguments_that_are_taken_otherwise_make_another() -> None:
    star = FUNCTION.replace("y=(1, 2)", "*y")
    assert not bytecode.is_same(code(star), code(star.replace("*", "**")))


def test_zeros_of_both_signs_are_two() -> None:
    assert not bytecode.is_same(body("return 0.0"), body("return -0.0"))


# Lightness


def test_importing_it_imports_no_slow_modules() -> None:
    text = "import sys; import dmap.bytecode; print({'dis', 'inspect', 'ast'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert out.stdout == "set()\n", out.stderr
