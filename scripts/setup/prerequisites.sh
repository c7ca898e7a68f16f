#!/bin/sh
# Check that the system has what a build needs. As root on a system with apt, install what is missing; otherwise say what to
# type. Usage: prerequisites.sh PYTHON LOG
set -eu

python=$1
log=$2
missing=""

need() { missing="$missing $1"; }

if ! command -v "$python" >/dev/null 2>&1; then
    echo "error: no '$python' here. Name a Python from 3.10 to 3.13, for example: make PYTHON=python3.12 ..." >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
    echo "error: $("$python" --version) is not supported. Name a Python from 3.10 to 3.13: make PYTHON=python3.12 ..." >&2
    exit 1
fi
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

"$python" -c 'import ensurepip, venv' 2>/dev/null || need "python$minor-venv"
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || need "python$minor-dev"
{ command -v cc && command -v c++; } >/dev/null 2>&1 || need build-essential

[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "error: missing here (by Debian's names):$missing. Install them and try again." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "error: some system packages are missing. Type this line, then try again:" >&2
    echo "    sudo apt-get update && sudo apt-get install -y$missing" >&2
    exit 1
fi
echo "Installing system packages:$missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # a list of words
if ! { apt-get update && apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1 </dev/null; then
    echo "failed. The last lines of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
fi
