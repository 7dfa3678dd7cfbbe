"""A disk in a bytearray, for nbdkit's Python plugin; nbdkitpy_bytearray.py is the same for nbdkitpy.

Parameters: size, in bytes, and model, which is "parallel" or "default".
"""

from __future__ import annotations

import nbdkit  # type: ignore[import-not-found]  # it is there only within nbdkit

API_VERSION = 2

parameters: dict[str, str] = {}
disk = bytearray()


def config(key: str, value: str) -> None:
    parameters[key] = value


def thread_model() -> int:
    parallel = parameters["model"] == "parallel"
    model: int = nbdkit.THREAD_MODEL_PARALLEL if parallel else nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS
    return model


def get_ready() -> None:
    disk.extend(bytes(int(parameters["size"])))


def open(readonly: int) -> int:
    return 1


def get_size(h: int) -> int:
    return len(disk)


def pread(h: int, buf: bytearray, offset: int, flags: int) -> None:
    buf[:] = disk[offset : offset + len(buf)]


def pwrite(h: int, buf: bytearray, offset: int, flags: int) -> None:
    disk[offset : offset + len(buf)] = buf
