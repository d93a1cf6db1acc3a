#!/usr/bin/env bash
# Do weights for three channels help with images of four bands? The segmentor of
# lska-van-tiny_fpn_nuclei-4bands.py from the weights of the demo's segmentor and, by the
# same schedule, from random weights, with three seeds each; ends with a table.
#   make demo TASK=segmentation; bash demo/bands.sh [arguments of train.py]
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) exec sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" ;; esac
cd "$(dirname "$0")/.."

out=${WORK_DIR:-work_dirs/bands}
config=demo/lska-van-tiny_fpn_nuclei-4bands.py
segmentor=${SEGMENTOR:-$(cat work_dirs/demo-segmentation/last_checkpoint)}
short=(train_cfg.max_iters=40 train_cfg.val_interval=10 param_scheduler.0.end=40
    default_hooks.checkpoint.interval=40)

python tools/dataset_converters/nuclei.py --out data/nuclei --formats bands
for seed in 0 1 2; do
    python tools/train.py "$config" --work-dir "$out/random/seed-$seed" "$@" \
        --cfg-options randomness.seed=$seed "${short[@]}" model.backbone.init_cfg=None
    python tools/train.py "$config" --work-dir "$out/resized/seed-$seed" "$@" \
        --cfg-options randomness.seed=$seed "${short[@]}" \
        model.backbone.init_cfg.checkpoint="$segmentor"
done
python .dev_scripts/seeds.py "$out"/*/ --metrics mIoU
