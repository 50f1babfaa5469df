"""Every message that the mail catcher accepts is stored, whatever happens to it."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from email.message import EmailMessage
from pathlib import Path

import aiosmtplib

from devstack.mailcatcher import MailStore
from tests.harness import MailCatcher, Services
from tests.harness.process import free_port

HOST = "TIDINGS_DEVSTACK_HOST"


def _message(message_id: str, text: str = "Hello.") -> EmailMessage:
    message = EmailMessage()
    message["From"] = "Tidings <tidings@example.com>"
    message["To"] = "Zoë <zoe@example.com>"
    message["Subject"] = "Grüße, 你好, नमस्ते"
    message["Message-ID"] = message_id
    message.set_content(text)
    return message


def _client(catcher: MailCatcher) -> aiosmtplib.SMTP:
    return aiosmtplib.SMTP(hostname="127.0.0.1", port=catcher.port, start_tls=False, timeout=10)


async def test_a_message_is_stored_with_its_envelope_and_unchanged(mail_catcher: MailCatcher) -> None:
    text = "Dots at the start of a line:\n.\n..\nand 谢谢.\n"
    async with _client(mail_catcher) as client:
        await client.send_message(_message("<1@example.com>", text), recipients=["a@example.com", "b@example.com"])
    [caught] = mail_catcher.messages()
    assert caught.path.name == "00000001.eml"
    assert caught.sender == "tidings@example.com"
    assert caught.recipients == ("a@example.com", "b@example.com")
    assert caught.message_id == "<1@example.com>"
    assert caught.message["Subject"] == "Grüße, 你好, नमस्ते"
    assert caught.message.get_content().replace("\r\n", "\n") == text


async def test_international_addresses_are_accepted(mail_catcher: MailCatcher) -> None:
    async with _client(mail_catcher) as client:
        await client.sendmail(
            "tidings@example.com",
            ["юлия@почта.example"],
            "Subject: Привет\r\n\r\nПривет\r\n".encode(),
            mail_options=["SMTPUTF8", "BODY=8BITMIME"],
        )
    [caught] = mail_catcher.messages()
    assert caught.recipients == ("юлия@почта.example",)
    assert caught.path.read_bytes().endswith("\r\n\r\nПривет\r\n".encode())


async def test_a_duplicate_is_kept(mail_catcher: MailCatcher) -> None:
    async with _client(mail_catcher) as client:
        for _ in range(2):
            await client.send_message(_message("<same@example.com>"))
    assert [caught.message_id for caught in mail_catcher.messages()] == ["<same@example.com>"] * 2


async def test_on_its_own_it_may_listen_on_any_network(services: Services, tmp_path: Path) -> None:
    environment = {"TIDINGS_DEVSTACK_SMTP_PORT": str(free_port()), "TIDINGS_DEVSTACK_DATA_DIR": str(tmp_path)}
    everywhere = services.process("devstack", "mail-catcher", environment=environment | {HOST: "0.0.0.0"})
    await everywhere.launch()
    record = await everywhere.wait_log("serving")
    assert record["address"].startswith("0.0.0.0:")

    nowhere = services.process("devstack", "mail-catcher", environment=environment | {HOST: "everywhere"})
    await nowhere.launch()
    assert await nowhere.wait() == 2
    [line] = nowhere.lines
    assert line.startswith(f"error: {HOST}: ")


async def test_no_accepted_message_is_lost_by_kills(mail_catcher: MailCatcher) -> None:
    accepted: list[str] = []
    done = asyncio.Event()

    async def send(worker: int) -> None:
        number = 0
        while not done.is_set():
            try:
                async with _client(mail_catcher) as client:
                    while not done.is_set():
                        number += 1
                        message_id = f"<{worker}.{number}@example.com>"
                        await client.send_message(_message(message_id))
                        accepted.append(message_id)
            except (aiosmtplib.SMTPException, OSError):
                await asyncio.sleep(0.05)

    senders = [asyncio.create_task(send(worker)) for worker in range(8)]
    for _ in range(3):
        await asyncio.sleep(0.7)
        assert await mail_catcher.process.kill(signal.SIGKILL) == -signal.SIGKILL
        await mail_catcher.start()
    await asyncio.sleep(0.5)
    done.set()
    await asyncio.gather(*senders)

    stored = mail_catcher.messages()
    counted = Counter(caught.message_id for caught in stored)
    assert len(accepted) > 100
    assert set(accepted) <= set(counted)
    # At most what was in flight at a kill is stored and not known to be accepted; nothing is stored twice.
    assert len(counted) - len(accepted) <= 3 * 8
    assert set(counted.values()) == {1}
    assert all(caught.message.get_content().strip() == "Hello." for caught in stored)
    assert [caught.path.name for caught in stored] == [f"{n:08d}.eml" for n in range(1, len(stored) + 1)]


def test_two_catchers_on_one_directory_replace_nothing(tmp_path: Path) -> None:
    one, other = MailStore(tmp_path), MailStore(tmp_path)
    paths = [store.add(content) for store, content in ((one, b"1"), (other, b"2"), (one, b"3"), (other, b"4"))]
    assert [path.read_bytes() for path in paths] == [b"1", b"2", b"3", b"4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n:08d}.eml" for n in range(1, 5)]
    assert MailStore(tmp_path).last == 4
