"""The benchmarks' machinery, with reports that nobody measured and sizes that measure nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # pytest may have been started anywhere

from benchmarks import documents, plot, questions, rounds, table  # noqa: E402
from benchmarks.harness import Call, Question, Way, latency, rate, settle  # noqa: E402
from benchmarks.peers import PEERS  # noqa: E402
from benchmarks.processes import descendants  # noqa: E402


def way(who: str, peer: str, values: dict[str, list[float]], **others: Any) -> dict[str, Any]:
    return {"who": who, "peer": peer, "n": 10, "values": values, "failed": "", **others}


REPORT: dict[str, Any] = {
    "date": "2005-10-01T00:00:00+00:00",
    "machine": {
        "processor": "a slow one",
        "n_cores": 2,
        "system": "Linux",
        "memory_gib": 1.5,
        "load_average": [0.0, 0.1, 0.2],
    },
    "versions": {"python": "3.11.0"},
    "rounds": 3,
    "is_quick": False,
    "left_out": ["ray (not installed)"],
    "questions": {
        "speed": {
            "title": "how fast",
            "about": "What it is.",
            "is_more_better": True,
            "n": 10,
            "ways": [
                way("dmap", "dmap", {"jobs/s": [100.0, 600.0, 200.0]}),
                way("Pool.map", "pool", {"jobs/s": [400.0, 400.0, 400.0]}, n=4),
                way("Pool.map, chunksize=2 (best)", "pool", {"jobs/s": [500.0]}),
                way("dask", "dask", {}, failed="OSError: a | b"),
                way("limit: a copy", "limit", {"jobs/s": [2000.0]}),
            ],
        },
        "wait": {
            "title": "how long",
            "about": "What it is.",
            "is_more_better": False,
            "n": 10,
            "ways": [
                way("dmap", "dmap", {"us, p50": [100.0], "us, p99": [400.0, 200.0]}),
                way("Pool.map", "pool", {"us, p50": [50.0], "us, p99": [600.0]}),
            ],
        },
    },
}


# --- tables, plot and documents ---------------------------------------------------------------


def test_a_row_has_the_median_the_spread_and_how_much_better_dmap_is() -> None:
    rows = table.table(REPORT["questions"]["speed"]).splitlines()[2:]
    assert rows == [
        "| dmap | 200 jobs/s | 100 to 600 |  |",
        "| Pool.map (4 items) | 400 jobs/s |  | 0.5 x |",
        "| Pool.map, chunksize=2 (best) | 500 jobs/s |  | 0.4 x |",
        "| dask | failed: OSError: a / b |  |  |",
        "| limit: a copy | 2,000 jobs/s |  | 0.1 x |",
    ]


def test_several_units_are_columns_of_one_table() -> None:
    assert table.table(REPORT["questions"]["wait"]).splitlines() == [
        "| | us, p50 | us, p99 | dmap is |",
        "|---|---:|---:|---:|",
        "| dmap | 100 | 300 (200 to 400) |  |",
        "| Pool.map | 50 | 600 | 0.5, 2 x |",
    ]


def test_the_summary_has_the_best_peer_also_where_dmap_is_behind() -> None:
    assert table.summary(REPORT).splitlines()[2:] == [
        "| how fast | 200 jobs/s | 500 jobs/s (Pool.map, chunksize=2) | 2,000 jobs/s |",
        "| how long | 100 us, p50 | 50 us, p50 (Pool.map) |  |",
        "| how long | 300 us, p99 | 600 us, p99 (Pool.map) |  |",
    ]


def test_the_heading_says_what_was_left_out() -> None:
    assert "Left out: ray (not installed)." in table.heading(REPORT)


def test_the_plot_has_a_bar_for_each_peer_that_has_an_answer() -> None:
    found = [
        (name, round(better, 3)) for name, better, _ in plot.bars(REPORT["questions"]["speed"])
    ]
    assert found == [("multiprocessing.Pool", 2.5), ("limit", 10.0)]


@pytest.mark.slow
def test_the_plot_of_a_report_is_always_the_same_file(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is in the extra `bench` and not installed")
    file = tmp_path / "plot.svg"
    plot.draw(REPORT, file)
    first = file.read_text()
    assert "how fast" in first
    assert "how long" in first
    plot.draw(REPORT, file)
    assert file.read_text() == first


@pytest.mark.parametrize("path", documents.PLACES, ids=lambda path: path.name)
def test_a_document_says_what_the_last_report_says(path: Path) -> None:
    place, content = documents.PLACES[path]
    report = json.loads(documents.RESULTS.read_text())
    text = path.read_text()
    assert documents.written(text, place, content(report)) == text, (
        "python -m benchmarks.documents renews it"
    )


def test_only_what_stands_between_the_marks_is_renewed() -> None:
    text = "before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n"
    assert documents.written(text, "figures", r"n\1w") == text.replace("old", r"n\1w")
    with pytest.raises(ValueError, match="there are 0"):
        documents.written(text, "tables", "new")


# --- how a way is measured --------------------------------------------------------------------


class Slow:
    """A call whose time is counted, not waited for: a second and some for each chunk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds_a_chunk: float) -> None:
        self.now = 0.0
        self.seconds_a_chunk = seconds_a_chunk
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self, n: int, size: int | None = None) -> list[int]:
        chunks = -(-n // (size or 1))
        self.now += 0.001 * n + self.seconds_a_chunk * chunks + 0.01 * (size or 0) ** 2 / 100
        return list(range(n))


@contextmanager
def opened() -> Iterator[Call]:
    yield lambda n: list(range(n))


def question(**others: Any) -> Question:
    ways = [Way("dmap", "dmap", opened)]
    fields = {"n": 1000, "quick_n": 10, "take": rate("jobs/s"), "ways": ways, **others}
    return Question(name="single", title="", about="", **fields)


def test_who_takes_long_is_given_what_fits_into_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Slow(monkeypatch, seconds_a_chunk=0.099)  # a tenth of a second an item
    (settled,) = settle(question(), Way("dmap", "dmap", opened), call, 1000, 5.0)
    assert settled.n == 50
    (settled,) = settle(question(), Way("dmap", "dmap", opened), call, 1000, None)
    assert settled.n == 1000


def test_a_way_with_chunks_is_measured_by_default_and_at_its_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = Slow(monkeypatch, seconds_a_chunk=0.05)
    mapped = Way("map", "pool", opened, n_workers=2, who_best="bag")
    default, best = settle(question(), mapped, call, 1600, None)
    assert (default.who, best.who) == ("map", "bag, chunksize=200 (best)")
    begin = call.now
    best.call(best.n)
    assert call.now - begin == pytest.approx(1.6 + 8 * 0.05 + 4.0)


def test_a_latency_is_the_median_and_the_99th_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def call(item: int) -> int:
        nonlocal now
        now += 1.0 if item < 95 else item - 90
        return item

    assert latency(call, 99) == pytest.approx({"us, p50": 1e6, "us, p99": 8e6})


def test_a_wrong_result_is_no_rate() -> None:
    with pytest.raises(AssertionError, match="wrong result"):
        rate("jobs/s", lambda n: list(range(n)))(lambda n: [0] * n, 3)


# --- questions, in processes ------------------------------------------------------------------


@pytest.mark.parametrize("name", questions.names())
def test_a_question_is_asked_of_dmap_first(name: str) -> None:
    asked = questions.load(name)
    assert asked.name == name
    assert asked.ways[0].peer == "dmap"
    assert {way.peer for way in asked.ways} <= {*PEERS, "limit"}
    assert asked.quick_n <= asked.n


BESIDE_ALL = ["single", "back", "noop", "items", "tail", "closure", "results", "arguments", "cold"]


@pytest.mark.parametrize("name", BESIDE_ALL)
def test_a_question_has_a_limit_and_the_standard_librarys_pools(name: str) -> None:
    peers = [way.peer for way in questions.load(name).ways]
    assert peers[-1] == "limit"
    assert {"pool", "executor"} <= set(peers)


def asked_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, source: str
) -> list[rounds.Row]:
    """Ask a question of this source in the runners' own processes."""
    (tmp_path / f"{name}.py").write_text(
        "import os, subprocess\n"
        "from contextlib import contextmanager\n"
        "from benchmarks.harness import Question, Way, rate\n"
        f"{source}\n"
        f"QUESTION = Question({name!r}, '', '', WAYS, 10, 10, rate('jobs/s'))\n"
    )
    (tmp_path / "sitecustomize.py").write_text(
        f"import benchmarks.questions as found; found.__path__.append({str(tmp_path)!r})\n"
    )
    paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setattr(questions, "__path__", [*questions.__path__, str(tmp_path)])
    return rounds.ask(questions.load(name), 3)


def test_a_way_that_fails_is_a_row_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = """
turns = []
@contextmanager
def well(): yield lambda n: n
@contextmanager
def absent():
    raise ImportError("it is not there")
    yield
@contextmanager
def raises():
    def call(n):
        turns.append(n)
        if len(turns) > 2: raise ValueError("two\\nlines")
    yield call
@contextmanager
def dies():
    def call(n): os._exit(3)
    yield call
WAYS = [Way(open.__name__, "limit", open) for open in (well, absent, raises, dies)]
"""
    before = set(descendants(os.getpid()))
    rows = {row.who: row for row in asked_of(monkeypatch, tmp_path, "failing", source)}
    assert {who: row.failed for who, row in rows.items()} == {
        "well": "",
        "absent": "ImportError: it is not there",
        "raises": "ValueError: two lines",
        "dies": "ended with 3: no word",
    }
    assert len(rows["well"].values["jobs/s"]) == 3
    assert not rows["raises"].values
    assert set(descendants(os.getpid())) <= before


def test_a_way_that_hangs_is_ended_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rounds, "CALL_TIMEOUT", 0.2)
    source = """
turns = []
@contextmanager
def hangs():
    def call(n):
        turns.append(n)
        if len(turns) > 1: subprocess.run(["sleep", "60"])
    yield call
WAYS = [Way("hangs", "limit", hangs)]
"""
    before = set(descendants(os.getpid()))
    (row,) = asked_of(monkeypatch, tmp_path, "hanging", source)
    assert row.failed == "took more than 0.2 s in a round"
    assert set(descendants(os.getpid())) <= before


def test_what_a_way_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    # A daemon of a child, in a session of its own.
    script = (
        "import os, subprocess, sys\n"
        "from benchmarks.processes import adopt_orphans, descendants, end_descendants\n"
        "adopt_orphans()\n"
        "subprocess.run(['sh', '-c', 'setsid sleep 60 >/dev/null & exit'], check=True)\n"
        "print(len(descendants(os.getpid())))\n"
        "end_descendants(os.getpid())\n"
        "print(len(descendants(os.getpid())))\n"
    )
    argv = [sys.executable, "-c", script]
    said = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert said.stdout.split() == ["1", "0"]


@pytest.mark.slow
def test_dmap_and_a_pool_answer(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    argv = ["--quick", "--rounds", "1", "--only", "back", "--peers", "pool"]
    said = subprocess.run(
        [sys.executable, "-m", "benchmarks", *argv, "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    report = json.loads(file.read_text())
    assert list(report["questions"]) == ["back"]
    for asked in report["questions"].values():
        assert [way["peer"] for way in asked["ways"]] == ["dmap", "pool", "limit"]
        assert not any(way["failed"] for way in asked["ways"])
        assert table.table(asked) in said.stdout
    assert re.search(r"Left out: .*ray \(not asked for\)", said.stdout)
