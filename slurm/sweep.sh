#!/usr/bin/env bash
# Submits a sweep as two Slurm job arrays, one task a run: the search, and after it the rest of the seeds at what it has chosen:
#   ./slurm/sweep.sh [options] SWEEP.yaml [section.key=value ...]
# Again, with the same sweep: only what is missing or has failed.
#
#   --at-once K            how many runs at the same time
#   --nodes N              nodes of each run (1)
#   --gpus N               GPUs per node, each with one process
#   --tasks N              processes per node where there are no GPUs (2)
#   --cpus N               cores per process
#   --time T               time limit of each run, as sbatch takes it
#   --partition P  --account A  --qos Q
#   --signal NAME@SECONDS  how a run is told to stop before its time limit (USR1@300; USR2 where NCCL catches USR1)
#   --max-restarts N       how often a run may be queued again (50)
#   --setup LINE           a line that each task runs first, such as 'module load cuda' (may be repeated)
#   --launcher COMMAND     what starts a run there, with {run} for its YAML, instead of srun with one process per GPU or task
#   --offline              nothing is fetched from the Hugging Face hub
#   --sbatch OPTION        any other option of sbatch's (may be repeated)
#   --dry-run              check the sweep, print the runs and the sbatch commands, and write nothing
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../launch/common.sh
source "$here/../launch/common.sh"

nodes=1 gpus='' tasks='' signal=USR1@300 max_restarts=50 at_once='' setup=() launcher='' offline='' dry_run=''
options=()
# shellcheck disable=SC2034 # job.env gets some of them by their names
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --offline | --dry-run) ;;
    *) [ $# -ge 2 ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --at-once) at_once=$2 ;;
    --nodes) nodes=$2 ;;
    --gpus) gpus=$2 ;;
    --tasks) tasks=$2 ;;
    --cpus) options+=(--cpus-per-task="$2") ;;
    --time | --partition | --account | --qos) options+=("$1=$2") ;;
    --signal) signal=$2 ;;
    --max-restarts) max_restarts=$2 ;;
    --setup) setup+=("$2") ;;
    --launcher) launcher=$2 ;;
    --sbatch) options+=("$2") ;;
    --offline) offline=1 ;;
    --dry-run) dry_run=1 ;;
    *) fail "unknown option $1; --help lists them all" ;;
  esac
  case $1 in --offline | --dry-run) shift ;; *) shift 2 ;; esac
done
[ $# -ge 1 ] || fail "usage: slurm/sweep.sh [options] SWEEP.yaml [section.key=value ...]"
[ -z "$gpus" ] || [ -z "$tasks" ] || fail "--gpus and --tasks contradict each other: a GPU has one process"
per_node=${gpus:-${tasks:-2}}
for number in "$nodes" "$per_node" "${at_once:-1}"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--nodes, --gpus, --tasks and --at-once take a number from 1; it is $number"
done
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts $max_restarts must be a number"
[[ $signal =~ ^(USR1|USR2|TERM)@[0-9]+$ ]] || fail "--signal $signal must look like USR1@300: USR1, USR2 or TERM, and seconds before the time limit"
[ -n "$dry_run" ] || command -v sbatch >/dev/null || fail "there is no sbatch here; submit from a login node of a Slurm cluster, or look with --dry-run"
[ -z "$gpus" ] || options+=(--gpus-per-node="$gpus")

list=$(python -m cola_ds sweep "$@" --list)
[ -z "$dry_run" ] || echo "$list"
missing() { awk -v stage="$1" '$2 == stage && $3 != "finished" { print $1 }' <<<"$list" | paste -s -d,; }
search=$(missing search) rest=$(missing seeds)
if [ -z "$search$rest" ]; then
  echo "all of its runs have finished"
  exit 0
fi
# Slurm would refuse the array without a word of why.
limit=$(scontrol show config 2>/dev/null | sed -n 's/^MaxArraySize *= *//p') || true
beyond=$(awk -v limit="${limit:-0}" 'limit && $3 != "finished" && $1 != "#" && $1 >= limit { print $1 ", " $4; exit }' <<<"$list")
[ -z "$beyond" ] || fail "run $beyond, is beyond this cluster's arrays, whose MaxArraySize is $limit: divide the tasks or methods among several sweeps, each with its own dir (cola-ds report takes them all)"
folder=$(realpath -m "$(sed -n 's/^# folder //p' <<<"$list")")/slurm/$(date +%Y%m%d-%H%M%S)-$$
if [ -z "$dry_run" ]; then
  python -m cola_ds sweep "$@" --freeze "$folder"
  cp "$here/sweep.sbatch" "$folder/sweep.sbatch"
  {
    echo "# What sweep.sh was told; sweep.sbatch reads it."
    printf 'python=%q processes_per_node=%q\n' "$(command -v python)" "$per_node"
    for name in max_restarts launcher offline; do printf '%s=%q\n' "$name" "${!name}"; done
    printf 'setup=('
    [ ${#setup[@]} -eq 0 ] || printf '%q ' "${setup[@]}"
    echo ')'
  } >"$folder/job.env"
fi
# A launcher of one's own is no job step: sweep.sbatch passes the signal on to it.
common=(sbatch --parsable --nodes="$nodes" --ntasks-per-node="$per_node" --signal="${launcher:+B:}$signal" --chdir="$PWD"
  --output="$folder/job-%A_%a.log" "${options[@]}")

# submit INDICES [OPTION]: prints the command on stderr, and the job's number.
submit() {
  local command=("${common[@]}" --array="$1${at_once:+%$at_once}" "${@:2}" "$folder/sweep.sbatch" "$folder")
  {
    printf '%q ' "${command[@]}"
    echo
  } >&2
  if [ -n "$dry_run" ]; then echo JOB; else "${command[@]}" | cut -d';' -f1; fi
}
job=''
if [ -n "$search" ]; then
  job=$(submit "$search")
  echo "search: job $job"
fi
if [ -n "$rest" ]; then
  rest=$(submit "$rest" ${job:+"--dependency=afterany:$job"}) || fail "the rest of the seeds could not be submitted${job:+, the search has been}"
  echo "seeds: job $rest"
fi
echo "logs: $folder/job-*.log, and one beside each run's folder"
