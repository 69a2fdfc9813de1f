"""The opset of an ONNX file, without the onnx package: a device that only builds engines need not install it."""

from __future__ import annotations

from pathlib import Path

from metaembed.runtime.errors import BundleError
from metaembed.runtime.protobuf import read_fields

# Field numbers of ModelProto.opset_import, OperatorSetIdProto.domain and .version (onnx.proto).
OPSET_IMPORT, DOMAIN, VERSION = 8, 1, 2


def read_opset(path: Path) -> int:
    """The version of the default operator set that a graph imports.

    Raises:
        BundleError: the file is no ONNX model, or imports no default operator set.
    """
    try:
        for number, value in read_fields(path.read_bytes()):
            if number == OPSET_IMPORT and isinstance(value, bytes):
                entry = dict(read_fields(value))
                if not entry.get(DOMAIN):
                    return int(entry[VERSION])
    except (IndexError, KeyError, ValueError):
        pass
    raise BundleError(f"{path} is not an ONNX model that imports an operator set; export again")
