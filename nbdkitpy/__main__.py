"""``python -m nbdkitpy``."""

import sys

if __name__ == "__main__":
    # With -m the current directory comes first on sys.path: whoever can write there would choose our modules.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]

    from nbdkitpy.cli import main

    main()
