"""Build one engine, in a process of its own: ``python -m metaembed.export.engine_worker``, the order as JSON on stdin.

A process of its own, because Polygraphy settles on TensorRT or TensorRT-RTX when it is imported, because the builder's
memory can then be watched from outside and is given back when it ends, and because a builder that crashes or is killed
for memory must not take the command with it. Events leave as JSON lines on what was stdout; whatever the builder, its
libraries and Polygraphy print goes to the log.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import IO, Any

from polygraphy import config as polygraphy_config
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath, Profile, lazy_import_trt
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

trt = lazy_import_trt()
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Events:
    """JSON lines to the process that ordered the engine. TensorRT reports progress from several threads."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, **event: Any) -> None:
        with self._lock:
            print(json.dumps(event), file=self._stream, flush=True)


def make_progress_monitor(events: Events) -> Any:
    """TensorRT's progress monitor as events: one per step of the outermost phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base class exists once trt is imported
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            events.send(event="phase", name=phase_name, parent=parent_phase, steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            events.send(event="step", name=phase_name, done=step + 1, steps=self._steps.get(phase_name))
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def build(order: dict[str, Any], events: Events) -> None:
    """Parse, configure, build, write the plan and the timing cache, and report what the engine takes and gives."""
    events.send(event="started", version=trt.__version__)
    network = NetworkFromOnnxPath(order["onnx"], strongly_typed=True)()  # from the path: weights lie beside the graph
    builder, definition = network[0], network[1]
    monitor = make_progress_monitor(events)
    config = make_config(order, monitor, builder, definition)
    plan = Path(order["plan"])
    if not write_plan(builder, definition, config, plan):
        raise PolygraphyException("the builder returned no engine")
    save_timing_cache(config, order.get("timing_cache"))
    events.send(event="done", layers=definition.num_layers, tensors=describe_tensors(definition))


def make_config(order: dict[str, Any], monitor: Any, builder: Any, definition: Any) -> Any:
    """Polygraphy's builder configuration. No precision flags: precision is the graph's, but for TensorFloat-32, which has 10 of
    float32's 23 bits: on by default in both, off in Polygraphy for TensorRT, and left on for TensorRT-RTX.
    """
    common: dict[str, Any] = {
        "profiles": [make_profile(profile) for profile in order["profiles"]],
        "progress_monitor": monitor,
    }
    if polygraphy_config.USE_TENSORRT_RTX:
        capability = tuple(order["capability"])
        config = CreateConfigRTX(compute_capabilities=[capability], **common)(builder, definition)
    else:
        cache = order.get("timing_cache")
        known = cache if cache and Path(cache).is_file() else None
        config = CreateConfig(load_timing_cache=known, **common)(builder, definition)
    (config.set_flag if order.get("tf32") else config.clear_flag)(trt.BuilderFlag.TF32)
    return config


def make_profile(profile: dict[str, Any]) -> Any:
    made = Profile()
    for name, span in profile["ranges"].items():
        made.add(name, min=span["min"], opt=span["opt"], max=span["max"])
    return made


def write_plan(builder: Any, definition: Any, config: Any, path: Path) -> bool:
    """Serialise to a file, as a stream where the API has it (not in 10.3): a plan need not lie in memory twice."""
    with path.open("wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            return bool(builder.build_serialized_network_to_stream(definition, config, make_writer(file)))
        plan = builder.build_serialized_network(definition, config)
        return plan is not None and file.write(plan) > 0


def make_writer(file: IO[bytes]) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()


def save_timing_cache(config: Any, path: str | None) -> None:
    """Keep what the builder timed, so that the next build on this device starts from it. TensorRT-RTX times nothing."""
    if path is None or polygraphy_config.USE_TENSORRT_RTX:
        return
    cache = config.get_timing_cache()
    if cache is not None:
        whole = Path(path + ".part")
        whole.write_bytes(bytes(cache.serialize()))
        whole.replace(path)


def describe_tensors(definition: Any) -> dict[str, list[dict[str, Any]]]:
    """Names, types and shapes (-1 where dynamic) of inputs and outputs, as the parser understood them."""
    tensors = {
        "inputs": [definition.get_input(place) for place in range(definition.num_inputs)],
        "outputs": [definition.get_output(place) for place in range(definition.num_outputs)],
    }
    return {
        kind: [{"name": t.name, "type": t.dtype.name, "shape": list(t.shape)} for t in found]
        for kind, found in tensors.items()
    }


def end_with_parent() -> None:
    """Have this process killed when the one that ordered the engine ends in any way (prctl(2); Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def redirect_output(log: str) -> IO[str]:
    """Send what this process and its native libraries print to ``log``; return a stream to the former stdout."""
    events = os.fdopen(os.dup(1), "w")
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    return events


def main() -> int:
    end_with_parent()
    order = json.loads(sys.stdin.read())
    events = Events(redirect_output(order["log"]))
    G_LOGGER.module_severity = {"": G_LOGGER.VERBOSE}
    try:
        build(order, events)
    except Exception as error:  # whatever it is, the other process is to say it in one sentence
        events.send(event="failed", reason=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
