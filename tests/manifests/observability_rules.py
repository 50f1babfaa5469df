"""Rules of what watches: collectors are of parts that they have, and what is scraped, sent to or asked is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.manifests.configured import documents, listening, peers
from tests.manifests.objects import Object, Pod, of_kind, pods

_CORE = "otel-collector"
# What is built in, of which we might use this: https://github.com/open-telemetry/opentelemetry-collector-releases,
# distributions/otelcol/manifest.yaml of 0.159; https://github.com/jaegertracing/jaeger,
# cmd/jaeger/internal/components.go of 2.20.
_BUILT_IN: Mapping[str, Mapping[str, set[str]]] = {
    _CORE: {
        "receivers": {"otlp", "prometheus"},
        "processors": {"batch", "memory_limiter", "resource", "attributes", "filter", "probabilistic_sampler"},
        "exporters": {"otlp_grpc", "otlp_http", "prometheus", "prometheusremotewrite", "debug"},
        "extensions": {"health_check", "zpages"},
    },
    "jaeger": {
        "receivers": {"otlp"},
        "processors": {"batch", "memory_limiter"},
        "exporters": {"jaeger_storage_exporter"},
        "extensions": {"jaeger_storage", "jaeger_query", "healthcheckv2"},
    },
}


def _collectors(objects: Sequence[Object]) -> Iterator[tuple[Pod, dict[str, Any]]]:
    for pod in pods(objects):
        if pod.name in _BUILT_IN:
            [document] = documents(pod, objects).values()
            yield pod, document


def pipelines(objects: Sequence[Object]) -> Iterator[str]:
    """A pipeline is of parts that are configured, a part is of a kind that the image has, and each is used. Memory is
    limited before anything else is done.
    """
    for pod, document in _collectors(objects):
        used: dict[str, set[str]] = {"extensions": set(document["service"]["extensions"])}
        for name, pipeline in document["service"]["pipelines"].items():
            for kind in ("receivers", "processors", "exporters"):
                used.setdefault(kind, set()).update(pipeline[kind])
                if not pipeline[kind]:
                    yield f"{pod.where}: the pipeline {name} has no {kind}"
            if pipeline["processors"][:1] != ["memory_limiter"]:
                yield f"{pod.where}: the pipeline {name} does not limit memory first"
        for kind, names in used.items():
            configured = set(document.get(kind, {}))
            yield from (f"{pod.where}: {name} of {kind} is not configured" for name in sorted(names - configured))
            yield from (f"{pod.where}: {name} of {kind} is not used" for name in sorted(configured - names))
            unknown = {name for name in configured if name.partition("/")[0] not in _BUILT_IN[pod.name][kind]}
            yield from (f"{pod.where}: {name} of {kind} is not built in" for name in sorted(unknown))


def memory_fits(objects: Sequence[Object]) -> Iterator[str]:
    """What a collector lets itself have is less than what its container may have, by what it needs besides."""
    for pod, document in _collectors(objects):
        [container] = pod.spec["containers"]
        limit = int(container["resources"]["limits"]["memory"].removesuffix("Mi"))
        if document["processors"]["memory_limiter"]["limit_mib"] > limit * 4 // 5:
            yield f"{pod.where}: lets itself have more memory than fits"


def opened(objects: Sequence[Object]) -> Iterator[str]:
    """A collector opens the ports that its container has."""
    for pod, document in _collectors(objects):
        if (open_ := listening(document)) != set(pod.ports.values()):
            yield f"{pod.where}: listens on {sorted(open_)}, which are not its ports"


def peers_are_there(objects: Sequence[Object]) -> Iterator[str]:
    """What is sent to, asked or scraped is a Service with that port."""
    ports = {
        one["metadata"]["name"]: {port["port"] for port in one["spec"]["ports"]} for one in of_kind(objects, "Service")
    }
    for pod in pods(objects):
        for host, port in sorted(peers(pod, objects)):
            if port not in ports.get(host, ()):
                yield f"{pod.where}: there is no Service {host} with the port {port}"


def metrics_are_scraped(objects: Sequence[Object]) -> Iterator[str]:
    """Where there is a Prometheus it scrapes every port that is there for it, and pods that are not ready."""
    scraping = [pod for pod in pods(objects) if pod.name == "prometheus"]
    scraped = {peer for pod in scraping for peer in peers(pod, objects)}
    for one in of_kind(objects, "Service"):
        name = one["metadata"]["name"]
        for port in one["spec"]["ports"]:
            if port["name"] not in {"metrics", "pushed"}:
                continue
            if scraping and (name, port["port"]) not in scraped:
                yield f"Service/{name}: its port {port['name']} is not scraped"
            if name.endswith("-metrics") and not (
                one["spec"].get("publishNotReadyAddresses") and one["spec"].get("clusterIP") == "None"
            ):
                yield f"Service/{name}: hides pods that are not ready"


RULES = (pipelines, memory_fits, opened, peers_are_there, metrics_are_scraped)
