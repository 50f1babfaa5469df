"""Every overlay is valid and keeps every rule; its pods run what the image has."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from servicekit.addresses import is_loopback
from tests.harness import programs
from tests.harness.process import clean_environment
from tests.manifests import kinds, network_rules, observability_rules, pod_rules, rollout_rules, wiring_rules
from tests.manifests.objects import DEVELOPMENT, OVERLAYS, Objects, Rule, environment, of_kind, pods, render
from tests.manifests.wiring_rules import ours

RULES = (
    *pod_rules.RULES,
    *wiring_rules.RULES,
    *rollout_rules.RULES,
    *network_rules.RULES,
    *observability_rules.RULES,
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlays: dict[str, Objects], overlay: str) -> None:
    objects = overlays[overlay]
    assert [complaint for one in objects for complaint in kinds.complaints(one)] == []
    twice = Counter((one["kind"], one["metadata"]["name"]) for one in objects)
    assert set(twice.values()) == {1}


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_is_kept(overlays: dict[str, Objects], overlay: str, rule: Rule) -> None:
    assert list(rule(overlays[overlay])) == []


def test_production_survives_what_takes_one_of_each(overlays: dict[str, Objects]) -> None:
    assert list(rollout_rules.high_availability(overlays["production"])) == []


def test_production_has_no_secret_and_nothing_of_development(overlays: dict[str, Objects]) -> None:
    objects = overlays["production"]
    assert list(of_kind(objects, "Secret", "StatefulSet")) == []
    assert {pod.name for pod in pods(objects) if pod.kind == "Deployment"} == {"user-service", "notification-service"}
    # What it does not make is what its documents list.
    used = {name for pod in pods(objects) for _, kind, name, _ in wiring_rules._references(pod) if kind == "Secret"}
    used |= set(re.findall(r"'(?:passwordSecret|secret)': {'name': '([\w-]+)'}", str(objects)))
    assert used == set(wiring_rules.EXTERNAL)


@pytest.mark.parametrize("overlay", DEVELOPMENT)
def test_what_production_is_given_development_makes_under_the_same_names(
    overlays: dict[str, Objects], overlay: str
) -> None:
    made = {one["metadata"]["name"]: set(one["data"]) for one in of_kind(overlays[overlay], "Secret")}
    of_others = {"notification-service-smtp", "postgres-ca"}
    assert {name: keys for name, keys in wiring_rules.EXTERNAL.items() if name not in of_others}.items() <= made.items()


@pytest.mark.parametrize("overlay", DEVELOPMENT)
def test_the_console_is_reached_by_a_forwarded_port_alone(overlays: dict[str, Objects], overlay: str) -> None:
    [pod] = [pod for pod in pods(overlays[overlay]) if pod.name == "console"]
    [container] = pod.spec["containers"]
    assert is_loopback(environment(container, overlays[overlay])["TIDINGS_CONSOLE_LISTEN"])


def test_the_smoke_test_is_a_pod_like_the_others(overlays: dict[str, Objects], deploy_folder: Path) -> None:
    job = render(deploy_folder / "smoke-test")
    assert [complaint for one in job for complaint in kinds.complaints(one)] == []
    objects = [*overlays["kind"], *job]
    assert [complaint for rule in (*pod_rules.RULES, *wiring_rules.RULES) for complaint in rule(objects)] == []
    [pod] = pods(job)
    # By what the policies see of it, its calls are let through.
    assert pod.labels == network_rules.SMOKE_TEST.labels


async def test_every_argument_is_of_the_image(overlays: dict[str, Objects]) -> None:
    found: set[tuple[str, ...]] = {("tidings.cli", "smoke-test")}
    for objects in overlays.values():
        for pod in pods(objects):
            for one in ours(pod):
                assert "command" not in one
                # What is run again is run below as it is.
                arguments = tuple(one["args"])
                found.add(arguments[2:] if arguments[:2] == ("devstack", "reload") else arguments)
    assert {arguments[0] for arguments in found} == {
        "console", "devstack", "migrations", "notification_service", "tidings.cli", "user_service",
    }  # fmt: skip

    async def helps(*arguments: str) -> int:
        process = await programs.start(*arguments, "--help", environment=clean_environment())
        await process.communicate()
        assert process.returncode is not None
        return process.returncode

    assert {arguments: await helps(*arguments) for arguments in sorted(found)} == dict.fromkeys(sorted(found), 0)
    # An argument that is none is refused, help or not.
    assert await helps("user_service", "server") == 2
    assert await helps("migrations", "wait", "everything") == 2
