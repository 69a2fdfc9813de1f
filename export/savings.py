"""What makes a build or what it serves smaller: changes to a request, each judged by the estimate that it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from metaembed.runtime.devices import Device
from metaembed.runtime.golden import SIDES
from metaembed.runtime.manifest import Limits, Manifest

from .build_options import QUERY_BATCH, BuildOptions, chosen_engines
from .memory import gib
from .profiles import EngineSpec

EXPORT, CALIBRATE, BUILD = "export", "calibrate", "build"  # the steps of making engines
# The step that a request was refused in -> the step that a change is made in -> how that is said.
ADVICE = {
    BUILD: {EXPORT: "export with {}", CALIBRATE: "metaembed-calibrate with {}", BUILD: "{}"},
    EXPORT: {EXPORT: "{}", CALIBRATE: "{}", BUILD: "export without --target and run metaembed-build with {}"},
}
FEWEST_IMAGE_TOKENS = 64


@dataclass(frozen=True)
class Change:
    """One change to a request: the step that makes it, the words to give there, and what would then be built."""

    step: str
    words: str
    manifest: Manifest
    engines: tuple[EngineSpec, ...]


def possible_changes(manifest: Manifest, device: Device, options: BuildOptions) -> Iterator[list[Change]]:
    """Each thing that could be changed, as a list of changes from the mildest on."""

    def change(step: str, words: str, manifest: Manifest = manifest, options: BuildOptions = options) -> Change:
        return Change(step, words, manifest, chosen_engines(manifest, options))

    if manifest.precision == "fp32":
        narrow = next(kind for kind in ("bf16", "fp16") if kind in device.types)
        yield [change(EXPORT, f"--precision {narrow}", replace(manifest, precision=narrow))]
    if not manifest.quantization:
        quantised = replace(manifest, quantization={"type": "int8", "token_table": "int8"})
        yield [change(CALIBRATE, "--quantize int8", quantised)]
    limits = manifest.limits
    yield [
        change(EXPORT, f"--max-image-tokens {tokens}", replace(manifest, limits=Limits(tokens, limits.text_tokens)))
        for tokens in _halves(limits.image_tokens, FEWEST_IMAGE_TOKENS)
    ]
    if options.layout == "separate":
        yield [change(BUILD, "--layout shared", options=replace(options, layout="shared"))]
    if options.profile_per_budget:
        yield [change(BUILD, "no --profile-per-budget", options=replace(options, profile_per_budget=False))]
    if options.side is None:
        for side in SIDES:
            yield [change(BUILD, f"--side {side}", options=replace(options, side=side))]
    yield [
        change(BUILD, f"--max-batch {batch}", options=replace(options, max_batch=batch))
        for batch in _halves(options.max_batch or QUERY_BATCH, 1)
    ]


def advise(
    changes: Iterable[list[Change]], size_of: Callable[[Change], int], size: int, limit: int, *, at: str, swap: str = ""
) -> str:
    """The changes that bring a size within a limit, each with the size that it leads to; where none does, those that lower it.

    Args:
        at: the step that refuses.
        swap: how to get enough swap, where swap raises the limit.
    """
    ways = [[(size_of(change), change) for change in way] for way in changes]
    found = [next((one for one in way if one[0] <= limit), None) for way in ways]
    enough = [one for one in found if one]
    lower = [way[-1] for way in ways if way and way[-1][0] < size and gib(way[-1][0]) != gib(size)]
    offers: dict[str, list[str]] = {}
    for new, change in enough or ([] if swap else lower):
        offers.setdefault(change.step, []).append(f"{change.words} ({gib(new)})")
    said = [ADVICE[at][step].format(" or ".join(words)) for step, words in offers.items()]
    if not said and not swap:
        return "no change to the request lowers that; choose a device with more memory"
    start = "options" if enough or swap else "none of these is enough alone"
    return f"{start}: {', or '.join(said + [swap] * bool(swap))}"


def _halves(size: int, least: int) -> Iterator[int]:
    while (size := size // 2) >= least:
        yield size
