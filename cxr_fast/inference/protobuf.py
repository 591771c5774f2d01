"""Read the records of a protobuf message, which an ONNX file is, without the onnx package.

A message is a row of records: a tag (field number and wire type), then a number, or a length and so many bytes. Source:
the protobuf encoding guide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

NUMBER, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # wire types


class NotOnnx(Exception):
    """The bytes are no ONNX file of ours; the message says where that shows."""


@dataclass(frozen=True)
class Record:
    """One field of a message: its bytes are [start, end) of the file, its content [body, end)."""

    field: int
    wire: int
    start: int
    body: int
    end: int


def records(file: IO[bytes], start: int, end: int, most: int) -> Iterator[Record]:
    """Yield the records of one message at [start, end) of the file. Raises NotOnnx where they do not fit it exactly."""
    at = start
    for _ in range(most):
        if at == end:
            return
        file.seek(at)
        tag = varint(file)
        wire, body = tag & 7, 0
        if wire == BYTES:
            length = varint(file)
            body = file.tell()
        elif wire == NUMBER:
            body = file.tell()
            varint(file)
            length = file.tell() - body
        elif wire in (EIGHT, FOUR):
            body, length = file.tell(), 8 if wire == EIGHT else 4
        else:
            raise NotOnnx(f"no such wire type: {wire}")
        if not tag >> 3 or body + length > end:
            raise NotOnnx("it ends too early: was it cut short?" if tag >> 3 else "field number 0")
        yield Record(tag >> 3, wire, at, body, body + length)
        at = body + length
    if at != end:
        raise NotOnnx(f"more than {most:,} records in one message")


def varint(file: IO[bytes]) -> int:
    """Read a number of 7 bits per byte, lowest first, at most ten bytes."""
    value = 0
    for i in range(10):
        byte = file.read(1)
        if not byte:
            raise NotOnnx("it ends too early: was it cut short?")
        value |= (byte[0] & 127) << 7 * i
        if byte[0] < 128:
            return value
    raise NotOnnx("a number of more than ten bytes")
