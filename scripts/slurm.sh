#!/usr/bin/env bash
# One run of run.py over all GPUs of a Slurm job, one process per GPU:
#
#     sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm.sh \
#         --experiment=train_generator --family=dcgan --dataset=celeb_a --batch_size=128 \
#         --workdir=/shared/runs/dcgan
#
# JAX finds out from Slurm which process is which, and gives every process the GPU of its number.
# The workdir must be on a file system that all nodes see. The run is told to stop two minutes before
# its time is over; it saves and leaves, and the job is queued again and goes on there.
#SBATCH --job-name=flipad
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# sbatch runs a copy of this file; the repository is where the job was submitted.
cd "${FLIPAD_DIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"

# Proxies keep the processes of some clusters from finding each other.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY

code=0
srun --kill-on-bad-exit=1 "${VENV:-.venv}/bin/python" run.py --coordinator_address=auto "$@" || code=$?
if [ "$code" -eq 143 ]; then  # Stopped, and saved what it goes on from.
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
