#!/usr/bin/env bash
# Does a classifier of digits help to find nuclei? The demo's Mask R-CNN from
# random weights and, by the same schedule, from the demo's classifier, with
# three seeds each; ends with a table.
#   bash demo/pretraining.sh [arguments of train.py]
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) exec sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" ;; esac
cd "$(dirname "$0")/.."

out=${WORK_DIR:-work_dirs/pretraining}
config=demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py
classifier=${CLASSIFIER:-$(cat work_dirs/demo-classification/last_checkpoint)}

python tools/dataset_converters/nuclei.py --out data/nuclei
for seed in 0 1 2; do
    python tools/train.py "$config" --work-dir "$out/random/seed-$seed" "$@" \
        --cfg-options randomness.seed=$seed
    python tools/train.py "$config" --work-dir "$out/digits/seed-$seed" "$@" \
        --cfg-options randomness.seed=$seed load_from="$classifier"
done
python .dev_scripts/seeds.py "$out"/*/ --metrics coco/bbox_mAP coco/segm_mAP
