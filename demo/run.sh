#!/usr/bin/env bash
# A task of the demo on its embedded data: convert, train, test, infer, look.
#   TASK=detection bash demo/run.sh [arguments of train.py]
# (or `make demo TASK=...`, which sets the environment up first). TASK is
# detection (default), segmentation or classification; WORK_DIR=folder, by
# default work_dirs/demo-TASK, takes logs, checkpoints and pictures.
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) exec sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" ;; esac
cd "$(dirname "$0")/.."

task=${TASK:-detection}
case $task in
    detection) data=nuclei config=demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py ;;
    segmentation) data=nuclei config=demo/lska-van-tiny_fpn_nuclei.py ;;
    classification) data=digits config=demo/lska-van-tiny_digits.py ;;
    *)
        echo "demo: unknown TASK=$task; one of: detection segmentation classification" >&2
        exit 2
        ;;
esac
work_dir=${WORK_DIR:-work_dirs/demo-$task}

python "tools/dataset_converters/$data.py" --out "data/$data"
python tools/train.py "$config" --work-dir "$work_dir" "$@"
checkpoint=$(cat "$work_dir/last_checkpoint")
python tools/test.py "$config" "$checkpoint" --work-dir "$work_dir/test"
python demo/report.py "$config" "$checkpoint" --out "$work_dir"
