"""Bytes by their sha256: closures and large captures, kept while jobs name them.

A client puts a blob once on each server that gets its jobs; each host that works for it fetches it
once. What a live job names is never dropped; of the rest the longest unused goes when the budget is
full.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from jobserver.protocol import Body, nbytes_of


class BlobRefused(ValueError):
    """The bytes are not what their name says, or there is no room for them."""


def digest(body: Body) -> bytes:
    """Return the name of these bytes: their sha256, 32 bytes."""
    if isinstance(body, bytes):
        return hashlib.sha256(body).digest()
    total = hashlib.sha256()
    for part in body:
        total.update(part)
    return total.digest()


class BlobStore:
    """Blobs under a budget of bytes. What is held (by jobs) may not be dropped."""

    def __init__(self, max_nbytes: int) -> None:
        self.max_nbytes = max_nbytes
        self.nbytes = 0
        self._bodies: dict[bytes, Body] = {}
        self._n_holders: dict[bytes, int] = {}  # blob -> live jobs that name it
        self._free: OrderedDict[bytes, None] = OrderedDict()  # not held, longest unused first

    def __len__(self) -> int:
        return len(self._bodies)

    def put(self, blob: bytes, body: Body) -> None:
        """Keep these bytes under their name. Putting them again is harmless.

        Raises:
            BlobRefused: they are not the bytes of that name, or held blobs fill the budget.
        """
        if blob in self._bodies:
            self._touch(blob)
            return
        nbytes = nbytes_of(body)
        if nbytes > self.max_nbytes:  # to read memory that is named may be to make it, for ever
            raise BlobRefused(f"no room for {nbytes} bytes: at most {self.max_nbytes} are kept")
        if digest(body) != blob:
            raise BlobRefused("the bytes do not have the sha256 that names them")
        while self.nbytes + nbytes > self.max_nbytes and self._free:
            self._drop(next(iter(self._free)))
        if self.nbytes + nbytes > self.max_nbytes:
            raise BlobRefused(
                f"no room for {nbytes} bytes: {self.nbytes} of {self.max_nbytes} are in use by jobs"
            )
        self._bodies[blob] = body
        self.nbytes += nbytes
        self._free[blob] = None

    def get(self, blob: bytes) -> Body | None:
        """Return the bytes of that name."""
        body = self._bodies.get(blob)
        if body is not None:
            self._touch(blob)
        return body

    def missing(self, blobs: Iterable[bytes]) -> list[bytes]:
        """Return those of these names whose bytes are not here."""
        return [blob for blob in blobs if blob not in self._bodies]

    def hold(self, blobs: Iterable[bytes]) -> None:
        """Keep these from being dropped, until as many releases."""
        for blob in blobs:
            self._n_holders[blob] = self._n_holders.get(blob, 0) + 1
            self._free.pop(blob, None)

    def release(self, blobs: Iterable[bytes]) -> None:
        """Take back one ``hold``."""
        for blob in blobs:
            left = self._n_holders[blob] - 1
            if left:
                self._n_holders[blob] = left
            else:
                del self._n_holders[blob]
                self._free[blob] = None

    def _touch(self, blob: bytes) -> None:
        if blob in self._free:
            self._free.move_to_end(blob)

    def _drop(self, blob: bytes) -> None:
        del self._free[blob]
        self.nbytes -= nbytes_of(self._bodies.pop(blob))

    def check(self) -> None:
        """Assert what must hold of the store."""
        assert self.nbytes == sum(map(nbytes_of, self._bodies.values())), "the bytes are counted"
        assert self.nbytes <= self.max_nbytes, "the budget is kept"
        held, free = set(self._n_holders), set(self._free)
        assert held | free == set(self._bodies), "each blob is held or free"
        assert not held & free, "a held blob is not free"
        assert all(n > 0 for n in self._n_holders.values()), "a holder exists while it counts"
