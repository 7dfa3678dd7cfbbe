"""Errors that are nobody's ``OSError``: what configuration and discovery raise."""

__all__ = ["ConfigError", "NbdkitpyError", "UnitError"]


class NbdkitpyError(Exception):
    """Base of the errors that nbdkitpy itself raises."""


class ConfigError(NbdkitpyError):
    """The configuration is wrong; the text names the unit, the parameter, what was given and what is right."""


class UnitError(ConfigError):
    """A plugin or filter cannot be found, cannot be loaded, or is not what its entry point says."""
