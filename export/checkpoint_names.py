"""The names that checkpoints give to the same tensor, and the one name that we use.

Hub checkpoints of Qwen2.5-VL say ``visual.*`` and ``model.layers.*``, transformers 5 writes ``model.visual.*`` and
``model.language_model.layers.*``, a bare Qwen2_5_VLModel drops the first ``model.``, and training wrappers put more in
front. The canonical names are those of a bare Qwen2_5_VLModel: ``visual.*`` and ``language_model.*``.
"""

from __future__ import annotations

import re

_WRAPPERS = re.compile(r"(?:(?:base_model|model|module|_orig_mod|encoder|language_model)\.)*")
_DECODER = ("layers.", "embed_tokens.", "norm.")
# lm_head predicts tokens; rotary tables are recomputed; original_module is PEFT's copy from before the training.
_UNUSED = re.compile(r"lm_head\.|.*\.(?:inv_freq|original_module\..*)$")


def canonical_name(name: str) -> str | None:
    """The canonical name, or None for a tensor that no embedding depends on."""
    bare = _WRAPPERS.sub("", name, count=1).replace(".modules_to_save.default", "")
    if _UNUSED.match(bare):
        return None
    if bare == "prompt_embed_tokens":  # a bare parameter, where others save an embedding
        return f"{bare}.weight"
    return f"language_model.{bare}" if bare.startswith(_DECODER) else bare
