"""Smoothing: exact on the demo's own graphs, exponents by hand, and a search that helps where there is an outlier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metaembed.calibration.dataset import CalibrationSet
from metaembed.calibration.formats import FORMATS
from metaembed.calibration.observe import encode_item
from metaembed.calibration.recipe import Recipe
from metaembed.calibration.smoothing import Smoothing, changes_of, exponents_for, places, smooth, source_of
from metaembed.calibration.workshop import Workshop
from metaembed.runtime.manifest import Bundle


@pytest.fixture(scope="module")
def workshop(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(Bundle.open(small_bundle), tmp_path_factory.mktemp("workshop"), FORMATS["int8"], threads=1)


def random_smoothings(workshop: Workshop) -> tuple[Smoothing, ...]:
    """Exponents of -8..8 at every place where smoothing can be folded."""
    rng = np.random.default_rng(0)
    found = []
    for source, groups in places(workshop.groups).items():
        names = tuple(linear.name for group in groups for linear in group.linears)
        channels = int(groups[0].linears[0].stored.shape[1])
        found.append(Smoothing(source, names, 0.5, tuple(rng.integers(-8, 9, channels).tolist())))
    return tuple(found)


def test_the_smoothed_demo_gives_the_same_embeddings(workshop, calibration_set: CalibrationSet):
    """Powers of two scale every product without rounding. Bit for bit, but for sums that a kernel orders differently."""
    smoothings = random_smoothings(workshop)
    recipe = Recipe("int8", "max", (), smoothings)
    with workshop.source_encoder() as source, workshop.encoder(recipe) as smoothed:
        for item in calibration_set.items[:6]:
            np.testing.assert_array_equal(encode_item(smoothed, item), encode_item(source, item))


def test_every_norm_and_gated_mlp_of_the_demo_is_a_place(workshop):
    """By hand: 3 decoder layers and 4 vision blocks, each with two norms and one up_proj before down_proj."""
    found = places(workshop.groups)
    assert len(found) == 3 * (3 + 4)
    last = found["language_model.layers.2.input_layernorm"]
    assert sorted(linear.name.rsplit(".")[-1] for group in last for linear in group.linears) == [
        "k_proj",
        "q_proj",
        "v_proj",
    ]


def test_a_forgotten_side_of_the_fold_changes_the_result(workshop, calibration_set: CalibrationSet):
    """The exactness test above can fail: dividing the norm without multiplying the Linears is no identity."""
    half = tuple(replace(smoothing, linears=()) for smoothing in random_smoothings(workshop))
    with workshop.source_encoder() as source, workshop.encoder(Recipe("int8", "max", (), half)) as broken:
        item = calibration_set.items[0]
        assert np.abs(encode_item(broken, item) - encode_item(source, item)).max() > 1e-3


@pytest.mark.parametrize(
    ("linear", "source"),
    [
        ("language_model.layers.7.self_attn.k_proj", "language_model.layers.7.input_layernorm"),
        ("language_model.layers.7.self_attn.o_proj", None),
        ("visual.blocks.3.mlp.gate_proj", "visual.blocks.3.norm2"),
        ("visual.blocks.3.mlp.down_proj", "visual.blocks.3.mlp.up_proj"),
        ("visual.blocks.3.attn.proj", None),
        ("visual.merger.mlp.0", None),
    ],
)
def test_smoothing_is_folded_into_what_makes_the_input(linear, source):
    assert source_of(linear) == source


def test_exponents_by_hand():
    """Strength .5, weights' columns all 4: log2 s = .5 log2 a - 1 = (0, -1, -1, 1) for a = (4, 1, 1, 16); median -.5."""
    weight = np.full((3, 4), 4.0)
    weight[1:] = 0.5
    assert exponents_for(np.array([4.0, 1.0, 1.0, 16.0]), weight, 0.5).tolist() == [0, 0, 0, 2]


def test_dead_channels_are_left_alone():
    weight = np.ones((2, 3))
    weight[:, 1] = 0
    assert exponents_for(np.array([0.0, 64.0, 64.0]), weight, 0.75).tolist() == [0, 0, 0]


def test_a_source_is_divided_and_its_readers_multiplied():
    """Channels of an up_proj are its rows and its bias; of a down_proj, its columns."""
    changes = changes_of([Smoothing("m.up_proj", ("m.down_proj",), 0.5, (1, -2))])
    ones = np.ones((2, 2), np.float32)
    assert smooth(changes, "m.up_proj.weight", ones).tolist() == [[0.5, 0.5], [4, 4]]
    assert smooth(changes, "m.up_proj.bias", ones[0]).tolist() == [0.5, 4]
    assert smooth(changes, "m.down_proj.weight", ones).tolist() == [[2, 0.25], [2, 0.25]]
    assert smooth(changes, "m.gate_proj.weight", ones) is ones
