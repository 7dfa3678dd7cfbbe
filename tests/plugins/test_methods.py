"""Calls of methods of the plugins sh and eval: exit statuses, errors, what a process is given."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from nbdkitpy import Client
from nbdkitpy_plugins._methods import MAX_KNOWN_STATUS, Reply, Status, call_method


class Calls:
    """Calls methods; takes note of what they ask for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.client = Client(1, disconnect=lambda force: self.asked.append(f"disconnect {force}"))

    def __call__(self, script: str, *args: str, data: memoryview | None = None, client: bool = True) -> Reply:
        command = ["/bin/sh", "-c", script, "name", *args]
        shutdown = lambda: self.asked.append("shutdown")  # noqa: E731
        return call_method(command, data, {**os.environ, "tmpdir": "/here"}, shutdown, self.client if client else None)


@pytest.fixture
def call() -> Calls:
    return Calls()


@pytest.mark.parametrize(
    ("code", "status", "asked"),
    [
        (0, Status.OK, []),
        (2, Status.MISSING, []),
        (3, Status.FALSE, []),
        (4, Status.OK, ["shutdown"]),
        (7, Status.OK, ["disconnect False"]),
    ],
)
def test_statuses_that_are_no_errors(call: Calls, code: int, status: Status, asked: list[str]) -> None:
    assert call(f"echo out; echo EPERM not looked at >&2; exit {code}") == Reply(status, b"out\n")
    assert call.asked == asked


@pytest.mark.parametrize(
    ("code", "number", "asked"),
    [
        (1, errno.EIO, []),
        (5, errno.ESHUTDOWN, ["shutdown"]),
        (6, errno.ESHUTDOWN, ["disconnect True"]),
        (8, errno.ESHUTDOWN, ["disconnect False"]),
        (9, errno.EIO, []),
        (15, errno.EIO, []),
        (16, errno.EIO, []),
        (255, errno.EIO, []),
    ],
)
def test_statuses_that_are_errors(call: Calls, code: int, number: int, asked: list[str]) -> None:
    with pytest.raises(OSError, match=r".") as error:
        call(f"exit {code}")

    assert error.value.errno == number
    assert call.asked == asked


def test_without_a_client_nobody_is_disconnected(call: Calls) -> None:
    assert call("exit 7", client=False).status is Status.OK
    assert call.asked == []


def test_all_statuses_are_known() -> None:
    assert MAX_KNOWN_STATUS == 8


@pytest.mark.parametrize(
    ("printed", "number", "text"),
    [
        ("ENOSPC Out of space", errno.ENOSPC, "Out of space"),
        ("ENOSPC", errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ("  enospc\\n  Out of\\nspace \\n", errno.ENOSPC, "Out of\nspace"),
        ("EOPNOTSUPP\\tno", errno.EOPNOTSUPP, "no"),
        ("ENOTSUP", errno.ENOTSUP, os.strerror(errno.ENOTSUP)),
        ("no number here", errno.EIO, "no number here"),
        ("ENOSUCHERROR text", errno.EIO, "ENOSUCHERROR text"),
        ("ENOSPC: text", errno.EIO, "ENOSPC: text"),
        ("", errno.EIO, "failed without a message"),
        ("\\377", errno.EIO, "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_error_is_what_the_method_prints(call: Calls, printed: str, number: int, text: str) -> None:
    with pytest.raises(OSError, match=r".") as error:
        call(f"printf '{printed}' >&2; exit 1")

    assert (error.value.errno, error.value.strerror) == (number, text)


def test_method_that_is_killed_is_an_error(call: Calls) -> None:
    with pytest.raises(OSError, match="killed by signal 9: its last words") as error:
        call("echo its last words >&2; kill -9 $$")

    assert error.value.errno == errno.EIO


def test_output_is_bytes_as_they_are(call: Calls) -> None:
    assert call("printf '\\0\\377\\n\\n'").output == b"\0\xff\n\n"


def test_text_is_without_the_last_line_feed(call: Calls) -> None:
    assert call("printf 'a\\nb\\n\\n'").text == "a\nb\n"


def test_method_is_given_its_arguments_as_they_are(call: Calls) -> None:
    args = ["", "two words", "$(echo no)", "'\"`;&|\n", "ünï", "-n"]

    reply = call('for each; do printf "<%s>" "$each"; done', *args)

    assert reply.text == "".join(f"<{arg}>" for arg in args)


def test_method_is_given_its_data(call: Calls) -> None:
    data = memoryview(bytearray(os.urandom(1 << 20)))

    assert call("cat", data=data).output == data


def test_method_need_not_read_its_data(call: Calls) -> None:
    assert call("exec <&-", data=memoryview(bytes(1 << 20))).status is Status.OK


def test_without_data_input_is_empty(call: Calls) -> None:
    assert call("cat").output == b""


def test_method_is_given_the_name_of_the_directory(call: Calls) -> None:
    assert call("echo $tmpdir").text == "/here"


def test_method_has_no_other_file_open(call: Calls) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        reply = call("exec ls /proc/self/fd")
    finally:
        os.close(read)
        os.close(write)

    assert reply.text.split() == ["0", "1", "2", "3"]  # the last one is that of the directory which ls reads


def test_methods_may_run_at_the_same_time(call: Calls, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    replies: list[Reply] = []
    scripts = [f"cat {tmp_path}/pipe", f"echo met >{tmp_path}/pipe"]
    threads = [threading.Thread(target=lambda script=script: replies.append(call(script))) for script in scripts]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(reply.output for reply in replies) == [b"", b"met\n"]


def test_script_without_an_interpreter_is_the_shells(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$1"\n')
    script.chmod(0o755)

    reply = call_method([str(script), "argument"], None, {}, Calls().asked.clear, None)

    assert reply.text == "argument"


def test_command_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"/gone cannot be run: No such file or directory") as error:
        call_method([f"{tmp_path}/gone"], None, {}, Calls().asked.clear, None)

    assert error.value.errno == errno.EIO
