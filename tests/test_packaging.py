"""What a user gets: the wheel and the sdist, each in an empty venv of its own."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def run(argv: Sequence[str | Path], cwd: Path) -> str:
    """Run a program to its end as a user would, away from the project; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=environment,
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{' '.join(map(str, argv))}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build an sdist, and from what is in it a wheel."""
    work = tmp_path_factory.mktemp("built")
    # A build writes beside its sources, and would ship what an earlier one left there.
    clutter = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "*.egg-info", "build", "dist")
    source = shutil.copytree(ROOT, work / "source", ignore=clutter)
    run([sys.executable, "-m", "build", "--outdir", work / "dist", source], work)
    return {
        "sdist": next(work.glob("dist/dmap-*.tar.gz")),
        "wheel": next(work.glob("dist/dmap-*.whl")),
    }


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def programs(
    request: pytest.FixtureRequest,
    built: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Install one of the two into an empty venv, and return that venv's folder of programs."""
    venv = tmp_path_factory.mktemp(request.param) / "venv"
    run([sys.executable, "-m", "venv", venv], venv.parent)
    pip: list[str | Path] = [
        venv / "bin" / "python",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
    ]
    run([*pip, "install", built[request.param]], venv.parent)
    return venv / "bin"


def test_both_packages_import(programs: Path, tmp_path: Path) -> None:
    out = run([programs / "python", "-c", "import dmap, jobserver; print(dmap.__file__)"], tmp_path)
    assert Path(out.strip()).is_relative_to(programs.parent)


@pytest.mark.parametrize("command", ["jobserver", "dmap-worker", "dmap"])
def test_a_command_says_how_it_is_used(programs: Path, tmp_path: Path, command: str) -> None:
    assert run([programs / command, "--help"], tmp_path).startswith(f"usage: {command}")


def test_a_users_type_checker_sees_the_types(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        'from dmap import dmap\n\nreveal_type(dmap(len, ["a"]))\ndmap(len, [1])\n'
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", os.devnull]
    checked = subprocess.run(
        [*mypy, "--python-executable", programs / "python", "script.py"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    ).stdout.replace("builtins.", "")
    assert 'script.py:3: note: Revealed type is "list[int]"' in checked
    assert re.findall(r"^script.py:(\d+): error", checked, re.M) == ["4"]


def test_the_wheel_holds_the_two_packages_and_their_types(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"dmap", "jobserver"}
    assert {"dmap/py.typed", "jobserver/py.typed"} <= set(names)


def test_the_sdist_holds_all_that_the_tests_want(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"Makefile", "check", "CHANGELOG.md", "LICENSE", "setup.cfg", "examples"}
    assert {*wanted, "tests/conftest.py"} <= held
