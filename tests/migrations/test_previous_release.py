"""The previous release's code passes its own tests on the schema of this one: that is what a rollback stands on.

The previous release is the newest tag `v*` before this commit whose schema is older. While there is none, it is the
commit before the newest revision was added, so that each revision is held against the code that it meets in a rollout.
Its tests are run as they were then, with its services, on databases that this commit's migrations have made.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from tests.migrations.commands import KINDS, Kind

_ROOT = Path(__file__).parents[2]
# What callers see, and the way of a change through both services. Not all of its tests: the schema is what is asked.
_TESTS = ("tests/users/test_api.py", "tests/system/test_system.py", "-k", "not kill_9")
# A migrated template is made with it, and each of its tests goes by processes: minutes on a machine that is busy.
_TIMEOUT = 1500

# Stands for the migrations of the release: it runs those of this commit, and what a test wants done besides.
_OURS = """
import os, subprocess, sys
ours = {{**os.environ, "PYTHONPATH": {path!r}}}
code = subprocess.run([sys.executable, "-m", "migrations", *sys.argv[1:]], cwd={root!r}, env=ours).returncode
if code == 0 and (statement := {besides!r}) and sys.argv[1:] == ["upgrade", "users"]:
    import psycopg
    with psycopg.connect(os.environ["TIDINGS_USERS_DATABASE_URL"]) as connection:
        connection.execute(statement)
sys.exit(code)
"""


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, check=True).stdout


def _lines(*arguments: str) -> list[str]:
    return _git(*arguments).decode().split()


def _newest(kind: Kind, commit: str) -> str:
    """The newest revision of a history at a commit: its file; empty if there is none."""
    files = _lines("ls-tree", "--name-only", commit, f"migrations/{kind}/versions/")
    return max((name for name in files if Path(name).name[:4].isdigit()), default="")


def previous_release() -> str:
    """A commit, or a reason in words why there is none to compare with."""
    if shutil.which("git") is None or not (_ROOT / ".git").exists():
        return "this is no clone of git's: no code of before is here"
    ours = {kind: _newest(kind, "HEAD") for kind in KINDS}
    for tag in _lines("tag", "--merged", "HEAD", "--list", "v*", "--sort=-version:refname"):
        if {kind: _newest(kind, tag) for kind in KINDS} != ours:
            return _lines("rev-parse", f"{tag}^{{commit}}")[0]
    if _lines("rev-parse", "--is-shallow-repository") == ["true"]:
        return "the clone is shallow: no code of before is here"
    added = _lines("log", "--diff-filter=A", "--format=%H", "-1", "HEAD", "--", *ours.values())
    before = _lines("rev-list", "-1", f"{added[0]}^@") if added else []
    if not before or not any(_newest(kind, before[0]) for kind in KINDS):
        return "there was no schema before this one"
    return before[0]


@pytest.fixture(scope="module")
def release() -> str:
    """The commit; skips with the reason if there is nothing to compare with."""
    found = previous_release()
    if " " in found:
        pytest.skip(f"nothing to compare with: {found}")
    return found


async def _run(release: str, place: Path, *tests: str, besides: str = "") -> tuple[int | None, str]:
    """Runs tests of a release on our schema, and the statement `besides`. Returns pytest's exit code and output."""
    with tarfile.open(fileobj=BytesIO(_git("archive", release))) as archive:
        archive.extractall(place, filter="data")
    shutil.rmtree(place / "migrations")
    (place / "migrations").mkdir()
    (place / "migrations" / "__init__.py").touch()
    (place / "migrations" / "__main__.py").write_text(
        _OURS.format(path=f"{_ROOT / 'services'}:{_ROOT}", root=str(_ROOT), besides=besides)
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests,
        cwd=place,
        env={**environment, "PYTHONPATH": f"{place / 'services'}:{place}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode, output.decode()


@pytest.mark.timeout(_TIMEOUT)
async def test_code_of_the_release_before_passes_its_tests_on_this_schema(release: str, short_dir: Path) -> None:
    code, output = await _run(release, short_dir, *_TESTS)
    assert code == 0, f"{release}:\n{output}"


@pytest.mark.timeout(_TIMEOUT)
async def test_a_schema_that_asks_for_what_the_release_before_has_not_is_found_out(
    release: str, short_dir: Path
) -> None:
    code, output = await _run(release, short_dir, _TESTS[0], besides="ALTER TABLE users ADD nickname text NOT NULL")
    assert code == 1, output
    assert " failed" in output.splitlines()[-1] or " error" in output.splitlines()[-1], output
