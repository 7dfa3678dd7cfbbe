"""Memory that is copied into and out of by the kernel, a lot of it and often.

Where a buffer lies decides how fast the kernel copies: on some processors (AMD's since Zen 3), to copy to a place whose
address modulo 4096 is 1 to 31 bytes after that of the source takes eight times as long. Pages of files and of sockets
begin at 0, and large blocks from malloc at 16, which is the worst that can be.
"""

from __future__ import annotations

import mmap

__all__ = ["page_aligned"]


def page_aligned(size: int) -> memoryview:
    """Return `size` bytes (at least 1) of zeroed memory that begin with a page, and take none until they are used.

    Raises:
        OSError: there is not so much memory.
    """
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
