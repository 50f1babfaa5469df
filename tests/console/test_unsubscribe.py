"""The pages of unsubscribe links in a real browser, which runs no script."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from notification_service.store import preferences
from servicekit import database
from tests.console.conftest import picture
from tests.harness import Database
from tests.notifications.conftest import Events
from tests.notifications.test_unsubscribe import Site, serving, store

_PHONE: Any = {"width": 320, "height": 640}
_PAPER = "getComputedStyle(document.querySelector('main')).backgroundColor"
_OVERFLOWS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture
async def site(notifications_database: Database, tmp_path: Path) -> AsyncIterator[Site]:
    async with (
        database.pool(notifications_database.url, "tests", size=4) as pool,
        serving(pool, tmp_path) as started,
    ):
        yield started


async def _opened(chromium: Browser, url: str, trouble: list[str], **options: Any) -> Page:
    context = await chromium.new_context(java_script_enabled=False, viewport=_PHONE, **options)
    page = await context.new_page()
    page.on("console", lambda message: trouble.append(message.text))
    page.on("request", lambda request: None if request.url == url else trouble.append(request.url))
    await page.goto(url)
    return page


async def test_a_reader_switches_off_and_on_again(
    chromium: Browser, site: Site, notifications_database: Database
) -> None:
    event, trouble = Events().created("ada"), list[str]()
    async with await database.connect(notifications_database.url, "tests") as connection:
        await store(connection, site.composer, event)
        page = await _opened(chromium, site.of(event), trouble, locale="en-GB")
        await expect(page).to_have_title("Mail from Tidings")
        await expect(page.get_by_role("status")).to_have_text("Mail of the kind “account” is switched on.")
        await picture(page, "unsubscribe")
        await page.get_by_role("button", name="Switch off mail of the kind “account”").click()
        await expect(page.get_by_role("status")).to_have_text("Mail of the kind “account” is switched off.")
        stored = await preferences.find(connection, uuid.UUID(event.user.id))
        assert stored.document == {"categories": {"account": {"email": False}}}
        # Whoever reloads, asks for nothing again.
        await page.reload()
        await page.get_by_role("button", name="Switch on mail of the kind “account” again").click()
        await expect(page.get_by_role("status")).to_have_text("Mail of the kind “account” is switched on.")
        await page.get_by_role("button", name="Switch off all mail to this address").click()
        await expect(page.get_by_role("status")).to_contain_text("All mail to this address is switched off.")
        await page.get_by_role("button", name="Switch on mail to this address again").click()
        await expect(page.get_by_role("button")).to_have_count(2)
        assert (await preferences.find(connection, uuid.UUID(event.user.id))).document == {}
    assert trouble == []
    await page.context.close()


async def test_it_is_said_in_the_readers_language_and_colours(chromium: Browser, site: Site) -> None:
    papers = []
    for scheme in ("light", "dark"):
        trouble: list[str] = []
        # Of a kind with a name as long as one may be, on a phone.
        url = site.of(Events().created("ada"), "k" * 63)
        page = await _opened(chromium, url, trouble, locale="de-AT", color_scheme=scheme)
        assert await page.locator("html").get_attribute("lang") == "de"
        await expect(page.get_by_role("heading", level=1)).to_have_text("Nachrichten von Tidings")
        await expect(page.get_by_role("button", name=f"Nachrichten der Art „{'k' * 63}“ abbestellen")).to_be_visible()
        papers.append(await page.evaluate(_PAPER))
        assert not await page.evaluate(_OVERFLOWS)
        assert trouble == []
        await page.context.close()
    assert papers == ["rgb(255, 255, 255)", "rgb(22, 27, 34)"]
