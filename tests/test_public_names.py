"""The names that users import, and what their type checker sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dmap

NAMES = [
    "dmap",
    "imap",
    "starmap",
    "submit",
    "background",
    "attach",
    "wait",
    "as_completed",
    "Client",
    "Job",
    "job",
    "current_job",
    "per_worker",
    "set_job_servers",
    "shutdown",
    "DmapError",
    "NoServer",
    "NoWorker",
    "Busy",
    "AuthError",
    "InsecureBind",
    "ProtocolError",
    "WorkerLost",
    "RemoteError",
    "ClosureError",
    "JobTimeout",
    "JobCancelled",
    "DmapWarning",
]


def test_the_public_names_are_these() -> None:
    assert sorted(dmap.__all__) == sorted(NAMES)
    assert all(getattr(dmap, name) is not None for name in NAMES)


def test_dmap_in_dmap_is_the_function() -> None:
    from dmap import dmap as function
    from dmap import imap

    assert callable(function)
    assert dmap.dmap is function
    assert dmap.imap is imap


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        dmap.no_such_name  # noqa: B018


def test_all_names_are_listed() -> None:
    assert set(NAMES) <= set(dir(dmap))


HEAVY = {
    *("asyncio", "concurrent.futures", "dataclasses", "inspect", "logging", "multiprocessing"),
    *("pickle", "random", "socket", "subprocess", "tempfile"),
}


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        ("import dmap", {"dmap"}),
        ("from dmap import dmap, imap, starmap, submit, background", {"dmap", "dmap.calls"}),
        ("from dmap import set_job_servers, shutdown, attach", {"dmap", "dmap.calls"}),
    ],
)
def test_an_import_loads_nothing_that_is_not_used(code: str, ours: set[str]) -> None:
    code = f"import sys; before = {{*sys.modules}}; {code}; print(*{{*sys.modules}} - before)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(said.stdout.split())
    assert {
        name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names
    } == ours
    assert not loaded & HEAVY


def test_registering_a_function_does_not_load_the_client() -> None:
    code = "import sys, dmap; dmap.job; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"dmap.client", "zmq"} & set(said.stdout.split())


def test_a_map_of_nothing_starts_nothing() -> None:
    code = "import sys; from dmap import dmap; print(dmap(len, ()), 'dmap.local' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["[]", "False"]


def test_a_map_of_no_iterable_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="iterable"):
        dmap.dmap(len)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="iterable"):
        dmap.imap(len)  # type: ignore[call-overload]


def test_an_unknown_option_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match=r"no option 'chunk_size'; it has .*chunksize"):
        dmap.dmap(len, ["a"], chunk_size=3)  # type: ignore[call-overload]


def test_servers_that_are_no_addresses_are_refused() -> None:
    with pytest.raises(ValueError):
        dmap.set_job_servers("sammy:port")
    with pytest.raises(ValueError):
        dmap.Client("")


REVEALED = {
    'dmap(len, ["a"])': "list[int]",
    "dmap(pow, [1], [2])": "list[Any]",
    "dmap(lambda a, b: a / b, [1], [2.0])": "list[float]",
    "dmap(lambda a, b, c, d, e: 'x', [1], [2], [3], [4], [5])": "list[str]",
    "imap(str, [1], ordered=False)": "Generator[str, None, None]",
    "starmap(divmod, [(7, 3)])": "list[",
    'submit(len, "a")': "Job[int]",
    'submit("named", "a")': "Job[Any]",
    'Client("sammy").dmap(len, ["a"])': "list[int]",
    'Client("sammy").options(priority="high").submit(len, "a").result()': "int",
    'background(len, "a")': "str",
}


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path: Path) -> None:
    source = tmp_path / "user.py"
    lines = ["from dmap import Client, background, dmap, imap, starmap, submit"]
    lines += [f"reveal_type({expression})" for expression in REVEALED]
    source.write_text("\n".join(lines) + "\n")
    argv = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(source)]
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    revealed = [line for line in said.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(REVEALED), said
    for line, (expression, expected) in zip(revealed, REVEALED.items(), strict=True):
        plain = line.replace("builtins.", "").replace("typing.", "")
        assert expected in plain, f"{expression}: {line}"
    assert "error:" not in said, said


@pytest.mark.slow
def test_a_type_checker_refuses_a_function_that_does_not_fit(tmp_path: Path) -> None:
    source = tmp_path / "user.py"
    source.write_text("from dmap import dmap\ndmap(len, [1])\ndmap(len, ['a'], retries='x')\n")
    argv = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(source)]
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    assert "user.py:2: error" in said
    assert "user.py:3: error" in said
