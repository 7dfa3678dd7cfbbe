"""Prints what an export of text holds as JSON: content.py URI."""

import json
import sys

import nbd  # type: ignore[import-not-found, unused-ignore]


def main(uri: str) -> None:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    print(json.dumps(handle.pread(handle.get_size(), 0).decode()))
    handle.shutdown()


main(*sys.argv[1:])
