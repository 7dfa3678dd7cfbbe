"""libnbd's Python binding against the server: every command, pipelining, negotiation, names, connections."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.harness import MIB, Servers, empty_image, run_script, sparse_image

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("libnbd")]

#: Ways of talking: options of the server, whether libnbd asks for structured replies, and what comes of it.
STYLES = {
    "structured": ([], True, ("newstyle-fixed", True, True)),
    "simple by the client's choice": ([], False, ("newstyle-fixed", False, False)),
    "--no-sr": (["--no-sr"], True, ("newstyle-fixed", False, False)),
    "--no-mc": (["--no-mc"], True, ("newstyle-fixed", True, False)),
    "no zeroes masked": (["--mask-handshake=1"], True, ("newstyle-fixed", True, True)),
    "fixed masked": (["--mask-handshake=2"], True, ("newstyle", False, False)),
    "everything masked": (["--mask-handshake=0"], True, ("newstyle", False, False)),
    "--oldstyle": (["--oldstyle"], True, ("oldstyle", False, False)),
}

#: Everything that a file's name may be, and that may be mistaken for something else on the way.
ODD_NAMES = (
    "plain",
    " ",
    " leading and trailing ",
    "-U",
    "--",
    ".hidden",
    "...",
    "percent%20sign",
    "a+b",
    "a?b=c",
    "a#b",
    "a&b;c",
    'quo"te',
    "apo'strophe",
    "back\\slash",
    "$HOME`id`",
    "new\nline",
    "tab\tstop",
    "\x01\x1b[31m\x7f",
    "[brackets]",
    "a:b@c",
    "naïve",
    "cafe\u0301",
    "日本語",
    "\U0001f4be disk",
    "\u202eright to left",
    "\N{ZERO WIDTH SPACE}",
    "x" * 255,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return empty_image(tmp_path / "disk.img", 33 * MIB + 512)


@pytest.mark.parametrize("style", STYLES)
def test_every_command_works_on_a_disk_in_memory(serve: Servers, style: str) -> None:
    options, asks, (protocol, structured, context) = STYLES[style]
    server = serve(*options, "memory", "16M")

    facts = run_script("commands.py", server.uri, int(asks), 1)

    assert (facts["protocol"], facts["structured"], facts["context"]) == (protocol, structured, context)
    assert facts["can_df"] == structured
    assert facts["size"] == 16 * MIB
    assert all(facts[each] for each in ("can_cache", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"))


@pytest.mark.parametrize("style", ["structured", "--no-sr", "--oldstyle"])
@pytest.mark.parametrize(
    "filters", [[], ["--filter=exitlast", "--filter=ip", "--filter=limit"]], ids=["alone", "filters"]
)
def test_every_command_works_on_a_file(serve: Servers, image: Path, style: str, filters: list[str]) -> None:
    options, asks, (protocol, structured, context) = STYLES[style]
    server = serve(*options, *filters, "file", image)

    facts = run_script("commands.py", server.uri, int(asks), 1)

    assert (facts["protocol"], facts["structured"], facts["context"]) == (protocol, structured, context)
    assert facts["size"] == image.stat().st_size
    assert not facts["read_only"]
    if filters:
        assert server.wait() == []  # exitlast


def test_every_command_works_with_one_thread(serve: Servers, image: Path) -> None:
    server = serve("-t", "1", "file", image, "cache=none")

    assert run_script("commands.py", server.uri, 1, 1)["structured"]


def test_every_command_works_over_tcp(serve: Servers, image: Path) -> None:
    server = serve.tcp("file", image)

    assert run_script("commands.py", server.uri, 1, 1)["structured"]


def test_a_read_only_export_offers_nothing_that_writes(serve: Servers, image: Path) -> None:
    server = serve("-r", "file", image)

    facts = run_script("commands.py", server.uri, 1, 1)

    assert facts["read_only"]
    assert not any(facts[each] for each in ("can_trim", "can_zero", "can_fast_zero", "can_fua"))


@pytest.mark.parametrize("words", [["memory", "64M"], ["file"], ["-t", "1", "file"], ["--no-sr", "file"]], ids=" ".join)
def test_64_requests_in_flight_are_all_answered_rightly(serve: Servers, image: Path, words: list[str]) -> None:
    server = serve(*words, *([image] if words[-1] == "file" else []))

    run_script("pipeline.py", server.uri, 1500)


def test_64_requests_in_flight_pass_through_filters(serve: Servers, image: Path) -> None:
    server = serve("--filter=limit", "--filter=ip", "--filter=exitlast", "file", image, "allow=all", "limit=1")

    run_script("pipeline.py", server.uri, 1500)

    assert server.wait() == []


def test_wrong_requests_get_the_errors_of_the_specification(serve: Servers) -> None:
    server = serve("memory", "1M")

    found = run_script("refusals.py", server.uri)

    no_space = {"write at the end", "write across the end", "write of nothing", "zero across the end"}
    assert found == {name: "ENOSPC" if name in no_space else "EINVAL" for name in found}
    assert len(server.end()) == 11  # ten refused requests, and that the rest is not logged


def test_writing_to_a_read_only_export_is_not_permitted(serve: Servers, image: Path) -> None:
    server = serve("-r", "file", image)

    found = run_script("refusals.py", server.uri)

    writes = {name: error for name, error in found.items() if name.startswith(("write", "trim", "zero"))}
    assert set(writes.values()) == {"EPERM"}
    assert not any(image.read_bytes())
    server.end()


def test_options_may_ask_about_many_exports_before_one_is_opened(serve: Servers, tmp_path: Path) -> None:
    names = ["first", "second", "third disk"]
    directory = tmp_path / "exports"
    directory.mkdir()
    for name in names:
        (directory / name).write_text(name)
    server = serve("file", f"dir={directory}")

    found = run_script("options.py", server.uri, *names)

    assert sorted(found["listed"]) == sorted(names)
    assert found["contexts"] == ["base:allocation"]
    assert found["sizes"] == {name: len(name) for name in names}
    assert found["canonical"] == {name: name for name in names}
    assert found["content"] == names[-1]
    lines = server.end()
    assert len(lines) == 2 * len(names)  # one for each export that was not there
    assert all("cannot open export" in line for line in lines)


@pytest.fixture(scope="module")
def odd_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("odd")
    for name in ODD_NAMES:
        (directory / name).write_text(name)
    return directory


def test_all_names_of_files_are_listed_and_opened(serve: Servers, odd_directory: Path) -> None:
    server = serve("file", f"dir={odd_directory}")

    found = run_script("names.py", server.uri, *ODD_NAMES)

    assert sorted(found["listed"]) == sorted(ODD_NAMES)
    assert found["contents"] == {name: name for name in ODD_NAMES}


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if not set("%?#\\ ").isdisjoint(name)] + ["日本語", "-U"])
def test_uris_lead_to_exports_of_odd_names(serve: Servers, odd_directory: Path, name: str) -> None:
    server = serve("-e", name, "file", f"dir={odd_directory}")

    assert run_script("content.py", server.uri) == name


def test_F1_names_that_lead_out_of_the_directory_are_refused(serve: Servers, tmp_path: Path) -> None:
    directory = tmp_path / "exports"
    (directory / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (directory / "link").symlink_to("../secret")
    (directory / "sub" / "deep").write_text("deep")
    names = ["../secret", "..", ".", "", "/", "sub", "sub/deep", "link", str(tmp_path / "secret"), "absent"]
    server = serve("file", f"dir={directory}")

    found = run_script("names.py", server.uri, *names)

    assert found == {"listed": [], "contents": dict.fromkeys(names)}
    assert len(server.end()) == len(names)


def test_connections_to_one_export_see_what_is_flushed(serve: Servers, image: Path) -> None:
    for words in (["memory", "1M"], ["file", str(image)]):
        run_script("multi_conn.py", serve(*words).uri)


def test_a_sparse_file_is_read_by_chunks_of_data_and_holes(serve: Servers, tmp_path: Path) -> None:
    image = sparse_image(tmp_path / "disk.img", 8 * MIB, {0: MIB, 4 * MIB: MIB})
    server = serve("file", image)

    found = run_script("chunks.py", server.uri)

    assert found["chunks"] == [
        [0, "data", MIB],
        [MIB, "hole", 3 * MIB],
        [4 * MIB, "data", MIB],
        [5 * MIB, "hole", 3 * MIB],
    ]
    assert found["chunks without fragments"] == [[0, "data", 8 * MIB]]
