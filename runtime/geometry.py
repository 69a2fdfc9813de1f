"""The geometry of a MetaEmbed model: every size that its graphs, its weights and its costs follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import BundleError, UsageError

Config = Mapping[str, Any]

# What MetaEmbed's own configuration says when a config.json (a plain Qwen2.5-VL base) says nothing.
QUERY_TOKENS, CANDIDATE_TOKENS, NO_PROJECTION = 16, 64, -1
# Patch side, merge side, temporal patch, channels, window side in pixels: those of every Qwen2.5-VL, fixed in
# runtime/layout.py and so in the shape of the vision graph.
GRAPH_SIZES = (14, 2, 2, 3, 112)
# No size reaches this, and a damaged config.json should not make us list a billion layers.
LARGEST, MOST_LAYERS = 1e9, 1000
FULL_ATTENTION = "full_attention"  # of transformers' layer_types, the one that Qwen2.5-VL was published with


@dataclass(frozen=True)
class TextGeometry:
    """The Qwen2.5 decoder. ``vocab`` counts the rows of the token table, padding rows included."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]

    def __post_init__(self) -> None:
        _check_positive("text", self)
        _require(self.layers <= MOST_LAYERS, f"{self.layers} decoder layers are not plausible")
        _require(self.hidden % self.heads == 0, f"hidden_size {self.hidden} is not a multiple of {self.heads} heads")
        _require(self.heads % self.kv_heads == 0, f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        _require(
            2 * sum(self.mrope_section) == self.head_dim,
            f"mrope_section {list(self.mrope_section)} does not fill half of the head size {self.head_dim}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @classmethod
    def from_config(cls, config: Config) -> TextGeometry:
        """Read a ``text_config``, or a flat config of the older style. Defaults: transformers' Qwen2_5_VLTextConfig."""
        _refuse_other_variants(config)
        heads = _int(config, "num_attention_heads", 64)
        # transformers 5 writes rope_parameters; the hub's files have rope_scaling and rope_theta.
        rope = _section(config, "rope_scaling", "rope_parameters")
        return cls(
            hidden=_int(config, "hidden_size", 8192),
            layers=_int(config, "num_hidden_layers", 80),
            heads=heads,
            kv_heads=heads if config.get("num_key_value_heads", 8) is None else _int(config, "num_key_value_heads", 8),
            intermediate=_int(config, "intermediate_size", 29568),
            vocab=_int(config, "vocab_size", 152064),
            rms_eps=_float(config, "rms_norm_eps", 1e-5),
            rope_theta=_float(rope, "rope_theta", _float(config, "rope_theta", 1e6)),
            mrope_section=_mrope_section(rope),
        )


@dataclass(frozen=True)
class VisionGeometry:
    """The Qwen2.5-VL vision tower. ``window`` is in pixels; ``full_attention_blocks`` attend over the whole image."""

    hidden: int
    depth: int
    heads: int
    intermediate: int
    out_hidden: int
    full_attention_blocks: tuple[int, ...]
    patch: int = 14
    merge: int = 2
    temporal: int = 2
    in_channels: int = 3
    window: int = 112

    def __post_init__(self) -> None:
        _check_positive("vision", self)
        _require(self.depth <= MOST_LAYERS, f"{self.depth} vision blocks are not plausible")
        sizes = (self.patch, self.merge, self.temporal, self.in_channels, self.window)
        _require(sizes == GRAPH_SIZES, f"patch, merge, temporal, channels, window are {sizes}, not {GRAPH_SIZES}")
        _require(self.hidden % (4 * self.heads) == 0, f"{self.heads} vision heads do not fit hidden size {self.hidden}")
        _require(
            all(0 <= block < self.depth for block in self.full_attention_blocks),
            f"fullatt_block_indexes {list(self.full_attention_blocks)} leave the {self.depth} vision blocks",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def patch_values(self) -> int:
        """Values of one patch: channels x temporal x height x width."""
        return self.in_channels * self.temporal * self.patch**2

    @property
    def window_patches(self) -> int:
        """Patches of one full attention window."""
        return (self.window // self.patch) ** 2

    @classmethod
    def from_config(cls, config: Config) -> VisionGeometry:
        """Read a ``vision_config``. Defaults: transformers' Qwen2_5_VLVisionConfig."""
        _require_value(config, "hidden_act", "silu")
        _require_value(_section(config, "rope_parameters"), "rope_theta", 10000.0)
        return cls(
            hidden=_int(config, "hidden_size", 3584),
            depth=_int(config, "depth", 32),
            heads=_int(config, "num_heads", 16),
            intermediate=_int(config, "intermediate_size", 3420),
            out_hidden=_int(config, "out_hidden_size", 3584),
            window=_int(config, "window_size", 112),
            full_attention_blocks=_ints(config, "fullatt_block_indexes", (7, 15, 23, 31)),
            patch=_int(config, "patch_size", 14),
            merge=_int(config, "spatial_merge_size", 2),
            temporal=_int(config, "temporal_patch_size", 2),
            in_channels=_int(config, "in_channels", _int(config, "in_chans", 3)),
        )


@dataclass(frozen=True)
class Geometry:
    """A MetaEmbed model: a Qwen2.5-VL decoder and vision tower, Meta Tokens, and an optional projection.

    ``projection`` is the width of ``custom_text_proj``, or None when the model has none.

    Raises:
        UsageError: an architecture, a mode or sizes that cannot be exported.
    """

    text: TextGeometry
    vision: VisionGeometry
    query_tokens: int = QUERY_TOKENS
    candidate_tokens: int = CANDIDATE_TOKENS
    projection: int | None = None
    image_token_id: int = 151655
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self) -> None:
        _check_positive("model", self)
        _require(
            self.vision.out_hidden == self.text.hidden,
            f"the vision tower gives {self.vision.out_hidden} dims, the decoder takes {self.text.hidden}",
        )

    @property
    def meta_tokens(self) -> int:
        """Rows of the Meta Token table: the query's, then the candidate's."""
        return self.query_tokens + self.candidate_tokens

    @property
    def dim(self) -> int:
        """Dims of one embedding."""
        return self.projection or self.text.hidden

    @classmethod
    def from_config(cls, config: Config) -> Geometry:
        """Read an HF config.json, flat (hub checkpoints) or with a ``text_config`` (transformers 5)."""
        _require_value(config, "model_type", "qwen2_5_vl", default=None)
        _refuse_other_modes(config)
        dim = NO_PROJECTION if config.get("dim") is None else _int(config, "dim", NO_PROJECTION)
        return cls(
            text=TextGeometry.from_config(_section(config, "text_config") or config),
            vision=VisionGeometry.from_config(_section(config, "vision_config")),
            query_tokens=_int(config, "num_query_prompt_tokens", QUERY_TOKENS),
            candidate_tokens=_int(config, "num_doc_prompt_tokens", CANDIDATE_TOKENS),
            projection=None if dim == NO_PROJECTION else dim,
            **{name: _int(config, name, getattr(cls, name)) for name in TOKEN_IDS},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        """Read what ``to_json`` wrote.

        Raises:
            BundleError: a field is missing, unknown or of the wrong kind.
        """
        try:
            values = dict(data)
            text, vision = dict(values.pop("text")), dict(values.pop("vision"))
            text["mrope_section"] = tuple(text["mrope_section"])
            vision["full_attention_blocks"] = tuple(vision["full_attention_blocks"])
            return cls(text=TextGeometry(**text), vision=VisionGeometry(**vision), **values)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"the recorded model geometry cannot be read ({error})") from None


TOKEN_IDS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")


def _refuse_other_modes(config: Config) -> None:
    if config.get("use_bidirectional_attention"):
        raise UsageError(
            "this checkpoint attends bidirectionally (use_bidirectional_attention), so a smaller budget is not a prefix"
            " of a larger one; only causal MetaEmbed checkpoints can be exported"
        )
    if config.get("shared_query_doc_prompt"):
        raise UsageError(
            "this checkpoint shares its Meta Tokens between queries and candidates (shared_query_doc_prompt); only "
            "separate ones, as in the released configuration, can be exported"
        )
    if config.get("quantization_config"):
        raise UsageError("this checkpoint is quantised (quantization_config); export the fp32, bf16 or fp16 original")


def _refuse_other_variants(config: Config) -> None:
    _require_value(config, "hidden_act", "silu")
    rope = _section(config, "rope_scaling", "rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require(kind in ("default", "mrope"), f"rotary embeddings of type {kind!r} are not supported, only 'default'")
    _require(not config.get("use_sliding_window"), "sliding-window attention (use_sliding_window) is not supported")
    _refuse_other_layers(config)
    head_dim = config.get("head_dim")
    implied = _int(config, "hidden_size", 8192) // max(1, _int(config, "num_attention_heads", 64))
    _require(head_dim in (None, implied), f"head_dim {head_dim} is not hidden_size / heads ({implied})")


def _refuse_other_layers(config: Config) -> None:
    """transformers 5 names the attention of every layer, whatever use_sliding_window says."""
    kinds, layers = config.get("layer_types"), _int(config, "num_hidden_layers", 80)
    if kinds is None:
        return
    _require(isinstance(kinds, list) and len(kinds) == layers, f"layer_types does not list its {layers} layers")
    for kind in kinds:
        _require(kind == FULL_ATTENTION, f"layer_types names {kind!r}, and only {FULL_ATTENTION!r} is supported")


def _mrope_section(rope: Config) -> tuple[int, int, int]:
    section = _ints(rope, "mrope_section", (16, 24, 24))
    if len(section) != 3:
        raise UsageError(f"this model cannot be exported: mrope_section {list(section)} needs three numbers")
    return (section[0], section[1], section[2])


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UsageError(f"this model cannot be exported: {problem}")


def _require_value(config: Config, key: str, only: Any, default: Any = ...) -> None:
    value = config.get(key, only if default is ... else default)
    _require(value == only, f"{key} is {value!r}, and only {only!r} is supported")


def _check_positive(part: str, record: Any) -> None:
    """Every number in a record is positive, and whole but for rates (tuples are checked by their owner)."""
    for field in fields(record):
        value = getattr(record, field.name)
        if field.type == "int" or (field.type == "int | None" and value is not None):
            _require(type(value) is int, f"{field.name} of the {part} part is {value!r}, not a whole number")
        elif field.type == "float":
            _require(type(value) in (int, float), f"{field.name} of the {part} part is {value!r}, not a number")
        if isinstance(value, (int, float)):
            _require(0 < value < LARGEST, f"{field.name} of the {part} part is {value}, not in (0, {LARGEST:g})")


def _section(config: Config, *keys: str) -> Config:
    """The first of these nested objects that is there, or an empty one."""
    section: Any = next((config[key] for key in keys if config.get(key)), {})
    if not isinstance(section, Mapping):
        raise UsageError(f"config.json: {' or '.join(keys)} should be an object, not {section!r}")
    return section


def _int(config: Config, key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"config.json: {key} should be a whole number, not {value!r}")
    return value


def _float(config: Config, key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UsageError(f"config.json: {key} should be a number, not {value!r}")
    return float(value)


def _ints(config: Config, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    values = config.get(key, default)
    if not isinstance(values, (list, tuple)) or not all(type(value) is int for value in values):
        raise UsageError(f"config.json: {key} should be a list of whole numbers, not {values!r}")
    return tuple(values)
