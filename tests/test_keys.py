"""Addresses as people write them, and the places where a server without keys may listen."""

import os
from pathlib import Path

import pytest

from jobserver.errors import InsecureBind
from jobserver.keys import endpoint, endpoints, require_private


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("sammy", "tcp://sammy:4731"),
        (" sammy.example.org ", "tcp://sammy.example.org:4731"),
        ("kenny:99", "tcp://kenny:99"),
        ("tcp://kenny", "tcp://kenny:4731"),
        ("tcp://10.0.0.1:4731", "tcp://10.0.0.1:4731"),
        ("[::1]:4731", "tcp://[::1]:4731"),
        ("[::1]", "tcp://[::1]:4731"),
        ("::1", "tcp://[::1]:4731"),
        ("[fe80::1%eth0]:5", "tcp://[fe80::1%eth0]:5"),
        ("ipc:///run/dmap/server", "ipc:///run/dmap/server"),
    ],
)
def test_an_address_means_an_endpoint(address: str, meant: str) -> None:
    assert endpoint(address) == meant
    assert endpoint(meant) == meant


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "http://sammy",
        "inproc://x",
        "ipc://",
        "ipc:///" + "x" * 107,
        "sammy:",
        "sammy:0",
        "sammy:*",
        "sammy:65536",
        "sammy:-1",
        "sammy:4_7",
        "sammy:four",
        "sam my",
        "sammy/4731",
        "-sammy",
        "*",
        "[::1",
        "[::1]4731",
        "[sammy]:4731",
        "::1::2",
        "1:2:3",
    ],
)
def test_what_is_no_address_is_named_in_the_error(address: str) -> None:
    with pytest.raises(ValueError) as caught:
        endpoint(address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("tcp://*:4731", "tcp://*:4731"),
        ("tcp://127.0.0.1:*", "tcp://127.0.0.1:0"),
        ("localhost:0", "tcp://127.0.0.1:0"),
    ],
)
def test_what_is_bound_may_be_left_open(address: str, meant: str) -> None:
    assert endpoint(address, to_bind=True) == meant


def test_a_list_of_addresses_has_each_server_once_in_its_order() -> None:
    assert endpoints("sammy, kenny:4731,,sammy:4731,") == ["tcp://sammy:4731", "tcp://kenny:4731"]


def test_a_list_without_an_address_is_an_error() -> None:
    with pytest.raises(ValueError, match="no server is named"):
        endpoints(" , ")


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:4731", "tcp://127.9.9.9:0", "tcp://[::1]:4731"])
def test_loopback_is_private(bind: str) -> None:
    require_private(bind)


@pytest.mark.parametrize(
    "bind",
    [
        "tcp://*:4731",
        "tcp://0.0.0.0:4731",
        "tcp://10.0.0.1:4731",
        "tcp://[::]:4731",
        "tcp://eth0:4731",
        "ipc://@abstract",
        "ipc:///nowhere/at/all/socket",
    ],
)
def test_what_strangers_may_reach_is_refused_with_what_to_do(bind: str) -> None:
    with pytest.raises(InsecureBind, match="--insecure"):
        require_private(bind)


def test_a_socket_in_a_folder_of_ours_alone_is_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    require_private(f"ipc://{tmp_path}/socket")


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o777])
def test_a_socket_in_a_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(InsecureBind, match="chmod 700"):
        require_private(f"ipc://{tmp_path}/socket")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_socket_in_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(InsecureBind, match="another user"):
        require_private(f"ipc://{tmp_path}/socket")
    os.chown(tmp_path, 0, -1)
