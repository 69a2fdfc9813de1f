"""What an export costs: seconds, peak memory and bytes beyond the weights, measured from outside the process.

An export's cost does not depend on what the weights are: checkpoints measured here are sparse files of the real size,
which take no disk and read as zeros.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metaembed.export.checkpoint import INDEX
from metaembed.export.safetensors_writer import SHARD_BYTES, TensorSpec, shard_header, shard_index, split_shards
from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.frozen import find_frozen
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.golden import SIDES
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.manifest import Bundle
from metaembed.runtime.tensors import expected_tensors

COMMAND = "from metaembed.export.cli import main; raise SystemExit(main())"
ALL = ("1,1", "2,4", "4,8", "8,16", "16,64")
SAMPLE_SECONDS = 0.02
MIB = 2**20


@dataclass(frozen=True)
class ProcessCost:
    """One process: wall and processor seconds, peak resident memory (mapped files included), and peak anonymous memory.

    Processor seconds of all threads: what a machine that is busy otherwise does not change much.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_mib: float
    peak_anonymous_mib: float


def run_measured(command: Sequence[str]) -> ProcessCost:
    """Run a command to its end. Anonymous memory is sampled fifty times a second; the peak RSS is the kernel's own.

    Raises:
        MetaEmbedError: it failed; the last lines of its stderr are given.
    """
    start, anonymous = time.perf_counter(), 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            anonymous = max(anonymous, _anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
        assert process.stderr is not None
        words = process.stderr.read().decode(errors="replace").strip()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise MetaEmbedError(f"{' '.join(command[3:])} failed ({process.returncode}): {words[-500:]}")
    busy = usage.ru_utime + usage.ru_stime
    return ProcessCost(seconds, busy, usage.ru_maxrss * 1024 / MIB, anonymous / MIB)


def _anonymous_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def model_config(model: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a known size; with ``layers``, a shallower one of the same width."""
    config = deepcopy(KNOWN[model].config)
    return config if layers is None else config | {"num_hidden_layers": layers}


def write_sparse_checkpoint(config: Mapping[str, Any], folder: Path, dtype: str = "BF16") -> None:
    """A checkpoint folder with real headers and sizes and no data: holes, which read as zeros."""
    specs = {name: TensorSpec(shape, dtype) for name, shape in expected_tensors(Geometry.from_config(config)).items()}
    shards = split_shards(specs, SHARD_BYTES)
    folder.mkdir(parents=True)
    for name, shard in shards.items():
        header = shard_header(shard)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in shard.values()))
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) > 1:
        (folder / INDEX).write_text(json.dumps(shard_index(shards)))
    copy_assets(folder)


def copy_assets(folder: Path) -> None:
    """The demo's tokenizer and processor: an export needs some, and does not look at which."""
    from metaembed.export.models import DEMO_FOLDER

    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((DEMO_FOLDER / name).read_bytes())


def measure_export(
    checkpoint: Path, output: Path, budgets: Sequence[str], precision: str = "bf16", freeze: Sequence[str] = ()
) -> dict[str, Any]:
    """Export a checkpoint folder with our command, without parity; the record of its cost."""
    options = [f"--budget={budget}" for budget in budgets] + [f"--freeze={side}" for side in freeze]
    arguments = ["--model", str(checkpoint), *options, "--precision", precision, "--no-parity", "-o", str(output)]
    cost = run_measured([sys.executable, "-c", COMMAND, *arguments, "--quiet", "-f"])
    return {"tool": "metaembed-export", "budgets": list(budgets), **asdict(cost), **bundle_bytes(output)}


def bundle_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weights, of the graphs, and of everything that is not a weight."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    weights = sum(size for path, size in sizes.items() if path.parent.name == "weights")
    graphs = sum(size for path, size in sizes.items() if path.suffix == ".onnx")
    return {"weight_bytes": weights, "graph_bytes": graphs, "bytes_beyond_weights": sum(sizes.values()) - weights}


def measure_frozen(checkpoint: Path, output: Path, budget: str, without: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a graph frozen at each side of one budget: bytes of each, and the mean seconds that each adds."""
    values = measure_export(checkpoint, output, (budget,), freeze=SIDES)
    names = find_frozen(Bundle.open(output, verify=False).manifest)
    added = {f"{key}_each": (values[key] - without[key]) / len(names) for key in ("seconds", "cpu_seconds")}
    return {**values, "frozen_bytes": {name: (output / name).stat().st_size for name in names}, **added}


def measure_plain_export(checkpoint: Path, output: Path, budget: str) -> dict[str, Any]:
    """``torch.onnx.export`` of the loaded modules at one budget, in a process of its own."""
    cost = run_measured([sys.executable, "-m", "metaembed.bench.export_plain", str(checkpoint), str(output), budget])
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return {"tool": "torch.onnx.export", "budgets": [budget], **asdict(cost), "bytes_written": written}


def compare_exports(
    checkpoint: Path, work: Path, *, plain: bool = False, freeze: bool = False
) -> Iterator[dict[str, Any]]:
    """All budgets at once, one alone (what a further budget costs), then with frozen graphs, and the plain way if asked for."""
    yield measure_export(checkpoint, work / "all", ALL)
    one = measure_export(checkpoint, work / "one", ALL[3:4])
    yield one
    if freeze:
        yield measure_frozen(checkpoint, work / "frozen", ALL[3], one)
    if plain:
        yield measure_plain_export(checkpoint, work / "plain", ALL[3])
