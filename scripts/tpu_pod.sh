#!/usr/bin/env bash
# One run of run.py on all hosts of a TPU pod slice, from a machine that has gcloud:
#
#     TPU=my-pod ZONE=us-central2-b scripts/tpu_pod.sh \
#         --experiment=train_generator --family=dcgan --dataset=celeb_a --batch_size=128 \
#         --workdir=/mnt/shared/runs/dcgan
#
# The repository lies in FLIPAD_DIR on every host, installed into its .venv together with JAX for TPU
# (pip install 'jax[tpu]'). JAX finds out which host is which. The workdir must be on a file system
# that all hosts see (Filestore, a mounted bucket). After a preemption the same command goes on.
set -euo pipefail
: "${TPU:?the name of the TPU pod slice}" "${ZONE:?its zone}"
if [ $# -eq 0 ]; then
  echo "usage: TPU=NAME ZONE=ZONE $0 FLAGS OF run.py" >&2
  exit 2
fi

arguments=$(printf '%q ' "$@")
# Quoted for the remote shell; where the repository lies is for the remote shell to know.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ${FLIPAD_DIR:-flipad_jax} && .venv/bin/python run.py --coordinator_address=auto $arguments"
