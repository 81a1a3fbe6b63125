#!/usr/bin/env bash
# Tests the service under load and with a fuzzer.
#
#     benchmarks/serving/run.sh [options of benchmarks.serving.load]
#
# locust and schemathesis get their own environment, created by the first call: LOAD_VENV names it,
# by default .venv beside this script. `python` must be that of lmcot's environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${LOAD_VENV:-$here/.venv}
if ! "$venv/bin/python" -c 'import locust, schemathesis' 2>/dev/null; then
    echo "Installing locust and schemathesis in $venv (a minute; once)" >&2
    python -m venv "$venv"
    "$venv/bin/python" -m pip install -q -r "$here/requirements.txt"
fi
cd "$here/../.."
exec python -m benchmarks.serving.load --tools "$venv/bin" "$@"
