"""The private cluster of a process that names no server."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cluster import wait_for

from dmap.cores import n_cores

pytestmark = pytest.mark.slow


def run(code: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("dmap-*"))


def test_a_one_liner_works_and_says_one_line() -> None:
    said = run("from dmap import dmap; x = 5; print(dmap(lambda v: v + x, range(4)))")
    assert said.stdout == "[5, 6, 7, 8]\n"
    assert len(said.stderr.splitlines()) == 1
    assert "set_job_servers" in said.stderr
    assert not folders()


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    (tmp_path / "prices.py").write_text("def double(x):\n    return 2 * x\n")
    script.write_text(
        "from dmap import dmap\nimport prices\n"
        "class Point:\n    def __init__(self, x): self.x = x\n"
        "def make(x): return Point(x)\n"
        "print(dmap(prices.double, [1, 2]), [p.x for p in dmap(make, [3, 4])])\n"
    )
    said = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout == "[2, 4] [3, 4]\n"


def test_it_starts_once_for_all_calls() -> None:
    said = run(
        "from dmap import dmap, submit\n"
        "import dmap as d\n"
        "d.dmap(str, [1]); d.submit(str, 2).result(); list(d.imap(str, [3]))\n"
    )
    assert said.returncode == 0, said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_it_has_a_worker_a_core_that_may_be_used() -> None:
    cores = n_cores()
    said = run(
        "import os, dmap, time\n"
        "def who(n):\n"
        "    import os, time\n"
        "    time.sleep(0.05)\n"
        "    return os.getpid()\n"
        "pids = set()\n"
        f"while len(pids) < {cores}: pids |= set(dmap.dmap(who, range(8), chunksize=1))\n"
        "print(len(pids))\n"
    )
    assert said.stdout == f"{cores}\n", said.stderr


def test_it_works_under_a_running_loop() -> None:
    said = run(
        "import asyncio, dmap\n"
        "async def main():\n"
        "    values = dmap.dmap(str, range(3))\n"
        "    return values, await dmap.submit(pow, 2, 3)\n"
        "print(asyncio.run(main()))\n"
    )
    assert said.stdout == "(['0', '1', '2'], 8)\n", said.stderr


def test_its_folder_is_for_this_user_alone() -> None:
    said = run(
        "import dmap, os, dmap.local\n"
        "dmap.dmap(str, [1])\n"
        "print(oct(os.stat(dmap.local._cluster.folder).st_mode))\n"
    )
    assert stat.S_IMODE(int(said.stdout, 8)) == 0o700


def test_shutdown_ends_it_and_the_next_call_starts_another() -> None:
    said = run(
        "import dmap, os, dmap.local\n"
        "dmap.dmap(str, [1])\n"
        "cluster = dmap.local._cluster\n"
        "dmap.shutdown()\n"
        "print(cluster.folder.exists(), [p.poll() is None for p in cluster._processes])\n"
        "print(dmap.dmap(str, [1]))\n"
    )
    assert said.stdout == "False [False, False]\n['1']\n", said.stderr


def test_nothing_is_left_of_it_when_its_process_is_killed() -> None:
    code = (
        "import dmap, time, dmap.local\n"
        "dmap.dmap(str, [1])\n"
        "dmap.submit(time.sleep, 60)\n"
        "print(*[p.pid for p in dmap.local._cluster._processes], flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    wait_for(lambda: not folders())


def test_an_interrupt_at_the_terminal_reaches_this_process_alone() -> None:
    said = run(
        "import dmap, os, dmap.local\n"
        "dmap.dmap(str, [1])\n"
        "print([os.getsid(p.pid) == p.pid for p in dmap.local._cluster._processes])\n"
    )
    assert said.stdout == "[True, True]\n"


def test_a_forked_child_uses_its_parents_cluster_and_does_not_keep_it() -> None:
    said = run(
        "import dmap, os\n"
        "dmap.dmap(str, [1])\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    print(dmap.dmap(str, [2]), flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print(dmap.dmap(str, [3]))\n"
    )
    assert said.stdout == "['2']\n['3']\n", said.stderr
    assert len(said.stderr.splitlines()) == 1
    assert not folders()


def test_a_map_inside_a_map_uses_the_same_cluster() -> None:
    said = run(
        "import dmap\n"
        "def inner(n):\n"
        "    import dmap\n"
        "    return sum(dmap.dmap(lambda x: x, range(n)))\n"
        "print(dmap.dmap(inner, range(5)))\n"
    )
    assert said.stdout == "[0, 0, 1, 3, 6]\n", said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_a_server_that_does_not_come_up_is_an_error_with_its_reason() -> None:
    said = run(
        "import dmap, dmap.local\n"
        "dmap.local._SERVE = 'raise SystemExit(\"no luck\")'\n"
        "try:\n    dmap.dmap(str, [1])\n"
        "except dmap.DmapError as error:\n    print(error)\n"
    )
    assert "no luck" in said.stdout, said.stderr
    assert not folders()


def test_an_interrupt_ends_a_map_with_what_was_finished(tmp_path: Path) -> None:
    path = tmp_path / "two"
    code = (
        "import dmap, sys\n"
        "from dmap.map import Map\n"
        "def work(x):\n"
        "    import time\n"
        "    if x > 2:\n"
        "        time.sleep(60)\n"
        "    return x\n"
        "put = Map._put\n"
        "def put_and_tell(self, start, part):\n"
        "    put(self, start, part)\n"
        "    if len(self._parts) == 2:\n"
        f"        open({str(path)!r}, 'w').close()\n"
        "Map._put = put_and_tell\n"
        "try:\n    dmap.dmap(work, range(10), chunksize=1)\n"
        "except KeyboardInterrupt as error:\n"
        "    print(sorted(error.results.items())[:2], flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    wait_for(path.exists)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert said in ("[(0, 0), (1, 1)]\n", "[(0, 0), (2, 2)]\n", "[(1, 1), (2, 2)]\n")
