"""Callers with tokens, and certificates: files as an operator mounts them, changed while services run."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path

import trustme


class Callers:
    """A file of callers. Each change replaces the file whole, as a mounted Secret is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[dict[str, object]] = []

    def add(self, name: str, *methods: str) -> str:
        """A further token of a caller; returns it. Without methods it may call everything."""
        token = secrets.token_urlsafe(32)
        digest = hashlib.sha256(token.encode()).hexdigest()
        self._entries.append({"name": name, "hash": f"sha256:{digest}", "methods": methods or ("*",)})
        self._write()
        return token

    def remove(self, token: str) -> None:
        """Takes a token back."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        self._entries = [entry for entry in self._entries if entry["hash"] != f"sha256:{digest}"]
        self._write()

    def break_off(self) -> None:
        """Leaves a file that is no TOML."""
        self._replace("[[callers]]\nname = ")

    def _write(self) -> None:
        lines: list[str] = []
        for entry in self._entries:
            lines += ["[[callers]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
        self._replace("\n".join(lines))

    def _replace(self, text: str) -> None:
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(text)
        unfinished.replace(self.path)


class Authority:
    """A certificate authority and the files that it makes in a directory; `ca` is its own certificate."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = trustme.CA()
        self.ca = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *identities: str) -> tuple[Path, Path]:
        """A certificate and its key, `NAME.pem` and `NAME.key`; made anew if they exist."""
        issued = self._authority.issue_cert(*(identities or ("localhost", "127.0.0.1")))
        certificate, key = self._directory / f"{name}.pem", self.key_of(name)
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key

    def key_of(self, name: str) -> Path:
        """Where the key of a certificate is."""
        return self._directory / f"{name}.key"
