"""nbd-client, as far as it needs no kernel module: it lists exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.harness import Servers, Tool

pytestmark = pytest.mark.interop


def test_nbd_client_lists_the_files_of_a_directory(serve: Servers, nbd_client: Tool, tmp_path: Path) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    for name in ("a.img", "b c.img"):
        (directory / name).touch()
    server = serve.tcp("file", f"dir={directory}")

    output = nbd_client("-l", "127.0.0.1", str(server.port))

    assert {"a.img", "b c.img"} <= {line.strip() for line in output.splitlines()}


def test_nbd_client_lists_a_default_export(serve: Servers, nbd_client: Tool) -> None:
    server = serve.tcp("--filter=exitlast", "memory", "1M")

    nbd_client("-l", "127.0.0.1", str(server.port))

    assert server.is_running


def test_nbd_client_lists_over_a_unix_socket(serve: Servers, nbd_client: Tool, tmp_path: Path) -> None:
    (tmp_path / "a.img").touch()
    server = serve("file", f"dir={tmp_path}")

    output = nbd_client("-l", "-unix", server.unix_path)

    assert "a.img" in {line.strip() for line in output.splitlines()}
