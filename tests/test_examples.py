"""The examples do what they say. The one that wants PostgreSQL has a file of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_counting_identifiers_says_that_the_result_equals_the_builtin_maps() -> None:
    said = subprocess.run(
        [sys.executable, EXAMPLES / "count_identifiers.py"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    *most_frequent, summary, _, verdict = said.stdout.splitlines()
    assert len(most_frequent) == 20
    assert "self" in most_frequent[0].split()
    assert "files" in summary
    assert "workers" in summary
    assert verdict.endswith("the results are equal")
