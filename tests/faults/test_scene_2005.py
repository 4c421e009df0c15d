"""The scene of 2005: two job servers, workers on two hosts, ten items that name their worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from lab import Lab

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from dmap import current_job, dmap

folder = sys.argv[1]

def name_worker(i):
    import os, time
    worker = current_job().worker
    open(os.path.join(folder, worker), "w").close()
    deadline = time.monotonic() + 20
    while len(os.listdir(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)  # nobody takes all ten before the other one has come
    return f"{i} = {worker}"

print(json.dumps(dmap(name_worker, range(1, 11))))
"""

JOBSERVER = [sys.executable, "-m", "jobserver"]
WORKER = [sys.executable, "-m", "dmap.supervisor", "--processes", "1"]


def see_scene(said: str) -> None:
    """Assert that both workers appear and the items kept their order."""
    lines = [line.split(" = ") for line in json.loads(said)]
    assert [number for number, _ in lines] == [str(i) for i in range(1, 11)]
    assert {worker for _, worker in lines} == {"sammy", "papag"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "workers"
    folder.mkdir()
    return folder


@pytest.mark.skipif(Lab.why_unavailable() is not None, reason=str(Lab.why_unavailable()))
def test_workers_on_two_hosts_share_ten_items(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "scene.py"
    script.write_text(SCRIPT)
    servers = "sammy,kenny"
    with Lab(["sammy", "kenny", "papag", "home"]) as lab:
        for host in ("sammy", "kenny"):
            bind = f"tcp://{lab.addr(host)}:4731"
            lab.popen(host, [*JOBSERVER, "--bind", bind, "--name", host, "--insecure"])
        for host in ("sammy", "papag"):
            # A network namespace has the machine's own name; that of its host it gets here.
            named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
            lab.popen(host, [*named, *WORKER, "--servers", servers])
        client: subprocess.CompletedProcess[Any] = lab.run(
            "home",
            [sys.executable, str(script), str(folder)],
            env={**os.environ, "DMAP_SERVERS": servers},
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        )
    see_scene(client.stdout)


def test_workers_with_two_names_share_ten_items(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "scene.py"
    script.write_text(SCRIPT)
    with Cluster(n_servers=2) as cluster:
        for name in ("sammy", "papag"):
            cluster.start_worker(1, "--name", name)
        client = subprocess.run(
            [sys.executable, str(script), str(folder)],
            env={**os.environ, "DMAP_SERVERS": ",".join(cluster.endpoints)},
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        )
    see_scene(client.stdout)
