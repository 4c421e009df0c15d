"""The command `dmap`, against servers that run."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from dmap.cli import main
from dmap.cli.table import escaped, table
from jobserver import protocol as wire
from jobserver.server import Server
from jobserver.state import State

PATIENCE = 20.0


@contextlib.contextmanager
def serving(name: str) -> Iterator[str]:
    """Run a server in a thread; yield its endpoint."""
    server = Server(State(name, "b00t"))
    endpoint = server.bind("tcp://127.0.0.1:0")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield endpoint
    finally:
        server.stop()
        thread.join(PATIENCE)
        server.close()


@pytest.fixture
def sammy() -> Iterator[str]:
    with serving("sammy") as endpoint:
        yield endpoint


@pytest.fixture
def nowhere() -> Iterator[str]:
    """Return an endpoint where nobody answers: its connections are never accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


class Peer:
    """A client or worker that says what it is told."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE))
        self.socket.connect(endpoint)

    def say(self, message: wire.Message, *bodies: bytes) -> None:
        self.socket.send_multipart([wire.encode(message), *bodies])

    def wait_for(self, kind: type[wire.Message]) -> Any:
        while True:
            message = wire.decode_to_peer(self.socket.recv_multipart()[0])
            if isinstance(message, kind):
                return message


@pytest.fixture
def peer() -> Iterator[Callable[[str, wire.Hello], Peer]]:
    """Return what makes peers that have said Hello."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peers: list[Peer] = []

    def make(endpoint: str, hello: wire.Hello) -> Peer:
        peers.append(Peer(context, endpoint))
        peers[-1].say(hello)
        peers[-1].wait_for(wire.Welcome)
        return peers[-1]

    yield make
    for one in peers:
        one.socket.close(linger=0)
    context.term()


MakePeer = Callable[[str, wire.Hello], Peer]
CLIENT = wire.Hello(wire.MAJOR, wire.MINOR, "client", b"c" * 16)
OTHER_CLIENT = wire.Hello(wire.MAJOR, wire.MINOR, "client", b"d" * 16)
WORKER = wire.Hello(
    wire.MAJOR,
    wire.MINOR,
    "worker",
    b"w" * 16,
    python="3.11",
    name="papag-0",
    host="papag",
    pid=77,
    labels=("gpu", "cloudpickle-3"),
)


def submitted(peer: Peer, *, function: str = "resize", n: int = 2) -> None:
    """Let a client's jobs arrive: of a map that it describes."""
    peer.say(wire.OpenLane(1, "thumbnails", n))
    jobs = [wire.JobSpec(ticket, 1) for ticket in range(n)]
    peer.say(wire.SubmitJobs(function, jobs, lane=1), b"x" * n)
    peer.wait_for(wire.JobsAccepted)


def grabbed(peer: Peer) -> None:
    """Let a worker have a job that is at 3 of 10."""
    peer.say(wire.CanDo([wire.Ability("resize")]))
    peer.say(wire.GrabJobs())
    handle = peer.wait_for(wire.JobAssign).jobs[0].handle
    peer.say(wire.WorkStatus(handle, 3, 10))


def as_json(
    capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0
) -> list[dict[str, Any]]:
    assert main([*arguments, "--json"]) == code
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_status_has_a_row_for_each_function(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(peer(sammy, CLIENT))
    submitted(peer(sammy, OTHER_CLIENT), function="thumb", n=3)
    rows = as_json(capsys, "status", "--servers", sammy)
    assert [(row["function"], row["normal"]) for row in rows] == [("resize", 2), ("thumb", 3)]


def test_workers_has_a_row_for_each_worker(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(peer(sammy, CLIENT))
    grabbed(peer(sammy, WORKER))
    [row] = as_json(capsys, "workers", "--servers", sammy)
    since = row.pop("since")
    assert 0 <= since < PATIENCE
    assert row == {
        "server": "sammy",
        "name": "papag-0",
        "host": "papag",
        "pid": 77,
        "child": 0,
        "python": "3.11",
        "cloudpickle": "3",
        "labels": ["gpu"],
        "abilities": ["resize"],
        "n_abilities": 1,
        "jobs": 1,
        "state": "busy",
    }


def test_people_see_the_version_of_cloudpickle_beside_that_of_python(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    grabbing = peer(sammy, WORKER)
    submitted(peer(sammy, CLIENT))
    grabbed(grabbing)
    assert main(["workers", "--servers", sammy]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[4:7] == ["python", "cloudpickle", "labels"]
    assert row.split()[4:7] == ["3.11", "3", "gpu"]


def test_jobs_has_a_row_for_each_job_the_running_ones_first(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(peer(sammy, CLIENT))
    grabbed(peer(sammy, WORKER))
    assert main(["jobs", "--servers", sammy]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:]]
    ages = [float(row.pop(7)) for row in rows]
    assert [" ".join(row) for row in rows] == [
        "sammy:b00t:1 resize running normal 1 1 1 papag-0 papag 3/10 thumbnails",
        "sammy:b00t:2 resize ready normal 1 1 0 thumbnails",
    ]
    assert all(0 <= age < PATIENCE for age in ages)


def test_cancel_ends_a_job_by_its_handle(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    client = peer(sammy, CLIENT)
    submitted(client)
    assert main(["cancel", "sammy:b00t:2", "--servers", sammy]) == 0
    assert capsys.readouterr().out == "cancelled\n"
    assert client.wait_for(wire.JobFail).ticket == 1
    assert main(["cancel", "sammy:b00t:2", "--servers", sammy]) == 0


def test_cancel_says_that_a_running_job_is_stopped_by_its_worker(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(peer(sammy, CLIENT))
    grabbed(peer(sammy, WORKER))
    assert main(["cancel", "sammy:b00t:1", "--servers", sammy]) == 0
    assert "its worker is told" in capsys.readouterr().out


def test_cancel_for_programs_says_how_the_job_ended(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(peer(sammy, CLIENT))
    assert main(["cancel", "sammy:b00t:2", "--servers", sammy, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"handle": "sammy:b00t:2", "ended": "cancelled"}


@pytest.mark.parametrize(
    ("handle", "text"),
    [("sammy:b00t:99", "does not know the job"), ("sammy:0ld:1", "has it restarted?")],
)
def test_an_unknown_handle_is_an_error(
    sammy: str, handle: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", handle, "--servers", sammy]) == 1
    assert text in capsys.readouterr().err


def test_what_is_no_handle_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cancel", "seven"])
    assert caught.value.code == 2
    assert "name:boot:number" in capsys.readouterr().err


def test_every_named_server_is_asked(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving("kenny") as kenny:
        submitted(peer(sammy, CLIENT))
        submitted(peer(kenny, CLIENT), function="thumb")
        rows = as_json(capsys, "status", "--servers", f"{sammy},{kenny}")
        assert [row["server"] for row in rows] == ["sammy", "kenny"]
        assert main(["cancel", "kenny:b00t:1", "--servers", f"{sammy},{kenny}"]) == 0


def test_the_servers_may_be_named_in_the_environment(
    sammy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DMAP_SERVERS", sammy)
    assert as_json(capsys, "status") == []


def test_a_silent_server_is_an_error_within_the_bound_and_the_others_are_shown(
    sammy: str, nowhere: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(peer(sammy, CLIENT))
    assert main(["status", "--servers", f"{nowhere},{sammy}", "--timeout", "0.2"]) == 1
    out, err = capsys.readouterr()
    assert "resize" in out
    assert f"{nowhere} did not answer within 0.2 s" in err


def test_a_large_answer_comes_through(
    sammy: str, peer: MakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(peer(sammy, CLIENT), n=9000)
    assert len(as_json(capsys, "jobs", "--servers", sammy)) == 9000


def test_what_peers_sent_does_not_steer_the_terminal() -> None:
    shown = table(["map"], [["\x1b[2J\nfunction"]])
    assert shown == "map\n\\x1b[2J\\nfunction"
    assert escaped("é\u202e\x07") == "é\\u202e\\x07"
