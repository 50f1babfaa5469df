"""`python -m deploy.smoke_test`: the smoke test in a cluster by kubectl alone, with the image that is deployed."""

from __future__ import annotations

import sys

import yaml

from deploy import apply

_WAIT = 300


def main() -> int:
    """Exit codes: 0 a change went all the way, 1 not."""
    try:
        kubectl = apply.find_kubectl()
        image = apply.output(
            kubectl, "--namespace", apply.NAMESPACE, "get", "deployment", "user-service",
            "--output", "jsonpath={.spec.template.spec.containers[0].image}",
        )  # fmt: skip
        job = yaml.safe_load((apply.HERE / "smoke-test" / "job.yaml").read_text())
        job["spec"]["template"]["spec"]["containers"][0]["image"] = image
        apply.run(kubectl, "--namespace", apply.NAMESPACE, "delete", "job", "smoke-test", "--ignore-not-found")
        apply.apply(kubectl, [job])
        apply.job(kubectl, "wait", "smoke-test", str(_WAIT))
    except apply.DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
