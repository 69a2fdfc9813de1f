"""What is no array of real numbers is one sentence wherever embeddings are taken, and never silently something else."""

import warnings

import ml_dtypes
import numpy as np
import pytest

from metaembed.runtime.arrays import as_array
from metaembed.runtime.errors import UsageError
from metaembed.runtime.index import Index
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.int8 import Int8Vectors, quantize_int8
from metaembed.runtime.maxsim import maxsim

SHAPE = N, R, D = 2, 3, 5
ODD = {
    "complex": (np.ones(SHAPE, complex), "are complex128"),
    "structures": (np.zeros(SHAPE, [("a", "f4")]), "'a'"),
    "bytes": (np.zeros(SHAPE, "V2"), "are [|]V2"),  # of bfloat16's kind and size
    "masked": (np.ma.masked_array(np.ones(SHAPE, np.float32), mask=True), "masked array"),
    "masked in no place": (np.ma.masked_array(np.ones(SHAPE, np.float32)), "masked array"),
    "ragged": ([[[1.0] * D] * R, [[1.0]]], "cannot be read as an array of numbers"),
    "text": ("embeddings", "are <U10"),
    "texts": (np.full(SHAPE, "1"), "are <U1"),
    "None": (None, "are object"),
    "Nones": (np.full(SHAPE, None), "are object"),
    "generator": ((row for row in np.ones(SHAPE)), "are object"),
    "truths": (np.ones(SHAPE, bool), "are bool"),
    "dates": (np.zeros(SHAPE, "datetime64[s]"), "are datetime64"),
    "number": (np.float32(1), r"\(\)"),
}


@pytest.fixture(params=ODD)
def odd(request):
    return ODD[request.param]


def test_maxsim_refuses_them_on_both_sides(odd):
    for sides in ((odd[0], np.ones(SHAPE, np.float32)), (np.ones(SHAPE, np.float32), odd[0])):
        with pytest.raises(UsageError, match=odd[1]):
            maxsim(*sides)


def test_an_index_refuses_them_and_is_left_as_it_was(odd, tmp_path):
    Index.create(tmp_path / "i", Layout(D, (1, R)))
    with Index.open(tmp_path / "i") as index, index.writer() as writer:
        with pytest.raises(UsageError, match=odd[1]):
            writer.add(["a", "b"], odd[0])
        assert len(index) == 0
    assert list((tmp_path / "i" / "segments").iterdir()) == []


@pytest.mark.parametrize("name", [name for name in ODD if name != "number"])
def test_quantising_refuses_them(name):
    with pytest.raises(UsageError, match=ODD[name][1]):
        quantize_int8(ODD[name][0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int8, np.uint16, ml_dtypes.bfloat16])
def test_real_numbers_of_any_type_are_what_numpy_makes_of_them(dtype):
    values = np.arange(30).reshape(SHAPE).astype(dtype)
    assert as_array(values, "embeddings") is values
    np.testing.assert_array_equal(as_array(values.tolist(), "embeddings"), np.arange(30).reshape(SHAPE))


def test_an_index_takes_whole_numbers_and_lists(tmp_path):
    """By hand: R query vectors of ones and vectors of ones or twos, R * D and 2 * R * D."""
    Index.create(tmp_path / "i", Layout(D, (1, R)))
    with Index.open(tmp_path / "i") as index, index.writer() as writer, warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.add(["a"], np.ones((1, R, D), int))
        writer.add(["b"], [[[2.0] * D] * R])
        hits = index.search([[1.0] * D] * R, 2)
    assert [(hit.id, hit.score) for hit in hits] == [("b", 2 * R * D), ("a", R * D)]


@pytest.mark.parametrize(
    ("codes", "scales", "says"),
    [
        ([[[1]]], np.ones((1, 1), np.float32), "not a list"),
        (np.ones((1, 1, 1), np.int8), [[1.0]], "not a list"),
        (np.ma.masked_array(np.ones((1, 1, 1), np.int8)), np.ones((1, 1), np.float32), "not a MaskedArray"),
    ],
)
def test_int8_vectors_are_plain_arrays(codes, scales, says):
    with pytest.raises(UsageError, match=says):
        Int8Vectors(codes, scales)
