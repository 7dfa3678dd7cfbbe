# The same for API version 1, which a script has that does not say any: no flags, and pread returns the bytes.
import errno

import nbdkit

size = 1 << 20
disk = None


def config(key, value):
    global size
    assert key == "size"
    size = nbdkit.parse_size(value)


def get_ready():
    global disk
    disk = bytearray(size)


def open(readonly):
    return None


def get_size(h):
    assert h is None
    return len(disk)


def pread(h, count, offset):
    return disk[offset : offset + count + 1]  # what is too much is cut off


def pwrite(h, buf, offset):
    disk[offset : offset + len(buf)] = buf


def flush(h):
    pass


def trim(h, count, offset):
    disk[offset : offset + count] = bytes(count)


def zero(h, count, offset, may_trim):
    if not may_trim:
        nbdkit.set_error(errno.EOPNOTSUPP)
        return
    disk[offset : offset + count] = bytes(count)
