#!/usr/bin/env bash
# Starts a run of N processes with mpirun (Open MPI; MPICH's and Intel MPI's take the same call):
#   ./launch/mpirun.sh RUN.yaml N [section.key=value ...] [-- mpirun's own options]
# On several machines, for example: ./launch/mpirun.sh RUN.yaml 16 -- --host node1:8,node2:8
# There mpi4py must be installed (pip install 'cola_ds[mpi]'), or MASTER_ADDR and MASTER_PORT be set.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
usage="usage: launch/mpirun.sh RUN.yaml N [section.key=value ...] [-- mpirun's own options]"
[[ ${2:-} =~ ^[0-9]+$ ]] || fail "$usage"
command -v mpirun >/dev/null || fail "there is no mpirun here; on Debian and Ubuntu: apt-get install openmpi-bin"
run=$1 processes=$2 overrides=()
shift 2
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  overrides+=("$1")
  shift
done
[ $# -eq 0 ] || shift

options=()
if [[ $(mpirun --version) == *"Open MPI"* ]]; then
  for name in $(forwarded) MASTER_ADDR MASTER_PORT; do [ -z "${!name:-}" ] || options+=(-x "$name"); done
  # It binds a process to one core, on which all its threads would then compute.
  [[ "$*" == *bind-to* ]] || options+=(--bind-to none)
fi
# Too few slots and hosts that cannot be reached are found out here, in one line.
said=$(mpirun -np "$processes" "${options[@]}" "$@" true 2>&1) ||
  fail "mpirun cannot start $processes processes${*:+ with $*}: $(tr -s -- '-\n\t ' '-   ' <<<"$said" | cut -c 1-240)"
# It passes SIGUSR1 on to every process; after SIGTERM it would kill them within a second.
stop_run() { kill -USR1 "$group"; }
run_launcher mpirun -np "$processes" "${options[@]}" "$@" "$(command -v python)" -m cola_ds train "$run" "${overrides[@]}"
