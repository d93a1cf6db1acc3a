#!/usr/bin/env bash
# Create the virtual environment that `make demo` and `make test` run in.
#
#   bash requirements/install.sh STACK VENV
#
# STACK names a file of pins beside this script: onedl, openmmlab or newest. mmcv is a
# source package: compiling its ops takes many minutes on two cores, once;
# pip caches the wheel. It must see the environment's torch while it builds
# (--no-build-isolation), otherwise it installs without its ops and says nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
stack=$1
venv=$2
pins=$here/$stack.txt
python=${PYTHON:-python3.11}

stop() { echo "setup: $*" >&2; exit 1; }

[ -f "$pins" ] || stop "unknown STACK=$stack; use one of: onedl openmmlab newest"
command -v "$python" >/dev/null ||
    stop "$python not found; install Python 3.11 or name it: make PYTHON=/path/to/python3.11 ..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.10 | 3.11 | 3.12) ;;
    *) stop "the pinned stacks are for Python 3.10 to 3.12, $python is $version; name another: make PYTHON=/path/to/python3.11 ..." ;;
esac
"$python" -c 'import ensurepip' 2>/dev/null ||
    stop "$python cannot make virtual environments; apt-get install python$version-venv"
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    stop "Python.h is missing, mmcv cannot compile; apt-get install python$version-dev"
command -v g++ >/dev/null || stop "g++ is missing, mmcv cannot compile; apt-get install g++"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "setup: $stack stack into $venv"
grep -E '^(torch|torchvision|setuptools|numpy)[=<>]' "$pins" >"$venv/first.txt"
pip install --quiet --requirement "$venv/first.txt" wheel ninja psutil packaging

# mmcv asks for C++17, torch from 2.14 on for C++20: the compiler obeys the last.
# pip's cache would mix such a wheel up with that of another torch.
headers=$("$venv/bin/python" -c 'import torch; print(torch.__path__[0])')/include
if grep -qs 'C++20 or later' "$headers/ATen/ATen.h"; then
    printf '#!/bin/sh\nexec g++ "$@" -std=c++20\n' >"$venv/bin/g++-20"
    chmod +x "$venv/bin/g++-20"
    export CXX=$(cd "$venv" && pwd)/bin/g++-20 PIP_NO_CACHE_DIR=1
fi

# Python's own flags ask for debug information, which takes two fifths of the time;
# CPPFLAGS is what setuptools adds to them.
export CPPFLAGS="${CPPFLAGS:-} -g0"

mmcv=$(grep -E '^(onedl-)?mmcv==' "$pins")
log=$venv/mmcv-build.log
echo "setup: $mmcv (the first time compiled from source, many minutes; log: $log)"
# Of the log only the compiler's progress is shown, "[12/78]".
MMCV_WITH_OPS=1 pip install --verbose --no-build-isolation \
    --constraint "$pins" "$mmcv" > >(tee "$log" |
        grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]' |
        sed --unbuffered 's/^ */setup: mmcv /') 2>&1 ||
    stop "mmcv did not install; the reason is at the end of $log"

pip install --quiet --requirement "$pins" --requirement "$here/tests.txt"
case $stack in
    onedl)
        pip install --quiet --no-deps --no-build-isolation --requirement "$here/mmrotate.txt"
        pip install --quiet --constraint "$pins" --requirement "$here/mim.txt"
        ;;
    openmmlab) pip install --quiet --no-deps --requirement "$here/mmdeploy.txt" ;;
esac
pip install --quiet --no-build-isolation --no-deps --editable "$here/.."

"$venv/bin/python" -c 'import cv2' ||
    stop "OpenCV does not load; apt-get install libgl1 libglib2.0-0"
"$venv/bin/python" -c 'from mmcv.ops import nms' ||
    stop "mmcv came without its compiled ops, perhaps from pip's cache; run '$venv/bin/pip cache remove \"*mmcv*\"', delete $venv, and try again"
echo "setup: done"
