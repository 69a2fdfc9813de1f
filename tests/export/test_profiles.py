"""Optimisation profiles cut to budgets and limits: expected shapes by hand, window counts by the runtime's own resizing."""

import pytest

from metaembed.export.build_options import BuildOptions, chosen_engines
from metaembed.export.profiles import Sizes, most_windows, plan_engines, square_windows
from metaembed.runtime.budget import Budget
from metaembed.runtime.errors import UsageError
from metaembed.runtime.images import ImageRules, smart_resize
from metaembed.runtime.layout import count_windows
from metaembed.runtime.manifest import Bundle

BUDGETS = (Budget(1, 1), Budget(8, 16), Budget(16, 64))


def sizes(**changes):
    values = {"hidden": 7, "patch_values": 1176, "query_tokens": 16, "image_tokens": 100, "prompt_tokens": 160}
    return Sizes(**{**values, **changes})


def test_two_profiles_span_the_budgets_and_the_limits():
    """By hand: 100 image tokens of 10 x 10 units are 3 x 3 windows; queries append r_q, candidates 16 + r_c."""
    vision, language = plan_engines(sizes(), BUDGETS, query_batch=5, candidate_batch=3)
    query, candidate = language.profiles
    assert (query.name, candidate.name) == ("query", "candidate")
    span = query.ranges["token_ids"]
    assert (span.min, span.opt, span.max) == ((1, 2), (1, 48), (5, 176))
    span = candidate.ranges["token_ids"]
    assert (span.min, span.opt, span.max) == ((1, 18), (1, 100 + 32 + 80), (3, 160 + 80))
    assert candidate.ranges["positions"].max == (3, 3, 240)
    assert (query.ranges["rows"].min, query.ranges["rows"].max) == ((1,), (16,))
    assert (candidate.ranges["rows"].min, candidate.ranges["rows"].max) == ((1,), (64,))
    assert query.ranges["image_embeddings"].min == (1, 1, 7)
    assert candidate.ranges["image_embeddings"].opt == (1, 9 * 16, 7)
    assert vision.profiles[0].ranges["patches"].opt == (1, 9, 64, 1176)
    assert vision.profiles[0].ranges["patches"].max == (5, most_windows(100), 64, 1176)


def test_one_budget_fixes_the_answer_rows():
    _, language = plan_engines(sizes(), (Budget(8, 16),))
    for profile, rows in zip(language.profiles, (8, 16), strict=True):
        span = profile.ranges["rows"]
        assert span.min == span.opt == span.max == (rows,)


def test_a_profile_for_each_size_or_an_engine_for_each_size():
    names = ["query-1", "query-8", "query-16", "candidate-1", "candidate-16", "candidate-64"]
    _, language = plan_engines(sizes(), BUDGETS, profile_per_budget=True)
    assert [profile.name for profile in language.profiles] == names
    _, *separate = plan_engines(sizes(), BUDGETS, layout="separate")
    assert [engine.name for engine in separate] == names
    assert [engine.name for engine in plan_engines(sizes(), BUDGETS[:1], layout="separate", side="query")] == [
        "vision",
        "query-1",
    ]


@pytest.mark.parametrize("tokens", [16, 64, 256, 1024])
def test_no_image_within_the_limit_needs_more_windows_than_the_profile(tokens):
    """Judge: the runtime's own resizing, over aspect ratios up to 200 and sizes small and large."""
    rules = ImageRules.from_config(
        {"min_pixels": 3136, "max_pixels": 28 * 28 * 1024, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
        tokens,
    )
    largest = most_windows(tokens)
    seen = set()
    for thin in (28, 41, 56, 83, 120, 300, 900):
        for ratio in (1, 1.5, 2, 3, 7, 20, 50, 100, 150, 199):
            try:
                height, width = smart_resize(thin, int(thin * ratio), rules)
            except UsageError:
                continue  # the limit is below what such a strip needs
            grid = (height // 14, width // 14)
            seen.add(count_windows(grid))
            assert count_windows(grid) <= largest
    assert square_windows(tokens) in seen
    assert largest <= tokens


def test_a_wrong_layout_or_batch_is_refused():
    with pytest.raises(UsageError, match="layout 'x' is not one of shared, separate"):
        plan_engines(sizes(), BUDGETS, layout="x")
    with pytest.raises(UsageError, match="at least one item"):
        plan_engines(sizes(), BUDGETS, query_batch=0)


def test_the_scorer_keeps_all_of_a_bundles_budgets(demo_bundle):
    """An index encoded elsewhere, a cascade's first stage and metaembed-check ask for others than engines were cut to."""
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    *_, scorer = chosen_engines(manifest, BuildOptions(budgets=(Budget(8, 16),)))
    assert [profile.name for profile in scorer.profiles] == [f"chunks-{size}" for size in (1, 4, 8, 16, 64)]
    assert {profile.ranges["queries"].max[1] for profile in scorer.profiles} == {16}
