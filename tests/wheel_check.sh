#!/bin/sh
# Builds a wheel, installs it in a fresh environment, and uses it away from the checkout: the demo's command, the
# kernels, a report. Fetches PyTorch and the other dependencies; some minutes.
#   tests/wheel_check.sh [PYTHON]
set -eu
python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
bin=$work/venv/bin
"$bin/python" -m pip wheel -qq --no-deps -w "$work/dist" "$root"
"$bin/python" -m pip install -qq -c "$root/constraints.txt" "$work"/dist/etpo-*.whl
cd "$work"
"$bin/etpo" --version
"$bin/python" -c "
import torch
from etpo.kernels import linear_kl
hidden, head = torch.randn(4, 8), torch.randn(50, 8)
print('kernels', linear_kl(hidden, head, hidden + 0.1, head).mean().item())"
"$bin/etpo" train --dataset tic-tac-toe --steps 32 --seed 0 --device cpu --out run
"$bin/etpo" report run
test -s run/report.html && test -s run/best_program.py
echo "the wheel works away from the checkout"
