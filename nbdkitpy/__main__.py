"""``python -m nbdkitpy``.

Before any of this runs, Python has put the current directory first on its path and imported modules by that, ours among
them. So whoever may write there can have us run what he likes, and nothing here could prevent it. All that can be done
is to refuse to start in such a place, and to say how to start instead.
"""

import os
import stat
import sys


def _is_for_others(directory: str) -> bool:
    """Tell whether anybody but root and this user may put files into `directory`."""
    try:
        status = os.stat(directory)
    except OSError:  # nothing is imported from there
        return False
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and status.st_gid not in (0, os.getegid())


if __name__ == "__main__":
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        if _is_for_others(sys.path[0]):
            option = "-P" if sys.version_info >= (3, 11) else "-I"
            raise SystemExit(
                "nbdkitpy: error: python -m takes modules from the current directory first, and others may write to "
                f"{sys.path[0]!r}: use the command nbdkitpy, or python {option} -m nbdkitpy"
            )
        del sys.path[0]  # what is imported from now on, and units that are looked for, shall not come from there

    from nbdkitpy.cli import main

    main()
