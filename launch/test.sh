#!/usr/bin/env bash
# Sets up and runs every test; arguments go to pytest:
#   ./launch/test.sh [-k chain ...]
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh test
# shellcheck disable=SC1091
source .venv/bin/activate
exec python -m pytest "$@"
