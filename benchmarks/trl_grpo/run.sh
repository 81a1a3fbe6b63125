#!/usr/bin/env bash
# Compares a whole GRPO step of lmcot with one of TRL's GRPOTrainer.
#
#     benchmarks/trl_grpo/run.sh [options of benchmarks.trl_grpo.compare]
#
# TRL gets its own environment, created by the first call: TRL_VENV names it, by default .venv
# beside this script. `python` must be that of lmcot's environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${TRL_VENV:-$here/.venv}
if ! "$venv/bin/python" -c 'import trl' 2>/dev/null; then
    echo "Installing TRL in $venv (some minutes; once)" >&2
    python -m venv "$venv"
    "$venv/bin/python" -m pip install -q -r "$here/requirements.txt"
fi
cd "$here/../.."
exec python -m benchmarks.trl_grpo.compare --trl-python "$venv/bin/python" "$@"
