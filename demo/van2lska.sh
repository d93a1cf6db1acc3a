#!/usr/bin/env bash
# Do the weights of a VAN help an LSKA-VAN? A classifier of digits is trained
# with VAN's 2-D kernels, these are made products of 1-D ones, and the demo's
# segmentor starts from them and, by the same schedule, from random weights,
# with three seeds each; ends with a table.
#   bash demo/van2lska.sh [arguments of train.py, for the segmentors]
# Interrupted, it goes on with the first training that did not end. WORK_DIR and
# CLASSIFIER_ARGS (arguments of train.py, for the classifier) may be set.
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) exec sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" ;; esac
cd "$(dirname "$0")/.."

out=${WORK_DIR:-work_dirs/van2lska}
digits=demo/lska-van-tiny_digits.py
nuclei=demo/lska-van-tiny_fpn_nuclei.py

train() { # config, work dir, arguments of train.py
    if [ ! -e "$2/done" ]; then
        python tools/train.py "$1" --work-dir "$2" "${@:3}"
        touch "$2/done"
    fi
}

python tools/dataset_converters/digits.py --out data/digits
python tools/dataset_converters/nuclei.py --out data/nuclei

# shellcheck disable=SC2086
train $digits "$out/classifier" ${CLASSIFIER_ARGS:-} --cfg-options model.backbone.attention=LKA
classifier=$(cat "$out/classifier/last_checkpoint")
python tools/model_converters/convert_checkpoint.py "$classifier" "$out/separated.pth" --separate |
    tee "$out/separated.txt"
separated=$(sed -n 's/^written to //p' "$out/separated.txt")
python tools/test.py $digits "$classifier" --work-dir "$out/test/LKA" \
    --cfg-options model.backbone.attention=LKA
python tools/test.py $digits "$separated" --work-dir "$out/test/separated"

for seed in 0 1 2; do
    train $nuclei "$out/segmentor/random/seed-$seed" "$@" \
        --cfg-options randomness.seed=$seed
    train $nuclei "$out/segmentor/separated/seed-$seed" "$@" \
        --cfg-options randomness.seed=$seed load_from="$separated"
done
python .dev_scripts/seeds.py "$out"/segmentor/*/ --metrics mIoU
