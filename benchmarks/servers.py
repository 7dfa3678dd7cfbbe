"""The servers that are compared, and how each is called."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.clients import BenchmarkError, run_client, version
from benchmarks.figures import LIMIT
from benchmarks.place import Place

HERE = Path(__file__).resolve().parent
BARE = HERE.parent / "build" / "bare"
NBDKIT_SCRIPT = HERE / "plugins" / "nbdkit_bytearray.py"
DELAYED = HERE / "plugins" / "nbdkitpy_delayed.py"
SYSTEM = Path("/")

#: Filters that let everything through, in the order in which --filters N takes them. All parameters go to the outermost
#: filter that knows them: that is why only `ip`, which needs none, is there more than once.
FILTERS = ("ip", "limit", "exitlast", *["ip"] * 7)
FILTER_PARAMETERS = {"ip": "allow=all", "limit": "limit=2000"}


@dataclass(frozen=True)
class Contender:
    """A server to compare.

    Attributes:
        name: For reports.
        program: The command, and what always comes after it.
        arguments: Returns the rest of the command line, and writes the files that it names.
        source: What is served; like is compared with like.
        export: The name under which that is.
        words: How the plugin is called that serves it, if the server has plugins.
        filters: So many of :data:`FILTERS`, if it has those.
        options: More of its options.
        root: The directory that is its root directory.
        environment: What it finds in its environment besides ours.
        daemon: Whether it goes into the background, and leaves its process's number at the place.
        says_version: The option with which it prints its version.
    """

    name: str
    program: tuple[str, ...]
    arguments: Callable[[Contender, Place], list[str]]
    source: str = "file"
    export: str = ""
    words: Callable[[Place], Sequence[str]] = lambda place: ()
    filters: int = 0
    options: tuple[str, ...] = ()
    root: Path = SYSTEM
    environment: Mapping[str, str] = field(default_factory=dict)
    daemon: bool = False
    says_version: str = "--version"

    @property
    def invocation(self) -> tuple[str, ...]:
        """The program, in its root directory."""
        return self.program if self.root == SYSTEM else ("chroot", str(self.root), *self.program)

    def command(self, place: Place) -> list[str]:
        """Return the command line that serves a place."""
        return [*self.invocation, *self.arguments(self, place.seen_from(self.root))]

    def version(self) -> str:
        """Return what the server says that it is."""
        return version([*self.invocation, self.says_version])


# What is served


def file_plugin(place: Place) -> Sequence[str]:
    return "file", str(place.image)


def memory_plugin(place: Place) -> Sequence[str]:
    return "memory", str(place.size)


def null_plugin(place: Place) -> Sequence[str]:
    return "null", str(place.size)


def bytearray_plugin(place: Place) -> Sequence[str]:
    return "bytearray", f"size={place.size}"


def bytearray_script(place: Place, model: str) -> Sequence[str]:
    # The place is in the server's root directory, and the script may not be.
    return "python", str(place.directory / NBDKIT_SCRIPT.name), f"size={place.size}", f"model={model}"


def delayed_plugin(place: Place) -> Sequence[str]:
    return str(DELAYED), f"size={place.size}"


def delayed_memory(place: Place) -> Sequence[str]:
    # It has a thread for each request that waits.
    return "-t", "64", "--filter=delay", "memory", str(place.size), "rdelay=5ms", "wdelay=5ms"


# How servers are called


def nbdkit_arguments(contender: Contender, place: Place) -> list[str]:
    """Return the options of nbdkit, which are nbdkitpy's too."""
    listen = ["-i", "127.0.0.1", "-p", str(place.port)] if place.port else ["-U", str(place.path)]
    filters = FILTERS[: contender.filters]
    parameters = [FILTER_PARAMETERS[name] for name in dict.fromkeys(filters) if name in FILTER_PARAMETERS]
    chosen = [*(f"--filter={name}" for name in filters), *contender.options]
    return ["-f", *listen, *chosen, *contender.words(place), *parameters]


def qemu_nbd_arguments(contender: Contender, place: Place) -> list[str]:
    """Return the options of qemu-nbd."""
    listen = ["-b", "127.0.0.1", "-p", str(place.port)] if place.port else ["-k", str(place.path)]
    return ["--persistent", "--shared=2000", "--format=raw", *contender.options, *listen, str(place.image)]


def nbd_server_arguments(contender: Contender, place: Place) -> list[str]:
    """Return the options of nbd-server, which reads the rest from a file."""
    listen = f"listenaddr = 127.0.0.1\nport = {place.port}" if place.port else f"unixsock = {place.path}"
    place.config.write_text(f"[generic]\n{listen}\n[{contender.export}]\nexportname = {place.image}\n")
    return ["-C", str(place.config), "-p", str(place.pid_file), *contender.options]


def bare_arguments(contender: Contender, place: Place) -> list[str]:
    """Return the options of our C program."""
    return [*contender.options, str(place.port or place.path), str(place.image)]


def build_bare() -> None:
    """Compile our C program, if that has not been done since it was changed."""
    source = HERE / "bare.c"
    if BARE.exists() and BARE.stat().st_mtime >= source.stat().st_mtime:
        return
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchmarkError("not installed: cc, which bare.c is compiled with")
    BARE.parent.mkdir(exist_ok=True)
    run_client([compiler, "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(BARE), str(source)], 0)


def our_program() -> tuple[str, ...]:
    """Return the command of nbdkitpy that belongs to this Python."""
    script = Path(sys.executable).with_name("nbdkitpy")
    return (str(script),) if script.exists() else (sys.executable, "-m", "nbdkitpy")


def nbdkit(name: str, source: str, words: Callable[[Place], Sequence[str]]) -> Contender:
    """Return nbdkit with a plugin."""
    return Contender(f"nbdkit-{name}", ("nbdkit",), nbdkit_arguments, source, words=words)


def ours(source: str) -> Contender:
    """Return nbdkitpy, serving what the others do."""
    # The plugin is that of a package which is found by its entry point, like any other.
    environment = {"PYTHONPATH": str(NBDKIT_SCRIPT.parent)} if source == "bytearray" else {}
    return Contender(
        "ours", our_program(), nbdkit_arguments, source, words=OUR_PLUGINS[source], environment=environment
    )


OUR_PLUGINS: Mapping[str, Callable[[Place], Sequence[str]]] = {
    "file": file_plugin,
    "memory": memory_plugin,
    "null": null_plugin,
    "bytearray": bytearray_plugin,
    "delayed": delayed_plugin,
}

PEERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        nbdkit("file", "file", file_plugin),
        nbdkit("memory", "memory", memory_plugin),
        nbdkit("null", "null", null_plugin),
        nbdkit("python", "bytearray", partial(bytearray_script, model="default")),
        nbdkit("python-parallel", "bytearray", partial(bytearray_script, model="parallel")),
        nbdkit("delayed", "delayed", delayed_memory),
        Contender("qemu-nbd", ("qemu-nbd",), qemu_nbd_arguments),
        # In the foreground it serves but one client, and it has no export without a name.
        Contender("nbd-server", ("nbd-server",), nbd_server_arguments, export="disk", daemon=True, says_version="-V"),
        Contender(LIMIT, (str(BARE),), bare_arguments),
        Contender("ours", our_program(), nbdkit_arguments, words=file_plugin),
    )
}
