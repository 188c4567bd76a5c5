#!/usr/bin/env bash
# Fine-tune on the GPUs of several machines under Slurm, as scripts/finetune_multi_gpu.sh does on one. Submit it from
# the folder of the repository, which all machines share, as they do the output:
#
#   MODEL_PATH=Qwen/Qwen2.5-7B-Instruct DATA_PATH=my_data.json sbatch -N 2 scripts/finetune_slurm.sh
#
# Before its time is over, and when it is preempted, Slurm sends SIGTERM: the run stops after its step with a checkpoint.
# Submitted again (or requeued by Slurm) it goes on there.
#
# Card: as for finetune_multi_gpu.sh. Time: nearly that of one machine divided by their number, where the network is
# fast (estimated, not measured). No cluster has run this yet; the tests start it with local processes.
# Outside of Slurm it is finetune_multi_gpu.sh. N_GPUS: cards per machine, where Slurm does not say.
# Words after the script go to finetune.py and win.
#SBATCH --job-name=onecard
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
root="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"  # Slurm runs a copy of this file
[ -f "$root/scripts/finetune_multi_gpu.sh" ] || { echo "error: submit this from the repository's folder" >&2; exit 1; }
[ -n "${SLURM_JOB_ID:-}" ] || exec bash "$root/scripts/finetune_multi_gpu.sh" "$@"

export N_GPUS="${N_GPUS:-${SLURM_GPUS_ON_NODE:-1}}"
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
# shellcheck disable=SC2016  # the node's number is known on the node
exec srun --wait=600 bash -c '
    export TORCHRUN_OPTIONS="--nnodes $SLURM_JOB_NUM_NODES --node_rank $SLURM_NODEID"
    TORCHRUN_OPTIONS+=" --master_addr $MASTER_ADDR --master_port $MASTER_PORT"
    exec bash "$@"' slurm-node "$root/scripts/finetune_multi_gpu.sh" "$@"
