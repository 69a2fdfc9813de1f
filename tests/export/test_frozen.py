"""Graphs frozen at one side and budget: expected vectors come from the graph that serves every budget, fed the same prompts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from metaembed.export.cli import main
from metaembed.export.frozen import trace_frozen
from metaembed.export.graph import attach_weights, check_operators, save_graph
from metaembed.runtime.check import KINDS, check_bundle
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import UsageError
from metaembed.runtime.frozen import FrozenSession, find_frozen, frozen_meta_tokens
from metaembed.runtime.layout import candidate_meta_tokens, lay_out_prompts
from metaembed.runtime.manifest import MANIFEST, Bundle, write_manifest
from metaembed.runtime.session_ort import OrtSession
from metaembed.runtime.structure import check_structure

VECTORS = 5
PROMPTS = [np.array([1, 9, 10, 11], np.int64), np.array([1, 12], np.int64)]


@pytest.fixture(scope="module")
def frozen(deep) -> OrtSession:
    model = trace_frozen(deep.geometry, "candidate", VECTORS)
    attach_weights(model, deep.refs("fp32"))
    check_operators(model)
    save_graph(model, deep.folder / "frozen.onnx")
    return OrtSession(deep.folder / "frozen.onnx", threads=1)


def feeds(deep) -> dict[str, np.ndarray]:
    """A candidate appends all three query rows and five of its own (FACTS 1)."""
    meta = candidate_meta_tokens(deep.geometry.text.vocab, deep.geometry.query_tokens, VECTORS)
    laid = lay_out_prompts(PROMPTS, [None, None], meta, VECTORS, image_token=deep.geometry.image_token_id)
    return {**laid.feeds(), "image_embeddings": np.zeros((1, 1, deep.geometry.text.hidden), np.float32)}


def test_a_frozen_graph_takes_prompts_only_and_gives_the_same_vectors(deep, frozen: OrtSession):
    given = feeds(deep)
    wanted = deep.open("language", "fp32", "fp32").run(given)["embeddings"]
    longest = max(map(len, PROMPTS))
    prompts = {name: given[name][:, :longest] for name in ("token_ids", "image_rows")}
    mine = frozen.run({**{name: given[name] for name in frozen.inputs}, **prompts})["embeddings"]
    assert set(frozen.inputs) == set(given) - {"rows"}
    assert mine.shape == (2, VECTORS, deep.geometry.dim)
    np.testing.assert_allclose(mine, wanted, atol=1e-6)


def test_a_frozen_session_takes_the_feeds_of_the_graph_that_serves_all(deep, frozen: OrtSession):
    meta = frozen_meta_tokens(deep.geometry, "candidate", VECTORS)
    session, given = FrozenSession(frozen, meta, VECTORS), feeds(deep)
    wanted = deep.open("language", "fp32", "fp32").run(given)["embeddings"]
    assert set(session.inputs) == set(given)
    np.testing.assert_allclose(session.run(given)["embeddings"], wanted, atol=1e-6)
    with pytest.raises(UsageError, match="frozen at 5 vectors"):
        session.run({**given, "rows": given["rows"][1:]})
    with pytest.raises(UsageError, match="serves nothing else"):
        session.run({**given, "token_ids": given["token_ids"] - 1})


FREEZING = "--model demo --budget 2,4 --freeze query --freeze candidate --precision bf16".split()


@pytest.fixture(scope="module")
def frozen_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen") / "bundle"
    assert main([*FREEZING, "--quiet", "-o", str(folder)]) == 0
    return folder


def test_a_dry_run_names_the_graphs_that_the_export_writes(frozen_bundle: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*FREEZING, "--dry-run", "-o", str(frozen_bundle.with_name("other"))]) == 0
    named, _, _ = capsys.readouterr().out.removeprefix("graphs: ").partition("\nweights: ")
    assert sorted(" ".join(named.split()).split(", ")) == sorted(path.name for path in frozen_bundle.glob("*.onnx"))


def test_the_gate_of_the_export_judges_frozen_graphs_too(frozen_bundle: Path):
    """Against HF, by its own golden vectors: every kind of input on both sides."""
    bundle = Bundle.open(frozen_bundle)
    assert set(find_frozen(bundle.manifest)) == {"language.query-2.onnx", "language.candidate-4.onnx"}
    records = bundle.manifest.parity["vectors"]
    judged = {(r["side"], r["r"], r["input"]): r["passed"] for r in records if r["input"].endswith(", frozen")}
    sizes = (("query", 2), ("candidate", 4))
    assert judged == {(*size, f"{kind}, frozen"): True for size in sizes for kind in KINDS}
    assert [record.name for record in check_structure(bundle) if "-" in record.name] == [
        "language.candidate-4.onnx",
        "language.query-2.onnx",
        "language.candidate-4.cpu.onnx",
        "language.query-2.cpu.onnx",
    ]


def test_a_frozen_graph_that_went_wrong_fails_the_check(frozen_bundle: Path, tmp_path: Path):
    """One value of its constants changed, and the manifest vouching for the forgery: only the vectors can tell."""
    folder = shutil.copytree(frozen_bundle, tmp_path / "bundle", copy_function=os.link)
    path = folder / "language.query-2.cpu.onnx"
    model = onnx.load(path, load_external_data=False)
    epsilon = next(tensor for tensor in model.graph.initializer if is_scalar_of(tensor, 1e-6))
    epsilon.CopyFrom(numpy_helper.from_array(np.array(0.5, np.float32), epsilon.name))
    path.unlink()  # the link, not the file that other tests share
    onnx.save(model, path)
    (folder / MANIFEST).unlink()
    write_manifest(folder, Bundle.open(frozen_bundle).manifest)
    with Encoder.open(folder) as encoder:
        check = check_bundle(encoder)
    assert {(side, r) for (side, r, kind), record in check.vectors.items() if not record} == {("query", 2)}
    assert all("frozen" in line for line in check.failures())


def is_scalar_of(tensor: onnx.TensorProto, value: float) -> bool:
    if tensor.external_data or tensor.data_type != onnx.TensorProto.FLOAT:
        return False
    values = numpy_helper.to_array(tensor)
    return values.size == 1 and np.isclose(values.item(), value)


def test_a_frozen_graph_is_small(deep, frozen: OrtSession):
    assert (deep.folder / "frozen.onnx").stat().st_size < 200_000
