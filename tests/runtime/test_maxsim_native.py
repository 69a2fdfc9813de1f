"""The C kernels, in every vector width, against float64 brute force and against the numpy reference."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metaembed.runtime import maxsim_native
from metaembed.runtime.errors import UsageError
from metaembed.runtime.int8 import Int8Vectors, dequantize_int8, quantize_int8
from metaembed.runtime.maxsim import maxsim, maxsim_reference, score_groups, score_parts

SOURCE = Path(maxsim_native.__file__).parent / "_maxsim.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(not COMPILER or not SOURCE.is_file(), reason="needs a C compiler and the sources")
BFLOAT16 = ml_dtypes.bfloat16


# Queries in float32 against bf16, float32 and int8 storage; dot instructions take int8 queries as codes of 16 bits.
TOLERANCE, INT8_TOLERANCE = 2e-6, 1.5e-5


@cache
def built(folder, defines):
    shipped = next(SOURCE.parent.glob("_maxsim*.so"), None)  # where the package was built with a compiler, this one's
    if shipped and not defines:
        return shipped
    target = Path(folder) / f"_maxsim{''.join(defines)}.so"
    flags = ["-O1", "-ffp-contract=fast", "-shared", "-fPIC", *defines] if defines else ["-O3", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(target)], check=True)
    return target


VARIANTS = {
    "dispatched": (),
    "width 4 (NEON)": ("-DTEST_WIDTH=4",),
    "width 8 (AVX2)": ("-DTEST_WIDTH=8",),
    "width 16 (AVX-512)": ("-DTEST_WIDTH=16",),
    "dots (AVX-512 BF16, VNNI)": ("-DTEST_WIDTH=16", "-DTEST_DOTS"),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def kernels(request, tmp_path_factory, monkeypatch):
    """The library as shipped, and the body of each width; vectors too wide for it become several."""
    library = built(str(tmp_path_factory.getbasetemp()), request.param)
    monkeypatch.setattr(maxsim_native, "__file__", str(library))
    monkeypatch.setattr(maxsim_native.Path, "glob", lambda *_: [library])
    maxsim_native.library.cache_clear()
    if maxsim_native.library() is None:
        pytest.skip("this processor has no kernel: numpy serves it")
    yield
    maxsim_native.library.cache_clear()


def unit(rng, *shape):
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def stored(vectors, storage):
    return quantize_int8(vectors) if storage == "int8" else vectors.astype(storage)


def tolerance(storage):
    return INT8_TOLERANCE if storage in ("int8", True) else TOLERANCE


def as_float64(vectors):
    return (dequantize_int8(vectors) if isinstance(vectors, Int8Vectors) else vectors).astype(np.float64)


def brute_force(queries, groups):
    """sum_i max_j <q_i, c_j> in float64."""
    candidates = np.concatenate([as_float64(group) for group in groups], axis=1)
    return np.einsum("qrd,nsd->qnrs", queries.astype(np.float64), candidates).max(-1).sum(-1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("storage", [BFLOAT16, np.float32, "int8"])
def test_kernels_equal_float64_brute_force(storage):
    """Every number of rows has a path of its own; 33 and 259 dims end in a tail, 31 have nothing else, 128 none."""
    rng = np.random.default_rng(0)
    for q, r_q, n, sizes, d in [
        (1, 1, 101, (1,), 128),
        (1, 2, 7, (1, 3), 33),
        (1, 3, 13, (2,), 259),
        (1, 4, 97, (1, 3, 4), 31),
        (3, 2, 5, (5,), 600),
        (1, 8, 3, (1, 3, 4, 8), 96),
        (1, 16, 29, (64,), 128),
        (1, 11, 14, (1, 3), 1100),
        (19, 8, 13, (1, 2), 40),
        (5, 7, 12, (3, 2), 64),
    ]:
        queries = unit(rng, q, r_q, d)
        groups = [stored(unit(rng, n, size, d), storage) for size in sizes]
        assert maxsim_native.can_score(groups)
        scores = maxsim_native.score(queries, [(groups, None)])[0]
        np.testing.assert_allclose(scores, brute_force(queries, groups), rtol=0, atol=tolerance(storage) * r_q)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dims", [64, 4096, 4128, 20_000])
@pytest.mark.parametrize("r_q", [1, 9])
def test_the_largest_codes_do_not_overflow(dims, r_q):
    """Every product as large as can be, and of one sign: by hand, dims * 1 * 127 * scale."""
    candidates = Int8Vectors(np.full((3, 2, dims), 127, np.int8), np.full((3, 2), 2.0**-7, np.float32))
    candidates.codes[1] = -127
    scores = maxsim_native.score(np.ones((1, r_q, dims), np.float32), [([candidates], None)])[0]
    np.testing.assert_allclose(scores, [[r_q * dims * sign * 127 * 2.0**-7 for sign in (1, -1, 1)]], rtol=1e-5)


@pytest.mark.usefixtures("kernels")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 18), st.integers(1, 30), st.integers(1, 7), st.integers(1, 300), st.booleans())
@example(1, 1, 1, 1, 13, True)  # few dims, over which what codes round does not cancel
def test_kernels_equal_the_reference_on_any_shape(q, r_q, n, r_c, d, int8):
    """The numpy reference judges; candidates are a prefix of longer items, so strides differ from sizes."""
    rng = np.random.default_rng(d)
    queries, candidates = unit(rng, q, r_q, d), stored(unit(rng, n, r_c + 2, d), "int8" if int8 else BFLOAT16)
    candidates = candidates.prefix(r_c) if int8 else candidates[:, :r_c]
    expected = maxsim_reference(queries, [candidates])
    np.testing.assert_allclose(
        maxsim_native.score(queries, [([candidates], None)])[0], expected, rtol=0, atol=tolerance(int8) * r_q
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("r_q", [1, 2, 4, 8])
def test_kernels_give_not_a_number_for_what_is_not_finite(value, r_q):
    """Minus infinity, or a NaN in the middle, would hide behind the maximum."""
    rng = np.random.default_rng(1)
    queries, candidates = unit(rng, 1, r_q, 70), unit(rng, 5, 3, 70).astype(BFLOAT16)
    candidates[2, 1, 33] = value
    np.testing.assert_array_equal(
        np.isfinite(maxsim_native.score(queries, [([candidates], None)])[0]), [[1, 1, 0, 1, 1]]
    )
    with pytest.raises(UsageError, match="candidate 2 has"):
        maxsim(queries, candidates)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("storage", [BFLOAT16, "int8"])
def test_chosen_rows_score_as_if_copied_out(storage):
    """Brute force over the copies; rows may repeat and come in any order."""
    rng = np.random.default_rng(5)
    queries, groups = unit(rng, 2, 4, 70), [stored(unit(rng, 9, size, 70), storage) for size in (1, 3)]
    chosen = np.array([8, 2, 2, 0, 5])
    expected = brute_force(queries, groups)[:, chosen]
    np.testing.assert_allclose(
        maxsim_native.score(queries, [(groups, chosen)])[0], expected, rtol=0, atol=4 * tolerance(storage)
    )
    np.testing.assert_allclose(maxsim_reference(queries, groups, chosen), expected, rtol=0, atol=8e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("threads", [1, 3])
def test_parts_scored_together_equal_brute_force_over_each(monkeypatch, threads):
    """Parts of unequal size, one empty, one by chosen rows; shares end within parts and at their ends."""
    monkeypatch.setattr(maxsim_native, "thread_count", lambda: threads)
    monkeypatch.setattr(maxsim_native, "SMALL_TASK", 1)
    rng = np.random.default_rng(7)
    queries, chosen = unit(rng, 2, 3, 70), np.array([5, 0, 5])
    sizes = (301, 0, 7, 96)
    groups = [[unit(rng, n, size, 70).astype(BFLOAT16) for size in (1, 2)] for n in sizes]
    parts = [(groups[0], None), (groups[1], None), (groups[2], chosen), (groups[3], None)]
    found = maxsim_native.score(queries, parts)
    for scores, (arrays, rows) in zip(found, parts, strict=True):
        expected = brute_force(queries, arrays)
        np.testing.assert_allclose(scores, expected if rows is None else expected[:, rows], rtol=0, atol=3 * TOLERANCE)


def test_parts_of_different_types_are_each_read_as_what_they_are():
    """One part in bf16 and one in float32: no kernel takes both, and neither may be read as the other."""
    rng = np.random.default_rng(8)
    queries, wide, narrow = unit(rng, 1, 2, 64), unit(rng, 5, 3, 64), unit(rng, 4, 3, 64).astype(BFLOAT16)
    found = score_parts(queries, [([narrow], None), ([wide], None)])
    for scores, candidates in zip(found, (narrow, wide), strict=True):
        np.testing.assert_allclose(scores, brute_force(queries, [candidates]), rtol=0, atol=2 * TOLERANCE)


def test_no_parts_give_no_scores():
    assert maxsim_native.score(np.ones((1, 2, 4), np.float32), []) == []


@pytest.mark.usefixtures("kernels")
def test_threads_give_the_scores_of_one_thread(monkeypatch):
    rng = np.random.default_rng(2)
    queries, candidates = unit(rng, 1, 4, 64), unit(rng, 5000, 3, 64).astype(BFLOAT16)
    monkeypatch.setattr(maxsim_native, "thread_count", lambda: 1)
    expected = maxsim_native.score(queries, [([candidates], None)])[0]
    monkeypatch.setattr(maxsim_native, "thread_count", lambda: 3)
    monkeypatch.setattr(maxsim_native, "SMALL_TASK", 1)
    np.testing.assert_array_equal(maxsim_native.score(queries, [([candidates], None)])[0], expected)


def test_int8_scales_that_lie_at_odd_distances_are_read_right():
    """Records of 126 codes and a scale, 130 bytes: no whole number of floats. Expected: float64 over the dequantised codes."""
    rng = np.random.default_rng(9)
    records = np.zeros(6, np.dtype([("codes", "i1", (1, 126)), ("scales", "<f4", (1,))]))
    records["codes"], records["scales"] = rng.integers(-127, 128, (6, 1, 126)), rng.random((6, 1)) + 0.5
    queries = unit(rng, 1, 2, 126)
    wide = records["codes"] * records["scales"].astype(np.float64)[..., None]
    found = maxsim(queries, Int8Vectors(records["codes"], records["scales"]))
    np.testing.assert_allclose(found, brute_force(queries, [wide]), rtol=1e-5)


FORKED = """
import os, threading
import numpy as np
from metaembed.runtime import maxsim_native
maxsim_native.thread_count, maxsim_native.SMALL_TASK = lambda: 3, 1
queries = np.ones((1, 4, 64), np.float32)
for items in (200, 900, 5000):  # shares of different numbers
    maxsim_native.score(queries, [([np.ones((items, 3, 64), np.float32)], None)])
pool = [thread for thread in threading.enumerate() if thread.name.startswith("maxsim")]
assert 0 < len(pool) <= 3, pool
if (child := os.fork()) == 0:
    maxsim_native.score(queries, [([np.ones((5000, 3, 64), np.float32)], None)])
    os._exit(0 if threading.active_count() > 1 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.usefixtures("kernels")
def test_one_pool_serves_every_size_and_a_forked_child_makes_its_own():
    """Found in review: a pool for each number of threads, and a child queued work for threads that it did not have, for ever."""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True)
    assert ended.stdout == "0\n", ended.stderr


INTERRUPTED = """
import os, signal, threading
import numpy as np
from metaembed.runtime import maxsim_native
maxsim_native.thread_count = lambda: 2
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would inherit that it is ignored
candidates = np.ones((60000, 16, 128), np.float32)
queries = candidates[:64].copy()
threading.Timer(0.15, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    for _ in range(50):
        maxsim_native.score(queries, [([candidates], None)])
except KeyboardInterrupt:
    del queries
    fill = [np.zeros(1 << 20) for _ in range(50)]  # what was freed is used again
    maxsim_native.score(candidates[:1].copy(), [([candidates], None)])
    print("interrupted")
"""


def test_an_interrupt_while_other_threads_score_frees_nothing_that_they_use():
    """Found in review: the main thread left, its arrays with it, and the others wrote on: a segmentation fault."""
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("magnitude", [1e-30, 1e-21, 1e-6, 1e6, 1e33])
def test_queries_of_any_magnitude_keep_their_bits(magnitude):
    """Two bfloat16 hold a float32 only in the middle of its range: elsewhere the kernels of floats must take over."""
    rng = np.random.default_rng(8)
    queries, candidates = unit(rng, 1, 3, 200) * np.float32(magnitude), unit(rng, 4, 2, 200).astype(BFLOAT16)
    expected = brute_force(queries, [candidates])
    np.testing.assert_allclose(
        maxsim_native.score(queries, [([candidates], None)])[0], expected, rtol=0, atol=6e-6 * magnitude
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("storage", [BFLOAT16, "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_that_is_not_finite_has_no_scores(value, storage):
    queries = unit(np.random.default_rng(6), 2, 4, 70)
    queries[1, 2, 3] = value
    candidates = stored(unit(np.random.default_rng(7), 5, 3, 70), storage)
    with pytest.raises(UsageError, match="candidate 0 has"):
        maxsim(queries, candidates)


def test_arrays_that_the_kernels_cannot_read_go_to_numpy():
    rng = np.random.default_rng(3)
    queries, candidates = unit(rng, 1, 4, 10), unit(rng, 6, 5, 20).astype(BFLOAT16)
    for odd in (candidates[:, :, ::2], candidates[:, ::2, :10], candidates[:, :, :10].astype(np.float16)):
        assert not maxsim_native.can_score([odd])
        np.testing.assert_allclose(maxsim(queries, odd), brute_force(queries, [odd]), atol=8e-6)


def test_without_a_compiled_library_numpy_scores(monkeypatch):
    rng = np.random.default_rng(4)
    queries, groups = unit(rng, 1, 4, 10), [unit(rng, 6, 1, 10), unit(rng, 6, 3, 10)]
    monkeypatch.setattr(maxsim_native, "library", lambda: None)
    np.testing.assert_allclose(score_groups(queries, groups), brute_force(queries, groups), atol=8e-6)
