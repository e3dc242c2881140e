#!/usr/bin/env bash
# vipo train on a Slurm cluster, one process per GPU, which Slurm starts and signals itself:
#
#   sbatch recipes/engines/slurm.sh /shared/runs/flux flux1-dev-vipo-hpsv2 training.sharding=fsdp2 prompts.per_iteration=16
#
# The first word is the run's folder, on a disk that every node sees; the others are those of `vipo train`. 15 minutes
# before the time is up every process is asked to stop: the iteration is finished and saved, and the job goes back into
# the queue, from where it goes on. Ask for more minutes if `vipo plan` says that an iteration is longer.
#SBATCH --job-name=vipo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
STOPPED=130  # vipo's exit code for a run that was asked to stop and was saved
[ $# -ge 2 ] || { echo "usage: sbatch slurm.sh OUTPUT RECIPE [KEY=VALUE ...]" >&2; exit 2; }
output=$1
shift

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
going_on=()
[ -f "$output/metrics.jsonl" ] && going_on=(--resume)

# shellcheck disable=SC2016  # the variables are each task's own
srun --kill-on-bad-exit=1 bash -c \
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python -m vipo train "$@"' \
    vipo "$@" --output "$output" "${going_on[@]}"
code=$?
[ "$code" -eq "$STOPPED" ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
