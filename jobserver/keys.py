"""Who may reach a server: addresses, and the places where it may listen without keys.

Submitting a job is running code. So a server without keys listens only where no stranger can
reach it: on this machine's loopback, or on an ipc path in a folder that only its user may enter.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from pathlib import Path
from typing import Final

from jobserver.errors import InsecureBind
from jobserver.protocol import DEFAULT_PORT

MAX_IPC_PATH_NBYTES: Final = 107
"""What the kernel has room for in a unix socket's address."""

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_FORMS: Final = "kenny, kenny:4731, tcp://kenny:4731, tcp://[::1]:4731 or ipc:///path"


def endpoint(address: str, *, to_bind: bool = False) -> str:
    """Return the ZeroMQ endpoint that a person's address of a server means.

    Args:
        address: a host, or ``host:port``, with or without ``tcp://``; or ``ipc://`` and a path.
            IPv6 addresses stand in brackets. The port is ``DEFAULT_PORT`` where none is given.
        to_bind: also understand port 0 (any free one) and the host ``*`` (every interface), and
            ``localhost`` as 127.0.0.1, since a name cannot be bound.

    Raises:
        ValueError: it is no such address; the text says what is wrong and what would be right.

    >>> endpoint("kenny"), endpoint("[::1]:4732")
    ('tcp://kenny:4731', 'tcp://[::1]:4732')
    """
    address = address.strip()
    transport, separator, place = address.rpartition("://")
    if not separator or transport == "tcp":
        host, port = _host_and_port(address, place, to_bind=to_bind)
        return f"tcp://{host}:{port}"
    if transport == "ipc":
        nbytes = len(os.fsencode(place))
        if not 0 < nbytes <= MAX_IPC_PATH_NBYTES:
            raise ValueError(
                f"the path of {address!r} has {nbytes} bytes; "
                f"a unix socket's has 1 to {MAX_IPC_PATH_NBYTES}"
            )
        return address
    raise ValueError(f"unknown transport in {address!r}: write {_FORMS}")


def endpoints(addresses: str) -> list[str]:
    """Return the endpoints of a comma-separated list of addresses, each once, in their order.

    Raises:
        ValueError: one of them is no address, or there is none.
    """
    found = [endpoint(address) for address in addresses.split(",") if address.strip()]
    if not found:
        raise ValueError(f"no server is named: write {_FORMS}, separated by commas")
    return list(dict.fromkeys(found))


def require_private(bind: str) -> None:
    """Make sure that strangers cannot reach this endpoint.

    Private are TCP on 127.0.0.0/8 and ::1, and an ipc path in a folder of this user's with mode
    0700.

    Raises:
        InsecureBind: they can; the text says why, and what to do instead.
    """
    transport, _, place = bind.partition("://")
    reason = _open_ipc(place) if transport == "ipc" else _open_tcp(place)
    if reason is None:
        return
    raise InsecureBind(
        f"a server without keys will not listen on {bind}: {reason}. Whoever reaches it runs "
        f"code as this user. Bind tcp://127.0.0.1:{DEFAULT_PORT} or an ipc path in a folder of "
        f"mode 0700, or give --insecure if everyone in that network may"
    )


def _host_and_port(address: str, place: str, *, to_bind: bool) -> tuple[str, int]:
    host, port_text = _split_port(address, place)
    if port_text is None:
        port = DEFAULT_PORT
    elif to_bind and port_text == "*":
        port = 0
    else:
        port = int(port_text) if re.fullmatch("[0-9]{1,5}", port_text) else -1
        if not (0 if to_bind else 1) <= port <= 65535:
            raise ValueError(f"not a port in {address!r}: {port_text!r}")
    return _host(address, host, to_bind=to_bind), port


def _split_port(address: str, place: str) -> tuple[str, str | None]:
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or ":" not in host or (rest and not rest.startswith(":")):
            raise ValueError(f"not an IPv6 address in brackets in {address!r}: write [::1]:4731")
        return host, rest[1:] if rest else None
    if place.count(":") > 1:
        return place, None  # an IPv6 address without brackets, and so without a port
    host, colon, port_text = place.partition(":")
    return host, port_text if colon else None


def _host(address: str, host: str, *, to_bind: bool) -> str:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            raise ValueError(f"not an address of a server: {address!r}: write {_FORMS}") from None
        return f"[{host}]"
    if to_bind and host in ("*", "localhost"):
        return "*" if host == "*" else "127.0.0.1"
    if not _HOST.fullmatch(host):
        raise ValueError(f"not an address of a server: {address!r}: write {_FORMS}")
    return host


def _open_tcp(place: str) -> str | None:
    host = place.rpartition(":")[0].strip("[]")
    try:
        loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return f"{host} is not a loopback address in digits"
    return None if loopback else f"{host} is reachable from other machines"


def _open_ipc(place: str) -> str | None:
    if place.startswith("@"):
        return "an abstract socket is open to every user of this machine"
    folder = Path(place).absolute().parent
    try:
        # Followed to its end: what counts is who may enter the folder that holds the socket.
        status = folder.stat()
    except OSError as error:
        return f"its folder {folder} cannot be looked at ({error.strerror})"
    if status.st_uid != os.geteuid():
        return f"its folder {folder} belongs to another user"
    if stat.S_IMODE(status.st_mode) & 0o077:
        return f"its folder {folder} is open to other users (chmod 700 closes it)"
    return None
