"""The pages behind unsubscribe links, in English and German: text and buttons, no script, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from notification_service.unsubscribe import Standing

CATEGORY_OFF, CATEGORY_ON = "category-off", "category-on"
ALL_OFF, ALL_ON = "all-off", "all-on"

_CSS = Path(__file__).with_name("pages.css").read_text(encoding="utf-8")
_CSS_HASH = base64.b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()
_TEMPLATE = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string(Path(__file__).with_name("pages.html").read_text(encoding="utf-8"))

CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_CSS_HASH}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Words:
    """What is said in one language; `{}` is the category, of the title who sends the mail."""

    language: str
    title: str
    category_is_on: str
    category_is_off: str
    category_is_mandatory: str
    category_off: str
    category_on: str
    all_is_off: str
    all_off: str
    all_on: str
    but_mandatory: str
    suppressed: str
    unsubscribed: str
    not_found: tuple[str, str]
    not_possible: tuple[str, str]
    not_understood: tuple[str, str]
    try_again: tuple[str, str]


_ENGLISH = Words(
    language="en",
    title="Mail from {}",
    category_is_on="Mail of the kind “{}” is switched on.",
    category_is_off="Mail of the kind “{}” is switched off.",
    category_is_mandatory="Mail of the kind “{}” cannot be switched off.",
    category_off="Switch off mail of the kind “{}”",
    category_on="Switch on mail of the kind “{}” again",
    all_is_off="All mail to this address is switched off.",
    all_off="Switch off all mail to this address",
    all_on="Switch on mail to this address again",
    but_mandatory="What cannot be switched off, such as mail about your security, still comes.",
    suppressed="No mail is sent to this address at present.",
    unsubscribed="Unsubscribed.",
    not_found=("This link does not work", "Part of it may be missing. Please open it once more from the mail."),
    not_possible=("That is not possible", "This mail cannot be switched off by this link."),
    not_understood=("That was not understood", "Please open the link once more from the mail."),
    try_again=("That did not work", "Please try again in a minute."),
)
_GERMAN = Words(
    language="de",
    title="Nachrichten von {}",
    category_is_on="Nachrichten der Art „{}“ sind eingeschaltet.",
    category_is_off="Nachrichten der Art „{}“ sind abbestellt.",
    category_is_mandatory="Nachrichten der Art „{}“ lassen sich nicht abbestellen.",
    category_off="Nachrichten der Art „{}“ abbestellen",
    category_on="Nachrichten der Art „{}“ wieder erhalten",
    all_is_off="Alle Nachrichten an diese Adresse sind abbestellt.",
    all_off="Alle Nachrichten an diese Adresse abbestellen",
    all_on="Nachrichten an diese Adresse wieder erhalten",
    but_mandatory="Was sich nicht abbestellen lässt, etwa zu Ihrer Sicherheit, kommt weiterhin.",
    suppressed="An diese Adresse wird derzeit nichts verschickt.",
    unsubscribed="Abbestellt.",
    not_found=(
        "Dieser Link funktioniert nicht",
        "Vielleicht fehlt ein Teil davon. Bitte öffnen Sie ihn noch einmal aus der Nachricht.",
    ),
    not_possible=("Das geht nicht", "Diese Nachrichten lassen sich mit diesem Link nicht abbestellen."),
    not_understood=("Das wurde nicht verstanden", "Bitte öffnen Sie den Link noch einmal aus der Nachricht."),
    try_again=("Das hat nicht geklappt", "Bitte versuchen Sie es in einer Minute noch einmal."),
)
_LANGUAGES = {words.language: words for words in (_ENGLISH, _GERMAN)}
_RANGE = re.compile(r"\s*([A-Za-z]{1,8}|\*)(?:-[A-Za-z0-9-]*)?\s*(?:;\s*q\s*=\s*([01](?:\.[0-9]{0,3})?)\s*)?")


def words(accept_language: str) -> Words:
    """The language of a reader, by what a browser says in Accept-Language; English unless German is liked better."""
    wanted: dict[str, float] = {}
    for part in accept_language.split(","):
        if match := _RANGE.fullmatch(part):
            wanted.setdefault(match[1].lower(), float(match[2] or 1))
    others = wanted.get("*", 0.0)
    best = max(_LANGUAGES, key=lambda language: wanted.get(language, others))
    return _LANGUAGES[best]


@dataclass(frozen=True, slots=True)
class _Action:
    value: str
    label: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class _Page:
    title: str
    lines: Sequence[str]
    actions: Sequence[_Action] = ()


def standing(words: Words, found: Standing, sender: str) -> str:
    """How things are, and what may be done; `sender` is the name that mails come from."""
    lines: list[str] = []
    actions: list[_Action] = []
    off, on = _Action(ALL_OFF, words.all_off, words.but_mandatory), _Action(ALL_ON, words.all_on)
    named = found.category
    if found.is_unsubscribed:
        lines += [words.all_is_off, words.but_mandatory]
        actions.append(on)
    elif found.suppressed:
        lines.append(words.suppressed)
    if found.is_mandatory:
        lines.append(words.category_is_mandatory.format(named))
    elif found.is_on and not found.suppressed:
        lines.append(words.category_is_on.format(named))
        actions.append(_Action(CATEGORY_OFF, words.category_off.format(named)))
    elif not found.is_on:
        lines.append(words.category_is_off.format(named))
        actions.append(_Action(CATEGORY_ON, words.category_on.format(named)))
    if found.has_address and not found.suppressed:
        actions.append(off)
    return _rendered(words, _Page(words.title.format(sender), lines, actions))


def told(words: Words, what: tuple[str, str]) -> str:
    """A page that only says something: title and text."""
    return _rendered(words, _Page(what[0], (what[1],)))


def _rendered(words: Words, page: _Page) -> str:
    # What is in the style element is not escaped: it is no text of anybody else's.
    return _TEMPLATE.render(language=words.language, page=page, css=Markup(_CSS))  # noqa: S704
