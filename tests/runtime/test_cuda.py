"""How the driver is called: through a compiled stand-in (stub_driver.c) that checks every handle, size and flag."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = """
import ctypes
import ml_dtypes, numpy as np
from metaembed.export.route import device_here
from metaembed.runtime.cuda import Cuda
from metaembed.runtime.device_buffers import Buffer, DeviceArray
from metaembed.runtime.errors import MetaEmbedError

gpu = Cuda()
assert (gpu.name, gpu.capability, gpu.integrated, gpu.memory_bytes) == ("Stub GPU", (8, 7), True, 64 << 30)
assert device_here().name == "agx-orin-64gb"
contexts = ctypes.CDLL("libcuda.so.1").stub_contexts
assert contexts() == 0, "asking what there is takes no memory on the GPU"
gpu.use()
gpu.use()
assert contexts() == 1
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
module = gpu.load_module(b"ptx")
kernel = gpu.find_kernel(module, "maxsim", 65536)
wide = 0x1122334455667788
gpu.run_kernel(kernel, (3, 65535), 256, 65536, stream, ctypes.c_void_p(buffer.address), ctypes.c_ulonglong(wide))
assert ctypes.c_ulonglong.from_address(buffer.address).value == wide
gpu.unload_module(module)
buffer.free()
gpu.synchronise(stream)
gpu.destroy_stream(stream)
for call, sentence in (
    (lambda: gpu.allocate(1 << 41), "CUDA: out of memory (cuMemAlloc_v2, error 2)"),
    (lambda: gpu.load_module(b"none"), "CUDA: other (cuModuleLoadData, error 218)"),
    (lambda: Cuda(1), "CUDA: other (cuDeviceGet, error 101)"),
):
    try:
        call()
    except MetaEmbedError as error:
        assert str(error) == sentence, error
    else:
        raise AssertionError(sentence)
"""


FIND = """
import logging
from metaembed.runtime.cuda import find_gpu
logging.basicConfig(format="%(message)s")
assert find_gpu() is None
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """Runs Python code against the stand-in, and returns what it wrote to stderr."""
    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("needs Linux and gcc")
    source = Path(__file__).with_name("stub_driver.c")
    folders = {old: tmp_path_factory.mktemp("driver") for old in (False, True)}
    for old, folder in folders.items():
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", source]
        subprocess.run([*command, *(["-DOLD"] if old else [])], check=True)

    def run(code, *, old=False, **environment):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folders[old]), **environment}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


def test_handles_sizes_and_flags_reach_the_driver_whole(stub):
    stub(CHECKS)


def test_a_driver_that_finds_no_working_gpu_says_so_and_no_gpu_at_all_is_silent(stub):
    """802 is CUDA_ERROR_SYSTEM_NOT_READY (an A100 without its fabric manager), 100 is CUDA_ERROR_NO_DEVICE (cuda.h)."""
    assert stub(FIND, STUB_INIT="802").startswith("the NVIDIA driver is here and finds no GPU that works: CUDA: other")
    assert stub(FIND, STUB_INIT="100") == ""


def test_a_driver_that_lacks_a_function_is_too_old_and_says_so(stub):
    said = "the NVIDIA driver is here and finds no GPU that works: the driver is older than CUDA 11.4 (it lacks cuModuleLoadData)"
    assert stub(FIND, old=True).strip() == said
