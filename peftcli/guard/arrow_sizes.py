"""What the record batches of an Arrow file unpack to, before a byte of them is unpacked.

pyarrow allocates what each compressed buffer says that it unpacks to. A batch's metadata, a FlatBuffer that pyarrow has
verified, says where the buffers are: field 2 of the message is the record batch; its field 2 lists offset and length of
each buffer, and its field 3 is there if they are compressed. The format:
https://arrow.apache.org/docs/format/Columnar.html#ipc-message-format
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

_MAGIC = b"ARROW1\0\0"


def unpacked_sizes(file: IO[bytes]) -> Iterator[int]:
    """Yield the bytes that each record batch of an Arrow file or stream unpacks to; 0 for one that is not compressed.

    Raises:
        pyarrow.ArrowException, struct.error: the file is damaged.
    """
    from pyarrow import ipc  # comes with datasets

    file.seek(len(_MAGIC) if file.read(len(_MAGIC)) == _MAGIC else 0)
    for message in ipc.MessageReader.open_stream(file):
        if message.type == "record batch":
            yield _unpacked(message.metadata.to_pybytes(), memoryview(message.body))


def _unpacked(metadata: bytes, body: memoryview) -> int:
    message = struct.unpack_from("<I", metadata)[0]
    batch = _target(metadata, _field(metadata, message, 2))
    if not _field(metadata, batch, 3):
        return 0
    buffers = _target(metadata, _field(metadata, batch, 2))
    count = struct.unpack_from("<I", metadata, buffers)[0]
    places = struct.iter_unpack("<qq", metadata[buffers + 4 : buffers + 4 + 16 * count])
    # a buffer begins with its unpacked size; -1: it is stored as it is
    return sum(max(0, struct.unpack_from("<q", body, offset)[0]) for offset, length in places if length >= 8)


def _field(data: bytes, table: int, index: int) -> int:
    """Return where a field of a FlatBuffer's table is; 0 if the table lacks it."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    size, at = struct.unpack_from("<H", data, layout)[0], 4 + 2 * index
    offset = struct.unpack_from("<H", data, layout + at)[0] if at < size else 0
    return table + offset if offset else 0


def _target(data: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", data, place)[0])
