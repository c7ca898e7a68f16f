#!/bin/sh
# Compile what changed in the native part and put it into the Python environment. Usage: build_native.sh PYTHON BUILD_FOLDER
set -eu
site=$("$1" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
cmake=$(dirname "$1")/cmake
"$cmake" --build "$2"
"$cmake" --install "$2" --prefix "$site"
