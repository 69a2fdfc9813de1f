"""PEFT LoRA adapters: what one changes, and a merge that streams W + scale * B A tensor by tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.finite import count_not_finite

from .checkpoint import (
    METAEMBED_KEYS,
    Checkpoint,
    Refs,
    finite_pieces,
    list_some,
    read_config,
    read_json,
    read_tensors,
    with_projection,
)
from .checkpoint_names import canonical_name
from .safetensors_header import FLOAT_DTYPES, TensorRef, read_header
from .safetensors_writer import SHARD_BYTES, Advance, TensorSpec, write_checkpoint

T = TypeVar("T")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
MERGE_VALUES = 1 << 22  # values merged at a time: 16 MiB in fp32

# What changes the meaning of an adapter beyond W + scale * B A, by its key in adapter_config.json.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "lora_bias": "LoRA biases (lora_bias)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token rows (trainable_token_indices)",
    "target_parameters": "bare parameters (target_parameters)",
}
# The others (PiSSA, OLoRA, CorDA, LoftQ ...) change the base's weights before training.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraUpdate:
    """One low-rank update: ``scale * b @ a``, with a [rank, in] and b [out, rank]."""

    a: TensorRef
    b: TensorRef
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return (self.b.shape[0], self.a.shape[1])


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder brings, by canonical name: low-rank ``updates`` and whole tensors (``modules_to_save``)."""

    folder: Path
    config: Mapping[str, Any]
    updates: Mapping[str, LoraUpdate]
    replacements: Refs

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Read adapter_config.json and the header of adapter_model.safetensors.

        Raises:
            UsageError: no adapter, or one of a kind that is not plain LoRA; the kind is named.
            BundleError: a file is damaged, half of an update is missing, or a tensor is stored twice.
        """
        folder = Path(folder)
        config = _read_adapter_config(folder)
        halves: dict[str, dict[str, TensorRef]] = {}
        replacements: Refs = {}
        for raw, ref in read_header((folder / ADAPTER_WEIGHTS).resolve()).items():
            if ".lora_embedding_" in raw:
                raise UsageError(
                    f"the adapter {folder} has LoRA of an embedding ({raw}), which is not supported; "
                    "merge it into its base with PEFT's merge_and_unload first"
                )
            match = _LORA.fullmatch(raw)
            if match:
                _add(halves.setdefault(match["module"], {}), match["side"], ref, raw)
            elif (name := canonical_name(raw)) is not None:
                _add(replacements, name, ref, raw)
        updates: dict[str, LoraUpdate] = {}
        for raw, pair in halves.items():
            update = _update(raw, pair, config)
            if (name := canonical_name(f"{raw}.weight")) is not None:
                _add(updates, name, update, raw)
        return cls(folder, _metaembed_keys(folder), updates, replacements)

    def configure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The base's config.json with what the adapter says or shows of MetaEmbed's settings, which outranks it."""
        return {**config, **with_projection(self.config, self.replacements)}


def open_with_adapter(
    base: str | Path, adapter: str | Path, merged: str | Path, *, advance: Advance = lambda nbytes: None
) -> Checkpoint:
    """Open base and adapter as one checkpoint; only an adapter with low-rank updates writes the ``merged`` folder."""
    found = Adapter.open(adapter)
    if found.updates:
        return merge_adapter(base, found, merged, advance=advance)
    return _apply_replacements(Path(base), found)


def check_adapter(base: str | Path, adapter: str | Path) -> None:
    """Refuse, from headers alone, what ``open_with_adapter`` would; nothing is merged."""
    found = Adapter.open(adapter)
    _check_updates(_apply_replacements(Path(base), found), found)


def merge_adapter(
    base: str | Path,
    adapter: Adapter,
    output: str | Path,
    *,
    shard_bytes: float = SHARD_BYTES,
    advance: Advance = lambda nbytes: None,
) -> Checkpoint:
    """Write base and adapter as one checkpoint into a new folder, in the base's dtypes, once.

    W + scale * B A is computed in fp32 and rounded once, some rows at a time: memory does not grow with the model.

    Args:
        advance: told the bytes written (a progress bar's ``update``).

    Raises:
        UsageError: the output exists, or the adapter was made for another model.
        BundleError: a file is damaged, or base and adapter together make no whole checkpoint.
    """
    checkpoint = _apply_replacements(Path(base), adapter)
    _check_updates(checkpoint, adapter)
    specs = {name: TensorSpec(ref.shape, ref.dtype) for name, ref in checkpoint.tensors.items()}
    pieces = partial(_merged_pieces, checkpoint=checkpoint, updates=adapter.updates)
    write_checkpoint(output, checkpoint.config, specs, pieces, shard_bytes=shard_bytes, advance=advance)
    return Checkpoint.open(output)


def _apply_replacements(base: Path, adapter: Adapter) -> Checkpoint:
    tensors = {**read_tensors(base), **adapter.replacements}
    return Checkpoint.assemble(f"{base} with {adapter.folder}", adapter.configure(read_config(base)), tensors)


def _check_updates(checkpoint: Checkpoint, adapter: Adapter) -> None:
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    unknown = [name for name in adapter.updates if name not in shapes]
    unfit = [
        f"{name} ({list(update.shape)} onto {list(shapes[name])})"
        for name, update in adapter.updates.items()
        if name in shapes and update.shape != shapes[name]
    ]
    problem = list_some("it updates what the base does not have:", unknown) or list_some("sizes differ:", unfit)
    if problem:
        raise UsageError(f"the adapter {adapter.folder} was made for another model; {problem}")


def _merged_pieces(name: str, *, checkpoint: Checkpoint, updates: Mapping[str, LoraUpdate]) -> Iterator[np.ndarray]:
    ref, update = checkpoint.tensors[name], updates.get(name)
    if update is None:
        yield from finite_pieces(name, ref, MERGE_VALUES)
        return
    a, b = (_read_half(name, half) for half in (update.a, update.b))
    width, rows = ref.shape[1], max(1, MERGE_VALUES // ref.shape[1])
    pieces = finite_pieces(name, ref, rows * width)
    for start, piece in zip(range(0, ref.shape[0], rows), pieces, strict=True):
        merged = b[start : start + rows] @ a  # (rows, rank) x (rank, in)
        merged *= np.float32(update.scale)
        merged += piece.reshape(-1, width).astype(np.float32)
        with np.errstate(over="ignore"):
            stored = merged.astype(piece.dtype)
        if count_not_finite(stored):
            raise BundleError(
                f"{name} and its LoRA update add up to more than {ref.dtype} holds; "
                "give the base model's weights in bfloat16 or float32"
            )
        yield stored


def _read_half(name: str, half: TensorRef) -> np.ndarray:
    pieces = finite_pieces(f"the LoRA update of {name}", half, MERGE_VALUES)
    return np.concatenate([np.empty(0, np.float32), *(piece.astype(np.float32) for piece in pieces)]).reshape(
        half.shape
    )


def _add(found: dict[str, T], key: str, value: T, raw: str) -> None:
    """One more tensor; names of several generations may mean the same one, and none says which would count."""
    if key in found:
        raise BundleError(f"the adapter's {raw} is stored twice, also under another name; keep one of them")
    found[key] = value


def _update(raw: str, pair: Mapping[str, TensorRef], config: Mapping[str, Any]) -> LoraUpdate:
    if set(pair) != {"A", "B"}:
        raise BundleError(f"the adapter has lora_{''.join(pair)} of {raw} without its other half")
    a, b = pair["A"], pair["B"]
    if any(len(ref.shape) != 2 or ref.dtype not in FLOAT_DTYPES for ref in (a, b)) or a.shape[0] != b.shape[1]:
        raise BundleError(f"the adapter's update of {raw} is no matrix product: {b.shape} x {a.shape}")
    rank, alpha = _for_module(config, "rank_pattern", raw, "r"), _for_module(config, "alpha_pattern", raw, "lora_alpha")
    if a.shape[0] != rank:
        raise BundleError(f"the adapter's update of {raw} has rank {a.shape[0]}; its adapter_config.json says {rank}")
    # rsLoRA divides by the square root of the rank (arXiv 2312.03732).
    return LoraUpdate(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _for_module(config: Mapping[str, Any], patterns: str, module: str, default: str) -> float:
    """A module's rank or alpha: that of the first pattern that ends its name, as PEFT's get_pattern_key has it."""
    name = module.removeprefix("base_model.model.")
    try:
        matching = (value for key, value in (config.get(patterns) or {}).items() if re.match(rf"(.*\.)?({key})$", name))
        value = float(next(matching, config[default]))
        if not math.isfinite(value):
            raise ValueError(f"{value} is not finite")
        return value
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise BundleError(f"the adapter's {patterns} cannot be read ({error})") from None


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    missing = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / file).is_file()]
    if missing == [ADAPTER_WEIGHTS] and (folder / PICKLED_WEIGHTS).is_file():
        raise UsageError(
            f"{folder} has {PICKLED_WEIGHTS} but no {ADAPTER_WEIGHTS}; "
            "pickled weights are not read: save the adapter with safe_serialization"
        )
    if missing:
        raise UsageError(f"{folder} has no {missing[0]}, so it is no PEFT adapter")
    config = read_json(folder / ADAPTER_CONFIG)
    kind = config.get("peft_type")
    refused = [name for key, name in UNSUPPORTED.items() if config.get(key)]
    if kind != "LORA":
        refused.append(f"adapters of type {kind}")
    if config.get("bias", "none") != "none":
        refused.append(f"trained biases (bias: {config['bias']})")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        refused.append(
            f"adapters that changed their base at the start (init_lora_weights: {config['init_lora_weights']})"
        )
    if refused:
        raise UsageError(
            f"the adapter {folder} uses {' and '.join(refused)}, which cannot be merged; only plain LoRA can"
        )
    numbers = [config.get(key) for key in ("r", "lora_alpha")]
    if not all(isinstance(number, (int, float)) and 0 < number < math.inf for number in numbers):
        raise BundleError(f"{folder / ADAPTER_CONFIG} lacks a rank r or a finite lora_alpha above 0")
    return config


def _metaembed_keys(folder: Path) -> dict[str, Any]:
    """MetaEmbed's own settings, where the adapter folder carries a config.json; they outrank the base's."""
    if not (folder / "config.json").is_file():
        return {}
    said = read_json(folder / "config.json")
    return {key: said[key] for key in METAEMBED_KEYS if said.get(key) is not None}
