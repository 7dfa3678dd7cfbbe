"""Every filter that comes with nbdkitpy keeps what every filter has to."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from nbdkitpy.testing import FilterConformance
from tests.partitions import LINUX, Entry, mbr_disk


class TestBlocksize(FilterConformance):
    filter = "blocksize"
    parameters = {"minblock": 4096, "maxdata": "64k", "maxlen": "1M"}


class TestCow(FilterConformance):
    filter = "cow"
    passes_writes = False


class TestDelay(FilterConformance):
    filter = "delay"
    parameters = {"rdelay": "10us", "wdelay": "10us"}


class TestError(FilterConformance):
    filter = "error"
    parameters = {"error-rate": 0}


class TestExitLast(FilterConformance):
    filter = "exitlast"
    ends_with_last_client = True


class TestFua(FilterConformance):
    filter = "fua"


class TestFuaEmulated(FilterConformance):
    filter = "fua"
    parameters = {"fua-mode": "emulate"}
    unfit = {"plain": "fua: fua-mode=emulate needs what can flush behind it"}


class TestFuaForced(FilterConformance):
    filter = "fua"
    parameters = {"fua-mode": "force"}
    unfit = {
        "plain": "fua: fua-mode=force needs what can do FUA behind it",
        "without-flags": "fua: fua-mode=force needs what can do FUA behind it",
    }


class TestIp(FilterConformance):
    filter = "ip"
    parameters = {"allow": "any", "deny": "all"}


class TestLimit(FilterConformance):
    filter = "limit"
    parameters = {"limit": 8}


class TestLog(FilterConformance):
    filter = "log"

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.parameters = {"logfile": tmp_path / "log"}


class TestNoExtents(FilterConformance):
    filter = "noextents"


class TestNoParallel(FilterConformance):
    filter = "noparallel"
    parameters = {"serialize": "connections"}


class TestNoZero(FilterConformance):
    filter = "nozero"


class TestOffset(FilterConformance):
    filter = "offset"
    parameters = {"offset": 4096, "range": "640k"}


class TestPartition(FilterConformance):
    filter = "partition"
    parameters = {"partition": 1, "partition-sectorsize": 512}

    def content(self) -> bytes:
        disk = mbr_disk(2048, {0: [Entry(LINUX, 64, 1024)]})
        disk[64 * 512 : 512 * 512] = super().content()[: 448 * 512]
        return bytes(disk)


class TestRate(FilterConformance):
    filter = "rate"
    parameters = {"rate": "100G"}


class TestReadOnly(FilterConformance):
    filter = "readonly"


class TestRetry(FilterConformance):
    filter = "retry"
    parameters = {"retries": 0}


class TestTlsFallback(FilterConformance):
    filter = "tls-fallback"
    unfit = {"serialize-connections": "tls-fallback: disk serves one connection at a time, which excludes this filter"}

    @pytest.fixture(autouse=True)
    def _tls(self, certificates: Path) -> None:
        self.options = {"tls": "on", "tls_certificates": certificates}
        self.tls = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
