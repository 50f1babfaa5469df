"""Templates: NAME.subject.txt, NAME.txt and NAME.html, in the recipient's language, rendered by Jinja in a sandbox.

HTML is escaped, text is not; a name that a template uses and nobody defined is an error, not an empty string.
Whatever goes wrong with one rendering is a RenderError with its reason, so that it stays the matter of one
notification: also a template that loops for ever or makes too much, for it is rendered in a process of its own whose
time and memory are bounded.

What is used is one set of files, read at one moment, with a version. A set is replaced by another as a whole, and only
if that has all that the rules need.

A template sees `user` and `previous` (None at creation), `event` (type, time, position, changed_fields, actor),
`name` (how to address the recipient), `recipient` (address, and whether it is the "current" or the "previous" one) and
`locale` (that of the template's files; empty for the language of everybody).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from notification_service import template_files
from notification_service.template_files import HTML, SUBJECT, TEXT, FileSet, MissingTemplateError
from notification_service.template_process import Bounds, BrokenProcessError, OverTimeError, RenderingProcess, Said
from servicekit.configfile import InvalidConfigError

# What a part may become, in bytes of UTF-8.
LARGEST_PART = 1 << 20
LARGEST_SUBJECT = 1000
_MOST = {SUBJECT: LARGEST_SUBJECT, TEXT: LARGEST_PART, HTML: LARGEST_PART}

# Locales are what users say they are: of so many it is known which files are for them.
_MOST_CHOSEN = 1000

# A template that runs over its time so often in a row is let alone for a while: trying it costs all others that time.
_PATIENCE = 3
_PAUSE = 60.0  # seconds

_LONGEST_REASON = 300


class RenderError(Exception):
    """A template is missing, wrong, or cannot be rendered for one event."""


@dataclass(frozen=True, slots=True)
class Need:
    """A rule's template, and whether its HTML part is needed."""

    rule: str
    template: str
    html: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A notification to be said by a template, in the best language that there is for a locale."""

    name: str
    context: Mapping[str, Any]
    html: bool
    locale: str = ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a notification says. `html` is empty if it was not asked for, or failed, which `html_problem` says."""

    subject: str
    text: str
    html: str
    html_problem: str
    version: str
    locale: str


class Loaded:
    """A set of files in use, since `load_time`."""

    def __init__(self, files: FileSet, bounds: Bounds) -> None:
        self.files = files
        self.load_time = datetime.now(UTC)
        self._process = RenderingProcess(files.sources, bounds)

        @lru_cache(_MOST_CHOSEN)
        def choose(name: str, locale: str, html: bool) -> tuple[str, Mapping[str, tuple[str, int]]]:
            chosen = files.choose(name, locale, html=html)
            return chosen.locale, {part: (file, _MOST[part]) for part, file in chosen.files.items()}

        self._choose = choose
        # By template and locale: how often it ran over its time in a row, and until when it is let alone.
        self._over: dict[tuple[str, str], tuple[int, float]] = {}
        self._problems: dict[str, tuple[list[str], list[str]]] = {}

    @property
    def version(self) -> str:
        """Of the content of all files: the same content has the same version everywhere."""
        return self.files.version

    def locale(self, name: str, locale: str, html: bool) -> str:
        """The locale that `render` would say a notification in; empty also if there is no such template."""
        try:
            return self._choose(name, locale, html)[0]
        except MissingTemplateError:
            return ""

    def render(self, name: str, context: Mapping[str, Any], *, locale: str = "", html: bool) -> Rendered:
        """Says one notification. Raises RenderError."""
        [said] = self.render_all([Asked(name, context, html, locale)])
        if isinstance(said, RenderError):
            raise said
        return said

    def render_all(self, asked: Sequence[Asked]) -> list[Rendered | RenderError]:
        """Says many notifications, each as if it were the only one, far faster than one by one."""
        said: dict[int, Rendered | RenderError] = {}
        left = list(range(len(asked)))
        while left:
            trying: list[int] = []
            renderings = []
            for number in left:
                one = asked[number]
                try:
                    locale, parts = self._choose(one.name, one.locale, one.html)
                    self._tried(one.name, locale)
                except (MissingTemplateError, RenderError) as error:
                    said[number] = RenderError(str(error)[:_LONGEST_REASON])
                    continue
                trying.append(number)
                renderings.append((parts, {**one.context, "locale": locale}))
            done, failure = self._process.render(renderings)
            for number, parts_said in zip(trying, done, strict=False):
                said[number] = self._rendered(asked[number], parts_said)
            if failure is not None:
                number = trying[len(done)]
                said[number] = self._failed(asked[number], failure)
            left = trying[len(done) + 1 :]
        return [said[number] for number in range(len(asked))]

    def _tried(self, name: str, locale: str) -> None:
        """Raises RenderError while a template is let alone."""
        times, until = self._over.get((name, locale), (0, 0.0))
        if times >= _PATIENCE and time.monotonic() < until:
            label = _label(name, locale)
            raise RenderError(f"{label}: not tried, for it took too long {times} times in a row")

    def _rendered(self, asked: Asked, said: Said) -> Rendered | RenderError:
        locale, _ = self._choose(asked.name, asked.locale, asked.html)
        self._over.pop((asked.name, locale), None)
        for part in (SUBJECT, TEXT):
            if "problem" in said[part]:
                return RenderError(said[part]["problem"])
        html = said[HTML] if asked.html else {}
        return Rendered(
            # A subject is one line: whatever comes in by a name cannot begin another header.
            subject=" ".join(said[SUBJECT]["text"].split()),
            text=said[TEXT]["text"].strip() + "\n",
            html=html.get("text", ""),
            html_problem=html.get("problem", ""),
            version=self.version,
            locale=locale,
        )

    def _failed(self, asked: Asked, failure: OverTimeError | BrokenProcessError) -> RenderError:
        locale, _ = self._choose(asked.name, asked.locale, asked.html)
        label = _label(asked.name, locale)
        if isinstance(failure, BrokenProcessError):
            return RenderError(f"{label}: {failure}")
        times, _ = self._over.get((asked.name, locale), (0, 0.0))
        self._over[asked.name, locale] = times + 1, time.monotonic() + _PAUSE
        return RenderError(f"{label}: takes more than {self._process.bounds.seconds:g} s of processor time")

    def problems(self, needs: Sequence[Need]) -> list[str]:
        """What is wrong for these rules, a line each; every translation of their templates counts."""
        lines: list[str] = []
        for need in needs:
            problems: list[str] = []
            try:
                self.files.choose(need.template, "", html=need.html)
            except MissingTemplateError as error:
                problems.append(str(error))
            problems += self.problems_of(need.template)
            lines += [f"rule {need.rule!r}: {problem}" for problem in dict.fromkeys(problems)]
        return lines

    def problems_of(self, name: str) -> list[str]:
        """What is wrong with the files of a template, and those that they use."""
        seen: set[str] = set()
        waiting = self.files.files(name)
        problems = [f"template {file} {why}" for file, why in self.files.unusable_of(name)]
        while waiting:
            file = waiting.pop(0)
            if file not in seen:
                seen.add(file)
                found, references = self._compiled(file)
                problems += found
                waiting += references
        return list(dict.fromkeys(problems))

    def _compiled(self, file: str) -> tuple[list[str], list[str]]:
        if file not in self._problems:
            try:
                answer = self._process.compile(file)
                self._problems[file] = list(answer["problems"]), list(answer["references"])
            except OverTimeError:
                seconds = self._process.bounds.seconds
                self._problems[file] = [f"template {file}: takes more than {seconds:g} s to compile"], []
            except BrokenProcessError as error:
                return [f"template {file}: {error}"], []
        return self._problems[file]

    def close(self) -> None:
        """Gives back its process; who still has the set may go on using it."""
        self._process.close()


def _label(name: str, locale: str) -> str:
    return f"template {name}" + (f" in {locale}" if locale else "")


class Templates:
    """The templates of a folder of the operator's, if there is one, before the built-in ones.

    `current` is the set in use, another object after each change. `refused` has the problems for which the files that
    the folder has now are not used, a line each; it is empty if they are.
    """

    def __init__(self, folder: Path | None = None, bounds: Bounds | None = None) -> None:
        self._folder = folder
        self._bounds = bounds or Bounds()
        self._lock = threading.Lock()
        self._refused_version = ""
        self.refused = ""
        self.current = Loaded(template_files.read(folder), self._bounds)

    def check(self, needs: Sequence[Need]) -> None:
        """Raises InvalidConfigError, with a line per problem, if the set lacks what the rules need."""
        if problems := self.current.problems(needs):
            raise InvalidConfigError("\n".join(problems))

    def reload(self, needs: Sequence[Need], *, again: bool = True) -> bool:
        """Uses the files as they are now; whether they are others. A set that lacks what the rules need is not used.
        One that was refused is looked at again only if `again`. Takes its time. Raises InvalidConfigError.
        """
        with self._lock:
            try:
                return self._reload(needs, again)
            except InvalidConfigError as error:
                self.refused = str(error)
                raise

    def _reload(self, needs: Sequence[Need], again: bool) -> bool:
        try:
            files = template_files.read(self._folder)
        except InvalidConfigError:
            # `refused` is about to say this; of a set that was refused before, it would be the wrong reason.
            self._refused_version = ""
            raise
        if files.version == self.current.version:
            self.refused = self._refused_version = ""
            return False
        if files.version == self._refused_version and not again:
            raise InvalidConfigError(self.refused)
        made = Loaded(files, self._bounds)
        if problems := made.problems(needs):
            made.close()
            self._refused_version = files.version
            raise InvalidConfigError("\n".join(problems))
        self.refused = self._refused_version = ""
        before, self.current = self.current, made
        before.close()
        return True

    def render(self, name: str, context: Mapping[str, Any], *, locale: str = "", html: bool) -> Rendered:
        """See Loaded."""
        return self.current.render(name, context, locale=locale, html=html)

    def apart(self) -> Loaded:
        """The set in use with a process of its own: what is tried with it holds up nothing. To be closed."""
        return Loaded(self.current.files, self._bounds)
