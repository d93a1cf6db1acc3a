#!/usr/bin/env bash
# How far do trained kernels see, and what do their gates look at? The demo's
# segmentor is trained with kernel sizes 7, 23 and 53 by the same schedule; ends
# with erf.png and attention.png in WORK_DIR (work_dirs/kernels).
#   bash demo/kernels.sh [arguments of train.py]
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) exec sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" ;; esac
cd "$(dirname "$0")/.."

out=${WORK_DIR:-work_dirs/kernels}
config=lska-van-tiny_fpn_nuclei.py

python tools/dataset_converters/nuclei.py --out data/nuclei
models=()
for k in 7 23 53; do
    python tools/train.py demo/$config --work-dir "$out/k$k" "$@" \
        --cfg-options model.backbone.kernel_size=$k
    # The config as it was trained lies beside the checkpoint.
    models+=(--model "$out/k$k/$config" "$(cat "$out/k$k/last_checkpoint")")
done
python tools/visualization/erf.py "${models[@]}" --images data/nuclei/ade/images --out "$out/erf.png"
python tools/visualization/attention.py "$out/k23/$config" "$(cat "$out/k23/last_checkpoint")" \
    demo/nuclei/image.png --out "$out/attention.png"
