"""A copy of the repository, for what writes where it stands."""

import shutil

import pytest

from tests.support.toys import REPOSITORY


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files of the repository, and its environment, in a folder that may be written to."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "cola_ds", "launch", "ds_configs", "slurm", "tests"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    if not (REPOSITORY / ".venv/.installed-quickstart").exists():
        pytest.skip("there is no .venv: run the tests with ./launch/test.sh")
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder
