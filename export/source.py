"""Where an export's weights come from: a checkpoint as it is, merged with an adapter, made up, or converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.finite import count_not_finite

from .checkpoint import Checkpoint, finite_pieces, read_json
from .models import DEMO_FOLDER, ResolvedModel
from .random_weights import write_random_checkpoint
from .safetensors_header import FLOAT_DTYPES
from .safetensors_writer import TensorSpec, write_checkpoint

STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
PIECE_VALUES = 1 << 22
IMAGE_CONFIG, PROCESSOR_CONFIG = "preprocessor_config.json", "processor_config.json"
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, the HF folder that holds the same weights, and where its tokenizer and processor lie."""

    checkpoint: Checkpoint
    folder: Path
    assets: tuple[Path, ...]

    def asset(self, name: str) -> Path:
        """tokenizer.json and the like; the adapter's own comes before the base's."""
        return find_asset(self.assets, name)


def asset_folders(model: ResolvedModel, *, random: bool) -> tuple[Path, ...]:
    """Where the model's tokenizer and processor may lie; empty for a known size whose weights were not found."""
    own = tuple(folder for folder in (model.adapter, model.base) if folder is not None)
    if random and model.base is None:
        return (*own, DEMO_FOLDER)  # made-up weights read made-up text: the demo's tokenizer will do
    return own


def find_asset(folders: Sequence[Path], name: str) -> Path:
    """A file of the first folder that has it; a UsageError when none does."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise _missing(folders, name)


def _missing(folders: Sequence[Path], what: str) -> UsageError:
    where = " nor ".join(str(folder) for folder in folders)
    has = f"neither {where} has" if len(folders) > 1 else f"{where} has no"
    return UsageError(f"{has} {what}; copy it from the base model")


def find_image_processor(folders: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The first folder that has image rules, and these.

    transformers 5 saves them in processor_config.json, and prefers that; older versions write one without them.

    Raises:
        UsageError: no folder has any.
        BundleError: a file is damaged.
    """
    for folder in folders:
        path = folder / PROCESSOR_CONFIG
        rules = read_json(path).get("image_processor") if path.is_file() else None
        if rules is None and (folder / IMAGE_CONFIG).is_file():
            rules = read_json(folder / IMAGE_CONFIG)
        if rules is not None and not isinstance(rules, dict):
            raise BundleError(f"{path}: image_processor should be an object, not {rules!r}")
        if rules is not None:
            return folder, rules
    raise _missing(folders, f"{IMAGE_CONFIG}, nor an image_processor in {PROCESSOR_CONFIG}")


def open_source(
    model: ResolvedModel, work: Path, *, random_seed: int | None = None, advance: Advance = lambda nbytes: None
) -> Source:
    """Open the model's weights; merged or random ones are first written into ``work``, a folder not yet there.

    Raises:
        UsageError, BundleError: no weights, or weights that make no checkpoint of this model.
    """
    assets = asset_folders(model, random=random_seed is not None)
    if random_seed is not None:
        return Source(write_random_checkpoint(model.config, random_seed, work, advance=advance), work, assets)
    checkpoint = model.open(work, advance=advance)
    return Source(checkpoint, work if work.exists() else model.require_base(), assets)


def convert_weights(checkpoint: Checkpoint, precision: str, folder: Path, advance: Advance) -> Checkpoint:
    """Store weights in the type that the graphs compute in, where that is narrower or another 16-bit type.

    bf16 and fp16 weights under fp32 graphs stay as they are: a Cast in the graph widens them exactly.

    Raises:
        UsageError: a weight does not fit float16.
    """
    wanted = STORED[precision]
    if precision == "fp32" or all(ref.dtype == wanted for ref in checkpoint.tensors.values()):
        return checkpoint
    specs = {name: TensorSpec(ref.shape, wanted) for name, ref in checkpoint.tensors.items()}
    write_checkpoint(folder, checkpoint.config, specs, partial(_converted, checkpoint, wanted), advance=advance)
    return Checkpoint.open(folder)


def _converted(checkpoint: Checkpoint, dtype: str, name: str) -> Iterator[np.ndarray]:
    for piece in finite_pieces(name, checkpoint.tensors[name], PIECE_VALUES):
        with np.errstate(over="ignore"):
            narrow = piece.astype(np.float32).astype(FLOAT_DTYPES[dtype])
        if count_not_finite(narrow):
            beyond, wider = ("float16's 65504", "bf16") if dtype == "F16" else ("bfloat16's 3.39e38", "fp32")
            raise UsageError(f"{name} holds values beyond {beyond}; export with --precision {wider}")
        yield narrow
