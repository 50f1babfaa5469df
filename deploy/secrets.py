"""`python -m deploy.secrets`: what a development cluster must not share with any other, made on this machine.

A certificate authority and a certificate for each service, tokens with the files of callers that know their hashes, a
key for links, and passwords. They go into a directory that git ignores, from where kustomize makes Secrets of them. A
file that is there is never replaced: the database in a cluster knows the passwords it was made with. Remove the
directory, and the cluster's namespace with it, to begin anew.

Production has none of this: its Secrets have the same names and keys, and come from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DIRECTORY = Path(__file__).parent / "components" / "development" / "generated"

# As long as a certificate may be valid that common clients accept.
_VALID = datetime.timedelta(days=397)
_CLOCKS_DIFFER = datetime.timedelta(hours=1)
_TOKEN_BYTES = 32
_LINK_KEY_BYTES = 32
_PASSWORDS = (
    "postgres-superuser",
    "postgres-users-owner",
    "postgres-users",
    "postgres-notifications-owner",
    "postgres-notifications",
    "postgres-monitor",
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who may call which methods of a service."""

    name: str
    methods: tuple[str, ...]


# By service: `admin` is the developer.
CALLERS: Mapping[str, tuple[Caller, ...]] = {
    "user-service": (
        Caller("admin", ("*",)),
        Caller("notification-service", ("WatchUsers", "GetFeed")),
        Caller("smoke-test", ("CreateUser", "DeleteUser", "WatchUsers")),
        Caller("console", ("WatchUsers", "GetFeed")),
    ),
    "notification-service": (
        Caller("admin", ("*",)),
        Caller("smoke-test", ("ListNotifications",)),
        Caller(
            "console",
            ("ListNotifications", "ListDeliveries", "GetInbox", "ReplayDeliveries", "DiscardDeliveries"),
        ),
    ),
}


def generate(directory: Path) -> list[str]:
    """Makes what is missing. Returns the names of the files that it made."""
    directory.mkdir(parents=True, exist_ok=True)
    made: list[str] = []

    def write(name: str, make: Callable[[], bytes]) -> bytes:
        path = directory / name
        if not path.exists():
            # A run that is killed leaves no half of a file under its name.
            unfinished = path.with_suffix(f"{path.suffix}.new")
            unfinished.write_bytes(make())
            unfinished.chmod(0o600)
            unfinished.replace(path)
            made.append(name)
        return path.read_bytes()

    for role in _PASSWORDS:
        # Letters that mean the same inside a URL.
        write(f"{role}.password", lambda: secrets.token_hex(32).encode())
    _certificates(write)
    names = sorted({caller.name for callers in CALLERS.values() for caller in callers})
    tokens = {
        name: write(f"{name}.token", lambda: f"tidings_{secrets.token_urlsafe(_TOKEN_BYTES)}".encode()).decode()
        for name in names
    }
    # What signs the links in mails.
    write("notification-service.links.keys", lambda: base64.b64encode(secrets.token_bytes(_LINK_KEY_BYTES)) + b"\n")
    for service, callers in CALLERS.items():
        text = _callers_file(callers, tokens)
        write(f"{service}.callers.toml", text.encode)
    return made


def _callers_file(callers: Sequence[Caller], tokens: Mapping[str, str]) -> str:
    lines: list[str] = []
    for caller in callers:
        digest = hashlib.sha256(tokens[caller.name].encode()).hexdigest()
        # Strings and lists of strings look the same in JSON and in TOML.
        lines += [
            "[[callers]]",
            f"name = {json.dumps(caller.name)}",
            f'hash = "sha256:{digest}"',
            f"methods = {json.dumps(caller.methods)}",
            "",
        ]
    return "\n".join(lines)


def _certificates(write: Callable[[str, Callable[[], bytes]], bytes]) -> None:
    key = _loaded(write("ca.key", _new_key))
    authority = x509.load_pem_x509_certificate(write("ca.crt", lambda: _pem(_authority(key))))
    for service in CALLERS:
        service_key = _loaded(write(f"{service}.key", _new_key))
        write(f"{service}.crt", lambda: _pem(_certificate(service, service_key, authority, key)))  # noqa: B023


def _new_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _loaded(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 - this program made it
    return key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    subject = "Tidings development"
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(subject, key)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def _certificate(
    service: str,
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """Good for the Service in any namespace by its short name, and for a forwarded port."""
    names: list[x509.GeneralName] = [x509.DNSName(service), x509.DNSName("localhost")]
    names += [x509.DNSName(f"{service}.tidings{suffix}") for suffix in ("", ".svc", ".svc.cluster.local")]
    names += [x509.IPAddress(ip_address("127.0.0.1")), x509.IPAddress(ip_address("::1"))]
    return (
        _builder(service, key)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what it made. Returns the exit code: 0, or 1 if the directory cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m deploy.secrets", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where the files go [%(default)s]")
    directory = parser.parse_args(arguments).directory
    os.umask(0o077)
    try:
        made = generate(directory)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"secrets: {len(made)} made in {directory}" if made else f"secrets: all there in {directory}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
