"""Source lines of what travels by value: collected here, shown in tracebacks there."""

from __future__ import annotations

import dataclasses
import linecache
import os
import pickle
import subprocess
import sys
import traceback
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import Clients
from cluster import Cluster

from dmap import sources

ROOT = Path(__file__).parent.parent
CELL = "/tmp/ipykernel_1/123.py"


def cell(text: str, filename: str = CELL) -> dict[str, Any]:
    """Run a notebook's cell, as its kernel does; return what it made."""
    lines = [f"{line}\n" for line in text.splitlines()]
    linecache.cache[filename] = len(text), None, lines, filename
    namespace: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def same_linecache() -> Iterator[None]:
    before = dict(linecache.cache)
    yield
    linecache.cache.clear()
    linecache.cache.update(before)


def collected(*functions: Any) -> sources.Lines:
    return sources.collect(function.__code__ for function in functions)


# --- collected --------------------------------------------------------------------------------

TWO = """\
import math

def outer(x):
    def inner(y):
        return (
            x / y
        )
    return inner(x)

other = 3

@staticmethod
def decorated(): pass
"""


def test_the_lines_of_a_function_are_collected_and_no_others() -> None:
    made = cell(TWO)
    assert collected(made["outer"]) == {CELL: {3: "\n".join(TWO.splitlines()[2:8]) + "\n"}}


def test_decorators_belong_to_a_function() -> None:
    made = cell(TWO)
    assert collected(made["decorated"].__func__) == {
        CELL: {12: "@staticmethod\ndef decorated(): pass\n"}
    }


def test_functions_that_share_lines_have_them_once() -> None:
    made = cell(TWO)
    inner = next(c for c in made["outer"].__code__.co_consts if isinstance(c, types.CodeType))
    assert sources.collect([inner, made["outer"].__code__]) == collected(made["outer"])


def test_functions_of_several_files_are_told_apart() -> None:
    one = cell("def f(): pass\n")["f"]
    other = cell("\ndef f(): return 3\n", "/tmp/ipykernel_1/124.py")["f"]
    assert collected(one, other) == {
        CELL: {1: "def f(): pass\n"},
        "/tmp/ipykernel_1/124.py": {2: "def f(): return 3\n"},
    }


def test_what_is_in_no_file_has_no_lines() -> None:
    namespace: dict[str, Any] = {}
    exec("def f(): pass", namespace)
    assert collected(namespace["f"]) == {}


def test_code_that_says_nonsense_of_itself_has_no_lines() -> None:
    code = cell("def f(): pass\n")["f"].__code__
    assert sources.collect([code.replace(co_filename="/\0")]) == {}
    assert sources.collect([code.replace(co_firstlineno=10**9)]) == {}


def test_a_form_feed_ends_no_line() -> None:
    made = cell("def f():\n    return '\x0c', 1\n")
    linecache.cache[CELL] = 1, None, ["def f():\n", "    return '\x0c', 1\n"], CELL
    assert collected(made["f"]) == {CELL: {1: "def f():\n    return '\x0c', 1\n"}}
    with sources.show(collected(made["f"])):
        assert linecache.getline(CELL, 2) == "    return '\x0c', 1\n"


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("def f(): pass\n")
    namespace: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    assert collected(namespace["f"]) == {str(path): {1: "def f(): pass\n"}}
    path.write_text("def f(): return 'something longer'\n")
    assert collected(namespace["f"]) == {str(path): {1: "def f(): return 'something longer'\n"}}


def test_a_file_that_is_gone_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("def f(): pass\n")
    namespace: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    collected(namespace["f"])
    path.unlink()
    for _ in range(2):
        assert collected(namespace["f"]) == {str(path): {1: "def f(): pass\n"}}


def test_of_a_long_function_the_first_lines_are_collected() -> None:
    text = "def f():\n" + "    print('a line of some length')\n" * 5000
    (lines,) = collected(cell(text)["f"]).values()
    assert 0.99 * sources.FUNCTION_NBYTES < len(lines[1]) <= sources.FUNCTION_NBYTES
    assert lines[1].endswith("\n")


def test_all_together_are_bounded() -> None:
    text = "def f():\n" + "    print('a line of some length')\n" * 1500
    functions = [cell(text, f"/tmp/ipykernel_1/{n}.py")["f"] for n in range(40)]
    nbytes = sum(len(t) for lines in collected(*functions).values() for t in lines.values())
    assert 0.9 * sources.ALL_NBYTES < nbytes <= sources.ALL_NBYTES


def test_they_are_plain_dicts_and_texts() -> None:
    lines = collected(cell(TWO)["outer"])
    assert b"dmap" not in pickle.dumps(lines)


def run(argv: list[str], **options: Any) -> str:
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=60, cwd=ROOT, **options
    )
    assert done.stderr == ""
    return done.stdout


PROGRAM = """
from dmap import sources
def f(x):
    return 1 / x
exec("def made():\\n    return 3")
g = lambda: 0  # \x0c
class Thing:
    def method(self): pass
for func in (f, g, Thing.method, made):
    print(sources.collect([func.__code__]))
"""
FOUND = [
    {3: "def f(x):\n    return 1 / x\n"},
    {6: "g = lambda: 0  # \x0c\n"},
    {8: "    def method(self): pass\n"},
]


@pytest.mark.parametrize(
    "argv",
    [["-c", PROGRAM, "-c", "1"], ["-Wignore", "-X", "dev", "-Bc", PROGRAM], [f"-c{PROGRAM}"]],
    ids=["alone", "with options", "joined"],
)
def test_a_program_on_the_command_line_has_its_lines(argv: list[str]) -> None:
    found = run(argv).splitlines()
    assert found == [str({"<string>": lines}) for lines in FOUND] + ["{}"]


def test_a_program_on_the_command_line_that_changed_its_arguments_has_its_lines() -> None:
    found = run(["-c", "import sys; sys.argv.clear()\n" + PROGRAM[1:], "a", "b"]).splitlines()
    assert found[0] == str({"<string>": FOUND[0]})


def test_a_program_in_standard_input_has_its_lines(tmp_path: Path) -> None:
    (tmp_path / "program").write_text(PROGRAM)
    with open(tmp_path / "program") as file:
        found = run([], stdin=file).splitlines()
    assert found == [str({"<stdin>": lines}) for lines in FOUND] + ["{}"]


def test_a_program_in_an_archive_has_its_lines(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
    found = run([str(tmp_path / "app.pyz")], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.splitlines()[0] == str({f"{tmp_path}/app.pyz/__main__.py": FOUND[0]})


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        (["python", "script.py", "-c", "x"], ""),
        (["python", "-m", "module", "-c", "x"], ""),
        (["python", "-", "-c", "x"], ""),
        (["python", "-Im", "module"], ""),
        (["python"], ""),
        (["python", "-c"], ""),
        (["python", "-W", "-c", "-c", "x"], "x"),
        (["python", "-Wc", "-Xc", "-ucx"], "x"),
        (["python", "--check-hash-based-pycs", "always", "-c", "x"], "x"),
    ],
)
def test_the_program_is_told_from_other_arguments(argv: list[str], program: str) -> None:
    assert sources._command_of(argv) == program


# --- shown ------------------------------------------------------------------------------------


def test_lines_are_shown_where_they_belong() -> None:
    with sources.show({CELL: {3: "a\nb\n", 7: "c\n"}}):
        lines = [linecache.getline(CELL, number) for number in range(1, 9)]
    assert lines == ["\n", "\n", "a\n", "b\n", "\n", "\n", "c\n", ""]


def test_what_was_there_before_is_there_again() -> None:
    linecache.cache[CELL] = before = (1, None, ["x\n"], CELL)
    with pytest.raises(ValueError), sources.show({CELL: {1: "a\n"}, "<string>": {1: "b\n"}}):
        raise ValueError
    assert linecache.cache[CELL] is before
    assert "<string>" not in linecache.cache


def test_what_the_client_says_wins_over_a_file_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("something else\n")
    namespace: dict[str, Any] = {}
    exec(compile("def f(): 1 / 0", str(path), "exec"), namespace)
    with pytest.raises(ZeroDivisionError) as error, sources.show({str(path): {1: "the truth\n"}}):
        namespace["f"]()
    with sources.show({str(path): {1: "the truth\n"}}):
        text = "".join(traceback.format_exception(error.value))
    assert "the truth" in text
    assert "something else" not in text


# --- local modules ----------------------------------------------------------------------------


@dataclasses.dataclass
class Loader:
    source: str

    def get_source(self, name: str) -> str:
        if name != "helper":
            raise ImportError(name)
        return self.source


def through_module(text: str, name: str = "helper") -> BaseException:
    """Return what a function of a local module raised."""
    namespace: dict[str, Any] = {"__name__": name, "__loader__": Loader(text)}
    exec(compile(text, "/home/me/helper.py", "exec"), namespace)
    try:
        namespace["f"]()
    except Exception as error:
        return error
    raise AssertionError("it should have raised")


@pytest.fixture
def bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loader, "__module__", "dmap.namespaces")
    monkeypatch.setitem(sys.modules, "dmap.namespaces", types.ModuleType("dmap.namespaces"))


def test_the_source_of_a_local_module_is_its_loaders(bundled: None) -> None:
    text = "\ndef f(): 1 / 0\n"
    assert sources.of_bundles(through_module(text)) == {"/home/me/helper.py": {1: text}}


def test_local_modules_behind_an_exception_and_in_it_are_found(bundled: None) -> None:
    inner = through_module("def f(): 1 / 0\n")
    error = ValueError()
    error.__context__ = ExceptionGroup("both", [ValueError(), inner])  # type: ignore[list-item]
    assert sources.of_bundles(error) == {"/home/me/helper.py": {1: "def f(): 1 / 0\n"}}


def test_a_module_that_its_loader_does_not_know_is_left_out(bundled: None) -> None:
    assert sources.of_bundles(through_module("def f(): 1 / 0\n", "other")) == {}


def test_other_loaders_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dmap.namespaces", types.ModuleType("dmap.namespaces"))
    assert sources.of_bundles(through_module("def f(): 1 / 0\n")) == {}


def test_a_chain_without_an_end_has_one(bundled: None) -> None:
    error = through_module("def f(): 1 / 0\n")
    error.__cause__ = error.__context__ = error
    assert len(sources.of_bundles(error)) == 1


# --- over real processes ----------------------------------------------------------------------

FAILING = """
import json, os, time
from pathlib import Path
from dmap import Client

class Thing:
    def method(self, n):
        def deep(n):
            return 1 / n
        return deep(n)

def f(n):
    return Thing().method(n)
"""
WAITING = """
def wait(n):
    Path(folder, "started").touch()
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.002)
    return f(n)

folder = os.getcwd()
with Client() as client:
    try:
        client.dmap(wait, [0])
    except ZeroDivisionError as error:
        print(json.dumps(str(error.__cause__)))
"""
LINES = ["return f(n)", "return Thing().method(n)", "return deep(n)", "return 1 / n"]


@pytest.fixture(scope="module")
def cluster(kept: None) -> Iterator[Cluster]:
    with Cluster() as one:
        one.start_worker(1)
        yield one


def assert_has_lines(text: str, lines: list[str]) -> None:
    """Check that a traceback has each of these lines, in this order."""
    shown = [line.strip() for line in text.splitlines()]
    assert [line for line in shown if line in lines] == lines, text


@pytest.mark.slow
def test_a_script_that_is_there_no_more_has_its_lines_in_the_traceback(
    cluster: Cluster, tmp_path: Path
) -> None:
    with Clients(tmp_path, cluster.endpoints) as clients:
        client = clients.start(FAILING + WAITING)
        client.wait_for("started")
        (tmp_path / "client0.py").unlink()
        (tmp_path / "go").touch()
        assert_has_lines(client.answer(), LINES)


@pytest.mark.slow
def test_another_script_of_that_name_is_not_taken_for_it(cluster: Cluster, tmp_path: Path) -> None:
    with Clients(tmp_path, cluster.endpoints) as clients:
        client = clients.start(FAILING + WAITING)
        client.wait_for("started")
        (tmp_path / "client0.py").write_text("something else\n" * 50)
        (tmp_path / "go").touch()
        text = client.answer()
    assert_has_lines(text, LINES)
    assert "something else" not in text


@pytest.mark.slow
def test_a_local_module_that_has_changed_has_its_lines_in_the_traceback(
    cluster: Cluster, tmp_path: Path
) -> None:
    module = tmp_path / "helper_of_test_sources.py"
    module.write_text("def f(n):\n    return 1 / n  # in the helper\n")
    with Clients(tmp_path, cluster.endpoints) as clients:
        script = "from helper_of_test_sources import f\n" + FAILING[: FAILING.index("class Thing")]
        client = clients.start(script + WAITING)
        client.wait_for("started")
        module.write_text("something else\n" * 50)
        (tmp_path / "go").touch()
        text = client.answer()
    assert_has_lines(text, ["return f(n)", "return 1 / n  # in the helper"])
    assert "something else" not in text


DIRECT = """
with Client() as client:
    try:
        client.dmap(lambda n: f(n), [0])
    except ZeroDivisionError as error:
        print(str(error.__cause__))
"""


def run_client(program: str, cluster: Cluster) -> str:
    return run(["-c", program], env={**os.environ, "DMAP_SERVERS": ",".join(cluster.endpoints)})


@pytest.mark.slow
def test_python_c_has_its_lines_in_the_traceback(cluster: Cluster) -> None:
    text = run_client(FAILING + DIRECT, cluster)
    assert_has_lines(text, ["client.dmap(lambda n: f(n), [0])", *LINES[1:]])


@pytest.mark.slow
def test_a_cell_of_a_notebook_has_its_lines_in_the_traceback(cluster: Cluster) -> None:
    kernel = f"""
import linecache
cell = {FAILING!r}
lines = [line + "\\n" for line in cell.splitlines()]
linecache.cache[{CELL!r}] = len(cell), None, lines, {CELL!r}
exec(compile(cell, {CELL!r}, "exec"))
"""
    text = run_client(kernel + DIRECT, cluster)
    assert f'File "{CELL}", line 9, in deep' in text
    assert_has_lines(text, LINES[1:])


@pytest.mark.slow
def test_a_single_job_has_its_lines_in_the_traceback(cluster: Cluster) -> None:
    program = DIRECT.replace("client.dmap(lambda n: f(n), [0])", "client.submit(f, 0).result()")
    assert_has_lines(run_client(FAILING + program, cluster), LINES[1:])


def test_lines_that_are_kept_stay_until_others_take_their_place() -> None:
    name = "<kept by this test>"
    try:
        sources.keep({name: {2: "first = 1\n"}})
        assert linecache.getline(name, 2) == "first = 1\n"
        sources.keep({name: {2: "second = 2\n"}})
        assert linecache.getline(name, 2) == "second = 2\n"
    finally:
        linecache.cache.pop(name, None)
