#!/usr/bin/env bash
# Starts a run on this machine with DeepSpeed's launcher:
#   ./launch/local.sh RUN.yaml [N] [section.key=value ...]
# N processes, one per GPU; without N, all the GPUs there are, or two processes on the CPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || fail "usage: launch/local.sh RUN.yaml [N] [section.key=value ...]"
run=$1
shift
read -r devices visible device < <(devices)
processes=$devices
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
fi
[ "$device" = cpu ] || [ "$processes" -le "$devices" ] || fail "$processes processes, but this machine has $devices accelerators; start one per accelerator"
if [ -n "${!visible:-}" ]; then
  # The launcher starts one process per device that the variable names, and would ignore it beside --num_gpus.
  export "$visible=$(cut -d, -f"1-$processes" <<<"${!visible}")"
  where=()
else
  where=(--num_gpus "$processes")
fi
port=$(python -c 'from cola_ds.distributed.launcher import free_port; print(free_port())')
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads "$processes")}
export OMP_NUM_THREADS

# SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask a run to stop with a checkpoint. DeepSpeed's launcher would end, or kill its processes
# after half a minute: it gets none of them. Its processes do, as SIGUSR1, which it inherits as ignored and they take.
stop_run() {
  # before there is a process of the run, the launcher can be ended
  if pgrep -g "$group" -f -- '-m cola_ds train' >/dev/null; then kill -USR1 -- "-$group"; else kill -- "-$group"; fi
}
# An empty hostfile path keeps a cluster's /job/hostfile out: this machine alone.
run_launcher deepspeed --hostfile /dev/null --no_local_rank "${where[@]}" --master_port "$port" \
  --module cola_ds train "$run" "$@"
