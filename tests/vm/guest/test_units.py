"""The units that come with nbdkitpy, as the wheel brings them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm.guest.harness import MIB, Unit, open_export, run

CONFIGURATIONS = Path("/etc/nbdkitpy")

#: Makes /etc/nbdkitpy/NAME.toml of a text, starts the socket of the unit, and returns the unit.
Deploy = Callable[[str, str, str], Unit]


@pytest.fixture
def deploy() -> Iterator[Deploy]:
    deployed: list[Unit] = []

    def start(unit: str, name: str, configuration: str) -> Unit:
        CONFIGURATIONS.mkdir(exist_ok=True)
        (CONFIGURATIONS / f"{name}.toml").write_text(configuration)
        deployed.append(Unit(unit))
        deployed[-1]("start", kind="socket")
        return deployed[-1]

    yield start
    for unit in deployed:
        run("systemctl", "stop", f"{unit.name}.socket", f"{unit.name}.service")


def facts(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_simple_service_is_served_on_this_machine(deploy: Deploy, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    unit = deploy("nbdkitpy", "nbdkitpy", f'[plugin]\nname = "file"\nfile = "{disk}"\n')

    for number, host in enumerate(["127.0.0.1", "[::1]"]):
        client = open_export(f"nbd://{host}")
        client.pwrite(b"x" * 512, 512 * number)
        client.flush()
        client.shutdown()

    assert disk.read_bytes()[:1536] == b"x" * 1024 + bytes(512)
    unit("stop")
    assert unit.show("Result") == "success"


@pytest.fixture
def disk() -> Path:
    directory = Path("/var/lib/nbdkitpy/disk")
    directory.mkdir(parents=True, exist_ok=True)
    disk = directory / "disk.img"
    disk.write_bytes(bytes(MIB))
    return disk


TEMPLATE = """
[[filter]]
name = "limit"
limit = {limit}

[plugin]
name = "file"
file = "/var/lib/nbdkitpy/disk/disk.img"
"""

URI = "nbd+unix:///?socket=/run/nbdkitpy/disk.sock"


def test_P9_hardened_service_serves_its_disk_and_may_do_nothing_else(deploy: Deploy, disk: Path) -> None:
    unit = deploy("nbdkitpy@disk", "disk", TEMPLATE.format(limit=2))

    client = open_export(URI)
    client.pwrite(b"x" * 512, 512)
    client.flush()
    status = facts(unit.pid)
    client.shutdown()

    assert disk.read_bytes()[:1024] == bytes(512) + b"x" * 512
    assert "0" not in status["Uid"].split()
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert {int(value, 16) for key, value in status.items() if key.startswith("Cap")} == {0}
    run("systemctl", "stop", "nbdkitpy@disk.socket", "nbdkitpy@disk.service")
    assert unit.show("Result") == "success"
    assert not Path("/run/nbdkitpy/disk.sock").exists()


def test_hardened_service_is_reloaded(deploy: Deploy, disk: Path) -> None:
    unit = deploy("nbdkitpy@disk", "disk", TEMPLATE.format(limit=2))
    client = open_export(URI)
    first = unit.pid
    (CONFIGURATIONS / "disk.toml").write_text(TEMPLATE.format(limit=3))

    unit("reload")

    assert re.search(r"\b3\b", unit.wait_for_message("limit"))
    unit.wait_for("ActiveState", "active".__eq__)
    others = [open_export(URI) for _ in range(2)]
    assert unit.pid == first
    for each in (client, *others):
        each.shutdown()


def test_hardened_service_finds_its_credentials(deploy: Deploy) -> None:
    (secret := Path("/etc/nbdkitpy-size")).write_text("2M")
    secret.chmod(0o600)
    more = Path("/run/systemd/system/nbdkitpy@disk.service.d/credential.conf")
    more.parent.mkdir()
    more.write_text(f"[Service]\nLoadCredential=size:{secret}\n")
    run("systemctl", "daemon-reload")
    deploy("nbdkitpy@disk", "disk", '[plugin]\nname = "memory"\nsize = { credential = "size" }\n')

    client = open_export(URI)

    assert client.get_size() == 2 * MIB
    client.shutdown()
    more.unlink()
    more.parent.rmdir()
    run("systemctl", "daemon-reload")
