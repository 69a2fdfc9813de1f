"""Tables of what was measured on GPUs, from hand-made records; the expected cells are worked out by hand."""

from metaembed.bench.tables_gpu import make_gpu_latency, make_gpu_race, make_gpu_scoring

H200 = {"machine": {"gpu": "NVIDIA H200"}}


def race(contestant, median, **more):
    common = {"kind": "encoder_gpu", "model": "3b", "precision": "bf16", "opset": 20, "input": "text"}
    return common | H200 | {"contestant": contestant, "median_ms": median} | more


def test_the_race_has_a_row_an_input_and_the_best_of_pytorch_over_each_of_ours():
    table = make_gpu_race([race("bundle bf16", 9.0), race("bundle bf16", 10.0, gpu_mib=2048), race("HF SDPA", 25.0),
                           race("bundle bf16, CUDA graphs", 6.0, gpu_mib=3072),
                           race("torch.compile", 15.0), race("HF SDPA, 80 rows", 0, error="no memory")])  # fmt: skip
    assert table.rows == (
        ("NVIDIA H200", "3b bf16, opset 20, text", "10.0 (2.0)", "6.0 (3.0)", "25.0", "15.0", "cannot", "1.50", "2.50"),
    )


def test_columns_for_recorded_runs_are_there_where_one_was_measured():
    rows = [race("bundle bf16", 10.0), race("HF SDPA", 25.0)]
    without, beside = make_gpu_race(rows), make_gpu_race([*rows, race("bundle bf16, CUDA graphs", 5.0, input="image")])
    assert without.head == ("GPU", "model, input", "bundle", "HF SDPA", "ratio")
    assert beside.head == (
        "GPU", "model, input", "bundle", "bundle, CUDA graphs", "HF SDPA", "ratio", "ratio, CUDA graphs"
    )  # fmt: skip
    assert beside.rows == (
        ("NVIDIA H200", "3b bf16, opset 20, text", "10.0", "", "25.0", "2.50", ""),
        ("NVIDIA H200", "3b bf16, opset 20, image", "", "5.0", "", "", ""),
    )


def test_scoring_has_a_column_for_each_means_and_ratios_against_what_computes_the_same():
    common = {
        "kind": "scoring_gpu",
        "model": "3b",
        "artefact": "3b bundle, bf16",
        "budget": "1,1",
        "queries": 1,
        "items": 1000,
    }
    rows = [
        common | H200 | {"candidates": "device", "p50_ms": 2.0, "limit_ms": 0.5},
        common | H200 | {"candidates": "torch, float32 products", "p50_ms": 1.0, "limit_ms": 0.5},
        common | H200 | {"candidates": "cpu", "p50_ms": 40.0},
        common | H200 | {"candidates": "cpu", "p50_ms": 70.0, "queries": 32},
    ]
    assert make_gpu_scoring(rows).rows == (
        ("NVIDIA H200", "3b, 1,1", "1,000", "2.00", "1.00", "40.00", "25%", "0.50"),
        ("NVIDIA H200", "3b, 1,1, 32 queries", "1,000", "", "", "70.00", "", ""),
    )


def test_latency_is_beside_the_limit_where_there_is_one():
    common = {"kind": "engine", "model": "3b", "artefact": "x", "batch": 1, "p50_ms": 4.0, "p99_ms": 5.0} | H200
    image = common | {"graph": "vision.onnx", "image_tokens": 64, "limit_ms": 1.0}
    query = common | {"graph": "language.onnx", "side": "query", "vectors": 8, "positions": 40}
    assert make_gpu_latency([image, query]).rows == (
        ("NVIDIA H200", "3b, image of 64 tokens", "4.0", "5.0", "1.00", "25%"),
        ("NVIDIA H200", "3b, query, 8 vectors, 40 positions", "4.0", "5.0", "", ""),
    )


def test_without_records_there_are_no_tables():
    assert make_gpu_race([]) is make_gpu_latency([]) is make_gpu_scoring([]) is None
