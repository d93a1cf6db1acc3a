#!/usr/bin/env bash
# Does a classifier look at shape or texture, and where? Classifiers with kernel sizes 7
# and 53 are trained on striped digits, by the same schedule, and tested on digits with
# the stripes of another class; ends with shape_bias.png and, of one such digit, cam.png in
# WORK_DIR (work_dirs/shape_bias).
#   bash demo/shape_bias.sh [arguments of train.py]
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) exec sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" ;; esac
cd "$(dirname "$0")/.."

out=${WORK_DIR:-work_dirs/shape_bias}
data=data/cue-conflict-digits
config=lska-van-tiny_cue-conflict.py
vis_cam=$(python -c 'import mmpretrain; print(mmpretrain.__path__[0])')/.mim/tools/visualization/vis_cam.py

python .dev_scripts/cue_conflict.py --out $data
image=$(find $data/conflict/elephant -name '*.png' | sort | head -1)
for k in 7 53; do
    python tools/train.py demo/$config --work-dir "$out/k$k" "$@" \
        --cfg-options model.backbone.kernel_size=$k
    # The config as it was trained lies beside the checkpoint.
    trained=("$out/k$k/$config" "$(cat "$out/k$k/last_checkpoint")")
    python tools/test.py "${trained[@]}" --work-dir "$out/k$k/test" \
        --cfg-options test_evaluator.csv_dir="$out/csv" test_evaluator.model_name=k$k
    python "$vis_cam" "$image" "${trained[@]}" --target-layers backbone.block3.4 \
        --save-path "$out/cam_k$k.png"
done
python .dev_scripts/panels.py "$image" 'a six with the stripes of a nine' \
    "$out/cam_k7.png" 'kernels of 7' "$out/cam_k53.png" 'kernels of 53' --out "$out/cam.png"
python .dev_scripts/shape_bias.py "$out"/csv/*.csv --out "$out/shape_bias.png"
