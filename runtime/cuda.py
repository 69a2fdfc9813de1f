"""The little of CUDA that a session needs, through ctypes on the driver's own library.

Not cuda-python: it needs Python 3.11 and one wheel per CUDA major version, and JetPack 6 has 3.10 and 12.6. Not the runtime
library either: the driver's comes with the driver, everywhere, under one name and with a stable ABI
(https://docs.nvidia.com/cuda/cuda-driver-api). TensorRT works in the primary context, so this does too.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import lru_cache
from typing import Any

from .devices import Capability
from .errors import MetaEmbedError

log = logging.getLogger(__name__)
_NO_DEVICE, _NOT_FOUND = 100, 500  # CUDA_ERROR_NO_DEVICE, CUDA_ERROR_NOT_FOUND
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_DYNAMIC_SHARED = 8  # CUfunction_attribute
_NON_BLOCKING, _THREAD_LOCAL = 1, 1  # CUstream_flags, CUstreamCaptureMode
_pointer, _size = ctypes.c_void_p, ctypes.c_size_t

# The driver takes 64-bit handles; without declared types ctypes would pass Python integers as C int and cut them.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_pointer, ctypes.c_int),
    "cuDeviceGetName": (_pointer, ctypes.c_int, ctypes.c_int),
    "cuDeviceGetAttribute": (_pointer, ctypes.c_int, ctypes.c_int),
    "cuDeviceTotalMem_v2": (_pointer, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_pointer, ctypes.c_int),
    "cuCtxSetCurrent": (_pointer,),
    "cuMemAlloc_v2": (_pointer, _size),
    "cuMemFree_v2": (_pointer,),
    "cuMemHostAlloc": (_pointer, _size, ctypes.c_uint),
    "cuMemFreeHost": (_pointer,),
    "cuMemcpyHtoDAsync_v2": (_pointer, _pointer, _size, _pointer),
    "cuMemcpyDtoHAsync_v2": (_pointer, _pointer, _size, _pointer),
    "cuStreamCreate": (_pointer, ctypes.c_uint),
    "cuStreamSynchronize": (_pointer,),
    "cuStreamDestroy_v2": (_pointer,),
    "cuStreamBeginCapture_v2": (_pointer, ctypes.c_int),
    "cuStreamEndCapture": (_pointer, _pointer),
    "cuGraphInstantiateWithFlags": (_pointer, _pointer, ctypes.c_ulonglong),
    "cuGraphLaunch": (_pointer, _pointer),
    "cuGraphExecDestroy": (_pointer,),
    "cuGraphDestroy": (_pointer,),
    "cuModuleLoadData": (_pointer, ctypes.c_char_p),
    "cuModuleGetFunction": (_pointer, _pointer, ctypes.c_char_p),
    "cuModuleUnload": (_pointer,),
    "cuFuncSetAttribute": (_pointer, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (_pointer, *[ctypes.c_uint] * 7, _pointer, _pointer, _pointer),
    "cuGetErrorString": (ctypes.c_int, _pointer),
}


class CudaError(MetaEmbedError):
    """A call of the driver failed, with this code (CUresult)."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class Cuda:
    """One GPU: memory, copies, streams and captured graphs, by address and handle (all plain integers).

    Its context, which takes memory on the GPU and may be denied (by exclusive mode, or where memory is out), is made by the
    first ``use``: a command that only asks what GPU there is leaves all of it to the builder.

    Raises:
        MetaEmbedError: there is no driver or no GPU, or a call fails (the sentence is CUDA's).
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._library = _load_driver()
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._device = device.value
        self._context = 0

    @property
    def name(self) -> str:
        text = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    @property
    def capability(self) -> Capability:
        return self._attribute(_MAJOR), self._attribute(_MINOR)

    @property
    def integrated(self) -> bool:
        return bool(self._attribute(_INTEGRATED))

    @property
    def memory_bytes(self) -> int:
        total = ctypes.c_size_t()
        self._call("cuDeviceTotalMem_v2", ctypes.byref(total), self._device)
        return total.value

    def use(self) -> None:
        """Make the context current for the calling thread: a session may be run from another than opened it."""
        self._context = self._context or self._new("cuDevicePrimaryCtxRetain", self._device)
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        return self._new("cuMemAlloc_v2", size)

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def allocate_host(self, size: int) -> int:
        """Page-locked memory, which copies run from and to without the CPU."""
        return self._new("cuMemHostAlloc", size, 0)

    def free_host(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync_v2", device, host, size, stream)

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", host, device, size, stream)

    def create_stream(self) -> int:
        return self._new("cuStreamCreate", _NON_BLOCKING)

    def synchronise(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def begin_capture(self, stream: int) -> None:
        self._call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Stop recording; the recorded work as a graph that can be launched again and again."""
        graph = ctypes.c_void_p()
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            return self._new("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def load_module(self, ptx: bytes) -> int:
        """Compile PTX for this GPU, or find it in the driver's cache."""
        return self._new("cuModuleLoadData", ptx)

    def unload_module(self, module: int) -> None:
        self._call("cuModuleUnload", module)

    def find_kernel(self, module: int, name: str, shared_bytes: int) -> int:
        """A kernel of a module, which may then be given so much shared memory a block."""
        kernel = self._new("cuModuleGetFunction", module, name.encode())
        self._call("cuFuncSetAttribute", kernel, _DYNAMIC_SHARED, shared_bytes)
        return kernel

    def run_kernel(
        self, kernel: int, grid: tuple[int, int], threads: int, shared_bytes: int, stream: int, *arguments: Any
    ) -> None:
        """Enqueue a kernel; ``arguments`` are ctypes values, copied before this returns."""
        places = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(value) for value in arguments])
        self._call("cuLaunchKernel", kernel, *grid, 1, threads, 1, 1, shared_bytes, stream, places, None)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def _new(self, name: str, *arguments: Any) -> int:
        """A call whose first argument receives the handle or address that it makes."""
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *arguments)
        return int(made.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._library[name](*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library["cuGetErrorString"](code, ctypes.byref(text))
            raise CudaError(f"CUDA: {(text.value or b'unknown error').decode()} ({name}, error {code})", code)


@lru_cache(maxsize=1)
def _load_driver() -> dict[str, Any]:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        raise MetaEmbedError(f"there is no NVIDIA driver here ({name} cannot be loaded)") from None
    functions = {}
    for function, arguments in _ARGUMENTS.items():
        if not hasattr(library, function):
            raise CudaError(f"the driver is older than CUDA 11.4 (it lacks {function})", _NOT_FOUND)
        functions[function] = getattr(library, function)
        functions[function].argtypes = arguments
        functions[function].restype = ctypes.c_int
    return functions


def find_gpu() -> Cuda | None:
    """The first GPU of this machine, or None where there is no driver or no GPU. A driver that fails is a warning."""
    try:
        return Cuda()
    except CudaError as error:
        if error.code != _NO_DEVICE:
            log.warning("the NVIDIA driver is here and finds no GPU that works: %s", error)
    except MetaEmbedError:
        pass
    return None
