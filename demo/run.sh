#!/usr/bin/env bash
# The main job on the embedded data: convert, train, test, infer, look.
#   bash demo/run.sh [arguments of train.py]
# (or `make demo`, which sets the environment up first). WORK_DIR=folder, by
# default work_dirs/demo, takes logs, checkpoints and pictures.
set -euo pipefail
cd "$(dirname "$0")/.."

config=demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py
work_dir=${WORK_DIR:-work_dirs/demo}

python tools/dataset_converters/nuclei.py --out data/nuclei
python tools/train.py "$config" --work-dir "$work_dir" "$@"
checkpoint=$(cat "$work_dir/last_checkpoint")
python tools/test.py "$config" "$checkpoint" --work-dir "$work_dir/test"
python demo/report.py "$config" "$checkpoint" --out "$work_dir"
