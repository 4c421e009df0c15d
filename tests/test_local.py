"""The private cluster of a process that names no server."""

from __future__ import annotations

import os
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


PROCESSES = """
import dmap, os, time, dmap.local

def processes():
    \"\"\"Return the pids of the local cluster: of its supervisor, its server and its workers.\"\"\"
    cluster = dmap.local._cluster
    pids = []
    while len(pids) < 2 + cluster.n_processes:  # one may have done what there was, ahead of others
        supervisor = cluster._process.pid
        with open(f"/proc/{supervisor}/task/{supervisor}/children") as file:
            pids = [supervisor, *map(int, file.read().split())]
    return pids
"""


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
        PROCESSES + "dmap.dmap(str, [1])\n"
        "folder, pids = dmap.local._cluster.folder, processes()\n"
        "dmap.shutdown()\n"
        "left = [pid for pid in pids if os.path.exists(f'/proc/{pid}')]\n"
        "print(os.path.exists(folder), len(pids), left)\n"
        "print(dmap.dmap(str, [1]))\n"
    )
    assert said.stdout == f"False {2 + n_cores()} []\n['1']\n", said.stderr


def test_nothing_is_left_of_it_when_its_process_is_killed() -> None:
    code = (
        PROCESSES + "dmap.dmap(str, [1])\n"
        "dmap.submit(time.sleep, 60)\n"
        "print(*processes(), flush=True)\n"
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
        PROCESSES + "dmap.dmap(str, [1])\nprint(*[os.getsid(pid) == pid for pid in processes()])\n"
    )
    assert said.stdout.split() == ["True"] * (2 + n_cores()), said.stderr


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
        "dmap.local._RUN = 'raise SystemExit(\"no luck\")'\n"
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
        "    if self._n_done == 3:\n"
        f"        open({str(path)!r}, 'w').close()\n"
        "Map._put = put_and_tell\n"
        "try:\n    dmap.dmap(work, iter(range(10)), chunksize=1)\n"
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


def test_a_job_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "zmq.py").write_text("raise ImportError('no luck')\n")
    said = run(
        "import dmap, sys\n"
        "dmap.Client\n"  # has loaded the real one
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    dmap.dmap(str, [1])\n"
        "except dmap.DmapError as error:\n    print(error)\n"
    )
    assert "ImportError: no luck" in said.stdout, said.stderr
    assert not folders()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each of them is a new program")
def test_its_processes_hold_what_is_theirs_alone() -> None:
    said = run(
        PROCESSES + "import re\n"
        "dmap.dmap(str, [1])\n"
        "cluster = dmap.local._cluster\n"
        "lifeline = os.readlink(f'/proc/self/fd/{cluster._lifeline}')\n"
        "output = os.readlink('/proc/self/fd/1')\n"
        "for pid in processes():\n"
        "    folder = f'/proc/{pid}/fd'\n"
        "    held = [os.readlink(f'{folder}/{fd}') for fd in os.listdir(folder)]\n"
        "    pages = sum('dmap-page' in link for link in held)\n"
        "    print(held.count(lifeline), held.count(output), pages > 0)\n"
    )
    # The supervisor, the server, the workers; a page is held by a supervisor and by one worker.
    assert said.stdout.splitlines() == ["1 1 True", "1 0 False", *["0 1 True"] * n_cores()]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is nothing else")
def test_it_works_where_processes_cannot_be_forked() -> None:
    said = run(
        PROCESSES + "dmap.local._RUN = 'import dmap.start as s; s.can_fork = lambda: False; '"
        " + dmap.local._RUN\n"
        "print(dmap.dmap(lambda x: x + 1, range(3)))\n"
        "print(len({open(f'/proc/{pid}/cmdline').read() for pid in processes()}))\n"
    )
    assert said.stdout == f"[1, 2, 3]\n{2 + n_cores()}\n", said.stderr
    assert not folders()


def test_its_workers_are_like_all_workers() -> None:
    said = run(
        "import dmap\n"
        "def look(x):\n"
        "    import gc, os, sys\n"
        "    return gc.isenabled(), sys.argv, os.environ['OMP_NUM_THREADS'], sys.path[0]\n"
        "print(dmap.dmap(look, [1]))\n"
    )
    n_threads = os.environ.get("OMP_NUM_THREADS", "1")
    assert said.stdout == f"[(True, ['dmap-worker'], {n_threads!r}, '')]\n", said.stderr


def test_what_its_workers_print_goes_where_the_process_prints() -> None:
    said = run(
        "import dmap, sys\n"
        "def tell(x):\n"
        "    print('out', x)\n"
        "    print('err', x, file=sys.stderr)\n"
        "dmap.dmap(tell, [1])\n"
    )
    assert said.stdout == "out 1\n"
    assert said.stderr.splitlines()[1:] == ["err 1"]


def test_it_works_for_a_process_without_an_output() -> None:
    code = "import os; os.close(0); os.close(1); from dmap import dmap; dmap(print, [1])"
    assert run(code).returncode == 0


def test_without_a_folder_for_it_one_is_asked_for() -> None:
    said = run(
        "import os, dmap\n"
        "def refuse(*arguments):\n    raise PermissionError\n"
        "os.mkdir = refuse\n"
        "try:\n    dmap.dmap(str, [1])\n"
        "except dmap.DmapError as error:\n    print(error)\n"
    )
    assert "name one in TMPDIR" in said.stdout, said.stderr


def test_one_that_was_begun_and_not_needed_goes_unmentioned() -> None:
    said = run(
        "import dmap, sys\n"
        "async def fetch(x): ...\n"
        "try:\n    dmap.dmap(fetch, [1])\n"
        "except dmap.ClosureError:\n    print('dmap.local' in sys.modules)\n"
    )
    assert (said.stdout, said.stderr) == ("True\n", "")
    assert not folders()


def test_a_server_that_hangs_goes_all_the_same() -> None:
    said = run(
        PROCESSES + "import signal\n"
        "dmap.dmap(str, [1])\n"
        "pids = processes()\n"
        "os.kill(pids[1], signal.SIGSTOP)\n"
        "dmap.shutdown()\n"
        "print([pid for pid in pids if os.path.exists(f'/proc/{pid}')])\n"
    )
    assert said.stdout == "[]\n", said.stderr
    assert not folders()
