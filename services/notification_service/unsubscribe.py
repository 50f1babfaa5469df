"""What a link may switch, read and changed: mail of its category for its user, or all mail to its address.

A category is switched in the user's preferences, all mail by a suppression of the address for the reason UNSUBSCRIBED;
both is what the gate asks at every attempt. Neither stops mandatory categories. Who has the link, has the mail: no more
is asked. Doing something twice changes nothing the second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from notification_service import preferences
from notification_service.categories import Categories
from notification_service.links import Claim
from notification_service.store import addresses, suppressions
from notification_service.store import preferences as stored_preferences
from notification_service.store.preferences import Stored
from servicekit import logs
from servicekit.database import Connection, Pool
from servicekit.errors import AlreadyExistsError, NotFoundError

log = logs.get(__name__)

# Who did it, where suppressions keep that.
ACTOR = "unsubscribe link"
UNSUBSCRIBED = "UNSUBSCRIBED"


class NotToBeSwitchedError(Exception):
    """The category is mandatory, or it is no longer known which address the link was sent to."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How things are for the reader of a link."""

    category: str
    is_on: bool
    is_mandatory: bool
    # Whether the address is known, so that all mail to it can be switched.
    has_address: bool
    # Why the address is not written to; empty if it is.
    suppressed: str

    @property
    def is_unsubscribed(self) -> bool:
        """Whether all mail is switched off, as a link does it and undoes it."""
        return self.suppressed == UNSUBSCRIBED


class Switches:
    """Reads and changes over a pool."""

    def __init__(self, pool: Pool, categories: Categories) -> None:
        self._pool = pool
        self._categories = categories

    async def standing(self, claim: Claim) -> Standing:
        """How things are."""
        async with self._pool.connection() as connection:
            stored = await stored_preferences.find(connection, claim.user_id)
            address = await _address(connection, claim)
            found = await suppressions.find(connection, channel=claim.channel, target=address) if address else None
        return Standing(
            category=claim.category,
            is_on=self._is_on(stored.document, claim),
            is_mandatory=self._categories.of(claim.category).mandatory,
            has_address=bool(address),
            suppressed=found.reason if found else "",
        )

    def _is_on(self, document: Mapping[str, Any], claim: Claim) -> bool:
        rules = self._categories.of(claim.category)
        return preferences.effective(document, claim.category, rules, claim.channel).on

    async def switch_category(self, claim: Claim, on: bool) -> bool:
        """Switches the category for the user; whether that changed anything. Raises NotToBeSwitchedError."""
        if self._categories.of(claim.category).mandatory:
            raise NotToBeSwitchedError
        changed = False

        def decide(found: Stored) -> Mapping[str, Any] | None:
            nonlocal changed
            wanted = self._switched(found.document, claim, on)
            changed = wanted is not None
            return wanted

        async with self._pool.connection() as connection:
            await stored_preferences.edit(connection, claim.user_id, decide)
        if changed:
            log.info(
                "a category was switched by a link",
                user_id=str(claim.user_id), category=claim.category, channel=claim.channel, on=on,
            )  # fmt: skip
        return changed

    def _switched(self, document: Mapping[str, Any], claim: Claim, on: bool) -> Mapping[str, Any] | None:
        """The categories of a document after the switch; None if they are so already."""
        choices = dict(document.get("categories", {}).get(claim.category, {}))
        # Off is the user's own decision, also where something else has it off for now.
        if choices.get(claim.channel) is False if not on else self._is_on(document, claim):
            return None
        choices.pop(claim.channel, None)
        # Switched on, it is as if it had never been off: where that is not enough, the user's decision says so.
        if not on or not self._is_on(_with(document, claim, choices), claim):
            choices[claim.channel] = on
        return {"categories": _with(document, claim, choices)["categories"]}

    async def switch_everything(self, claim: Claim, on: bool) -> bool:
        """Switches all mail to the address, but mandatory categories; whether that changed anything. One that is
        suppressed for another reason stays so. Raises NotToBeSwitchedError.
        """
        async with self._pool.connection() as connection:
            address = await _address(connection, claim)
            if address is None:
                raise NotToBeSwitchedError
            try:
                if on:
                    await suppressions.remove(connection, channel=claim.channel, target=address, reason=UNSUBSCRIBED)
                else:
                    await suppressions.create(
                        connection,
                        channel=claim.channel,
                        target=address,
                        reason=UNSUBSCRIBED,
                        detail=f"by the link in a mail of the category {claim.category}",
                        actor=ACTOR,
                    )
            except (AlreadyExistsError, NotFoundError):
                return False
        log.info("all mail was switched by a link", user_id=str(claim.user_id), channel=claim.channel, on=on)
        return True


def _with(document: Mapping[str, Any], claim: Claim, choices: Mapping[str, bool]) -> dict[str, Any]:
    """A document with other choices for the category; a category without any is none."""
    categories = {**document.get("categories", {}), claim.category: choices}
    return {**document, "categories": {name: chosen for name, chosen in categories.items() if chosen}}


async def _address(connection: Connection, claim: Claim) -> str | None:
    """The address that the link was sent to, of those that its user was written to."""
    known = await addresses.of_user(connection, claim.user_id, claim.channel)
    return next((address for address in known if claim.is_of(address)), None)
