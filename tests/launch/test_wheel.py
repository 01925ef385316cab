"""The wheel: built, installed into an environment of its own, and used from an empty folder, without the repository."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.support.launching import clean_environment
from tests.support.toys import REPOSITORY, run_config, save_run

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "cola_ds", "ds_configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy: a build leaves its own folders behind, and takes along what an earlier one left."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        path = REPOSITORY / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if done.returncode and "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("pip cannot fetch setuptools here")
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("cola_ds-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel in it, which lies in somebody's repository; what it needs is this environment's."""
    project = tmp_path_factory.mktemp("project")
    git = ["git", "-C", project, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    place = project / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", place / "bin/python"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", wheel], check=True, timeout=120)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "the-rest.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return place


def test_everything_of_the_package_is_in_the_wheel(wheel):
    package = REPOSITORY / "cola_ds"
    expected = {f"cola_ds/{path.relative_to(package)}" for path in package.rglob("*.py")}
    expected |= {f"cola_ds/ds_configs/{path.name}" for path in (REPOSITORY / "ds_configs").glob("*.json")}
    expected |= {f"cola_ds/report/page/page.{kind}" for kind in ("html", "css")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_a_chain_from_an_empty_folder(installed, toy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = save_run(tmp_path / "run.yaml", run_config(*toy[:2], "runs/chain", deepspeed="zero3", optim={"max_steps": 2}))
    env = {k: v for k, v in clean_environment().items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = f"{installed / 'bin'}:{env['PATH']}"

    def cola_ds(*words):
        done = subprocess.run(
            ["cola-ds", *map(str, words)], cwd=empty, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert cola_ds("--version") == "cola-ds 0.1.0\n"
    assert "done: runs/chain" in cola_ds("train", run)
    assert "chain" in cola_ds("report", "runs/chain", "--html", "report.html")
    assert "<h1>Report of 1 run</h1>" in (empty / "report.html").read_text(encoding="utf-8")
    cola_ds("export", "runs/chain", "--to", "peft", "--out", "adapter")
    assert {path.name for path in empty.iterdir()} == {"runs", "adapter", "report.html"}
    environment = json.loads((empty / "runs/chain/environment.json").read_text(encoding="utf-8"))
    assert (environment["cola_ds"], environment["git_revision"]) == ("0.1.0", None)
    engine = json.loads((empty / "runs/chain/deepspeed.json").read_text(encoding="utf-8"))
    assert engine == json.loads((REPOSITORY / "ds_configs/zero3.json").read_text(encoding="utf-8"))
    for link in ("link-0001", "link-0002"):
        assert (empty / "runs/chain/chain" / link / "adapter_model.safetensors").is_file()
