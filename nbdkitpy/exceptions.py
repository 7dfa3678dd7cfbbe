"""Errors that are nobody's ``OSError``: what configuration and discovery raise; and how any error is put into words."""

__all__ = ["ConfigError", "NbdkitpyError", "UnitError", "describe"]


class NbdkitpyError(Exception):
    """Base of the errors that nbdkitpy itself raises."""


class ConfigError(NbdkitpyError):
    """The configuration is wrong; the text names the unit, the parameter, what was given and what is right."""


class UnitError(ConfigError):
    """A plugin or filter cannot be found, cannot be loaded, or is not what its entry point says."""


def describe(error: BaseException) -> str:
    """Return the text of an exception, whatever it does to prevent that; of one that is no OSError the name, too."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # a unit's exception may be anything
        return name
    return text if isinstance(error, OSError) and text else f"{name}: {text}".rstrip(": ")
