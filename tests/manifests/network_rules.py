"""The rule of the network: who talks to whom follows from the settings, and the policies let exactly that through."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from tests.manifests.configured import peers, selected
from tests.manifests.objects import Object, Pod, environment, matches, of_kind, pods

# Made in the cluster by `skaffold verify`.
SMOKE_TEST = Pod(
    "Job",
    "smoke-test",
    {
        "app.kubernetes.io/name": "smoke-test",
        "calls-user-service": "true",
        "calls-notification-service": "true",
    },
    {"containers": []},
)
_POSTGRES_PORT = 5432
# Settings that name a service of ours.
_ADDRESSES = (
    "TIDINGS_NOTIFICATIONS_USERS_ADDRESS",
    "TIDINGS_CONSOLE_USERS_ADDRESS",
    "TIDINGS_CONSOLE_NOTIFICATIONS_ADDRESS",
)

Talk = tuple[str, str, int]


def talks(objects: Sequence[Object]) -> set[Talk]:
    """Who must reach whom at which port, as the settings and the files of others have it."""
    found: set[Talk] = {
        (SMOKE_TEST.name, "user-service", 50051),
        (SMOKE_TEST.name, "notification-service", 50052),
    }
    everybody = pods(objects)
    for pod in everybody:
        source = _name(pod)
        found |= {(source, selected(host, objects, everybody), port) for host, port in peers(pod, objects)}
        for one in pod.containers:
            values = environment(one, objects)
            if "PGHOST" in values:
                # The operator's Service for the server that takes writes.
                host = values["PGHOST"].removesuffix("-rw")
                found.add((source, host, int(values.get("PGPORT", _POSTGRES_PORT))))
            for name in _ADDRESSES:
                if address := values.get(name):
                    host, _, port = address.rpartition("/")[2].rpartition(":")
                    found.add((source, host, int(port)))
            mail = values.get("TIDINGS_NOTIFICATIONS_SMTP_HOST", "")
            if mail and "." not in mail:
                found.add((source, mail, int(values["TIDINGS_NOTIFICATIONS_SMTP_PORT"])))
        if pod.kind == "Cluster":
            found.add((source, source, _POSTGRES_PORT))
    return found


def only_what_talks(objects: Sequence[Object]) -> Iterator[str]:
    """Each pair that talks may, no other may at any port that a pod has; the policies of either side see to it."""
    policies = list(of_kind(objects, "NetworkPolicy"))
    everybody = [*pods(objects), SMOKE_TEST]
    wanted = talks(objects)
    for source in everybody:
        for target in everybody:
            pair = (_name(source), _name(target))
            ports = {*target.ports.values(), *(port for *others, port in wanted if tuple(others) == pair)}
            for port in sorted(ports):
                needs = (*pair, port) in wanted
                for may, side in (
                    (_passes(_rules(policies, source, "egress"), "to", target, port), "egress"),
                    (_passes(_rules(policies, target, "ingress"), "from", source, port), "ingress"),
                ):
                    if may != needs:
                        verb = "cannot" if needs else "can"
                        yield f"{source.where} {verb} reach {_name(target)} at {port}, by the {side} of policies"
    known = {_name(pod) for pod in everybody}
    yield from (f"{source} talks to {target}, which is nowhere" for source, target, _ in wanted if target not in known)


def closed(objects: Sequence[Object]) -> Iterator[str]:
    """Whatever no policy names is closed, in both directions, for what may yet come too."""
    newcomer = Pod("Pod", "newcomer", {"app.kubernetes.io/name": "newcomer"}, {})
    policies = list(of_kind(objects, "NetworkPolicy"))
    for pod in (*pods(objects), newcomer):
        for direction in ("ingress", "egress"):
            if _rules(policies, pod, direction) is None:
                yield f"{pod.where}: is open for {direction}"


def names_are_resolved(objects: Sequence[Object]) -> Iterator[str]:
    """Every pod may ask the cluster's DNS, and nothing else of another namespace unless it is named."""
    dns = {"k8s-app": "kube-dns"}
    for pod in pods(objects):
        asked = {
            (port["protocol"], port["port"])
            for rule in _rules(list(of_kind(objects, "NetworkPolicy")), pod, "egress") or ()
            for peer in rule.get("to", ())
            if matches(peer.get("podSelector"), dns) and "namespaceSelector" in peer
            for port in rule["ports"]
        }
        if asked != {("UDP", 53), ("TCP", 53)}:
            yield f"{pod.where}: cannot ask for names"


def no_inside_from_the_internet_rule(objects: Sequence[Object]) -> Iterator[str]:
    """A rule for the internet leaves out what is no address of the internet, and names ports."""
    for one in of_kind(objects, "NetworkPolicy"):
        for rule in one["spec"].get("egress", ()):
            for peer in rule.get("to", ()):
                if block := peer.get("ipBlock"):
                    private = "10.0.0.0/8" if "." in block["cidr"] else "fc00::/7"
                    if private not in block.get("except", ()) or not rule.get("ports"):
                        yield f"NetworkPolicy/{one['metadata']['name']}: {json.dumps(block)} reaches inside"


def pages_are_reached(objects: Sequence[Object]) -> Iterator[str]:
    """Where mails have links, pods of a namespace with the label, and no others, bring recipients to their pages."""
    policies = list(of_kind(objects, "NetworkPolicy"))
    wanted = [{"namespaceSelector": {"matchLabels": {"reaches-notification-pages": "true"}}}]
    for pod in pods(objects):
        if not any(environment(one, objects).get("TIDINGS_NOTIFICATIONS_PUBLIC_URL") for one in pod.containers):
            continue
        port = pod.ports["http"]
        from_ = [
            rule.get("from")
            for rule in _rules(policies, pod, "ingress") or ()
            if port in {one["port"] for one in rule.get("ports", ())}
        ]
        if from_ != [wanted]:
            yield f"{pod.where}: its pages at {port} are reached by {json.dumps(from_)}"


def _name(pod: Pod) -> str:
    return pod.labels["app.kubernetes.io/name"]


def _rules(policies: Sequence[Object], pod: Pod, direction: str) -> list[Object] | None:
    """What policies allow of one direction; None if there is none of that direction for the pod: all is allowed."""
    chosen = [
        one["spec"]
        for one in policies
        if matches(one["spec"]["podSelector"], pod.labels) and direction.capitalize() in one["spec"]["policyTypes"]
    ]
    return [rule for spec in chosen for rule in spec.get(direction, ())] if chosen else None


def _passes(rules: list[Object] | None, side: str, other: Pod, port: int) -> bool:
    if rules is None:
        return True
    for rule in rules:
        if "ports" in rule and port not in {one["port"] for one in rule["ports"]}:
            continue
        peers = rule.get(side)
        if peers is None or any(_is_peer(peer, other) for peer in peers):
            return True
    return False


def _is_peer(peer: Object, other: Pod) -> bool:
    # Of the same namespace: what is said of others does not concern it.
    return "namespaceSelector" not in peer and matches(peer.get("podSelector"), other.labels)


RULES = (only_what_talks, closed, names_are_resolved, no_inside_from_the_internet_rule, pages_are_reached)
