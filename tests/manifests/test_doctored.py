"""Each rule can fail: manifests with one thing wrong, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.manifests import kinds, network_rules, observability_rules, pod_rules, rollout_rules, wiring_rules
from tests.manifests.objects import ROOT, Objects, Rule, named, of_kind
from tests.manifests.test_overlays import RULES

_GONE: Any = object()


def valid(objects: Objects) -> Iterator[str]:
    """Validity as a rule."""
    for one in objects:
        yield from kinds.complaints(one)


@dataclass(frozen=True)
class Wrong:
    """One change: the value at a path of an object (dots between the keys, numbers for items), and the complaint."""

    rule: Rule
    complaint: str
    kind: str
    name: str
    path: str
    value: Any
    overlay: str = "kind"

    def __str__(self) -> str:
        return f"{self.rule.__name__}-{self.kind}-{self.name}-{self.path}-{self.overlay}"


def _change(objects: Objects, wrong: Wrong) -> None:
    place: Any = named(objects, wrong.kind, wrong.name)
    *way, last = wrong.path.split(".")
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key.replace("~", "."), {})
    if isinstance(place, list):
        # A number past the end adds an item.
        place[int(last) : int(last) + 1] = [] if wrong.value is _GONE else [wrong.value]
    elif wrong.value is _GONE:
        del place[last.replace("~", ".")]
    else:
        place[last.replace("~", ".")] = wrong.value


_POD = "spec.template.spec"
_FIRST = f"{_POD}.containers.0"
_USERS, _NOTIFICATIONS, _PAGES = "user-service", "notification-service", "notification-pages"
_LABELS = "spec.template.metadata.labels"
# Whether the keys of links may be missing.
_LINKS = f"{_POD}.volumes.0.secret.optional"


def _file(name: str, key: str, rule: Rule, complaint: str, old: str, new: str) -> Wrong:
    """One change in a file that is mounted."""
    text = (ROOT / "deploy" / "components" / "observability" / "infra" / "config" / f"{name}.yaml").read_text()
    assert text.count(old) == 1, old
    return Wrong(rule, complaint, "ConfigMap", name, f"data.{key}~yaml", text.replace(old, new))


TABLE = [
    Wrong(valid, "replica", "Deployment", _USERS, "spec.replica", 2),
    Wrong(valid, "is not of type 'integer'", "Deployment", _USERS, "spec.replicas", "2"),
    Wrong(valid, "has no schema", "Deployment", _USERS, "kind", "Deploiment"),
    Wrong(valid, "has no schema", "Deployment", _USERS, "apiVersion", "apps/v1beta1"),
    Wrong(valid, "instance", "Cluster", "postgres", "spec.instance", 3, "production"),
    Wrong(valid, "'instances' is a required property", "Cluster", "postgres", "spec.instances", _GONE, "production"),
    Wrong(valid, "is not one of", "Cluster", "postgres", "spec.postgresql.synchronous.method", "all", "production"),
    Wrong(valid, "ownr", "Database", "notifications", "spec.ownr", "x", "production"),
    Wrong(valid, "dnsName", "Certificate", _USERS, "spec.dnsName", ["x"], "production"),
    Wrong(pod_rules.restricted, "hostNetwork", "Deployment", _USERS, f"{_POD}.hostNetwork", True),
    Wrong(
        pod_rules.restricted, "of a kind that is not allowed", "Deployment", _USERS, f"{_POD}.volumes.0",
        {"name": "tmp", "hostPath": {"path": "/"}},
    ),
    Wrong(pod_rules.restricted, "not root", "Deployment", _USERS, f"{_POD}.securityContext.runAsUser", 0),
    Wrong(pod_rules.restricted, "not root", "Job", "migrations", f"{_POD}.securityContext.runAsNonRoot", _GONE),
    Wrong(pod_rules.restricted, "seccomp", "StatefulSet", "postgres", f"{_POD}.securityContext.seccompProfile", _GONE),
    Wrong(pod_rules.restricted, "gain privileges", "Deployment", _USERS, f"{_FIRST}.securityContext.privileged", True),
    Wrong(
        pod_rules.restricted, "gain privileges", "Deployment", _USERS,
        f"{_POD}.initContainers.0.securityContext.allowPrivilegeEscalation", _GONE,
    ),
    Wrong(
        pod_rules.restricted, "capabilities", "Deployment", _USERS, f"{_FIRST}.securityContext.capabilities.add", ["X"]
    ),
    Wrong(
        pod_rules.restricted, "root file system", "Job", "migrations",
        f"{_FIRST}.securityContext.readOnlyRootFilesystem", False,
    ),
    Wrong(pod_rules.restricted, "port of the node", "Deployment", _USERS, f"{_FIRST}.ports.0.hostPort", 50051),
    Wrong(
        pod_rules.enforced, "does not enforce", "Namespace", "tidings",
        "metadata.labels.pod-security~kubernetes~io/enforce", "baseline",
    ),
    Wrong(pod_rules.enforced, "not in the namespace", "Service", _USERS, "metadata.namespace", "default"),
    Wrong(
        pod_rules.no_tokens, "mounts its token", "ServiceAccount", _USERS, "automountServiceAccountToken", _GONE
    ),
    Wrong(pod_rules.no_tokens, "mounts a token", "Deployment", _USERS, f"{_POD}.automountServiceAccountToken", True),
    Wrong(pod_rules.no_tokens, "of its own", "Job", "migrations", f"{_POD}.serviceAccountName", "default"),
    Wrong(pod_rules.no_tokens, "variables of Services", "Deployment", _USERS, f"{_POD}.enableServiceLinks", _GONE),
    Wrong(
        pod_rules.no_tokens, "as volume token", "Deployment", _USERS, f"{_POD}.volumes.3",
        {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
    ),
    Wrong(pod_rules.resources, "does not ask", "Deployment", _USERS, f"{_FIRST}.resources.requests.cpu", _GONE),
    Wrong(pod_rules.resources, "not limited", "Deployment", _USERS, f"{_FIRST}.resources.limits.memory", "1Gi"),
    Wrong(pod_rules.resources, "has no end", "Deployment", _USERS, f"{_POD}.volumes.0.emptyDir", {}),
    Wrong(pod_rules.images, "no exact tag", "Deployment", _USERS, f"{_FIRST}.image", "tidings:latest"),
    Wrong(pod_rules.images, "no exact tag", "StatefulSet", "postgres", f"{_FIRST}.image", "localhost:5000/postgres"),
    Wrong(pod_rules.images, "several of our images", "Deployment", _USERS, f"{_FIRST}.image", "tidings:other"),
    Wrong(pod_rules.images, "pulls an image", "Job", "migrations", f"{_FIRST}.imagePullPolicy", "Always"),
    Wrong(pod_rules.images, "no exact tag", "Cluster", "postgres", "spec.imageName", "x/postgresql", "production"),
    Wrong(pod_rules.probes, "has no livenessProbe", "Deployment", "mail-catcher", f"{_FIRST}.livenessProbe", _GONE),
    Wrong(
        pod_rules.probes, "livenessProbe does not ask health for liveness", "Deployment", _USERS,
        f"{_FIRST}.livenessProbe.grpc.service", "readiness",
    ),
    Wrong(
        pod_rules.probes, "readinessProbe does not ask", "Deployment", _USERS, f"{_FIRST}.readinessProbe.grpc.port",
        50051,
    ),
    Wrong(
        pod_rules.probes, "given up before", "Deployment", _USERS, f"{_FIRST}.startupProbe.failureThreshold", 3
    ),
    Wrong(
        wiring_rules.variables, "TIDINGS_USERS_LISTN is no setting", "ConfigMap", _USERS, "data.TIDINGS_USERS_LISTN",
        "x",
    ),
    Wrong(
        wiring_rules.variables, "is no setting of user_service", "ConfigMap", _USERS,
        "data.TIDINGS_NOTIFICATIONS_GRACE", "1",
    ),
    Wrong(
        wiring_rules.variables, "TIDINGS_USERS_DATABASE_URL stands before USERS_OWNER_PASSWORD", "Job", "migrations",
        f"{_FIRST}.env.0", {"name": "TIDINGS_USERS_DATABASE_URL", "value": "postgresql://x:$(USERS_OWNER_PASSWORD)@/y"},
    ),
    Wrong(
        wiring_rules.no_passwords, "has a password in it", "ConfigMap", _USERS, "data.TIDINGS_USERS_DATABASE_URL",
        "postgresql://tidings_users:secret@/tidings_users",
    ),
    Wrong(
        wiring_rules.no_passwords, "PGPASSWORD has a password", "Deployment", _USERS, f"{_FIRST}.env.0",
        {"name": "PGPASSWORD", "value": "postgres"},
    ),
    Wrong(
        wiring_rules.references, "no Secret elsewhere", "Deployment", _USERS, f"{_POD}.volumes.1.secret.secretName",
        "elsewhere",
    ),
    Wrong(
        wiring_rules.references, "has no key pasword", "Deployment", _USERS,
        f"{_FIRST}.env.0.valueFrom.secretKeyRef.key", "pasword", "production",
    ),
    Wrong(
        wiring_rules.references, "no ConfigMap settings", "Deployment", _USERS,
        f"{_FIRST}.envFrom.0.configMapRef.name", "settings",
    ),
    Wrong(
        wiring_rules.mounts, "which is not mounted", "ConfigMap", _USERS, "data.TIDINGS_USERS_TLS_KEY_FILE",
        "/etc/tidings/tls/key.pem",
    ),
    Wrong(
        wiring_rules.mounts, "PGSSLROOTCERT names", "Deployment", _USERS, f"{_POD}.initContainers.0.volumeMounts", [],
        "production",
    ),
    Wrong(
        wiring_rules.mounts, "RULES_FILE names", "ConfigMap", _NOTIFICATIONS,
        "data.TIDINGS_NOTIFICATIONS_RULES_FILE", "/etc/tidings/files/rules.toml", "production",
    ),
    Wrong(
        wiring_rules.mounts, "TEMPLATES_DIR names", "ConfigMap", _NOTIFICATIONS,
        "data.TIDINGS_NOTIFICATIONS_TEMPLATES_DIR", "/etc/tidings/words", "production",
    ),
    Wrong(
        wiring_rules.link_keys, "starts without the keys", "Deployment", _NOTIFICATIONS, _LINKS, True, "production",
    ),
    Wrong(
        wiring_rules.link_keys, "do not have", "ConfigMap", _NOTIFICATIONS, "data.TIDINGS_NOTIFICATIONS_PUBLIC_URL", "",
    ),
    Wrong(wiring_rules.mounts, "there is no volume", "Deployment", _USERS, f"{_FIRST}.volumeMounts.1.name", "nothing"),
    Wrong(wiring_rules.mounts, "to read only", "Deployment", _USERS, f"{_FIRST}.volumeMounts.1.readOnly", False),
    Wrong(wiring_rules.mounts, "to read only", "Deployment", _USERS, f"{_POD}.volumes.1.secret.defaultMode", 0o444),
    Wrong(
        wiring_rules.services, "selects 0 workloads", "Service", _USERS, "spec.selector", {"app": "user-service"}
    ),
    Wrong(wiring_rules.services, "has no port http", "Service", _USERS, "spec.ports.0.targetPort", "http"),
    Wrong(wiring_rules.services, "of this number", "Service", _USERS, "spec.ports.0.port", 443),
    Wrong(wiring_rules.services, "is not headless", "Service", _USERS, "spec.clusterIP", _GONE),
    Wrong(
        wiring_rules.services, "is not headless", "Service", _NOTIFICATIONS, "spec.clusterIP", _GONE
    ),
    Wrong(
        wiring_rules.ingresses, "has no certificate", "Ingress", _PAGES, "spec.tls.0.hosts.0", "a.example", "production"
    ),
    Wrong(
        wiring_rules.ingresses, "no link leads to", "Ingress", _PAGES, "spec.rules.0.http.paths.0.path", "/",
        "production",
    ),
    Wrong(
        wiring_rules.ingresses, "no link leads to", "ConfigMap", _NOTIFICATIONS,
        "data.TIDINGS_NOTIFICATIONS_PUBLIC_URL", "https://other.example.com", "production",
    ),
    Wrong(
        wiring_rules.ingresses, "no such port", "Ingress", _PAGES,
        "spec.rules.0.http.paths.0.backend.service.name", _NOTIFICATIONS, "production",
    ),
    Wrong(
        network_rules.pages_are_reached, "are reached by", "NetworkPolicy", _PAGES, "spec.ingress.0.from.0",
        {"ipBlock": {"cidr": "0.0.0.0/0"}},
    ),
    Wrong(wiring_rules.ports, "are not its ports", "ConfigMap", _USERS, "data.TIDINGS_USERS_LISTEN", "[::]:50055"),
    Wrong(wiring_rules.ports, "are not its ports", "Deployment", _USERS, f"{_FIRST}.ports.1.containerPort", 8081),
    Wrong(rollout_rules.schema_first, "is not named after", "Job", "migrations", "metadata.name", "migrations"),
    Wrong(
        rollout_rules.schema_first, "does not migrate all", "Job", "migrations", f"{_FIRST}.args.2", "users",
    ),
    Wrong(
        rollout_rules.schema_first, "does not wait", "Deployment", _USERS, f"{_POD}.initContainers.0.args.2",
        "notifications",
    ),
    Wrong(
        rollout_rules.schema_first, "does not wait", "Deployment", _NOTIFICATIONS, f"{_POD}.initContainers.0.image",
        "tidings:other",
    ),
    Wrong(rollout_rules.schema_first, "there are 0 Jobs", "Job", "migrations", "kind", "Pod"),
    Wrong(
        rollout_rules.one_after_the_other, "before another is ready", "Deployment", _USERS,
        "spec.strategy.rollingUpdate.maxUnavailable", 1,
    ),
    Wrong(
        rollout_rules.one_after_the_other, "before another is ready", "Deployment", _USERS, "spec.strategy",
        {"type": "Recreate"},
    ),
    Wrong(
        rollout_rules.time_to_end, "does not get more", "Deployment", _USERS, f"{_POD}.terminationGracePeriodSeconds",
        30,
    ),
    Wrong(rollout_rules.time_to_end, "does not get more", "ConfigMap", _USERS, "data.TIDINGS_USERS_DRAIN_TIME", "30"),
    Wrong(
        rollout_rules.time_to_end, "is not asked to wait", "Deployment", _NOTIFICATIONS, f"{_FIRST}.lifecycle", _GONE
    ),
    Wrong(
        rollout_rules.high_availability, "from 2 on", "HorizontalPodAutoscaler", _NOTIFICATIONS, "spec.minReplicas", 1,
        "production",
    ),
    Wrong(
        rollout_rules.high_availability, "takes the autoscaler's number", "Deployment", _USERS, "spec.replicas", 3,
        "production",
    ),
    Wrong(
        rollout_rules.high_availability, "no disruption budget", "PodDisruptionBudget", _USERS,
        "spec.selector.matchLabels", {"app": "x"}, "production",
    ),
    Wrong(
        rollout_rules.high_availability, "not spread by kubernetes.io/hostname", "Deployment", _USERS,
        f"{_POD}.topologySpreadConstraints.0.labelSelector.matchLabels", {"app": "x"}, "production",
    ),
    Wrong(
        rollout_rules.high_availability, "may lose", "Cluster", "postgres", "spec.postgresql.synchronous", {},
        "production",
    ),
    Wrong(
        rollout_rules.high_availability, "may acknowledge", "Cluster", "postgres",
        "spec.postgresql.synchronous.dataDurability", "preferred", "production",
    ),
    Wrong(
        rollout_rules.high_availability, "of development", "PodDisruptionBudget", _USERS, "kind", "Secret",
        "production",
    ),
    Wrong(
        network_rules.only_what_talks, "user-service can reach notification-service at 50052",
        "NetworkPolicy",
        "notification-service", "spec.ingress.0.from.2", {"podSelector": {}},
    ),
    Wrong(
        network_rules.only_what_talks, "notification-service cannot reach user-service at 50051", "Deployment",
        _NOTIFICATIONS, f"{_LABELS}.calls-user-service", "no",
    ),
    Wrong(
        network_rules.only_what_talks, "Job/migrations-development cannot reach postgres at 5432",
        "NetworkPolicy", "to-postgres",
        "spec.podSelector", {"matchLabels": {"app.kubernetes.io/name": "user-service"}},
    ),
    Wrong(
        network_rules.only_what_talks, "user-service cannot reach postgres at 5432", "NetworkPolicy", "postgres",
        "spec.ingress.0.ports.0.port", 5433,
    ),
    Wrong(
        network_rules.only_what_talks, "at 8080", "NetworkPolicy", "user-service", "spec.ingress.0.ports", _GONE
    ),
    Wrong(network_rules.closed, "Job/migrations-development: is open for ingress", "NetworkPolicy", "default-deny",
        "spec.policyTypes", ["Egress"]),
    Wrong(network_rules.closed, "newcomer: is open for", "NetworkPolicy", "default-deny", "spec.podSelector",
        {"matchLabels": {"app.kubernetes.io/part-of": "tidings"}}),
    Wrong(
        network_rules.only_what_talks, "talks to postgress, which is nowhere", "ConfigMap", _USERS, "data.PGHOST",
        "postgress",
    ),
    Wrong(
        network_rules.only_what_talks, "postgres cannot reach postgres at 5432", "NetworkPolicy", "postgres-cluster",
        "spec.egress", [], "production",
    ),
    Wrong(network_rules.names_are_resolved, "cannot ask", "NetworkPolicy", "names", "spec.egress.0.ports.0.port", 5353),
    Wrong(
        network_rules.no_inside_from_the_internet_rule, "reaches inside", "NetworkPolicy", "to-the-internet",
        "spec.egress.0.to.0.ipBlock.except", [], "production",
    ),
    _file(
        "otel-collector", "config", observability_rules.pipelines, "otlp_grpc/jaeger of exporters is not configured",
        "  otlp_grpc/jaeger:", "  otlp_grpc/jager:",
    ),
    _file(
        "otel-collector", "config", observability_rules.pipelines, "otlp_grpc/jaeger of exporters is not used",
        "exporters: [otlp_grpc/jaeger]", "exporters: [prometheus]",
    ),
    _file(
        "otel-collector", "config", observability_rules.pipelines, "transform of processors is not built in",
        "  batch:\n", "  transform: {}\n  batch:\n",
    ),
    _file(
        "otel-collector", "config", observability_rules.pipelines, "traces does not limit memory first",
        "[memory_limiter, batch]", "[batch, memory_limiter]",
    ),
    _file(
        "otel-collector", "config", observability_rules.pipelines, "the pipeline traces has no exporters",
        "exporters: [otlp_grpc/jaeger]", "exporters: []",
    ),
    _file("jaeger", "config", observability_rules.memory_fits, "more memory than fits", "mib: 300", "mib: 384"),
    _file("jaeger", "config", observability_rules.opened, "are not its ports", "0.0.0.0:16686", "localhost:16686"),
    _file(
        "otel-collector", "config", observability_rules.peers_are_there, "no Service jager with the port 4317",
        "jaeger:4317", "jager:4317",
    ),
    _file(
        "prometheus", "prometheus", observability_rules.peers_are_there,
        "no Service user-service-metrics with the port 9646",
        "[user-service-metrics]\n        type: A\n        port: 9464",
        "[user-service-metrics]\n        type: A\n        port: 9646",
    ),
    _file(
        "prometheus", "prometheus", observability_rules.metrics_are_scraped, "its port pushed is not scraped",
        "otel-collector:8889", "otel-collector:8888",
    ),
    Wrong(
        observability_rules.metrics_are_scraped, "hides pods that are not ready", "Service", "user-service-metrics",
        "spec.publishNotReadyAddresses", False,
    ),
    _file(
        "prometheus", "prometheus", network_rules.only_what_talks,
        "prometheus can reach notification-service at 9464",
        "[notification-service-metrics]\n        type: A\n        port: 9464",
        "[notification-service-metrics]\n        type: A\n        port: 8080",
    ),
    Wrong(
        network_rules.only_what_talks, "user-service cannot reach otel-collector at 4317", "NetworkPolicy",
        "to-otel-collector", "spec.egress.0.ports.0.port", 4318,
    ),
]  # fmt: skip


@pytest.mark.parametrize("wrong", TABLE, ids=str)
def test_what_is_wrong_is_said(overlays: dict[str, Objects], wrong: Wrong) -> None:
    objects = overlays[wrong.overlay]
    if wrong.rule is valid:
        objects = [named(objects, wrong.kind, wrong.name)]
    _change(objects, wrong)
    complaints = list(wrong.rule(objects))
    assert any(wrong.complaint in complaint for complaint in complaints), complaints


def test_no_rule_is_left_out() -> None:
    assert {wrong.rule for wrong in TABLE} == {*RULES, rollout_rules.high_availability, valid}


# What these let through has nobody at its other end in production itself.
_FOR_OTHERS = {"kind": set[str](), "production": {"to-the-internet", "metrics", "to-otel-collector"}}


def test_a_policy_that_is_missing_is_missed(overlays: dict[str, Objects]) -> None:
    for overlay in ("kind", "production"):
        objects = overlays[overlay]
        for policy in list(of_kind(objects, "NetworkPolicy")):
            others = [one for one in objects if one is not policy]
            if policy["metadata"]["name"] not in _FOR_OTHERS[overlay]:
                complaints = [complaint for rule in network_rules.RULES for complaint in rule(others)]
                assert complaints, policy["metadata"]["name"]
