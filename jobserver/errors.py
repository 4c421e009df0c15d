"""The errors that the server and the wire raise; `dmap.errors` draws the whole tree."""

from __future__ import annotations

__all__ = ["DmapError", "InsecureBind", "ProtocolError"]


class DmapError(Exception):
    """Root of every error that this project raises on its own account.

    What the user's function raises is not among them: it travels as itself.
    """


class ProtocolError(DmapError):
    """A peer sent what the wire does not allow: malformed, oversized, out of role or out of date.

    The sender is at fault. Compare the versions of both sides; between equal versions it is a bug.
    """


class InsecureBind(DmapError):
    """A server without keys was told to listen where strangers can reach it, and refused.

    Submitting a job is running code. Make keys, or bind loopback or an ipc path.
    """
