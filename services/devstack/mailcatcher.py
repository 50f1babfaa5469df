"""The mail catcher: an SMTP server that keeps every message it accepts and delivers none.

Layout of the mail directory, which programs may read at any time:
- one file per accepted message, named `<sequence>.eml` with eight digits, rising in the order of acceptance;
- a file is complete as soon as it has that name, never changes and is never replaced; a message accepted twice is two;
- it begins with one line `X-Envelope-From: ADDRESS` and one line `X-Envelope-To: ADDRESS` per recipient, in UTF-8, then
  comes the message as it was sent; lines end with CRLF;
- nothing else in the directory counts.
The client gets its 250 after the file has its name, so that a kill at any instruction loses no accepted message. Not
flushed to the disk: a power cut may lose the newest.
"""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import uvloop
from aiosmtpd.smtp import SMTP, Envelope, Session

from devstack.settings import MailCatcherSettings
from servicekit import logs, tasks

log = logs.get(__name__)

_NAME = re.compile(r"([0-9]{8})\.eml")
_SIZE_LIMIT = 32 << 20
_REPORT_EVERY = 1.0


class MailStore:
    """Files messages under rising numbers."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._last = 0
        for path in directory.iterdir():
            if path.suffix == ".tmp":
                path.unlink()
            elif match := _NAME.fullmatch(path.name):
                self._last = max(self._last, int(match[1]))

    @property
    def last(self) -> int:
        """The number of the newest message, 0 if there is none."""
        return self._last

    def add(self, content: bytes) -> Path:
        """Stores a message and returns its file."""
        unfinished = self._directory / f"{os.getpid()}.tmp"
        unfinished.write_bytes(content)
        try:
            while True:
                self._last += 1
                path = self._directory / f"{self._last:08d}.eml"
                try:
                    # A link and not a rename, which would replace the message of another catcher on this directory.
                    path.hardlink_to(unfinished)
                except FileExistsError:
                    continue
                return path
        finally:
            unfinished.unlink()


def _address(text: str | None) -> bytes:
    return (text or "").encode("utf-8", "surrogateescape")


def file_content(envelope: Envelope) -> bytes:
    """What is stored of an accepted message."""
    lines = [b"X-Envelope-From: " + _address(envelope.mail_from)]
    lines += [b"X-Envelope-To: " + _address(recipient) for recipient in envelope.rcpt_tos]
    return b"\r\n".join([*lines, envelope.original_content or b""])


class Handler:
    """aiosmtpd's hooks."""

    def __init__(self, store: MailStore) -> None:
        self._store = store

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Stores, then accepts; a full disk is the sender's cue to try again later."""
        try:
            path = self._store.add(file_content(envelope))
        except OSError as error:
            log.error("message not stored", error=str(error))
            return "451 4.3.0 not stored, try again later"
        return f"250 2.0.0 stored as {path.name}"


async def _report(store: MailStore) -> None:
    """One line per burst of mail instead of one per message."""
    seen = store.last
    while True:
        await asyncio.sleep(_REPORT_EVERY)
        if store.last > seen:
            log.info("mail stored", messages=store.last - seen, newest=f"{store.last:08d}.eml")
            seen = store.last


async def serve(settings: MailCatcherSettings) -> int:
    """Catches mail until SIGTERM or SIGINT. Returns the exit code."""
    loop = asyncio.get_running_loop()
    store = MailStore(settings.mail_dir)
    handler = Handler(store)

    def session() -> SMTP:
        # The name is given, for aiosmtpd would ask the resolver for it at each connection.
        return SMTP(handler, hostname="localhost", enable_SMTPUTF8=True, data_size_limit=_SIZE_LIMIT, loop=loop)

    address = f"{settings.host}:{settings.smtp_port}"
    try:
        server = await loop.create_server(session, settings.host, settings.smtp_port, backlog=512)
    except OSError as error:
        log.error("address is taken or not allowed", address=address, error=str(error))
        return 1
    stop = tasks.told_to_stop()
    report = asyncio.create_task(_report(store))
    log.info("serving", address=address, directory=str(settings.mail_dir), messages=store.last)
    await stop.wait()
    report.cancel()
    server.close()
    log.info("stopped", messages=store.last)
    return 0


def main(settings: MailCatcherSettings) -> int:
    """Runs the mail catcher."""
    return uvloop.run(serve(settings))
