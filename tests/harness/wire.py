"""As much of Postgres' protocol as it takes to know what a client asks for and when the server has answered.

After the start-up, both directions are messages of a type byte, a length that counts itself, and a payload. A client
that prepares statements names the SQL once, in Parse; later it says Bind and Execute with names only. The parser
remembers the names, so that every message that will run a statement carries its SQL.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

SSL_REQUEST = 80877103
GSS_REQUEST = 80877104
CANCEL_REQUEST = 80877102

PARSE, BIND, EXECUTE, QUERY, SYNC, FUNCTION_CALL, CLOSE = b"P", b"B", b"E", b"Q", b"S", b"F", b"C"
READY_FOR_QUERY = b"Z"

# Each of these makes the server say ReadyForQuery once.
ANSWERED = frozenset({SYNC, QUERY, FUNCTION_CALL})


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the client. `sql` is the statement that it sends (Query, Parse) or runs (Bind, Execute)."""

    type: bytes
    payload: bytes
    sql: str | None = None

    @property
    def raw(self) -> bytes:
        """As it is on the wire."""
        return self.type + struct.pack("!I", len(self.payload) + 4) + self.payload


class Splitter:
    """Cuts a stream of bytes into (type, payload)."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The messages that are complete by now."""
        buffer = self._rest + data
        at, found = 0, []
        while len(buffer) - at >= 5:
            end = at + 1 + struct.unpack_from("!I", buffer, at + 1)[0]
            if end > len(buffer):
                break
            found.append((buffer[at : at + 1], buffer[at + 5 : end]))
            at = end
        self._rest = buffer[at:]
        return found


class Frontend:
    """The client's messages, each with the SQL it stands for."""

    def __init__(self) -> None:
        self._splitter = Splitter()
        self._statements: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete by now."""
        return [Message(kind, payload, self._sql(kind, payload)) for kind, payload in self._splitter.feed(data)]

    def _sql(self, kind: bytes, payload: bytes) -> str | None:
        first, _, rest = payload.partition(b"\0")
        if kind == QUERY:
            return first.decode(errors="replace")
        if kind == PARSE:
            self._statements[first] = rest.partition(b"\0")[0].decode(errors="replace")
            return self._statements[first]
        if kind == BIND:
            self._portals[first] = self._statements.get(rest.partition(b"\0")[0], "")
            return self._portals[first]
        if kind == EXECUTE:
            return self._portals.get(first)
        return None


def parameters(startup: bytes) -> dict[str, str]:
    """The parameters of a start-up message (without its length and version)."""
    words = startup.rstrip(b"\0").split(b"\0")
    names, values = words[::2], words[1::2]
    return {name.decode(): value.decode() for name, value in zip(names, values, strict=False)}
