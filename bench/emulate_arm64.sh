#!/usr/bin/env bash
# What a Jetson's processor does, emulated: build the package on 64-bit Arm, test its NEON kernels, replay a bundle.
#
#   sudo bench/emulate_arm64.sh BUNDLE [FOLDER]
#
# Needs root (chroot), Debian's debootstrap, and qemu-user-static registered with binfmt_misc. Emulation is about 60 times
# slower: give it a small bundle (metaembed-export --model demo --budget 8,16 --parity quick -o out). FOLDER is made and kept.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1/bundle.json" ]; then
    echo "usage: $0 BUNDLE [FOLDER]; BUNDLE is a folder that metaembed-export wrote" >&2
    exit 2
fi
source=$(cd "$(dirname "$0")/.." && pwd)
bundle=$(realpath "$1")
folder=$(realpath -m "${2:-arm64}")
root=$folder/root
PIP=${PIP:-python3 -m pip}
if [ -e "$folder" ]; then
    echo "$folder exists; name another or remove it" >&2
    exit 2
fi

mkdir -p "$folder"
debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,python3-dev,gcc,libc6-dev bookworm "$root" \
    "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$folder/debootstrap.log"
for package in "$root"/var/cache/apt/archives/*.deb; do # unpacked is enough: nothing is configured, no service runs
    dpkg -x "$package" "$root"
done

# This machine's pip fetches the wheels for Arm; on Arm, pip only builds ours.
$PIP install --quiet --target "$root/site" --only-binary=:all: --implementation cp --python-version 3.11 \
    --abi cp311 --abi abi3 --abi none --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    ml-dtypes numpy onnxruntime pillow safetensors tokenizers tqdm \
    filelock hypothesis pip pytest pytest-timeout pytest-xdist setuptools wheel
mkdir "$root/source"
git -C "$source" archive HEAD | tar -x -C "$root/source"
cp -r "$bundle" "$root/bundle"
mount -t proc proc "$root/proc" # ONNX Runtime finds files through it
trap 'umount "$root/proc"' EXIT

on_arm() {
    chroot "$root" env HOME=/ TMPDIR=/tmp PATH=/ours/bin:/usr/bin:/bin PYTHONPATH=/ours:/site "$@"
}
on_arm python3.11 -m pip install --quiet --no-build-isolation --no-deps --no-index --target /ours /source
on_arm python3.11 -c "
import platform
from metaembed.runtime.maxsim_native import describe_kernels
print(platform.machine(), describe_kernels())
assert describe_kernels() == 'NEON'"
# The kernels as built, not every width in plain C: those are tested anywhere.
on_arm python3.11 -m pytest -n 0 -p no:cacheprovider -c /source/pyproject.toml /source/tests/runtime/test_maxsim_native.py \
    -k "dispatched or not (width or dots)"
on_arm metaembed-check /bundle
