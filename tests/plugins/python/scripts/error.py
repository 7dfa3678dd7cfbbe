"""A disk on which every block of 64 KiB but the first fails in a way of its own."""

import errno

import nbdkit

API_VERSION = 2
BLOCK = 65536
NUMBERS = [0, errno.EPERM, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.ESHUTDOWN, errno.EIO, errno.EOVERFLOW]


def fail(offset):
    block = offset // BLOCK
    if block == 0:
        return
    if block < len(NUMBERS):
        nbdkit.set_error(NUMBERS[block])
        raise RuntimeError("fails in block %d" % block)
    if block == len(NUMBERS):
        raise ValueError("says nothing of the number")
    if block == len(NUMBERS) + 1:
        nbdkit.set_error(errno.ENOSPC)  # and goes on, so it is no error
    if block == len(NUMBERS) + 2:
        nbdkit.undefined


def open(readonly):
    return 1


def get_size(h):
    return BLOCK * (len(NUMBERS) + 4)


def pread(h, buf, offset, flags):
    fail(offset)
    buf[:] = bytes(i & 255 for i in range(offset, offset + len(buf)))


def pwrite(h, buf, offset, flags):
    fail(offset)


def trim(h, count, offset, flags):
    fail(offset)


def cache(h, count, offset, flags):
    fail(offset)


def extents(h, count, offset, flags):
    fail(offset)
    if offset >= BLOCK * (len(NUMBERS) + 3):
        return []
    return [(offset, count, 0)]
