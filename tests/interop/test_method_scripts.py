"""Scripts of the plugins sh and eval under us and under the real nbdkit, with the same results; and in real runs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.environment import NBDKITPY
from tests.interop.harness import MIB, Servers, Tool, run
from tests.interop.sidebyside import IMAGE, Request, SideBySide, random_requests

pytestmark = pytest.mark.interop

#: A disk that is a file, and can do everything.
SCRIPT = r"""#!/bin/sh
f=$tmpdir/disk
case "$1" in
    load) truncate -s 256K $f ;;
    config) [ "$2" = size ] || { echo "EINVAL no such key" >&2; exit 1; }; truncate -s "$3" $f ;;
    thread_model) echo parallel ;;
    list_exports) echo INTERLEAVED; echo one; echo the first; echo two; echo the second ;;
    default_export) echo one ;;
    open) [ "$3" = one ] || { echo "ENOENT there is no $3" >&2; exit 1; }; mktemp -d $tmpdir/handle-XXXXXX ;;
    close) rm -r "$2" ;;
    get_size) [ -d "$2" ] && stat -c %s $f ;;
    block_size) echo 1 4K 1M ;;
    export_description) echo a disk ;;
    can_write|can_flush|can_trim|can_zero|can_extents|can_multi_conn|is_rotational) exit 0 ;;
    can_cache) echo native ;;
    pread) dd if=$f skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none ;;
    pwrite) dd of=$f seek=$4 conv=notrunc oflag=seek_bytes status=none ;;
    flush|cache) exit 0 ;;
    trim) fallocate -p -o $4 -l $3 $f ;;
    zero) case ",$5," in *,may_trim,*) fallocate -p -o $4 -l $3 $f ;; *) echo ENOTSUP >&2; exit 1 ;; esac ;;
    extents) if [ $4 -lt 65536 ]; then echo 0 64K; echo 64K 192K hole,zero; else echo "$4 1M"; fi ;;
    *) exit 2 ;;
esac
"""

#: The same as little as it can be: everything that is not given has to be found out or made up for.
EVAL = (
    "config=truncate -s $3 $tmpdir/disk",
    "get_size=stat -Lc %s $tmpdir/disk",
    "pread=dd if=$tmpdir/disk skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
    "pwrite=dd of=$tmpdir/disk seek=$4 conv=notrunc oflag=seek_bytes status=none",
    "flush=:",
    "size=256K",
)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    return path


def test_script_that_can_do_everything(side_by_side: SideBySide, script: Path) -> None:
    requests = random_requests(1, MIB // 4, 80, longest=64 << 10)

    outcome = side_by_side.compare("sh", IMAGE, "size=256K", requests=requests, image=script)

    assert outcome is not None
    assert outcome["facts"]["size"] == MIB // 4


@pytest.mark.parametrize(
    "removed",
    [
        "can_write|",
        "can_flush|",
        "can_zero|",
        "can_trim|",
        "can_extents|",
        "can_cache) echo native ;;",
        "block_size) echo 1 4K 1M ;;",
        "default_export) echo one ;;",
        "open)",
    ],
)
def test_script_that_lacks_a_method(side_by_side: SideBySide, script: Path, removed: str) -> None:
    text = SCRIPT.replace('get_size) [ -d "$2" ] && stat', "get_size) stat").replace('close) rm -r "$2" ;;', "")
    script.write_text(text.replace(removed, "no_open)" if removed == "open)" else ""))
    requests = random_requests(2, MIB // 4, 25, longest=64 << 10)

    side_by_side.compare("sh", IMAGE, requests=requests, image=script)


def test_scripts_on_the_command_line(side_by_side: SideBySide) -> None:
    requests = random_requests(3, MIB // 4, 80, longest=64 << 10)

    outcome = side_by_side.compare("eval", *EVAL, requests=requests)

    assert outcome is not None
    assert outcome["facts"]["fua"]


def test_errors_of_scripts(side_by_side: SideBySide) -> None:
    names = ["EPERM", "enomem no room", "EINVAL", "ENOSPC", "ESHUTDOWN", "EOVERFLOW", "nothing", ""]
    cases = " ".join(f"{i}) echo '{name}' >&2; exit 1;;" for i, name in enumerate(names))
    pread = f"case $(($4 / 512)) in {cases} 8) exit 3;; 9) exit 2;; 10) exit 77;; 11) echo short;; *) kill -9 $$;; esac"
    requests = [Request("pread", 512, 512 * i) for i in range(13)]

    outcome = side_by_side.compare("eval", "get_size=echo 8K", f"pread={pread}", requests=requests)

    assert outcome is not None
    expected = ["EPERM", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN", "EOVERFLOW", *["EIO"] * 7]
    # In a read over structured replies there is EOVERFLOW, which is EINVAL otherwise.
    assert [answer.replace("EOVERFLOW", "EINVAL") for answer in outcome["answers"]] == [
        name.replace("EOVERFLOW", "EINVAL") for name in expected
    ]


# --- real runs ---


def test_script_on_standard_input() -> None:
    words = [*NBDKITPY, "-U", "-", "sh", "-", "--run", 'nbdinfo --size "$uri"']
    text = 'case "$1" in get_size) echo 3M ;; pread) head -c $3 /dev/zero ;; *) exit 2 ;; esac'

    assert run(words, text=text) == f"{3 * MIB}\n"


def test_magic_key_of_a_script_is_that_of_bare_words(script: Path) -> None:
    script.write_text(SCRIPT.replace("thread_model)", "magic_config_key) echo size ;; thread_model)"))

    output = run([*NBDKITPY, "-U", "-", "sh", str(script), "512K", "--run", 'nbdinfo --size "$uri"'])

    assert output == f"{MIB // 2}\n"


def test_directory_is_gone_when_the_server_has_ended(serve: Servers, nbdinfo: Tool, tmp_path: Path) -> None:
    directory = tmp_path / "temporary"
    directory.mkdir()
    server = serve("eval", *EVAL, env={"TMPDIR": str(directory)})
    nbdinfo("--size", server.uri)
    during = [path.name for path in directory.iterdir() if path.name.startswith("nbdkitpy-")]

    server.end()

    assert len(during) == 1
    assert not any(path.name.startswith("nbdkitpy-") for path in directory.iterdir())


def test_server_in_the_background_keeps_the_directory_until_its_end(tmp_path: Path, nbdinfo: Tool) -> None:
    directory, socket, pidfile = tmp_path / "temporary", tmp_path / "socket", tmp_path / "pid"
    directory.mkdir()

    run([*NBDKITPY, "-U", str(socket), "-P", str(pidfile), "eval", *EVAL], env={"TMPDIR": str(directory)})
    try:
        size = nbdinfo("--size", f"nbd+unix:///?socket={socket}")
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)

    assert size == f"{MIB // 4}\n"


def test_errors_of_methods_end_the_start(script: Path) -> None:
    done = subprocess.run([*NBDKITPY, "sh", script, "color=red"], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "nbdkitpy: error: sh: config: no such key\n"


def test_methods_may_stand_in_a_configuration_file(tmp_path: Path, serve: Servers, nbdinfo: Tool) -> None:
    config = tmp_path / "disk.toml"
    config.write_text('[plugin]\nname = "eval"\nget_size = "echo 2M"\npread = "head -c $3 /dev/zero"\n')

    server = serve("--config", config)

    assert nbdinfo("--size", server.uri) == f"{2 * MIB}\n"
