#!/usr/bin/env bash
# Makes the virtual environment .venv with what an extra of pyproject.toml needs, unless that is done already.
#   ./launch/setup.sh quickstart|test
# PYTHON names the interpreter (default python3). pip's own settings apply: on a machine without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves the download of torch's CUDA build.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:?usage: launch/setup.sh quickstart|test}
python=${PYTHON:-python3}

fail() { echo "setup: $1" >&2; exit 2; }
command -v "$python" >/dev/null || fail "no $python found; install Python 3.10 or later, or name it in PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$python" -V) is too old; Python 3.10 or later is needed"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python lacks venv; on Debian and Ubuntu: apt-get install python3-venv"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler found (DeepSpeed compiles an operation); install g++"

stamp=".venv/.installed-$extra"
wanted=$(cat pyproject.toml launch/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

[ -x .venv/bin/pip ] || "$python" -m venv .venv
# shellcheck disable=SC1091
source .venv/bin/activate
echo "setup: installing cola_ds[$extra] into .venv"
python -m pip install --quiet --editable ".[$extra]"
# DeepSpeed compiles its communication operation on first use: here, where nobody waits for a run. A lock that an
# interrupted compilation left behind would hang every later one.
find .venv/torch_extensions -name lock -delete 2>/dev/null || true
# A folder that others may compile in is not ours to clear.
find "${TORCH_EXTENSIONS_DIR:-/nonexistent}" -name lock -printf \
  'setup: waiting for another compilation; if there is none, one was interrupted: remove %p\n' 2>/dev/null || true
echo "setup: compiling DeepSpeed's communication operation"
python -c 'from cola_ds.distributed import collectives, launcher; collectives.init_process_group(launcher.identify()); collectives.destroy_process_group()' >/dev/null
echo "$wanted" >"$stamp"
# What tests need holds what the quickstart needs. The tests run it in a copy, which must not be installed in this one's place.
[ "$extra" != test ] || echo "$wanted" >.venv/.installed-quickstart
