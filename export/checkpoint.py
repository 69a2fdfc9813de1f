"""A MetaEmbed checkpoint on disk, known from its headers alone: which tensor lies where, and what model they make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.finite import count_not_finite
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.manifest import MANIFEST
from metaembed.runtime.tensors import META_TABLE, expected_tensors

from .checkpoint_names import canonical_name
from .safetensors_header import FLOAT_DTYPES, TensorRef, read_header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
METAEMBED_KEYS = (
    "num_query_prompt_tokens",
    "num_doc_prompt_tokens",
    "shared_query_doc_prompt",
    "dim",
    "use_bidirectional_attention",
)
META_MODULES = ("prompt_embed_tokens.", "custom_text_proj.")
HINTS = {META_TABLE: " (the Meta Tokens; a plain Qwen2.5-VL needs a MetaEmbed adapter, --adapter)"}
MAX_JSON_BYTES = 100_000_000
SCAN_VALUES = 1 << 18

Refs = dict[str, TensorRef]


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor that the encoder needs, by canonical name (runtime/tensors.py), with its place on disk.

    ``open`` reads headers only, a few hundred KB whatever the size of the model.
    """

    config: Mapping[str, Any]
    geometry: Geometry
    tensors: Refs

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read a HF folder: config.json with one model.safetensors or with shards and their index.

        Meta Tokens and projection may lie among the model's tensors or in safetensors files of their own beside them.

        Raises:
            UsageError: no checkpoint, or one of a kind that cannot be exported.
            BundleError: a file is damaged, or tensors are missing, of the wrong shape, or left over.
        """
        folder = Path(folder)
        return cls.assemble(str(folder), read_config(folder), read_tensors(folder))

    @classmethod
    def assemble(cls, origin: str, config: Mapping[str, Any], refs: Refs) -> Checkpoint:
        """Check tensors against what config.json describes; ``origin`` is named in errors."""
        config = with_projection(config, refs)
        geometry = Geometry.from_config(config)
        expected = expected_tensors(geometry)
        _check_tensors(origin, expected, refs)
        return cls(config, geometry, {name: refs[name] for name in expected})

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, links resolved, in a stable order."""
        return sorted({ref.path for ref in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the encoder uses."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """A read-only, memory-mapped view of one tensor; bf16 as ``ml_dtypes.bfloat16``."""
        return self.tensors[name].read()

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read weights once, in small pieces: those of ``names`` (a progress bar over them will do), or all.

        Raises:
            BundleError: a tensor holds NaN or infinity; it is named.
        """
        for name in self.tensors if names is None else names:
            for _ in finite_pieces(name, self.tensors[name], SCAN_VALUES):
                pass


def finite_pieces(name: str, ref: TensorRef, values: int) -> Iterator[np.ndarray]:
    """``ref.pieces``; a BundleError, which says ``name``, at the first piece that holds NaN or infinity."""
    for piece in ref.pieces(values):
        if count_not_finite(piece):
            count = sum(map(count_not_finite, ref.pieces(SCAN_VALUES)))
            raise BundleError(
                f"{name} in {ref.path} holds NaN or infinite values ({count} of {prod(ref.shape)}); "
                "fetch the file again, or take an earlier checkpoint if the training diverged"
            )
        yield piece


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a BundleError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise BundleError(f"{path} does not hold a JSON object")
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} has no config.json, so it is no Hugging Face checkpoint{_other_hint(folder)}")
    return read_json(folder / CONFIG)


def has_weights(folder: Path) -> bool:
    """Whether a folder has a model file or an index of shards."""
    return any((folder / file).is_file() for file in (SINGLE, INDEX))


def read_tensors(folder: Path) -> Refs:
    """Canonical name to place for every tensor of the folder that an encoder may use."""
    refs = _model_tensors(folder)
    return {**refs, **_separate_meta(folder, refs)}


def _model_tensors(folder: Path) -> Refs:
    if (folder / SINGLE).is_file():  # before an index beside it, as transformers has it
        return merge_headers([(folder / SINGLE).resolve()])
    if (folder / INDEX).is_file():
        return _collect_shards(folder)
    raise UsageError(f"{folder} has neither {SINGLE} nor {INDEX}{_adapter_hint(folder) or _pickle_hint(folder)}")


def merge_headers(paths: Iterable[Path]) -> Refs:
    """The tensors of several safetensors files by canonical name; two of the same name are an error."""
    found: Refs = {}
    for path in paths:
        for raw, ref in read_header(path).items():
            name = canonical_name(raw)
            if name in found:
                raise BundleError(f"{name} is stored twice, in {found[name].path.name} and as {raw} in {path.name}")
            if name is not None:
                found[name] = ref
    return found


def _collect_shards(folder: Path) -> Refs:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BundleError(f"{folder / INDEX} has no weight_map from tensors to file names")
    shards = {name: _shard_path(folder, name) for name in sorted(set(weight_map.values()))}
    found = merge_headers(shards.values())
    for raw, shard in weight_map.items():
        name = canonical_name(raw)
        if name is not None and (name not in found or found[name].path != shards[shard]):
            raise BundleError(f"{folder / INDEX} places {raw} in {shard}, which does not hold it")
    return found


def _shard_path(folder: Path, name: str) -> Path:
    """A shard's real path. Links may lead anywhere (a hub cache keeps its files elsewhere); the name may not."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise BundleError(f"{folder / INDEX} names a shard outside its folder: {name}")
    if not (folder / name).is_file():
        raise BundleError(f"{folder / INDEX} names the shard {name}, which is missing")
    return (folder / name).resolve()


def _separate_meta(folder: Path, refs: Refs) -> Refs:
    """Meta Tokens and projection from safetensors files that hold nothing else, where the model's own lack them."""
    model_files = {ref.path for ref in refs.values()}
    others = [path.resolve() for path in sorted(folder.glob("*.safetensors")) if path.resolve() not in model_files]
    found = merge_headers(
        path for path in others if _adds_meta({canonical_name(raw) for raw in read_header(path)}, refs)
    )
    return {name: ref for name, ref in found.items() if name not in refs}


def _adds_meta(names: set[str | None], refs: Refs) -> bool:
    """Whether these are names of Meta Tokens and projection alone, and ``refs`` lacks some."""
    return all((name or "").startswith(META_MODULES) for name in names) and not names <= set(refs)


def with_projection(config: Mapping[str, Any], refs: Refs) -> dict[str, Any]:
    """A base's config.json cannot know of the projection that MetaEmbed added; its tensor tells."""
    weight = refs.get("custom_text_proj.weight")
    if config.get("dim") is None and weight is not None and weight.shape:
        return {**config, "dim": weight.shape[0]}
    return dict(config)


def _check_tensors(origin: str, expected: Mapping[str, tuple[int, ...]], refs: Refs) -> None:
    both = [name for name in expected if name in refs]
    problems = [
        list_some("lacks", [name + HINTS.get(name, "") for name in expected if name not in refs]),
        list_some("has tensors that this model does not use:", [name for name in refs if name not in expected]),
        list_some(
            "has tensors of another shape than its config.json says:",
            [f"{name} {refs[name].shape}, not {expected[name]}" for name in both if refs[name].shape != expected[name]],
        ),
        list_some(
            "has weights that are not fp32, fp16 or bf16:",
            [f"{name} ({refs[name].dtype})" for name in both if refs[name].dtype not in FLOAT_DTYPES],
        ),
    ]
    if any(problems):
        raise BundleError(f"{origin} " + "; it ".join(filter(None, problems)))


def list_some(what: str, names: list[str], most: int = 3) -> str:
    """``what`` and the first few names, or nothing when there are none."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {', '.join(names[:most])}{rest}" if names else ""


def _other_hint(folder: Path) -> str:
    is_bundle = (folder / MANIFEST).is_file()
    return "; it is a bundle, made by an export: name what that was made of" if is_bundle else _adapter_hint(folder)


def _adapter_hint(folder: Path) -> str:
    is_adapter = (folder / "adapter_config.json").is_file()
    return "; it is an adapter: name its base model with --base, and this folder with --adapter" if is_adapter else ""


def _pickle_hint(folder: Path) -> str:
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    return "; pickled weights are not read: save the model with safe_serialization" if pickled else ""
