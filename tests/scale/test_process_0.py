"""Process 0 of many processes: what meeting and watching them costs it, with real sockets."""

import json
import subprocess
import sys

import pytest

from tests.support.distributed import free_port
from tests.support.toys import REPOSITORY

PROCESSES = 512


@pytest.mark.distributed
def test_five_hundred_others_cost_process_0_next_to_nothing():
    """It begins with 1024 open files, as many systems have it, and has more connections than that."""
    port = str(free_port())
    command = [sys.executable, "-m", "tests.scale.process_0"]
    crowd = subprocess.Popen([*command, "--others", port, str(PROCESSES)], cwd=REPOSITORY)
    try:
        done = subprocess.run(
            [*command, port, str(PROCESSES)], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
        )
    finally:
        crowd.kill()
        crowd.wait()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["watched"] == PROCESSES - 1
    assert found["files"] > 1024
    assert found["silent_s"] < 10  # all are heard
    assert found["cpu_share"] < 0.05, found
    assert found["slower"] < 0.25, found
    assert found["threads"] < 10, found
    assert found["meeting_threads"] < 10, found
