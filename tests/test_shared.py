"""Buffers in memory that other processes of one user can open; here by this process itself."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmap import references, shared, work
from dmap.errors import ProtocolError
from dmap.references import Named, Reference
from dmap.shared import SHARED_NBYTES, CannotOpen
from jobserver.machine import SWITCH, machine_id

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="has no memory files, or no /proc")

N = SHARED_NBYTES // 8  # doubles


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = n_fds(), n_mappings()
    yield
    gc.collect()
    assert (n_fds(), n_mappings()) == before
    assert not shared._kept


def n_fds(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def n_mappings(pid: int | str = "self") -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:dmap-shared")


def refer(value: Any) -> Reference:
    reference = shared.refer(work.dump_result(value))
    assert reference is not None
    return reference


def test_a_large_array_comes_through_memory_equal_and_writable() -> None:
    value = {"large": np.arange(N), "small": np.arange(1000), "text": "x"}
    reference = refer(value)
    assert len(reference) < 20_000
    assert reference.shared == SHARED_NBYTES
    loaded = work.load_result(shared.open_reference(reference))
    assert loaded.keys() == value.keys()
    assert all(np.array_equal(loaded[key], value[key]) for key in ("large", "small"))
    loaded["large"][0] = 7
    again = work.load_result(shared.open_reference(reference))
    assert again["large"][0] == 0, "what one writes is its own"


def test_later_changes_of_the_value_are_not_seen() -> None:
    value = np.zeros(N)
    reference = refer(value)
    value[:] = 1
    assert not work.load_result(shared.open_reference(reference)).any()


def test_the_same_body_can_be_sent_whole() -> None:
    value = [np.arange(N), b"y" * SHARED_NBYTES, np.arange(2 * N)]
    body = work.dump_result(value)
    reference = shared.refer(body)
    assert reference is not None
    assert reference.shared == 3 * SHARED_NBYTES
    for loaded in (
        work.load_result(b"".join(body)),
        work.load_result(shared.open_reference(reference)),
    ):
        assert np.array_equal(loaded[0], value[0])  # type: ignore[arg-type]
        assert loaded[1] == value[1]
        assert np.array_equal(loaded[2], value[2])  # type: ignore[arg-type]


def test_an_array_outlives_whoever_kept_it_and_an_open_descriptor() -> None:
    reference = refer(np.arange(N))
    loaded = work.load_result(shared.open_reference(reference))
    del reference
    assert not shared._kept
    assert loaded[-1] == N - 1


def test_arguments_come_through_memory_too() -> None:
    for dump, load in (
        (work.dump_call([np.arange(N)], {"x": 1}), work.load_argument),
        (work.dump_chunk(False, [np.arange(N)]), work.load_argument),
        (work.dump_named([np.arange(N)], {}), work.load_named),
    ):
        reference = shared.refer(dump)
        assert reference is not None
        loaded = load(shared.open_reference(reference))
        (array,) = loaded.items if isinstance(loaded, work.Chunk) else loaded.args
        assert array[-1] == N - 1


@pytest.mark.parametrize("value", [7, "x" * 2 * SHARED_NBYTES, np.arange(N - 1)])
def test_what_has_no_large_buffer_is_not_referred_to(value: Any) -> None:
    assert shared.refer(work.dump_result(value)) is None


def test_of_very_many_buffers_the_first_ones_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MAX_NAMED", 2)
    value = [np.full(N, n) for n in range(3)]
    reference = refer(value)
    assert reference.shared == 2 * SHARED_NBYTES
    loaded = work.load_result(shared.open_reference(reference))
    assert [each[0] for each in loaded] == [0, 1, 2]


def test_a_process_keeps_a_bounded_number_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MAX_KEPT", 1)
    first, second = work.dump_result(np.zeros(N)), work.dump_result(np.ones(N))
    assert shared.refer(first) is not None
    assert shared.refer(second) is None
    assert work.load_result(b"".join(second)).all()  # type: ignore[arg-type]


def test_where_there_is_no_memory_of_this_kind_buffers_are_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(name: str, flags: int) -> int:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "memfd_create", full)
    body = work.dump_result(np.ones(N))
    assert all(type(part) is bytes for part in body)
    assert shared.refer(body) is None


def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = refer(np.ones(N))
    machine_id.cache_clear()
    monkeypatch.setenv(SWITCH, "0")
    try:
        assert machine_id() == ""
        assert shared.refer(work.dump_result(np.ones(N))) is None
        with pytest.raises(CannotOpen):
            shared.open_reference(reference)
    finally:
        machine_id.cache_clear()


# --- what is not as it should be --------------------------------------------------------------


def names(reference: Reference) -> tuple[Named, bytes]:
    (name,), rest = references.read(reference)
    return name, bytes(rest)


@pytest.mark.parametrize(
    "changed",
    [
        {"pid": 2**22 + 1},
        {"pid": 2**63},
        {"fd": 2**20},
        {"inode": 1},
        {"device": 1},
        {"nbytes": SHARED_NBYTES - 1},
        {"nbytes": 0},
        {"nbytes": 2**63},
    ],
)
def test_other_memory_than_was_meant_is_not_opened(changed: dict[str, int]) -> None:
    name, rest = names(refer(np.ones(N)))
    with pytest.raises(CannotOpen):
        shared.open_reference(references.make([name._replace(**changed)], rest, b""))


def test_memory_that_is_gone_cannot_be_opened() -> None:
    name, rest = names(refer(np.ones(N)))
    with pytest.raises(CannotOpen):
        shared.open_reference(references.make([name], rest, b""))


def test_no_file_is_opened_that_is_not_sealed() -> None:
    _, rest = names(refer(np.ones(N)))
    with tempfile.TemporaryFile() as file:
        file.truncate(SHARED_NBYTES)
        unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        os.truncate(unsealed, SHARED_NBYTES)
        fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        for fd in (file.fileno(), unsealed):
            found = os.fstat(fd)
            name = Named(os.getpid(), fd, SHARED_NBYTES, found.st_dev, found.st_ino)
            with pytest.raises(CannotOpen, match="sealed"):
                shared.open_reference(references.make([name], rest, b""))
        os.close(unsealed)


def test_a_pipe_in_its_place_blocks_nobody() -> None:
    _, rest = names(refer(np.ones(N)))
    reading, writing = os.pipe()
    found = os.fstat(reading)
    name = Named(os.getpid(), reading, SHARED_NBYTES, found.st_dev, found.st_ino)
    with pytest.raises(CannotOpen, match="no memory"):
        shared.open_reference(references.make([name], rest, b""))
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("end", [0, 1, 7, 8, 20, 47, 60])
def test_half_a_reference_is_refused(end: int) -> None:
    with pytest.raises(CannotOpen):
        shared.open_reference(bytes(refer(np.ones(N))[:end]))


def test_a_reference_that_names_too_few_or_too_many_is_refused() -> None:
    name, rest = names(refer(np.ones(N)))
    for some in ([], [name, name], [name] * (references.MAX_NAMED + 1)):
        with pytest.raises(CannotOpen):
            shared.open_reference(references.make(some, rest, b""))


def test_a_plain_body_is_no_reference() -> None:
    with pytest.raises(ProtocolError):
        references.read(work.dump_result(7))


def test_a_reference_in_pieces_is_read_as_one() -> None:
    reference = refer([np.ones(N), "x" * 100])
    pieces = (reference[:50], reference[50:])
    assert references.read(pieces)[0] == references.read(reference)[0]
