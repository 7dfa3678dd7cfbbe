"""Listeners: where they listen, with which mode and port, and what is left of them: nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import ConfigError
from nbdkitpy.server import listener as module
from nbdkitpy.server.listener import Listener, listen
from nbdkitpy.server.options import AddressFamily, Endpoint, Transport


@contextlib.contextmanager
def listening(**options: Any) -> Iterator[list[Listener]]:
    listeners = listen([Endpoint(**options)])
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


def unix(path: str | None) -> Any:
    return listening(transport=Transport.UNIX, unix_path=path)


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught, listening(**options):
        pass
    return str(caught.value)


def connect(listener: Listener) -> None:
    """Make sure that somebody who connects is let in."""
    with socket.socket(listener.socket.family) as client:
        client.connect(listener.socket.getsockname())
        accepted, _ = listener.socket.accept()
        accepted.close()


# --- TCP ---


def test_A14_without_an_address_it_is_loopback_of_both_kinds_and_any_port_is_the_same_one() -> None:
    with listening(port="0") as (first, second):
        assert {str(first).rpartition(":")[0], str(second).rpartition(":")[0]} == {"127.0.0.1", "[::1]"}
        assert first.port == second.port
        assert first.port
        assert str(first) == f"127.0.0.1:{first.port}"
        connect(first)
        connect(second)


@pytest.mark.parametrize(
    ("family", "name"), [(AddressFamily.INET, "127.0.0.1"), (AddressFamily.INET6, "::1")], ids=["inet", "inet6"]
)
def test_one_kind_of_address_can_be_asked_for(family: AddressFamily, name: str) -> None:
    with listening(port="0", address_family=family) as (only,):
        assert only.socket.getsockname()[0] == name


def test_any_is_every_interface_of_both_kinds_on_separate_sockets() -> None:
    with listening(address="any", port="0") as (first, second):
        assert [listener.socket.getsockname()[0] for listener in (first, second)] == ["0.0.0.0", "::"]
        assert first.port == second.port
        assert second.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def test_a_name_is_looked_up() -> None:
    with listening(address="localhost", port="0") as listeners:
        assert {listener.socket.getsockname()[0] for listener in listeners} <= {"127.0.0.1", "::1"}


def test_the_port_can_be_a_number() -> None:
    with listening(port="0") as (first, *_):
        number = first.port

    with listening(port=str(number)) as (first, *_):
        assert first.port == number


def test_a_taken_port_is_refused_with_address_and_reason() -> None:
    with listening(port="0", address="127.0.0.1") as (taken,):
        text = refusal(port=str(taken.port), address="127.0.0.1")

    assert text == f"cannot listen on 127.0.0.1 port {taken_port(text)}: Address already in use"


def taken_port(text: str) -> str:
    return text.split()[5].rstrip(":")


def test_what_was_opened_before_the_refusal_is_closed_again() -> None:
    with listening(port="0", address_family=AddressFamily.INET6) as (taken,):
        refusal(port=str(taken.port))

        with listening(port=str(taken.port), address_family=AddressFamily.INET):
            pass


def test_any_port_is_tried_again_when_it_is_free_on_one_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[tuple[int, int]] = []
    bind = module._bind

    def busy_at_first(family: int, address: tuple[str, int], host: str) -> Listener:
        tries.append((family, address[1]))
        if family == socket.AF_INET6 and len(tries) <= 4:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        return bind(family, address, host)

    monkeypatch.setattr(module, "_bind", busy_at_first)

    with listening(port="0") as listeners:
        assert len(listeners) == 2
    assert [port for family, port in tries if family == socket.AF_INET] == [0, 0, 0]


def test_it_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(family: int, address: tuple[str, int], host: str) -> Listener:
        tries.append(address)
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    tries: list[tuple[str, int]] = []
    monkeypatch.setattr(module, "_bind", busy)

    assert refusal(port="0") == "cannot listen on 127.0.0.1 port 0: Address already in use"
    assert len(tries) == 10


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_kind_of_address_that_the_machine_lacks_is_left_out(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bind = module._bind

    def without_inet6(family: int, address: tuple[str, int], host: str) -> Listener:
        if family == socket.AF_INET6:
            raise OSError(number, os.strerror(number))
        return bind(family, address, host)

    monkeypatch.setattr(module, "_bind", without_inet6)

    with listening(port="0") as (only,):
        assert only.socket.family == socket.AF_INET
    assert refusal(port="0", address_family=AddressFamily.INET6).startswith("cannot listen on ::1 port 0: ")


def test_an_address_that_is_not_ours_is_refused() -> None:
    assert (
        refusal(address="192.0.2.1", port="0") == "cannot listen on 192.0.2.1 port 0: Cannot assign requested address"
    )


@pytest.mark.parametrize("name", ["no such host", "x" * 64 + ".invalid", "a..b"])
def test_a_name_that_is_no_address_is_refused(name: str) -> None:
    assert refusal(address=name, port="0").startswith(f'cannot listen on address "{name}", port "0": ')


@pytest.mark.parametrize("port", ["65536", "99999", "123456789", "no-such-service", "-1"])
def test_P10_a_port_that_is_none_is_refused(port: str) -> None:
    assert f'"{port}"' in refusal(port=port)


def test_an_address_of_the_other_kind_is_refused() -> None:
    text = refusal(address="127.0.0.1", address_family=AddressFamily.INET6, port="0")

    assert text == '"127.0.0.1" has no address of the kind that ipv6 asks for'


# --- Unix ---


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_A10_the_mode_of_a_socket_does_not_depend_on_the_umask(umask: int, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    before = os.umask(umask)
    try:
        with unix(path):
            mode = os.stat(path).st_mode
            after = os.umask(umask)
    finally:
        os.umask(before)

    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o755
    assert after == umask


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o755), (0o022, 0o755), (0o077, 0o700)])
def test_the_umask_can_be_left_alone_and_then_takes_away(umask: int, mode: int, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    before = os.umask(umask)
    try:
        (listener,) = listen([Endpoint(Transport.UNIX, unix_path=path)], umask=None)
        found = stat.S_IMODE(os.stat(path).st_mode)
        listener.close()
    finally:
        os.umask(before)

    assert found == mode


def test_a_unix_socket_is_removed_at_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    with unix(path) as (listener,):
        assert (listener.unix_path, listener.port, str(listener)) == (path, None, path)
        connect(listener)

    assert not os.path.exists(path)


def test_without_a_path_it_is_in_a_private_directory_that_is_removed_as_well() -> None:
    with unix(None) as (listener,):
        directory = os.path.dirname(listener.unix_path)
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        connect(listener)

    assert not os.path.exists(directory)


def test_a_directory_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", fail)

    assert refusal(transport=Transport.UNIX).endswith(": No space left on device")


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_private_directory_does_not_outlive_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    mkdir = os.mkdir

    def noted(path: str, mode: int) -> None:
        made.append(path)
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", noted)
    monkeypatch.setattr(socket.socket, "bind", fail, raising=False)

    assert refusal(transport=Transport.UNIX) == f"cannot listen on {made[0]}/socket: No space left on device"
    assert not os.path.exists(made[0])


@pytest.mark.parametrize("length", [107, 108])
def test_A12_the_length_of_a_path_has_a_limit(length: int, tmp_path: Path) -> None:
    path = os.path.join(tmp_path, "x" * 107)[:length]

    if length > 107:
        text = refusal(transport=Transport.UNIX, unix_path=path)
        assert text == f'unix: the path must have at most 107 bytes, not 108 as "{path}"'
    else:
        with unix(path) as (listener,):
            connect(listener)


def test_A12_the_length_of_a_path_is_counted_in_bytes() -> None:
    assert "not 200 as" in refusal(transport=Transport.UNIX, unix_path="é" * 100)


@pytest.mark.parametrize("path", ["", "\0abstract", "/tmp/a\0b"])
def test_A12_a_path_that_is_not_one_of_a_file_is_refused(path: str) -> None:
    assert refusal(transport=Transport.UNIX, unix_path=path).startswith("unix: the path must be that of a file, not ")


def test_A11_what_exists_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")

    assert refusal(transport=Transport.UNIX, unix_path=str(path)) == f"cannot listen on {path}: Address already in use"
    assert path.read_text() == "precious"


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    text = refusal(transport=Transport.UNIX, unix_path=f"{tmp_path}/nowhere/socket")

    assert text == f"cannot listen on {tmp_path}/nowhere/socket: No such file or directory"


def test_A11_somebody_elses_socket_in_our_place_stays(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    with unix(path):
        os.unlink(path)
        other = socket.socket(socket.AF_UNIX)
        other.bind(path)

    assert os.path.exists(path)
    other.close()


@pytest.mark.parametrize("kind", ["file", "nothing"])
def test_A11_something_else_in_our_place_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"

    with unix(str(path)):
        path.unlink()
        if kind == "file":
            path.write_text("precious")

    assert path.exists() == (kind == "file")


def test_a_directory_into_which_somebody_put_something_stays(tmp_path: Path) -> None:
    with unix(None) as (listener,):
        directory = Path(listener.unix_path).parent
        (directory / "file").write_text("precious")

    assert os.listdir(directory) == ["file"]
    (directory / "file").unlink()
    directory.rmdir()


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    with unix(str(tmp_path / "socket")) as (listener,):
        listener.close()


# --- vsock ---


def vsock_or_skip() -> None:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except (AttributeError, OSError) as error:
        pytest.skip(f"no vsock on this machine: {error}")


def test_vsock_listens_on_a_port_of_its_own_choice() -> None:
    vsock_or_skip()

    with listening(transport=Transport.VSOCK, port="0") as (listener,):
        assert listener.port
        assert str(listener) == f"vsock port {listener.port}"


def test_a_taken_vsock_port_is_refused() -> None:
    vsock_or_skip()

    with listening(transport=Transport.VSOCK, port="0") as (listener,):
        text = refusal(transport=Transport.VSOCK, port=str(listener.port))

        assert text == f"cannot listen on vsock port {listener.port}: Address already in use"


@pytest.mark.parametrize("port", ["4294967296", "-1", "x", "", "99999999999", "１"])
def test_P10_a_vsock_port_that_is_none_is_refused(port: str) -> None:
    text = refusal(transport=Transport.VSOCK, port=port)

    assert text == f'port must be a number from 0 to 4294967295 for vsock, not "{port}"'


def test_without_vsock_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_VSOCK", raising=False)

    text = refusal(transport=Transport.VSOCK, port="1")

    assert text == "cannot listen on vsock: Address family not supported by protocol"


# --- several at once, and those that were handed to us ---


def test_several_endpoints_are_listened_on_at_once(tmp_path: Path) -> None:
    endpoints = [Endpoint(port="0"), Endpoint(Transport.UNIX, unix_path=f"{tmp_path}/socket")]

    listeners = listen(endpoints)

    assert [listener.transport for listener in listeners] == [Transport.TCP, Transport.TCP, Transport.UNIX]
    for listener in listeners:
        connect(listener)
        listener.close()


def test_if_one_endpoint_fails_nothing_is_left_of_the_others(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    endpoints = [Endpoint(Transport.UNIX, unix_path=path), Endpoint(Transport.UNIX, unix_path=f"{path}/no/such")]

    with pytest.raises(ConfigError):
        listen(endpoints)

    assert not os.path.exists(path)


def test_A11_a_socket_that_was_handed_to_us_is_described_and_left_behind(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(path)
        theirs.listen()

        (listener,) = listen([Endpoint(fd=os.dup(theirs.fileno()))])

        assert (str(listener), listener.is_ours, listener.port) == (path, False, None)
        connect(listener)
        listener.close()
    assert os.path.exists(path)


def test_an_abstract_name_is_shown_as_it_is_written() -> None:
    with socket.socket(socket.AF_UNIX) as theirs:
        name = f"nbdkitpy-test-{os.getpid()}"
        theirs.bind(f"\0{name}")
        theirs.listen()

        (listener,) = listen([Endpoint(fd=os.dup(theirs.fileno()))])

        assert str(listener) == f"@{name}"
        listener.close()


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [
        (Endpoint(port="0"), "localhost"),
        (Endpoint(port="0", address_family=AddressFamily.INET6), "::1"),
        (Endpoint(port="0", address="any"), "localhost"),
        (Endpoint(port="0", address="any", address_family=AddressFamily.INET6), "::1"),
        (Endpoint(port="0", address="127.0.0.1"), "127.0.0.1"),
    ],
)
def test_clients_on_this_machine_find_it_by_a_name_that_leads_there(endpoint: Endpoint, host: str) -> None:
    listeners = listen([endpoint])

    assert listeners[0].host == host
    for listener in listeners:
        listener.close()
