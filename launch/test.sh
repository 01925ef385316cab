#!/usr/bin/env bash
# Sets up and runs every test, or with --fast what takes less than three minutes on two cores: what needs no Slurm, no launcher
# and no download, and of what starts processes a core: a chain over a knot, a resume, a tie. Other arguments go to pytest:
#   ./launch/test.sh [--fast] [-k chain ...]
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh test
# shellcheck disable=SC1091
source .venv/bin/activate
if [ "${1:-}" = --fast ]; then
  shift
  set -- -m "core or not (slurm or launchers or quickstart or distributed)" "$@"
fi
exec python -m pytest "$@"
