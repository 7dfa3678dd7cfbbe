"""Test how the benchmark runs commands."""

import pytest

from benchmarks.clients import BenchmarkError, run_client


def test_a_client_that_fails_is_an_error_with_what_it_said() -> None:
    with pytest.raises(BenchmarkError, match=r"(?s)sh failed: .*no disk"):
        run_client(["sh", "-c", "echo no disk >&2; exit 3"], 1)


def test_a_client_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.clients.GRACE_SECONDS", 0.1)

    with pytest.raises(BenchmarkError, match="tail did not end"):
        run_client(["tail", "-f", "/dev/null"], 0)
