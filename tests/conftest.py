"""What all tests share. In CI nothing may be skipped: what a user's machine may lack, CI installs, but for tests that are marked
as beyond_ci."""

import os

import pytest

from tests.support.toys import save_model, save_sums


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A model, training data and held-out data."""
    folder = tmp_path_factory.mktemp("toy")
    return (
        save_model(folder / "model"),
        save_sums(folder / "train.jsonl", 40),
        save_sums(folder / "dev.jsonl", 20, seed=1),
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and os.environ.get("COLA_DS_CI") and not item.get_closest_marker("beyond_ci"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report
