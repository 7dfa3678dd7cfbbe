"""Every plugin that comes with nbdkitpy keeps what every plugin has to."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdkitpy.testing import PluginConformance

RAMDISK = """
API_VERSION = 2
import nbdkit

disk = bytearray(1 << 20)

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def open(readonly):
    return 1

def get_size(handle):
    return len(disk)

def pread(handle, buffer, offset, flags):
    buffer[:] = disk[offset:offset + len(buffer)]

def pwrite(handle, buffer, offset, flags):
    disk[offset:offset + len(buffer)] = buffer

def zero(handle, count, offset, flags):
    disk[offset:offset + count] = bytes(count)

def flush(handle, flags):
    pass
"""

#: Methods of a disk in a file, as shell scripts; FILE is its name.
METHODS = {
    "get_size": "stat -Lc %s FILE",
    "pread": "dd if=FILE skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
    "pwrite": "dd of=FILE seek=$4 conv=notrunc oflag=seek_bytes status=none",
    "flush": "sync FILE",
    "can_multi_conn": "exit 0",
}


class TestMemory(PluginConformance):
    plugin = "memory"
    parameters = {"size": "1M"}


class TestLargeMemory(PluginConformance):
    plugin = "memory"
    parameters = {"size": "1T"}


class TestNull(PluginConformance):
    plugin = "null"
    parameters = {"size": "1M"}
    keeps_data = False


class TestExample1(PluginConformance):
    plugin = "example1"


class TestFile(PluginConformance):
    plugin = "file"

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(range(256)) * 2048 + bytes(1 << 20))
        self.parameters = {"file": path}


class TestFilesOfADirectory(PluginConformance):
    plugin = "file"
    export_name = "one"

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / name).write_bytes(bytes(range(256)) * 2048)
        self.parameters = {"dir": tmp_path}


class TestPython(PluginConformance):
    plugin = "python"

    @pytest.fixture(autouse=True)
    def _script(self, tmp_path: Path) -> None:
        script = tmp_path / "ramdisk.py"
        script.write_text(RAMDISK)
        self.parameters = {"script": script}


class TestSh(PluginConformance):
    plugin = "sh"

    @pytest.fixture(autouse=True)
    def _script(self, tmp_path: Path) -> None:
        script = tmp_path / "disk.sh"
        cases = "\n".join(f"{name}) {method};;" for name, method in METHODS.items())
        text = f'#!/bin/sh\ncase "$1" in\n{cases}\ncan_write) exit 0;;\ncan_flush) exit 0;;\n*) exit 2;;\nesac\n'
        script.write_text(text.replace("FILE", f"{tmp_path}/disk"))
        script.chmod(0o755)
        (tmp_path / "disk").write_bytes(bytes(range(256)) * 2048)
        self.parameters = {"script": script}


class TestEval(PluginConformance):
    plugin = "eval"

    @pytest.fixture(autouse=True)
    def _methods(self, tmp_path: Path) -> None:
        (tmp_path / "disk").write_bytes(bytes(range(256)) * 2048)
        self.parameters = {name: method.replace("FILE", f"{tmp_path}/disk") for name, method in METHODS.items()}
