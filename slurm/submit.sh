#!/usr/bin/env bash
# Submits a run as a Slurm job that comes back after its time limit, and goes on:
#   ./slurm/submit.sh [options] RUN.yaml [section.key=value ...]
#
#   --nodes N              nodes; MIN-MAX: MAX, and the job goes on with fewer, down to MIN, when nodes are lost (1)
#   --gpus N               GPUs per node, each with one process
#   --device NAME, --memory SIZE   what each of them is and has, for the plan that --dry-run prints (H100, 80GiB)
#   --tasks N              processes per node where there are no GPUs (2)
#   --cpus N               cores per process
#   --time T               time limit, as sbatch takes it
#   --partition P  --account A  --qos Q
#   --signal NAME@SECONDS  how the run is told to stop before its time limit (USR1@300; USR2 where NCCL catches USR1)
#   --max-restarts N       how often the job may be queued again (50)
#   --setup LINE           a line that the job runs first, such as 'module load cuda' (may be repeated)
#   --container IMAGE      run in this image (Pyxis); --mounts as Pyxis takes them (this folder and the run's)
#   --local-model DIR      copy the model's folder to DIR on each node's own disk, and read it there
#   --offline              nothing is fetched from the Hugging Face hub
#   --fresh                the first start removes what an earlier run left in run.dir
#   --sbatch OPTION        any other option of sbatch's (may be repeated)
#   --dry-run              check the run, print the sbatch command and, with --gpus, what `cola-ds plan` says; write nothing
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../launch/common.sh
source "$here/../launch/common.sh"

# shellcheck disable=SC2034 # job.env gets some of them by their names
nodes=1 gpus='' tasks='' signal=USR1@300 max_restarts=50 setup=() container='' mounts='' local_model='' offline='' fresh='' dry_run=''
options=() planned=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --offline | --fresh | --dry-run) ;;
    *) [ $# -ge 2 ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --nodes) nodes=$2 ;;
    --gpus) gpus=$2 ;;
    --device | --memory) planned+=("$1" "$2") ;;
    --tasks) tasks=$2 ;;
    --cpus) options+=(--cpus-per-task="$2") ;;
    --time | --partition | --account | --qos) options+=("$1=$2") ;;
    --signal) signal=$2 ;;
    --max-restarts) max_restarts=$2 ;;
    --setup) setup+=("$2") ;;
    --container) container=$2 ;;
    --mounts) mounts=$2 ;;
    --local-model) local_model=$2 ;;
    --sbatch) options+=("$2") ;;
    --offline | --fresh | --dry-run) declare "$(tr - _ <<<"${1#--}")=1" ;;
    *) fail "unknown option $1; --help lists them all" ;;
  esac
  case $1 in --offline | --fresh | --dry-run) shift ;; *) shift 2 ;; esac
done
[ $# -ge 1 ] || fail "usage: slurm/submit.sh [options] RUN.yaml [section.key=value ...]"
[[ $nodes =~ ^([1-9][0-9]*)(-([1-9][0-9]*))?$ ]] || fail "--nodes $nodes must be a number, or MIN-MAX"
counts=("${BASH_REMATCH[1]}" "${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}")
[ "${counts[0]}" -le "${counts[1]}" ] || fail "--nodes $nodes: the first number must not be the larger"
[ -z "$gpus" ] || [ -z "$tasks" ] || fail "--gpus and --tasks contradict each other: a GPU has one process"
[ -n "$gpus" ] || [ ${#planned[@]} -eq 0 ] || fail "${planned[0]} is of the GPUs that --gpus asks for: say how many"
per_node=${gpus:-${tasks:-2}}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "--gpus and --tasks take a number from 1; it is $per_node"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts $max_restarts must be a number"
[[ $signal =~ ^(USR1|USR2|TERM)@[0-9]+$ ]] || fail "--signal $signal must look like USR1@300: USR1, USR2 or TERM, and seconds before the time limit"
[ -n "$dry_run" ] || command -v sbatch >/dev/null || fail "there is no sbatch here; submit from a login node of a Slurm cluster, or look with --dry-run"
[ -z "$gpus" ] || options+=(--gpus-per-node="$gpus")

# Everything that can be checked without a node, for as few and as many processes as there may be.
for count in $(seq "${counts[0]}" "${counts[1]}"); do
  summary=$(python -m cola_ds train "$@" --dry-run --processes $((count * per_node)))
done
echo "$summary"
if [ -n "$dry_run" ] && [ -n "$gpus" ]; then
  printf '\nOn GPUs like these (--device, --memory):\n'
  python -m cola_ds plan "$@" --nodes "${counts[1]}" --gpus "$gpus" "${planned[@]}"
fi
field() { sed -n "s/^$1  *//p" <<<"$summary"; }
run_dir=$(realpath -m "$(field 'run folder')")
model=$(field model | sed 's/ ([a-z0-9]*), [0-9,]* parameters$//')
if [ -n "$local_model" ]; then
  [ -d "$model" ] || fail "--local-model copies a folder, and model.path $model is a name on the hub; fetch it first: hf download $model --local-dir models/..."
  # Another model of that name, or a newer one, is another folder.
  local_model=$local_model/$(basename "$model")-$(cd "$model" && find -L . -type f -printf '%P %s %T@\n' | sort | sha256sum | cut -c1-12)
fi

folder=$run_dir/slurm/$(date +%Y%m%d-%H%M%S)-$$
[ "${counts[0]}" = "${counts[1]}" ] || options+=(--no-kill)
command=(sbatch --nodes="${counts[1]}" --ntasks-per-node="$per_node" --signal="$signal" --chdir="$PWD"
  --output="$folder/job-%j.log" "${options[@]}" "$folder/train.sbatch" "$folder")
if [ -z "$dry_run" ]; then
  python -m cola_ds train "$@" --freeze "$folder"
  cp "$here/train.sbatch" "$folder/train.sbatch"
  {
    echo "# What submit.sh was told; train.sbatch reads it."
    echo "processes_per_node=$per_node min_nodes=${counts[0]}"
    if [ -n "$container" ]; then echo python=python; else printf 'python=%q\n' "$(command -v python)"; fi
    mounts=${mounts:-$PWD:$PWD,$run_dir:$run_dir}
    for name in run_dir model max_restarts container mounts local_model offline fresh; do
      printf '%s=%q\n' "$name" "${!name}"
    done
    printf 'setup=('
    [ ${#setup[@]} -eq 0 ] || printf '%q ' "${setup[@]}"
    echo ')'
  } >"$folder/job.env"
fi
printf '%q ' "${command[@]}"
echo
[ -z "$dry_run" ] || exit 0
"${command[@]}"
echo "logs: $folder/logs/latest/ (one a process) and $folder/job-*.log"
