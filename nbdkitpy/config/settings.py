"""The settings of the server: each declared once, for the command line and the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nbdkitpy import log
from nbdkitpy.config.words import Assignment, DebugFlag, parse_debug_flag
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import (
    choice,
    integer,
    parse_bool,
    parse_delay,
    parse_filename,
    parse_path,
    parse_size,
    parse_string,
)
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.server.options import AddressFamily, Endpoint, ServerOptions, Transport

if TYPE_CHECKING:
    from nbdkitpy.config.file import Document
    from nbdkitpy.config.units import UnitTable

__all__ = ["LISTENING", "SETTINGS", "ServerConfig", "Setting", "endpoints", "server_config", "value_in"]

_MAX_THREADS = 1 << 16
_MAX_WORKERS = 1 << 10
_MAX_COUNT = (1 << 32) - 1


class ServerConfig(NamedTuple):
    """All that the command line and the file say, defaults filled in."""

    plugin: str
    filters: tuple[str, ...] = ()  #: outermost first
    parameters: tuple[Assignment, ...] = ()  #: of the command line, in the order given, of all units
    tables: tuple[UnitTable, ...] = ()  #: of the file: of the innermost layers, the plugin's last
    server: ServerOptions = ServerOptions()
    run: str | None = None  #: shell command beside which the server runs
    single: bool = False  #: one connection, on standard input and output
    background: bool = True
    print_uri: bool = False
    reload: bool = False  #: serve anew whenever the code of a unit has changed
    log: str = "default"
    log_format: str = "text"
    name: str = ""
    verbose: bool = False
    debug: tuple[DebugFlag, ...] = ()
    exit_with_parent: bool = False
    user: str | None = None
    group: str | None = None
    swap: bool = False
    selinux_label: str | None = None
    file: Document | None = None  #: of --config
    by_command_line: frozenset[str] = frozenset()  #: names of settings that the command line has given


class Setting(NamedTuple):
    """One way to say a setting of the server."""

    name: str  #: of the value: a field of ServerConfig or ServerOptions, or what :func:`endpoints` looks at
    options: tuple[str, ...]  #: its names on the command line
    help: str
    metavar: str = ""  #: what its value is; "" for a switch, which has none
    parse: Callable[[str], object] = parse_string
    value: object = True  #: of a switch
    key: str = ""  #: its name in the file's table [server]; "" if it is not for that
    kinds: tuple[type, ...] = (str,)  #: of values in the file
    many: bool = False  #: may be given several times
    live: bool = False  #: a field of ServerOptions that may change while clients are served

    @property
    def is_switch(self) -> bool:
        """Tell whether it is either given or not."""
        return not self.metavar


def _handshake_flags(text: str) -> int:
    return ServerOptions().handshake_flags & integer(0, (1 << 32) - 1)(text)


def _threads(text: str) -> int:
    return integer(0, _MAX_THREADS)(text) or ServerOptions().threads


def _unix_path(text: str) -> str:
    return text if text == "-" else parse_path(text)


def _tls_mode(text: str) -> TlsMode:
    word = text.lower()
    try:
        return _TLS_MODES.get(word) or (TlsMode.ON if parse_bool(word) else TlsMode.OFF)
    except ValueError:
        raise ValueError("off, on or require") from None


#: nbdkit's words; those for true and false are on and off.
_TLS_MODES = {"require": TlsMode.REQUIRE, "required": TlsMode.REQUIRE, "force": TlsMode.REQUIRE}

_TIME = (str, int, float)
_SIZE = (str, int)

#: Settings that say where to listen. A file has its tables [[listen]] for that.
LISTENING = frozenset({"address", "address_family", "port", "unix", "vsock"})

#: Settings that exclude --reload. As another user the command of --run would have more rights than the units.
_NOT_RELOADED = ("single", "user", "group")

SETTINGS = (
    # Where to listen.
    Setting(
        "address",
        ("-i", "--ipaddr", "--ip-addr"),
        "Listen on this address or name; 'any' is every interface.  [default: localhost]",
        metavar="ADDR",
    ),
    Setting("port", ("-p", "--port"), "TCP (or vsock) port, 0 for any free one.  [default: 10809]", metavar="PORT"),
    Setting("address_family", ("-4", "--ipv4-only"), "IPv4 only.", value=AddressFamily.INET),
    Setting("address_family", ("-6", "--ipv6-only"), "IPv6 only.", value=AddressFamily.INET6),
    Setting(
        "unix",
        ("-U", "--unix"),
        "Listen on a Unix socket; - makes a private one.",
        metavar="SOCKET",
        parse=_unix_path,
    ),
    Setting("vsock", ("--vsock",), "Listen on AF_VSOCK."),
    Setting("single", ("-s", "--single", "--stdin"), "Serve one client, on standard input and output."),
    Setting(
        "print_uri",
        ("--print-uri", "--print-url", "--show-uri", "--show-url"),
        "Print the URI on standard output.",
        key="print-uri",
    ),
    # The protocol.
    Setting("readonly", ("-r", "--read-only", "--readonly"), "Refuse all writes.", key="read-only"),
    Setting(
        "export_name",
        ("-e", "--export", "--export-name", "--exportname"),
        "Export name for the URI and for --run.",
        metavar="NAME",
        key="export",
    ),
    Setting(
        "oldstyle",
        ("-n", "--newstyle", "--new-style"),
        "Newstyle protocol (the default).",
        value=False,
        key="newstyle",
    ),
    Setting("oldstyle", ("-o", "--oldstyle", "--old-style"), "Oldstyle protocol.", key="oldstyle"),
    Setting(
        "handshake_flags",
        ("--mask-handshake",),
        "Handshake flags to offer at most.",
        metavar="MASK",
        parse=_handshake_flags,
        key="mask-handshake",
        kinds=(int,),
    ),
    Setting(
        "structured_replies",
        ("--no-sr", "--no-structured-replies"),
        "Refuse structured replies.",
        value=False,
        key="no-structured-replies",
    ),
    Setting(
        "meta_contexts",
        ("--no-mc", "--no-meta-contexts"),
        "Refuse meta contexts.",
        value=False,
        key="no-meta-contexts",
    ),
    # TLS.
    Setting(
        "tls",
        ("--tls",),
        "Whether clients may use TLS, or have to: off, on or require.  [default: on if there are certificates]",
        metavar="MODE",
        parse=_tls_mode,
        key="tls",
    ),
    Setting(
        "tls_certificates",
        ("--tls-certificates",),
        "Directory with ca-cert.pem, server-cert.pem, server-key.pem, and maybe ca-crl.pem.",
        metavar="DIR",
        parse=parse_path,
        key="tls-certificates",
    ),
    Setting(
        "tls_psk",
        ("--tls-psk",),
        "File of pre-shared keys, in place of certificates: lines USER:KEY.",
        metavar="FILE",
        parse=parse_filename,
        key="tls-psk",
    ),
    Setting(
        "tls_verify_peer",
        ("--tls-verify-peer",),
        "Serve by TLS only clients that show a certificate which the authority has signed.",
        key="tls-verify-peer",
    ),
    Setting(
        "tls_priority",
        ("--tls-priority",),
        "Ciphers of TLS 1.2 and the security level, in OpenSSL's terms.",
        metavar="CIPHERS",
        key="tls-priority",
    ),
    # The service.
    Setting(
        "foreground",
        ("-f", "--foreground", "--no-fork"),
        "Stay in the foreground, as --run, -s, --exit-with-parent and socket activation do too.",
        key="foreground",
    ),
    Setting(
        "threads",
        ("-t", "--threads"),
        "Requests of one connection that are served at once.  [default: 16]",
        metavar="N",
        parse=_threads,
        key="threads",
        kinds=(int,),
    ),
    Setting(
        "workers",
        ("--workers",),
        "Processes that share the clients; 0 is one for everything.  [default: 0]",
        metavar="N",
        parse=integer(0, _MAX_WORKERS),
        key="workers",
        kinds=(int,),
    ),
    Setting(
        "handshake_timeout",
        ("--timeout", "--time-out"),
        "Time for a client's handshake, 0 for no limit.  [default: 10s]",
        metavar="TIME",
        parse=parse_delay,
        key="timeout",
        kinds=_TIME,
    ),
    Setting(
        "idle_timeout",
        ("--idle-timeout",),
        "Time after which a client that asks for nothing is disconnected, 0 for never.  [default: 0]",
        metavar="TIME",
        parse=parse_delay,
        key="idle-timeout",
        kinds=_TIME,
    ),
    Setting(
        "drain",
        ("--drain",),
        "Time for clients to take their replies at the end.  [default: 5s]",
        metavar="TIME",
        parse=parse_delay,
        key="drain",
        kinds=_TIME,
    ),
    Setting(
        "keepalive",
        ("--keepalive", "--keep-alive"),
        "Have the system find out about TCP clients that have vanished.",
        key="keepalive",
    ),
    # Limits.
    Setting(
        "max_connections",
        ("--max-connections",),
        "Clients that may be connected at once, 0 for any number.  [default: 1000]",
        metavar="N",
        parse=integer(0, _MAX_COUNT),
        key="max-connections",
        kinds=(int,),
        live=True,
    ),
    Setting(
        "max_connections_per_source",
        ("--max-connections-per-source",),
        "The same for those of one address, or one user of a Unix socket.  [default: 0]",
        metavar="N",
        parse=integer(0, _MAX_COUNT),
        key="max-connections-per-source",
        kinds=(int,),
        live=True,
    ),
    Setting(
        "max_handshakes",
        ("--max-handshakes",),
        "Unfinished handshakes, past which the oldest is closed; 0 for any number.  [default: 1000]",
        metavar="N",
        parse=integer(0, _MAX_COUNT),
        key="max-handshakes",
        kinds=(int,),
        live=True,
    ),
    Setting(
        "max_options",
        ("--max-options",),
        "Options that a client may send in one handshake.  [default: 32]",
        metavar="N",
        parse=integer(1, _MAX_COUNT),
        key="max-options",
        kinds=(int,),
    ),
    Setting(
        "max_buffered",
        ("--max-buffered",),
        "Memory for payloads and replies of all clients, 0 for no limit.  [default: 512M]",
        metavar="SIZE",
        parse=parse_size,
        key="max-buffered",
        kinds=_SIZE,
    ),
    Setting(
        "max_buffered_per_connection",
        ("--max-buffered-per-connection",),
        "The same for one client.  [default: 128M]",
        metavar="SIZE",
        parse=parse_size,
        key="max-buffered-per-connection",
        kinds=_SIZE,
    ),
    Setting(
        "stall_timeout",
        ("--stall-timeout",),
        "Time after which a client that keeps memory others wait for is disconnected, 0 for never.  [default: 30s]",
        metavar="TIME",
        parse=parse_delay,
        key="stall-timeout",
        kinds=_TIME,
    ),
    Setting(
        "run",
        ("--run",),
        "Serve only while this shell command runs; it finds $uri set. Implies -U - unless an address is given.",
        metavar="COMMAND",
    ),
    Setting(
        "reload",
        ("--reload",),
        "For development: serve anew, on the same sockets, when the code of PLUGIN or of a filter changes.",
    ),
    Setting("user", ("-u", "--user"), "User to become, once everything is open.", metavar="USER", key="user"),
    Setting("group", ("-g", "--group"), "Group to become, likewise.", metavar="GROUP", key="group"),
    Setting("swap", ("--swap",), "Lock all memory, so that it can serve swap space to this machine.", key="swap"),
    Setting(
        "selinux_label",
        ("--selinux-label",),
        "SELinux label of the sockets that it listens on.",
        metavar="LABEL",
        key="selinux-label",
    ),
    Setting(
        "pidfile",
        ("-P", "--pidfile", "--pid-file"),
        "File for the process number, once clients can connect.",
        metavar="FILE",
        parse=parse_path,
        key="pidfile",
    ),
    Setting(
        "exit_with_parent",
        ("--exit-with-parent",),
        "End when the parent process does.",
        key="exit-with-parent",
    ),
    # Messages.
    Setting("name", ("--name",), "Name of this server, for its messages.", metavar="NAME", key="name"),
    Setting(
        "log",
        ("--log",),
        "Where errors go: stderr, syslog, null or an absolute path.",
        metavar="SINK",
        parse=log.check_sink,
        key="log",
    ),
    Setting(
        "log_format",
        ("--log-format",),
        "How messages are written: text or json.",
        metavar="FORMAT",
        parse=choice(*log.FORMATS),
        key="log-format",
    ),
    Setting("verbose", ("-v", "--verbose"), "Debug messages on standard error.", key="verbose"),
    Setting(
        "debug",
        ("-D", "--debug"),
        "Set a debug flag of a plugin, a filter or the server (nbdkitpy).",
        metavar="NAME.FLAG=N",
        parse=parse_debug_flag,
        key="debug",
        kinds=(list,),
        many=True,
    ),
)


def server_config(
    values: Mapping[str, Any],
    plugin: str,
    *,
    filters: Sequence[str] = (),
    parameters: tuple[Assignment, ...] = (),
    tables: Sequence[UnitTable] = (),
    listen: Sequence[Endpoint] = (),
    fds: Sequence[int] = (),
    file: Document | None = None,
    by_command_line: Iterable[str] = (),
) -> ServerConfig:
    """Make the whole configuration.

    Args:
        values: Parsed settings by name, as far as they are given.
        plugin: Its name.
        filters: Their names, outermost first.
        parameters: Of the command line.
        tables: Of the file, as in :class:`ServerConfig`.
        listen: What the file has us listen on.
        fds: Sockets from a service manager. Nothing else is listened on.
        file: What was read.
        by_command_line: Names of those values that the command line gives.

    Raises:
        ConfigError: settings that exclude each other.
    """
    if values.get("single") and values.get("workers"):
        raise ConfigError("--workers: with -s there is one client, which one process serves; leave one of them out")
    for other in _NOT_RELOADED:
        if values.get("reload") and values.get(other):
            raise ConfigError(f"--reload is for development, and cannot be had with --{other}; leave one of them out")
    own_terminal = any(values.get(name) for name in ("foreground", "run", "single", "exit_with_parent", "reload"))
    return ServerConfig(
        plugin,
        filters=tuple(filters),
        parameters=parameters,
        tables=tuple(tables),
        server=ServerOptions(endpoints=endpoints(values, listen, fds), **_of(ServerOptions, values)),
        background=not (own_terminal or fds),
        file=file,
        by_command_line=frozenset(by_command_line),
        **_of(ServerConfig, values),
    )


def _of(cls: type[ServerConfig] | type[ServerOptions], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are fields of `cls`."""
    return {name: value for name, value in values.items() if name in cls._fields}


def endpoints(
    values: Mapping[str, Any], listen: Sequence[Endpoint] = (), fds: Sequence[int] = ()
) -> tuple[Endpoint, ...]:
    """Return what is to be listened on; arguments as those of :func:`server_config`.

    A place that the command line chooses stands for all of the file's; ``-4`` and ``-6`` choose none. Sockets of a
    service manager, and ``-s``, stand for all others.
    """
    if fds:
        return tuple(Endpoint(fd=fd) for fd in fds)
    if values.get("single"):
        return ()
    family = values.get("address_family", AddressFamily.ANY)
    if listen and not {"address", "port", "unix", "vsock"} & values.keys():
        return tuple(_restricted(endpoint, family) for endpoint in listen)
    port = {"port": values["port"]} if "port" in values else {}
    if "vsock" in values:
        return (Endpoint(Transport.VSOCK, **port),)
    address = values.get("address")
    if "unix" in values or ("run" in values and not port and address is None):
        path = values.get("unix", "-")
        return (Endpoint(Transport.UNIX, unix_path=None if path == "-" else path),)
    return (Endpoint(Transport.TCP, address, family, **port),)


def _restricted(endpoint: Endpoint, family: AddressFamily) -> Endpoint:
    if family is AddressFamily.ANY or endpoint.transport is not Transport.TCP:
        return endpoint
    return endpoint._replace(address_family=family)


def value_in(config: ServerConfig, setting: Setting) -> object:
    """Return the value that `setting` has in `config`; None if none. For settings of the file's table [server]."""
    if setting.name == "foreground":
        return not config.background
    holder = config if hasattr(config, setting.name) else config.server
    value: object = getattr(holder, setting.name)
    return value
