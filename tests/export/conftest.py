"""A tiny Qwen2.5-VL with MetaEmbed's keys; every size differs from every other, so that a swapped axis fails.

And a deep one, whose graphs are cloned from a few traced layers.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from metaembed.export import trace
from metaembed.export.bundle import IR_DTYPES, NARROW
from metaembed.export.checkpoint import Checkpoint
from metaembed.export.graph import WeightRef, attach_weights, save_graph, widen_for_cpu
from metaembed.export.random_weights import write_random_checkpoint
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.layout import VisionInputs, candidate_meta_tokens, lay_out_images, lay_out_prompts
from metaembed.runtime.session_ort import OrtSession

TINY = {
    "architectures": ["Qwen2_5_VLModel"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 72,
    "vocab_size": 301,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 300,
    "video_token_id": 299,
    "vision_start_token_id": 298,
    "vision_end_token_id": 297,
    "tie_word_embeddings": False,
    "num_query_prompt_tokens": 3,
    "num_doc_prompt_tokens": 7,
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 40,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
    },
}


@pytest.fixture(scope="session")
def tiny():
    return copy.deepcopy(TINY)


@pytest.fixture
def tiny_config(tiny):
    """A copy to change."""
    return copy.deepcopy(tiny)


class Deep:
    """Six layers and eight blocks, with full attention at irregular blocks, the first among them; random weights.

    Graphs are traced once per session and serialised, since attaching weights changes them.
    """

    config = TINY | {
        "num_hidden_layers": 6,
        "vision_config": TINY["vision_config"] | {"depth": 8, "fullatt_block_indexes": [0, 3, 4, 7]},
    }
    geometry = Geometry.from_config(config)
    grids = ((6, 30), (2, 2), (8, 8))

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.trace, self.weights = cache(self._trace), cache(self._weights)

    def _trace(self, name: str, precision: str, whole: bool = False):
        return getattr(trace, f"trace_{'whole_' if whole else ''}{name}")(self.geometry, precision)

    def _weights(self, dtype: str) -> Checkpoint:
        return write_random_checkpoint(self.config, 7, self.folder / dtype, dtype=dtype)

    def save(self, name: str, precision: str, stored: str, *, whole: bool = False, note: str = "") -> Path:
        """A graph over weights of its own or another type; for ONNX Runtime, so computing in float32."""
        path = self.folder / f"{name}-{precision}-{stored}-{whole}{note}.onnx"
        if not path.exists():
            model = self.trace(name, precision, whole).clone()
            attach_weights(model, self.refs(stored))
            if precision in NARROW:
                widen_for_cpu(model, NARROW[precision])
            save_graph(model, path)
        return path

    def refs(self, stored: str) -> dict[str, WeightRef]:
        return {
            name: WeightRef(f"{stored}/{ref.path.name}", ref.offset, ref.nbytes, IR_DTYPES[ref.dtype], ref.shape)
            for name, ref in self.weights(stored).tensors.items()
        }

    def open(self, name: str, precision: str, stored: str, *, whole: bool = False) -> OrtSession:
        return OrtSession(self.save(name, precision, stored, whole=whole), threads=1)

    def encode_images(self, vision: OrtSession) -> np.ndarray:
        """Image embeddings of three images."""
        return vision.run(self.images().feeds())["image_embeddings"]

    def encode(self, language: OrtSession) -> np.ndarray:
        """Candidates at r = 5: three images, whose embeddings are made up, and a text."""
        windows = self.images().patches.shape[1]
        size = (len(self.grids), windows * 16, self.geometry.text.hidden)
        embedded = np.random.default_rng(4).standard_normal(size).astype(np.float32)
        grids = [*self.grids, None]
        image, vocab, queries = self.geometry.image_token_id, self.geometry.text.vocab, self.geometry.query_tokens
        prompts = [
            np.array([1, *[image] * (grid[0] * grid[1] // 4 if grid else 0), *range(9, 9 + length)], np.int64)
            for length, grid in enumerate(grids, start=2)
        ]
        laid = lay_out_prompts(
            prompts, grids, candidate_meta_tokens(vocab, queries, 5), 5, image_token=image, windows=windows
        )
        return language.run({**laid.feeds(), "image_embeddings": embedded})["embeddings"]

    def run(self, name: str, precision: str, stored: str, *, whole: bool = False) -> np.ndarray:
        """What a graph gives through ONNX Runtime."""
        session = self.open(name, precision, stored, whole=whole)
        return self.encode_images(session) if name == "vision" else self.encode(session)

    def images(self) -> VisionInputs:
        rng = np.random.default_rng(3)
        pixels = [rng.standard_normal((rows * columns, 1176)).astype(np.float32) for rows, columns in self.grids]
        return lay_out_images(pixels, self.grids)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    return Deep(tmp_path_factory.mktemp("deep"))
