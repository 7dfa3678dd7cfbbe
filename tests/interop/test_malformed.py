"""What is wrong in what a client sends ends in the right error, or in its disconnection, and in nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

from tests.interop.harness import Server, Servers, full_image, receive_all, receive_exactly

pytestmark = pytest.mark.interop

SIZE = 1 << 20

OPTION_MAGIC = 0x49484156454F5054
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS = (
    1, 2, 3, 5, 6, 7, 8, 9, 10, 11,
)  # fmt: skip
ACK = 1
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG, ERR_EXT_HEADER_REQD = (
    0x80000001, 0x80000002, 0x80000003, 0x80000006, 0x80000009, 0x8000000A,
)  # fmt: skip
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN, UNKNOWN_FLAG = (1 << bit for bit in range(7))
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW = 1, 5, 22, 28, 75


def option(number: int, data: bytes = b"", *, magic: int = OPTION_MAGIC, length: int | None = None) -> bytes:
    return struct.pack(">QII", magic, number, len(data) if length is None else length) + data


def info_request(name: bytes = b"", *types: int, length: int | None = None, count: int | None = None) -> bytes:
    lengths = (len(name) if length is None else length, len(types) if count is None else count)
    return struct.pack(">I", lengths[0]) + name + struct.pack(f">H{len(types)}H", lengths[1], *types)


def meta_request(*queries: bytes, name: bytes = b"", count: int | None = None) -> bytes:
    data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries) if count is None else count)
    return data + b"".join(struct.pack(">I", len(query)) + query for query in queries)


def request(
    command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"", *, magic: int = 0x25609513
) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, command, 0xC00C1E, offset, length) + data


def extended_request(
    command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"", *, magic: int = 0x21E41C71
) -> bytes:
    return struct.pack(">IHHQQQ", magic, flags, command, 0xC00C1E, offset, length) + data


class Peer:
    """A client that says what it likes, and takes exactly what the server answers."""

    def __init__(self, server: Server, client_flags: int = 3) -> None:
        self.sock = server.connect()
        receive_exactly(self.sock, 18)
        self.sock.sendall(struct.pack(">I", client_flags))

    def final_reply(self, number: int) -> int:
        """Return the kind of the last reply to an option, skipping those before it."""
        while True:
            magic, answered, kind, length = struct.unpack(">QIII", receive_exactly(self.sock, 20))
            assert (magic, answered) == (0x0003E889045565A9, number)
            text = receive_exactly(self.sock, length)
            if kind & 0x80000000:
                assert len(text.decode()) <= 4096
            if kind == ACK or kind & 0x80000000:
                return int(kind)

    def ask(self, number: int, data: bytes = b"") -> int:
        self.sock.sendall(option(number, data))
        return self.final_reply(number)

    def say_last(self, data: bytes) -> bytes:
        """Send what makes the server close the connection, perhaps before all is sent; return what it answers."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)
        return receive_all(self.sock)

    def go(self) -> None:
        assert self.ask(GO, info_request()) == ACK

    def error_of_reply(self, style: str) -> int:
        """Return the error of the one reply that comes, which is none but the error."""
        if style == "simple":
            magic, error, cookie = struct.unpack(">IIQ", receive_exactly(self.sock, 16))
            assert (magic, cookie) == (0x67446698, 0xC00C1E)
            return int(error)
        if style == "structured":
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", receive_exactly(self.sock, 20))
            assert magic == 0x668E33EF
        else:
            magic, flags, kind, cookie, _, length = struct.unpack(">IHHQQQ", receive_exactly(self.sock, 32))
            assert magic == 0x6E8A278C
        payload = receive_exactly(self.sock, length)
        assert (flags, cookie) == (1, 0xC00C1E)
        if kind == 0:  # NONE: success
            return 0
        assert kind == 0x8001
        (error, text_length) = struct.unpack_from(">IH", payload)
        assert payload[6:].decode()
        assert len(payload) == 6 + text_length <= 6 + 4096
        return int(error)

    def flush(self, style: str) -> int:
        """Send a request that is right, and return the error of its reply."""
        self.sock.sendall((extended_request if style == "extended" else request)(FLUSH))
        if style == "structured":  # the success of a FLUSH is a simple reply here too
            return self.error_of_reply("simple")
        return self.error_of_reply(style)


Connect: TypeAlias = Callable[..., Peer]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes peers, which are gone at the end of the test."""
    with contextlib.ExitStack() as peers:

        def connect(server: Server, client_flags: int = 3) -> Peer:
            peer = Peer(server, client_flags)
            peers.callback(peer.sock.close)
            return peer

        yield connect


class Bystander(Peer):
    """A client that is connected all the while, and to which nothing may happen."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.go()

    def is_served(self) -> bool:
        self.sock.sendall(request(READ, 512, 512))
        reply = receive_exactly(self.sock, 16 + 512)
        return reply == struct.pack(">IIQ", 0x67446698, 0, 0xC00C1E) + bytes(512)


class Scene(NamedTuple):
    """A server that lives as long as the tests of this module, and its bystander."""

    server: Server
    bystander: Bystander

    def check(self, lines_before: int, lines: int) -> None:
        """See that the log has so many lines more, with no traceback, and that the bystander is served."""
        new = self.server.log()[lines_before:]
        assert len(new) == lines, new
        assert all(line.isprintable() and line.startswith("nbdkitpy: ") for line in new)
        assert "Traceback" not in "".join(new)
        assert self.bystander.is_served()


def scene(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    servers = Servers(tmp_path_factory.mktemp("scene"))
    server = servers(*words, "memory", str(SIZE))
    bystander = Bystander(server)
    yield Scene(server, bystander)
    try:
        assert bystander.is_served()
        bystander.sock.close()
        server.end()
    finally:
        servers.finish()


@pytest.fixture(scope="module")
def writable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    yield from scene([], tmp_path_factory)


@pytest.fixture(scope="module")
def readonly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    yield from scene(["-r"], tmp_path_factory)


# --- handshake ---

#: What ends the connection: the client's flags, and what it sends after them.
FATAL = {
    "undefined client flag": (0x7, b""),
    "all client flags": (0xFFFFFFFF, b""),
    "wrong option magic": (3, option(LIST, magic=OPTION_MAGIC ^ 1)),
    "magic of a request": (3, request(READ, 0, 512)),
    "text": (3, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "TLS client hello": (3, bytes.fromhex("160301 0200 010001fc0303") + bytes(32)),
    "option longer than the limit": (3, option(LIST, length=(1 << 20) + 1)),
    "unknown option of 4 GiB": (3, option(99, length=0xFFFFFFFF)),
    "GO of 4 GiB": (3, option(GO, length=0xFFFFFFF0)),
    "EXPORT_NAME of 4097 bytes": (3, option(EXPORT_NAME, b"x" * 4097)),
    "EXPORT_NAME with a NUL": (3, option(EXPORT_NAME, b"a\0b")),
    "EXPORT_NAME that is not UTF-8": (3, option(EXPORT_NAME, b"\xff\xfe")),
    "EXPORT_NAME after extended headers": (3, option(EXTENDED_HEADERS) + option(EXPORT_NAME)),
    "too many options": (3, option(99) * 40),
    "too many options, of those that work": (3, option(INFO, info_request()) * 40),
}


@pytest.mark.parametrize("case", FATAL)
def test_what_cannot_be_answered_ends_the_connection_with_one_line(
    connect: Connect, writable: Scene, case: str
) -> None:
    flags, data = FATAL[case]
    lines = len(writable.server.log())
    peer = connect(writable.server, flags)

    peer.say_last(data)

    writable.check(lines, 1)


#: What is answered by an error: the option, its data, the error.
ANSWERED = {
    "option 0": (0, b"", ERR_UNSUP),
    "PEEK_EXPORT": (4, b"", ERR_UNSUP),
    "unknown option with data": (12345, b"data" * 1000, ERR_UNSUP),
    "option 0xffffffff": (0xFFFFFFFF, b"", ERR_UNSUP),
    "STARTTLS": (STARTTLS, b"", ERR_POLICY),
    "STARTTLS with data": (STARTTLS, b"x", ERR_INVALID),
    "LIST with data": (LIST, b"x", ERR_INVALID),
    "STRUCTURED_REPLY with data": (STRUCTURED_REPLY, b"x", ERR_INVALID),
    "EXTENDED_HEADERS with data": (EXTENDED_HEADERS, b"x", ERR_INVALID),
    **{f"GO of {length} bytes": (GO, bytes(length), ERR_INVALID) for length in range(6)},
    "GO with a name length of 0xffffffff": (GO, info_request(b"abc", length=0xFFFFFFFF), ERR_INVALID),
    "GO with a name length of 2^31": (GO, info_request(b"abc", length=1 << 31), ERR_INVALID),
    "GO with a name one byte too long": (GO, info_request(b"abc", length=4), ERR_INVALID),
    "GO with 65535 kinds announced": (GO, info_request(b"", count=65535), ERR_INVALID),
    "GO with an odd byte at the end": (GO, info_request(b"", 0) + b"\0", ERR_INVALID),
    "GO with a NUL in the name": (GO, info_request(b"a\0b"), ERR_INVALID),
    "GO with a name that is not UTF-8": (GO, info_request(b"\xc3\x28"), ERR_INVALID),
    "GO with a name of 4097 bytes": (GO, info_request(b"x" * 4097), ERR_INVALID),
    "INFO with nothing": (INFO, b"", ERR_INVALID),
    "INFO with a name length of 0xffffffff": (INFO, info_request(b"abc", length=0xFFFFFFFF), ERR_INVALID),
    "SET_META without structured replies": (SET_META, meta_request(b"base:allocation"), ERR_INVALID),
    "LIST_META with nothing": (LIST_META, b"", ERR_INVALID),
    "LIST_META with 0xffffffff queries": (LIST_META, meta_request(count=0xFFFFFFFF), None),
    "LIST_META with a query cut off": (LIST_META, meta_request(b"base:allocation")[:-3], ERR_INVALID),
    "LIST_META with queries missing": (LIST_META, meta_request(b"base:", count=2), ERR_INVALID),
}


#: In the log. One that the server does not know has none: many clients ask for what a server may not have.
LINES_OF_A_WRONG_OPTION = 1


@pytest.mark.parametrize("case", ANSWERED)
def test_a_wrong_option_gets_its_error_and_the_connection_goes_on(connect: Connect, writable: Scene, case: str) -> None:
    number, data, error = ANSWERED[case]
    lines = len(writable.server.log())
    peer = connect(writable.server)

    found = peer.ask(number, data)
    peer.go()

    assert found == error if error is not None else found in (ERR_INVALID, ERR_TOO_BIG)
    assert peer.flush("simple") == 0
    writable.check(lines, 0 if found in (ERR_UNSUP, ERR_POLICY) else LINES_OF_A_WRONG_OPTION)


def test_a_failed_set_meta_context_forgets_the_selection(connect: Connect, writable: Scene) -> None:
    lines = len(writable.server.log())
    peer = connect(writable.server)
    replies = [
        peer.ask(STRUCTURED_REPLY),
        peer.ask(SET_META, meta_request(b"base:allocation")),
        peer.ask(SET_META, b"\0\0"),
    ]
    peer.go()

    peer.sock.sendall(request(BLOCK_STATUS, 0, 4096))
    error = peer.error_of_reply("structured")

    assert replies == [ACK, ACK, ERR_INVALID]
    assert error == EINVAL
    writable.check(lines, LINES_OF_A_WRONG_OPTION + 1)


def test_qemu_4843_an_option_within_another_ones_data_is_not_carried_out(connect: Connect, writable: Scene) -> None:
    lines = len(writable.server.log())
    peer = connect(writable.server)

    peer.ask(LIST_META, meta_request(b"base:") + option(ABORT))
    peer.go()

    assert peer.flush("simple") == 0
    writable.check(lines, 0)


def test_structured_replies_are_refused_after_extended_headers(connect: Connect, writable: Scene) -> None:
    lines = len(writable.server.log())
    peer = connect(writable.server)

    replies = [peer.ask(EXTENDED_HEADERS), peer.ask(STRUCTURED_REPLY)]
    peer.go()

    assert replies == [ACK, ERR_EXT_HEADER_REQD]
    assert peer.flush("extended") == 0
    writable.check(lines, LINES_OF_A_WRONG_OPTION)


@pytest.mark.parametrize("number", [INFO, GO])
def test_CVE_2021_20286_an_export_that_does_not_exist_is_an_error_and_the_connection_goes_on(
    connect: Connect, serve: Servers, tmp_path: Path, number: int
) -> None:
    server = serve("file", f"dir={tmp_path}")
    peer = connect(server)

    found = peer.ask(number, info_request(b"no such \x1b[31mexport\n"))
    listed = peer.ask(LIST)

    assert (found, listed) == (ERR_UNKNOWN, ACK)
    (line,) = server.end()
    assert line.isprintable()


def test_N11_clients_without_fixed_newstyle_may_only_name_an_export(connect: Connect, writable: Scene) -> None:
    lines = len(writable.server.log())
    peer = connect(writable.server, 2)

    found = peer.ask(GO, info_request())
    peer.sock.sendall(option(EXPORT_NAME))
    receive_exactly(peer.sock, 10)

    assert found == ERR_INVALID
    assert peer.flush("simple") == 0
    writable.check(lines, LINES_OF_A_WRONG_OPTION)


def test_a_client_that_leaves_at_any_byte_of_the_handshake_is_no_error(writable: Scene) -> None:
    lines = len(writable.server.log())
    dialogue = struct.pack(">I", 3) + option(STRUCTURED_REPLY) + option(GO, info_request(b"", 0, 3))

    for length in range(len(dialogue)):
        with writable.server.connect() as sock:
            sock.sendall(dialogue[:length])
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)

    writable.check(lines, 0)


# --- requests ---

HUGE = (1 << 64) - 512

#: Requests that are wrong whatever the replies look like: the error that they get, on a writable export.
WRONG = {
    "unknown command": (request(99, 0, 512), EINVAL),
    "command 0xffff": (request(0xFFFF, 0, 512), EINVAL),
    "RESIZE": (request(8, 4096), EINVAL),
    "READ with an unknown flag": (request(READ, 0, 512, UNKNOWN_FLAG), EINVAL),
    "READ with all flags": (request(READ, 0, 512, 0xFFFF), EINVAL),
    "READ with REQ_ONE": (request(READ, 0, 512, REQ_ONE), EINVAL),
    "READ of nothing": (request(READ, 0, 0), EINVAL),
    "READ across the end": (request(READ, SIZE - 512, 513), EINVAL),
    "READ at the end": (request(READ, SIZE, 1), EINVAL),
    "READ near 2^64": (request(READ, HUGE, 1024), EINVAL),
    "READ of 4 GiB": (request(READ, 0, 0xFFFFFFFF), EINVAL),
    "WRITE across the end": (request(WRITE, SIZE - 512, 1024, 0, bytes(1024)), ENOSPC),
    "WRITE near 2^64": (request(WRITE, HUGE, 1024, 0, bytes(1024)), ENOSPC),
    "WRITE with an unknown flag": (request(WRITE, 0, 4096, UNKNOWN_FLAG, bytes(4096)), EINVAL),
    "WRITE with NO_HOLE": (request(WRITE, 0, 200_000, NO_HOLE, bytes(200_000)), EINVAL),
    "WRITE whose data look like requests": (request(WRITE, SIZE, 28 * 64, 0, request(DISC) * 64), ENOSPC),
    "TRIM across the end": (request(TRIM, SIZE - 512, 1024), EINVAL),
    "TRIM with FAST_ZERO": (request(TRIM, 0, 512, FAST_ZERO), EINVAL),
    "WRITE_ZEROES across the end": (request(WRITE_ZEROES, SIZE - 512, 1024), ENOSPC),
    "WRITE_ZEROES with DF": (request(WRITE_ZEROES, 0, 512, DF), EINVAL),
    "CACHE across the end": (request(CACHE, SIZE - 512, 1024), EINVAL),
    "FLUSH with a range": (request(FLUSH, 512, 512), EINVAL),
    "BLOCK_STATUS without a context": (request(BLOCK_STATUS, 0, 512), EINVAL),
    "PAYLOAD_LEN without extended headers": (request(READ, 0, 512, PAYLOAD_LEN), EINVAL),
}


@pytest.mark.parametrize("style", ["simple", "structured"])
@pytest.mark.parametrize("case", WRONG)
def test_R1_R3_R5_a_wrong_request_gets_its_error_and_the_connection_goes_on(
    connect: Connect, writable: Scene, case: str, style: str
) -> None:
    data, error = WRONG[case]
    lines = len(writable.server.log())
    peer = connect(writable.server)
    if style == "structured":
        assert peer.ask(STRUCTURED_REPLY) == ACK
    peer.go()

    peer.sock.sendall(data)
    found = peer.error_of_reply(style)

    assert found == error
    assert peer.flush(style) == 0  # still in step
    writable.check(lines, 1)


#: With extended headers.
WRONG_EXTENDED = {
    "unknown command": (extended_request(99, 0, 512), EINVAL),
    "READ of 2^63 bytes": (extended_request(READ, 0, 1 << 63), EINVAL),
    "READ where offset and length wrap": (extended_request(READ, 4096, (1 << 64) - 4096), EINVAL),
    "READ with a payload": (extended_request(READ, 0, 512, PAYLOAD_LEN, bytes(512)), EINVAL),
    "WRITE across the end": (extended_request(WRITE, SIZE, 512, PAYLOAD_LEN, bytes(512)), ENOSPC),
    "WRITE_ZEROES of 2^64 - 1 bytes": (extended_request(WRITE_ZEROES, 0, (1 << 64) - 1), ENOSPC),
    "TRIM with an unknown flag": (extended_request(TRIM, 0, 512, UNKNOWN_FLAG), EINVAL),
    "BLOCK_STATUS with a payload and no context": (
        extended_request(BLOCK_STATUS, 0, 12, PAYLOAD_LEN, struct.pack(">QI", 4096, 1)),
        EINVAL,
    ),
    "unknown command with a payload": (extended_request(99, 0, 8192, PAYLOAD_LEN, bytes(8192)), EINVAL),
}


@pytest.mark.parametrize("case", WRONG_EXTENDED)
def test_R1_R3_R5_a_wrong_extended_request_gets_its_error_and_the_connection_goes_on(
    connect: Connect, writable: Scene, case: str
) -> None:
    data, error = WRONG_EXTENDED[case]
    lines = len(writable.server.log())
    peer = connect(writable.server)
    assert peer.ask(EXTENDED_HEADERS) == ACK
    peer.go()

    peer.sock.sendall(data)
    found = peer.error_of_reply("extended")

    assert found == error
    assert peer.flush("extended") == 0
    writable.check(lines, 1)


def test_a_write_without_payload_len_is_taken_as_qemu_means_it(connect: Connect, serve: Servers) -> None:
    peer = connect(serve("memory", str(SIZE)))
    assert peer.ask(EXTENDED_HEADERS) == ACK
    peer.go()

    peer.sock.sendall(extended_request(WRITE, 0, 4096, 0, b"x" * 4096) + extended_request(READ, 4095, 1))
    found = peer.error_of_reply("extended")

    assert found == 0
    chunk = receive_exactly(peer.sock, 32 + 8 + 1)
    assert chunk[-9:] == struct.pack(">Q", 4095) + b"x"


@pytest.mark.parametrize(
    "data",
    [request(WRITE, 0, 4096, 0, b"x" * 4096), request(TRIM, 0, 4096), request(WRITE_ZEROES, 0, 4096)],
    ids=["WRITE", "TRIM", "WRITE_ZEROES"],
)
def test_R2_what_writes_is_not_permitted_on_a_read_only_export(connect: Connect, readonly: Scene, data: bytes) -> None:
    lines = len(readonly.server.log())
    peer = connect(readonly.server)
    peer.go()

    peer.sock.sendall(data)
    found = peer.error_of_reply("simple")

    assert found == EPERM
    assert peer.flush("simple") == 0
    readonly.check(lines, 1)


#: Requests that end the connection; with extended headers if so named.
FATAL_REQUESTS = {
    "wrong magic": request(READ, 0, 512, magic=0x25609514),
    "junk": b"\xa5" * 64,
    "an option": option(LIST) + bytes(64),
    "WRITE of 4 GiB": request(WRITE, 0, 0xFFFFFFFF),
    "extended magic without extended headers": extended_request(READ, 0, 512),
    "extended: compact magic": request(READ, 0, 512) + bytes(4),
    "extended: payload of 2^63 bytes": extended_request(WRITE, 0, 1 << 63, PAYLOAD_LEN),
}


@pytest.mark.parametrize("case", FATAL_REQUESTS)
def test_a_request_after_which_nothing_can_be_trusted_ends_the_connection(
    connect: Connect, writable: Scene, case: str
) -> None:
    lines = len(writable.server.log())
    peer = connect(writable.server)
    if case.startswith("extended: "):
        assert peer.ask(EXTENDED_HEADERS) == ACK
    peer.go()

    rest = peer.say_last(FATAL_REQUESTS[case])

    assert rest == b""
    writable.check(lines, 1)


def test_requests_before_a_wrong_one_are_answered(connect: Connect, writable: Scene) -> None:
    lines = len(writable.server.log())
    peer = connect(writable.server)
    peer.go()

    answered = peer.say_last(request(READ, 0, 512) * 3 + b"\xa5" * 64)

    assert answered == (struct.pack(">IIQ", 0x67446698, 0, 0xC00C1E) + bytes(512)) * 3
    writable.check(lines, 1)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_write_that_is_cut_off_changes_nothing(connect: Connect, writable: Scene, reset: bool) -> None:
    peer = connect(writable.server)
    peer.go()

    peer.sock.sendall(request(WRITE, 512, 100_000, 0, b"x" * 99_999))
    if reset:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        peer.sock.shutdown(socket.SHUT_WR)
        assert receive_all(peer.sock) == b""
    peer.sock.close()

    assert writable.bystander.is_served()  # which reads zeroes at 512


@pytest.mark.parametrize("style", ["simple", "structured", "extended"])
def test_F7_CVE_2022_0485_reading_what_a_file_has_lost_is_an_error_of_that_request(
    connect: Connect, serve: Servers, tmp_path: Path, style: str
) -> None:
    image = full_image(tmp_path / "disk.img", SIZE)
    server = serve("file", image)
    peer = connect(server)
    if style != "simple":
        assert peer.ask(STRUCTURED_REPLY if style == "structured" else EXTENDED_HEADERS) == ACK
    peer.go()
    make_request = extended_request if style == "extended" else request

    os.truncate(image, SIZE // 2)
    peer.sock.sendall(make_request(READ, SIZE - 4096, 4096))
    small = peer.error_of_reply(style)
    peer.sock.sendall(make_request(READ, SIZE - (256 << 10), 256 << 10))
    large = peer.error_of_reply(style)

    assert (small, large) == (EIO, EIO)
    assert peer.flush(style) == 0
    assert len(server.end()) == 2


def test_a_client_that_sends_endless_invalid_requests_does_not_fill_the_log(connect: Connect, writable: Scene) -> None:
    lines = len(writable.server.log())
    peer = connect(writable.server)
    peer.go()

    peer.sock.sendall(request(99) * 100)
    errors = [peer.error_of_reply("simple") for _ in range(100)]

    assert set(errors) == {EINVAL}
    writable.check(lines, 11)


def test_R8_bytes_after_disc_are_ignored(connect: Connect, writable: Scene) -> None:
    lines = len(writable.server.log())
    peer = connect(writable.server)
    peer.go()

    answered = peer.say_last(request(READ, 0, 512) + request(DISC, 77, 88) + b"\xa5" * 64)

    assert len(answered) == 16 + 512
    writable.check(lines, 0)
