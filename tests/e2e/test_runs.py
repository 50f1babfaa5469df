"""How a run is judged, and how the kubectl driver reads a cluster; these tests need neither cluster nor Docker."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import steps
from tests.e2e.driver import FailedError, Object, UntriedError, wait
from tests.e2e.kubectl import KubectlDriver
from tests.e2e.loading import command
from tests.e2e.objects import arranged, job_name
from tests.e2e.overlay import Overlay
from tests.e2e.steps import Site

_FAKE = """#!{python}
import json, pathlib, sys
answers = json.loads(pathlib.Path(__file__).with_name("answers.json").read_text())
asked = " ".join(sys.argv[3:])
if asked not in answers:
    sys.exit("nothing is known of: " + asked)
print(json.dumps(answers[asked]))
"""

Answers = Callable[[dict[str, Any]], KubectlDriver]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """A driver whose kubectl knows these answers, by their arguments behind the namespace."""
    (fake := tmp_path / "kubectl").write_text(_FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    monkeypatch.setattr("tests.e2e.kubectl.sys.executable", str(tmp_path / "python"))

    def driver(answers: dict[str, Any]) -> KubectlDriver:
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        return KubectlDriver("e2e")

    return driver


def _deployment(**status: int) -> dict[str, Any]:
    spec = {"replicas": 2, "selector": {"matchLabels": {"app.kubernetes.io/name": "user-service"}}}
    return {"metadata": {"generation": 3}, "spec": spec, "status": status}


def _pods(*ready: bool) -> dict[str, Any]:
    conditions = [[{"type": "Ready", "status": str(one)}] for one in ready]
    return {
        "items": [
            {"metadata": {"name": f"pod-{number}"}, "status": {"conditions": both}}
            for number, both in enumerate(conditions)
        ]
    }


_LISTED = "get pods -l app.kubernetes.io/name=user-service -o json"


@pytest.mark.parametrize(
    ("status", "pods", "there"),
    [
        ({"observedGeneration": 3, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2}, (True, True), True),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2}, (True, True), False),
        ({"observedGeneration": 3, "replicas": 3, "updatedReplicas": 2, "readyReplicas": 2}, (True,) * 3, False),
        ({"observedGeneration": 3, "replicas": 2, "updatedReplicas": 2}, (False, False), False),
        # One of before is not a replica any more, but has not ended.
        ({"observedGeneration": 3, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2}, (True,) * 3, False),
    ],
)
async def test_a_rollout_is_over_when_all_is_as_wanted(
    cluster: Answers, status: dict[str, int], pods: tuple[bool, ...], there: bool
) -> None:
    answers = {"get deployment user-service -o json": _deployment(**status), _LISTED: _pods(*pods)}
    assert (await cluster(answers).rolled_out("Deployment", "user-service") is None) == there


async def test_only_ready_pods_that_stay_are_ready(cluster: Answers) -> None:
    listed = _pods(True, False, True)
    listed["items"][2]["metadata"]["deletionTimestamp"] = "2030-01-01T00:00:00Z"
    assert await cluster({_LISTED: listed}).ready("user-service") == ["pod-0"]


@pytest.mark.parametrize(("condition", "outcome"), [("Complete", True), ("Failed", False), ("Suspended", None)])
async def test_the_end_of_a_job(cluster: Answers, condition: str, outcome: bool | None) -> None:
    status = {"conditions": [{"type": condition, "status": "True"}]}
    assert await cluster({"get job migrations -o json": {"status": status}}).job("migrations") is outcome


@pytest.mark.parametrize(
    ("state", "code"), [({"terminated": {"exitCode": 7}}, 7), ({"running": {}}, None), ({"waiting": {}}, None)]
)
async def test_the_end_of_a_pod(cluster: Answers, state: Object, code: int | None) -> None:
    answers = {"get pod client -o json": {"status": {"containerStatuses": [{"state": state}]}}}
    assert await cluster(answers).exit_code("client") == code


async def test_what_kubectl_refuses_is_a_failure(cluster: Answers) -> None:
    with pytest.raises(FailedError, match="nothing is known of: scale"):
        await cluster({}).scale("user-service", 3)


async def test_without_a_cluster_nothing_is_tried(cluster: Answers) -> None:
    with pytest.raises(UntriedError, match="no cluster answers"):
        await cluster({}).open([])


async def test_a_wait_ends_and_says_why(cluster: Answers) -> None:
    said: list[str] = []
    reasons = iter(("first", "first", "second"))

    async def never() -> str | None:
        return next(reasons, "third")

    with pytest.raises(FailedError, match="the thing: not within 2 s: third"):
        await wait("the thing", never, 2, said.append, cluster({}))
    assert [line.rpartition(": ")[2] for line in said] == ["first", "second", "third"]


def _site(said: list[str]) -> Site:
    # The steps are the test's own and use nothing of it.
    return Site(None, "tidings:1", "0001", lambda image: [], None, said.append)


async def test_every_step_has_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    async def passes(site: Site) -> None: ...

    async def fails(site: Site) -> None:
        raise FailedError("it does not work")

    async def breaks(site: Site) -> None:
        raise ValueError("a fault of the test's own")

    async def cannot(site: Site) -> None:
        raise UntriedError("not here")

    table = {"deploy": passes, "one": fails, "two": breaks, "three": cannot, "four": passes, "five": passes}
    monkeypatch.setattr(steps, "STEPS", table)
    outcomes = await steps.run(_site([]), ("one", "two", "three", "four"))
    assert {name: outcome for name, (outcome, _) in outcomes.items()} == {
        "deploy": "passed", "one": "failed", "two": "failed", "three": "untried", "four": "passed", "five": "untried",
    }  # fmt: skip
    assert outcomes["three"][1] == "not here"
    monkeypatch.setattr(steps, "STEPS", {"deploy": fails, "one": passes})
    assert await steps.run(_site([])) == {
        "deploy": ("failed", "it does not work"),
        "one": ("untried", "deploy failed"),
    }


@pytest.mark.parametrize("context", ["production", "arn:aws:eks:1"])
def test_images_are_loaded_into_local_clusters_alone(context: str) -> None:
    with pytest.raises(UntriedError):
        command(context, "tidings:1")


def test_an_overlay_is_rendered_as_for_a_release(tmp_path: Path) -> None:
    rendered = Overlay(tmp_path, "kind", "elsewhere").render("registry.example/tidings:1.2")
    assert {one["metadata"].get("namespace", "elsewhere") for one in rendered} == {"elsewhere"}
    assert [one["metadata"]["name"] for one in rendered if one["kind"] == "Namespace"] == ["elsewhere"]
    assert job_name(rendered).endswith("1.2")
    assert json.dumps(rendered).count('"registry.example/tidings:1.2"') == 7


def test_the_steps_are_tried_without_what_watches(tmp_path: Path) -> None:
    made = arranged(Overlay(tmp_path, "kind", "elsewhere").render("tidings:1"), "tidings:1")
    workloads = {one["metadata"]["name"] for one in made if one["kind"] in {"Deployment", "StatefulSet", "Job"}}
    assert workloads == {
        "console",
        "mail-catcher",
        "migrations-1",
        "notification-service",
        "postgres",
        "user-service",
    }
    # Whoever sends traces sends them to the receiver of the steps.
    assert "otel-collector:" not in json.dumps([one for one in made if one["kind"] != "ConfigMap"])
    assert {
        one["data"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
        for one in made
        if "OTEL_EXPORTER_OTLP_ENDPOINT" in one.get("data", {})
    } == {"http://trace-receiver:4317"}
