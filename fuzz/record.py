"""Make the corpus anew: ``python -m fuzz.record``. Real clients talk to a server, and what they say is written down.

Needed are libnbd's and qemu's tools; what no tool says (extended headers, TLS) is said by the client of our tests.
"""

from __future__ import annotations

import contextlib
import functools
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from fuzz.run import CORPUS
from fuzz.targets import EXPORTS, Config, disks
from nbdkitpy.protocol.constants import Command, CommandFlag, InfoType, Option, TlsMode
from tests.fuzzing.model import ConversationModel
from tests.fuzzing.shelf import Shelf
from tests.nbdclient import NbdClient, Style, go_data
from tests.serving import Running, unix_options

#: A conversation with more bytes is no good seed: most of them are data.
_MOST = 12 << 10

_PATIENCE = 30  # seconds that a client may take

#: What the tools are told to do; {uri} is an export's.
COMMANDS: Mapping[str, Sequence[str]] = {
    "nbdinfo": ("nbdinfo", "{disk}"),
    "nbdinfo-list": ("nbdinfo", "--list", "{disk}"),
    "nbdinfo-map": ("nbdinfo", "--map", "{disk}"),
    "nbdinfo-missing": ("nbdinfo", "{missing}"),
    "nbdinfo-read-only": ("nbdinfo", "--can", "write", "{read-only}"),
    "nbdcopy": ("nbdcopy", "{disk}", "null:"),
    "nbdcopy-one-by-one": ("nbdcopy", "--synchronous", "--request-size=4096", "--connections=1", "{poor}", "null:"),
    "qemu-img-info": ("qemu-img", "info", "{blocks}"),
    "qemu-img-map": ("qemu-img", "map", "--output=json", "{disk}"),
    "qemu-io": (
        "qemu-io", "-f", "raw", "-c", "write -P 7 4096 512", "-c", "write -z 8192 4096", "-c", "discard 0 4096",
        "-c", "read 0 16384", "-c", "flush", "-c", "write -f -P 9 512 512", "{disk}",
    ),
    "qemu-io-zero-fast": ("qemu-io", "-f", "raw", "-c", "write -z -u 0 64k", "-c", "read 0 512", "{blocks}"),
    "qemu-io-broken": ("qemu-io", "-f", "raw", "-c", "read 8192 4096", "-c", "read 0 512", "{broken}"),
}  # fmt: skip


# --- clients of our own ---


def _everything(client: NbdClient, style: Style) -> None:
    """Ask for each thing once."""
    client.negotiate(style, name="disk", contexts=style is not Style.SIMPLE)
    client.call(Command.READ, 0, 32768)
    if style is not Style.SIMPLE:
        client.call(Command.READ, 0, 32768, flags=CommandFlag.DF)
        client.call(Command.BLOCK_STATUS, 0, 65536)
        client.call(Command.BLOCK_STATUS, 0, 65536, flags=CommandFlag.REQ_ONE)
    client.call(Command.WRITE, 512, data=b"data" * 128, flags=CommandFlag.FUA)
    client.call(Command.WRITE_ZEROES, 0, 4096, flags=CommandFlag.NO_HOLE)
    client.call(Command.WRITE_ZEROES, 0, 4096, flags=CommandFlag.FAST_ZERO)
    client.call(Command.TRIM, 4096, 4096)
    client.call(Command.CACHE, 0, 4096)
    client.call(Command.FLUSH)
    client.disconnect()


def _chosen_contexts(client: NbdClient) -> None:
    client.negotiate(Style.EXTENDED, contexts=True)
    choice = (4096).to_bytes(8, "big") + b"\0\0\0\1"
    client.call(Command.BLOCK_STATUS, 0, data=choice)
    client.call(Command.READ, 0, 1 << 40)
    client.disconnect()


def _many_at_once(client: NbdClient) -> None:
    client.negotiate(Style.STRUCTURED)
    with client.batched():
        for number in range(12):
            client.send(Command.READ, number * 512, 512)
        client.send(Command.WRITE, 65536, data=b"past the end")
    client.replies(13)
    client.disconnect()


def _haggling(client: NbdClient) -> None:
    client.greet()
    client.exports()
    client.go("blocks", *InfoType, option=Option.INFO)
    for option in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
        client.option(option)
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        client.option(option, b"\0\0\0\4disk" + b"\0\0\0\2" + b"\0\0\0\5base:" + b"\0\0\0\x0fbase:allocation")
    client.send_option(99, b"unheard of")
    client.option_answers(99)
    client.option(Option.ABORT)


def _export_name(client: NbdClient, flags: int) -> None:
    client.greet(flags)
    client.send_option(Option.EXPORT_NAME, b"poor")
    client.receive_bytes(10 if flags & 2 else 134)
    client.size = 40_000
    client.read(0, 1000)
    client.disconnect()


CONVERSATIONS: Mapping[str, Callable[[NbdClient], None]] = {
    **{f"all-{style.value}": functools.partial(_everything, style=style) for style in Style},
    "chosen-contexts": _chosen_contexts,
    "many-at-once": _many_at_once,
    "haggling": _haggling,
    "export-name": lambda client: _export_name(client, 3),
    "export-name-with-zeroes": lambda client: _export_name(client, 1),
    "newstyle": lambda client: _export_name(client, 0),
}


# --- recording ---


class Recorder:
    """Stands between clients and the server at `target`, and writes down what clients say."""

    def __init__(self, path: str, target: str) -> None:
        self._target = target
        self.streams: list[bytearray] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="recorder")
        self._accepting.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # at the end
            while True:
                client, _ = self._listener.accept()
                self.streams.append(bytearray())
                thread = threading.Thread(target=self._pass_on, args=(client, self.streams[-1]))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, client: socket.socket, stream: bytearray) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._target)
        with client, server, selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._pass_on_some(key.fileobj, key.data, stream if key.fileobj is client else None):
                        selector.unregister(key.fileobj)

    @staticmethod
    def _pass_on_some(source: object, target: socket.socket, record: bytearray | None) -> bool:
        assert isinstance(source, socket.socket)
        try:
            data = source.recv(1 << 16)
            if not data:
                target.shutdown(socket.SHUT_WR)
                return False
            if record is not None:
                record += data
            target.sendall(data)
        except OSError:  # one of them has gone
            return False
        return True

    def take(self) -> list[bytes]:
        """Wait until clients and server are done, and return what each client has said."""
        for thread in self._threads:
            thread.join(_PATIENCE)
            assert not thread.is_alive(), "a conversation does not end"
        taken = [bytes(stream) for stream in self.streams]
        self._threads.clear()
        self.streams.clear()
        return taken

    def close(self) -> None:
        """Accept nobody any more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()


def recorded(directory: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each conversation, and what the client said in it; sockets are made in `directory`."""
    running = Running(Shelf(EXPORTS, disks()), [], unix_options(f"{directory}/server")).begin()
    recorder = Recorder(f"{directory}/recorder", running.path)
    uris = {name: f"nbd+unix:///{name}?socket={directory}/recorder" for name in (*EXPORTS, "missing")}
    try:
        for name, words in COMMANDS.items():
            command = [word.format_map(uris) for word in words]
            subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_PATIENCE, check=False
            )
            for number, stream in enumerate(recorder.take(), start=1):
                yield f"{name}-{number}", stream
        for name, talk in CONVERSATIONS.items():
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(f"{directory}/recorder")
            with NbdClient(sock) as client:
                talk(client)
            for stream in recorder.take():
                yield name, stream
    finally:
        recorder.close()
        running.finish()


def made() -> Iterator[tuple[str, Config, bytes]]:
    """Yield conversations that no client of ours has: name, what the server offers, and what is said."""

    def option(number: int, data: bytes = b"") -> bytes:
        return b"IHAVEOPT" + number.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data

    go = option(Option.GO, go_data("disk"))
    begin = b"\0\0\0\3" + option(Option.STRUCTURED_REPLY) + option(Option.STARTTLS)
    yield "starttls", Config(tls=TlsMode.ON), begin + option(Option.STARTTLS) + go
    yield "starttls-required", Config(tls=TlsMode.REQUIRE), begin + go
    yield "clear-text-behind-starttls", Config(tls=TlsMode.REQUIRE, cuts=9), begin + go
    request = (0x25609513).to_bytes(4, "big") + bytes(3) + b"\1" + b"cookie  " + bytes(8)
    yield "write-large", Config(filled=True), b"\0\0\0\3" + option(Option.GO, go_data("large")) + request + b"\0\4\0\0"
    yield "write-refused", Config(filled=True), b"\0\0\0\3" + go + request + b"\0\4\0\0"
    yield "write-announced", Config(), b"\0\0\0\3" + option(Option.GO, go_data("large")) + request + b"\0\x08\0\0"
    yield "unknown-option-long", Config(filled=True, cuts=8), b"\0\0\0\3IHAVEOPT\0\0\0\x63\0\4\0\0"
    yield "quiet-now-and-then", Config(rests=True, cuts=5), b"\0\0\0\3" + go + (request + b"\0\0\2\0" + bytes(512)) * 3


def seeds() -> Iterator[tuple[str, str, bytes]]:
    """Yield target, name and content of each file of the corpus."""
    with tempfile.TemporaryDirectory() as directory:
        conversations = [(name, Config(), stream) for name, stream in recorded(directory)]
    for name, config, stream in (*conversations, *made()):
        if len(stream) > _MOST:
            print(f"{name}: left out, as it has {len(stream)} bytes")
            continue
        yield "conversation", name, config.pack() + stream
        model = ConversationModel(config.terms, disks())
        model.hear(stream)
        if model.agreement is None:
            yield "handshake", name, config.pack() + stream
            continue
        requests = model.handshake.rest()
        yield "handshake", name, config.pack() + stream[: len(stream) - len(requests)]
        if requests:
            agreement = model.agreement
            config = config._replace(
                export=list(EXPORTS).index(model.handshake.export_name),
                structured=agreement.structured,
                extended=agreement.extended,
                contexts=agreement.contexts,
            )
            yield "transmission", name, config.pack() + requests


def main() -> None:
    """Write the corpus."""
    missing = {words[0] for words in COMMANDS.values() if shutil.which(words[0]) is None}
    if missing:
        sys.exit(f"Not installed: {', '.join(sorted(missing))}")
    known: set[tuple[str, bytes]] = set()
    found = [(CORPUS / target / name, content) for target, name, content in seeds()]
    shutil.rmtree(CORPUS, ignore_errors=True)
    for path, content in found:
        if (path.parent.name, content) in known:
            continue
        known.add((path.parent.name, content))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    print(f"{len(known)} files, {sum(len(content) for _, content in known)} bytes")


if __name__ == "__main__":
    main()
