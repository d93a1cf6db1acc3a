#!/usr/bin/env bash
# Train on several GPUs, or in several CPU processes where there is no GPU.
#   bash tools/dist_train.sh CONFIG GPUS [arguments of train.py]
# On several machines, on each: NNODES=2 NODE_RANK=0 MASTER_ADDR=host bash ...
# MAX_RESTARTS=3 restarts the processes after an error; with --resume they
# continue from the last checkpoint.
set -euo pipefail
if [ $# -lt 2 ] || [[ ! $2 =~ ^([1-9][0-9]*|auto|cpu|gpu)$ ]]; then
    echo "usage: bash $0 CONFIG GPUS [arguments of train.py], GPUS a number" >&2
    exit 2
fi

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    --max_restarts="${MAX_RESTARTS:-0}" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
