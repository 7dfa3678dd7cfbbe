"""TLS with real clients: libnbd's and qemu's, both of which use GnuTLS."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.certificates import CLIENT_USE, Authority, make_psk_file
from tests.environment import NBDKITPY
from tests.interop.harness import MIB, PATIENCE, Servers, Tool, full_image, make_distribution, sha256
from tests.nbdclient import NbdClient

pytestmark = pytest.mark.interop

#: Slow enough that requests are given to workers, which send their replies while the next requests come in.
SLOW_PLUGIN = """
import time
from nbdkitpy import Handle, Parameter, Plugin, ThreadModel, hookimpl, parse_size

class SlowHandle(Handle):
    def __init__(self, disk):
        self.disk = disk

    def get_size(self):
        return len(self.disk)

    def can_multi_conn(self):
        return True

    def pread(self, count, offset):
        time.sleep(0.002)
        return bytes(self.disk[offset : offset + count])

    def pwrite(self, data, offset, flags):
        time.sleep(0.002)
        self.disk[offset : offset + len(data)] = data

    def flush(self):
        pass

class Slow(Plugin):
    name = "slow"
    size = Parameter(parse_size, required=True, magic=True)

    def thread_model(self):
        return ThreadModel.PARALLEL

    def get_ready(self):
        self.disk = bytearray(self.size)

    def open(self, export_name, readonly, client):
        return SlowHandle(self.disk)

@hookimpl
def register_plugins(register):
    register(Slow)
"""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file of pre-shared keys, in a directory of its own, as qemu wants it."""
    path = tmp_path / "psk" / "keys.psk"
    path.parent.mkdir()
    make_psk_file(path, "alice")
    return path


def with_user(uri: str, user: str) -> str:
    return uri.replace("://", f"://{user}@", 1).replace("@?", "@/?")


# --- libnbd ---


def test_nbdinfo_by_certificates(serve: Servers, nbdinfo: Tool, certificates: Path) -> None:
    server = serve("--tls=require", "--tls-certificates", certificates, "--tls-verify-peer", "memory", "1M")

    found = nbdinfo.json("--json", server.uri)

    assert server.uri.startswith("nbds+unix://?socket=")
    assert server.uri.endswith(f"&tls-certificates={certificates}")
    assert (found["protocol"], found["TLS"], found["structured"]) == ("newstyle-fixed", True, True)


def test_nbdinfo_by_certificates_over_tcp(serve: Servers, nbdinfo: Tool, certificates: Path) -> None:
    server = serve.tcp("--tls=require", "--tls-certificates", certificates, "memory", "1M")

    assert nbdinfo("--size", server.uri).strip() == str(MIB)


def test_nbdinfo_by_pre_shared_keys(serve: Servers, nbdinfo: Tool, keys: Path) -> None:
    server = serve("--tls=require", "--tls-psk", keys, "memory", "1M")

    found = nbdinfo.json("--json", with_user(server.uri, "alice"))

    assert found["TLS"]


@pytest.mark.parametrize("uri", ["nbd", "nbds"])
def test_tls_on_serves_both_ways(serve: Servers, nbdinfo: Tool, certificates: Path, uri: str) -> None:
    server = serve("--tls=on", "--tls-certificates", certificates, "memory", "1M")
    given = f"{uri}+unix:///?socket={server.unix_path}&tls-certificates={certificates}"

    assert nbdinfo.json("--json", given)["TLS"] is (uri == "nbds")


def test_tls_require_does_not_serve_without(serve: Servers, nbdinfo: Tool, certificates: Path) -> None:
    server = serve("--tls=require", "--tls-certificates", certificates, "memory", "1M")

    nbdinfo(f"nbd+unix:///?socket={server.unix_path}", status=1)

    assert any("requires TLS" in line for line in server.end())


def test_user_without_a_key_is_refused(serve: Servers, nbdinfo: Tool, keys: Path, tmp_path: Path) -> None:
    server = serve("--tls=require", "--tls-psk", keys, "memory", "1M")
    make_psk_file(tmp_path / "others.psk", "alice", "bob")
    elsewhere = server.uri.replace(str(keys), str(tmp_path / "others.psk"))

    for user in ("alice", "bob"):
        nbdinfo(with_user(elsewhere, user), status=1)

    lines = server.end()
    assert sum("TLS handshake failed" in line for line in lines) == 2
    assert sum('there is no user "bob"' in line for line in lines) == 1


def test_ip_rules_by_the_name_in_a_certificate(
    serve: Servers, nbdinfo: Tool, certificates: Path, authority: Authority, tmp_path: Path
) -> None:
    options = ["--tls=require", "--tls-verify-peer", "--tls-certificates", str(certificates), "--filter=ip"]
    server = serve(*options, "memory", "1M", "allow=dn:CN=client,O=Big Co", "deny=all")
    other = Path(shutil.copytree(certificates, tmp_path / "tls"))
    authority.issue(other / "client-cert.pem", other / "client-key.pem", "/O=Big Co/CN=other", CLIENT_USE)

    assert nbdinfo("--size", server.uri).strip() == str(MIB)
    nbdinfo("--size", server.uri.replace(str(certificates), str(other)), status=1)

    assert "client not permitted to connect" in "\n".join(server.end())


def test_fallback_without_tls_and_the_disk_with(
    serve: Servers, nbdinfo: Tool, nbdcopy: Tool, certificates: Path
) -> None:
    server = serve("--tls=on", "--tls-certificates", certificates, "--filter=tls-fallback", "memory", "1M")
    place = f"?socket={server.unix_path}&tls-certificates={certificates}"

    assert "requires TLS authentication" in nbdcopy(f"nbd+unix:///{place}", "-")
    assert nbdinfo("--size", f"nbds+unix:///{place}").strip() == str(MIB)


@pytest.mark.parametrize("kind", ["certificates", "keys"])
@pytest.mark.parametrize("plugin", ["file", "slow"])
def test_nbdcopy_there_and_back_with_many_requests_at_once(
    serve: Servers, nbdcopy: Tool, certificates: Path, keys: Path, tmp_path: Path, kind: str, plugin: str
) -> None:
    size = 24 * MIB
    make_distribution(tmp_path, "slow", plugins=SLOW_PLUGIN)
    source, back = full_image(tmp_path / "source", size), tmp_path / "back"
    (tmp_path / "disk").write_bytes(bytes(size))
    tls = ["--tls-certificates", str(certificates)] if kind == "certificates" else ["--tls-psk", str(keys)]
    served = ["file", str(tmp_path / "disk")] if plugin == "file" else ["slow", str(size)]
    server = serve("--tls=require", *tls, *served, env={"PYTHONPATH": str(tmp_path)})
    uri = server.uri if kind == "certificates" else with_user(server.uri, "alice")

    nbdcopy("--request-size=65536", "--connections=4", "--requests=16", source, uri)
    nbdcopy("--request-size=262144", "--connections=4", "--requests=16", uri, back)

    assert sha256(back) == sha256(source)


# --- qemu ---


def test_qemu_img_by_certificates(serve: Servers, qemu_img: Tool, certificates: Path, tmp_path: Path) -> None:
    source = full_image(tmp_path / "source", 8 * MIB)
    server = serve.tcp("--tls=require", "--tls-certificates", certificates, "--tls-verify-peer", "file", source)
    credentials = f"tls-creds-x509,id=tls0,dir={certificates},endpoint=client"
    disk = f"driver=nbd,host=localhost,port={server.port},tls-creds=tls0"

    qemu_img("convert", "--object", credentials, "--image-opts", disk, "-O", "raw", tmp_path / "copy")

    assert sha256(tmp_path / "copy") == sha256(source)


def test_qemu_img_by_pre_shared_keys(serve: Servers, qemu_img: Tool, keys: Path) -> None:
    server = serve.tcp("--tls=require", "--tls-psk", keys, "memory", "1M")
    credentials = f"tls-creds-psk,id=tls0,dir={keys.parent},username=alice,endpoint=client"
    disk = f"driver=nbd,host=localhost,port={server.port},tls-creds=tls0"

    printed = qemu_img("info", "--object", credentials, "--image-opts", disk)

    assert "virtual size: 1 MiB" in printed


# --- the command line ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tls=require"], "TLS needs certificates or keys"),
        (["--tls=on", "--tls-certificates", "{empty}"], "{empty}/ca-cert.pem cannot be read"),
        (["--tls-psk", "{empty}"], "{empty} cannot be read: Is a directory"),
        (["-o", "--tls=require", "--tls-certificates", "{good}"], "--tls=require and --oldstyle exclude each other"),
    ],
)
def test_T4_server_that_cannot_do_what_it_is_told_does_not_start(
    tmp_path: Path, certificates: Path, words: list[str], message: str
) -> None:
    places = {"empty": tmp_path, "good": certificates}
    argv = [*NBDKITPY, "-f", "-U", "-", *(word.format(**places) for word in words), "memory", "1M"]

    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False, env={"HOME": "/nowhere"})

    assert done.returncode == 1
    assert message.format(**places) in done.stderr


def test_sighup_reads_certificates_again(serve: Servers, nbdinfo: Tool, certificates: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(certificates, tmp_path / "tls"))
    log = tmp_path / "log"
    server = serve.tcp("--tls=require", "--tls-certificates", directory, "--log", log, "memory", "1M")
    other = Authority(tmp_path / "ca", "Second CA")
    (directory / "ca-cert.pem").write_bytes(other.certificate.read_bytes())
    other.issue(directory / "server-cert.pem", directory / "server-key.pem")
    nbdinfo("--size", server.uri, status=1)

    os.kill(server.pid, signal.SIGHUP)
    while "certificates and keys have been read again" not in log.read_text():
        pass

    assert nbdinfo("--size", server.uri).strip() == str(MIB)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_T10_key_that_only_root_can_read_is_read_before_user_and_directory_change(certificates: Path) -> None:
    words = ["-U", "socket", "-P", "pid", "-u", "65534", "-g", "65534", "--tls=require", "--tls-certificates", "tls"]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.chown(place, 65534, 65534)
        shutil.copytree(certificates, place / "tls")
        (place / "tls" / "server-key.pem").chmod(0o600)

        subprocess.run([*NBDKITPY, *words, "memory", "1M"], cwd=place, timeout=PATIENCE, check=True)
        pid = int((place / "pid").read_text())
        server = os.pidfd_open(pid)
        try:
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert exports_by_tls(place / "socket", place / "tls" / "ca-cert.pem") == [""]
        finally:
            signal.pidfd_send_signal(server, signal.SIGTERM)
            assert select.select([server], [], [], PATIENCE)[0]
            os.close(server)


def exports_by_tls(path: Path, authority: Path) -> list[str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        client = NbdClient(sock)
        client.greet()
        with client.start_tls(ssl.create_default_context(cafile=str(authority))):
            return client.exports()
