#!/usr/bin/env bash
# The ranks of one node, under accelerate. Called on every node by slurm.sbatch, local.sh and the Kubernetes manifest.
#   NODES=2 NODE=0 HEAD=10.0.0.1 [PORT=29500] [PROCESSES=1] [ENGINE=ddp] [GRACE=120] [MEET=900]
#     launch/node.sh CONFIG... [section.key=value ...]
# NODES: how many there are; NODE: which this one is, from 0; HEAD: name or address of node 0, PORT: a free one there.
# PROCESSES: of this node, one for each GPU. ENGINE: of launch/ENGINE.yaml. GRACE: seconds for saving after SIGTERM.
# MEET: seconds within which all nodes must have found each other, of which one may have an image to fetch.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?how many nodes there are}" "${NODE:?which of them this is, from 0}" "${HEAD:?the address of node 0}"
processes=${PROCESSES:-1} engine=${ENGINE:-ddp}
[ -f "launch/$engine.yaml" ] || { echo "ENGINE $engine: there is no launch/$engine.yaml" >&2; exit 2; }
[ "$engine" != single ] || [ $((NODES * processes)) = 1 ] ||
  { echo "ENGINE single: has one process, not $NODES nodes of $processes; choose ddp" >&2; exit 2; }

# The interface through which another node is reached: gloo and NCCL guess by host name, which is often a loopback's.
if [ "$NODES" -gt 1 ] && type ip > /dev/null 2>&1; then
  peer=$HEAD
  [ "$NODE" != 0 ] || peer=${NEXT:-}  # node 0 looks for another one, if it is told of one
  if [ -n "$peer" ] && address=$(getent ahostsv4 "$peer" | head -n 1 | cut -d ' ' -f 1) && [ -n "$address" ]; then
    interface=$(ip -4 -o route get "$address" | grep -o 'dev [^ ]*' | cut -d ' ' -f 2)
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
  fi
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-120}  # the launcher's own 30 seconds are short for a save
trap '' USR1  # until somebody listens for it: an ignored signal stays so over exec
# One process needs no launcher, and accelerate's for one would die of SIGTERM before it.
[ "$engine" != single ] || exec aaae train "$@"
# It is to pass SIGUSR1 on, which it would die of, leaving its ranks behind; some clusters send it to this process alone.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
options=(--config_file "launch/$engine.yaml" --num_processes $((NODES * processes)))
if [ "$NODES" -gt 1 ]; then
  options+=(--num_machines "$NODES" --machine_rank "$NODE" --main_process_ip "$HEAD" --main_process_port "${PORT:-29500}")
  options+=(--rdzv_backend static --rdzv_conf "timeout=${MEET:-900}" --same_network)
fi
exec accelerate launch "${options[@]}" -m aaae_dist train "$@"
