"""Advice as text: the choice, its arithmetic, what else would fit, and what lacks when nothing does."""

from __future__ import annotations

from .advise import FETCH_GB_S, Advice, Option
from .plan import Plan
from .plan_device import GIB
from .plan_report import gib, table


def describe_advice(plan: Plan, advice: Advice, *, measured: bool) -> str:
    """All that metaembed-plan says of one device; ``measured`` tells that a quality curve was given."""
    needs = advice.needs
    latency = "any latency" if needs.latency_ms is None else f"at most {needs.latency_ms:g} ms a query"
    title = (
        f"{advice.device.title}, {plan.candidates:,} candidates, {latency}, {gib(advice.memory_bytes)} GiB usable; "
        f"expecting {needs.reached:.0%} of the device's limits"
    )
    if advice.chosen is None:
        return f"{title}\n\n{explain_nothing(advice)}\n"
    parts = [title, _recommend(advice.chosen), _arithmetic(plan, advice), _quality_note(advice.chosen, measured)]
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


def _quality_note(option: Option, measured: bool) -> str:
    if not measured or option.quality is None:
        return (
            "no quality curve was given: the most vectors that fit were taken (metaembed-bench quality BUNDLE -o FILE)"
        )
    note = f"nDCG@5 {option.quality:.3f} by the given curve"
    if option.first is not None:
        note += f", that of {option.budget} over everything: the most this cascade can reach unless the curve names it"
    if "int8" in (option.model_type, option.index_type) or option.model_type == "fp8":
        note += "; quantisation may cost up to 0.01 more, which metaembed-calibrate and quality measure"
    return note


def _table(options: tuple[Option, ...]) -> str:
    rows = (
        (
            option.cascade,
            option.model_type,
            option.index_type,
            option.placement,
            f"{option.device_bytes / GIB:.2f}",
            f"{option.latency_ms:.1f}",
            "-" if option.quality is None else f"{option.quality:.3f}",
        )
        for option in options
    )
    return table(("cascade", "model", "index", "vectors in", "GiB", "ms", "nDCG@5"), rows)
