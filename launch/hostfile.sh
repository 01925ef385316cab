#!/usr/bin/env bash
# Starts a run on several machines over ssh, with DeepSpeed's launcher and a hostfile of lines such as "node1 slots=8":
#   ./launch/hostfile.sh RUN.yaml HOSTFILE [section.key=value ...]
# One process per slot. All machines see this folder, and RUN.yaml, at the same place, and let each other in without a password.
# MASTER_PORT: a port on the first machine (default: one that is free there). Needs pdsh on this machine.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || fail "usage: launch/hostfile.sh RUN.yaml HOSTFILE [section.key=value ...]"
run=$1 hostfile=$2
shift 2
[ -f "$run" ] || fail "there is no $run"
[ -f "$hostfile" ] || fail "there is no hostfile $hostfile; write one line per machine, such as: node1 slots=8"
command -v pdsh >/dev/null || fail "there is no pdsh here; apt-get install pdsh, or use launch/mpirun.sh or launch/torchrun.sh"
entry='^[[:space:]]*([^[:space:]#]+)[[:space:]]+slots=([0-9]+)[[:space:]]*(#.*)?$'
hosts=() slots=0
while IFS= read -r line || [ -n "$line" ]; do
  if [[ $line =~ $entry ]]; then
    case " ${hosts[*]:-} " in *" ${BASH_REMATCH[1]} "*) fail "$hostfile names ${BASH_REMATCH[1]} twice; give each machine one line" ;; esac
    hosts+=("${BASH_REMATCH[1]}")
    slots=$((BASH_REMATCH[2] > slots ? BASH_REMATCH[2] : slots))
  elif ! [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then
    fail "$hostfile has the line \"$line\"; a line looks like: node1 slots=8"
  fi
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || fail "$hostfile names no machine; write one line per machine, such as: node1 slots=8"

# What DeepSpeed's launcher would find out one traceback or one silent hour later.
python=$(command -v python)
ssh=(ssh -o BatchMode=yes -o ConnectTimeout=10)
for host in "${hosts[@]}"; do
  port=$("${ssh[@]}" "$host" "cd $(printf %q "$PWD") && test -f $(printf %q "$run") || exit 3; $(printf %q "$python") -c '
from cola_ds.distributed.launcher import free_port; print(free_port())'" 2>/dev/null) && status=0 || status=$?
  case $status in
    0) [ "$host" != "${hosts[0]}" ] || free_port=$port ;;
    3) fail "$host does not see $PWD with $run; put both on a file system that all machines share" ;;
    255) fail "$host in $hostfile is not reached over ssh without a password; try: ssh $host true" ;;
    *) fail "$host cannot run $python; install the environment where all machines see it" ;;
  esac
done
port=${MASTER_PORT:-$free_port}

OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads "$slots")}
export OMP_NUM_THREADS
# pdsh takes along the variables that this file names, beside PYTHON* and the accelerator's own.
forwarding=$(mktemp)
trap 'rm -f "$forwarding"' EXIT
for file in ~/.deepspeed_env .deepspeed_env; do [ ! -f "$file" ] || cat "$file"; done >"$forwarding"
for name in $(forwarded); do printf '%s=%q\n' "$name" "${!name}"; done >>"$forwarding"

# A signal to any process of the run stops all of them with a checkpoint; pdsh would only cut them off.
stop_run() { "${ssh[@]}" "${hosts[0]}" "pkill -USR1 -f -- '[-]m cola_ds train $run( |\$)'" || kill -- "-$group"; }
export DS_ENV_FILE=$forwarding
run_launcher deepspeed --hostfile "$hostfile" --force_multi --no_local_rank --master_port "$port" \
  --module cola_ds train "$run" "$@"
