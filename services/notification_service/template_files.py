"""The files of templates, read at one moment: the operator's folder before the built-in one.

    NAME.subject.txt  NAME.txt  NAME.html              the parts in the language that everybody is told in
    NAME.de.subject.txt  NAME.de.txt  NAME.de.html     in German
    NAME.de-AT.subject.txt                             in Austria's German; what it lacks is taken from German

A notification is said in one language. Its locale is cut from the end (`de-AT`, `de`, none) until there is a locale
that has every part that is needed, of its own or of the shorter ones of the same language.

Whose text it is counts, too: where the operator's folder has a part of a template in the language of everybody, the
built-in translations of that template are of another text, and are not used.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from servicekit.configfile import InvalidConfigError

BUILT_IN = Path(__file__).with_name("templates")

SUBJECT, TEXT, HTML = "subject.txt", "txt", "html"
PARTS = (SUBJECT, TEXT, HTML)

LARGEST_FILE = 256 * 1024
_MOST_FILES = 2000
_LARGEST_SET = 8 * 1024 * 1024
_VERSION_LENGTH = 12

_LOCALE = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{1,8})*")
_SUFFIXES = (".txt", ".html")
_SCRIPT_LENGTH, _REGION_LENGTH = 4, 2

# By template, by locale in lower case ("" for everybody's), by part: the file.
_Index = dict[str, dict[str, dict[str, str]]]


class MissingTemplateError(Exception):
    """A template lacks parts that are needed, in every locale that would do."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files of a template, by part, and the locale that they are in; empty for the language of everybody."""

    locale: str
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FileSet:
    """The files of one moment. `unusable` says of files why they cannot be used; `version` is a hash of all content."""

    sources: Mapping[str, str]
    unusable: Mapping[str, str]
    version: str
    _index: _Index = field(repr=False)

    def choose(self, name: str, locale: str, *, html: bool) -> Chosen:
        """The files to say a notification with. Raises MissingTemplateError."""
        needed = PARTS if html else PARTS[:2]
        by_locale = self._index.get(name, {})
        tags = _shortened(locale)
        for number, tag in enumerate(tags):
            if tag in by_locale:
                files = _gathered([by_locale.get(one, {}) for one in tags[number:]], needed)
                if len(files) == len(needed):
                    return Chosen(_written(tag), files)
        files = _gathered([by_locale.get("", {})], needed)
        if len(files) < len(needed):
            raise MissingTemplateError(self._missing(name, [part for part in needed if part not in files]))
        return Chosen("", files)

    def _missing(self, name: str, parts: Sequence[str]) -> str:
        files = [f"{name}.{part}" for part in parts]
        reasons = [f"template {file} {self.unusable.get(file, 'is missing')}" for file in files]
        # Of a template that is not there at all one file says enough.
        return "; ".join(reasons if self._index.get(name) else reasons[:1])

    def _is_translation(self, name: str) -> bool:
        translated = _translated(name)
        return translated is not None and translated[0] in self._index

    def names(self) -> list[str]:
        """The templates that there are, in order. What others are made of, such as `base.html`, is none."""
        return sorted(
            name
            for name, by_locale in self._index.items()
            if not self._is_translation(name)
            and any(part in PARTS[:2] for parts in by_locale.values() for part in parts)
        )

    def locales(self, name: str) -> dict[str, list[str]]:
        """The parts that a template has, by locale; everybody's first, as an empty text."""
        by_locale = self._index.get(name, {})
        return {_written(tag): [part for part in PARTS if part in by_locale[tag]] for tag in sorted(by_locale)}

    def unusable_of(self, name: str) -> list[tuple[str, str]]:
        """Files of a template that cannot be used, and why not."""
        return [(file, why) for file, why in self.unusable.items() if name in _templates_of(file)]

    def files(self, name: str) -> list[str]:
        """All files of a template's parts."""
        return sorted(file for parts in self._index.get(name, {}).values() for file in parts.values())


def _gathered(places: Sequence[Mapping[str, str]], needed: Sequence[str]) -> dict[str, str]:
    """Each part from the first place that has it."""
    return {part: next(place[part] for place in places if part in place) for part in needed
            if any(part in place for place in places)}  # fmt: skip


def _shortened(locale: str) -> list[str]:
    """A locale and what it falls back to, in lower case: RFC 4647, lookup."""
    subtags = locale.replace("_", "-").lower().split("-") if locale else []
    tags = []
    while subtags:
        if len(subtags[-1]) > 1:
            tags.append("-".join(subtags))
        subtags.pop()
    return tags


def _written(tag: str) -> str:
    """A locale in the usual letters: `de-AT`, `zh-Hant-TW`."""
    language, *others = tag.split("-")
    cases = {_SCRIPT_LENGTH: str.title, _REGION_LENGTH: str.upper}
    return "-".join([language, *(cases.get(len(one), str.lower)(one) for one in others)])


def _translated(stem: str) -> tuple[str, str] | None:
    """The template and the locale, in lower case, in what stands before the suffix of a part; None if it has none."""
    name, _, locale = stem.rpartition(".")
    return (name, locale.replace("_", "-").lower()) if name and _LOCALE.fullmatch(locale) else None


def _part_of(file: str) -> tuple[str, str] | None:
    """The stem and the part of a file, if it is one of a template's."""
    for part in PARTS:
        if file.endswith(f".{part}"):
            return file.removesuffix(f".{part}"), part
    return None


def _templates_of(file: str) -> list[str]:
    """The templates that a file may be a part of."""
    found = _part_of(file)
    if found is None:
        return []
    translated = _translated(found[0])
    return [found[0], *([translated[0]] if translated else [])]


def _indexed(files: Sequence[str]) -> _Index:
    index: _Index = {}
    for file in files:
        if (found := _part_of(file)) is None:
            continue
        stem, part = found
        index.setdefault(stem, {}).setdefault("", {})[part] = file
        if (translated := _translated(stem)) is not None:
            name, locale = translated
            index.setdefault(name, {}).setdefault(locale, {})[part] = file
    return index


def read(folder: Path | None) -> FileSet:
    """Reads both folders. Whoever changes the files meanwhile is waited for. Raises InvalidConfigError if there is
    more than can be used.
    """
    built_in = _contents(BUILT_IN)
    own = _contents(folder) if folder else {}
    while folder and (again := _contents(folder)) != own:
        own = again
    everybodys = {stem for stem, _ in filter(None, map(_part_of, own))}
    contents = {file: content for file, content in built_in.items() if not _is_of_another_text(file, everybodys)} | own
    sources: dict[str, str] = {}
    unusable: dict[str, str] = {}
    for file, content in sorted(contents.items()):
        if len(content) > LARGEST_FILE:
            unusable[file] = f"is larger than {LARGEST_FILE >> 10} KiB"
            continue
        try:
            sources[file] = content.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            unusable[file] = "is not UTF-8"
    return FileSet(sources, unusable, _version(contents), _indexed(list(sources)))


def _is_of_another_text(file: str, everybodys: set[str]) -> bool:
    found = _part_of(file)
    translated = _translated(found[0]) if found else None
    return translated is not None and translated[0] in everybodys


def _version(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for file, content in sorted(contents.items()):
        digest.update(f"{len(file.encode())}:{file}{len(content)}:".encode() + content)
    return digest.hexdigest()[:_VERSION_LENGTH]


def _contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by path below it. Hidden files are not templates: a mounted ConfigMap has some."""
    contents: dict[str, bytes] = {}
    size = 0
    try:
        for path in _paths(folder):
            try:
                with path.open("rb") as opened:
                    # One more byte than may be used: it is too large then, however large.
                    content = opened.read(LARGEST_FILE + 1)
            except FileNotFoundError:
                # Taken away since it was listed; the next reading has all of what came instead.
                continue
            contents[path.relative_to(folder).as_posix()] = content
            size += len(content)
            if len(contents) > _MOST_FILES or size > _LARGEST_SET:
                raise InvalidConfigError(
                    f"{folder}: has more than {_MOST_FILES:,} files or {_LARGEST_SET >> 20} MiB of templates"
                )
    except OSError as error:
        raise InvalidConfigError(f"{error.filename}: {error.strerror}") from None
    return contents


def _paths(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and Path(place, file).is_file():
                yield Path(place, file)
