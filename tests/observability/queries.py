"""What is asked of Prometheus: the queries of every panel and of every rule, and the names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "deploy" / "components" / "observability" / "infra"
CONFIG = INFRA / "config"
OPERATIONS = ROOT / "docs" / "operations.md"

_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_WORDS = {"and", "or", "unless", "bool", "offset"}
_SELECTOR = re.compile(r"(?<![\w:])([a-zA-Z_:][\w:]*)\b(?!\s*\()(\s*\{[^}]*\})?")


@dataclass(frozen=True, slots=True)
class Query:
    """A query, and where it stands. `labels` are those that its legend names."""

    where: str
    text: str
    labels: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def dashboards() -> dict[str, dict[str, Any]]:
    """By file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((INFRA / "dashboards").glob("*.json"))}


def rules() -> list[dict[str, Any]]:
    """Alerts and recorded series."""
    groups = yaml.safe_load((CONFIG / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """By name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def of_panels() -> Iterator[Query]:
    """Of each target of each panel that asks Prometheus."""
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                if target["datasource"]["type"] != "prometheus":
                    continue
                labels = re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", ""))
                yield Query(f"{name}, {panel['title']}", target["expr"], frozenset(labels))


def of_rules() -> Iterator[Query]:
    """Of each rule."""
    for rule in rules():
        yield Query(rule.get("alert") or rule["record"], rule["expr"])


def of_runbooks() -> Iterator[Query]:
    """Of each section of an alert."""
    for name, text in sections().items():
        yield from (Query(name, query) for query in re.findall(r"(?m)^ask '([^']+)'$", text))


def statements() -> list[str]:
    """The SQL in these sections."""
    return [sql for text in sections().values() for sql in re.findall(r'(?m)^sql -c "([^"]+)"$', text)]


def sections() -> dict[str, str]:
    """The text of each section of an alert, by its name."""
    found = re.findall(r"(?ms)^### (Tidings\w+)\n(.*?)(?=^#|\Z)", OPERATIONS.read_text())
    assert len(found) == len(dict(found))
    return dict(found)


def selectors(text: str) -> set[str]:
    """The series that a query takes: names, with the labels that they must have."""
    # Strings may have any sign in them; they are put back in the end.
    strings: list[str] = []

    def aside(match: re.Match[str]) -> str:
        strings.append(match[0])
        return f'"{len(strings) - 1}"'

    text = re.sub(r'"[^"]*"', aside, text)
    text = _GROUPING.sub(" ", re.sub(r"\[[^\]]*\]", " ", text))
    return {
        re.sub(r'"(\d+)"', lambda match: strings[int(match[1])], f"{name}{' '.join(labels.split())}")
        for name, labels in _SELECTOR.findall(text)
        if name not in _WORDS
    }


def names(text: str) -> set[str]:
    """The names of the series in a query."""
    return {selector.partition("{")[0] for selector in selectors(text)}
