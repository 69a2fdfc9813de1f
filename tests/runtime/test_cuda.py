"""How the driver is called: through a compiled stand-in (stub_driver.c) that checks every handle, size and flag."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = """
import ml_dtypes, numpy as np
from metaembed.export.route import device_here
from metaembed.runtime.cuda import Cuda
from metaembed.runtime.device_buffers import Buffer, DeviceArray
from metaembed.runtime.errors import MetaEmbedError

gpu = Cuda()
assert (gpu.name, gpu.capability, gpu.integrated, gpu.memory_bytes) == ("Stub GPU", (8, 7), True, 64 << 30)
assert device_here().name == "agx-orin-64gb"
stream = gpu.create_stream()
values = np.arange(15, dtype=np.float32).reshape(3, 5).astype(ml_dtypes.bfloat16).T  # not contiguous
buffer = Buffer(gpu)
buffer.reserve(values.nbytes)
buffer.upload(values, stream)
kept = DeviceArray(gpu, buffer, (5, 3), values.dtype, stream)
np.testing.assert_array_equal(np.asarray(kept), values)
assert np.asarray(kept, np.float32).dtype == np.float32
gpu.begin_capture(stream)
graph = gpu.end_capture(stream)
gpu.launch(graph, stream)
gpu.destroy_graph(graph)
buffer.free()
gpu.synchronise(stream)
gpu.destroy_stream(stream)
for call, sentence in (
    (lambda: gpu.allocate(1 << 41), "CUDA: out of memory (cuMemAlloc_v2, error 2)"),
    (lambda: Cuda(1), "CUDA: other (cuDeviceGet, error 101)"),
):
    try:
        call()
    except MetaEmbedError as error:
        assert str(error) == sentence, error
    else:
        raise AssertionError(sentence)
"""


@pytest.mark.skipif(not (sys.platform == "linux" and shutil.which("gcc")), reason="needs Linux and gcc")
def test_handles_sizes_and_flags_reach_the_driver_whole(tmp_path):
    source = Path(__file__).with_name("stub_driver.c")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CHECKS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
