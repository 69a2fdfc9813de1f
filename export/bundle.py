"""Checkpoint to bundle: trace, point the graphs at one set of weights, judge against HF, and only then name it."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from metaembed.runtime.budget import Budget
from metaembed.runtime.check import Check, check_bundle
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import UsageError
from metaembed.runtime.golden import SIDES, golden_path, write_golden
from metaembed.runtime.images import ImageRules
from metaembed.runtime.manifest import (
    LANGUAGE,
    MANIFEST,
    PROCESSOR,
    TOKENIZER,
    VISION,
    Bundle,
    Limits,
    Manifest,
    record_files,
)
from metaembed.runtime.processor import write_image_rules
from metaembed.runtime.text import Template

from .checkpoint import Checkpoint, read_json
from .golden import golden_items
from .graph import WeightRef, attach_weights, check_operators, optimise, save_graph
from .staging import staged_folder
from .trace import trace_language, trace_vision
from .weights import place_file

log = logging.getLogger(__name__)
IR_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
TOOLS = ("metaembed-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
Report = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export. ``folder`` is the HF checkpoint folder, with its tokenizer and image processor."""

    model: str
    folder: Path
    budgets: Sequence[Budget]
    limits: Limits = field(default_factory=Limits)
    precision: str = "fp32"
    parity: bool = True


def export_bundle(
    request: ExportRequest, output: Path, *, force: bool = False, report: Report = log.info
) -> Check | None:
    """Write a bundle; returns its parity check, or None when that was skipped.

    ``report`` is told what is being done, a line at a time. The bundle gets its name only when everything, parity
    included, has succeeded; otherwise nothing is left.

    Raises:
        UsageError, BundleError: the checkpoint cannot be exported.
        ParityError: the embeddings disagree with Hugging Face's model.
    """
    checkpoint = Checkpoint.open(request.folder)
    for budget in request.budgets:
        budget.check_within(checkpoint.geometry.query_tokens, checkpoint.geometry.candidate_tokens)
    rules = _image_rules(request)
    with staged_folder(output, force=force) as folder:
        report("placing weights")
        refs = place_weights(checkpoint, folder)
        for name, trace in ((VISION, trace_vision), (LANGUAGE, trace_language)):
            report(f"tracing {name}")
            model = trace(checkpoint.geometry, request.precision)
            optimise(model)
            attach_weights(model, refs)
            check_operators(model)
            save_graph(model, folder / name)
        write_image_rules(rules, folder / PROCESSOR)
        _copy_tokenizer(request.folder, folder)
        manifest = _manifest(request, checkpoint)
        check = None
        if request.parity:
            report("encoding golden inputs with Hugging Face")
            _write_goldens(request, folder)
            report("comparing")
            manifest = write_manifest(folder, manifest)
            with Encoder(Bundle.open(folder, verify=False), *_sessions(folder)) as encoder:
                check = check_bundle(encoder)
            check.require()
            manifest = replace(manifest, parity=check.to_json())
        write_manifest(folder, manifest)
    return check


def place_weights(checkpoint: Checkpoint, folder: Path) -> Mapping[str, WeightRef]:
    """Bring the checkpoint's files into ``weights/`` and say where each tensor then lies."""
    (folder / "weights").mkdir()
    places: dict[Path, str] = {}
    for source in checkpoint.files:
        places[source] = (
            f"weights/{source.name}" if source.suffix == ".safetensors" else f"weights/{source.name}.safetensors"
        )
        if list(places.values()).count(places[source]) > 1:
            places[source] = f"weights/{len(places)}-{source.name}"
        log.info("%s %s", place_file(source, folder / places[source]), source)
    return {
        name: WeightRef(places[ref.path], ref.offset, ref.nbytes, IR_DTYPES[ref.dtype], tuple(ref.shape))
        for name, ref in checkpoint.tensors.items()
    }


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Record every file of the folder and write bundle.json; returns the manifest as written."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    known = {name: record for name, record in manifest.files.items() if name.startswith("weights/")}
    fresh = record_files(folder, [name for name in names if name != MANIFEST and name not in known])
    manifest = replace(manifest, files={**known, **fresh})
    (folder / MANIFEST).write_text(
        json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return manifest


def _manifest(request: ExportRequest, checkpoint: Checkpoint) -> Manifest:
    return Manifest(
        model=request.model,
        geometry=checkpoint.geometry,
        budgets=tuple(request.budgets),
        limits=request.limits,
        precision=request.precision,
        template=Template().to_json(),
        files={},
        tools=_tool_versions(),
    )


def _tool_versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _image_rules(request: ExportRequest) -> ImageRules:
    path = request.folder / "preprocessor_config.json"
    if not path.is_file():
        raise UsageError(f"{request.folder} has no preprocessor_config.json; copy it from the base model")
    return ImageRules.from_config(read_json(path), request.limits.image_tokens)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    path = source / TOKENIZER
    if not path.is_file():
        raise UsageError(f"{source} has no tokenizer.json; copy it from the base model")
    shutil.copyfile(path, folder / TOKENIZER)


def _write_goldens(request: ExportRequest, folder: Path) -> None:
    from .reference import Reference

    reference = Reference(request.folder, request.limits.image_tokens)
    for side in SIDES:
        items = [
            item
            for item in golden_items(side, request.limits.image_tokens)
            if item.text is None or len(reference.tokenizer(item.text)["input_ids"]) <= request.limits.text_tokens
        ]
        # One by one: a mixed batch of the largest and the smallest would be mostly padding.
        embeddings = [reference.encode(side, [item]) for item in items]
        most = max(getattr(budget, side) for budget in request.budgets)
        write_golden(folder / golden_path(side), items, np.concatenate(embeddings)[:, :most])


def _sessions(folder: Path) -> list[Any]:
    from metaembed.runtime.session_ort import OrtSession

    return [OrtSession(folder / name) for name in (VISION, LANGUAGE)]
