"""The shipped mail catcher as a process of the test, and what it has caught."""

from __future__ import annotations

from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path

from devstack.parts import ask_smtp
from tests.harness.process import ServiceProcess, free_port, until


@dataclass(frozen=True, slots=True)
class Caught:
    """One stored message."""

    path: Path
    sender: str
    recipients: tuple[str, ...]
    message: EmailMessage

    @property
    def message_id(self) -> str:
        """Its Message-ID."""
        return str(self.message["Message-ID"])


def _caught(path: Path) -> Caught:
    content = path.read_bytes()
    # The envelope stands first and in UTF-8, which a parser of headers would not take for granted.
    envelope = []
    while content.startswith(b"X-Envelope-"):
        line, _, content = content.partition(b"\r\n")
        envelope.append(line.partition(b": ")[2].decode())
    return Caught(path, envelope[0], tuple(envelope[1:]), message_from_bytes(content, policy=policy.default))


class MailCatcher:
    """An SMTP server on a free port of 127.0.0.1 that stores what it accepts in `directory`."""

    def __init__(self, data_dir: Path) -> None:
        self.port = free_port()
        self.directory = data_dir / "mail"
        self.process = ServiceProcess(
            "devstack",
            "mail-catcher",
            environment={"TIDINGS_DEVSTACK_SMTP_PORT": str(self.port), "TIDINGS_DEVSTACK_DATA_DIR": str(data_dir)},
        )

    async def start(self) -> MailCatcher:
        """Starts it, or starts it again, and waits until it accepts mail."""
        await self.process.launch()

        async def greets() -> bool:
            return await ask_smtp("127.0.0.1", self.port) is None

        await until(greets, what="the mail catcher accepts connections")
        return self

    async def stop(self) -> None:
        """Stops it; what it has caught stays."""
        await self.process.stop()

    def paths(self) -> list[Path]:
        """The stored messages' files, oldest first."""
        return sorted(self.directory.glob("*.eml"))

    def messages(self) -> list[Caught]:
        """The stored messages, oldest first."""
        return [_caught(path) for path in self.paths()]

    async def wait(self, count: int, timeout: float = 30.0) -> list[Caught]:
        """Waits until at least `count` messages are stored and returns all."""
        await until(lambda: len(self.paths()) >= count, timeout, f"{count} messages in {self.directory}")
        return self.messages()
