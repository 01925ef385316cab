"""Many real processes agree: a group over gloo, the facts of the start, groups of nodes, and a checksum of A and B."""

import json
import subprocess
import sys

import pytest

from tests.support.toys import REPOSITORY


@pytest.mark.distributed
def test_64_processes_on_8_nodes_name_the_one_that_differs():
    done = subprocess.run(
        [sys.executable, "-m", "tests.scale.crowd", "64", "8", "42"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (difference,) = found["differences"]
    assert difference.startswith("process 42 on ") and "torch other / " in difference
    assert found["drift"].startswith("A and B on process 42 are not those of process 0 after step 3")
    assert found["heard"] == 7 and found["least_memory"]
