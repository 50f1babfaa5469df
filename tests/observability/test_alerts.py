"""Alerts: the files are Prometheus', each alert fires and is silent in a test of its own, and has its section."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from tests.observability.names import known
from tests.observability.programs import program
from tests.observability.queries import CONFIG, ROOT, alerts, names, of_rules, of_runbooks, rules, sections
from tidings.cli.app import app

TESTS = Path(__file__).parent / "alerts"
# What a section is of, in this order.
_PARTS = ("It means", "See it", "Do")


def _promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=TESTS, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_files() -> None:
    assert "valid prometheus config" in _promtool("check", "config", CONFIG / "prometheus.yaml")
    assert f"{len(rules())} rules found" in _promtool("check", "rules", "--lint-fatal", CONFIG / "alerts.yaml")


@pytest.mark.parametrize("file", sorted(path.name for path in TESTS.glob("*.yaml")))
def test_alerts_fire_when_they_should_and_only_then(file: str) -> None:
    _promtool("test", "rules", file)


def test_an_alert_that_would_not_fire_is_noticed(tmp_path: Path) -> None:
    text = (CONFIG / "alerts.yaml").read_text()
    (tmp_path / "alerts.yaml").write_text(text.replace("expr: pg_up == 0", "expr: pg_up == 2"))
    tests = yaml.safe_load((TESTS / "postgres.yaml").read_text())
    tests["rule_files"] = ["alerts.yaml"]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    with pytest.raises(AssertionError, match="TidingsPostgresDown"):
        _promtool("test", "rules", tmp_path / "tests.yaml")


def test_each_alert_is_seen_firing_and_seen_silent() -> None:
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for path in TESTS.glob("*.yaml"):
        for case in yaml.safe_load(path.read_text())["tests"]:
            for asked in case["alert_rule_test"]:
                seen[bool(asked["exp_alerts"])].add(asked["alertname"])
    assert seen == {True: set(alerts()), False: set(alerts())}


def test_each_alert_says_what_whoever_is_called_needs() -> None:
    for name, alert in alerts().items():
        assert alert["labels"]["severity"] in {"page", "ticket"}, name
        assert {"summary", "description", "runbook_url"} == set(alert["annotations"]), name
        assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_rules_and_runbooks_name_what_there_is() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    unknown = {str(query): names(query.text) - known() - recorded for query in (*of_rules(), *of_runbooks())}
    assert {query: unheard for query, unheard in unknown.items() if unheard} == {}


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    assert set(sections()) == set(alerts())
    for name, text in sections().items():
        places = [text.find(f"**{part}**") for part in _PARTS]
        assert -1 not in places, (name, places)
        assert places == sorted(places), name


def _commands() -> dict[str, list[str]]:
    return {name: re.findall(r"(?ms)^```sh\n(.*?)^```", text) for name, text in sections().items()}


def test_each_section_has_a_command() -> None:
    assert [name for name, blocks in _commands().items() if not blocks] == []


def _lines() -> Iterator[tuple[str, str]]:
    for name, blocks in _commands().items():
        for line in "".join(blocks).splitlines():
            yield name, line.split(" #")[0]


def test_commands_name_what_is_deployed() -> None:
    deployed = {
        one["metadata"]["name"]
        for path in (ROOT / "deploy").rglob("*.yaml")
        if "config" not in path.parts
        for one in yaml.safe_load_all(path.read_text())
        if isinstance(one, dict) and "metadata" in one
    }
    for name, line in _lines():
        for named in re.findall(r"\b(?:deploy|deployment|statefulset|service|job)/([\w-]+)", line):
            assert named in deployed, (name, line)


def test_commands_are_those_of_the_command_line() -> None:
    tried = set()
    for name, line in _lines():
        for words in re.findall(r"(?:^|[ /])tidings ((?:[a-z-]+ ?)+)", line.replace("-n tidings", "")):
            command: Any = typer.main.get_command(app)
            for word in words.split():
                if not hasattr(command, "commands"):
                    break
                assert word in command.commands, (name, line)
                command = command.commands[word]
            assert not hasattr(command, "commands"), (name, line)
            tried.add(words)
    assert tried
