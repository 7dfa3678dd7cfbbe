"""A disk in memory, of size= bytes. API version 2, with all that a disk can do."""

import nbdkit

API_VERSION = 2
PAGE = 4096

disk = bytearray(1 << 20)
used = set()  # numbers of pages that were written to


def config(key, value):
    global disk
    if key != "size":
        raise RuntimeError("unknown parameter " + key)
    disk = bytearray(nbdkit.parse_size(value))


def list_exports(readonly, is_tls):
    return ["one", ("two", "the second")]


def default_export(readonly, is_tls):
    return "one"


def open(readonly):
    return {"readonly": readonly, "name": nbdkit.export_name()}


def export_description(h):
    return "export " + h["name"]


def get_size(h):
    return len(disk)


def block_size(h):
    return (1, 4096, 0xFFFFFFFF)


def is_rotational(h):
    return True


def can_multi_conn(h):
    return True


def can_fua(h):
    return nbdkit.FUA_NATIVE


def can_cache(h):
    return nbdkit.CACHE_EMULATE


def can_fast_zero(h):
    return True


def pread(h, buf, offset, flags):
    buf[:] = disk[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    end = offset + len(buf)
    disk[offset:end] = buf
    used.update(range(offset // PAGE, -(-end // PAGE)))


def flush(h, flags):
    pass


def trim(h, count, offset, flags):
    zero(h, count, offset, flags | nbdkit.FLAG_MAY_TRIM)


def zero(h, count, offset, flags):
    disk[offset : offset + count] = bytes(count)
    if flags & nbdkit.FLAG_MAY_TRIM:
        used.difference_update(range(-(-offset // PAGE), (offset + count) // PAGE))


def extents(h, count, offset, flags):
    end = offset + count
    while offset < end:
        stop = (offset // PAGE + 1) * PAGE
        kind = 0 if offset // PAGE in used else nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
        yield (offset, stop - offset, kind)
        if flags & nbdkit.FLAG_REQ_ONE:
            return
        offset = stop
