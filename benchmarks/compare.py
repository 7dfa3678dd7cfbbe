"""Compare nbdkitpy with other NBD servers, side by side on this machine.

All serve the same data at the same time. Each workload runs on the one, then on the other, then on the one again; what
is reported is the median of the ratios of runs that are near each other, so that what else the machine does hits all
alike.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, the directory that is searched for modules is this one, of which we are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.command import main

    # Leave by way of the cleaning up, which ends the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
