"""The index measured: cascades against the full scan, what opening reads, how time grows, what kills cost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from metaembed.runtime import maxsim_native
from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage, default_cascade
from metaembed.runtime.errors import UsageError
from metaembed.runtime.index import Hit, Index
from metaembed.runtime.index_layout import SEGMENTS, Layout
from metaembed.runtime.maxsim import maxsim
from metaembed.runtime.memory import GIB, available_memory

from .records import Record
from .scoring import added_mib, stored_candidates, unit_vectors
from .timing import time_interleaved

CASCADES = (
    ("1,1:1000", "16,64"),
    ("1,1:3000", "16,64"),
    ("1,1:10000", "16,64"),
    ("2,4:1000", "16,64"),
    ("4,8:1000", "16,64"),
    ("1,1:4000", "4,8:500", "16,64"),
    ("1,1:4000", "4,8:700", "16,64"),
    ("1,1:20000", "4,8:1000", "16,64"),
)
APPROXIMATE = (100, 300, 1000, 3000)  # survivors of a first stage that is also walked
QUERIES = 100
K = 10
ADD_BYTES = 1 << 28
MANY_DIMS, MANY_ADDED = 16, 1 << 19  # of the items over which a search's memory is measured, and of one addition


@contextmanager
def _temporary(folder: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        yield Path(made) / "index"


def measure_cascades(
    bundle: Path | None, scenes: int, items: int, folder: Path | None, rounds: int
) -> Iterator[Record]:
    """Milliseconds and recall@10 of cascades against the full scan, over the demo's scenes or more items like them."""
    pages, queries, source = _pages_like(bundle, scenes, items)
    largest = Budget(queries.shape[1], pages.shape[1])
    with _temporary(folder) as made, _filled(made, pages) as index:
        named = {" ".join(stages): {"cascade": [Stage.parse(text) for text in stages]} for stages in CASCADES}
        named["default: " + " ".join(map(str, default_cascade(items, largest)))] = {}
        for name, values in _against_full(index, queries, largest, named, rounds):
            yield {"cascade": name, "items": len(pages), "source": source, **values}


def measure_approximate(
    bundle: Path | None, scenes: int, items: int, folder: Path | None, rounds: int
) -> Iterator[Record]:
    """Cascades from (1,1) to (2,4), their first stage a scan and a walk through the HNSW graph, over items like scenes.

    Every cascade is walked here, be it worth it by `AnnStage.worth_walking` or not.
    """
    pages, queries, source = _pages_like(bundle, scenes, items, vectors=4)
    with _temporary(folder) as made, _filled(made, pages) as index:
        with index.writer() as writer:
            start = time.perf_counter()
            writer.build_ann()
            built = time.perf_counter() - start
        index.ann.worth_walking = 1
        named = {}
        for keep in APPROXIMATE:
            stages = [Stage(Budget(1, 1), keep), Stage(Budget(2, 4))]
            named[f"1,1:{keep} 2,4"] = {"cascade": stages}
            named[f"approximate 1,1:{keep} 2,4"] = {"cascade": stages, "approximate": True}
        for name, values in _against_full(index, queries[:, :2], Budget(2, 4), named, rounds):
            yield {"cascade": name, "items": len(pages), "source": source, "build_s": built, **values}


def _pages_like(
    bundle: Path | None, scenes: int, items: int, vectors: int | None = None
) -> tuple[NDArray[np.generic], NDArray[np.float32], str]:
    """The first vectors of candidates, of scenes or of more items like them; queries (n, r, d); and what they are."""
    if bundle is None:
        raise UsageError(
            "a cascade's recall depends on the model: name its bundle with --bundle (or choose with --only)"
        )
    pages, queries = _encode_scenes(bundle, scenes)
    pages = pages[:, :vectors]
    if items <= len(pages):
        return pages, queries, "scenes"
    return draw_like(pages, items), queries, f"items drawn like {len(pages):,} scenes"


def _against_full(
    index: Index, queries: NDArray[np.float32], budget: Budget, named: Mapping[str, Mapping[str, Any]], rounds: int
) -> Iterator[tuple[str, Record]]:
    """Searches by name and arguments, timed in turns with the full scan by ``budget``, and their recall of its top 10."""
    full = [Stage(budget)]
    truth = [_ids(index.search(query, K, cascade=full)) for query in queries]
    timed = time_interleaved(
        {"full": lambda: index.search(queries[0], K, cascade=full)}
        | {name: partial(index.search, queries[0], K, **how) for name, how in named.items()},
        rounds=rounds,
    )
    for name, how in named.items():
        found = [_ids(index.search(query, K, **how)) for query in queries]
        yield (
            name,
            {
                "queries": len(queries),
                **timed[name].to_json(),
                "full_ms": timed["full"].median_ms,
                "times_full": timed["full"].median_ms / timed[name].median_ms,
                "recall_at_10": float(np.mean([len(a & b) / len(b) for a, b in zip(found, truth, strict=True)])),
            },
        )


def draw_like(pages: NDArray[np.generic], items: int) -> NDArray[np.generic]:
    """Items (n, r, d) with the mean and covariance of `pages`, over all of an item's vectors and dims together.

    Every item is the mean plus a random combination of the pages' deviations: a normal distribution with exactly the
    pages' covariance (of rank at most their number), so what (1,1) says of (16,64) is kept. Vectors are then normalised.
    """
    rng = np.random.default_rng(0)
    flat = pages.astype(np.float32).reshape(len(pages), -1)
    mean = flat.mean(axis=0)
    deviations = (flat - mean) / np.float32(np.sqrt(len(flat)))
    drawn = np.empty((items, *pages.shape[1:]), ml_dtypes.bfloat16)
    for start in range(0, items, 2048):
        count = min(2048, items - start)
        some = mean + rng.standard_normal((count, len(flat)), np.float32) @ deviations
        some = some.reshape(count, *pages.shape[1:])
        drawn[start : start + count] = some / np.linalg.norm(some, axis=-1, keepdims=True)
    return drawn


def measure_opening(gib: float, folder: Path | None) -> Record:
    """What the first (1,1) query of a fresh process reads from the disk, of an index of `gib` GiB at D = 3584."""
    layout = Layout.for_vectors(3584, 64)
    items = max(96, int(gib * GIB / layout.item_bytes))
    rng = np.random.default_rng(0)
    with _temporary(folder) as made:
        Index.create(made, layout)
        _add_all(made, stored_candidates(rng, min(items, ADD_BYTES // layout.item_bytes), 64, 3584), items)
        for path in (made / SEGMENTS).iterdir():
            _forget_cached(path)
        query = unit_vectors(rng, 1, 3584)
        before, start = _bytes_read(), time.perf_counter()
        with Index.open(made) as index:
            index.search(query, K, cascade=[Stage(Budget(1, 1))])
            first = time.perf_counter() - start
            read = _bytes_read() - before
            start = time.perf_counter()
            index.search(query, K, cascade=[Stage(Budget(1, 1))])
            following = time.perf_counter() - start
    return {
        "index_gib": items * layout.item_bytes / GIB,
        "items": items,
        "group_mib": items * 3584 * 2 / 2**20,
        "read_mib": read / 2**20,
        "first_query_ms": first * 1e3,
        "next_query_ms": following * 1e3,
    }


def measure_search_memory(items: int, folder: Path | None) -> Record:
    """The most that a search over many small items adds to this process, in MiB, the files that it maps not counted.

    A scan for ten, and a cascade whose first stage keeps as many as that of `default_cascade`.
    """
    rng = np.random.default_rng(0)
    stages = {"1,1": ["1,1"], "default": [f"1,1:{max(K, items // 10)}", "2,2"]}
    peaks = {}
    with _temporary(folder) as made:
        Index.create(made, Layout(MANY_DIMS, (1, 2)))
        with Index.open(made).writer() as writer:
            for start in range(0, items, MANY_ADDED):
                ids = [f"item{i:08}" for i in range(start, min(start + MANY_ADDED, items))]
                writer.add(ids, unit_vectors(rng, len(ids), 2, MANY_DIMS))
        query = unit_vectors(rng, 2, MANY_DIMS)
        with Index.open(made) as index:
            for name, cascade in stages.items():
                search = partial(index.search, query, K, cascade=cascade)
                search()  # reads the files, and compares checksums
                peaks[name] = added_mib(search)
    threads = maxsim_native.thread_count()
    return {
        "dim": MANY_DIMS,
        "items": items,
        "added_mib": peaks,
        "threads": threads,
        "mib_per_thread": max(peaks.values()) / threads,
    }


def measure_scaling(most: int, rounds: int) -> Iterator[Record]:
    """One query at D = 128 over a growing number of candidates, and of vectors of each; what does not fit is left out."""
    rng = np.random.default_rng(0)
    query = unit_vectors(rng, 1, 16, 128)
    available = available_memory() or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for r_c in (1, 4, 8, 16, 64):
        counts = [count for count in (most // 100, most // 30, most // 10, most // 3, most) if count]
        counts = [count for count in counts if count * r_c * 256 < 0.8 * available]
        candidates = stored_candidates(rng, counts[-1], r_c, 128)
        for r_q in (1, 16) if r_c == 1 else (16,):
            timed = time_interleaved(
                {str(count): partial(maxsim, query[:, :r_q], candidates[:count]) for count in counts},
                rounds=rounds,
            )
            for count in counts:
                yield {"dim": 128, "budget": f"{r_q},{r_c}", "candidates": count, **timed[str(count)].to_json()}


WORKER = """
import sys, numpy as np
from metaembed.runtime.index import Index
rng = np.random.default_rng(int(sys.argv[2]))
with Index.open(sys.argv[1]) as index, index.writer() as writer:
    while len(index) < int(sys.argv[3]):
        ids = [f"item{len(index) + i}" for i in range(rng.integers(1, 20))]
        writer.add(ids, rng.standard_normal((len(ids), 64, 128)).astype(np.float32))
        print(*ids, flush=True)
        if rng.random() < 0.1:
            writer.compact(1 << 24)
"""


def measure_kills(kills: int, items: int, folder: Path | None) -> Record:
    """SIGKILL a process that adds items, at random moments, restart it, and verify every item it had acknowledged.

    Its standard output, written after each `add` returned, is the record of what was acknowledged.
    """
    rng = random.Random(0)
    totals = {"kills": 0, "indexes": 0, "acknowledged": 0, "lost": 0, "twice": 0, "damaged": 0}
    with _temporary(folder) as made:
        while totals["kills"] < kills:
            shutil.rmtree(made, ignore_errors=True)
            Index.create(made, Layout.for_vectors(128, 64))
            acknowledged: set[str] = set()
            while len(acknowledged) < items and totals["kills"] < kills:
                acknowledged |= set(_run_and_kill(made, items, totals["kills"], rng))
                totals["kills"] += 1
                with Index.open(made) as index:
                    totals["damaged"] += len(index.verify())
            with Index.open(made) as index, index.writer() as writer:
                totals["indexes"] += 1
                totals["acknowledged"] += len(acknowledged)
                totals["lost"] += len(acknowledged - writer.known(acknowledged))
                totals["twice"] += len(index) - len(writer.known([f"item{i}" for i in range(2 * items)]))
    return {"items": items, **totals}


def _run_and_kill(folder: Path, items: int, seed: int, rng: random.Random) -> list[str]:
    command = [sys.executable, "-c", WORKER, str(folder), str(seed), str(items)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        try:
            process.wait(rng.uniform(0, 0.25))
        except subprocess.TimeoutExpired:
            process.kill()
        return (first + process.stdout.read()).split()


def _encode_scenes(bundle: Path, count: int) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Pages (n, r_c, d) in bfloat16 and text queries (q, r_q, d) of the demo's test split."""
    from metaembed.runtime.encoder import Encoder

    from .scenes_queries import make_split
    from .scenes_render import render

    split = make_split("test", 0, scenes=count, queries=(QUERIES, 0, 0), varied=0.0)
    with Encoder.open(bundle) as encoder:
        parts = [
            encoder.encode_candidates(images=[render(scene) for scene in split.scenes[start : start + 64]])
            for start in range(0, count, 64)
        ]
        return np.concatenate(parts).astype(ml_dtypes.bfloat16), encoder.encode_queries(
            [query.text for query in split.queries]
        )


@contextmanager
def _filled(folder: Path, pages: NDArray[np.generic]) -> Iterator[Index]:
    Index.create(folder, Layout.for_vectors(pages.shape[2], pages.shape[1]))
    _add_all(folder, pages, len(pages))
    with Index.open(folder) as index:
        yield index


def _add_all(folder: Path, pages: NDArray[np.generic], items: int) -> None:
    """Add items, the given ones over and over."""
    step = min(len(pages), max(1, ADD_BYTES // pages[0].nbytes))
    with Index.open(folder).writer() as writer:
        for start in range(0, items, step):
            count = min(step, items - start)
            at = start % (len(pages) - count + 1)
            writer.add([f"item{start + i:08}" for i in range(count)], pages[at : at + count])


def _ids(hits: Sequence[Hit]) -> set[str]:
    return {hit.id for hit in hits}


def _forget_cached(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_read() -> int:
    """Bytes that this process has fetched from storage, page faults and read-ahead included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
