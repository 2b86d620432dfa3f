#!/bin/sh
# One build for many releases of torch: an sdist, a wheel built from it with the python given, and that wheel in a fresh
# environment for each release, where it must find its kernels and pass the parity tests. Several gigabytes, minutes each.
#   tests/compat.sh PYTHON "2.11.0 2.14.1"
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
torches=$2
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -c "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])" "$work" > /dev/null
L2L_FAST_REQUIRE_EXT=1 "$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$work" "$work"/*.tar.gz
cp -R tests pyproject.toml "$work"
cd "$work" # away from the source tree, which would be imported in place of what is installed
for torch in $torches; do
  echo "torch $torch"
  "$python" -m venv environment
  environment/bin/pip install --quiet "torch==$torch" "$(ls "$work"/*.whl)[cli]" pytest hypothesis
  environment/bin/l2l-fast info
  environment/bin/python -c "import sys, l2l_fast; sys.exit(not l2l_fast.build_info()['native'])"
  # Two tests compile the sources, which are no part of a wheel.
  environment/bin/python -m pytest -q tests/native tests/test_ops.py \
    --ignore tests/native/test_sanitized.py --ignore tests/native/test_symbols.py
  rm -rf environment
done
