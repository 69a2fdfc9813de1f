"""The wire format of protocol buffers, as much as it takes to read an ONNX file without the onnx package.

Source: https://protobuf.dev/programming-guides/encoding. Numbers of fields: onnx.proto.
"""

from __future__ import annotations

from typing import TypeAlias

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Fields: TypeAlias = "list[tuple[int, int | bytes]]"


def read_fields(data: bytes) -> Fields:
    """Number and value of each field of one message, in order; those inside submessages are left as bytes.

    Raises:
        ValueError, IndexError, KeyError: it is no such message.
    """
    found: Fields = []
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


def messages(fields: Fields, number: int) -> list[bytes]:
    """The submessages (or strings) of one number."""
    return [value for key, value in fields if key == number and isinstance(value, bytes)]


def text(fields: Fields, number: int) -> str:
    """The first string of one number, or an empty one."""
    return next(iter(messages(fields, number)), b"").decode()


def _varint(data: bytes, place: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[place]
        result |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return result, place
