"""What would vanish is told, and what only looks like it is not: see `writes_corpus`."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmap import writes
from dmap.writes import lost_writes

TESTS = Path(__file__).parent
CORPUS = TESTS / "writes_corpus.py"
MODULE = TESTS.parent / "dmap" / "writes.py"
SOURCE = CORPUS.read_text()
WITHIN = 120.0

PLACES = {
    "script": [str(CORPUS), str(MODULE)],
    "-c": ["-c", SOURCE, str(MODULE)],
}
AS_MODULE = ["-c", f"import writes_corpus; writes_corpus.main({str(MODULE)!r})"]

Found = dict[str, list[list[Any]] | None]


def expected() -> dict[str, list[list[Any]]]:
    """Return case -> variable and line of each write that is marked in the corpus."""
    marked: dict[str, list[list[Any]]] = {}
    for number, line in enumerate(SOURCE.splitlines(), 1):
        if match := re.match(r"def ((?:warns|silent)_\w+)", line):
            case = marked.setdefault(match[1], [])
        if marked:
            case += [[name, number] for name in re.findall(r"# lost: (\w+)", line)]
    return marked


EXPECTED = expected()


def found_by(python: str, arguments: list[str]) -> Found:
    done = subprocess.run(
        [python, *arguments], cwd=TESTS, capture_output=True, text=True, timeout=WITHIN
    )
    assert (done.returncode, done.stderr) == (0, "")
    found: Found = json.loads(done.stdout)
    return found


@functools.cache
def found_in(place: str) -> Found:
    return found_by(sys.executable, PLACES[place])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", [case for case in EXPECTED if EXPECTED[case]])
def test_a_write_that_would_vanish_is_told_with_its_line(case: str, place: str) -> None:
    found = found_in(place)[case]
    if found is None:
        pytest.skip("it needs a package that is not installed")
    assert sorted(found) == sorted(EXPECTED[case])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", [case for case in EXPECTED if not EXPECTED[case]])
def test_what_only_looks_like_one_is_not_told(case: str, place: str) -> None:
    found = found_in(place)[case]
    if found is None:
        pytest.skip("it needs a package that is not installed")
    assert found == []


def test_the_corpus_marks_a_write_in_just_those_cases_that_warn() -> None:
    warns = {case for case in EXPECTED if case.startswith("warns_")}
    assert warns == {case for case in EXPECTED if EXPECTED[case]}
    assert len(warns) >= 40
    assert len(EXPECTED) - len(warns) >= 60


def test_the_globals_of_a_module_are_its_own_business() -> None:
    found = found_by(sys.executable, AS_MODULE)
    for case, wanted in EXPECTED.items():
        if found[case] is not None:
            assert sorted(found[case] or []) == ([] if "global" in case else sorted(wanted))


def python_of(version: str) -> str:
    """Return an interpreter that runs."""
    command = shutil.which(f"python{version}")
    if command:
        # A version switcher's command runs with this; others ignore it.
        environment = {**os.environ, "PYENV_VERSION": version}
        show = [command, "-c", "import sys; print(sys.executable)"]
        done = subprocess.run(show, env=environment, capture_output=True, text=True)
        if not done.returncode:
            return done.stdout.strip()
    pytest.skip(f"there is no Python {version} here")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_each_python_finds_the_same(version: str) -> None:
    found = found_by(python_of(version), PLACES["script"])
    wrong = {
        case: found[case]
        for case, wanted in EXPECTED.items()
        if found[case] is not None and sorted(found[case] or []) != sorted(wanted)
    }
    assert wrong == {}


def test_a_rebound_variable_is_told_in_these_words() -> None:
    n = 0

    def add(x: int) -> None:
        nonlocal n
        n += x

    line = add.__code__.co_firstlineno + 2
    assert lost_writes(add) == [
        f"add (test_writes.py, line {line}) changes 'n', which stays as it is here: the function "
        "runs in other processes; return the value and combine what comes back "
        "(docs/closures.md#writes-that-would-vanish)"
    ]


def test_a_changed_container_is_told_with_its_type() -> None:
    seen: list[int] = []
    (text,) = lost_writes(lambda x: seen.append(x))
    assert text.startswith("a lambda (test_writes.py, line ")
    assert ") changes the list 'seen' in place, which stays as it is here" in text


def test_an_array_is_called_one() -> None:
    np = pytest.importorskip("numpy")
    out = np.zeros(3)
    (text,) = lost_writes(lambda x: out.fill(x))
    assert "changes the array 'out' in place" in text


def test_a_write_in_a_comprehension_is_that_of_the_function_around_it() -> None:
    seen: list[int] = []

    def collect(xs: list[int]) -> int:
        return len([seen.append(x) for x in xs])  # type: ignore[func-returns-value]

    (text,) = lost_writes(collect)
    assert text.startswith("collect (")


def appender() -> Callable[[int], None]:
    seen: list[int] = []
    return lambda x: seen.append(x)


def test_the_same_code_is_looked_at_once() -> None:
    func = appender()
    assert len(lost_writes(func)) == 1
    assert lost_writes(func) == []
    assert lost_writes(appender()) == []
    assert lost_writes(functools.partial(appender(), 1)) == []


def test_a_function_that_two_call_is_told_of_once() -> None:
    seen: list[int] = []

    def put(x: int) -> None:
        seen.append(x)

    assert len(lost_writes(lambda x: put(x))) == 1
    assert lost_writes(lambda x: put(x + 1)) == []
    assert lost_writes(put) == []


def test_what_another_function_reads_is_seen_however_often_that_was_looked_at() -> None:
    seen: list[int] = []

    def known() -> int:
        return len(seen)

    def f(x: int) -> int:
        seen.append(x)
        return known()

    assert lost_writes(known) == []
    assert lost_writes(f) == []


def test_a_decorator_hides_no_second_function() -> None:
    def decorate(func: Callable[[int], None]) -> Callable[[int], None]:
        @functools.wraps(func)
        def wrapper(x: int) -> None:
            func(x)

        return wrapper

    first: list[int] = []
    second: list[int] = []

    @decorate
    def one(x: int) -> None:
        first.append(x)

    @decorate
    def two(x: int) -> None:
        second.append(x)

    assert ["'first'" in text for text in lost_writes(one)] == [True]
    assert ["'second'" in text for text in lost_writes(two)] == [True]
    assert lost_writes(two) == []


def test_a_wrapper_of_dmaps_own_ends_the_look() -> None:
    seen: list[int] = []
    source = (
        "def make(func):\n wrapper = lambda x: x\n wrapper.__wrapped__ = func\n return wrapper\n"
    )
    scope: dict[str, Any] = {}
    exec(compile(source, str(Path(writes.__file__).parent / "its_own.py"), "exec"), scope)
    assert lost_writes(scope["make"](lambda x: seen.append(x))) == []


def test_code_that_was_looked_at_is_not_kept() -> None:
    func = appender()
    func.__code__ = func.__code__.replace(co_name="another")
    code = weakref.ref(func.__code__)
    key = id(func.__code__)
    lost_writes(func)
    assert key in writes._seen
    del func
    gc.collect()
    assert code() is None
    assert key not in writes._seen


def test_a_look_that_fails_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    func = appender()
    func.__code__ = func.__code__.replace(co_name="another")
    monkeypatch.setattr(writes, "_Flow", fail)
    assert lost_writes(func) == []


USUAL = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("writes", {str(MODULE)!r})
writes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(writes)
rate, memo = 2, dict(a=1)
def helper(x):
    return x * rate
def usual(x):
    numbers = [helper(x) for x in range(x)]
    return sum(numbers) * memo["a"]
def filling(x):
    found = []
    found.append(x)
    return found
def counting(x):
    n = 0
    def count():
        nonlocal n
        n += 1
    return n
for func in (usual, filling, counting, lambda x: helper(x), len, dict, "no function"):
    assert writes.lost_writes(func) == []
print(sorted({{"dis", "inspect", "numpy", "ast"}} & set(sys.modules)))
"""


def test_the_usual_function_is_ruled_out_without_dis() -> None:
    done = subprocess.run(
        [sys.executable, "-c", USUAL], capture_output=True, text=True, timeout=WITHIN
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_is_typed_into_a_repl_is_told_too() -> None:
    typed = f"""
import sys
sys.path.insert(0, {str(TESTS.parent)!r})
from dmap.writes import lost_writes
total = 0
def add(x):
    global total
    total += x

print(lost_writes(add)[0].partition(",")[0])
"""
    done = subprocess.run(
        [sys.executable, "-q", "-i"], input=typed, capture_output=True, text=True, timeout=WITHIN
    )
    # From Python 3.13 on each input has a number.
    assert re.fullmatch(r"add \(<stdin>(-\d+)?\n", done.stdout)
