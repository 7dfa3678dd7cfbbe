"""Serves what lies at url=URL, read-only, by HTTP range requests."""

import builtins
import urllib.request

import nbdkit

API_VERSION = 2

url = None


def config(key, value):
    global url
    if key != "url":
        raise RuntimeError("unknown parameter " + key)
    url = value


def config_complete():
    if url is None:
        raise RuntimeError("url=URL must be given")


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


class Disk:
    def __init__(self):
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request) as answer:
            if answer.headers["Accept-Ranges"] != "bytes":
                raise RuntimeError("the server has no ranges")
            self.size = builtins.int(answer.headers["Content-Length"])

    def read(self, count, offset):
        span = "bytes=%d-%d" % (offset, offset + count - 1)
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": span})) as answer:
            return answer.read()


def open(readonly):
    return Disk()


def get_size(h):
    return h.size


def pread(h, buf, offset, flags):
    buf[:] = h.read(len(buf), offset)
