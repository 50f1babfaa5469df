"""Files of the operator's own: the example of docs/kubernetes.md, rendered, and read by the service.

Without them, and without keys of links, what is deployed is what is built in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from notification_service import bootstrap, rules
from notification_service.bootstrap import Files
from notification_service.settings import NotificationServiceSettings
from servicekit.settings import InvalidSettingsError, load
from tests.manifests import configured, kinds, wiring_rules
from tests.manifests.objects import ROOT, Objects, Pod, environment, pods, render

_MOUNTED = "/etc/tidings/"
# What the files of the example say.
_TEXTS = {
    "rules.toml": """
[[rules]]
name = "moved"
on = ["UPDATED"]
changed_fields = ["email"]
template = "moved"
category = "billing"
channels = ["email"]
""",
    "categories.toml": """
[[categories]]
name = "billing"
mandatory = true
""",
    "moved.subject.txt": "You have moved",
    "moved.txt": "Hello {{ name }}",
    "moved.html": "<p>Hello {{ name }}</p>",
}


def _example() -> dict[str, Any]:
    """The kustomization of the documents."""
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    [block] = [one for one in re.findall(r"(?ms)^```yaml\n(.*?)^```", text) if "notification-service-files" in one]
    found: dict[str, Any] = yaml.safe_load(block)
    return found


def _service(objects: Objects) -> Pod:
    [pod] = [one for one in pods(objects) if one.name == "notification-service"]
    return pod


def _read(objects: Objects, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: str) -> Files:
    """What the service makes of its variables and mounted files, which are below another folder here."""
    pod = _service(objects)
    [container] = pod.spec["containers"]
    for mount in container["volumeMounts"]:
        if "configMap" in next(one for one in pod.spec["volumes"] if one["name"] == mount["name"]):
            (folder / mount["mountPath"].removeprefix(_MOUNTED)).mkdir(parents=True)
    for path, text in configured.files(pod, objects).items():
        (folder / path.removeprefix(_MOUNTED)).write_text(text, encoding="utf-8")
    values: Mapping[str, str] = {**environment(container, objects), **more}
    for name, value in values.items():
        # What comes of Secrets is not here, and without callers no address but this machine's is served.
        if name.startswith("TIDINGS_NOTIFICATIONS_") and not re.search(r"CALLERS|TLS|USERS_.*FILE|SMTP|LISTEN", name):
            monkeypatch.setenv(name, value.replace(_MOUNTED, f"{folder}/"))
    return bootstrap.read(load(NotificationServiceSettings))


def test_the_files_of_the_example_are_those_that_the_service_goes_by(
    deploy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = deploy_folder / "overlays" / "mine" / "services"
    (mine / "files").mkdir(parents=True)
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(_example()), encoding="utf-8")
    for name, text in _TEXTS.items():
        (mine / "files" / name).write_text(text, encoding="utf-8")
    objects = render(mine)
    assert [complaint for one in objects for complaint in kinds.complaints(one)] == []
    for rule in (wiring_rules.variables, wiring_rules.references, wiring_rules.mounts):
        assert list(rule(objects)) == []
    assert set(configured.files(_service(objects), objects)) == {
        f"/etc/tidings/{'files' if name.endswith('.toml') else 'templates'}/{name}" for name in _TEXTS
    }
    found = _read(objects, tmp_path, monkeypatch, TIDINGS_NOTIFICATIONS_PUBLIC_URL="")
    # Its template is there, or the service would have refused the rule.
    assert [rule.name for rule in found.composer.rules] == ["moved"]
    assert found.categories.of("billing").mandatory


def test_a_file_that_is_set_and_not_there_is_said(
    deploy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render(deploy_folder / "base" / "services")
    with pytest.raises(InvalidSettingsError, match="TIDINGS_NOTIFICATIONS_RULES_FILE"):
        _read(objects, tmp_path, monkeypatch, TIDINGS_NOTIFICATIONS_RULES_FILE="/etc/tidings/files/rules.toml")


def test_without_files_and_keys_the_base_is_what_is_built_in(
    deploy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render(deploy_folder / "base" / "services")
    assert list(wiring_rules.link_keys(objects)) == []
    assert list(wiring_rules.mounts(objects)) == []
    assert configured.files(_service(objects), objects) == {}
    found = _read(objects, tmp_path, monkeypatch)
    assert not (tmp_path / "links").exists()
    assert found.links is None
    assert found.composer.rules == rules.read(None).rules


@pytest.mark.parametrize("overlay", ["kind", "production"])
def test_with_links_the_keys_are_required(
    overlays: dict[str, Objects], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: str
) -> None:
    [links] = [one for one in _service(overlays[overlay]).spec["volumes"] if one["name"] == "links"]
    assert links["secret"]["optional"] is False
    with pytest.raises(InvalidSettingsError, match=r"the links are signed, and there is no file .*links\.keys"):
        _read(overlays[overlay], tmp_path, monkeypatch)
