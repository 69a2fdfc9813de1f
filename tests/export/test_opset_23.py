"""Opset 23: Attention and RMSNormalization in place of primitives. Expected vectors are the primitive graph's, and HF's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from metaembed.export import trace
from metaembed.export.attention_parts import PARTS
from metaembed.export.bundle import NARROW
from metaembed.export.graph import attach_weights, check_operators, save_graph, widen_for_cpu
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle, cpu_graph
from metaembed.runtime.session_ort import OrtSession
from metaembed.runtime.structure import FUSED, allowed_operators, check_structure


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo in fp32, its parity with HF checked by the export itself, and in bf16."""
    from metaembed.export.cli import main

    folder = tmp_path_factory.mktemp("opset-23")
    options = ["--model", "demo", "--budget", "1,1", "--budget", "8,16", "--opset", "23", "--quiet"]
    assert main([*options, "-o", str(folder / "fp32")]) == 0
    assert main([*options, "--precision", "bf16", "--no-parity", "-o", str(folder / "bf16")]) == 0
    return {name: folder / name for name in ("fp32", "bf16")}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_norm_and_the_decoders_attention_are_one_operator_each(bundles: dict[str, Path], precision: str):
    """Counted by hand from the geometry: two norms a layer or block and one at the end; no Softmax in the decoder."""
    bundle = Bundle.open(bundles[precision])
    geometry = bundle.manifest.geometry
    for twin in (False, True) if precision == "bf16" else (False,):
        language, vision = (operators(bundle.path(cpu_graph(n) if twin else n)) for n in (LANGUAGE, VISION))
        assert language["Attention"] == geometry.text.layers
        assert language["RMSNormalization"] == 2 * geometry.text.layers + 1
        assert vision["RMSNormalization"] == 2 * geometry.vision.depth + 1
        computes_in_float32 = twin or precision == "fp32"
        split = len(geometry.vision.full_attention_blocks) * (PARTS - 1) if computes_in_float32 else 0
        assert (language["Softmax"], vision["Softmax"], vision["Attention"]) == (0, geometry.vision.depth + split, 0)
        assert {*language, *vision} - allowed_operators(23) == set()
        assert not FUSED & allowed_operators(20)


def test_the_manifest_says_which_opset_and_the_graphs_import_it(bundles: dict[str, Path]):
    bundle = Bundle.open(bundles["bf16"])
    assert bundle.manifest.opset == 23
    for name in (LANGUAGE, VISION, cpu_graph(LANGUAGE), cpu_graph(VISION)):
        imported = onnx.load(bundle.path(name), load_external_data=False).opset_import
        assert [(entry.domain, entry.version) for entry in imported] == [("", 23)]
    graphs = {VISION, LANGUAGE, SCORER, cpu_graph(VISION), cpu_graph(LANGUAGE)}
    assert {record.name for record in check_structure(bundle)} == graphs


def test_the_two_opsets_give_the_same_vectors_on_a_padded_batch(bundles: dict[str, Path], demo_bundle: Path):
    """Expected: the primitive graph, to the fp32 tolerance. Lengths differ, so that all but one item are padded."""
    texts = ["x", "a red umbrella and a blue anchor", "Где находится ближайшая станция метро?"]
    with Encoder.open(demo_bundle) as primitive, Encoder.open(bundles["fp32"]) as fused:
        for side, budget in (("queries", 1), ("queries", 8), ("candidates", 16)):
            wanted, mine = (getattr(e, f"encode_{side}")(texts, budget=budget) for e in (primitive, fused))
            np.testing.assert_allclose(mine, wanted, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copied_layers_and_images_give_the_primitive_graphs_vectors(deep, precision: str):
    """Six layers of which three are copies, images and a text in a batch, grouped heads; over the same bytes."""
    model = trace.trace_language(deep.geometry, precision, 23)
    attach_weights(model, deep.refs(precision))
    check_operators(model)
    if precision in NARROW:
        widen_for_cpu(model, NARROW[precision])
    path = deep.folder / f"language-{precision}-23.onnx"
    save_graph(model, path)
    mine = deep.encode(OrtSession(path, threads=1))
    np.testing.assert_allclose(mine, deep.run("language", precision, precision), atol=1e-5)


def test_bf16_builds_for_an_a100_and_fp32_is_refused_beforehand(bundles: dict[str, Path], capsys):
    pytest.importorskip("tensorrt_rtx")
    from metaembed.export.cli_build import main

    assert main([str(bundles["bf16"]), "--target", "a100", "--budget", "8,16", "--quiet"]) == 0
    assert "engines/a100-80gb/language.plan" in Bundle.open(bundles["bf16"]).manifest.files
    assert main([str(bundles["fp32"]), "--target", "a100", "--quiet"]) == 2
    assert "no kernel for an Attention operator in fp32" in capsys.readouterr().err
