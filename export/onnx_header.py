"""The opset of an ONNX file, without the onnx package: a device that only builds engines need not install it."""

from __future__ import annotations

from pathlib import Path

from metaembed.runtime.errors import BundleError

# Field numbers of ModelProto.opset_import, OperatorSetIdProto.domain and .version (onnx.proto), and the wire types of
# protocol buffers (https://protobuf.dev/programming-guides/encoding).
OPSET_IMPORT, DOMAIN, VERSION = 8, 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_opset(path: Path) -> int:
    """The version of the default operator set that a graph imports.

    Raises:
        BundleError: the file is no ONNX model, or imports no default operator set.
    """
    try:
        for number, value in _fields(path.read_bytes()):
            if number == OPSET_IMPORT and isinstance(value, bytes):
                entry = dict(_fields(value))
                if not entry.get(DOMAIN):
                    return int(entry[VERSION])
    except (IndexError, KeyError, ValueError):
        pass
    raise BundleError(f"{path} is not an ONNX model that imports an operator set; export again")


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of one message, in order, those inside submessages left as bytes."""
    found: list[tuple[int, int | bytes]] = []
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, place = _varint(data, place)
            found.append((number, value))
            continue
        if wire == BYTES:
            size, place = _varint(data, place)
        else:
            size = {FIXED64: 8, FIXED32: 4}[wire]
        if place + size > len(data):
            raise ValueError("a field is longer than the file")
        found.append((number, data[place : place + size]))
        place += size
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[place]
        result |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return result, place
