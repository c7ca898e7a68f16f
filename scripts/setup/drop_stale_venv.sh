#!/bin/sh
# Remove .venv, and what was built with it, if it cannot be used: it was moved with its clone, its Python is gone, or another
# Python was asked for by name. Usage: drop_stale_venv.sh [PYTHON]
set -eu

stamp=.venv/.stamps/venv
[ -e .venv ] || exit 0
[ -e "$stamp" ] && [ "$(cat "$stamp")" = "$PWD" ] && .venv/bin/python -c '' 2>/dev/null && {
    [ $# -eq 0 ] && exit 0
    same='import os, sys; print(os.path.realpath(sys.base_prefix), sys.version)'
    [ "$("$1" -c "$same")" = "$(.venv/bin/python -c "$same")" ] && exit 0
}
echo "Making .venv anew" >&2
rm -rf .venv build
