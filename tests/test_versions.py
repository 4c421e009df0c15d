"""The version of cloudpickle, as a label that people do not see as one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

from dmap.versions import cloudpickle_label, split_labels, with_cloudpickle

MAJOR = cloudpickle.__version__.partition(".")[0]


def run(code: str, path: Path) -> str:
    """Run code where ``path`` goes before all that is installed."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}); from dmap import versions; {code}"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert said.returncode == 0, said.stderr
    return said.stdout


def test_the_label_has_the_major_version_that_is_installed() -> None:
    assert cloudpickle_label() == f"cloudpickle-{MAJOR}"


def test_looking_for_it_imports_neither_cloudpickle_nor_what_is_slow(tmp_path: Path) -> None:
    code = "versions.cloudpickle_label(); print(*sys.modules)"
    slow = {"cloudpickle", "importlib.metadata", "tokenize", "inspect"}
    assert not slow & set(run(code, tmp_path).split())


@pytest.mark.parametrize(
    ("name", "source", "label"),
    [
        ("cloudpickle/__init__.py", "import x\n__version__ = '41.0.dev1'\n", "cloudpickle-41"),
        ("cloudpickle.py", '__version__="2.2"', "cloudpickle-2"),
        ("cloudpickle.py", "from somewhere import __version__\n", ""),
        ("cloudpickle/nothing.py", "__version__ = '3'\n", ""),  # a package without a source
    ],
)
def test_it_is_what_the_source_says(tmp_path: Path, name: str, source: str, label: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(source)
    # Behind us is nothing else of that name.
    code = "sys.path[1:] = [p for p in sys.path[1:] if 'site-packages' not in p]; "
    assert run(code + "print(versions.cloudpickle_label())", tmp_path) == f"{label}\n"


def test_without_cloudpickle_there_is_no_label(tmp_path: Path) -> None:
    code = "sys.modules['cloudpickle'] = None; print(versions.with_cloudpickle(['gpu']))"
    assert run(code, tmp_path) == "('gpu',)\n"


def test_a_worker_says_it_once_behind_its_own_labels() -> None:
    label = f"cloudpickle-{MAJOR}"
    assert with_cloudpickle(["gpu"]) == ("gpu", label)
    assert with_cloudpickle([label, "gpu"]) == (label, "gpu")


@pytest.mark.parametrize("label", ["cloudpickle", "cloudpickle-", "cloudpickle-x", "my-3", "3"])
def test_other_labels_are_what_people_gave(label: str) -> None:
    assert split_labels([label]) == ([], [label])
