"""Cloned layers against a whole trace: every expected graph, and every expected vector, comes from tracing all layers.

The geometry has six decoder layers and eight vision blocks with full attention at blocks 0, 3, 4 and 7 (conftest.py).
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from metaembed.export.repeat import repeat_layers
from metaembed.runtime.errors import BundleError
from metaembed.runtime.session_ort import OrtSession

# A whole trace is slow and cloning does not look at the precision, so each graph is traced whole in one of them.
GRAPHS = [("vision", "bf16"), ("language", "fp32")]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def weight_uses(model: ir.Model) -> Counter[tuple[str, str, int]]:
    """Which operators read each weight, and at which of their inputs."""
    return Counter(
        (value.name, node.op_type, place)
        for value in model.graph.initializers.values()
        if re.match(r"visual|language_model|prompt_embed", value.name)
        for node, place in value.uses()
    )


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_cloned_graph_has_the_operators_and_weight_uses_of_a_whole_trace(deep, name, precision):
    cloned, whole = deep.trace(name, precision), deep.trace(name, precision, True)
    assert operators(cloned) == operators(whole)
    assert weight_uses(cloned) == weight_uses(whole)
    expected = {key for key in deep.weights("bf16").tensors if key.startswith("visual.") == (name == "vision")}
    assert {key for key, _, _ in weight_uses(cloned)} == expected


@pytest.mark.parametrize(
    ("name", "precision", "stored"),
    [("vision", "bf16", "bf16"), ("language", "fp32", "fp32"), ("language", "fp32", "bf16")],
)
def test_cloned_graph_computes_what_a_whole_trace_computes(deep, name, precision, stored):
    """Its own weights, and (fp32 over bf16, bf16 widened) weights behind a cast. The same operators: to 1e-6."""
    mine, wanted = (deep.run(name, precision, stored, whole=whole) for whole in (False, True))
    np.testing.assert_allclose(mine, wanted, atol=1e-6 * np.abs(wanted).max())


def test_layers_differ_so_that_a_swap_would_be_seen(deep, monkeypatch):
    """The comparison above has teeth: swapping one weight of two layers moves the embeddings by far more than 1e-6."""
    before = deep.run("language", "fp32", "fp32")
    refs = deep.refs("fp32")
    a, b = (f"language_model.layers.{layer}.self_attn.v_proj.weight" for layer in (2, 3))
    monkeypatch.setattr(deep, "refs", lambda stored: refs | {a: refs[b], b: refs[a]})
    path = deep.save("language", "fp32", "fp32", note="swapped")
    assert np.abs(deep.encode(OrtSession(path, threads=1)) - before).max() > 1e-4


@pytest.mark.parametrize("plan", [[1, 0, 2], [0, 1, 3], [0, 1, 1]])
def test_a_plan_that_does_not_fit_the_trace_is_refused(deep, plan):
    model = deep.trace("language", "fp32").clone()
    with pytest.raises(BundleError, match="does not fit the traced layers"):
        repeat_layers(model, "language_model.layers", plan)
