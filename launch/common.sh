#!/usr/bin/env bash
# Sourced by the scripts that start runs: the environment, and what they share.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "$(basename "$0"): $1" >&2; exit 2; }

if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
command -v deepspeed >/dev/null || fail "no deepspeed command here; run ./launch/setup.sh quickstart first"

# How many processes this machine takes: one per accelerator, or two on the CPU. And the variable that chooses among accelerators.
devices() {
  python -c 'from deepspeed.accelerator import get_accelerator
a = get_accelerator()
print(2 if a.device_name() == "cpu" else a.device_count(), a.visible_devices_envs()[0], a.device_name())' | tail -n 1
}

# Processes of an example whose batch divides over one or two: as many as there are accelerators, at most two.
one_or_two() {
  local found
  read -r found _ < <(devices)
  echo $((found < 2 ? found : 2))
}

# Cores for each of N processes of a machine: processes that each take all cores slow each other down.
threads() { echo $(((n = $(nproc) / ($1 ? $1 : 1)) > 1 ? n : 1)); }

# Names of variables that a run on other machines needs as well. HF_TOKEN is not among them: it would be read from command lines.
forwarded() { compgen -e | grep -E '^(OMP_NUM_THREADS|TORCH_EXTENSIONS_DIR|DS_ACCELERATOR|(HF|NCCL|GLOO|CCL|TORCH_NCCL)_.*)$' | grep -v TOKEN || true; }

# Runs a launcher in a process group of its own, and turns the signals that this script gets into `stop_run`, which the caller
# defines: the launchers themselves would end, or kill their processes soon after. Returns the launcher's status.
run_launcher() {
  set -m
  (
    trap '' USR1
    exec "$@"
  ) &
  group=$!
  set +m
  trap 'again=1; stop_run' TERM INT USR1 USR2
  again=1
  local status
  while [ -n "$again" ]; do # a signal interrupts wait
    again=
    status=0
    wait "$group" || status=$?
  done
  return "$status"
}
