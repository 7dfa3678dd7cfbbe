"""Fuzz one target with Atheris: ``python -m fuzz.run TARGET [MINUTES]``; or repeat inputs: ``TARGET FILE...``.

What leads to something new is kept in ``build/fuzz``, so that the next run goes on from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

#: The seeds of each target: what is in the repository.
CORPUS = Path(__file__).parent / "corpus"
SEEDS = {
    "handshake": CORPUS / "handshake",
    "transmission": CORPUS / "transmission",
    "conversation": CORPUS / "conversation",
    "session": CORPUS / "conversation",
}

_FOUND = Path("build", "fuzz")
_MINUTES = 5
_MAX_INPUT = 16 << 10  # bytes; longer messages are completed by the target itself
_MAX_MEMORY = 1024  # MiB, of the whole process
_MAX_SECONDS = 20  # for one input


def arguments(target: str, minutes: float) -> list[str]:
    """Return what libFuzzer is to do."""
    corpus = _FOUND / target
    corpus.mkdir(parents=True, exist_ok=True)
    return [
        f"-max_total_time={max(1, int(minutes * 60))}",
        f"-max_len={_MAX_INPUT}",
        f"-rss_limit_mb={_MAX_MEMORY}",
        f"-timeout={_MAX_SECONDS}",
        f"-dict={Path(__file__).parent / 'nbd.dict'}",
        f"-artifact_prefix={_FOUND}{os.sep}{target}-",
        "-print_final_stats=1",
        str(corpus),
        str(SEEDS[target]),
    ]


def fuzz(target: str, minutes: float) -> None:
    """Fuzz a target, and end the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("Atheris is not installed. It is not built for every Python: see fuzz/README.md.")
    with atheris.instrument_imports(include=["nbdkitpy"]):
        from fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments(target, minutes)], TARGETS[target])
    atheris.Fuzz()


def repeat(target: str, paths: Iterable[str]) -> None:
    """Give a target inputs that were found before. This needs no fuzzer, so that a debugger can be used."""
    from fuzz.targets import TARGETS

    for path in paths:
        TARGETS[target](Path(path).read_bytes())


def main(words: Sequence[str]) -> None:
    """Do what the command line says."""
    target, *rest = words or ("",)
    if target not in SEEDS:
        sys.exit(f"usage: python -m fuzz.run {{{','.join(SEEDS)}}} [MINUTES | FILE...]")
    if rest and os.path.isfile(rest[0]):
        repeat(target, rest)
    else:
        fuzz(target, float(rest[0]) if rest else _MINUTES)


if __name__ == "__main__":
    main(sys.argv[1:])
