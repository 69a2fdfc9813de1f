"""Checkpoint to bundle: trace, point the graphs at one set of weights, judge against HF, and only then name it."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from metaembed.runtime.budget import Budget
from metaembed.runtime.check import Check
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.frozen import frozen_graphs
from metaembed.runtime.manifest import (
    DEFAULT_OPSET,
    LANGUAGE,
    PROCESSOR,
    TOKENIZER,
    VISION,
    FileRecord,
    Limits,
    Manifest,
    cpu_graph,
    write_manifest,
)
from metaembed.runtime.processor import write_image_rules
from metaembed.runtime.staging import staged_folder
from metaembed.runtime.tensors import parameter_count
from metaembed.runtime.text import Template
from metaembed.runtime.weights import place_file

from .attention_parts import attend_in_parts
from .checkpoint import Checkpoint
from .frozen import trace_frozen
from .graph import WeightRef, attach_weights, check_operators, save_graph, widen_for_cpu
from .models import ResolvedModel
from .processor import find_tokenizer, read_processor
from .scorer import write_scorer
from .source import Source, asset_folders, convert_weights, open_source
from .trace import trace_language, trace_vision

log = logging.getLogger(__name__)
IR_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
NARROW = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}
LARGE = 1_000_000_000  # parameters from which parity is judged on few inputs
STRANGE = re.compile(r"[^A-Za-z0-9_.-]")  # a colon, say, which the manifest refuses, or what Windows cannot store
TOOLS = ("metaembed-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export. ``random_seed`` replaces the model's weights by random ones of its geometry.

    ``parity_inputs`` is ``full`` or ``quick``; by default quick for models that take minutes for each input.
    ``freeze`` names sides to write a graph frozen at each budget for, beside the one that serves them all.
    ``opset`` is one of the manifest's OPSETS.
    """

    model: ResolvedModel
    budgets: Sequence[Budget]
    limits: Limits = field(default_factory=Limits)
    precision: str = "fp32"
    parity: bool = True
    random_seed: int | None = None
    parity_inputs: str | None = None
    freeze: Sequence[str] = ()
    opset: int = DEFAULT_OPSET

    def __post_init__(self) -> None:
        if not self.budgets:
            raise UsageError("a bundle serves at least one budget; name some, for example Budget(8, 16)")
        geometry = self.model.geometry
        for budget in self.budgets:
            budget.check_within(geometry.query_tokens, geometry.candidate_tokens)


class Progress(Protocol):
    """Hears of the work; the command shows it."""

    def stage(self, what: str) -> None:
        """A new stage has begun."""

    def advance(self, nbytes: int) -> None:
        """Bytes of weights were written."""

    def track(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        """Iterate over items that take a while each."""


class Silence:
    """Progress that nobody watches."""

    def stage(self, what: str) -> None:
        log.info("%s", what)

    def advance(self, nbytes: int) -> None:
        pass

    def track(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        return items


def export_bundle(
    request: ExportRequest, output: Path, *, force: bool = False, progress: Progress | None = None
) -> Check | None:
    """Write a bundle; returns its parity check, or None when that was skipped.

    The bundle gets its name only when everything, parity included, has succeeded; otherwise nothing is left.

    Raises:
        UsageError, BundleError: the checkpoint cannot be exported.
        ParityError: the embeddings disagree with Hugging Face's model.
    """
    progress = progress or Silence()
    with staged_folder(output, force=force) as folder:
        work = folder / "work"
        work.mkdir()
        progress.stage("reading the checkpoint")
        limits = _write_assets(request, folder)  # before merged or random weights, gigabytes, are written
        source = open_source(request.model, work / "model", random_seed=request.random_seed, advance=progress.advance)
        checkpoint = convert_weights(source.checkpoint, request.precision, work / "converted", progress.advance)
        if limits != request.limits:
            progress.stage(
                f"images are scaled to at most {limits.image_tokens} visual tokens, not {request.limits.image_tokens}: "
                "the checkpoint's image rules allow no more"
            )
            request = replace(request, limits=limits)
        progress.stage("placing weights")
        refs = place_weights(checkpoint, folder, progress.advance)
        before = _stamps(folder)
        with _hashing_weights(folder) as hashes:
            # What was merged, converted or made up was checked, or is finite, as it was written into ``work``.
            unread = [name for name, ref in checkpoint.tensors.items() if work.resolve() not in ref.path.parents]
            if unread:
                progress.stage("looking for NaN and infinity in the weights")
                checkpoint.check_finite(progress.track(unread, "weights"))
            write_graphs(request, checkpoint, refs, folder, progress.stage)
            check = _judge(request, source, folder, progress) if request.parity else None
            shutil.rmtree(work)
            progress.stage("hashing")
            known = {name: record.result() for name, record in hashes.items()}
        for name, stamp in _stamps(folder).items():
            if stamp != before[name]:
                raise BundleError(f"{name} was written to while it was exported; export again when it is whole")
        write_manifest(folder, _manifest(request, checkpoint, check), known=known)
    return check


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the weight files: they are hard links, and who writes over the checkpoint in place writes to them."""
    found = {path.name: path.stat() for path in (folder / "weights").iterdir()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@contextmanager
def _hashing_weights(folder: Path) -> Iterator[Mapping[str, Future[FileRecord]]]:
    """Records of the weight files, made in a thread of their own: hashing leaves the interpreter to what works meanwhile."""
    pool, stopped = ThreadPoolExecutor(1, thread_name_prefix="hashing"), threading.Event()
    try:
        names = [f"weights/{path.name}" for path in sorted((folder / "weights").iterdir())]
        yield {name: pool.submit(FileRecord.of, folder / name, stopped) for name in names}
    finally:
        stopped.set()  # nobody asks any more; after success there is nothing left to stop
        pool.shutdown(cancel_futures=True)  # waits: the folder may be about to go


def place_weights(
    checkpoint: Checkpoint, folder: Path, advance: Callable[[int], object] = lambda nbytes: None
) -> Mapping[str, WeightRef]:
    """Bring the checkpoint's files into ``weights/``, each once, and say where each tensor then lies."""
    (folder / "weights").mkdir()
    places: dict[Path, str] = {}
    for source in checkpoint.files:
        places[source] = _free_name(source.stem, places.values())
        log.info("%s %s", place_file(source, folder / places[source], advance), source)
    return {
        name: WeightRef(places[ref.path], ref.offset, ref.nbytes, IR_DTYPES[ref.dtype], tuple(ref.shape))
        for name, ref in checkpoint.tensors.items()
    }


def _free_name(stem: str, taken: Collection[str]) -> str:
    """A shard's place in the bundle: its own name, or with a number in front where another shard has that."""
    name = f"{STRANGE.sub('_', stem)}.safetensors"  # a hub cache's blobs have no suffix
    numbered = (f"weights/{number}-{name}" for number in itertools.count(1))
    return next(place for place in itertools.chain([f"weights/{name}"], numbered) if place not in taken)


def write_graphs(
    request: ExportRequest,
    checkpoint: Checkpoint,
    refs: Mapping[str, WeightRef],
    folder: Path,
    stage: Callable[[str], object],
) -> None:
    """Trace and save both graphs and the frozen ones; beside a bf16 or fp16 one, its float32 twin for the CPU.

    The scorer comes with them, in the same precision: ONNX Runtime's CPU provider can widen it, so it needs no twin.
    """
    write_scorer(folder, checkpoint.geometry.dim, precision=request.precision)
    frozen = {
        name: partial(trace_frozen, side=side, vectors=vectors)
        for name, (side, vectors) in frozen_graphs(request.freeze, request.budgets).items()
    }
    for name, trace in {VISION: trace_vision, LANGUAGE: trace_language, **frozen}.items():
        stage(f"tracing {name}")
        model = trace(checkpoint.geometry, precision=request.precision, opset=request.opset)
        attach_weights(model, refs)
        check_operators(model)
        narrow = NARROW.get(request.precision)
        if narrow:
            save_graph(model, folder / name)
            widen_for_cpu(model, narrow)
        if name == VISION:
            attend_in_parts(model)
        save_graph(model, folder / (cpu_graph(name) if narrow else name))


def _judge(request: ExportRequest, source: Source, folder: Path, progress: Progress) -> Check:
    from .parity import check_export, write_goldens  # transformers takes seconds to import
    from .reference import Reference

    progress.stage("encoding golden inputs with Hugging Face's model")
    reference = Reference(source, request.limits.image_tokens)
    inputs = request.parity_inputs or ("quick" if parameter_count(request.model.geometry) > LARGE else "full")
    write_goldens(reference, folder, request.budgets, request.limits, progress.track, inputs=inputs)
    del reference  # before the bundle's own sessions take their memory
    write_manifest(folder, _manifest(request, source.checkpoint, None), skip=("work", "weights"))
    progress.stage("comparing")
    return check_export(folder)


def _manifest(request: ExportRequest, checkpoint: Checkpoint, check: Check | None) -> Manifest:
    return Manifest(
        model=request.model.name,
        geometry=checkpoint.geometry,
        budgets=tuple(request.budgets),
        limits=request.limits,
        precision=request.precision,
        opset=request.opset,
        template=Template().to_json(),
        files={},
        parity=None if check is None else check.to_json(),
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


def _write_assets(request: ExportRequest, folder: Path) -> Limits:
    """Tokenizer and image rules, read back at once: a damaged one should not be found after minutes of work.

    Returns the limits that hold: the request's, or the image processor's where that allows less.
    """
    assets = asset_folders(request.model, random=request.random_seed is not None)
    shutil.copyfile(find_tokenizer(assets, request.model.geometry), folder / TOKENIZER)
    rules = read_processor(assets, request.limits.image_tokens)
    write_image_rules(rules, folder / PROCESSOR)
    return replace(request.limits, image_tokens=rules.max_tokens)
