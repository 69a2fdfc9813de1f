"""Bundle to quantised bundle: observe, smooth, search, insert Q/DQ, and only give it its name when it passes its own check."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from metaembed.runtime.check import Check, check_bundle
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import ParityError, UsageError
from metaembed.runtime.manifest import SCORER, Bundle, write_manifest
from metaembed.runtime.parity import TOLERANCES
from metaembed.runtime.staging import check_output, staged_folder

from . import sensitivity, smoothing
from .awkward import awkward
from .dataset import CalibrationSet
from .formats import find_format
from .judge import Judge, Verdict
from .linears import check_finite, read_tensor
from .nearest import find_passing
from .observe import count_multiplies, observe
from .observers import OBSERVERS
from .recipe import GroupRecipe, Recipe
from .workshop import Workshop

log = logging.getLogger(__name__)
RECIPE, WORK = "recipe.json", "work"
MIN_SHARE = 0.9
SAID = 3  # failures that a message names
TOOLS = ("metaembed-export", "onnx", "onnx-ir", "onnxruntime")
Report = Callable[[str], object]
Progress = Callable[[Any, str], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to quantise. Ranges come from ``data``, or with ``recipe`` from an earlier run, perhaps edited.

    ``judge=False`` quantises every group (or what the recipe says) and compares with nothing; the bundle is then unverified.

    Raises:
        UsageError: an unknown type or observer, neither or both of data and recipe, an impossible share.
    """

    type: str
    data: CalibrationSet | None = None
    recipe: Recipe | None = None
    observer: str = "max"
    smooth: bool = True
    min_share: float = MIN_SHARE
    judge: bool = True
    threads: int = 0

    def __post_init__(self) -> None:
        find_format(self.type)
        if self.observer not in OBSERVERS:
            raise UsageError(f"observer {self.observer!r} is not one of {', '.join(OBSERVERS)}")
        if (self.data is None) == (self.recipe is None):
            raise UsageError("ranges come either from calibration data or from a recipe: give one of them")
        if self.recipe is not None and self.recipe.type != self.type:
            raise UsageError(f"the recipe is for {self.recipe.type}, and {self.type} was asked for")
        if not 0 <= self.min_share <= 1:
            raise UsageError(f"a share of {self.min_share} is not between 0 and 1")


@dataclass(frozen=True)
class Quantised:
    """What was written: the recipe, its verdict on held-out data (None for a replay), and the bundle's own check (None
    where the source has no golden vectors or nothing was to be judged, so that the bundle is unverified)."""

    recipe: Recipe
    verdict: Verdict | None
    check: Check | None


def quantise_bundle(
    source: Path,
    request: Request,
    output: Path,
    *,
    force: bool = False,
    report: Report = log.info,
    progress: Progress = lambda work, what: work,
) -> Quantised:
    """Write a quantised bundle, which exists only if it passes its own check.

    Args:
        report: told what is being done, a line at a time.
        progress: wraps what is iterated over, with a word for it.

    Raises:
        UsageError, BundleError: the source, the data or the recipe cannot be used.
        ParityError: the tolerance cannot be held with ``min_share`` of the work quantised. The nearest recipe that holds
            it is written beside the output.
    """
    bundle = Bundle.open(source)
    _check_source(bundle, request)
    check_output(output, force=force)
    with staged_folder(output, force=force) as folder:
        workshop = Workshop(bundle, folder, find_format(request.type), request.threads)
        check_finite(bundle.folder, workshop.runnable_graphs().values())
        recipe, verdict = _settle(workshop, request, report, progress)
        nearest = output.with_name(f"{output.name}.{RECIPE}")
        if recipe.share < request.min_share:
            if request.recipe is not None:
                raise ParityError(_too_little_asked(recipe, request))
            recipe.save(nearest)
            raise ParityError(_too_little(recipe, request, nearest))
        report("writing the quantised bundle")
        _write(workshop, recipe, request, folder)
        check = None
        if request.judge and not bundle.unverified:
            report("comparing with the golden vectors")
            check = _final_check(folder, request.threads, progress)
            if not check:
                recipe.save(nearest)
                with tempfile.TemporaryDirectory(prefix=".nearest-", dir=output.parent) as scratch:
                    passing = _find_passing(bundle, request, recipe, Path(scratch), report, progress)
                if passing is not None:
                    passing.save(nearest)
                raise ParityError(_failed(check, recipe, request, nearest, passing))
        manifest = Bundle.open(folder, verify=False).manifest
        write_manifest(folder, replace(manifest, parity=None if check is None else check.to_json()))
    return Quantised(recipe, verdict, check)


def _check_source(bundle: Bundle, request: Request) -> None:
    if bundle.manifest.quantization:
        raise UsageError(f"{bundle.folder} is quantised already; start from the bundle that it was made of")
    if request.judge and bundle.unverified and request.data is None:
        raise UsageError(f"{bundle.folder} has no golden vectors and a recipe has no data: nothing could be judged on")


def _settle(workshop: Workshop, request: Request, report: Report, progress: Progress) -> tuple[Recipe, Verdict | None]:
    if request.recipe is not None:
        request.recipe.check_fits([group.name for group in workshop.groups])
        smoothing.check_fits(request.recipe.smoothings, workshop.groups)
        return request.recipe, None
    assert request.data is not None
    recipe = draft_recipe(workshop, request, report, progress)
    if not request.judge:
        return recipe, None
    report("judging on held-out data")
    found = sensitivity.search(
        recipe,
        make_judge(workshop, request.data),
        min_share=request.min_share,
        progress=lambda names: progress(names, "sensitivity"),
    )
    return found.recipe, found.verdict


def make_judge(workshop: Workshop, data: CalibrationSet) -> sensitivity.Try:
    """Judges recipes on the held-out data, beside the source."""
    with workshop.source_encoder() as reference:
        items = [*data.held_out, *awkward(data.held_out, held_out=True)]
        judge = Judge(reference, items, TOLERANCES[workshop.form.name])
    return lambda recipe: judge.judge(workshop.encoder(recipe))


def draft_recipe(workshop: Workshop, request: Request, report: Report, progress: Progress) -> Recipe:
    """The recipe that quantises everything: ranges and smoothing from the calibration set."""
    data, groups, form = request.data, workshop.groups, workshop.form
    assert data is not None
    graphs = workshop.runnable_graphs()
    items = [*data.items, *awkward(data.items, held_out=False)]
    report("observing ranges")
    common = {"seed": data.seed, "threads": request.threads}
    observers = observe(
        workshop.bundle, graphs, groups, items, **common, progress=lambda items: progress(items, "observing")
    )
    smoothings: list[smoothing.Smoothing] = []
    if request.smooth:
        report("searching the strength of smoothing")
        values = {name: value for model in graphs.values() for name, value in model.graph.initializers.items()}
        smoothings = smoothing.search(
            groups, observers, lambda name: read_tensor(workshop.bundle.folder, values[name].const_value), form
        )
    if smoothings:
        report("observing smoothed ranges")
        divisors = smoothing.divisors_of(smoothings, groups)
        observers = observe(
            workshop.bundle,
            graphs,
            groups,
            items,
            divisors=divisors,
            **common,
            progress=lambda items: progress(items, "observing"),
        )
    work = count_multiplies(groups, observers)
    return Recipe(
        type=request.type,
        observer=request.observer,
        groups=tuple(
            GroupRecipe(
                group.name,
                amax=OBSERVERS[request.observer](observers[group.name].histogram, form),
                share=work[group.name] / sum(work.values()),
            )
            for group in groups
        ),
        smoothings=tuple(smoothings),
        calibration=data.to_json(),
        token_table=True,
    )


def _write(workshop: Workshop, recipe: Recipe, request: Request, folder: Path) -> None:
    """Everything but the parity record."""
    source = workshop.bundle
    for name, model in workshop.pack(recipe).items():
        ir.save(model, folder / name)
    shutil.rmtree(folder / WORK)
    recipe.save(folder / RECIPE)
    for name in source.manifest.files:
        if name == SCORER or not (name.endswith(".onnx") or name.startswith(("weights/", "engines/"))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path(name), folder / name)
    quantization = {
        "type": recipe.type,
        "observer": recipe.observer,
        "share_of_linear_multiplies": recipe.share,
        "token_table": "int8" if recipe.token_table else None,
        "in_two_steps": recipe.twice,
        "kept_high": recipe.high,
        "calibration": dict(recipe.calibration),
        "source_fingerprint": source.manifest.fingerprint,
    }
    tools = {**source.manifest.tools, **{tool: importlib.metadata.version(tool) for tool in TOOLS[1:]}}
    write_manifest(folder, replace(source.manifest, quantization=quantization, parity=None, tools=tools))


def _final_check(folder: Path, threads: int, progress: Progress) -> Check:
    """Replay the golden vectors the way metaembed-check will: with the sessions of this machine, all images."""
    with Encoder.open(folder, verify=False, threads=threads) as encoder:
        return check_bundle(encoder, progress=lambda work: progress(work, "replaying"))


def _find_passing(
    bundle: Bundle, request: Request, recipe: Recipe, scratch: Path, report: Report, progress: Progress
) -> Recipe | None:
    report("the golden vectors are out of tolerance; looking for the nearest recipe that passes")
    workshop = Workshop(bundle, scratch, find_format(request.type), request.threads)
    judge = make_judge(workshop, request.data) if request.data else None
    return find_passing(workshop, recipe, judge, lambda names: progress(names, "sensitivity"))


def _failed(check: Check, recipe: Recipe, request: Request, nearest: Path, passing: Recipe | None) -> str:
    failures = check.failures()
    more = f"; and {len(failures) - SAID} more" if len(failures) > SAID else ""
    start = f"the {recipe.type} bundle fails its own check and was not written: {'; '.join(failures[:SAID])}{more}. "
    data = "More inputs, more like what users bring, may help (--data, --samples)"
    if passing is None:
        return (
            f"{start}{data}; or take its recipe, {nearest}, set more of its costliest groups to quantised: false and give it to "
            "metaembed-calibrate with --recipe"
        )
    accept = "" if passing.share >= request.min_share else f" --min-share {_floor(passing.share)}"
    return (
        f"{start}{data}; or keep {len(passing.high)} of {len(passing.groups)} groups high, {passing.share:.1%} of the work "
        f"quantised, with which a simulation passes: metaembed-calibrate BUNDLE --quantize {recipe.type} --recipe {nearest}{accept}"
    )


def _too_little(recipe: Recipe, request: Request, nearest: Path) -> str:
    high = recipe.high
    some = ", ".join(high[:3]) + (f" and {len(high) - 3} more" if len(high) > 3 else "")
    return (
        f"{recipe.type} holds its tolerance only with {len(high)} of {len(recipe.groups)} groups kept high ({some}), which "
        f"leaves {recipe.share:.1%} of the Linears' work quantised, below {request.min_share:.1%}. The nearest recipe that "
        f"passes is {nearest}: to accept it, metaembed-calibrate BUNDLE --quantize {recipe.type} --recipe {nearest} "
        f"--min-share {_floor(recipe.share)}"
    )


def _too_little_asked(recipe: Recipe, request: Request) -> str:
    return (
        f"the recipe keeps {len(recipe.high)} of {len(recipe.groups)} groups high, which leaves {recipe.share:.1%} of the Linears' "
        f"work quantised, below {request.min_share:.1%}; --min-share {_floor(recipe.share)} accepts it"
    )


def _floor(share: float) -> float:
    return int(share * 1000) / 1000
