"""What all tests share. In CI nothing may be skipped: what a user's machine may lack, CI installs, but for tests that are marked
as beyond_ci."""

import inspect
import os
from types import CodeType

import pytest

from tests.support.toys import save_model, save_sums


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenized data of tests is kept apart from the user's."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A model, training data and held-out data."""
    folder = tmp_path_factory.mktemp("toy")
    return (
        save_model(folder / "model"),
        save_sums(folder / "train.jsonl", 40),
        save_sums(folder / "dev.jsonl", 20, seed=1),
    )


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Marks that follow from where a test stands and what it uses."""
    for item in items:
        if "cluster" in item.fixturenames or "slurm" in item.path.name:
            item.add_marker(pytest.mark.slurm)
        elif item.path.parent.name == "launch":
            item.add_marker(pytest.mark.launchers)
        fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
        if any(_starts_runs(function, set()) for function in (item.function, *fixtures)):
            item.add_marker(pytest.mark.distributed)


# What starts processes of a run, in tests/support and tests/commands/test_cli.py.
_STARTERS = {"run_distributed", "run_job", "Job", "train_in", "train_scored", "Server", "cola_ds", "COMMAND"}


def _starts_runs(function, seen):
    """Whether a test or a fixture names one of these, or a function of the tests that does."""
    function = inspect.unwrap(function)
    if function in seen or not function.__module__.startswith("tests."):
        return False
    seen.add(function)
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    if "executable" in names and not function.__module__.startswith("tests.support."):
        return True  # an interpreter of its own, with all its imports; the stand-ins of sweeps have few
    others = [function.__globals__.get(name) for name in names]
    return bool(names & _STARTERS) or any(_starts_runs(each, seen) for each in others if inspect.isfunction(each))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and os.environ.get("COLA_DS_CI") and not item.get_closest_marker("beyond_ci"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report
