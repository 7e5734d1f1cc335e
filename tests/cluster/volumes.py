"""A pod's volumes as folders of this machine. What a ConfigMap holds is written once: later changes do not reach the pod."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.cluster.environment import FindObject, Unresolved, amount, field_of, resource_of, texts_of
from tests.cluster.refusals import Document
from tests.cluster.sandbox import Mount

MountMemory = Callable[[Path, int | None], None]
"""Puts a memory file system of a size at a folder."""


def prepare_volume(
    volume: Document, folder: Path, claims: Path, pod: Document, find: FindObject, mount_memory: MountMemory
) -> Path:
    """The folder that a volume is; files of ConfigMaps and the like are in it then. `claims` has one folder a claim."""
    if "persistentVolumeClaim" in volume:  # it outlives the pod
        shared: Path = claims / pod["metadata"]["namespace"] / volume["persistentVolumeClaim"]["claimName"]
        shared.mkdir(parents=True, exist_ok=True)
        return shared
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    folder.mkdir(parents=True, exist_ok=True)
    if "emptyDir" in volume:
        empty = volume["emptyDir"] or {}
        folder.chmod(0o777)
        if empty.get("medium") == "Memory":
            mount_memory(folder, int(amount(empty["sizeLimit"])) if "sizeLimit" in empty else None)
        return folder
    sources = volume["projected"]["sources"] if "projected" in volume else [volume]
    mode = (volume.get("projected") or next(iter(_source(each) for each in sources))).get("defaultMode", 0o644)
    for source in sources:
        for name, (text, own_mode) in _files(source, pod, find).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(own_mode or mode)
    return folder


def mounts_of(container: Document, folders: dict[str, Path]) -> tuple[Mount, ...]:
    """Where a container sees which volume."""
    found = []
    for mount in container.get("volumeMounts", ()):
        source = folders[mount["name"]] / mount.get("subPath", "")
        if "subPath" in mount and not source.exists():
            source.mkdir(parents=True)
        found.append(Mount(source, os.path.normpath(mount["mountPath"]), mount.get("readOnly", False)))
    return tuple(found)


def _source(source: Document) -> Document:
    for kind in ("configMap", "secret", "downwardAPI"):
        if kind in source:
            found: Document = source[kind]
            return found
    kinds = ", ".join(key for key in source if key != "name")
    raise Unresolved(f"the cluster double has no volumes of kind {kinds}")


def _files(source: Document, pod: Document, find: FindObject) -> dict[str, tuple[str, int | None]]:
    """Texts and modes by path."""
    described = _source(source)
    if "downwardAPI" in source:
        containers = pod["spec"]["containers"]
        return {
            item["path"]: (
                field_of(pod, item["fieldRef"]["fieldPath"])
                if "fieldRef" in item
                else resource_of(containers, containers[0], item["resourceFieldRef"]),
                item.get("mode"),
            )
            for item in described.get("items", ())
        }
    kind = "ConfigMap" if "configMap" in source else "Secret"
    name = described.get("name") or described["secretName"]
    data = texts_of(kind, name, find, optional=described.get("optional", False))
    if "items" not in described:
        return {key: (text, None) for key, text in data.items()}
    missing = [item["key"] for item in described["items"] if item["key"] not in data]
    if missing and not described.get("optional", False):
        raise Unresolved(f"references non-existent config key: {missing[0]} in {kind} {name}")
    return {item["path"]: (data[item["key"]], item.get("mode")) for item in described["items"] if item["key"] in data}
