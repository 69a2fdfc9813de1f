"""The engines that a bundle carries: which of them this machine may load, and if none, what to do about it.

Deserialising a plan runs its code, so a plan is loaded only when bundle.json vouches for its bytes and its build record
fits this bundle, this GPU and this TensorRT. Nothing here imports TensorRT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from .devices import Capability
from .errors import BundleError
from .manifest import MANIFEST, Bundle, FileRecord, rebuild_command, remedy

ENGINES_FORMAT, ENGINES_VERSION = "metaembed-engines", 1
BUILD_RECORD = "build.json"


def engines_folder(target: str) -> str:
    """Where a bundle keeps the engines of one target."""
    return f"engines/{target}"


@dataclass(frozen=True)
class EngineSet:
    """The engines of one target, as their build.json describes them. ``plans``: graph -> paths inside the bundle."""

    target: str
    capability: Capability
    flavour: str
    version: str
    bundle: str
    plans: Mapping[str, tuple[str, ...]]

    def misfit(self, fingerprint: str, capability: Capability, installed: Mapping[str, str]) -> str | None:
        """Why this set must not be loaded here, or None when it may be. ``installed``: flavour -> version."""
        if self.bundle != fingerprint:
            return "were built from another bundle"
        if self.capability != capability:
            return f"are for compute capability {_dotted(self.capability)}, and this GPU has {_dotted(capability)}"
        here = installed.get(self.flavour)
        if here is None:
            return f"need {self.flavour}, which is not installed"
        # A plan fits exactly the release that wrote it: major, minor, patch and build (TensorRT support matrix).
        if here != self.version:
            return f"were built by {self.flavour} {self.version}, and this is {here}"
        return None


def read_engine_sets(bundle: Bundle) -> list[EngineSet]:
    """All engine sets that bundle.json vouches for.

    Raises:
        BundleError: a build record is damaged, of another format, or does not agree with bundle.json.
    """
    records = [name for name in bundle.manifest.files if PurePosixPath(name).match(f"engines/*/{BUILD_RECORD}")]
    return [_read_set(bundle, name) for name in sorted(records)]


def choose_engines(bundle: Bundle, capability: Capability, installed: Mapping[str, str]) -> EngineSet | None:
    """The first set that fits this machine, TensorRT's own before TensorRT-RTX's; None when the bundle carries none.

    Raises:
        BundleError: there are engines, and none fits; the sentence names the command that builds one.
    """
    sets = sorted(read_engine_sets(bundle), key=lambda found: found.flavour)
    reasons = []
    for found in sets:
        reason = found.misfit(bundle.manifest.fingerprint, capability, installed)
        if reason is None:
            return found
        reasons.append(f"the engines for {found.target} {reason}")
    if reasons:
        target = next((found.target for found in sets if found.capability == capability), None)
        raise BundleError(f"{'; '.join(reasons)}; build with: {rebuild_command(bundle.folder, target)}")
    return None


def vouched_plan(bundle: Bundle, name: str) -> FileRecord:
    """The record that bundle.json keeps of a plan; a BundleError when it vouches for no such file."""
    if name not in bundle.manifest.files:
        raise BundleError(f"{bundle.folder} has no {name}; {remedy(bundle.folder, name)}")
    return bundle.manifest.files[name]


def _read_set(bundle: Bundle, name: str) -> EngineSet:
    path = bundle.path(name)
    folder = str(PurePosixPath(name).parent)
    try:
        data = json.loads(path.read_bytes())
        if (data["format"], data["format_version"]) != (ENGINES_FORMAT, ENGINES_VERSION):
            raise BundleError(
                f"{path} is of format {data['format_version']!r}, which this version does not read; "
                f"{remedy(bundle.folder, name)}"
            )
        major, minor = data["compute_capability"]
        plans: dict[str, list[str]] = {}
        for engine in data["engines"]:
            plans.setdefault(engine["graph"], []).append(_check_plan(bundle, folder, engine))
        return EngineSet(
            target=str(data["target"]),
            capability=(int(major), int(minor)),
            flavour=str(data["flavour"]),
            version=str(data["version"]),
            bundle=str(data["bundle"]),
            plans={graph: tuple(paths) for graph, paths in plans.items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        found = f"{path} is damaged ({type(error).__name__}: {error})"
        raise BundleError(f"{found}; {remedy(bundle.folder, name)}") from None


def _check_plan(bundle: Bundle, folder: str, engine: Mapping[str, Any]) -> str:
    """The plan's path, when build.json and bundle.json agree about its bytes: a swapped or renamed plan does not."""
    name, advice = f"{folder}/{engine['plan']}", remedy(bundle.folder, f"{folder}/{BUILD_RECORD}")
    record = bundle.manifest.files.get(name)
    if record is None:
        found = f"{bundle.folder / folder / BUILD_RECORD} names a plan that {MANIFEST} does not vouch for"
        raise BundleError(f"{found} ({engine['plan']!r}); {advice}")
    if (record.bytes, record.sha256) != (engine["bytes"], engine["sha256"]):
        raise BundleError(f"{bundle.folder / name} is not the plan that its {BUILD_RECORD} describes; {advice}")
    return name


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
