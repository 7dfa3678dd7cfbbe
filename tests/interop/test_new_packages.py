"""What ``--new-plugin`` and ``--new-filter`` write, from nothing to a disk that is served; and strangers' types."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import NBDKITPY
from tests.interop.harness import Tool, run

pytestmark = pytest.mark.interop

DOCS = Path(__file__).parents[2] / "docs"

#: Pages whose examples are typed.
TYPED = [DOCS / "writing-a-plugin.md", DOCS / "writing-a-filter.md", DOCS / "contract.md"]

PLUGIN, FILTER = "stranger-disk", "stranger-guard"

#: Names that are as long as they may be, so that no line gets too long by them.
LONG_PLUGIN, LONG_FILTER = "p" * 32, "f" * 32


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the packages have been written."""
    directory = tmp_path_factory.mktemp("packages")
    for plugin, filter_ in ((PLUGIN, FILTER), (LONG_PLUGIN, LONG_FILTER)):
        run([*NBDKITPY, "--new-plugin", plugin, "--new-filter", filter_], cwd=directory)
    return directory


@pytest.fixture(scope="module")
def python(packages: Path, build_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a new environment, in which the packages are installed, beside what is installed here."""
    directory = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    python = str(directory / "bin" / "python")
    places = [
        run([each, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        for each in (python, sys.executable)
    ]
    Path(places[0], "outer.pth").write_text(f"import site; site.addsitedir({places[1]!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    editable = [word for name in (PLUGIN, FILTER) for word in ("-e", str(packages / f"nbdkitpy-{name}"))]
    run([*pip, "--no-build-isolation", "--no-deps", "--no-index", *editable], env={"PYTHONPATH": build_path})
    return python


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


def test_they_have_the_style_that_they_ask_for(packages: Path) -> None:
    needs("ruff")
    for package in packages.iterdir():
        run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=package)
        run([sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "."], cwd=package)


def test_they_have_types_and_so_have_the_examples_of_the_contract(packages: Path, tmp_path: Path) -> None:
    needs("mypy")
    mypy = [sys.executable, "-m", "mypy", f"--cache-dir={tmp_path}/cache"]
    plugin, guard = (packages / f"nbdkitpy-{name}" for name in (PLUGIN, FILTER))
    found = [re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL) for page in TYPED]
    examples = [example for page in found for example in page if "def " not in example or ") -> " in example]
    for number, example in enumerate(examples):
        (tmp_path / f"example{number}.py").write_text(example)
    others = [*tmp_path.glob("*.py"), *guard.rglob("*.py")]

    assert (len(examples), len(others)) == (4, 6)
    assert not [path for path in (*others, *plugin.rglob("*.py")) if "type: ignore" in path.read_text()]
    run(mypy, cwd=plugin)  # by its own configuration
    run([*mypy, "--strict", "--config-file=", *map(str, others)], env={"MYPYPATH": str(guard)})


@pytest.mark.parametrize("name", [PLUGIN, FILTER])
def test_they_pass_their_own_tests_and_those_that_every_unit_has_to_pass(
    packages: Path, python: str, name: str
) -> None:
    output = run([python, "-m", "pytest", "-v", "-p", "no:cacheprovider"], cwd=packages / f"nbdkitpy-{name}")

    assert re.search(r" \d+ passed in ", output)
    assert output.count("::TestConformance::test_") > 20
    assert "SKIPPED" not in output


def test_they_are_listed(python: str) -> None:
    assert f"nbdkitpy-{PLUGIN} 0.1.0" in run([python, "-m", "nbdkitpy", "--list-plugins"])
    assert f"nbdkitpy-{FILTER} 0.1.0" in run([python, "-m", "nbdkitpy", "--list-filters"])


def test_they_are_served_together(python: str, qemu_io: Tool, nbdinfo: Tool) -> None:
    write = f'{qemu_io.path} -f raw -c "write -P 7 {{}} 4k" -c "read -P {{}} {{}} 4k" "$uri"'
    words = [f"--filter={FILTER}", PLUGIN, "1M", "protect=64k", "--run"]

    output = run([python, "-m", "nbdkitpy", *words, f'{nbdinfo.path} --size "$uri"; {write.format(65536, 7, 65536)}'])
    refused = run([python, "-m", "nbdkitpy", *words, f"{write.format(4096, 0, 4096)}; true"])

    assert output.startswith("1048576\n")
    assert "wrote 4096/4096 bytes at offset 65536" in output
    assert "read 4096/4096 bytes at offset 65536" in output
    assert "Pattern verification failed" not in output + refused
    assert "write failed: Operation not permitted" in refused
