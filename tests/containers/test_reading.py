"""How manifests are read and names answered; these tests need no engine."""

from __future__ import annotations

import dns.message
import dns.rcode
import pytest

from tests.containers import names
from tests.containers.manifests import ManifestError, Objects, check, environment, size

_OBJECTS = Objects.of(
    [
        {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"A": "from the map", "B": "overridden"}},
        {"kind": "Secret", "metadata": {"name": "password"}, "data": {"password": "aHVudGVyMg=="}},
    ]
)


def test_variables_are_those_that_a_kubelet_makes() -> None:
    container = {
        "envFrom": [{"configMapRef": {"name": "settings"}}],
        "env": [
            {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "password", "key": "password"}}},
            {"name": "B", "value": "postgresql://me:$(PASSWORD)@host/$(LATER)"},
            {"name": "LATER", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
    }
    assert environment(container, _OBJECTS, {"metadata.name": "pod-1"}) == {
        "A": "from the map",
        "PASSWORD": "hunter2",
        "B": "postgresql://me:hunter2@host/$(LATER)",
        "LATER": "pod-1",
    }


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "password", "key": "username"}}},
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "token", "key": "token"}}},
    ],
)
def test_a_reference_to_nothing_is_an_error(entry: dict[str, object]) -> None:
    with pytest.raises(ManifestError):
        environment({"env": [entry]}, _OBJECTS, {})


@pytest.mark.parametrize(
    "change", [{"hostNetwork": True}, {"containers": [{"tty": True}]}, {"containers": [{"name": "a"}, {"name": "b"}]}]
)
def test_what_would_not_be_carried_out_is_an_error(change: dict[str, object]) -> None:
    check({"containers": [{"name": "a", "ports": []}]})
    with pytest.raises(ManifestError, match="not carried out here"):
        check({"containers": [{"name": "a"}], **change})


def test_sizes() -> None:
    assert [size(text) for text in ("12", "64Mi", "2Gi", "3k")] == [12, 64 << 20, 2 << 30, 3000]
    with pytest.raises(ManifestError):
        size("1.5Gi")


@pytest.mark.parametrize(
    ("name", "kind", "code", "found"),
    [
        ("user-service.", "A", dns.rcode.NOERROR, {"10.0.0.1", "10.0.0.2"}),
        ("USER-service.", "A", dns.rcode.NOERROR, {"10.0.0.1", "10.0.0.2"}),
        ("user-service.", "AAAA", dns.rcode.NOERROR, set()),
        ("nobody-is-ready.", "A", dns.rcode.NOERROR, set()),
        ("elsewhere.", "A", dns.rcode.NXDOMAIN, set()),
    ],
)
def test_a_name_is_its_ready_addresses(name: str, kind: str, code: dns.rcode.Rcode, found: set[str]) -> None:
    table: dict[str, list[str]] = {"user-service": ["10.0.0.1", "10.0.0.2"], "nobody-is-ready": []}
    response = names.answer(dns.message.make_query(name, kind), table.get)
    assert response.rcode() == code
    assert {str(record) for rrset in response.answer for record in rrset} == found
