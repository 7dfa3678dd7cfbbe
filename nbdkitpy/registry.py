"""Finds plugins and filters by their entry points, and loads the one that is asked for; nothing else is imported.

A package offers a unit by an entry point of the group ``nbdkitpy.plugins`` or ``nbdkitpy.filters``: the unit's name,
and the module whose hook registers its class. In-tree units are found in the same way. A unit that is not installed,
or has no name, is asked for by where its code is: see :mod:`nbdkitpy.located`.
"""

from __future__ import annotations

import enum
import importlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

import pluggy

from nbdkitpy import hookspecs
from nbdkitpy.backend import Backend, Filter, Plugin
from nbdkitpy.distributions import ReadText, distributions, entry_points, name_and_version
from nbdkitpy.exceptions import UnitError, describe

__all__ = ["Kind", "Offer", "Registry", "Unit"]

# What may be asked for by name, and so reach an error message as it is. Never a path.
_NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_MODULE = re.compile(r"\w+(\.\w+)*")

B = TypeVar("B", bound=Backend)


class Kind(enum.Enum):
    """What a unit is."""

    PLUGIN = "plugin"
    FILTER = "filter"

    @property
    def group(self) -> str:
        """Return the group of entry points."""
        return f"nbdkitpy.{self.value}s"

    @property
    def hook(self) -> str:
        """Return the name of the hook that hands over the classes."""
        return f"register_{self.value}s"


class Offer(NamedTuple):
    """An entry point: a unit as a distribution promises it. Nothing of it has been imported."""

    name: str
    distribution: str
    version: str  #: of the distribution
    module: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


class Unit(Generic[B]):
    """A plugin or filter that has been loaded: its class, where that is, and who offers it."""

    def __init__(self, cls: type[B], word: str, path: str, offer: Offer | None = None) -> None:
        self.cls = cls
        self.word = word  #: by which it was asked for
        self.path = path  #: file of the module, "" if there is none
        self.offer = offer  #: None if it was asked for by where its code is

    @property
    def distribution(self) -> str:
        """Return the distribution that offers it, "" if none does."""
        return self.offer.distribution if self.offer else ""

    @property
    def version(self) -> str:
        """Return the version that the unit states, else its distribution's; "" if there is none."""
        return self.cls.version or (self.offer.version if self.offer else "")


class Registry:
    """The units that are installed, as they are when they are first asked for."""

    def __init__(self) -> None:
        self._offers: dict[Kind, list[Offer]] = {}

    def names(self, kind: Kind) -> Sequence[Offer]:
        """Return what is offered, by name. One name may come twice, from different distributions."""
        if kind not in self._offers:
            self._offers[kind] = sorted(_offers(kind.group))
        return self._offers[kind]

    def plugin(self, word: str) -> Unit[Plugin]:
        """Load the plugin of which `word` is the name, or says where its code is.

        Raises:
            UnitError: there is none or more than one, or it is not what its entry point says.
        """
        return self._load(Kind.PLUGIN, Plugin, word)

    def filter(self, word: str) -> Unit[Filter]:
        """Load a filter; raises as :meth:`plugin` does."""
        return self._load(Kind.FILTER, Filter, word)

    def _load(self, kind: Kind, base: type[B], word: str) -> Unit[B]:
        if _NAME.fullmatch(word):
            return self._installed(kind, base, word)
        from nbdkitpy.located import find  # most units are asked for by name

        cls, module = find(base, word, lambda module: _registered(kind, module))
        return Unit(cls, word, _file(module))

    def _installed(self, kind: Kind, base: type[B], name: str) -> Unit[B]:
        offer = self._find(kind, name)
        what = f'{kind.value} "{name}" of {offer}'
        module, registered = _imported(kind, offer, what)
        cls = _pick(base, name, what, registered)
        return Unit(cls, name, _file(module), offer)

    def _find(self, kind: Kind, name: str) -> Offer:
        found = [offer for offer in self.names(kind) if offer.name == name]
        if not found:
            raise UnitError(self._unknown(kind, name))
        if len(found) > 1:
            owners = " and ".join(map(str, found))
            raise UnitError(f'{kind.value} "{name}" is ambiguous: {owners} both offer it; uninstall one of them')
        return found[0]

    def _unknown(self, kind: Kind, name: str) -> str:
        import difflib  # only for those who mistype

        near = difflib.get_close_matches(name, {offer.name for offer in self.names(kind)}, n=3)
        hint = "did you mean " + " or ".join(f'"{each}"' for each in near) + "? " if near else ""
        return (
            f'there is no {kind.value} "{name}": {hint}nbdkitpy --list-{kind.value}s shows what is installed; '
            f"a package that has it may be had with: pip install nbdkitpy-{name}"
        )


def _offers(group: str) -> list[Offer]:
    """All entry points of `group`. Of two distributions of one name the first on ``sys.path`` counts, as for import."""
    offers: list[Offer] = []
    seen: set[str] = set()
    for read_text in distributions():
        found = _offers_of(read_text, group)
        owner = {re.sub(r"[-_.]+", "-", offer.distribution).lower() for offer in found}
        if not owner & seen:
            offers += found
        seen |= owner
    return offers


def _offers_of(read_text: ReadText, group: str) -> list[Offer]:
    # Whatever is wrong with one distribution's files, that one offers nothing and the others are not disturbed.
    try:
        found = list(entry_points(read_text("entry_points.txt") or "", group))
        if not found:
            return []
        owner, version = name_and_version(read_text)
        return [Offer(name, owner, version, module) for name, module in found if _NAME.fullmatch(name)]
    except Exception:
        return []


def _imported(kind: Kind, offer: Offer, what: str) -> tuple[ModuleType, list[object]]:
    """Import the module of `offer`, and return it with what its hook registers."""
    if _MODULE.fullmatch(offer.module) is None:
        raise UnitError(f"{what}: its entry point must name a module, not {offer.module!r}")
    try:
        module = importlib.import_module(offer.module)
        return module, _registered(kind, module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        cause = " ".join(describe(error).split())
        raise UnitError(f"{what} cannot be loaded: {cause}") from error


def _registered(kind: Kind, module: ModuleType) -> list[object]:
    """Return what the hook of `module` registers."""
    registered: list[object] = []
    # One manager for each: a module may offer several units, and pluggy registers a module once only.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    getattr(manager.hook, kind.hook).call_historic(kwargs={"register": registered.append})
    manager.register(module)  # the historic hook is called by this
    manager.check_pending()  # a misspelt hook would be passed over in silence
    return registered


def _pick(base: type[B], name: str, what: str, registered: Sequence[object]) -> type[B]:
    """Return the one class of `registered` that is called `name`."""
    classes: list[type[B]] = []
    for candidate in registered:
        if not (isinstance(candidate, type) and issubclass(candidate, base)):
            raise UnitError(f"{what} registers {candidate!r}, which is not a subclass of nbdkitpy.{base.__name__}")
        classes.append(candidate)
    named = [cls for cls in classes if cls.name == name]
    if len(named) > 1:
        raise UnitError(f"{what} registers {len(named)} classes of that name")
    if not named:
        others = ", ".join(repr(cls.name) for cls in classes) or "none at all"
        raise UnitError(f'{what} registers no class whose name is "{name}" (it registers: {others})')
    return named[0]


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or ""
