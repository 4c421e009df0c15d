"""What need not go alone waits a few milliseconds for something else to the same peer.

An acknowledgement is in nobody's way while it waits, and costs nothing in another message::

    WorkAccepted (patient)   ... JobAssign   -->  together
    JobsAccepted (patient)   ... JobComplete -->  together
    WorkAccepted (patient)   ... nothing, for PATIENCE  -->  alone

So a job there and back is two messages of the server, not four. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from jobserver.jobs import Send

PATIENCE: Final = 0.002
"""Seconds that an acknowledgement waits at most."""


class Company:
    """What waits for company, of all peers."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, list[Send]] = {}  # peer -> what waits, oldest peer first
        self._due: dict[bytes, float] = {}  # peer -> when that goes alone; in the same order

    def take(self, sends: Iterable[Send], now: float) -> list[Send]:
        """Return what is to go now: these, and ahead of them what waited for them.

        What is patient stays, unless something to the same peer is not. The order of the sends to
        each peer is kept.
        """
        out: list[Send] = []
        waiting = self._waiting
        going = set()
        for send in sends:
            peer = send.peer
            if send.patient and peer not in going:
                waits = waiting.get(peer)
                if waits is None:
                    waiting[peer] = [send]
                    self._due[peer] = now + PATIENCE
                else:
                    waits.append(send)
                continue
            going.add(peer)
            if waiting and (waits := waiting.pop(peer, None)) is not None:
                del self._due[peer]
                out += waits
            out.append(send)
        return out

    @property
    def due(self) -> float:
        """Return when ``overdue`` has something to return; infinite if nothing waits."""
        return next(iter(self._due.values()), math.inf)

    def overdue(self, now: float = math.inf) -> list[Send]:
        """Return what has waited for long enough, or all."""
        out: list[Send] = []
        while self.due <= now and self._due:
            peer = next(iter(self._due))
            del self._due[peer]
            out += self._waiting.pop(peer)
        return out
