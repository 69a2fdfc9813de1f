"""Contestants of the encoder race in PyTorch: Hugging Face's model, eager or compiled, and its decoder exported plainly.

All of them get the shortest exact input: a query only its own r rows of Meta Tokens, a candidate the query rows and its own.
``all_rows`` appends all 80, as the released code does.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Qwen2_5_VLModel
from transformers.utils import logging as hf_logging

from metaembed.runtime.manifest import Bundle

from .contestants import Prepared, prepare_input
from .encoder import Case, Runner

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]  # embeddings (b, t, d), mask (b, t), positions (3, b, t) -> hidden


def build_hf(
    checkpoint: Path,
    bundle: Path,
    threads: int,
    *,
    compiled: bool = False,
    plain_onnx: bool = False,
    all_rows: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> Callable[[Case], Runner]:
    """HF's Qwen2_5_VLModel with SDPA attention. The bundle only tokenises and cuts images, before the clock.

    Args:
        compiled: torch.compile on the vision tower and the decoder, each shape specialised.
        plain_onnx: the decoder through ``torch.onnx.export`` as it is, in ONNX Runtime. HF's vision tower cannot be exported
            (its window order depends on data), so images are refused.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    model = Qwen2_5_VLModel.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval().to(device)
    decode = _decoder(model, compiled, plain_onnx, threads)
    if compiled:
        model.visual = torch.compile(model.visual, dynamic=False)
    opened, meta = Bundle.open(bundle, verify=False), _read_meta_tokens(checkpoint)

    def prepare(case: Case) -> Runner:
        if plain_onnx and case.image_tokens:
            raise ValueError("HF's vision tower does not export: its window order depends on data")
        batch = _lay_out(prepare_input(opened, case), case, meta, opened.manifest.geometry.query_tokens, all_rows)
        batch = batch.to(device, model.dtype)
        return lambda: _embed(model, decode, batch)

    return prepare


@dataclass(frozen=True)
class _Batch:
    """Ids (b, t) with zeros where Meta Token rows (m, d) go at the end, pixels (p, 1176), grids (b, 3), the answers' places."""

    ids: Tensor
    rows: Tensor
    pixels: Tensor | None
    grids: Tensor | None
    answers: slice

    def to(self, device: str, dtype: torch.dtype) -> _Batch:
        """On a device, with numbers of this type; nothing is left to copy when the clock runs."""
        move = {"ids": self.ids.to(device), "rows": self.rows.to(device, dtype)}
        if self.pixels is not None and self.grids is not None:
            move |= {"pixels": self.pixels.to(device, dtype), "grids": self.grids.to(device)}
        return replace(self, **move)


def _lay_out(item: Prepared, case: Case, meta: Tensor, query_tokens: int, all_rows: bool) -> _Batch:
    before = 0 if case.side == "query" else query_tokens  # rows in front of the answers
    rows = meta if all_rows else meta[: before + case.vectors]
    ids = torch.cat([torch.from_numpy(item.prompt), torch.zeros(len(rows), dtype=torch.long)])
    start = len(item.prompt) + before
    return _Batch(
        ids.repeat(case.batch, 1),
        rows,
        None if item.pixels is None else torch.from_numpy(item.pixels).repeat(case.batch, 1),
        None if item.grid is None else torch.tensor([[1, *item.grid]] * case.batch),
        slice(start, start + case.vectors),
    )


@torch.inference_mode()
def _embed(model: Any, decode: Decode, batch: _Batch) -> np.ndarray:
    attention, is_image = torch.ones_like(batch.ids), batch.ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(batch.ids)
    embeds[:, -len(batch.rows) :] = batch.rows
    if batch.pixels is not None:
        embeds[is_image] = torch.cat(list(model.get_image_features(batch.pixels, batch.grids).pooler_output))
    positions, _ = model.get_rope_index(batch.ids, is_image.int(), batch.grids, attention_mask=attention)
    hidden = decode(embeds, attention, positions)[:, batch.answers]
    return nn.functional.normalize(hidden.float(), dim=-1).cpu().numpy()


def _read_meta_tokens(checkpoint: Path) -> Tensor:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if "prompt_embed_tokens.weight" in file.keys():  # noqa: SIM118 (no mapping: it only has keys())
                return file.get_tensor("prompt_embed_tokens.weight").float()
    raise ValueError(f"{checkpoint} has no prompt_embed_tokens.weight")


def _decoder(model: Any, compiled: bool, plain_onnx: bool, threads: int) -> Decode:
    decoder = _Decoder(model.language_model)
    if plain_onnx:
        return _export_plainly(decoder, model.config.text_config.hidden_size, threads)
    return torch.compile(decoder, dynamic=False) if compiled else decoder


class _Decoder(nn.Module):
    """HF's decoder with its arguments by position."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, embeds: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        return self.language_model(
            inputs_embeds=embeds, attention_mask=attention, position_ids=positions, use_cache=False
        ).last_hidden_state


def _export_plainly(decoder: nn.Module, hidden: int, threads: int) -> Decode:
    b, t = torch.export.Dim("b"), torch.export.Dim("t")
    example = (torch.zeros(2, 23, hidden), torch.ones(2, 23, dtype=torch.long), torch.zeros(3, 2, 23, dtype=torch.long))
    shapes = {"embeds": {0: b, 1: t}, "attention": {0: b, 1: t}, "positions": {1: b, 2: t}}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision's absence, among others
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(work) / "decoder.onnx"
        torch.onnx.export(
            decoder.eval(), example, path, dynamo=True, dynamic_shapes=shapes, external_data=True, verbose=False,
            input_names=list(shapes), output_names=["hidden"],
        )  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def decode(*arguments: Tensor) -> Tensor:
        feeds = {name: value.numpy() for name, value in zip(shapes, arguments, strict=True) if name in names}
        return torch.from_numpy(session.run(None, feeds)[0])

    return decode
