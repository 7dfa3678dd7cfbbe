"""Discovery: only what is named is imported, and whatever else is broken disturbs nobody."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdkitpy import Filter, Plugin, UnitError
from nbdkitpy.registry import Kind, Registry

PLUGIN = """
from nbdkitpy import Handle, Plugin, hookimpl

class Disk(Plugin):
    name = "{name}"

@hookimpl
def register_plugins(register):
    register(Disk)
"""

FILTERS = """
from nbdkitpy import Filter, Plugin, hookimpl

class One(Filter):
    name = "one"

class Two(Filter):
    name = "two"
    version = "2.5"

class Both(Plugin):
    name = "one"

@hookimpl
def register_filters(register):
    register(One)
    register(Two)

@hookimpl
def register_plugins(register):
    register(Both)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put distributions on a path of their own, on which there is nothing else to be found."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])

    def install(distribution: str, entry_points: str, *, version: str = "1.0", **modules: str) -> None:
        info = tmp_path / f"{distribution}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points)
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)

    yield install
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_plugin_is_the_class_of_the_entry_points_name(install: Install, tmp_path: Path) -> None:
    install("acme-disk", "[nbdkitpy.plugins]\ndisk = acme_disk\n", acme_disk=PLUGIN.format(name="disk"))

    unit = Registry().plugin("disk")

    assert issubclass(unit.cls, Plugin)
    assert unit.cls.name == "disk"
    assert unit.path == str(tmp_path / "acme_disk.py")
    assert (unit.distribution, unit.version) == ("acme-disk", "1.0")


def test_one_module_may_offer_several_units_of_both_kinds(install: Install) -> None:
    install("acme", "[nbdkitpy.plugins]\none = acme\n[nbdkitpy.filters]\none = acme\ntwo = acme\n", acme=FILTERS)
    registry = Registry()

    assert registry.plugin("one").cls.__name__ == "Both"
    assert registry.filter("one").cls.__name__ == "One"
    assert registry.filter("two").cls.__name__ == "Two"
    assert registry.filter("two").version == "2.5"
    assert issubclass(registry.filter("two").cls, Filter)


def test_listing_imports_nothing(install: Install) -> None:
    install("zeta", "[nbdkitpy.plugins]\nz = zeta\na = zeta\n", version="3", zeta="raise SystemExit")
    install("beta", "[nbdkitpy.filters]\nf = beta\n[console_scripts]\nx = beta:main\n", beta="raise SystemExit")
    registry = Registry()

    plugins, filters = registry.names(Kind.PLUGIN), registry.names(Kind.FILTER)

    assert [(offer.name, str(offer)) for offer in plugins] == [("a", "zeta 3"), ("z", "zeta 3")]
    assert [(offer.name, str(offer)) for offer in filters] == [("f", "beta 1.0")]
    assert not {"zeta", "beta"} & set(sys.modules)


def test_P6_listing_leaves_out_names_that_cannot_be_asked_for(install: Install) -> None:
    install("odd", "[nbdkitpy.plugins]\n../x = odd\na.b = odd\ngood-1_x = odd\n")

    assert [offer.name for offer in Registry().names(Kind.PLUGIN)] == ["good-1_x"]


def test_loading_imports_only_the_unit_that_is_named(install: Install) -> None:
    install("broken", "[nbdkitpy.plugins]\nbroken = broken_disk\n", broken_disk="raise RuntimeError")
    install("good", "[nbdkitpy.plugins]\ngood = good_disk\n", good_disk=PLUGIN.format(name="good"))

    assert Registry().plugin("good").cls.name == "good"
    assert "broken_disk" not in sys.modules


@pytest.mark.parametrize("text", ["no section, nbdkitpy.plugins", "[nbdkitpy.plugins]\nno value\n"])
def test_unreadable_metadata_of_another_distribution_disturbs_nobody(install: Install, text: str) -> None:
    install("awful", text)
    install("good", "[nbdkitpy.plugins]\ngood = good_disk\n", good_disk=PLUGIN.format(name="good"))

    assert Registry().plugin("good").cls.name == "good"


def test_second_distribution_of_one_name_is_hidden_by_the_first(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("Acme.Disk", "[nbdkitpy.plugins]\ndisk = acme_disk\n", acme_disk=PLUGIN.format(name="disk"))
    hidden = tmp_path / "later" / "acme_disk-0.5.dist-info"
    hidden.mkdir(parents=True)
    (hidden / "METADATA").write_text("Metadata-Version: 2.1\nName: acme_disk\nVersion: 0.5\n")
    (hidden / "entry_points.txt").write_text("[nbdkitpy.plugins]\ndisk = acme_disk\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(hidden.parent)])

    assert [str(offer) for offer in Registry().names(Kind.PLUGIN)] == ["Acme.Disk 1.0"]


def failure(kind: Kind, name: str) -> str:
    with pytest.raises(UnitError) as caught:
        Registry().plugin(name) if kind is Kind.PLUGIN else Registry().filter(name)
    return str(caught.value)


def test_unknown_unit_names_the_nearest_and_a_package(install: Install) -> None:
    install("acme", "[nbdkitpy.plugins]\nmemory = acme\nfile = acme\n")

    text = failure(Kind.PLUGIN, "memori")

    assert text.startswith('there is no plugin "memori": did you mean "memory"?')
    assert "nbdkitpy --list-plugins" in text
    assert text.endswith("pip install nbdkitpy-memori")


def test_unknown_unit_that_is_near_to_nothing_has_no_suggestion(install: Install) -> None:
    install("acme", "[nbdkitpy.plugins]\nip = acme\n")

    text = failure(Kind.FILTER, "ip")

    assert text.startswith('there is no filter "ip": nbdkitpy --list-filters')


@pytest.mark.parametrize("name", ["x;y", "", "x\n", "x.", "é", "１"])
def test_P6_name_that_is_no_short_name_is_refused_before_anything_is_looked_up(install: Install, name: str) -> None:
    assert failure(Kind.PLUGIN, name).endswith(f"has letters, digits, - and _ only, not {name!r}")


def test_unit_that_two_distributions_offer_names_both(install: Install) -> None:
    install("acme", "[nbdkitpy.plugins]\ndisk = acme\n")
    install("evil", "[nbdkitpy.plugins]\ndisk = evil\n", version="6.6")

    assert failure(Kind.PLUGIN, "disk") == (
        'plugin "disk" is ambiguous: acme 1.0 and evil 6.6 both offer it; uninstall one of them'
    )


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        ("import there_is_no_such_module", "ModuleNotFoundError: No module named 'there_is_no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("class Odd(BaseException):\n    __str__ = None\nraise Odd", "Odd"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
    ],
)
def test_unit_that_cannot_be_imported_names_its_distribution_and_the_cause(
    install: Install, module: str, cause: str
) -> None:
    install("acme", "[nbdkitpy.filters]\nshaky = shaky_filter\n", version="0.1", shaky_filter=module)

    assert failure(Kind.FILTER, "shaky") == f'filter "shaky" of acme 0.1 cannot be loaded: {cause}'


def test_interrupt_while_a_unit_is_imported_is_the_users(install: Install) -> None:
    install("acme", "[nbdkitpy.plugins]\nslow = slow_module\n", slow_module="raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        Registry().plugin("slow")


def test_module_that_is_missing_is_an_error_of_its_distribution(install: Install) -> None:
    install("acme", "[nbdkitpy.plugins]\ngone = gone_module\n")

    assert 'plugin "gone" of acme 1.0 cannot be loaded: ModuleNotFoundError' in failure(Kind.PLUGIN, "gone")


def test_entry_point_must_name_a_module(install: Install) -> None:
    install("acme", "[nbdkitpy.plugins]\ndisk = acme:Disk\n")

    assert failure(Kind.PLUGIN, "disk").endswith("its entry point must name a module, not 'acme:Disk'")


REGISTER = """
from nbdkitpy import Filter, Plugin, hookimpl

class Disk(Plugin):
    name = "{name}"

@hookimpl
def {hook}(register):
    {body}
"""


@pytest.mark.parametrize(
    ("hook", "body", "message"),
    [
        ("register_plugins", "pass", 'registers no class whose name is "disk" (it registers: none at all)'),
        ("register_filters", "register(Disk)", 'registers no class whose name is "disk" (it registers: none at all)'),
        ("register_plugins", "[register(Disk), register(Disk)]", "registers 2 classes of that name"),
        ("register_plugins", "register(Filter)", "which is not a subclass of nbdkitpy.Plugin"),
        ("register_plugins", "register(Disk())", "which is not a subclass of nbdkitpy.Plugin"),
        ("register_plugins", "register(1 / 0)", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("register_plugin", "register(Disk)", "unknown hook 'register_plugin'"),
    ],
)
def test_module_that_registers_the_wrong_things_is_refused(
    install: Install, hook: str, body: str, message: str
) -> None:
    install(
        "acme", "[nbdkitpy.plugins]\ndisk = wrong_disk\n", wrong_disk=REGISTER.format(name="disk", hook=hook, body=body)
    )

    text = failure(Kind.PLUGIN, "disk")

    assert text.startswith('plugin "disk" of acme 1.0 ')
    assert message in text


def test_class_of_another_name_is_refused_and_named(install: Install) -> None:
    install("acme", "[nbdkitpy.plugins]\ndisk = other_disk\n", other_disk=PLUGIN.format(name="disc"))

    assert failure(Kind.PLUGIN, "disk").endswith("registers no class whose name is \"disk\" (it registers: 'disc')")


def test_module_without_a_file_has_no_path(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", "[nbdkitpy.plugins]\ndisk = bare_disk\n")
    module = type(sys)("bare_disk")
    exec(PLUGIN.format(name="disk"), vars(module))
    monkeypatch.setitem(sys.modules, "bare_disk", module)

    assert Registry().plugin("disk").path == ""
