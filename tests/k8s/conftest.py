"""The manifests as objects, built by kustomize where there is one, else by a small stand-in.

The stand-in knows what our kustomizations use and refuses the rest, so that the tests need no more
than Python; a test holds it against the real one.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[2] / "k8s"
Object = dict[str, Any]

# What a kustomization of ours may say.
_KNOWN = {
    *("apiVersion", "kind", "resources", "components", "configMapGenerator", "configurations"),
    *("images", "labels", "namespace", "patches"),
}


@dataclass(frozen=True)
class Manifests:
    """What a kustomization builds."""

    objects: list[Object]

    def of(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str) -> Object:
        (item,) = self.of(kind)
        return item

    @property
    def pod_specs(self) -> list[Object]:
        return _pod_specs(self.objects)

    @property
    def containers(self) -> list[Object]:
        """Sidecars among them."""
        return _containers(self.objects)


def real_kustomize() -> list[str] | None:
    """The command that builds a folder, if this machine has one."""
    if path := shutil.which("kustomize"):
        return [path, "build"]
    if path := shutil.which("kubectl"):
        return [path, "kustomize"]
    return None


@cache
def built_by_kustomize(folder: str) -> Manifests:
    """Build with the real thing."""
    command = real_kustomize()
    assert command, "neither kustomize nor kubectl is on the PATH"
    done = subprocess.run([*command, K8S / folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"k8s/{folder}: {done.stderr}"
    return Manifests([item for item in yaml.safe_load_all(done.stdout) if item])


def built_here(folder: str) -> Manifests:
    """Build with the stand-in: ConfigMaps keep their names, without the hash."""
    return Manifests(list(_accumulate(K8S / folder, []).values()))


def _accumulate(folder: Path, inherited: list[Object]) -> dict[tuple[str, str], Object]:
    content = _load(folder / "kustomization.yaml")
    unknown = content.keys() - _KNOWN
    assert not unknown, f"{folder}: teach this renderer about {sorted(unknown)}"
    # A Component changes what its user has gathered so far.
    objects = {_key(item): item for item in inherited}
    for name in content.get("resources", []):
        path = folder / name
        items = _accumulate(path, []).values() if path.is_dir() else _load_all(path)
        objects |= {_key(item): item for item in items}
    for generator in content.get("configMapGenerator", []):
        _generate(generator, folder, objects)
    for name in content.get("components", []):
        objects = _accumulate(folder / name, list(objects.values()))
    for patch in content.get("patches", []):
        _patch(_load(folder / patch["path"]), patch["target"], objects)
    for item in objects.values():
        for label in content.get("labels", []):
            item["metadata"].setdefault("labels", {}).update(label["pairs"])
        if "namespace" in content:
            item["metadata"]["namespace"] = content["namespace"]
    for image in content.get("images", []):
        for container in _containers(list(objects.values())):
            if container["image"].rpartition(":")[0] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


def _generate(generator: Object, folder: Path, objects: dict[tuple[str, str], Object]) -> None:
    data = {Path(name).name: (folder / name).read_text() for name in generator.get("files", [])}
    data |= dict(text.split("=", 1) for text in generator.get("literals", []))
    key = ("ConfigMap", generator["name"])
    match generator.get("behavior", "create"):
        case "create":
            assert key not in objects, f"{folder}: {key} is there already"
            meta = {"name": generator["name"]}
            objects[key] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
        case "merge":
            objects[key]["data"] |= data
        case "replace":
            objects[key]["data"] = data


def _patch(patch: Any, target: Object, objects: dict[tuple[str, str], Object]) -> None:
    label, _, value = target.get("labelSelector", "").partition("=")
    for (kind, name), item in objects.items():
        labels = item["metadata"].get("labels", {})
        if kind != target["kind"] or name != target.get("name", name):
            continue
        if label and labels.get(label) != value:
            continue
        if isinstance(patch, list):
            for operation in patch:
                _operate(item, operation)
        else:
            change = {key: value for key, value in patch.items() if key != "metadata"}
            _merge(item, change)


def _operate(item: Any, operation: Object) -> None:
    """One operation of a JSON patch."""
    *path, last = operation["path"].strip("/").split("/")
    for step in path:
        item = item[int(step)] if isinstance(item, list) else item[step]
    assert operation["op"] == "add" or last in item, f"nothing to replace at {operation['path']}"
    item[last] = operation["value"]


def _merge(item: Object, change: Object) -> None:
    """A strategic merge, as far as lists of named things go."""
    for key, value in change.items():
        if isinstance(value, dict) and key in item:
            _merge(item[key], value)
        elif isinstance(value, list) and key in item:
            names = {entry["name"] for entry in value}
            item[key] = value + [entry for entry in item[key] if entry["name"] not in names]
        else:
            item[key] = copy.deepcopy(value)


def _load_all(path: Path) -> list[Object]:
    # Aliases would make two places one object; what a patch changes here would change there.
    return [_unshared(item) for item in yaml.safe_load_all(path.read_text())]


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _key(item: Object) -> tuple[str, str]:
    return item["kind"], item["metadata"]["name"]


def _pod_specs(value: Any) -> list[Object]:
    """Every pod's spec in an object or a list of them."""
    if isinstance(value, dict):
        found = [value] if isinstance(value.get("containers"), list) else []
        return found + [spec for item in value.values() for spec in _pod_specs(item)]
    return [spec for item in value for spec in _pod_specs(item)] if isinstance(value, list) else []


def _containers(value: Any) -> list[Object]:
    """Every container, the sidecars among them."""
    return [
        container
        for spec in _pod_specs(value)
        for container in spec.get("initContainers", []) + spec["containers"]
    ]


@pytest.fixture(scope="session")
def build() -> Callable[[str], Manifests]:
    """The objects of a folder below k8s/."""
    return built_by_kustomize if real_kustomize() else built_here


@pytest.fixture(scope="session")
def build_both() -> Callable[[str], tuple[Manifests, Manifests]]:
    """The same by kustomize and by the stand-in."""
    if not real_kustomize():
        pytest.skip("neither kustomize nor kubectl is on the PATH; the stand-in is not compared")
    return lambda folder: (built_by_kustomize(folder), built_here(folder))
