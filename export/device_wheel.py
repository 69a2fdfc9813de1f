"""A wheel of the part of this package that a device needs, made from the running code: no index, no build tools."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

import metaembed.runtime

from . import __file__ as export_file

DISTRIBUTION = "metaembed-export"
COMMANDS = {
    "metaembed-build": "metaembed.export.cli_build:main",
    "metaembed-check": "metaembed.runtime.cli_check:main",
    "metaembed-index": "metaembed.runtime.cli_index:main",
    "metaembed-search": "metaembed.runtime.cli_search:main",
}
# What the running code reads on any machine. PTX is compiled by the GPU's own driver. Not the C kernels: they are compiled for this
# machine's processor, and a wheel's sources are compiled nowhere; a device scores with the PTX, its engine or numpy. Not the demo.
PACKED = {".py", ".ptx", ".typed"}
EPOCH = (1980, 1, 1, 0, 0, 0)  # fixed times: the same code gives the same bytes


def write_device_wheel(folder: Path) -> Path:
    """Write ``metaembed_export-<version>+device-py3-none-any.whl`` with metaembed.runtime and metaembed.export."""
    version = f"{package_version().partition('+')[0]}+device"  # a kit's own may make another kit
    stem = f"{DISTRIBUTION.replace('-', '_')}-{version}"
    roots = {
        "metaembed/runtime": Path(str(metaembed.runtime.__file__)).parent,
        "metaembed/export": Path(export_file).parent,
    }
    files = {f"{target}/{path.name}": path.read_bytes() for target, root in roots.items() for path in _modules(root)}
    about = f"{stem}.dist-info"
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n".encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: metaembed\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{about}/entry_points.txt"] = _entry_points(files).encode()
    files[f"{about}/RECORD"] = _record(files, f"{about}/RECORD").encode()
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
    return wheel


def package_version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # running from a checkout
        return "0"


def _modules(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.suffix in PACKED)


def _entry_points(files: dict[str, bytes]) -> str:
    lines = [
        f"{command} = {target}"
        for command, target in COMMANDS.items()
        if f"{target.split(':')[0].replace('.', '/')}.py" in files
    ]
    return "[console_scripts]\n" + "\n".join(lines) + "\n"


def _record(files: dict[str, bytes], own_name: str) -> str:
    """name,hash,size of every file (https://packaging.python.org/specifications/recording-installed-packages)."""
    rows = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*rows, f"{own_name},,"]) + "\n"
