"""What `kubectl kustomize` makes of a folder, for the few things that the manifests use of it: resources, components,
a namespace, and JSON patches by kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "patches"}
NOT_IN_A_NAMESPACE = {"Namespace"}


def compose(folder: Path) -> list[Manifest]:
    """The manifests of a folder. Raises ValueError for what it names and is not there, or does not fit."""
    told = read(folder / "kustomization.yaml")[0]
    if unknown := told.keys() - KNOWN:
        raise ValueError(f"{folder}: unknown {unknown}")
    found: list[Manifest] = []
    for name in told.get("resources", []):
        found += compose(folder / name) if (folder / name).is_dir() else read(folder / name)
    for name in told.get("components", []):
        component = folder / name
        inner = read(component / "kustomization.yaml")[0]
        if inner["kind"] != "Component":
            raise ValueError(f"{component} is a {inner['kind']}")
        found += [each for own in inner.get("resources", []) for each in read(component / own)]
        apply(inner.get("patches", []), component, found)
    apply(told.get("patches", []), folder, found)
    for each in found:
        if "namespace" in told and each["kind"] not in NOT_IN_A_NAMESPACE:
            each["metadata"]["namespace"] = told["namespace"]
    return found


def read(file: Path) -> list[Manifest]:
    """The documents of a file. Raises ValueError if it is not there."""
    if not file.is_file():
        raise ValueError(f"{file} is named, and is not there")
    return [each for each in yaml.safe_load_all(file.read_text()) if each]


def apply(patches: list[Manifest], folder: Path, manifests: list[Manifest]) -> None:
    """Apply each patch to the manifests of its kind."""
    for patch in patches:
        [operations] = read(folder / patch["path"])
        for each in manifests:
            if each["kind"] == patch["target"]["kind"]:
                for operation in operations:
                    _operate(each, **operation)


def _operate(manifest: Manifest, op: str, path: str, value: Any) -> None:
    *way, last = (part.replace("~1", "/").replace("~0", "~") for part in path.removeprefix("/").split("/"))
    at: Any = manifest
    try:
        for part in way:
            at = at[int(part)] if isinstance(at, list) else at[part]
        there = last in at
    except (KeyError, IndexError, ValueError, TypeError):
        raise ValueError(f"{op} {path}: there is nothing") from None
    if op == "add" or (op == "replace" and there):
        at[last] = value
    elif op != "test" or not there or at[last] != value:
        raise ValueError(f"{op} {path}: found {at.get(last)!r}")
