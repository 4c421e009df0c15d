"""Which messages of one turn become one."""

import pytest

from jobserver import protocol as wire
from jobserver.coalesce import coalesce
from jobserver.jobs import Send

MIB = 2**20


def complete(peer: bytes, ticket: int, *, host: str = "papag", body: bytes = b"r") -> Send:
    jobs = [wire.Completed(ticket, len(body), 1)]
    return Send(peer, wire.JobComplete(jobs, 0.5, host, ticket), (body,))


def test_results_to_one_client_become_one_message() -> None:
    sends = [complete(b"1", 1, body=b"ab"), complete(b"2", 2), complete(b"1", 3, body=b"c")]
    jobs = [wire.Completed(1, 2, 1), wire.Completed(3, 1, 1)]
    assert coalesce(sends) == [
        Send(b"1", wire.JobComplete(jobs, 1.0, "papag", 3), (b"abc",)),
        complete(b"2", 2),
    ]


def test_acknowledgements_to_one_worker_become_one_message() -> None:
    seqs = [[wire.Range(1, 2)], [wire.Range(3, 1)], [wire.Range(7, 1)]]
    sends = [Send(b"1", wire.WorkAccepted(seq)) for seq in seqs]
    joined = wire.WorkAccepted([wire.Range(1, 3), wire.Range(7, 1)])
    assert coalesce(sends) == [Send(b"1", joined)]


@pytest.mark.parametrize(
    "sends",
    [
        [complete(b"1", 1), Send(b"1", wire.Noop()), complete(b"1", 2)],
        [complete(b"1", 1), complete(b"1", 2, host="sammy")],
        [complete(b"1", 1, body=bytes(MIB)), complete(b"1", 2)],
        [complete(b"1", 1, host=""), Send(b"1", wire.WorkAccepted([wire.Range(1, 1)]))],
        [Send(b"1", wire.Noop()), Send(b"1", wire.Noop())],
    ],
)
def test_messages_that_say_different_things_stay_apart(sends: list[Send]) -> None:
    assert coalesce(sends) == sends


def test_what_was_sent_is_not_changed_by_what_is_joined_to_it() -> None:
    sends = [complete(b"1", 1), complete(b"1", 2)]
    coalesce(sends)
    assert sends == [complete(b"1", 1), complete(b"1", 2)]
