"""Memory that processes of one machine share by naming it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobserver import shared
from jobserver.machine import machine_id
from jobserver.shared import Reference

if not machine_id():
    pytest.skip("this system has no memory that can be shared", allow_module_level=True)

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
LARGE = bytes(range(256)) * 1024  # 256 KiB

# Makes memory, names it, and lives until its standard input ends.
HOLDER = """\
import sys
from jobserver import shared
from jobserver.machine import machine_id
print(tuple(shared.name(shared.make([b"one", b"two"]))), flush=True)
sys.stdin.read()
"""


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def n_mapped() -> int:
    """Count the mappings of such memory that this process has."""
    return Path("/proc/self/maps").read_text().count("memfd:dmap-")


@pytest.fixture
def sealed() -> Iterator[int]:
    fd = shared.make([LARGE])
    yield fd
    os.close(fd)


def memfd(content: bytes, seals: int, name: str = "dmap-" + "0" * 32) -> int:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# --- made -------------------------------------------------------------------------------------


def test_sealed_memory_has_its_parts_end_to_end() -> None:
    fd = shared.make([b"one", bytearray(b"two"), memoryview(b"three")])
    assert bytes(shared.map_private(fd)) == b"onetwothree"
    os.close(fd)


@pytest.mark.parametrize(
    "change",
    [
        lambda fd: os.pwrite(fd, b"x", 0),
        lambda fd: os.pwrite(fd, b"x", len(LARGE)),
        lambda fd: os.ftruncate(fd, 1),
        lambda fd: os.ftruncate(fd, 2 * len(LARGE)),
        lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
        lambda fd: mmap.mmap(fd, len(LARGE)),
    ],
    ids=["write", "append", "shorten", "lengthen", "seal anew", "map to write"],
)
def test_nobody_can_change_sealed_memory(sealed: int, change: Callable[[int], Any]) -> None:
    with pytest.raises(PermissionError):
        change(sealed)


def test_who_cannot_finish_it_leaves_no_descriptor() -> None:
    def parts() -> Iterator[bytes]:
        yield LARGE
        raise KeyboardInterrupt

    before = descriptors()
    with pytest.raises(KeyboardInterrupt):
        shared.make(parts())
    assert descriptors() == before


# --- named and opened -------------------------------------------------------------------------


def test_another_process_opens_it_by_its_name_and_keeps_it_when_the_holder_has_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        text = holder.stdout.readline().strip("()\n").split(", ")
        reference = Reference(*map(int, text[:3]), token=eval(text[3]))
        fd = shared.open(reference)
        holder.kill()
    assert os.read(fd, 100) == b"onetwo"
    os.close(fd)
    with pytest.raises(OSError, match=f"process {reference.pid} cannot be opened"):
        shared.open(reference)


def test_who_has_opened_it_can_name_it_too(sealed: int) -> None:
    fd = shared.open(shared.name(sealed))
    again = shared.open(shared.name(fd))
    assert len({fd, again, sealed}) == 3
    assert os.path.sameopenfile(again, sealed)
    os.close(fd)
    os.close(again)


def test_what_is_opened_can_be_read_only_and_goes_to_no_other_program(sealed: int) -> None:
    fd = shared.open(shared.name(sealed))
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert not os.get_inheritable(fd)
    os.close(fd)


def refused(reference: Reference, match: str) -> None:
    before = descriptors()
    with pytest.raises(OSError, match=match):
        shared.open(reference)
    assert descriptors() == before, "a refused one leaves no descriptor"


def test_another_token_is_refused(sealed: int) -> None:
    refused(shared.name(sealed)._replace(token=bytes(16)), "something else")


@pytest.mark.parametrize("nbytes", [0, len(LARGE) - 1, len(LARGE) + 1])
def test_another_size_is_refused(sealed: int, nbytes: int) -> None:
    refused(shared.name(sealed)._replace(nbytes=nbytes), f"should have {nbytes}")


@pytest.mark.parametrize(
    "missing", [fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE]
)
def test_memory_that_somebody_could_still_change_is_refused(missing: int) -> None:
    fd = memfd(LARGE, SEALS & ~missing)
    refused(shared.name(fd), "not sealed")
    os.close(fd)


def test_what_is_no_memory_is_refused_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    with tempfile.TemporaryDirectory(prefix="dmap-") as folder:
        path = Path(folder) / "pipe"
        os.mkfifo(path)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", lambda path, flags: opened.append(path))
            refused(Reference(os.getpid(), fd, 0, bytes(16)), "something else")
        os.close(fd)
    assert not opened


def test_a_descriptor_or_process_that_is_not_there_is_refused(sealed: int) -> None:
    reference = shared.name(sealed)
    refused(reference._replace(fd=10**6), "cannot be opened: No such file")
    refused(reference._replace(pid=2**40), "cannot be opened: No such file")


def test_only_such_memory_has_a_name() -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(OSError, match="no memory"):
        shared.name(file.fileno())


# --- mapped -----------------------------------------------------------------------------------


def test_a_view_is_read_only_bytes_and_keeps_no_descriptor(sealed: int) -> None:
    before = descriptors()
    view = shared.map_private(sealed)
    assert descriptors() == before
    assert (view.readonly, view.format, view) == (True, "B", LARGE)


def test_a_write_to_a_view_is_seen_by_nobody_else(sealed: int) -> None:
    view = shared.map_private(sealed, writable=True)
    view[:3] = b"new"
    assert bytes(view[:3]) == b"new"
    assert shared.map_private(sealed) == LARGE


def test_the_memory_outlives_its_maker_and_ends_with_the_last_array_over_it() -> None:
    np = pytest.importorskip("numpy")
    fd = shared.make([LARGE])
    view = shared.map_private(fd)
    os.close(fd)
    array = np.frombuffer(view[256:], np.uint8)[1:]
    del view
    assert n_mapped() == 1
    assert not array.flags.writeable
    assert array[0] == 1
    del array
    assert n_mapped() == 0


def test_all_views_of_it_are_of_one_object(sealed: int) -> None:
    view = shared.map_private(sealed)
    assert view[5:9].obj is view.obj


def test_a_file_is_not_sealed() -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(OSError, match="not sealed"):
        shared.require(file.fileno(), 0)


def test_what_cannot_be_mapped_says_so() -> None:
    fd = memfd(b"", SEALS)
    with pytest.raises(OSError, match="cannot map 0 bytes"):
        shared.map_private(fd)
    os.close(fd)


# --- held as a body ---------------------------------------------------------------------------


def test_a_copy_of_a_buffer_has_the_digest_of_what_it_holds() -> None:
    large = os.urandom(3 * shared.STEP_NBYTES + 7)
    body, digest = shared.share(memoryview(large).cast("B"))
    assert body == (large,)
    assert digest == hashlib.sha256(large).digest()


def test_a_body_is_open_to_others_for_as_long_as_anybody_views_it() -> None:
    before = descriptors()
    body, _ = shared.share(LARGE)
    memory, view = body.memory, memoryview(body[0])[5:9]
    del body
    os.close(shared.open(memory))
    del view
    assert descriptors() == before
    refused(memory, "cannot be opened")


def test_what_cannot_be_written_down_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(fd: int, part: memoryview) -> int:
        raise OSError(errno.ENOSPC, "no memory")

    before = descriptors(), threading.active_count()
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="no memory"):
        shared.share(LARGE)
    assert (descriptors(), threading.active_count()) == before


def test_what_one_process_holds_is_bounded(monkeypatch: pytest.MonkeyPatch, sealed: int) -> None:
    monkeypatch.setattr(shared, "MAX_HELD", len(shared._held) + 1)
    first, _ = shared.share(LARGE)
    before = descriptors()
    with pytest.raises(OSError, match="holds"):
        shared.share(LARGE)
    with pytest.raises(OSError, match="holds"):
        shared.hold(os.dup(sealed))
    assert descriptors() == before
    del first
    shared.share(LARGE)


def test_without_such_memory_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="no memory that can be sealed"):
        shared.make([b""])
