#!/usr/bin/env bash
# A slice of Cloud TPU hosts (v4, v5e, v5p, v6e): the same command on every host, which JAX joins to one run.
#
#   export TPU_NAME=pod ZONE=us-east5-a PROJECT_ID=my-project
#   experiments/launch/tpu_pod.sh create v5p-32 v2-alpha-tpuv5    # accelerator type and runtime version
#   experiments/launch/tpu_pod.sh install https://github.com/me/diffjax.git
#   experiments/launch/tpu_pod.sh start train --config=configs/digits.py --workdir=/mnt/shared/runs/digits
#   experiments/launch/tpu_pod.sh log          # the last lines of worker 0; log all: of every worker
#   experiments/launch/tpu_pod.sh stop         # saves at one step and ends; start goes on from there
#   experiments/launch/tpu_pod.sh delete
#
# TPU_NAME, ZONE   of the slice. PROJECT_ID: default that of gcloud.
# FOLDER           of the checkout on each host; default diffjax, in the home folder.
# GCLOUD           the program; default gcloud.
#
# --workdir must be a mounted file system that all hosts see, such as Filestore over NFS; a bucket address will not do.
# Each host runs local.sh, which starts its process again after 75 or a signal, so that the hosts meet again by
# themselves when one process was lost. A host that Google takes away (spot, maintenance) takes the slice along: create,
# install and start again, and the run goes on from its last checkpoint.
set -eu

gcloud=${GCLOUD:-gcloud} folder=${FOLDER:-diffjax}

tpu() {
  local verb=$1
  shift
  "$gcloud" compute tpus tpu-vm "$verb" "${TPU_NAME:?set TPU_NAME}" --zone="${ZONE:?set ZONE}" \
    ${PROJECT_ID:+--project="$PROJECT_ID"} "$@"
}

on() { # on WORKERS COMMAND
  tpu ssh --worker="$1" --command="$2"
}

verb=${1:-}
if (($#)); then shift; fi
case $verb in
  create)
    tpu create --accelerator-type="${1:?accelerator type}" --version="${2:?runtime version}"
    ;;
  install)
    on all "git clone ${1:?address of the repository} $folder && cd $folder && python3 -m venv .venv && \
.venv/bin/pip install --quiet 'jax[tpu]' --editable ."
    ;;
  start)
    command=$(printf ' %q' "$@")
    on all "cd $folder && export DIFFJAX='.venv/bin/python -m diffjax' && \
{ nohup bash experiments/launch/local.sh$command >> diffjax.log 2>&1 < /dev/null & echo \$! > diffjax.pid; }"
    ;;
  log)
    on "${1:-0}" "tail -n 30 $folder/diffjax.log"
    ;;
  stop)
    on all "kill -TERM \$(cat $folder/diffjax.pid)"
    ;;
  delete)
    tpu delete
    ;;
  *)
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0" >&2
    exit 2
    ;;
esac
