"""What a unit may do in place of what it should: exceptions of all kinds, and data that is none."""

from __future__ import annotations

import array
import asyncio
import errno

from nbdkitpy.protocol.constants import NbdError
from tests.serving import CONTENT


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class UnprintableOs(OSError):
    def __str__(self) -> str:
        raise SystemExit(3)


class Odd(BaseException):
    pass


#: Exceptions, and the error that a client gets for each.
RAISED: list[tuple[BaseException, NbdError]] = [
    (OSError(errno.EIO, "broken"), NbdError.EIO),
    (OSError(errno.ENOSPC, "full"), NbdError.ENOSPC),
    (OSError(errno.EACCES, "locked"), NbdError.EPERM),
    (OSError(errno.EOVERFLOW, "too much"), NbdError.EINVAL),
    (OSError(errno.ENODEV, "gone"), NbdError.EINVAL),
    (OSError("no number"), NbdError.EIO),
    (OSError("errno", 5), NbdError.EIO),
    (OSError([], Unprintable()), NbdError.EIO),
    (UnprintableOs(errno.ENOSPC, "full"), NbdError.ENOSPC),
    (ValueError("wrong"), NbdError.EIO),
    (KeyError("missing"), NbdError.EIO),
    (MemoryError(), NbdError.EIO),
    (RecursionError(), NbdError.EIO),
    (SystemExit(1), NbdError.EIO),
    (KeyboardInterrupt(), NbdError.EIO),
    (GeneratorExit(), NbdError.EIO),
    (StopIteration(), NbdError.EIO),
    (asyncio.CancelledError(), NbdError.EIO),
    (Odd(), NbdError.EIO),
    (Unprintable(), NbdError.EIO),
]


class Length(bytes):
    """Bytes that lie about their number."""

    def __len__(self) -> int:
        return 4096


def released() -> memoryview:
    view = memoryview(bytes(4096))
    view.release()
    return view


#: In place of 4096 bytes.
BAD_DATA: list[object] = [
    None,
    b"",
    bytearray(),
    bytes(4095),
    bytes(4097),
    bytearray(4095),
    memoryview(bytes(4097)),
    "x" * 4096,
    [0] * 4096,
    4096,
    array.array("B", bytes(4096)),
    memoryview(array.array("I", [0] * 4096)),
    memoryview(bytes(8192))[::2],
    Length(b"short"),
    released(),
    object(),
]

#: The first 4096 bytes of the content.
GOOD_DATA: list[object] = [
    CONTENT[:4096],
    bytearray(CONTENT[:4096]),
    memoryview(CONTENT)[:4096],
    memoryview(bytearray(CONTENT))[:4096],
    memoryview(array.array("I", CONTENT[:4096])),
    memoryview(CONTENT[:4096]).cast("B", (64, 64)),
    type("Text", (bytes,), {})(CONTENT[:4096]),
]
