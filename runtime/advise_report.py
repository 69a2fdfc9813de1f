"""Advice as text: the choice, its arithmetic, what else would fit, and what lacks when nothing does."""

from __future__ import annotations

from .advise import FETCH_GB_S, Advice, Option
from .memory import GIB
from .plan import Plan
from .plan_report import gib, table
from .quality_curve import QualityCurve


def describe_advice(plan: Plan, advice: Advice, curve: QualityCurve | None = None) -> str:
    """All that metaembed-plan says of one device; ``curve`` is the one that the advice went by."""
    needs = advice.needs
    latency = "any latency" if needs.latency_ms is None else f"at most {needs.latency_ms:g} ms a query"
    title = (
        f"{advice.device.title}, {plan.candidates:,} candidates, {latency}, {gib(advice.memory_bytes)} GiB usable; "
        f"expecting {needs.reached:.0%} of the device's limits"
    )
    if advice.chosen is None:
        return f"{title}\n\n{explain_nothing(advice)}\n"
    parts = [title, _recommend(advice.chosen), _arithmetic(plan, advice), _quality_note(plan, advice.chosen, curve)]
    if advice.runners_up:
        parts.append("also within the limits:\n" + _table(advice.runners_up))
    return "\n\n".join(parts) + "\n"


def explain_nothing(advice: Advice) -> str:
    """Which limit nothing keeps, in one sentence each."""
    fastest, smallest, needs = advice.fastest, advice.smallest, advice.needs
    if smallest.device_bytes > advice.memory_bytes:
        return (
            f"nothing fits: the smallest way ({smallest.cascade}, {smallest.model_type} model, {smallest.index_type} index) "
            f"takes {gib(smallest.device_bytes)} GiB, {gib(smallest.device_bytes - advice.memory_bytes)} GiB too much"
        )
    if needs.latency_ms is not None and fastest.latency_ms > needs.latency_ms:
        return (
            f"nothing fits: the fastest way ({fastest.cascade}, {fastest.model_type} model, {fastest.index_type} index) "
            f"takes {fastest.latency_ms:.1f} ms, {fastest.latency_ms - needs.latency_ms:.1f} ms too long"
        )
    return (
        f"nothing keeps both limits at once: {fastest.cascade} is fast enough ({fastest.latency_ms:.1f} ms) in "
        f"{gib(fastest.device_bytes)} GiB, {smallest.cascade} small enough ({gib(smallest.device_bytes)} GiB) in "
        f"{smallest.latency_ms:.1f} ms"
    )


def describe_option(option: Option) -> str:
    """One option in a sentence."""
    where = "everything on the device"
    if option.placement != "device":
        where = f"the first stage's vectors on the device, all vectors ({gib(option.elsewhere_bytes)} GiB) in {option.placement}"
        where = where.replace("in disk", "on disk")
    how = f"budget {option.budget}" if option.first is None else f"cascade {option.cascade}"
    return f"{how}; {option.model_type} model, {option.index_type} {'index' if option.first is None else 'first stage'}; {where}"


def _recommend(option: Option) -> str:
    return f"use {describe_option(option)}"


def _arithmetic(plan: Plan, advice: Advice) -> str:
    option, device = advice.chosen, advice.device
    assert option is not None
    reached = f"at {advice.needs.reached:.0%}"
    first = option.first or option.budget
    rows = [
        ("model and activation", gib(option.model_bytes), f"{option.encode_ms:.1f}", f"one text query, {reached}"),
        (
            f"stage {first}",
            gib(option.index_bytes),
            f"{option.score_ms:.1f}",
            _scoring_words(plan, option, device.bandwidth_gb_s),
        ),
    ]
    if option.placement != "device":
        rate = FETCH_GB_S[option.placement]
        rows.append(
            (
                "fetching survivors",
                "",
                f"{option.fetch_ms:.1f}",
                f"{option.survivors:,} items at {rate:g} GB/s, assumed",
            )
        )
    limit = advice.needs.latency_ms
    rows.append(
        ("sum", gib(option.device_bytes), f"{option.latency_ms:.1f}", f"limit {limit:g} ms" if limit else "no limit")
    )
    return table(("", "GiB", "ms", "how"), rows)


def _scoring_words(plan: Plan, option: Option, bandwidth: float) -> str:
    first = option.first or option.budget
    values = f"{plan.candidates:,} x {first.candidate} x {plan.geometry.dim} {option.index_type} values at {bandwidth:g} GB/s"
    return values if option.first is None else f"{values}, then {option.survivors:,} at {option.budget}"


def _quality_note(plan: Plan, option: Option, curve: QualityCurve | None) -> str:
    if curve is None or option.quality is None:
        return (
            "no quality curve was given: the most vectors that fit were taken (metaembed-bench quality BUNDLE -o FILE)"
        )
    notes = [f"nDCG@5 {quality_words(option)} by the given curve; its best is {curve.best:.3f}"]
    if option.quality_least != option.quality:
        most = "this cascade reached" if option.cascade in curve.values else f"{option.budget} reaches over everything"
        notes.append(
            f"the most is what {most}, the least what {option.first} reaches alone: how much is lost where only "
            f"{option.survivors:,} of {plan.candidates:,} survive, the curve does not say"
        )
    if "int8" in (option.model_type, option.index_type) or option.model_type == "fp8":
        notes.append("quantisation may cost up to 0.01 more, which metaembed-calibrate and quality measure")
    if curve.candidates < plan.candidates:
        over = f"was measured over {curve.candidates:,}" if curve.candidates else "does not say over how many"
        notes.append(f"the curve {over} candidates; among {plan.candidates:,} more look alike, so expect less")
    return "\n".join(notes)


def quality_words(option: Option) -> str:
    """``0.970``, or ``0.832 to 0.970`` where a first stage may lose; ``-`` without a curve."""
    if option.quality is None:
        return "-"
    if option.quality_least is None:
        return f"{option.quality:.3f} at most"
    least = f"{option.quality_least:.3f}"
    return least if option.quality_least == option.quality else f"{least} to {option.quality:.3f}"


def _table(options: tuple[Option, ...]) -> str:
    rows = (
        (
            option.cascade,
            option.model_type,
            option.index_type,
            option.placement,
            f"{option.device_bytes / GIB:.2f}",
            f"{option.latency_ms:.1f}",
            quality_words(option),
        )
        for option in options
    )
    return table(("cascade", "model", "index", "vectors in", "GiB", "ms", "nDCG@5"), rows)
