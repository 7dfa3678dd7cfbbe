"""Only asks about the exports, and takes its leave in order: ask.py URI."""

import sys

import nbd  # type: ignore[import-not-found, unused-ignore]


def main(uri: str) -> None:
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.opt_list(lambda name, description: None)
    handle.opt_info()
    assert handle.get_size() > 0
    handle.opt_abort()


main(*sys.argv[1:])
