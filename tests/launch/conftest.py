"""A copy of the repository, for what writes where it stands."""

import hashlib
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
    # Else the copy would be installed in the place of the repository, in the environment that they share.
    wanted = hashlib.sha256(
        b"".join((REPOSITORY / name).read_bytes() for name in ("pyproject.toml", "launch/setup.sh"))
    )
    stamp = REPOSITORY / ".venv/.installed-quickstart"
    if not stamp.exists() or stamp.read_text(encoding="utf-8").strip() != wanted.hexdigest():
        pytest.skip("there is no .venv, or an older one: run the tests with ./launch/test.sh")
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder
