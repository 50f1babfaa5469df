"""The console as an operator sees it, in a real browser, in front of a running system."""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.console.conftest import OpenPage, Site, picture
from tests.harness import Services, until
from tidings.client import Users, connect
from tidings.notifications.v1 import notifications_pb2

_PHONE: Any = {"width": 320, "height": 640}
_PICTURE: Any = {"width": 1200, "height": 720}


def _row(page: Page, text: str) -> Any:
    return page.locator("table.list tbody tr", has_text=text)


def _card(page: Page, title: str) -> Any:
    return page.locator(".card").filter(has=page.get_by_role("heading", name=title, exact=True))


async def _open_event(page: Page, username: str) -> None:
    await _row(page, username).locator("a.row-link").first.click()
    await expect(page.locator("#detail h2")).to_have_text(f"Created {username}")


async def test_an_empty_system_says_what_to_do_next(site: Site, open_page: OpenPage) -> None:
    page = await open_page()
    command = page.locator(".command code")
    await expect(command).to_contain_text("tidings users create --username zoe --email zoe@example.com")
    # What is shown works: here it names the address, which is not the default.
    assert f"--users {site.users.address}" in await command.inner_text()
    await page.locator(".tabs a[data-view=deliveries]").click()
    await expect(page.locator(".empty-title")).to_have_text("Nothing is parked.")


async def test_a_user_made_by_the_command_line_appears_by_itself(site: Site, open_page: OpenPage) -> None:
    page = await open_page()
    await page.evaluate("window.untouched = true")
    await site.tidings(
        "users", "create", "--username", "zoe", "--email", "zoe@example.com", "--display-name", "Zoë Ångström"
    )
    row = _row(page, "zoe")
    await expect(row).to_contain_text("Created")
    await expect(row).to_contain_text("Zoë Ångström")
    await expect(_card(page, "Feed").locator(".figure").first).to_have_text("1")
    assert await page.evaluate("window.untouched") is True


_PEOPLE = {
    "ada": "Ada Lovelace",
    "alan": "Alan Turing",
    "barbara": "Barbara Liskov",
    "edsger": "Edsger W. Dijkstra",
    "emmy": "Emmy Noether",
    "katherine": "Katherine Johnson",
    "margaret": "Margaret Hamilton",
    "tim": "Tim Berners-Lee",
}


@pytest.mark.parametrize(("scheme", "end"), [("light", ""), ("dark", ".b")])
async def test_a_changed_user_is_shown_as_before_and_after(
    site: Site, open_page: OpenPage, scheme: str, end: str
) -> None:
    site.endpoint.refuses = False
    for username, name in _PEOPLE.items():
        await site.create(f"{username}{end}", name)
    async with connect(site.users.address) as channel:
        users = Users(channel)
        [user] = [one async for one in users.list(username_prefix=f"emmy{end}")]
        user.email = f"noether{end}@example.org"
        await users.update(user, ["email"])
        [user] = [one async for one in users.list(username_prefix=f"alan{end}")]
        await users.delete(user.id)
    page = await open_page(color_scheme=scheme, viewport=_PICTURE)
    await expect(page.locator("table.events tbody tr").first).to_contain_text("Deleted")
    await _row(page, f"emmy{end}").first.locator("a.row-link").click()
    detail = page.locator("#detail")
    await expect(detail.locator("h2")).to_have_text(f"Updated emmy{end}")
    changed = detail.locator(".fields tr[data-changed] td")
    await expect(changed).to_have_text([f"emmy{end}@example.com", f"noether{end}@example.org"])
    # Both addresses are told.
    await expect(detail.locator(".delivery", has_text="email").locator(".chip")).to_have_text(["Delivered"] * 2)
    for name in ("wait for commit", "send user_events", "deliver webhook"):
        await expect(detail.locator(f"[data-span='{name}']")).to_have_count(1)
    await expect(detail.locator("[data-span='deliver email']")).to_have_count(2)
    await expect(_card(page, "Deliveries").locator(".figure").first).to_have_text("0")
    await detail.evaluate("detail => detail.scrollTo(0, detail.scrollHeight)")
    await picture(page, f"console-{scheme}")


async def test_a_change_is_followed_to_the_delivered_mail(site: Site, open_page: OpenPage) -> None:
    await site.create("grace", "Grace Hopper")
    page = await open_page()
    await _open_event(page, "grace")
    detail = page.locator("#detail")
    mail = detail.locator(".delivery", has_text="email")
    await expect(mail.locator(".chip")).to_have_text("Delivered")
    await expect(mail.locator(".timeline")).to_contain_text("Accepted")
    await expect(mail.locator(".timeline .code")).to_have_text("250")
    spans = detail.locator(".spans > li")
    for name in ("tidings.users.v1.UserService/CreateUser", "wait for commit", "process user_events", "deliver email"):
        await expect(spans.and_(page.locator(f"[data-span='{name}']"))).to_have_count(1)
    # Each bar is where its span was: the delivery after the call.
    lefts = [
        await detail.locator(f"[data-span='{name}'] .bar").evaluate("bar => bar.getBoundingClientRect().left")
        for name in ("tidings.users.v1.UserService/CreateUser", "deliver email")
    ]
    assert lefts[0] < lefts[1]
    # A row opens and says what the span says.
    await detail.locator("[data-span='deliver email'] button").click()
    await expect(detail.locator("[data-span='deliver email'] .span-more")).to_contain_text("tidings-notifications")
    await detail.locator("[data-span='deliver email'] button").click()
    # The batch has a trace of its own, which links back.
    await detail.locator("[data-span='wait for commit'] .span-links a").click()
    await expect(page.locator("#detail h2")).to_have_text("Trace")
    batch = detail.locator("[data-span='commit batch']")
    await batch.locator(".span-links a").first.click()
    await expect(detail.locator("[data-span='deliver email']")).to_have_count(1)


async def test_parked_deliveries_are_replayed_and_discarded(site: Site, open_page: OpenPage) -> None:
    site.endpoint.refuses = True
    for username in ("parked-one", "parked-two", "parked-three"):
        await site.create(username)

    async def parked() -> list[notifications_pb2.Delivery]:
        async with site.api() as api:
            return [one async for one in api.deliveries(state=notifications_pb2.Delivery.PARKED)]

    await until(lambda: _at_least(parked, 3), what="three deliveries are parked")
    page = await open_page("#/deliveries")
    rows = page.locator("table.deliveries tbody tr")
    await expect(page.locator("#parked-count")).to_have_text(f" {len(await parked())} parked")
    before = await rows.count()
    assert before >= 3
    await picture(page, "console-parked")
    replayed, discarded = [await rows.nth(at).get_attribute("data-id") for at in (0, 1)]

    site.endpoint.refuses = False
    await rows.nth(0).locator("input").check()
    await page.get_by_role("button", name="Replay", exact=True).click()
    dialog = page.get_by_role("dialog", name="Replay 1 delivery?")
    # Without a reason nothing is done.
    await dialog.get_by_role("button", name="Replay").click()
    await expect(dialog).to_be_visible()
    await dialog.get_by_label("Reason").fill("the endpoint is mended")
    await dialog.get_by_role("button", name="Replay").click()
    await expect(dialog).to_be_hidden()
    await expect(rows).to_have_count(before - 1)

    await rows.first.locator("a.row-link").click()
    detail = page.locator("#detail")
    assert page.url.endswith(str(discarded))
    await detail.get_by_role("button", name="Discard").click()
    dialog = page.get_by_role("dialog", name="Discard 1 delivery?")
    await dialog.get_by_label("Reason").fill("sent by hand")
    await dialog.get_by_role("button", name="Discard").click()
    await expect(detail.locator("h2 .chip")).to_have_text("Discarded")
    await expect(detail.locator(".timeline")).to_contain_text("sent by hand")
    await expect(rows).to_have_count(before - 2)

    async with site.api() as api:
        found = {one.id: one async for one in api.deliveries()}
    assert found[str(discarded)].state == notifications_pb2.Delivery.DISCARDED
    assert [one.reason for one in found[str(replayed)].operations] == ["the endpoint is mended"]
    await page.get_by_role("radio", name="Delivered").check()
    delivered = page.locator(f"table.deliveries tr[data-id='{replayed}']")
    await expect(delivered).to_contain_text("succeeded 204")
    # The rest, together.
    await page.get_by_role("radio", name="Parked").check()
    await page.get_by_label("Choose all that are shown").check()
    await page.locator(".chosen").get_by_role("button", name="Discard").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("Reason").fill("not needed")
    await dialog.get_by_role("button", name="Discard").click()
    await expect(page.locator(".empty-title")).to_have_text("Nothing is parked.")
    assert await parked() == []
    await expect(page.locator("#parked-count")).to_be_hidden()


async def _at_least(listed: Any, count: int) -> bool:
    return len(await listed()) >= count


async def test_a_killed_service_is_seen_to_be_down_and_up_again(site: Site, open_page: OpenPage) -> None:
    page = await open_page()
    card = _card(page, "User service")
    feed = _card(page, "Feed")
    await expect(card.locator(".word")).to_have_text("Up")
    head = await feed.locator(".figure").first.inner_text()
    await site.users.kill(signal.SIGKILL)
    try:
        await expect(card.locator(".word")).to_have_text("Down")
        await expect(card.locator(".reason")).to_contain_text("refused")
        await expect(card.locator(".note")).to_contain_text("since")
        await expect(card.locator(".note")).to_contain_text("last answer")
        # What was last known stays, and says that it is old.
        await expect(feed.locator(".figure").first).to_have_text(head)
        await expect(feed).to_have_attribute("data-stale", "true")
        await expect(feed.locator(".note")).to_contain_text("as of")
        await expect(page.locator("#announcer")).to_have_text("User service: down")
        other = _card(page, "Notification service")
        await expect(other.locator(".word")).to_have_text("Up")
    finally:
        await site.users.restart()
    await expect(card.locator(".word")).to_have_text("Up")
    await expect(feed).to_have_attribute("data-stale", "false")
    await site.create("after-the-fall")
    await expect(_row(page, "after-the-fall")).to_have_count(1)


async def test_a_hanging_service_is_told_from_one_that_is_down(site: Site, open_page: OpenPage) -> None:
    page = await open_page()
    card = _card(page, "User service")
    site.users.send(signal.SIGSTOP)
    try:
        await expect(card.locator(".word")).to_have_text("Does not answer")
    finally:
        site.users.send(signal.SIGCONT)
    await expect(card.locator(".word")).to_have_text("Up")


async def test_a_page_without_its_console_says_so_and_goes_on_when_it_is_back(site: Site, open_page: OpenPage) -> None:
    await site.create("before-the-loss")
    # The browser itself complains of connections that are refused.
    page = await open_page(may_complain=True)
    await expect(_row(page, "before-the-loss")).to_have_count(1)
    connection = page.locator("#connection")
    await site.console.kill(signal.SIGKILL)
    try:
        await expect(connection).to_contain_text("Console not reachable since")
        await expect(_row(page, "before-the-loss")).to_have_count(1)
        await site.create("meanwhile")
    finally:
        await site.console.launch()
        await site.console.wait_serving()
    await expect(connection).to_have_text("Live")
    await expect(_row(page, "meanwhile")).to_have_count(1)
    await expect(_row(page, "before-the-loss")).to_have_count(1)


async def test_what_users_call_themselves_stays_text(site: Site, open_page: OpenPage) -> None:
    name = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    await site.create("mallory", name)
    page = await open_page()
    await expect(_row(page, "mallory")).to_contain_text(name)
    await _open_event(page, "mallory")
    await expect(page.locator("#detail .fields")).to_contain_text(name)
    await expect(page.locator("#detail .notification-title")).to_contain_text(name)
    assert await page.locator("script:not([src]), main script, #detail script, #detail img").count() == 0


async def test_a_list_is_held_while_it_is_read(site: Site, open_page: OpenPage) -> None:
    page = await open_page()
    await page.get_by_role("button", name="Pause").click()
    await site.create("held-back")
    fresh = page.get_by_role("button", name="Show 1 new change")
    await expect(fresh).to_be_visible()
    await expect(_row(page, "held-back")).to_have_count(0)
    await fresh.click()
    await expect(_row(page, "held-back")).to_have_count(1)
    await page.get_by_role("button", name="Pause").click()
    # Found by a part of the address, and by the kind of change.
    await page.get_by_label("Find").fill("HELD-BACK@")
    await expect(page.locator("table.events tbody tr")).to_have_count(1)
    await page.get_by_label("Change", exact=True).select_option("DELETED")
    await expect(page.locator(".empty-title")).to_have_text("No change matches.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_phone_needs_no_scrolling_sideways(site: Site, open_page: OpenPage, scheme: str) -> None:
    await site.create(f"phone-{scheme}", "Somebody with a name that is much longer than a phone is wide")
    page = await open_page(viewport=_PHONE, color_scheme=scheme, has_touch=True)
    await _open_event(page, f"phone-{scheme}")
    await expect(page.locator("#detail .spans > li").first).to_be_visible()
    assert await _wider(page) == []
    await page.get_by_role("link", name="Back to changes").click()
    await expect(_row(page, f"phone-{scheme}")).to_be_visible()
    await picture(page, f"console-phone-{scheme}")
    for view in ("events", "notifications", "deliveries"):
        await page.locator(f".tabs a[data-view={view}]").click()
        await expect(page.locator("#main .list, #main .empty").first).to_be_attached()
        assert await _wider(page) == [], view


async def _wider(page: Page) -> list[str]:
    """What makes the page wider than its window."""
    found: list[str] = await page.evaluate(
        """() => document.documentElement.scrollWidth <= innerWidth ? [] :
            [...document.querySelectorAll("*")].filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
                .map((one) => `${one.tagName}.${one.className}`)"""
    )
    return found


async def test_everything_is_reached_by_the_keyboard(site: Site, open_page: OpenPage) -> None:
    await site.create("keyboard")
    page = await open_page()
    await expect(_row(page, "keyboard")).to_have_count(1)
    reached = []
    for _ in range(12):
        await page.keyboard.press("Tab")
        reached.append(await page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
        if (await page.evaluate("document.activeElement.className")) == "row-link":
            break
    assert [one.split("\n")[0] for one in reached[:4]] == ["Skip to the list", "Changes", "Notifications", reached[3]]
    assert {"events-text", "Pause"} <= set(reached)
    assert await page.evaluate("getComputedStyle(document.activeElement, '::after').outlineStyle") == "solid"
    first = await page.evaluate("document.activeElement.href")
    await page.keyboard.press("ArrowDown")
    assert await page.evaluate("document.activeElement.href") != first
    await page.keyboard.press("Home")
    await page.keyboard.press("Enter")
    heading = page.locator("#detail h2")
    await expect(heading).to_have_text("Created keyboard")
    await expect(heading).to_be_focused()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Close")).to_be_focused()
    # Into a span and out again, then back to where it began.
    button = page.locator("#detail button.span").first
    await expect(button).to_be_visible()
    await button.focus()
    await page.keyboard.press("Enter")
    await expect(button).to_have_attribute("aria-expanded", "true")
    await expect(button).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.locator("#detail")).to_be_hidden()
    assert await page.evaluate("document.activeElement.href") == first


async def test_every_control_has_a_name_and_every_part_a_landmark(site: Site, open_page: OpenPage) -> None:
    site.endpoint.refuses = True
    await site.create("named")
    page = await open_page()
    await _open_event(page, "named")
    await expect(page.locator("#detail .spans > li").first).to_be_visible()
    seen = await _accessible(page)
    assert {"banner", "navigation", "main", "complementary", "region", "status"} <= {role for role, _ in seen}
    assert {("navigation", "Views"), ("complementary", "Details"), ("region", "How the system is")} <= set(seen)
    await page.goto(f"{site.url}#/deliveries")
    await expect(page.locator("table.deliveries tbody tr").first).to_be_visible()
    await page.locator("table.deliveries tbody input").first.check()
    await page.locator(".chosen").get_by_role("button", name="Discard").click()
    assert ("dialog", "Discard 1 delivery?") in await _accessible(page)
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_be_hidden()
    columns = {name for role, name in await _accessible(page) if role == "columnheader"}
    assert {"Made", "To", "State", "Tries", "Last attempt"} <= columns


_NAMED = {"button", "link", "textbox", "searchbox", "combobox", "checkbox", "radio", "table", "dialog", "image"}


async def _accessible(page: Page) -> list[tuple[str, str]]:
    """Roles and names as a screen reader is told; fails if a control has no name."""
    session = await page.context.new_cdp_session(page)
    tree = await session.send("Accessibility.getFullAXTree")
    seen = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in tree["nodes"]
        if not node["ignored"]
    ]
    assert [role for role, name in seen if role in _NAMED and not name] == []
    return seen


_PAIRS = [
    (ink, ground)
    for ink, grounds in {
        "ink": ("ground", "surface", "raised", "selected", "quiet-ground"),
        "muted": ("ground", "surface", "raised", "selected"),
        "accent": ("surface", "raised"),
        "on-accent": ("accent",),
        "good": ("good-ground",),
        "warn": ("warn-ground", "surface", "ground"),
        "bad": ("bad-ground", "surface"),
        "info": ("info-ground",),
    }.items()
    for ground in grounds
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_stands_out_from_its_ground(open_page: OpenPage, scheme: str) -> None:
    """4.5 to 1, as WCAG AA has it."""
    page = await open_page(color_scheme=scheme)
    ratios = await page.evaluate(
        """(pairs) => {
            const probe = document.body.appendChild(document.createElement("i"));
            const light = (name) => {
                probe.style.color = `var(--${name})`;
                const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
                const [r, g, b] = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            return pairs.map(([ink, ground]) => {
                const [low, high] = [light(ink), light(ground)].sort((one, other) => one - other);
                return (high + 0.05) / (low + 0.05);
            });
        }""",
        _PAIRS,
    )
    found = zip(_PAIRS, ratios, strict=True)
    assert [f"{ink} on {ground}: {ratio:.2f}" for (ink, ground), ratio in found if ratio < 4.5] == []


async def test_where_spans_go_to_jaeger_traces_are_links(site: Site, open_page: OpenPage) -> None:
    services = Services()
    console = services.process(
        "console",
        "serve",
        environment={
            "TIDINGS_CONSOLE_USERS_ADDRESS": site.users.address,
            "TIDINGS_CONSOLE_NOTIFICATIONS_ADDRESS": site.notifications.address,
            "TIDINGS_CONSOLE_JAEGER_URL": "https://jaeger.example.com/ui/",
        },
        listen_variable="TIDINGS_CONSOLE_LISTEN",
    )
    await console.launch()
    try:
        url = f"http://{await console.wait_serving()}/"
        await site.create("elsewhere")
        page = await open_page(url=url)
        await _open_event(page, "elsewhere")
        link = page.get_by_role("link", name="Open the trace in Jaeger")
        await expect(link).to_have_attribute("href", re.compile(r"https://jaeger\.example\.com/ui/trace/[0-9a-f]{32}"))
        # A page that outlives its console complains of that.
        await page.close()
    finally:
        await services.stop()


async def test_a_service_that_stops_is_not_held_up_by_who_watches_its_health(site: Site, open_page: OpenPage) -> None:
    """Streams that run get `grace`, which here is longer than the test waits."""
    page = await open_page()
    card = _card(page, "User service")
    try:
        assert await site.users.stop(timeout=30) == 0
        await expect(card.locator(".word")).to_have_text("Down")
    finally:
        await site.users.restart()
    await expect(card.locator(".word")).to_have_text("Up")
