"""The benchmarks run to their end, with sizes that measure nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"


def test_every_figure_is_measured_beside_both_pools(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    argv = [sys.executable, str(RUN), "--rounds", "2", "--scale", "0.001", "--json", str(file)]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr

    figures = json.loads(file.read_text())["figures"]
    assert list(figures) == ["single", "back", "noop", "ms", "cold"]
    for figure in figures.values():
        ways = list(figure["ways"])
        for contender in ("dmap", "Pool", "ProcessPoolExecutor"):
            assert any(way.startswith(contender) for way in ways)
            assert all(way in said.stdout for way in ways)
        for values in figure["ways"].values():
            assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in values.values())
