"""`cola-ds` in a process that writes down how much its memory has grown: `python -m tests.plan.measured OUT train RUN.yaml ...`.

Counted is what is resident and its own, from before the model is loaded: at the end of loading, and at its most after it. glibc
must give freed memory back at once (see `ENVIRONMENT`); mapped files are not counted, nor what processes share to talk.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def status() -> dict[str, int]:
    """Bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def main() -> int:
    from cola_ds.cli import main as command
    from cola_ds.training import run, start

    out, found = Path(sys.argv[1]), {}
    build, end = start.build_chain, run.run_chain

    def build_chain(*args):
        found["before"] = status()
        chain = build(*args)
        for option, value in ((-3, 65536), (-1, 65536)):  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most so far is what there is now
        found["built"] = status()
        return chain

    def run_chain(chain):
        end(chain)
        before, built, at = (entry["RssAnon"] + entry["RssFile"] for entry in (*found.values(), status()))
        peak = status()["VmHWM"] - status()["RssShmem"]
        sizes = {"built": built - before, "peak": peak - before, "end": at - before}
        (out / f"memory-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(sizes), encoding="utf-8")

    start.build_chain, run.run_chain = build_chain, run_chain
    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
