"""metaembed-index info: what the groups of an index take and which fit where. Expected: bytes counted by hand."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from metaembed.runtime import cli_index
from metaembed.runtime.budget import Budget
from metaembed.runtime.devices import find_device
from metaembed.runtime.errors import UsageError
from metaembed.runtime.index import Index
from metaembed.runtime.index_fit import fit_index, room_beside
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.manifest import Bundle

GIB = 2**30
N, D, ENDS = 6, 128, (1, 4, 8, 16, 64)


@pytest.fixture(params=["bf16", "int8"])
def index(demo_bundle, tmp_path, request):
    """Six items in two segments, one of them deleted, beside a demo bundle in fp32."""
    folder = tmp_path / "index"
    layout = Layout(D, ENDS, request.param, screen=request.param == "bf16")
    Index.create(folder, layout, bundle=str(demo_bundle))
    vectors = np.random.default_rng(0).standard_normal((N, 64, D)).astype(np.float32)
    with Index.open(folder).writer() as writer:
        writer.add(list("abcd"), vectors[:4])
        writer.add(list("ef"), vectors[4:])
        writer.delete(["b"])
    return folder


def bytes_of(index):
    """Of one vector, as stored: 16 bits a number, or 8 and a float32 scale."""
    return D + 4 if json.loads(info(index, "--json"))["storage"] == "int8" else 2 * D


def info(index, *options, code=0):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli_index.main(["info", str(index), *map(str, options)]) == code
    return out.getvalue()


def test_groups_and_what_they_take(index):
    one = bytes_of(index)
    found = json.loads(info(index, "--json", "--device", "a100"))
    assert found["groups"] == [
        {
            "vectors": end,
            "group_bytes": N * (end - start) * one,
            "hold_bytes": N * end * one,
            "place_bytes": N * end * D * 4,  # float32, whatever is stored
        }
        for start, end in zip((0, *ENDS), ENDS, strict=False)
    ]
    assert (found["items"], found["deleted"], found["hold"], found["place"]) == (5, 1, None, 64)
    assert json.loads(info(index, "--json"))["groups"][0]["place_bytes"] is None


def test_what_is_held_is_what_info_counts(index):
    """The arrays that are in memory then, by numpy's own count."""
    with Index.open(index, hold=8) as opened:
        blocks = [
            array
            for part in opened.snapshot().parts
            for name, array in part.segment._blocks.items()
            if name.startswith(("vectors", "scales")) and array.base is None
        ]
        assert sum(array.nbytes for array in blocks) == fit_index(opened).groups[2].hold_bytes


@pytest.mark.parametrize(("vectors", "spare", "fits"), [(8, 0, 8), (8, -1, 4), (64, 10**9, 64), (1, 0, 1), (1, -1, 0)])
def test_the_option_that_fits_is_printed(index, vectors, spare, fits):
    """Exactly as many bytes as so many vectors take, and one less; nothing fits: exit 1."""
    memory = (N * vectors * bytes_of(index) + spare) / GIB
    text = info(index, "--memory-gib", repr(memory), code=0 if fits else 1)
    assert text.splitlines()[-1].endswith(f": --hold {fits}" if fits else ": none of these fit")


def test_beside_the_model_on_a_gpu(index, demo_bundle):
    """Nine tenths of 24 GiB are counted on. In bf16 the 8.292e9 parameters of Qwen2.5-VL 7B, less the 152,064 x 3,584 of its
    output head, which no retriever has, take 14.43 GiB, and an image of 1,024 tokens less than 1 more."""
    text = info(index, "--device", "A10").splitlines()
    assert text[-1].startswith("NVIDIA A10, ")
    assert text[-1].endswith(" GiB beside the model: --place 64, for a first stage of R_Q,64")
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    limits = replace(manifest.limits, image_tokens=1024)
    large = replace(manifest, geometry=KNOWN["7b"].geometry, precision="bf16", limits=limits, budgets=(Budget(16, 64),))
    assert 0.9 * 24 - 14.43 - 1 < room_beside(large, find_device("a10")) / GIB < 0.9 * 24 - 14.43
    with pytest.raises(UsageError, match="does not run the index's model: it lacks"):
        room_beside(large, find_device("orin-nano-4gb"))
    with pytest.raises(UsageError, match="has no hardware for its arithmetic"):
        room_beside(replace(large, quantization={"type": "fp8"}), find_device("a100"))


def test_mistakes_get_one_sentence(index, tmp_path, capsys):
    moved = tmp_path / "moved"
    Index.create(moved, Layout(D, ENDS), bundle=str(tmp_path / "gone"))
    for argv, sentence in [
        ((index, "--memory-gib", 0), "above 0"),
        ((index, "--memory-gib", "nan"), "above 0"),
        ((index, "--device", "abacus"), "there is no device 'abacus'"),
        ((moved, "--device", "a100"), "say where by --bundle DIR"),
    ]:
        info(*argv, code=2)
        assert sentence in capsys.readouterr().err
