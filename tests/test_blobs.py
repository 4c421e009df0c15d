"""Blobs under a budget."""

from __future__ import annotations

import pytest

from jobserver.blobs import BlobRefused, BlobStore, digest
from jobserver.protocol import Body


def put(store: BlobStore, body: Body) -> bytes:
    blob = digest(body)
    store.put(blob, body)
    store.check()
    return blob


def test_bytes_are_found_by_their_name() -> None:
    store = BlobStore(100)
    blob = put(store, b"closure")
    assert store.get(blob) == b"closure"
    assert store.missing([blob, b"?" * 32]) == [b"?" * 32]


def test_a_body_in_pieces_has_the_name_of_the_whole() -> None:
    assert digest((b"clo", b"sure")) == digest(b"closure")


def test_bytes_under_a_wrong_name_are_refused() -> None:
    with pytest.raises(BlobRefused, match="sha256"):
        BlobStore(100).put(b"?" * 32, b"closure")


def test_what_can_never_have_room_is_not_even_read() -> None:
    with pytest.raises(BlobRefused, match="no room for 11 bytes: at most 10"):
        BlobStore(10).put(b"?" * 32, b"not its name"[:11])


def test_the_longest_unused_goes_when_there_is_no_room() -> None:
    store = BlobStore(10)
    first, second = put(store, b"aaaa"), put(store, b"bbbb")
    store.get(first)
    put(store, b"cccc")
    assert store.missing([first, second]) == [second]


def test_putting_again_is_a_use() -> None:
    store = BlobStore(10)
    first, second = put(store, b"aaaa"), put(store, b"bbbb")
    put(store, b"aaaa")
    put(store, b"cccc")
    assert store.missing([first, second]) == [second]


def test_what_is_held_is_never_dropped() -> None:
    store = BlobStore(10)
    blob = put(store, b"aaaa")
    store.hold([blob])
    store.check()
    with pytest.raises(BlobRefused, match="no room for 8 bytes: 4 of 10"):
        put(store, b"bbbbbbbb")
    assert store.get(blob) == b"aaaa"


def test_what_is_released_as_often_as_it_was_held_may_go() -> None:
    store = BlobStore(10)
    blob = put(store, b"aaaa")
    store.hold([blob])
    store.hold([blob])
    store.release([blob])
    store.check()
    assert len(store) == 1
    store.release([blob])
    put(store, b"bbbbbbbb")
    assert store.missing([blob]) == [blob]
