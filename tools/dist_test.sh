#!/usr/bin/env bash
# Test on several GPUs, or in several CPU processes where there is no GPU.
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
# On several machines, on each: NNODES=2 NODE_RANK=0 MASTER_ADDR=host bash ...
set -euo pipefail
if [ $# -lt 3 ] || [[ ! $3 =~ ^([1-9][0-9]*|auto|cpu|gpu)$ ]]; then
    echo "usage: bash $0 CONFIG CHECKPOINT GPUS [arguments of test.py], GPUS a number" >&2
    exit 2
fi

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
