"""Validity of an object: Kubernetes' own schemas, strictly; of other kinds what we use of them, by their definitions.

A kind that has neither is refused: it would be checked by nobody.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate

from tests.manifests.objects import Object

# It would read all definitions again for each object, which takes far longer than to hold one against them.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

# The oldest that kind and minikube still run by default, and the newest that the validator knows.
VERSIONS = ("1.34", "1.37")


def _closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 1}
_FLAG = {"type": "boolean"}
_NAMED = _closed(("name",), name=_TEXT)
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_SIZE = _closed(("size",), size={"type": "string", "pattern": "^[0-9]+(Mi|Gi|Ti)$"})
_ROLE = _closed(("name",), name=_TEXT, login=_FLAG, passwordSecret=_NAMED)

# https://github.com/cloudnative-pg/cloudnative-pg, config/crd/bases/postgresql.cnpg.io_clusters.yaml, of 1.30
_CLUSTER = _closed(
    ("instances", "imageName", "storage"),
    instances=_COUNT,
    imageName=_TEXT,
    inheritedMetadata=_closed(labels=_TEXTS),
    bootstrap=_closed(
        initdb=_closed(
            ("database", "owner"),
            database=_TEXT,
            owner=_TEXT,
            secret=_NAMED,
            localeProvider={"enum": ["builtin", "icu", "libc"]},
            locale=_TEXT,
            builtinLocale=_TEXT,
        )
    ),
    managed=_closed(roles={"type": "array", "items": _ROLE}),
    postgresql=_closed(
        synchronous=_closed(
            ("method", "number"),
            method={"enum": ["any", "first"]},
            number=_COUNT,
            dataDurability={"enum": ["required", "preferred"]},
        ),
        parameters=_TEXTS,
    ),
    affinity=_closed(
        enablePodAntiAffinity=_FLAG, podAntiAffinityType={"enum": ["required", "preferred"]}, topologyKey=_TEXT
    ),
    topologySpreadConstraints={"type": "array", "items": {"type": "object"}},
    primaryUpdateStrategy={"enum": ["unsupervised", "supervised"]},
    primaryUpdateMethod={"enum": ["switchover", "restart"]},
    enablePDB=_FLAG,
    resources=_closed(requests=_TEXTS, limits=_TEXTS),
    storage=_SIZE,
    walStorage=_SIZE,
)
# The same repository, config/crd/bases/postgresql.cnpg.io_databases.yaml
_DATABASE = _closed(
    ("cluster", "name", "owner"),
    cluster=_NAMED,
    name={"type": "string", "not": {"enum": ["postgres", "template0", "template1"]}},
    owner=_TEXT,
    databaseReclaimPolicy={"enum": ["retain", "delete"]},
)
# https://cert-manager.io/docs/reference/api-docs/#cert-manager.io/v1.Certificate
_CERTIFICATE = _closed(
    ("secretName", "issuerRef", "dnsNames"),
    secretName=_TEXT,
    issuerRef=_closed(("name",), name=_TEXT, kind={"enum": ["Issuer", "ClusterIssuer"]}, group=_TEXT),
    dnsNames={"type": "array", "items": _TEXT, "minItems": 1},
    usages={"type": "array", "items": {"enum": ["digital signature", "server auth"]}},
    privateKey=_closed(
        algorithm={"enum": ["RSA", "ECDSA", "Ed25519"]},
        size={"type": "integer"},
        rotationPolicy={"enum": ["Never", "Always"]},
    ),
    duration={"type": "string", "pattern": "^[0-9]+h$"},
    renewBefore={"type": "string", "pattern": "^[0-9]+h$"},
)
OTHERS = {
    ("postgresql.cnpg.io/v1", "Cluster"): _CLUSTER,
    ("postgresql.cnpg.io/v1", "Database"): _DATABASE,
    ("cert-manager.io/v1", "Certificate"): _CERTIFICATE,
}


def complaints(one: Object) -> Iterator[str]:
    """What is not valid of an object."""
    where = f"{one['kind']}/{one['metadata']['name']}"
    spec = OTHERS.get((one["apiVersion"], one["kind"]))
    if spec is not None:
        whole = {
            "type": "object",
            "properties": {"spec": spec, "metadata": {"type": "object"}, "apiVersion": {}, "kind": {}},
            "required": ["spec"],
            "additionalProperties": False,
        }
        for error in jsonschema.Draft202012Validator(whole).iter_errors(one):
            yield f"{where}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{where}: {'.'.join(map(str, error.path))}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{where}: {one['apiVersion']} {one['kind']} has no schema in {version}"
