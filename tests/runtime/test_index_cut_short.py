"""Segments cut short while an index has them open, in processes of their own: to read beyond the end is a signal (SIGBUS)."""

import json
import subprocess
import sys

import numpy as np
import pytest

from metaembed.runtime.index import Index
from metaembed.runtime.index_layout import Layout

D, KEPT, CUT = 64, 300, 200  # items of the two segments
SEARCH = """
import json, os, sys
import numpy as np
from metaembed.runtime.errors import BundleError
from metaembed.runtime.index import Index

def search(vectors):
    try:
        return sorted(hit.id for hit in index.search(np.ones((1, 64), np.float32), K, cascade=[(1, vectors)]))
    except BundleError as error:
        return str(error)

folder, path, size, K, options, before, after = json.loads(sys.argv[1])
with Index.open(folder, **options) as index:
    first = [search(vectors) for vectors in before]
    os.truncate(path, size)
    print(json.dumps([first, [search(vectors) for vectors in after]]))
"""


@pytest.fixture(params=[{}, {"storage": "int8"}, {"screen": True}], ids=["bf16", "int8", "screen"])
def made(request, tmp_path):
    """An index of two segments, and the file of the second."""
    folder = tmp_path / "index"
    Index.create(folder, Layout(D, (1, 4), **request.param))
    rng = np.random.default_rng(0)
    paths = []
    for name, count in (("kept", KEPT), ("cut", CUT)):
        with Index.open(folder).writer() as writer:
            writer.add([f"{name}{i}" for i in range(count)], rng.standard_normal((count, 4, D)).astype(np.float32))
        paths += [path for path in (folder / "segments").iterdir() if path not in paths]
    return folder, paths[1]


def outcome(made, *, k=10, size=5000, before=(), after=(1,), **options):
    """What searches with so many vectors found before and after the file was cut to a size, and the sentence that is due."""
    folder, path = made
    due = f"{path} has {size} bytes instead of {path.stat().st_size}; restore it, or index its items again"
    asked = json.dumps([str(folder), str(path), size, k, options, before, after])
    ended = subprocess.run([sys.executable, "-c", SEARCH, asked], capture_output=True, text=True)
    assert ended.returncode == 0, f"ended by {ended.returncode}: {ended.stderr}"
    return *json.loads(ended.stdout), due


@pytest.mark.parametrize("before", [[], [1], [4]], ids=["unread", "read in part", "read"])
@pytest.mark.parametrize("size", [0, 5000])
def test_a_search_names_it(made, before, size):
    _, after, due = outcome(made, before=before, size=size, after=[1, 4])
    assert after == [due, due]


def test_a_search_without_checksums_names_it(made):
    _, after, due = outcome(made, verify=False, after=[4])
    assert after == [due]


def test_it_is_left_out_where_damage_is(made):
    _, after, _ = outcome(made, k=KEPT + CUT, skip_damaged=True, before=[1], after=[1, 4])
    assert after == [sorted(f"kept{i}" for i in range(KEPT))] * 2


@pytest.mark.parametrize("skip_damaged", [False, True])
def test_what_is_held_in_memory_is_still_served(made, skip_damaged):
    """With a damaged row, whose checksum is read each time."""
    if skip_damaged:
        content = bytearray(made[1].read_bytes())
        content[8 + int.from_bytes(content[:8], "little")] ^= 1
        made[1].write_bytes(content)
    before, after, due = outcome(made, k=KEPT, hold=1, skip_damaged=skip_damaged, before=[1], after=[1, 4])
    assert after[0] == before[0]
    assert any(id_.startswith("cut") for id_ in after[0])
    assert after[1] == (sorted(f"kept{i}" for i in range(KEPT)) if skip_damaged else due)
