"""What a server is started with: from the command line, from a file, or both.

``words`` is the grammar of parameters on the command line; ``settings`` declares the settings of the server, once for
the command line and the file; ``units`` gives parameters to the layers. Only with ``--config``: ``file`` reads TOML,
``reload`` reads it again. Only when asked for: ``dump`` writes it.
"""

from nbdkitpy.config.settings import SETTINGS, ServerConfig, Setting, endpoints, server_config
from nbdkitpy.config.words import (
    Assignment,
    DebugFlag,
    is_parameter,
    parse_debug_flag,
    read_words,
    split_word,
    with_keys,
)

__all__ = [
    "SETTINGS",
    "Assignment",
    "DebugFlag",
    "ServerConfig",
    "Setting",
    "endpoints",
    "is_parameter",
    "parse_debug_flag",
    "read_words",
    "server_config",
    "split_word",
    "with_keys",
]
