"""The width of a checkpoint's projection, which config.json may not tell: MetaEmbed adds it to a base that knows of none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MODULE, WEIGHT = "custom_text_proj.", ".weight"
UNTRAINED = "original_module."  # PEFT's copy from before the training


def with_stored_projection(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``config``, with the ``dim`` that the folder's safetensors show where it has none. Only headers are read.

    What cannot be read shows nothing: a model can be planned, or rehearsed, without its weights.
    """
    if config.get("dim") is not None:
        return dict(config)
    widths = (_projection_width(path) for path in sorted(folder.glob("*.safetensors")))
    return next(({**config, "dim": width} for width in widths if width), dict(config))


def _projection_width(path: Path) -> int | None:
    """Rows of custom_text_proj.weight [dim, hidden], if this file holds it."""
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                if MODULE in name and name.endswith(WEIGHT) and UNTRAINED not in name and "lora_" not in name:
                    shape = file.get_slice(name).get_shape()
                    return int(shape[0]) if shape else None
    except (SafetensorError, OSError):
        pass
    return None
