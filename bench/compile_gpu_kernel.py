"""Compile runtime/_maxsim.cu to runtime/_maxsim.ptx: ``python bench/compile_gpu_kernel.py``. No GPU is needed.

    pip install nvidia-cuda-nvrtc-cu12==12.1.105

That version on purpose: a driver takes PTX of its own CUDA version and older, and this one's is for drivers from CUDA 12.1 on.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from pathlib import Path

RUNTIME = Path(__file__).parents[1] / "runtime"
OPTIONS = (b"--gpu-architecture=compute_80", b"--std=c++17", b"-default-device")


def main() -> None:
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("NVRTC is not installed; pip install nvidia-cuda-nvrtc-cu12==12.1.105")
    (library,) = Path(spec.submodule_search_locations[0]).glob("lib/libnvrtc.so.*")
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    source = (RUNTIME / "_maxsim.cu").read_bytes()
    text = compile_to_ptx(ctypes.CDLL(str(library)), source)
    digest = hashlib.sha256(source).hexdigest()
    (RUNTIME / "_maxsim.ptx").write_bytes(f"// _maxsim.cu {digest}\n".encode() + text.strip() + b"\n")
    print(f"{RUNTIME / '_maxsim.ptx'}: {len(text):,} bytes")


def compile_to_ptx(nvrtc: ctypes.CDLL, source: bytes) -> bytes:
    """NVRTC's C API (docs.nvidia.com/cuda/nvrtc): what the compiler says ends the program where it fails."""
    program = ctypes.c_void_p()
    _call(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"_maxsim.cu", 0, None, None))
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS))
    said = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    if failed:
        raise SystemExit(said.decode())
    return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)


def _text(size_of: object, read: object, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _call(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _call(read(program, text))
    return text.value


def _call(code: int) -> None:
    if code:
        raise SystemExit(f"NVRTC failed with code {code}")


if __name__ == "__main__":
    main()
