"""Tells of each call on standard error, for all that has no effect on clients."""

import sys

import nbdkit

API_VERSION = 2


def say(*words):
    print(*words, file=sys.stderr, flush=True)


say("loaded as", __name__, sys.argv)


def config(key, value):
    say("config", key, value)


def config_complete():
    say("config_complete")


def get_ready():
    say("get_ready")


def after_fork():
    say("after_fork")


def preconnect(readonly):
    say("preconnect", readonly)


def open(readonly):
    say("open", readonly, repr(nbdkit.export_name()))
    return "handle"


def close(h):
    say("close", h)


def cleanup():
    say("cleanup")


def get_size(h):
    say("get_size", h)
    return 512


def pread(h, buf, offset, flags):
    say("pread", h, len(buf), buf.readonly, offset, flags)


def pwrite(h, buf, offset, flags):
    say("pwrite", h, bytes(buf), buf.readonly, offset, flags)


def zero(h, count, offset, flags):
    say("zero", h, count, offset, flags)


def can_write(h):
    say("can_write", h)
    return True
