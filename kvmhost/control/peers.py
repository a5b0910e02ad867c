"""Identifies the peer of a connection over a unix socket or TCP loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct

__all__ = ["UNKNOWN_UID", "Peer", "PeerFinder", "peer_of"]

#: The uid of a peer that the kernel does not report.
UNKNOWN_UID = -1

_CREDENTIALS = struct.Struct("3i")
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
#: struct nlmsghdr, and struct inet_diag_req_v2 (linux/inet_diag.h) with its socket id.
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
#: Behind the header and the first four bytes of struct inet_diag_msg: id, three counts, uid.
_UID_OFFSET = _HEADER.size + 4 + 48 + 12


@dataclasses.dataclass(frozen=True)
class Peer:
    """The peer of a connection.

    :param pid: the process; 0 for one that this process cannot see, and over TCP
    :param uid: its user; :data:`UNKNOWN_UID` if the kernel does not report it
    """

    pid: int
    uid: int

    @property
    def label(self) -> str:
        """The key by which connections are counted together."""
        return f"process {self.pid}" if self.pid else f"user {self.uid}"


def peer_of(connection: socket.socket) -> Peer:
    """Return the process at the other end of a unix socket. Source: SO_PEERCRED, unix(7)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return Peer(int(pid), int(uid))


class PeerFinder:
    """Finds peers of a server's connections.

    For TCP, sock_diag(7) reports the owner of the peer's socket. Without an answer (no
    CONFIG_INET_DIAG, or the socket is already closed) the user is unknown.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._is_unix = listener.family == socket.AF_UNIX
        self._diag: socket.socket | None = None
        if not self._is_unix:
            with contextlib.suppress(OSError):
                self._diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
                self._diag.setblocking(False)

    def find(self, connection: socket.socket) -> Peer:
        """Return the peer of a connection.

        :raises OSError: if the connection is closed
        """
        return peer_of(connection) if self._is_unix else Peer(0, self._owner(connection))

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._diag is not None:
            self._diag.close()

    def _owner(self, connection: socket.socket) -> int:
        """Return the uid of the socket at the other end. Source: sock_diag(7)."""
        (there, their_port), (here, our_port) = connection.getpeername(), connection.getsockname()
        if self._diag is None:
            return UNKNOWN_UID
        ident = struct.pack(">HH", their_port, our_port)
        ident += socket.inet_aton(there).ljust(16, b"\0") + socket.inet_aton(here).ljust(16, b"\0")
        ident += struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
        body = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + ident
        size = _HEADER.size + len(body)
        try:
            self._diag.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0) + body)
            answer = self._diag.recv(4096)
        except OSError:
            return UNKNOWN_UID
        kind = struct.unpack_from("=H", answer, 4)[0]
        if kind != _SOCK_DIAG_BY_FAMILY or len(answer) < _UID_OFFSET + 4:
            return UNKNOWN_UID
        return int(struct.unpack_from("=I", answer, _UID_OFFSET)[0])
