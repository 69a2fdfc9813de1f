"""Run in an environment that has NVIDIA ModelOpt: ``python modelopt_ptq.py JOB.json``. It imports nothing of this project.

ModelOpt and onnxruntime overwrite each other's package, so the benchmark calls this file with another Python. The job names
the graph, its feeds (an npz of ``PLACE/INPUT`` arrays), the output and the arguments of ModelOpt's own ``quantize``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from modelopt.onnx.quantization import quantize
from onnxruntime.quantization.calibrate import CalibrationDataReader


class Feeds(CalibrationDataReader):
    """What each graph was fed, one item at a time; ModelOpt rewinds it between its passes."""

    def __init__(self, path: str) -> None:
        found: dict[int, dict[str, np.ndarray]] = {}
        with np.load(path) as arrays:
            for key in arrays.files:
                place, name = key.split("/", 1)
                found.setdefault(int(place), {})[name] = arrays[key]
        self.feeds = [found[place] for place in sorted(found)]
        self.rewind()

    def rewind(self) -> None:
        self._rest = iter(self.feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rest, None)

    def get_first(self) -> dict[str, np.ndarray]:
        return self.feeds[0]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    quantize(
        job["graph"],
        output_path=job["output"],
        calibration_data_reader=Feeds(job["feeds"]),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        **job["arguments"],
    )


if __name__ == "__main__":
    main()
