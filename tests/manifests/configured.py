"""Files that the programs of others are configured by, read from the ConfigMaps that are mounted into their pods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.manifests.objects import Object, Pod, environment, matches, of_kind

# Host and port of what is connected to.
Peer = tuple[str, int]


def files(pod: Pod, objects: Sequence[Object]) -> dict[str, str]:
    """The texts that a pod has mounted of ConfigMaps, by their paths."""
    maps = {one["metadata"]["name"]: one.get("data", {}) for one in of_kind(objects, "ConfigMap")}
    volumes = {
        one["name"]: maps.get(one["configMap"]["name"], {}) for one in pod.spec.get("volumes", ()) if "configMap" in one
    }
    return {
        f"{mount['mountPath']}/{name}": text
        for one in pod.containers
        for mount in one.get("volumeMounts", ())
        for name, text in volumes.get(mount["name"], {}).items()
    }


def documents(pod: Pod, objects: Sequence[Object]) -> dict[str, Any]:
    """Of those, the YAML files, read."""
    return {path: yaml.safe_load(text) for path, text in files(pod, objects).items() if path.endswith(".yaml")}


def peers(pod: Pod, objects: Sequence[Object]) -> set[Peer]:
    """Whom a pod connects to, by its variables and by its files; names of the internet are left out."""
    found = {peer for one in pod.containers for peer in _of_variables(environment(one, objects))}
    found |= {peer for document in documents(pod, objects).values() for peer in _of_file(document)}
    return {(host, port) for host, port in found if host != "localhost" and "." not in host}


def _of_variables(values: Mapping[str, str]) -> Iterator[Peer]:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "DATA_SOURCE_URI"):
        if value := values.get(name):
            yield _peer(value.partition("://")[2] or value)


def _of_file(document: Any) -> Iterator[Peer]:
    if not isinstance(document, dict):
        return
    for job in document.get("scrape_configs", ()):
        for one in job.get("dns_sd_configs", ()):
            yield from ((name, one["port"]) for name in one["names"])
        for one in job.get("static_configs", ()):
            yield from map(_peer, one["targets"])
    for one in document.get("datasources", ()):
        yield _peer(urlsplit(one["url"]).netloc)
    if "service" in document:
        for name, one in document.get("exporters", {}).items():
            # The exporter of this kind listens.
            if "endpoint" in (one or {}) and name.partition("/")[0] != "prometheus":
                yield _peer(one["endpoint"])


def _peer(address: str) -> Peer:
    host, _, port = address.partition("/")[0].rpartition(":")
    return host, int(port)


def listening(document: Mapping[str, Any]) -> set[int]:
    """The ports that a collector's configuration opens to others."""
    places = [
        *document["extensions"].values(),
        *(one for name, one in document["exporters"].items() if name.partition("/")[0] == "prometheus"),
        *(one for receiver in document["receivers"].values() for one in receiver["protocols"].values()),
    ]
    endpoints = [place["endpoint"] for place in places if "endpoint" in place]
    endpoints += [place[way]["endpoint"] for place in places for way in ("http", "grpc") if way in place]
    for reader in document["service"].get("telemetry", {}).get("metrics", {}).get("readers", ()):
        exporter = reader["pull"]["exporter"]["prometheus"]
        endpoints.append(f"{exporter['host']}:{exporter['port']}")
    return {port for host, port in map(_peer, endpoints) if host == "0.0.0.0"}


def selected(host: str, objects: Sequence[Object], everybody: Sequence[Pod]) -> str:
    """The name of the pods behind a Service, or the name itself where there is none."""
    for one in of_kind(objects, "Service"):
        if one["metadata"]["name"] == host:
            for pod in everybody:
                if matches({"matchLabels": one["spec"]["selector"]}, pod.labels):
                    return pod.labels["app.kubernetes.io/name"]
    return host
