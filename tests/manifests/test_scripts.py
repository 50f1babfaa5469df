"""The hook that waits for the Job, and the rollout without skaffold, with a kubectl that says what a cluster would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.manifests.objects import ROOT, kubectl

# Answers `get job` with the next of some states, the last one again and again; notes every call with what it was given.
_KUBECTL = """#!{python}
import json, pathlib, subprocess, sys
place, arguments = pathlib.Path({place!r}), sys.argv[1:]
if arguments[0] == "kustomize":
    sys.exit(subprocess.run([{real!r}, *arguments]).returncode)
given = sys.stdin.read() if "-" in arguments else ""
with (place / "calls").open("a") as calls:
    calls.write(json.dumps([arguments, given]) + "\\n")
if "current-context" in arguments:
    print("kind-tidings")
elif "deployment" in arguments:
    print("localhost:5000/tidings:abc-1", end="")
elif "get" in arguments and "job" in arguments:
    states = json.loads((place / "states").read_text())
    print(states[0], end="")
    (place / "states").write_text(json.dumps(states[1:] or states))
elif "logs" in arguments:
    print("what the Job has said")
elif "rollout" in arguments and (place / "stuck").exists():
    sys.exit("timed out waiting for the condition")
"""


@dataclass(frozen=True)
class Cluster:
    """The stand-in and what it was asked."""

    place: Path

    def says(self, *states: str) -> None:
        """What the Job's conditions are, look by look."""
        (self.place / "states").write_text(json.dumps(states))

    @property
    def calls(self) -> list[tuple[list[str], str]]:
        """Arguments and standard input of each call."""
        path = self.place / "calls"
        return [(arguments, given) for arguments, given in map(json.loads, path.read_text().splitlines())]

    @property
    def applied(self) -> list[list[str]]:
        """The objects of each `apply`."""
        return [
            [f"{one['kind']}/{one['metadata']['name']}" for one in yaml.safe_load_all(given)]
            for arguments, given in self.calls
            if arguments[0] == "apply"
        ]

    def run(self, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs something that finds this kubectl and no other."""
        environment = {
            **os.environ, "PATH": f"{self.place}:/usr/bin:/bin", "POLL_SECONDS": "0.01", "PYTHONPATH": str(ROOT),
            **variables,
        }  # fmt: skip
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A cluster whose Job has not been looked at."""
    for name in ("kubectl", "kind"):
        (tmp_path / name).write_text(_KUBECTL.format(python=sys.executable, place=str(tmp_path), real=str(kubectl())))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").touch()
    return Cluster(tmp_path)


_JOB = ROOT / "deploy" / "job.sh"


def test_a_job_that_succeeds_is_waited_for(cluster: Cluster) -> None:
    cluster.says("", "", "SuccessCriteriaMet", "SuccessCriteriaMet Complete")
    done = cluster.run("sh", _JOB, "wait", "tidings", "migrations", "60", SKAFFOLD_KUBE_CONTEXT="kind-x")
    assert (done.returncode, done.stderr) == (0, "")
    assert "what the Job has said" in done.stdout
    assert done.stdout.endswith("the job migrations has succeeded\n")
    looks = [arguments for arguments, _ in cluster.calls if "get" in arguments]
    assert len(looks) == 4
    assert {tuple(arguments[:4]) for arguments in looks} == {("--context", "kind-x", "--namespace", "tidings")}


def test_a_job_that_fails_ends_the_wait_with_its_log(cluster: Cluster) -> None:
    cluster.says("", "FailureTarget", "FailureTarget Failed")
    done = cluster.run("sh", _JOB, "wait", "tidings", "migrations", "60")
    assert done.returncode == 1
    assert "what the Job has said" in done.stdout
    assert done.stderr == "error: the job migrations has failed; nothing after it is rolled out\n"


def test_a_job_that_does_not_end_is_given_up(cluster: Cluster) -> None:
    cluster.says("")
    done = cluster.run("sh", _JOB, "wait", "tidings", "migrations", "0")
    assert done.returncode == 1
    assert "has not ended within 0 s" in done.stderr
    assert any("pods" in arguments for arguments, _ in cluster.calls)


@pytest.mark.parametrize(("state", "deletes"), [("Failed", 1), ("Complete", 0), ("", 0)])
def test_only_a_failed_job_is_forgotten(cluster: Cluster, state: str, deletes: int) -> None:
    cluster.says(state)
    assert cluster.run("sh", _JOB, "forget-failed", "tidings", "migrations").returncode == 0
    assert sum("delete" in arguments for arguments, _ in cluster.calls) == deletes


def test_wrong_arguments_are_refused(cluster: Cluster) -> None:
    for arguments in ((), ("wait",), ("wait", "tidings", "migrations"), ("look", "tidings", "migrations")):
        assert cluster.run("sh", _JOB, *arguments).returncode == 2, arguments
    assert cluster.calls == []


# Beside this Python there is a kubectl, which is not to be used.
_WITH_STAND_IN = """
import sys
from deploy import apply, smoke_test
apply.find_kubectl = lambda: sys.argv[1]
sys.exit({call})
"""


def _deploy(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cluster.run(
        # Safe path: `deploy` is the copy, which has secrets, and not what is where the tests run.
        sys.executable, "-P", "-c",
        _WITH_STAND_IN.format(call="apply.main(sys.argv[2:])"),
        str(cluster.place / "kubectl"), *arguments, PYTHONPATH=str(folder.parent),
    )  # fmt: skip


def test_services_follow_the_migrations(cluster: Cluster, deploy_folder: Path) -> None:
    cluster.says("", "", "Complete")
    done = _deploy(cluster, deploy_folder, "--image", "tidings:abc-1")
    assert done.returncode == 0, done.stderr
    before, after = cluster.applied
    assert "Job/migrations-abc-1" in before
    assert "Namespace/tidings" in before
    assert {"Deployment/user-service", "Deployment/notification-service"} <= set(after)
    assert not {"Deployment/user-service", "Deployment/notification-service"} & set(before)
    # Of ours; those of others stay as they are.
    images = {
        container["image"]
        for arguments, given in cluster.calls
        if arguments[0] == "apply"
        for one in yaml.safe_load_all(given)
        if one["kind"] in {"Deployment", "Job"}
        for container in one["spec"]["template"]["spec"]["containers"]
        if container["image"].startswith("tidings")
    }
    assert images == {"tidings:abc-1"}
    loaded = [arguments for arguments, _ in cluster.calls if arguments[0] == "load"]
    assert loaded == [["load", "docker-image", "tidings:abc-1", "--name", "tidings"]]
    waited = [arguments[4] for arguments, _ in cluster.calls if "rollout" in arguments]
    assert {"deployment/user-service", "deployment/notification-service", "statefulset/postgres"} <= set(waited)


def test_a_failed_migration_ends_it_before_the_services(cluster: Cluster, deploy_folder: Path) -> None:
    cluster.says("", "Failed")
    done = _deploy(cluster, deploy_folder)
    assert done.returncode == 1
    assert "the job migrations-development has failed" in done.stderr
    [before] = cluster.applied
    assert "Job/migrations-development" in before
    assert not [arguments for arguments, _ in cluster.calls if "rollout" in arguments]


def test_a_rollout_that_does_not_get_ready_is_said(cluster: Cluster, deploy_folder: Path) -> None:
    cluster.says("Complete")
    (cluster.place / "stuck").touch()
    done = _deploy(cluster, deploy_folder)
    assert done.returncode == 1
    assert "timed out waiting" in done.stderr


@pytest.mark.parametrize("image", ["tidings", "tidings:", "other:1", "localhost:5000/tidings", "x/tidings-y:1"])
def test_an_image_that_names_no_job_is_refused(cluster: Cluster, deploy_folder: Path, image: str) -> None:
    done = _deploy(cluster, deploy_folder, "--image", image)
    assert done.returncode == 2
    assert cluster.calls == []


@pytest.mark.parametrize(("state", "code"), [("Complete", 0), ("Failed", 1)])
def test_the_smoke_test_is_run_anew_with_what_is_deployed(
    cluster: Cluster, deploy_folder: Path, state: str, code: int
) -> None:
    cluster.says("", state)
    script = _WITH_STAND_IN.format(call="smoke_test.main()")
    done = cluster.run(
        sys.executable, "-P", "-c", script, cluster.place / "kubectl", PYTHONPATH=str(deploy_folder.parent)
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "what the Job has said" in done.stdout
    [given] = [given for arguments, given in cluster.calls if arguments[0] == "apply"]
    [container] = yaml.safe_load(given)["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "localhost:5000/tidings:abc-1"
    verbs = ["delete" if "delete" in arguments else arguments[0] for arguments, _ in cluster.calls]
    assert verbs.index("delete") < verbs.index("apply")
