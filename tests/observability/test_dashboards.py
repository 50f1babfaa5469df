"""Dashboards as files: Grafana can place them, and they ask for nothing that nobody exposes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import yaml

from tests.observability.names import exposed, known
from tests.observability.queries import CONFIG, INFRA, dashboards, names, of_panels, of_rules, rules
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2


def test_they_are_readable_and_deployed() -> None:
    kustomization = yaml.safe_load((INFRA / "kustomization.yaml").read_text())
    [generated] = [one for one in kustomization["configMapGenerator"] if one["name"] == "grafana-dashboards"]
    assert {file.rpartition("/")[2] for file in generated["files"]} == set(dashboards())
    for name, dashboard in dashboards().items():
        text = (INFRA / "dashboards" / name).read_text()
        assert text == json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"
    uids = Counter(dashboard["uid"] for dashboard in dashboards().values())
    titles = Counter(dashboard["title"] for dashboard in dashboards().values())
    assert set(uids.values()) == set(titles.values()) == {1}


def _cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    assert place["x"] + place["w"] <= 24
    return set(
        itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
    )


def test_panels_have_ids_and_places_of_their_own() -> None:
    for name, dashboard in dashboards().items():
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels), name
        cells = [cell for panel in panels for cell in _cells(panel)]
        assert len(set(cells)) == len(cells), name


def test_every_panel_asks_a_datasource_that_is_provisioned() -> None:
    provisioned = yaml.safe_load((CONFIG / "grafana-datasources.yaml").read_text())["datasources"]
    there = {(one["type"], one["uid"]) for one in provisioned}
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            if panel["type"] == "row":
                continue
            assert panel["targets"], (name, panel["title"])
            for one in (panel, *panel["targets"]):
                assert (one["datasource"]["type"], one["datasource"]["uid"]) in there, (name, panel["title"])
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs), (name, panel["title"])


def test_traces_are_looked_for_under_names_that_there_are() -> None:
    methods = {
        f"{service.full_name}/{method.name}"
        for file in (users_pb2, notifications_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    asked = [
        (target["service"], target["operation"])
        for dashboard in dashboards().values()
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        if target["datasource"]["type"] == "jaeger"
    ]
    assert asked
    for service, operation in asked:
        assert service in {"tidings-users", "tidings-notifications"}
        assert operation in methods


def test_every_name_is_known_and_whatever_is_measured_is_shown() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    unknown = {str(query): names(query.text) - known() - recorded for query in of_panels()}
    assert {query: unheard for query, unheard in unknown.items() if unheard} == {}
    asked = {name for query in (*of_panels(), *of_rules()) for name in names(query.text)}
    assert set(map(_measure, exposed())) - set(map(_measure, asked)) == set()


def _measure(name: str) -> str:
    """What a part of a histogram is of."""
    return name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
