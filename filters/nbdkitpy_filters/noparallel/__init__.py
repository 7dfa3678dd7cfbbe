"""The noparallel filter: fewer requests at once than the plugin could take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from nbdkitpy import Filter, Parameter, ThreadModel, choice, hookimpl

__all__ = ["NoParallel"]

_MODELS: Mapping[str, ThreadModel] = MappingProxyType(
    {
        "requests": ThreadModel.SERIALIZE_REQUESTS,
        "all-requests": ThreadModel.SERIALIZE_ALL_REQUESTS,
        "connections": ThreadModel.SERIALIZE_CONNECTIONS,
    }
)


class NoParallel(Filter):
    """Ask for a stricter thread model; the core does the rest."""

    name = "noparallel"
    longname = "nbdkitpy noparallel filter"
    description = "Carry out fewer requests at once."
    multi_process = True

    serialize = Parameter(
        choice(*_MODELS),
        default="requests",
        metavar="MODE",
        help="What is done one at a time: the requests of each client, all requests, or connections.",
    )

    def thread_model(self) -> ThreadModel:
        """Return the model that `serialize` names."""
        return _MODELS[self.serialize]


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(NoParallel)
