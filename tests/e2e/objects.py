"""What a run deploys besides the overlay: pods of clients, a program that writes and watches, and a receiver of traces.

They run in the image under test, as restricted as the services.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.e2e.driver import Object

PROGRAMS = Path(__file__).parent / "programs"
TRACES = "trace-receiver"
_OTLP_PORT = 4317
_PART_OF = {"app.kubernetes.io/part-of": "tidings"}
_COMPONENT = "app.kubernetes.io/component"
_CLIENT = "/etc/tidings/client"


def pod(name: str, image: str, args: Sequence[str], *, program: str = "") -> Object:
    """A pod that calls both services as the smoke test does, once. With `program` it runs that file and no module."""
    environment = {
        "TIDINGS_CLIENT_USERS_ADDRESS": "dns:///user-service:50051",
        "TIDINGS_CLIENT_NOTIFICATIONS_ADDRESS": "dns:///notification-service:50052",
        "TIDINGS_CLIENT_TOKEN_FILE": f"{_CLIENT}/token",
        "TIDINGS_CLIENT_CA_FILE": f"{_CLIENT}/ca.crt",
    }
    container: Object = {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": list(args),
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "client", "mountPath": _CLIENT, "readOnly": True},
            {"name": "programs", "mountPath": "/programs", "readOnly": True},
        ],
    }
    if program:
        container |= {"command": ["python", f"/programs/{program}"], "args": list(args)}
    labels = {
        "app.kubernetes.io/name": name,
        "calls-user-service": "true",
        "calls-notification-service": "true",
        **_PART_OF,
    }
    spec: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 5,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": "16Mi"}},
            {"name": "client", "secret": {"secretName": "smoke-test", "defaultMode": 0o440}},
            {"name": "programs", "configMap": {"name": "e2e-programs"}},
        ],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def programs() -> Object:
    """The programs of these pods."""
    data = {path.name: path.read_text() for path in sorted(PROGRAMS.glob("*.py")) if path.name != "__init__.py"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "e2e-programs"}, "data": data}


def trace_receiver(image: str) -> list[Object]:
    """An OTLP receiver that writes a line for each span, and the policies that let the services reach it."""
    port = {"protocol": "TCP", "port": _OTLP_PORT}
    mine = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": TRACES}}}
    services = {"podSelector": {"matchLabels": _PART_OF}}
    return [
        pod(TRACES, image, [], program="trace_receiver.py"),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": TRACES},
            "spec": {
                "clusterIP": "None",
                "selector": mine["podSelector"]["matchLabels"],
                "ports": [{"name": "otlp", "port": _OTLP_PORT, "targetPort": _OTLP_PORT}],
            },
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"from-services-to-{TRACES}"},
            "spec": {**mine, "policyTypes": ["Ingress"], "ingress": [{"from": [services], "ports": [port]}]},
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"to-{TRACES}"},
            "spec": {**services, "policyTypes": ["Egress"], "egress": [{"to": [mine], "ports": [port]}]},
        },
    ]


def arranged(objects: list[Object], image: str) -> list[Object]:
    """The overlay's objects without those that watch, with services that send their traces to the receiver, and a mail
    catcher that stays in one image: another release would be another pod, without the mail.
    """
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{TRACES}:{_OTLP_PORT}", "OTEL_BSP_SCHEDULE_DELAY": "500"}
    objects = [one for one in objects if one["metadata"].get("labels", {}).get(_COMPONENT) != "observability"]
    for one in objects:
        name = one["metadata"]["name"]
        # Before the hash: others hold files.
        if one["kind"] == "ConfigMap" and name.rpartition("-")[0] in {"user-service", "notification-service"}:
            one["data"] |= variables
        if one["kind"] == "Job":
            # Nobody is there to push to.
            [container] = one["spec"]["template"]["spec"]["containers"]
            container["env"] = [entry for entry in container["env"] if not entry["name"].startswith("OTEL_")]
        if one["kind"] == "Deployment" and name == "mail-catcher":
            one["spec"]["template"]["spec"]["containers"][0]["image"] = image
    return objects


def job_name(objects: list[Object]) -> str:
    """The name of the migrations' Job, which is its image's tag's."""
    [name] = [one["metadata"]["name"] for one in objects if one["kind"] == "Job"]
    return str(name)
