#!/usr/bin/env bash
# Build what is uploaded into dist/, and try it away from the repository.
#   bash .dev_scripts/release.sh
# (or `make release`, which sets up the environment whose torch and toolboxes try the
# wheel). It uploads nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() { echo "release: $*" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

version=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" lska_mm/__init__.py)
[ -z "$(git status --porcelain)" ] || stop "commit first, git status names what is not"
grep -q "^## $version - " CHANGELOG.md || stop "CHANGELOG.md has no section '## $version - DATE'"
grep -qx "version: $version" CITATION.cff || stop "CITATION.cff has another version than $version"

echo "release: build lska_mm $version"
python -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet --disable-pip-version-check --requirement requirements/release.txt
rm -rf dist build ./*.egg-info
"$work/tools/bin/python" -m build --outdir dist . >"$work/log" 2>&1 || { tail -30 "$work/log"; exit 1; }
"$work/tools/bin/twine" check --strict dist/*
wheel=$(echo dist/lska_mm-"$version"-*.whl)

echo "release: install $wheel into an empty environment"
python -m venv "$work/empty"
"$work/empty/bin/pip" install --quiet --disable-pip-version-check --no-deps "$wheel"
"$work/empty/bin/pip" --disable-pip-version-check show lska_mm | grep -E '^(Name|Version|License)'
site=$("$work/empty/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
git ls-files 'lska_mm/*.py' lska_mm/py.typed >"$work/expected"
# nuclei.py is for a clone alone, see setup.py.
git ls-files configs tools model-index.yml | grep -v /nuclei.py | sed 's|^|lska_mm/.mim/|' >>"$work/expected"
while read -r name; do
    cmp -s "$name" "$site/$name" || stop "$wheel lacks $name, or has another"
done <"$work/expected"
echo "release: all $(wc -l <"$work/expected") files of package, configs and tools are in it"

echo "release: build a detector with it, away from the repository"
cd "$work"
PYTHONPATH=$site python - "$site" "$version" <<'PYTHON'
import sys

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import lska_mm

site, version = sys.argv[1:]
assert lska_mm.__file__.startswith(site), lska_mm.__file__
assert lska_mm.__version__ == version, lska_mm.__version__
cfg = Config.fromfile(lska_mm.config('detection/mask-rcnn_lska-van-tiny_fpn_1x_coco.py'))
init_default_scope(cfg.default_scope)
cfg.model.backbone.init_cfg = None
backbone = MODELS.build(cfg.model).backbone
print(*(tuple(maps.shape) for maps in backbone(torch.zeros(1, 3, 64, 96))))
PYTHON
cd - >/dev/null
ls -l dist
echo "release: done; upload with: twine upload dist/*"
