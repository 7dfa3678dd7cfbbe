"""The same command line and the same requests for us and for the real nbdkit, to see that there is no difference.

:class:`SideBySide` (the fixture `side_by_side`) has one method that tests call::

    side_by_side.compare("--filter=offset", "file", IMAGE, "offset=1M", requests=random_requests(1, size))

The nbdkit is the one in the root directory that NBDKITPY_NEWEST_PEERS names, else the one that is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

from tests.interop.harness import DEBIANS_PYTHON, PATIENCE, SCRIPTS, Servers, environment, missing, run, sha256

#: In a command line: the path of the server's own copy of the data.
IMAGE = "{image}"

#: What requests.py tells of one server; None if the export cannot be opened.
Outcome: TypeAlias = "dict[str, Any] | None"

#: The flags that may go with each verb.
FLAGS = {
    "pread": (),
    "pwrite": ("FUA",),
    "flush": (),
    "trim": ("FUA",),
    "zero": ("FUA", "NO_HOLE", "FAST_ZERO"),
    "cache": (),
    "extents": ("REQ_ONE",),
}


class Request(NamedTuple):
    """One request. `flags` are libnbd's names without CMD_FLAG_; `seed` gives the data of a pwrite."""

    verb: str
    length: int = 0
    offset: int = 0
    flags: tuple[str, ...] = ()
    seed: int = 0

    def without(self, flag: str) -> Request:
        """Return it without this flag."""
        return self._replace(flags=tuple(name for name in self.flags if name != flag))


def random_requests(
    seed: int | str, size: int, count: int = 150, *, verbs: Sequence[str] = tuple(FLAGS), longest: int = 256 << 10
) -> list[Request]:
    """Return `count` requests of `verbs` to an export of `size` bytes; about one of twenty lies outside of it."""
    chance = random.Random(seed)
    return [_random_request(chance, chance.choice(verbs), size, longest) for _ in range(count)]


def _random_request(chance: random.Random, verb: str, size: int, longest: int) -> Request:
    if verb == "flush":
        return Request(verb)
    grain = chance.choice((1, 512, 4096, 65536))
    length = min(chance.choice((1, 511, 512, 4096, chance.randint(1, longest))), longest)
    length = max(length // grain * grain, 1)
    last = max(size - length, 0) if chance.random() < 0.95 else size
    flags = tuple(flag for flag in FLAGS[verb] if chance.random() < 0.3)
    return Request(verb, length, chance.randint(0, last) // grain * grain, flags, chance.getrandbits(32))


class Nbdkit:
    """The real one."""

    def __init__(self) -> None:
        root = os.environ.get("NBDKITPY_NEWEST_PEERS")
        installed = shutil.which("nbdkit", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        if root is None and installed is None:
            missing("nbdkit is not installed (Debian's package nbdkit)")
        self._root = Path(root or "/")
        self._command = ["chroot", root, "nbdkit"] if root else [str(installed)]
        self.version = tuple(map(int, re.findall(r"\d+", run([*self._command, "--version"]))[:2]))

    def needs(self, *version: int) -> None:
        """Skip the test if it is older than this version."""
        if self.version < version:
            pytest.skip(f"needs nbdkit {version}, not {self.version}")

    @contextlib.contextmanager
    def copy(self, image: Path | None) -> Iterator[Path | None]:
        """A copy of `image` where nbdkit can open it."""
        with tempfile.TemporaryDirectory(dir=self._root / "tmp") as directory:
            yield image and _copied(image, Path(directory))

    @contextlib.contextmanager
    def serving(self, words: Sequence[str], image: Path | None) -> Iterator[str]:
        """Serve, and yield the URI; the server ends afterwards."""
        inner = "/" / image.relative_to(self._root) if image else ""
        command = [*self._command, "-U", "-", *_filled(words, inner), "--run", 'echo "$uri"; read line || :']
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            uri = process.stdout.readline().strip()
            if not uri:
                pytest.fail(f"nbdkit {words} did not start", pytrace=False)
            yield uri.replace("socket=/", f"socket={self._root}/".replace("//", "/"))
            process.stdin.close()
            process.wait(PATIENCE)


class SideBySide:
    """Us and nbdkit."""

    def __init__(self, serve: Servers, directory: Path) -> None:
        self._serve = serve
        self._directory = directory
        self.nbdkit = Nbdkit()

    def compare(
        self,
        *words: str,
        requests: Sequence[Request] = (),
        image: Path | None = None,
        fast_zero: bool = True,
        ignored: Sequence[str] = (),
    ) -> Outcome:
        """Start both with `words`, send both `requests`, and see that all is equal; return what it was.

        Args:
            words: The command line; :data:`IMAGE` in it becomes the path of a copy of `image`.
            requests: To be sent one after the other.
            image: Is not changed. The two copies have to be equal in the end.
            fast_zero: Compare fast zeroes, too. Our plugin `file` offers them, nbdkit's does not.
            ignored: What is offered and may differ, such as "block_size".
        """
        if not fast_zero:
            requests = [request.without("FAST_ZERO") for request in requests]
        mine = _copied(image, Path(tempfile.mkdtemp(dir=self._directory))) if image else None
        server = self._serve(*_filled(words, mine or ""))
        ours = _outcome(server.uri, requests)
        server.end()
        with self.nbdkit.copy(image) as copy:
            with self.nbdkit.serving(words, copy) as uri:
                theirs = _outcome(uri, requests)
            _check(requests, ours, theirs, [*ignored, *(() if fast_zero else ("fast_zero",))])
            assert not (mine and copy) or sha256(mine) == sha256(copy), "the images differ"
        return ours


def _copied(image: Path, directory: Path) -> Path:
    # Not shutil: both copies have to have the same holes.
    run(["cp", "--sparse=always", "--reflink=never", str(image), str(directory / "image")])
    return directory / "image"


def _filled(words: Sequence[str], image: Path | str) -> list[str]:
    return [word.replace(IMAGE, str(image)) for word in words]


def _outcome(uri: str, requests: Sequence[Request]) -> Outcome:
    output = run([DEBIANS_PYTHON, "-I", str(SCRIPTS / "requests.py"), uri], text=json.dumps(requests))
    outcome: Outcome = json.loads(output)
    return outcome


def _check(requests: Sequence[Request], ours: Outcome, theirs: Outcome, ignored: Sequence[str] = ()) -> None:
    if ours is None or theirs is None:
        assert ours == theirs, "only one of them opens the export"
        return
    if not any(theirs["facts"]["block_size"]):  # nbdkit tells of none, where we tell of our own
        ignored = [*ignored, "block_size"]
    pairs = {name: (fact, theirs["facts"][name]) for name, fact in ours["facts"].items() if name not in ignored}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    assert not different, f"we and nbdkit offer different things: {different}"
    for number, (request, our, their) in enumerate(zip(requests, ours["answers"], theirs["answers"])):
        assert our == their, f"request {number}, {request}: {our} is not nbdkit's {their}"
    assert ours["content"] == theirs["content"], "what the export holds in the end differs"
