#!/usr/bin/env bash
# Starts a run with torchrun:
#   ./launch/torchrun.sh RUN.yaml [N] [section.key=value ...]
# N processes on this machine, one per GPU; without N, all the GPUs there are, or two processes on the CPU.
# On several machines, on each of them: NNODES=2 NODE_RANK=0 (1 on the second) MASTER_ADDR=node1 ./launch/torchrun.sh ...
# SIGTERM stops the run with a checkpoint within half a minute. torchrun itself then ends with status 1, never 75.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || fail "usage: launch/torchrun.sh RUN.yaml [N] [section.key=value ...]"
run=$1
shift
read -r devices _ device < <(devices)
processes=$devices
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
fi
[ "$device" = cpu ] || [ "$processes" -le "$devices" ] || fail "$processes processes, but this machine has $devices accelerators; start one per accelerator"
if [ "${NNODES:-1}" -gt 1 ]; then
  [ -n "${NODE_RANK:-}" ] || fail "NNODES is $NNODES, but NODE_RANK is not set; it is 0 on the first machine"
  [ -n "${MASTER_ADDR:-}" ] || fail "NNODES is $NNODES, but MASTER_ADDR is not set; it is the name of the first machine"
  where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
  where=(--standalone)
fi
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads "$processes")}
export OMP_NUM_THREADS
exec torchrun "${where[@]}" --nproc-per-node "$processes" -m cola_ds train "$run" "$@"
