"""The unit files: systemd understands them, finds little to blame in the template, and the wheel installs them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nbdkitpy.cli import command
from nbdkitpy.config.file import read_file
from tests.interop.harness import Tool

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
UNITS = sorted(path for path in (ROOT / "systemd").iterdir() if path.suffix in (".service", ".socket"))
SERVICES = [path for path in UNITS if path.suffix == ".service"]
TEMPLATE = ROOT / "systemd" / "nbdkitpy@.service"

#: The most that systemd may find to blame in the template, in tenths of its points from 0 to 10.
EXPOSURE = 20

Settings = list[tuple[str, str]]


def settings(path: Path) -> Settings:
    """The settings of a unit, in order."""
    lines = path.read_text().splitlines()
    return [(key, value) for key, equals, value in (line.partition("=") for line in lines if line[:1] != "#") if equals]


def value(path: Path, key: str) -> str:
    """The last value of a setting."""
    return dict(settings(path))[key]


@pytest.fixture
def analyze() -> str:
    return Tool("systemd-analyze", "systemd").path


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as they are when the program is installed; here it is some program that is there for certain."""
    for path in UNITS:
        text = re.sub("^ExecStart=nbdkitpy ", f"ExecStart={sys.executable} ", path.read_text(), flags=re.MULTILINE)
        (tmp_path / path.name).write_text(text)
    return tmp_path


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of one language in a page of the documentation."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run(*args: str | Path) -> str:
    """Run a program that has to succeed, and return all that it says."""
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_there_is_a_socket_for_each_service() -> None:
    assert [path.name for path in UNITS] == [
        "nbdkitpy.service",
        "nbdkitpy.socket",
        "nbdkitpy@.service",
        "nbdkitpy@.socket",
    ]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_has_nothing_to_say_about_a_unit(path: Path, analyze: str, installed: Path) -> None:
    # Its warnings do not change the exit status. The manual page that the units name is installed with them.
    assert run(analyze, "verify", "--man=no", installed / path.name) == ""


def test_systemd_complains_of_a_unit_that_is_wrong(analyze: str, installed: Path) -> None:
    path = installed / TEMPLATE.name
    path.write_text(path.read_text().replace("ProtectSystem=strict", "ProtectSystm=strict"))

    assert "ProtectSystm" in run(analyze, "verify", "--man=no", path)


def test_P9_template_leaves_little_exposed(analyze: str, installed: Path) -> None:
    report = run(
        analyze, "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE}", installed / TEMPLATE.name
    )

    assert "Overall exposure level" in report


#: What no service of ours may do, and what the template may not do besides. The rest is in the points above.
RESTRICTIONS = {
    "NoNewPrivileges": ("yes", "yes"),
    "RestrictSUIDSGID": ("yes", "yes"),
    "MemoryDenyWriteExecute": ("yes", "yes"),
    "ProtectSystem": ("full", "strict"),
    "DynamicUser": (None, "yes"),
    "ProtectHome": (None, "yes"),
    "PrivateDevices": (None, "yes"),
    "PrivateNetwork": (None, "yes"),
    "CapabilityBoundingSet": (None, ""),
}


@pytest.mark.parametrize("key", RESTRICTIONS)
def test_P9_services_may_not_do_what_no_disk_needs(key: str) -> None:
    simple = dict(settings(ROOT / "systemd" / "nbdkitpy.service"))

    assert (simple.get(key), value(TEMPLATE, key)) == RESTRICTIONS[key]


def test_service_that_leaves_much_exposed_would_be_noticed(analyze: str, tmp_path: Path) -> None:
    path = tmp_path / "bare.service"
    path.write_text(f"[Service]\nExecStart={sys.executable}\n")

    with pytest.raises(AssertionError, match="Overall exposure level"):
        run(analyze, "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE}", path)


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_command_of_a_service_has_only_options_that_there_are(path: Path) -> None:
    program, *words = shlex.split(value(path, "ExecStart"))
    known = {name for option in command().params for name in option.opts}

    used = [word for word in words if word.startswith("-")]

    assert program == "nbdkitpy"
    assert "--config" in used
    assert set(used) <= known


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_service_is_supervised_reloaded_and_never_without_its_socket(path: Path) -> None:
    expected = {
        "Type": "notify",
        "ExecReload": "kill -HUP $MAINPID",
        "Restart": "on-failure",
        "WatchdogSec": "30s",
        "Requires": path.name.replace("@.service", "@%i.socket").replace(".service", ".socket"),
    }

    assert {key: value(path, key) for key in expected} == expected


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_server_may_come_and_go_with_its_clients_as_often_as_they_like(path: Path) -> None:
    key = "StartLimitIntervalSec" if path in SERVICES else "TriggerLimitIntervalSec"

    assert value(path, key) == "0"


def test_A14_simple_service_is_for_this_machine_only() -> None:
    addresses = [value for key, value in settings(ROOT / "systemd" / "nbdkitpy.socket") if key == "ListenStream"]

    assert addresses == ["127.0.0.1:10809", "[::1]:10809"]


def test_wheel_installs_each_unit_where_systemd_looks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]

    units = {source: target for source, target in data.items() if source.startswith("systemd/")}

    assert units == {f"systemd/{path.name}": f"lib/systemd/system/{path.name}" for path in UNITS}


# --- the examples in the documentation ---


@pytest.mark.parametrize("page", ["systemd/README.md", "docs/service.md"])
def test_configurations_in_the_documentation_are_understood(page: str, tmp_path: Path) -> None:
    path = tmp_path / "example.toml"
    examples = blocks(page, "toml")

    for example in examples:
        path.write_text(example)
        read_file(str(path))

    assert len(examples) >= 2


@pytest.mark.parametrize("text", blocks("systemd/README.md", "ini"), ids=lambda text: text.splitlines()[1])
def test_systemd_understands_each_drop_in_of_the_guide(text: str, analyze: str, installed: Path) -> None:
    name = TEMPLATE.name if text.startswith("[Service]") else "nbdkitpy@.socket"
    unit = installed / name
    unit.write_text(f"{unit.read_text()}\n{text}")

    assert run(analyze, "verify", "--man=no", unit) == ""


@pytest.mark.parametrize("text", blocks("docs/service.md", "ini"), ids=["socket", "service"])
def test_systemd_understands_the_units_of_the_manual(text: str, analyze: str, installed: Path) -> None:
    unit = installed / f"example.{'socket' if '[Socket]' in text else 'service'}"
    (installed / "example.service").write_text(f"[Service]\nExecStart={sys.executable}\n")
    unit.write_text(text.replace("ExecStart=nbdkitpy ", f"ExecStart={sys.executable} "))

    assert run(analyze, "verify", "--man=no", unit) == ""
