"""The steps, in their order. Each leaves the system as the next one expects it: the image under test, two replicas."""

from __future__ import annotations

import json
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tests.e2e import objects
from tests.e2e.driver import Driver, FailedError, Object, UntriedError, wait

_START, _ROLL, _MIGRATE, _MAIL, _CLIENT = 180.0, 300.0, 300.0, 60.0, 60.0
_APPS = ("user-service", "notification-service")

# Makes an image of another: with the revision of this name, whose file has this text.
Derive = Callable[[str, str, str], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Site:
    """What the steps work on. `derive` raises UntriedError where no image can be made for the cluster to run."""

    driver: Driver
    image: str
    head: str
    render: Callable[[str], list[Object]]
    derive: Derive
    say: Callable[[str], None]

    async def wait(self, what: str, ask: Callable[[], Awaitable[str | None]], timeout: float) -> None:
        """As `driver.wait`."""
        await wait(what, ask, timeout, self.say, self.driver)

    async def release(self, image: str) -> str:
        """Applies the overlay with an image; returns the name of its Job."""
        made = objects.arranged(self.render(image), self.image)
        await self.driver.apply(made)
        return objects.job_name(made)

    async def rolled_out(self, *, kind: str = "Deployment", apps: tuple[str, ...] = _APPS, within: float) -> None:
        """Waits until workloads are as wanted."""
        for app in apps:
            await self.wait(f"{kind} {app}", lambda app=app: self.driver.rolled_out(kind, app), within)  # type: ignore[misc]

    async def migrated(self, job: str, *, to: bool) -> None:
        """Waits for the end of a Job. Raises FailedError if it is another than expected."""

        async def ended() -> str | None:
            return "it runs" if await self.driver.job(job) is None else None

        await self.wait(f"Job {job}", ended, _MIGRATE)
        if await self.driver.job(job) is not to:
            raise FailedError(f"Job {job} {'failed' if to else 'completed'}:\n{await self.driver.job_logs(job)}")

    async def call(self, *args: str) -> str:
        """Runs the command line in a pod; returns what it printed. Raises FailedError if it does not succeed."""
        return await self.once("client", "tidings.cli", *args)

    async def once(self, kind: str, *args: str, program: str = "") -> str:
        """Runs a pod to its end; returns what it printed. Raises FailedError if it does not succeed."""
        name = f"{kind}-{secrets.token_hex(4)}"
        await self.driver.apply([objects.pod(name, self.image, args, program=program)])
        return await self._ended(name)

    async def _ended(self, name: str) -> str:
        async def ended() -> str | None:
            return "it runs" if await self.driver.exit_code(name) is None else None

        await self.wait(f"Pod {name}", ended, _CLIENT)
        output = await self.driver.logs(name)
        if (code := await self.driver.exit_code(name)) != 0:
            raise FailedError(f"{name} ended with {code}:\n{output}")
        return output

    async def create_user(self) -> dict[str, Any]:
        """Creates a user by the command line, as a client in the cluster does."""
        name = f"user-{secrets.token_hex(4)}"
        printed = await self.call("users", "create", "--username", name, "--email", f"{name}@example.com", "--json")
        user: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return user

    @asynccontextmanager
    async def load(self) -> AsyncIterator[dict[str, Any]]:
        """Users are created and the feed is followed meanwhile. The verdict is filled in at the end; raises FailedError
        if an event was missing, doubled or out of order.
        """
        name = f"load-{secrets.token_hex(4)}"
        await self.driver.apply([objects.pod(name, self.image, [name], program="load.py")])

        async def begun() -> str | None:
            return None if "begun" in await self.driver.logs(name) else "it has not begun"

        await self.wait(f"Pod {name}", begun, _CLIENT)
        verdict: dict[str, Any] = {}
        yield verdict
        await self.driver.execute(name, "touch", "/tmp/stop")
        printed = await self._ended(name)
        verdict |= json.loads(printed.splitlines()[-1])
        self.say(f"load: {json.dumps({**verdict, 'failed': len(verdict['failed'])})}")
        await self._mailed(name, verdict["created"])

    async def _mailed(self, prefix: str, count: int) -> None:
        """Waits for the mail of every user of a load; nobody has two that are not the same."""

        async def each_has_one() -> str | None:
            mails: dict[str, set[str]] = {}
            for mail in await self.mails():
                for recipient in mail["envelope_to"]:
                    if recipient.startswith(f"{prefix}-"):
                        mails.setdefault(recipient, set()).add(mail["message_id"])
            if doubled := [recipient for recipient, ids in mails.items() if len(ids) > 1]:
                raise FailedError(f"several mails for one change: {doubled[:5]}")
            return None if len(mails) >= count else f"{len(mails)} of {count}"

        await self.wait("mail to every user of the load", each_has_one, _MAIL)

    async def mails(self) -> list[dict[str, Any]]:
        """What the mail catcher has."""
        [pod] = await self.driver.ready("mail-catcher")
        printed = await self.driver.execute(pod, "tidings", "mail", "list", "--all", "--json")
        return [json.loads(line) for line in printed.splitlines()]


async def deploy(site: Site) -> None:
    """One apply of the overlay; Postgres starts."""
    await site.release(site.image)
    await site.driver.apply([objects.programs(), *objects.trace_receiver(site.image)])
    await site.rolled_out(kind="StatefulSet", apps=("postgres",), within=_START)


async def migrate(site: Site) -> None:
    """The Job brings both databases to their newest revisions."""
    job = objects.job_name(site.render(site.image))
    await site.migrated(job, to=True)
    said = await site.driver.job_logs(job)
    site.say(said.strip())
    if said.count('"revision applied"') < 2:
        raise FailedError(f"Job {job} applied no revisions:\n{said}")


async def start(site: Site) -> None:
    """Services, which waited for the schema, and the mail catcher get ready by their probes."""
    await site.rolled_out(apps=(*_APPS, "mail-catcher"), within=_START)


async def users_and_mail(site: Site) -> None:
    """A user that a client creates is sent a mail."""
    user = await site.create_user()

    async def there() -> str | None:
        count = sum(user["email"] in mail["envelope_to"] for mail in await site.mails())
        return None if count == 1 else f"{count} mails"

    await site.wait(f"a mail to {user['email']}", there, _MAIL)


async def rolling_restart(site: Site) -> None:
    """Under load both services restart: no call fails, no event is missing or doubled, and every user has one mail."""
    before = {app: set(await site.driver.ready(app)) for app in _APPS}
    async with site.load() as verdict:
        for app in _APPS:
            await site.driver.restart(app)
        await site.rolled_out(within=_ROLL)
    for app in _APPS:
        if kept := before[app] & set(await site.driver.ready(app)):
            raise FailedError(f"{app} was not restarted: {kept}")
    if verdict["failed"]:
        raise FailedError(f"{len(verdict['failed'])} calls failed: {verdict['failed'][:3]}")


async def scale(site: Site) -> None:
    """Under load the user service grows to three replicas and shrinks again: no call fails."""
    async with site.load() as verdict:
        for replicas in (3, 2):
            await site.driver.scale("user-service", replicas)
            await site.rolled_out(apps=("user-service",), within=_ROLL)
            if len(await site.driver.ready("user-service")) != replicas:
                raise FailedError(f"there are not {replicas} ready pods")
    if verdict["failed"]:
        raise FailedError(f"{len(verdict['failed'])} calls failed: {verdict['failed'][:3]}")


async def kill_pods(site: Site) -> None:
    """Under load a pod of each service is killed and replaced: no acknowledged user is lost, no event doubled."""
    async with site.load():
        for app in _APPS:
            victim = (await site.driver.ready(app))[0]
            await site.driver.kill(victim)
            await site.rolled_out(apps=(app,), within=_ROLL)
            if victim in await site.driver.ready(app):
                raise FailedError(f"{victim} was not killed")


_REVISION = '''"""{text}"""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{before}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("users", sa.Column("next_release", sa.Text(), nullable=True))
    {then}


def downgrade() -> None:
    op.drop_column("users", "next_release")
'''


async def _derived(site: Site, name: str, revision: str, before: str, then: str) -> str:
    text = _REVISION.format(
        text=f"The users have a further column ({name}).", revision=revision, before=before, then=then
    )
    return await site.derive(name, revision, text)


async def _revision(site: Site) -> str:
    pod = (await site.driver.ready("user-service"))[0]
    return (await site.driver.execute(pod, "python", "-m", "migrations", "current", "users")).split()[-1]


async def failing_migration(site: Site) -> None:
    """A release whose migration fails: its Job fails, the pods of before serve on, and the database is as it was."""
    image = await _derived(site, "failing", "9997", site.head, 'op.execute("SELECT 1 / 0")')
    before = {app: set(await site.driver.ready(app)) for app in _APPS}
    await site.migrated(await site.release(image), to=False)
    if before["user-service"] != set(await site.driver.ready("user-service")):
        raise FailedError("the pods of before do not serve on")
    await site.create_user()
    if (at := await _revision(site)) != site.head:
        raise FailedError(f"the database is at {at}, not at {site.head}")
    await site.release(site.image)
    await site.rolled_out(within=_ROLL)
    if before["user-service"] != set(await site.driver.ready("user-service")):
        raise FailedError("the pods of before were replaced")


async def next_release(site: Site) -> None:
    """A release with a further revision rolls out and is rolled back, under load: the old image serves on the newer
    schema, no call fails.
    """
    image = await _derived(site, "next", "9998", site.head, "pass")
    async with site.load() as verdict:
        for release in (image, site.image):
            await site.migrated(await site.release(release), to=True)
            await site.rolled_out(within=_ROLL)
            if (at := await _revision(site)) != "9998":
                raise FailedError(f"the database is at {at}, not at the revision of the next release")
    if verdict["failed"]:
        raise FailedError(f"{len(verdict['failed'])} calls failed: {verdict['failed'][:3]}")


async def traces(site: Site) -> None:
    """The trace of a call that creates a user goes on to the delivery of the mail, and arrives at a receiver."""
    trace = (await site.once("traced", program="traced_call.py")).split()[-1]

    async def there() -> str | None:
        spans = [json.loads(line) for line in (await site.driver.logs(objects.TRACES)).splitlines()]
        of_call = {(span["service"], span["name"]) for span in spans if span["trace"] == trace}
        # What the notification service did for the event, and its attempt at the delivery.
        return None if len(of_call) > 1 else f"{len(spans)} spans, of the call {sorted(of_call)}"

    await site.wait(f"spans of the trace {trace}", there, _MAIL)


Step = Callable[[Site], Awaitable[None]]
STEPS: Mapping[str, Step] = {
    "deploy": deploy,
    "migrate": migrate,
    "start": start,
    "users-and-mail": users_and_mail,
    "rolling-restart": rolling_restart,
    "scale": scale,
    "kill-pods": kill_pods,
    "failing-migration": failing_migration,
    "next-release": next_release,
    "traces": traces,
}
# Without these there is nothing to try the others on.
NEEDED = frozenset({"deploy", "migrate", "start"})

Outcome = Literal["passed", "failed", "untried"]


async def run(site: Site, wanted: tuple[str, ...] = ()) -> dict[str, tuple[Outcome, str]]:
    """Runs the steps, all or those that are wanted and those that are needed. Every step has an outcome."""
    outcomes: dict[str, tuple[Outcome, str]] = dict.fromkeys(STEPS, ("untried", "it was not asked for"))
    for name, step in STEPS.items():
        if wanted and name not in wanted and name not in NEEDED:
            continue
        if broken := next((needed for needed in STEPS if needed in NEEDED and outcomes[needed][0] == "failed"), None):
            outcomes[name] = ("untried", f"{broken} failed")
            continue
        site.say(f"step {name}: {(step.__doc__ or '').strip()}")
        try:
            await step(site)
        except UntriedError as error:
            outcomes[name] = ("untried", str(error))
        except FailedError as error:
            outcomes[name] = ("failed", str(error))
        except Exception:
            outcomes[name] = ("failed", traceback.format_exc())
        else:
            outcomes[name] = ("passed", "")
        site.say(": ".join(filter(None, (f"step {name}", *outcomes[name]))))
    return outcomes
