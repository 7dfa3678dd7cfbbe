"""Writes by one connection, and reads by others: multi_conn.py URI."""

import sys

import nbd  # type: ignore[import-not-found, unused-ignore]

BLOCK = 64 << 10


def connected(uri: str) -> nbd.NBD:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    assert handle.can_multi_conn()
    return handle


def main(uri: str) -> None:
    handles = [connected(uri) for _ in range(4)]
    for number, writer in enumerate(handles):
        data = bytes([number + 1]) * BLOCK
        # In flight on all connections at once, then flushed on one, which has to do for all of them.
        cookies = [
            (each, each.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), position * BLOCK))
            for position, each in enumerate(handles)
        ]
        for each, cookie in cookies:
            while not each.aio_command_completed(cookie):
                each.poll(-1)
        writer.flush()
        for reader in handles:
            assert reader.pread(4 * BLOCK, 0) == data * 4
        writer.pwrite(b"fua", 0, nbd.CMD_FLAG_FUA)
        assert all(reader.pread(3, 0) == b"fua" for reader in handles)
    for handle in handles:
        handle.shutdown()


main(*sys.argv[1:])
