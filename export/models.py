"""MODEL, as the user names it, to folders on this disk: a known size, a folder, or a hub id."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from metaembed.runtime.errors import UsageError
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.known_models import KNOWN, KnownModel
from metaembed.runtime.manifest import check_name
from metaembed.runtime.projection import with_stored_projection

from .adapter import ADAPTER_CONFIG, Adapter, check_adapter, open_with_adapter
from .checkpoint import Checkpoint, has_weights, read_config, read_json
from .safetensors_writer import Advance

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
HOME = "METAEMBED_HOME"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Folder = str | Path


@dataclass(frozen=True)
class ResolvedModel:
    """What MODEL stands for. Without weights ``base`` is None, and ``looked`` tells where they were sought.

    ``config`` is the base's, with the adapter's MetaEmbed settings.
    """

    name: str
    config: Mapping[str, Any]
    base: Path | None = None
    adapter: Path | None = None
    looked: tuple[str, ...] = ()

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_config(self.config)

    def require_base(self) -> Path:
        """The base folder.

        Raises:
            UsageError: there is none; it says where weights were sought and how to name them.
        """
        if self.base is None:
            raise UsageError(
                f"no weights of {self.name} were found (looked at {', '.join(self.looked)}); name them with"
                " --base FOLDER and --adapter FOLDER, or rehearse with --random-weights SEED"
            )
        return self.base

    def open(self, merged: Folder, *, advance: Advance = lambda nbytes: None) -> Checkpoint:
        """Open the checkpoint; a LoRA adapter is merged into the new folder ``merged`` first.

        Raises:
            UsageError: no weights, or an adapter that cannot be merged.
            BundleError: a file is damaged, or the tensors make no whole checkpoint.
        """
        base = self.require_base()
        if self.adapter is None:
            return Checkpoint.open(base)
        return open_with_adapter(base, self.adapter, merged, advance=advance)

    def check(self) -> None:
        """Refuse, from headers alone, what ``open`` would: tensors that are missing, misshapen or cut short."""
        if self.adapter is None:
            Checkpoint.open(self.require_base())
        else:
            check_adapter(self.require_base(), self.adapter)


def resolve_model(model: str, *, base: Folder | None = None, adapter: Folder | None = None) -> ResolvedModel:
    """Find what ``model`` names: ``demo``, ``3b``, ``7b``, ``32b``, a folder, or a hub id in the local cache.

    A known size takes its weights from ``base`` (a folder or hub id), METAEMBED_HOME/<name> or the hub cache. A folder
    that is a PEFT adapter takes ``base``, or the base that it names itself. Nothing is downloaded.

    Raises:
        UsageError: no such model, a base of another size than the name says, or no adapter where one is named.
        BundleError: config.json or a file of the adapter is damaged.
    """
    for option, place in (("--model", model), ("--base", base), ("--adapter", adapter)):
        if place == "":  # an unset variable of a shell; as a path it would be the current folder
            raise UsageError(f"{option} is empty; name a folder or a hub id, or '.' for the current folder")
    if model.lower() in KNOWN:
        return _resolve_known(KNOWN[model.lower()], base, adapter)
    if model.lower() == DEMO:
        return _resolve_folder(DEMO, DEMO_FOLDER, base, adapter)
    if Path(model).is_dir() or _HUB_ID.fullmatch(model):
        return _resolve_folder(model, find_folder(model), base, adapter)
    close = difflib.get_close_matches(model, [DEMO, *KNOWN], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"there is no model {model!r}: name {DEMO}, {', '.join(KNOWN)}, a folder, or a hub id{hint}")


def find_folder(place: Folder) -> Path:
    """A folder as it is, or the folder of a hub id in the local cache."""
    check_name(Path(place))
    if Path(place).is_dir():
        return Path(place)
    cached = _cached_folder(str(place))
    if cached is None:
        raise UsageError(
            f"{place} is neither a folder nor in the hub cache {constants.HF_HUB_CACHE}; name a folder, or fetch it"
            f" where there is a network: hf download {place}"
        )
    return cached


def _resolve_known(known: KnownModel, base: Folder | None, adapter: Folder | None) -> ResolvedModel:
    home = _home_folder(known.name)
    if base is None and home is not None:
        found = _resolve_folder(known.name, home, None, adapter)
    elif base is not None or (base := _cached_folder(known.base)) is not None:
        found = _resolve_folder(known.name, find_folder(base), None, adapter)
    else:
        hub = f"{known.base} in the hub cache {constants.HF_HUB_CACHE}"
        home_place = f"{HOME} ({os.environ.get(HOME) or 'not set'})"
        return _with_adapter(known.name, known.config, None, adapter, ("--base", home_place, hub))
    _check_size(found, known)
    return found


def _resolve_folder(name: str, folder: Path, base: Folder | None, adapter: Folder | None) -> ResolvedModel:
    """A checkpoint with or without ``adapter``; or an adapter with ``base`` or the base that it names."""
    check_name(folder)
    if adapter is None and has_weights(folder) and (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{folder} holds a model and an adapter; merge them with --adapter {folder}, "
            f"or move {ADAPTER_CONFIG} away if the model is merged already"
        )
    if has_weights(folder) or not (folder / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise UsageError(f"{name} is a whole checkpoint; --base goes with {', '.join(KNOWN)} or an adapter folder")
        return _with_adapter(name, read_config(folder), folder, adapter)
    if adapter is not None:
        raise UsageError(f"{folder} is an adapter itself; name its base with --base and drop --adapter")
    base = base or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, (str, Path)):
        raise UsageError(f"{folder} is an adapter that does not name its base model; name it with --base")
    found = find_folder(base)
    return _with_adapter(name, read_config(found), found, folder)


def _with_adapter(
    name: str, config: Mapping[str, Any], base: Path | None, adapter: Folder | None, looked: tuple[str, ...] = ()
) -> ResolvedModel:
    """The model as the base's projection and the adapter, if there is one, configure it; headers are read, no more."""
    if base is not None:
        config = with_stored_projection(config, base)
    if adapter is None:
        return ResolvedModel(name, config, base, None, looked)
    folder = find_folder(adapter)
    return ResolvedModel(name, Adapter.open(folder).configure(config), base, folder, looked)


def _check_size(found: ResolvedModel, known: KnownModel) -> None:
    has, wants = found.geometry.text, known.geometry.text
    if (has.hidden, has.layers) != (wants.hidden, wants.layers):
        raise UsageError(
            f"{found.base} is no {known.name}: it has {has.layers} layers of {has.hidden} dims,"
            f" {known.name} has {wants.layers} of {wants.hidden}"
        )


def _home_folder(name: str) -> Path | None:
    home = os.environ.get(HOME)
    folder = Path(home or ".").expanduser() / name
    return folder if home and folder.is_dir() else None


def _cached_folder(hub_id: str) -> Path | None:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
