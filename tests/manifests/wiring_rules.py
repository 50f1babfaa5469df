"""Rules of what belongs together: names that are referred to exist, and settings are those of the code."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import typer.main
from opentelemetry import environment_variables as api_variables
from opentelemetry.sdk import environment_variables as sdk_variables
from psycopg import pq

from console.settings import ConsoleSettings
from devstack.settings import DevstackSettings, MailCatcherSettings
from migrations.settings import MigrationSettings, NotificationsDatabase, UsersDatabase
from notification_service.links import PATH
from notification_service.settings import NotificationServiceSettings
from servicekit.settings import LogSettings, Settings, variable
from tests.manifests.objects import Object, Pod, environment, matches, of_kind, pods
from tidings.cli.app import app
from user_service.settings import UserServiceSettings

# What each module of the image reads, besides LogSettings.
_SETTINGS: Mapping[str, tuple[type[Settings], ...]] = {
    "user_service": (UserServiceSettings,),
    "notification_service": (NotificationServiceSettings,),
    "console": (ConsoleSettings,),
    "migrations": (MigrationSettings, UsersDatabase, NotificationsDatabase),
    "devstack": (DevstackSettings, MailCatcherSettings),
    "tidings.cli": (),
}
# Secrets that production refers to and others make, with the keys they must have: docs/kubernetes.md lists them.
EXTERNAL = {
    "postgres-users-owner": {"username", "password"},
    "postgres-users": {"username", "password"},
    "postgres-notifications-owner": {"username", "password"},
    "postgres-notifications": {"username", "password"},
    "user-service-callers": {"callers.toml"},
    "notification-service-callers": {"callers.toml"},
    "notification-service-token": {"token"},
    "notification-service-links": {"links.keys"},
    "notification-service-smtp": {"username", "password"},
    # Made by cert-manager, and by the operator of Postgres.
    "user-service-tls": {"tls.crt", "tls.key", "ca.crt"},
    "notification-service-tls": {"tls.crt", "tls.key", "ca.crt"},
    "postgres-ca": {"ca.crt"},
}
# Modules that trace or measure, and what OpenTelemetry reads.
_OBSERVED = {"user_service", "notification_service", "migrations"}
_OPENTELEMETRY = {
    value
    for module in (api_variables, sdk_variables)
    for name, value in vars(module).items()
    if name.startswith("OTEL_")
}
_REFERENCE = re.compile(r"\$\((\w+)\)")
_PASSWORD_IN_URL = re.compile(r"postgres(ql)?://[^/@:]*:(?!\$\(\w+\)@)")


def _client_variables() -> set[str]:
    """Those of the command line."""
    found: set[str] = set()

    def visit(command: object) -> None:
        for parameter in getattr(command, "params", ()):
            names = parameter.envvar
            found.update([names] if isinstance(names, str) else names or ())
        for inner in getattr(command, "commands", {}).values():
            visit(inner)

    visit(typer.main.get_command(app))
    return found


@functools.cache
def known_variables(module: str) -> set[str]:
    """What a module may be given: its settings, and what the libraries below it read."""
    kinds: tuple[type[Settings], ...] = (*_SETTINGS[module], LogSettings)
    known = {variable(kind, field) for kind in kinds for field in kind.model_fields}
    known |= {one.envvar.decode() for one in pq.Conninfo.get_defaults() if one.envvar}
    if module in _OBSERVED:
        known |= _OPENTELEMETRY
    return known | _client_variables() | {"PYTHONPATH"}


def module_of(container: Object) -> str:
    """The module that runs in a container of our image, also when it is run by `devstack reload`."""
    arguments = container["args"]
    return str(arguments[2] if arguments[:2] == ["devstack", "reload"] else arguments[0])


def ours(pod: Pod) -> list[Object]:
    """The containers of our image."""
    return [one for one in pod.containers if re.search(r"(^|/)tidings:", one.get("image", ""))]


def variables(objects: Sequence[Object]) -> Iterator[str]:
    """Every variable is one that the code reads, and one that stands for another comes after it."""
    for pod in pods(objects):
        for one in ours(pod):
            where, module = f"{pod.where}/{one['name']}", module_of(one)
            values = environment(one, objects)
            helpers = {name for value in values.values() for name in _REFERENCE.findall(value)}
            for name in sorted(set(values) - known_variables(module) - helpers):
                # The schema is waited for with the settings of the service that needs it.
                if module != "migrations" or name not in known_variables(pod.name.replace("-", "_")):
                    yield f"{where}: {name} is no setting of {module}"
            before: set[str] = set()
            for entry in one.get("env", ()):
                for name in _REFERENCE.findall(entry.get("value", "")):
                    if name not in before:
                        yield f"{where}: {entry['name']} stands before {name}, which it names"
                before.add(entry["name"])


def no_passwords(objects: Sequence[Object]) -> Iterator[str]:
    """No password stands in a manifest: variables refer to Secrets."""
    for pod in pods(objects):
        for one in pod.containers:
            for name, value in environment(one, objects).items():
                if _PASSWORD_IN_URL.match(value) or (name.endswith("PASSWORD") and value != "(secret)"):
                    yield f"{pod.where}/{one['name']}: {name} has a password in it"


def references(objects: Sequence[Object]) -> Iterator[str]:
    """Every ConfigMap and Secret that is referred to is here with that key, or is one that production is given."""
    secrets = {one["metadata"]["name"]: set(one["data"]) for one in of_kind(objects, "Secret")}
    maps = {one["metadata"]["name"]: set(one.get("data", ())) for one in of_kind(objects, "ConfigMap")}
    if not secrets:
        secrets = EXTERNAL
    for pod in pods(objects):
        for where, kind, name, keys in _references(pod):
            known = (secrets if kind == "Secret" else maps).get(name)
            if known is None:
                yield f"{where}: there is no {kind} {name}"
            else:
                yield from (f"{where}: {kind} {name} has no key {key}" for key in sorted(keys - known))


def _references(pod: Pod) -> Iterator[tuple[str, str, str, set[str]]]:
    for one in pod.containers:
        for source in one.get("envFrom", ()):
            yield pod.where, "ConfigMap", source["configMapRef"]["name"], set()
        for entry in one.get("env", ()):
            if key := entry.get("valueFrom", {}).get("secretKeyRef"):
                yield pod.where, "Secret", key["name"], {key["key"]}
    for volume in pod.spec.get("volumes", ()):
        if secret := volume.get("secret"):
            yield pod.where, "Secret", secret["secretName"], {item["key"] for item in secret.get("items", ())}
        if config := volume.get("configMap"):
            yield pod.where, "ConfigMap", config["name"], set()


def mounts(objects: Sequence[Object]) -> Iterator[str]:
    """A file or folder that a setting names is of a Secret or ConfigMap that is mounted there; a mount is of a volume
    that is there.
    """
    keys = {one["metadata"]["name"]: set(one["data"]) for one in of_kind(objects, "Secret")} or EXTERNAL
    texts = {one["metadata"]["name"]: set(one.get("data", ())) for one in of_kind(objects, "ConfigMap")}
    for pod in pods(objects):
        volumes = {one["name"]: one for one in pod.spec.get("volumes", ())}
        claims = {"data"} if pod.kind == "StatefulSet" else set()
        for one in pod.containers:
            where, files, folders = f"{pod.where}/{one['name']}", set(), set()
            for mount in one.get("volumeMounts", ()):
                if mount["name"] not in {*volumes, *claims}:
                    yield f"{where}: there is no volume {mount['name']}"
                    continue
                if config := volumes.get(mount["name"], {}).get("configMap"):
                    files |= {f"{mount['mountPath']}/{name}" for name in texts.get(config["name"], ())}
                    folders.add(mount["mountPath"])
                    if mount["mountPath"].startswith("/etc/tidings/") and mount.get("readOnly") is not True:
                        yield f"{where}: ConfigMap {config['name']} is not mounted to read only"
                secret = volumes.get(mount["name"], {}).get("secret")
                if secret is None:
                    continue
                items = {item["path"] for item in secret.get("items", ())} or keys.get(secret["secretName"], set())
                files |= {f"{mount['mountPath']}/{name}" for name in items}
                if mount.get("readOnly") is not True or secret.get("defaultMode") != 0o440:
                    yield f"{where}: Secret {secret['secretName']} is not mounted for its group to read only"
            if one["name"] == "wait-for-schema":
                files |= _of_the_service(pod, objects, "_FILE")
                folders |= _of_the_service(pod, objects, "_DIR")
            for name, value in environment(one, objects).items():
                if value.startswith("/etc/tidings/") and value not in (folders if name.endswith("_DIR") else files):
                    yield f"{where}: {name} names {value}, which is not mounted"


def _of_the_service(pod: Pod, objects: Sequence[Object], kind: str) -> set[str]:
    """What only the service itself opens, though both have the variables."""
    [service] = pod.spec["containers"]
    values = environment(service, objects)
    return {value for name, value in values.items() if name.startswith("TIDINGS_") and name.endswith(kind)}


def link_keys(objects: Sequence[Object]) -> Iterator[str]:
    """Where mails have links no pod starts before the keys that sign them are there; else none needs any."""
    for pod in pods(objects):
        for one in pod.spec["containers"]:
            values = environment(one, objects)
            place = values.get("TIDINGS_NOTIFICATIONS_LINK_KEYS_FILE", "").rpartition("/")[0]
            names = [mount["name"] for mount in one.get("volumeMounts", ()) if mount["mountPath"] == place]
            for volume in pod.spec.get("volumes", ()):
                if volume["name"] not in names:
                    continue
                is_optional = volume["secret"].get("optional", False)
                if values.get("TIDINGS_NOTIFICATIONS_PUBLIC_URL") and is_optional:
                    yield f"{pod.where}: starts without the keys of the links that its mails have"
                elif not values.get("TIDINGS_NOTIFICATIONS_PUBLIC_URL") and not is_optional:
                    yield f"{pod.where}: waits for keys of links that its mails do not have"


def services(objects: Sequence[Object]) -> Iterator[str]:
    """Every Service selects pods, by a port that they have; those of gRPC are headless, for clients take turns by
    themselves, and those for scrapers, who want every pod.
    """
    found = [pod for pod in pods(objects) if pod.kind != "Job"]
    for one in of_kind(objects, "Service"):
        name, spec = one["metadata"]["name"], one["spec"]
        chosen = [pod for pod in found if matches({"matchLabels": spec["selector"]}, pod.labels)]
        if len(chosen) != 1:
            yield f"Service/{name}: selects {len(chosen)} workloads"
            continue
        for port in spec["ports"]:
            ports = chosen[0].ports
            if port["targetPort"] not in ports or ports[port["targetPort"]] != port["port"]:
                yield f"Service/{name}: {chosen[0].where} has no port {port['targetPort']} of this number"
        named = {port["targetPort"] for port in spec["ports"]}
        if "grpc" in chosen[0].ports and named != {"http"} and spec.get("clusterIP") != "None":
            yield f"Service/{name}: is not headless"


def ingresses(objects: Sequence[Object]) -> Iterator[str]:
    """What is reached from the internet is the pages of the links in mails, at the address that the links have."""
    urls = {
        url
        for pod in pods(objects)
        for one in pod.containers
        if (url := environment(one, objects).get("TIDINGS_NOTIFICATIONS_PUBLIC_URL"))
    }
    known = {
        (one["metadata"]["name"], port["name"])
        for one in of_kind(objects, "Service")
        for port in one["spec"]["ports"]
        if port["targetPort"] == "http"
    }
    for one in of_kind(objects, "Ingress"):
        where, spec = f"Ingress/{one['metadata']['name']}", one["spec"]
        encrypted = {host for entry in spec.get("tls", ()) for host in entry["hosts"]}
        for rule in spec["rules"]:
            if rule["host"] not in encrypted:
                yield f"{where}: {rule['host']} has no certificate"
            for path in rule["http"]["paths"]:
                if f"https://{rule['host']}{path['path']}" not in {f"{url}{PATH}" for url in urls}:
                    yield f"{where}: no link leads to {rule['host']}{path['path']}"
                service = path["backend"]["service"]
                if (service["name"], service["port"].get("name")) not in known:
                    yield f"{where}: leads to {service['name']}, which has no such port"


def ports(objects: Sequence[Object]) -> Iterator[str]:
    """A container has the ports that its settings make it listen on, and no others."""
    for pod in pods(objects):
        for one in ours(pod):
            if pod.kind == "Job" or one in pod.spec.get("initContainers", ()):
                continue
            values = environment(one, objects)
            listens = {
                int(value.rpartition(":")[2])
                for name, value in values.items()
                if name.endswith(("_LISTEN", "_METRICS_ADDRESS")) or name == "TIDINGS_DEVSTACK_SMTP_PORT"
            }
            if listens != {port["containerPort"] for port in one.get("ports", ())}:
                yield f"{pod.where}/{one['name']}: listens on {sorted(listens)}, which are not its ports"


RULES = (variables, no_passwords, references, mounts, link_keys, services, ingresses, ports)
