"""The benchmarks' own machinery, with sizes that measure nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import questions  # noqa: E402


@pytest.mark.parametrize("name", questions.names())
def test_a_question_is_asked_of_dmap_first(name: str) -> None:
    question = questions.load(name)
    assert question.name == name
    assert question.ways[0].peer == "dmap"
