"""Make one message of several, where they say the same to the same peer.

A worker that completes many short jobs in a row, or many workers that serve one client, would
have the server send a message for each; at a million jobs the message is the cost, not the job.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from jobserver.jobs import Send
from jobserver.protocol import (
    BODY_NBYTES,
    MAX_LIST,
    Body,
    Completed,
    JobComplete,
    Message,
    Range,
    WorkAccepted,
    join,
    nbytes_of,
)


def coalesce(sends: Iterable[Send]) -> list[Send]:
    """Join results to one client, and acknowledgements to one worker, that follow each other.

    The order of the messages to each peer stays; nothing that is given is changed.
    """
    sends = list(sends)
    if len({send.peer for send in sends}) == len(sends):
        return sends
    joined: list[Send | _Run] = []
    last: dict[bytes, _Run] = {}  # peer -> the run at the end of what it gets
    for send in sends:
        peer, message, bodies = send.peer, send.message, send.bodies
        run = last.get(peer)
        if isinstance(message, JobComplete) and message.jobs[0].shared:
            last.pop(peer, None)  # it goes alone
            joined.append(send)
        elif isinstance(message, JobComplete):
            nbytes = sum(map(nbytes_of, bodies))
            if run is None or not run.takes(JobComplete, message.host, len(message.jobs), nbytes):
                run = last[peer] = _Run(JobComplete, message.host, len(message.jobs), nbytes)
                joined.append(run)
            run.sends.append(send)
        elif isinstance(message, WorkAccepted):
            if run is None or not run.takes(WorkAccepted, "", len(message.seqs), 0):
                run = last[peer] = _Run(WorkAccepted, "", len(message.seqs), 0)
                joined.append(run)
            run.sends.append(send)
        else:
            last.pop(peer, None)
            joined.append(send)
    return [entry.joined() if isinstance(entry, _Run) else entry for entry in joined]


class _Run:
    """Messages to one peer, of one kind and about one host, that fit in one message."""

    __slots__ = ("_host", "_kind", "_n", "_nbytes", "sends")

    def __init__(self, kind: type[Message], host: str, n: int, nbytes: int) -> None:
        self.sends: list[Send] = []
        self._kind = kind
        self._host = host
        self._n = n
        self._nbytes = nbytes

    def takes(self, kind: type[Message], host: str, n: int, nbytes: int) -> bool:
        """Tell whether another ``n`` entries of ``nbytes`` may join, and count them in if so."""
        if kind is not self._kind or host != self._host:
            return False
        if self._n + n > MAX_LIST or self._nbytes + nbytes > BODY_NBYTES:
            return False
        self._n += n
        self._nbytes += nbytes
        return True

    def joined(self) -> Send:
        if len(self.sends) == 1:
            return self.sends[0]
        if self._kind is WorkAccepted:
            return _join_accepted(self.sends)
        return _join_complete(self.sends)


def _join_accepted(sends: list[Send]) -> Send:
    seqs: list[Range] = []
    for message in (send.message for send in sends):
        assert isinstance(message, WorkAccepted)
        for seq in message.seqs:
            if seqs and seqs[-1].first + seqs[-1].n == seq.first:
                seqs[-1] = Range(seqs[-1].first, seqs[-1].n + seq.n)
            else:
                seqs.append(seq)
    return Send(sends[0].peer, WorkAccepted(seqs))


def _join_complete(sends: list[Send]) -> Send:
    jobs: list[Completed] = []
    results: list[Body] = []
    seconds = 0.0
    for send in sends:
        message = send.message
        assert isinstance(message, JobComplete)
        jobs += message.jobs
        results += send.bodies
        seconds += message.seconds
        last = message
    return Send(
        sends[0].peer, JobComplete(jobs, seconds, last.host, last.n_workers), (join(results),)
    )
