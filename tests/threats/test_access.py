"""Who may connect: by which address, as whom, and through which socket.

Names begin with the number of the threat that a test is about: A1 to A14. Most of these lie beside the code that they
are about.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy import ConfigError
from nbdkitpy.server.listener import listen
from nbdkitpy.server.options import Endpoint, Transport
from nbdkitpy_filters.ip import Ip
from tests.conftest import StartServer
from tests.documents import MARKDOWN
from tests.environment import NBDKITPY
from tests.interop.harness import PATIENCE
from tests.nbdclient import NbdClient
from tests.serving import CONTENT, Disks, Running

NOBODY = 65534


def rules(**lists: str) -> Ip:
    """The filter, with an allow and a deny list."""
    ip = Ip()
    for key, value in lists.items():
        ip.config(key, value)
    return ip


# --- A4: clients without an address ---


def test_A4_client_of_a_unix_socket_is_refused_where_only_addresses_are_allowed(start_server: StartServer) -> None:
    plugin = Disks()
    server = start_server(plugin, rules(allow="127.0.0.1,loopback,0.0.0.0/0,::/0", deny="all"))

    assert server.dial().at_end()  # without a byte

    assert plugin.opened == 0


def test_A4_client_of_whom_nothing_is_known_is_refused_where_families_are_allowed() -> None:
    words = ["-s", "--filter=ip", "memory", "1M", "allow=anyunix,anyipv4,anyipv6,anyvsock", "deny=all"]

    done = subprocess.run([*NBDKITPY, *words], input=b"", capture_output=True, timeout=PATIENCE, check=False)

    assert (done.returncode, done.stdout) == (0, b"")
    assert b"refused: client not permitted to connect" in done.stderr


# --- A5: credentials ---

#: Connects as an ordinary user, perhaps one who is root in a world of his own, and hands the connection over.
CONNECT = """
import ctypes, os, socket, sys

path, world = sys.argv[1:]
libc = ctypes.CDLL(None)
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
uid = os.getuid()
if world:
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: what is in /proc is his own
    if libc.unshare(0x10000000):  # CLONE_NEWUSER
        sys.exit(7)
    with open("/proc/self/uid_map", "w") as users:
        users.write(f"0 {uid} 1")
    assert os.getuid() == 0
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(path)
    socket.send_fds(socket.socket(fileno=0), [b"-"], [sock.fileno()])
"""


@pytest.fixture
def place() -> Iterator[str]:
    """Where a socket can be that everybody may open."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield f"{directory}/socket"


def handed_over(running: Running, world: str = "") -> NbdClient:
    """A connection that somebody else has made."""
    os.chmod(running.path, 0o777)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", CONNECT, running.path, world]
        done = subprocess.run(command, stdin=theirs.fileno(), timeout=PATIENCE, check=False)
        if done.returncode == 7:
            pytest.skip("this system does not let users have namespaces of their own")
        assert done.returncode == 0
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    return NbdClient(socket.socket(fileno=fd))


def at(place: str) -> tuple[Endpoint]:
    return (Endpoint(Transport.UNIX, unix_path=place),)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_A5_credentials_are_those_of_who_connected_whoever_has_the_connection_now(
    start_server: StartServer, place: str
) -> None:
    for_root = start_server(Disks(), rules(allow="uid:0,gid:0", deny="all"), endpoints=at(place))
    for_others = start_server(Disks(), rules(allow=f"uid:{NOBODY}", deny="all"), endpoints=at(f"{place}2"))

    with handed_over(for_root) as refused, handed_over(for_others) as served:
        assert refused.at_end()  # though this process, which is root's, has it
        assert served.negotiate().read(0, 512) == CONTENT[:512]


def test_A5_root_of_another_user_namespace_is_not_root(start_server: StartServer, place: str) -> None:
    running = start_server(Disks(), rules(allow="uid:0", deny="all"), endpoints=at(place))

    with handed_over(running, "world") as client:
        assert client.at_end()


# --- A10 and A11: sockets in the file system ---


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def unix(path: str) -> list[Endpoint]:
    return [Endpoint(Transport.UNIX, unix_path=path)]


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_A10_socket_has_its_mode_from_the_moment_on_at_which_it_is_there(
    mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "socket")
    modes: list[int] = []
    bind = socket.socket.bind

    def noted(sock: socket.socket, address: str) -> None:
        bind(sock, address)
        modes.append(stat.S_IMODE(os.stat(path).st_mode))

    monkeypatch.setattr(socket.socket, "bind", noted, raising=False)
    with umask(mask):
        (listener,) = listen(unix(path))

    assert modes == [0o755]
    listener.close()


def test_A11_second_start_fails_and_leaves_the_first_one_in_place(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    (first,) = listen(unix(path))
    before = os.stat(path)

    with pytest.raises(ConfigError, match="Address already in use"):
        listen(unix(path))

    assert os.path.samestat(os.stat(path), before)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        first.socket.accept()[0].close()
    first.close()
    assert not os.path.exists(path)


def test_A11_symbolic_link_is_not_followed_to_make_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match="Address already in use"):
        listen(unix(str(path)))

    assert os.listdir(tmp_path) == ["socket"]


# --- A14: who listens everywhere ---


def test_A14_examples_that_listen_everywhere_say_who_may_come() -> None:
    lines = [line for path in MARKDOWN for line in path.read_text().splitlines()]
    everywhere = [line for line in lines if re.match(r"    nbdkitpy .*-i ?(any|0\.0\.0\.0|::)( |$)", line)]
    restricted = re.compile(r"--filter=ip .*deny=all|--tls=require .*(--tls-verify-peer|--tls-psk)")

    assert len(everywhere) >= 3
    assert all(map(restricted.search, everywhere))
    # Sockets of units, outside of running text.
    assert not [line for line in lines if re.match(r"ListenStream=([0-9]+|0\.0\.0\.0:.*|\[::\]:.*)$", line)]
