"""The NBD protocol, server's side, without any input or output of its own.

Bytes from the client go in; events for the server and bytes for the client come out. Nothing here knows of sockets,
threads, clocks, plugins or logs. The rules are those of the protocol document,
https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, whose sections the comments name.
"""
