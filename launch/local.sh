#!/usr/bin/env bash
# Starts a run on this machine with DeepSpeed's launcher:
#   ./launch/local.sh RUN.yaml [N] [section.key=value ...]
# N processes, one per GPU; without N, all the GPUs there are, or two processes on the CPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { echo "usage: launch/local.sh RUN.yaml [N] [section.key=value ...]" >&2; exit 2; }
run=$1
shift
processes=
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
command -v deepspeed >/dev/null || { echo "local.sh: no deepspeed command here; run ./launch/setup.sh quickstart first" >&2; exit 2; }

# How many accelerators there are, and the variable that chooses among them.
read -r devices visible < <(python -c 'from deepspeed.accelerator import get_accelerator
a = get_accelerator()
print(2 if a.device_name() == "cpu" else a.device_count(), a.visible_devices_envs()[0])' | tail -n 1)
processes=${processes:-$devices}
if [ -n "${!visible:-}" ]; then
  # The launcher starts one process per device that the variable names, and would ignore it beside --num_gpus.
  export "$visible=$(cut -d, -f"1-$processes" <<<"${!visible}")"
  where=()
else
  where=(--num_gpus "$processes")
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# Processes that each take all cores slow each other down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((n = $(nproc) / (processes ? processes : 1)) > 1 ? n : 1))}
# SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask a run to stop with a checkpoint. DeepSpeed's launcher would end, or kill its processes
# after half a minute: it gets none of them. Its processes do, as SIGUSR1, which it inherits as ignored and they take.
set -m # a process group of its own
(
  trap '' USR1
  # An empty hostfile path keeps a cluster's /job/hostfile out: this machine alone.
  exec deepspeed --hostfile /dev/null --no_local_rank "${where[@]}" --master_port "$port" \
    --module cola_ds train "$run" "$@"
) &
group=$!
set +m
workers='-m cola_ds train' # before there is one, the launcher can be ended
trap 'again=1; if pgrep -g "$group" -f -- "$workers" >/dev/null; then kill -USR1 -- "-$group"; else kill -- "-$group"; fi' TERM INT USR1 USR2
again=1
while [ -n "$again" ]; do # a signal interrupts wait
  again=
  status=0
  wait "$group" || status=$?
done
exit "$status"
