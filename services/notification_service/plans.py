"""Plans: what a notification is to be, but for its words. Events, sends and digests say by them what they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from notification_service.channels import Addressee, Says, Writer
from notification_service.domain import EMAIL, IN_APP, Item, Notification
from notification_service.templates import Asked, Rendered

# What an addressee is told, by `current` or `previous`. Raises RenderError.
Say = Callable[[str], Rendered]


@dataclass(frozen=True, slots=True)
class Plan:
    """A notification that has no words and no deliveries yet; `language` is that of its user, as the user said it."""

    notification: Notification
    says: Says
    language: str
    # By `current`, who is also who reads it in the app, and `previous`; and to which of them its deliveries go.
    addressees: Mapping[str, Addressee]
    # What its template sees, for which of them and with which link to unsubscribe by.
    seen: Callable[[str, str], Mapping[str, Any]]
    # For machines.
    payload: Callable[[], Mapping[str, Any]]
    recipients: Sequence[str] = ("current",)
    # Draft.kind
    kind: str = ""
    # Where its mails are gathered instead of being delivered: as what.
    items: Callable[[Say], Iterable[Item]] | None = None
    # Why nothing can be said, whatever the template; empty if something can.
    problem: str = ""

    @property
    def is_shown(self) -> bool:
        """Whether it is for the app."""
        return IN_APP in self.notification.channels

    def told(self) -> Iterator[str]:
        """Whom something is said to."""
        if self.says and not self.problem:
            yield from dict.fromkeys((*(("current",) if self.is_shown else ()), *self.recipients))

    def asked(self, which: str, url: str) -> Asked:
        """What is said to one of them, with the link that switches it off."""
        return Asked(self.notification.template, self.seen(which, url), self.says is Says.HTML, self.language)


def says(channels: Iterable[str], writers: Mapping[str, Writer], *, gathered: bool = False) -> Says:
    """What channels, at least one, need of a template; of a mail that is gathered its subject is needed."""
    texts = (IN_APP, EMAIL) if gathered else (IN_APP,)
    return max(Says.TEXT if one in texts else writers[one].says for one in channels)
