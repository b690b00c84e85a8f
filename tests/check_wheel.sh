#!/usr/bin/env bash
# Builds the wheel and checks that it holds m3jax alone, bundled text included, and works from another directory.
# Usage: check_wheel.sh PYTHON, an interpreter with the test extras.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m build --wheel --outdir "$folder" . > "$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
wheel=$(ls "$folder"/*.whl)
others=$("$python" -m zipfile -l "$wheel" | awk 'NR > 1 {print $1}' | grep -Ev '^m3jax(/|-[^/]*\.dist-info/)' || true)
[ -z "$others" ] || { echo "The wheel holds more than m3jax/: $others"; exit 1; }
"$python" -m pip install --quiet --no-deps --target "$folder/site" "$wheel"
cd "$folder"
PYTHONPATH="$folder/site" "$python" - <<'EOF'
import pathlib

import jax.numpy as jnp

import m3jax.data.bundled_text
from m3jax.kernels import mamba3_scan

assert pathlib.Path(m3jax.__file__).parent.parent.name == "site", m3jax.__file__
bundled = pathlib.Path(m3jax.__file__).parent / "data" / "bundled" / "kjv.txt.xz"
assert bundled.stat().st_size > 900_000, "the bundled text is missing"
ones = jnp.ones((1, 5, 2))
y = mamba3_scan(jnp.ones((1, 5, 2, 4)), ones, -ones, *[jnp.ones((1, 5, 1, 1, 6))] * 2, ones, jnp.ones((1, 5, 3)))
assert y.shape == (1, 5, 2, 4)
EOF
PYTHONPATH="$folder/site" "$python" -m m3jax.train --help > /dev/null
echo "The wheel holds m3jax/ alone and works from another directory."
