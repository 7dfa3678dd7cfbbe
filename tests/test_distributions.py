"""What is installed is found as importlib.metadata finds it."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

from nbdkitpy.distributions import distributions, entry_points, name_and_version

GROUP = "nbdkitpy.plugins"
ENTRY_POINTS = f"[{GROUP}]\ndisk = acme.disk\n"
METADATA = "Metadata-Version: 2.1\nName: Acme.Disk\nVersion: 1.0\n"

Found = tuple[str, str, str, str]


def ours(group: str) -> list[Found]:
    return [
        (name, value, *name_and_version(read_text))
        for read_text in distributions()
        for name, value in entry_points(read_text("entry_points.txt") or "", group)
    ]


def theirs(group: str) -> list[Found]:
    return [
        (entry.name, entry.value, distribution.metadata["Name"], distribution.version)
        for distribution in metadata.distributions()
        for entry in distribution.entry_points
        if entry.group == group
    ]


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / {"entry_points": "entry_points.txt", "pkg_info": "PKG-INFO"}.get(name, name)).write_text(text)
    return directory


def search(monkeypatch: pytest.MonkeyPatch, *path: Path | str) -> None:
    monkeypatch.setattr(sys, "path", [str(entry) for entry in path])


def groups() -> Iterable[str]:
    return sorted({entry.group for found in metadata.distributions() for entry in found.entry_points})


@pytest.mark.parametrize("group", groups())
def test_all_that_is_installed_here_is_found(group: str) -> None:
    assert ours(group) == theirs(group) != []


@pytest.mark.parametrize(
    "text",
    [
        f"\n# comment\n  [{GROUP}]  \n\n disk=acme.disk\n#x = y\n\tother  =  acme:Other [extra] # no\n[x]\ny = z",
        f"[{GROUP}]\r\ndisk = acme\r\n",
        f"stray\n[other]\na = b\n[{GROUP}]\na = c=d\n[third]\ne = f\n[{GROUP}]\ng = h\n",
        f"[{GROUP}.more]\na = b\n",
        f"[[{GROUP}]]\na = b\n",
        "",
    ],
)
def test_entry_points_are_understood_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    write(tmp_path / "acme-1.0.dist-info", METADATA=METADATA, entry_points=text)
    search(monkeypatch, tmp_path)

    assert ours(GROUP) == theirs(GROUP)


@pytest.mark.parametrize(
    "text",
    [
        METADATA,
        "name:Acme\nVERSION:\t2  \nName: Other\n\nName: of the text\nVersion: 9\n",
        "Summary: Name: no\nNickname: no\nName: Acmé\nVersion: 1!2.0+local\n",
        "Name: Acme\r\nVersion: 1\r\n\r\nVersion: 2\r\n",
    ],
)
def test_name_and_version_are_understood_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    write(tmp_path / "acme-1.0.dist-info", METADATA=text, entry_points=ENTRY_POINTS)
    search(monkeypatch, tmp_path)

    assert [(*entry[:3], entry[3].strip()) for entry in theirs(GROUP)] == ours(GROUP) != []


def test_every_place_of_distributions_is_looked_at_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b" / "acme-2.dist-info", METADATA=METADATA, entry_points=ENTRY_POINTS)
    write(tmp_path / "a" / "acme-1.egg-info", pkg_info=METADATA, entry_points=ENTRY_POINTS)
    write(tmp_path / "here" / "acme-3.DIST-INFO", METADATA="Name: Third\nVersion: 3\n", entry_points=ENTRY_POINTS)
    (tmp_path / "b" / "old.egg-info").write_text(METADATA)  # distutils made files, which have no entry points
    write(tmp_path / "b" / "none.dist-info", METADATA=METADATA)
    write(tmp_path / "b" / "acme.data", METADATA=METADATA, entry_points=ENTRY_POINTS)
    monkeypatch.chdir(tmp_path / "here")
    search(monkeypatch, tmp_path / "b", tmp_path / "missing", "", tmp_path / "a", tmp_path / "b")

    assert ours(GROUP) == theirs(GROUP)
    assert [name for _, _, name, _ in ours(GROUP)] == ["Acme.Disk", "Third", "Acme.Disk", "Acme.Disk"]


def test_distribution_in_an_archive_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "acme.zip", "w") as archive:
        archive.writestr("acme-1.0.dist-info/METADATA", METADATA)
        archive.writestr("acme-1.0.dist-info/entry_points.txt", ENTRY_POINTS)
    search(monkeypatch, tmp_path / "acme.zip")

    assert ours(GROUP) == theirs(GROUP) == [("disk", "acme.disk", "Acme.Disk", "1.0")]


def test_distribution_in_an_egg_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "Acme-1.0.Egg" / "EGG-INFO", pkg_info=METADATA, entry_points=ENTRY_POINTS)
    search(monkeypatch, tmp_path / "Acme-1.0.Egg")

    assert ours(GROUP) == theirs(GROUP) == [("disk", "acme.disk", "Acme.Disk", "1.0")]


def test_distribution_that_only_an_importer_of_its_own_knows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder(metadata.DistributionFinder):
        def find_distributions(self, context: object = None) -> Iterable[metadata.Distribution]:
            return [metadata.PathDistribution(info)]

        def find_spec(self, *_: object) -> None:
            return None

    info = write(tmp_path / "hidden", METADATA=METADATA, entry_points=ENTRY_POINTS)
    search(monkeypatch)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])

    assert ours(GROUP) == theirs(GROUP) == [("disk", "acme.disk", "Acme.Disk", "1.0")]


def test_what_is_no_entry_point_is_an_error_only_in_the_group_that_is_asked_for() -> None:
    text = "[x]\nno value\n[y]\na = b\n"

    assert list(entry_points(text, "y")) == [("a", "b")]
    with pytest.raises(ValueError, match=r"^'no value' is no entry point$"):
        list(entry_points(text, "x"))


@pytest.mark.parametrize(("text", "missing"), [("Name: acme\n\nVersion: 1\n", "version"), ("", "name")])
def test_distribution_that_does_not_say_what_it_is_has_no_name_and_version(text: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"^there is no '{missing}' in the metadata$"):
        name_and_version({"METADATA": text}.get)


def test_path_that_is_no_text_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "acme-1.0.dist-info", METADATA=METADATA, entry_points=ENTRY_POINTS)
    monkeypatch.setattr(sys, "path", [tmp_path])  # import passes it over; importlib.metadata does not

    assert ours(GROUP) == theirs(GROUP) == [("disk", "acme.disk", "Acme.Disk", "1.0")]
