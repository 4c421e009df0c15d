"""Closures of every kind through real processes, from every place that code can be written in."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

SOURCE = Path(__file__).parent / "closures" / "cases.py"
NAMES = re.findall(r"^@case\ndef (\w+)", SOURCE.read_text(), re.MULTILINE)
WITHIN = 120.0

CELLS = """
import __future__, linecache, re, sys
for n, text in enumerate(re.split("# %%.*", open({path!r}).read())):
    name = f"/tmp/ipykernel_1/{{n}}.py"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec", __future__.annotations.compiler_flag), globals())
"""

REFUSED = {
    "a_generator_function": ("ClosureError", "generator"),
    "an_async_function": ("ClosureError", "is an async function"),
}


@pytest.fixture(scope="module")
def cluster(kept: None) -> Iterator[Cluster]:
    """One server, and two workers that have none of the cases' code."""
    with Cluster() as cluster:
        cluster.start_worker(n_processes=2)
        yield cluster


class Places:
    """Runs the cases from each place once."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._found: dict[str, Any] = {}

    def found(self, place: str) -> Any:
        """Return what became of all cases in that place: here, and on the workers."""
        if place not in self._found:
            done = subprocess.run(
                [sys.executable, *self._arguments(place)],
                cwd=self._folder,
                env={**os.environ, "DMAP_SERVERS": self._cluster.endpoints[0]},
                stdout=subprocess.PIPE,
                text=True,
                timeout=WITHIN,
            )
            assert done.returncode == 0
            self._found[place] = json.loads(done.stdout)
        return self._found[place]

    def _arguments(self, place: str) -> list[str]:
        text = SOURCE.read_text()
        match place:
            case "script":
                (self._folder / "script.py").write_text(text)
                return ["script.py"]
            case "-c":
                return ["-c", text]
            case "-m":
                (self._folder / "app").mkdir()
                (self._folder / "app" / "__main__.py").write_text(text)
                return ["-m", "app"]
            case "cells":
                (self._folder / "cells.py").write_text(CELLS.format(path=str(SOURCE)))
                return ["cells.py"]
            case _:
                (self._folder / "cases_next_to_it.py").write_text(text)
                return ["-c", "import cases_next_to_it; cases_next_to_it.main()"]


@pytest.fixture(scope="module")
def places(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(cluster, tmp_path_factory.mktemp("places"))


def test_there_are_at_least_sixty_cases() -> None:
    assert len(set(NAMES)) >= 60


@pytest.mark.parametrize("place", ["script", "-c", "-m", "cells", "module"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mapped_function_does_what_it_does_here(places: Places, place: str, name: str) -> None:
    here, there = places.found(place)[name]
    if name in REFUSED:
        error, words = REFUSED[name]
        assert there[:2] == ["error", error]
        assert words in there[2]
    else:
        assert there == here
