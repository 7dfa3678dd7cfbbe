#!/usr/bin/env -S nbdkitpy python
"""Serves file=FILE."""

import os

import nbdkit

API_VERSION = 2

path = None


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key, value):
    global path
    if key == "file":
        path = os.path.abspath(value)
    else:
        raise RuntimeError("unknown parameter " + key)


def config_complete():
    if path is None:
        raise RuntimeError("file=FILE must be given")


def open(readonly):
    return os.open(path, os.O_RDONLY if readonly else os.O_RDWR)


def close(h):
    os.close(h)


def get_size(h):
    return os.fstat(h).st_size


def can_multi_conn(h):
    return True


def pread(h, buf, offset, flags):
    os.preadv(h, [buf], offset)


def pwrite(h, buf, offset, flags):
    os.pwrite(h, buf, offset)


def flush(h, flags):
    os.fdatasync(h)
