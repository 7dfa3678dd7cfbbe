"""What clients send reaches no filter in a form that it could not bear: each command with all flags, and long ranges.

R5; nbdkit 1.32 was ended by FAST_ZERO that it had not offered, and by TRIM with FUA through ``cache=unsafe``, which
changes what is offered; CVE-2025-47711 and CVE-2025-47712 are block statuses of nearly 4 GiB, by itself and through
``blocksize``, which rounds it up; R2 is what is read-only, and stays so.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nbdkitpy import Filter, FilterHandle, Handle
from nbdkitpy.backend import Client
from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError, TransmissionFlag
from tests.conftest import StartServer
from tests.nbdclient import NbdClient, Style
from tests.threats.every_filter import CASES, PARAMETERS, Everything, case_id, installed, make_filters

FILTERS = pytest.mark.parametrize("case", CASES, ids=case_id)

WRITES = [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES]
#: Commands that there are, and what each needs to be offered; and some that there are not.
NEEDS: dict[int, TransmissionFlag | None] = {
    Command.READ: TransmissionFlag(0),
    Command.WRITE: TransmissionFlag(0),
    Command.FLUSH: TransmissionFlag.SEND_FLUSH,
    Command.TRIM: TransmissionFlag.SEND_TRIM,
    Command.CACHE: TransmissionFlag.SEND_CACHE,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
    Command.BLOCK_STATUS: TransmissionFlag(0),
    **dict.fromkeys((Command.RESIZE, 9, 0x100, 0x8000, 0xFFFF)),
}
#: All combinations of the flags that mean something, and some of those that do not.
FLAGS = [*range(1 << 5), *(1 << bit for bit in range(5, 16)), 0x8001, 0xFFDF]


def test_R5_every_filter_is_tried() -> None:
    assert installed() == set(PARAMETERS)


def may_have(command: int, offered: TransmissionFlag) -> int:
    """Return the flags that a command may have, by what the client was told."""
    flags = CommandFlag.FUA if offered & TransmissionFlag.SEND_FUA else CommandFlag(0)
    if command == Command.READ and offered & TransmissionFlag.SEND_DF:
        flags |= CommandFlag.DF
    if command == Command.BLOCK_STATUS:
        flags |= CommandFlag.REQ_ONE
    if command == Command.WRITE_ZEROES:
        flags |= CommandFlag.NO_HOLE
        if offered & TransmissionFlag.SEND_FAST_ZERO:
            flags |= CommandFlag.FAST_ZERO
    return int(flags)


def expected(command: int, flags: int, offered: TransmissionFlag) -> set[int]:
    """Return the errors that a request of 512 bytes at 0 may get; 0 is none."""
    needs = NEEDS[command]
    if needs is None:
        return {NbdError.EINVAL}
    if command in WRITES and offered & TransmissionFlag.READ_ONLY:
        return {NbdError.EPERM}
    if needs & ~offered or flags & ~may_have(command, offered):
        return {NbdError.EINVAL}
    return {0, NbdError.ENOTSUP} if flags & CommandFlag.FAST_ZERO else {0}


def errors(client: NbdClient, commands: list[int]) -> dict[tuple[int, int], int]:
    """Send each command with all flags, at once; return the errors."""
    sent: dict[int, tuple[int, int]] = {}
    with client.batched():
        for command, flags in itertools.product(commands, FLAGS):
            length = 0 if command == Command.FLUSH else 512
            data = bytes(length) if command == Command.WRITE else b""
            sent[client.send(command, 0, length, flags=flags, data=data)] = (command, flags)
    return {sent[cookie]: reply.error for cookie, reply in client.replies(len(sent)).items()}


#: What a plugin may not be able to do, and which parameters of filters then make no sense.
LACKS = {
    (): (),
    ("can_fast_zero", "can_fua"): ("fuamode=native", "fuamode=force"),
    ("can_trim", "can_zero", "can_cache", "can_flush"): ("fuamode=emulate", "zeromode=plugin", "zeromode=notrim"),
}


@pytest.mark.parametrize(
    ("case", "lacks"),
    [(case, lacks) for lacks, excluded in LACKS.items() for case in CASES if not set(case[1]) & set(excluded)],
    ids=str,
)
def test_R5_unadvertised_fast_zero_trim_fua_every_command_with_every_flag_through_every_filter(
    case: tuple[str, tuple[str, ...]], lacks: tuple[str, ...], start_server: StartServer, tmp_path: Path
) -> None:
    plugin = Everything()
    plugin.lacks = frozenset(lacks)
    plugin.size = 4 << 20
    client = start_server(plugin, *make_filters(*case, tmp_path)).connect(Style.STRUCTURED, contexts=True)

    found = errors(client, list(NEEDS))

    wrong = {key: error for key, error in found.items() if error not in expected(*key, client.flags)}
    assert wrong == {}
    assert len(client.read(0, 512)) == 512


class WritesAll(Filter):
    """Forgets that what is behind it is read-only."""

    name = "writes-all"

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return WritesAllHandle(handle)


class WritesAllHandle(FilterHandle):
    def can_write(self) -> bool:
        return True


@FILTERS
@pytest.mark.parametrize("forgetful", [False, True])
def test_R2_nothing_is_written_to_what_is_read_only_with_whatever_flags_through_whatever_filter(
    case: tuple[str, tuple[str, ...]], forgetful: bool, start_server: StartServer, tmp_path: Path
) -> None:
    plugin = Everything()
    plugin.size = 4 << 20
    filters = [WritesAll()] * forgetful + make_filters(*case, tmp_path)
    client = start_server(plugin, *filters, readonly=True).connect(Style.STRUCTURED, contexts=True)

    found = errors(client, list(WRITES))

    assert client.flags & TransmissionFlag.READ_ONLY
    assert set(found.values()) == {NbdError.EPERM}
    assert {call[0] for call in plugin.requests}.isdisjoint({"pwrite", "trim", "zero"})
    assert len(client.read(0, 512)) == 512


LONGEST = (1 << 32) - 1


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "tls-fallback"], ids=case_id)  # that hides all
@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED], ids=lambda style: style.value)
def test_CVE_2025_47711_CVE_2025_47712_ranges_of_nearly_4_gib_through_every_filter(
    case: tuple[str, tuple[str, ...]], style: Style, start_server: StartServer, tmp_path: Path
) -> None:
    plugin = Everything()
    plugin.size = 16 << 30  # one extent, however long
    client = start_server(plugin, *make_filters(*case, tmp_path)).connect(style, contexts=True)

    for offset, length in itertools.product((0, 1, 511, 4095, 65537), (LONGEST, LONGEST - 511, 1 << 31)):
        for flags in (0, CommandFlag.REQ_ONE):
            reply = client.call(Command.BLOCK_STATUS, offset, length, flags=flags)
            told = sum(count for count, _ in reply.extents)
            # A filter that works in blocks, and asks piece by piece, may tell of a beginning only.
            assert told == length or (case[0] in ("blocksize", "cow") and 0 < told < length)
        for command in (Command.TRIM, Command.CACHE):
            assert client.call(command, offset, length).error in (0, NbdError.EINVAL, NbdError.EPERM)

    assert len(client.read(0, 512)) == 512
