#!/bin/sh
# Build and run the native unit tests plain and under the sanitizers. Usage: native_test.sh PYTHON BUILD_FOLDER LOG_FOLDER
set -eu
python=$1 build=$2 logs=$3
bin=$(cd "$(dirname "$python")" && pwd)

# ThreadSanitizer cannot start where the kernel spreads addresses more widely than it knows of.
fixed_addresses="setarch $(uname -m) --addr-no-randomize"
$fixed_addresses true 2>/dev/null || fixed_addresses=""

llama_cpp=$("$python" scripts/setup/find_llama_cpp.py \
    "$(sed -n 's/^llama-cpp-python==\([^ ]*\) .*/\1/p' scripts/setup/llama-cpp-python.txt)")
headers=$build/ggml_headers
"$python" scripts/setup/quietly.py "Fetching ggml's headers" "$logs/ggml-headers.log" \
    "$python" scripts/setup/ggml_headers.py "$headers"

for watched in "" address,undefined thread; do
    name=${watched:-plain}
    folder=$build/$name
    # shellcheck disable=SC2016  # expanded by the inner shell
    "$python" scripts/setup/quietly.py "Building the native tests: $name" "$logs/native-test-build.log" sh -euc '
        cmake=$1/cmake ninja=$1/ninja folder=$2 watched=$3 headers=$PWD/$4 llama_cpp=$5
        [ -e "$folder/build.ninja" ] ||
            "$cmake" -G Ninja "-DCMAKE_MAKE_PROGRAM=$ninja" "-DPYENGINE_SANITIZE=$watched" \
                "-DPYENGINE_GGML_HEADERS=$headers" "-DPYENGINE_LLAMA_CPP_DIR=$llama_cpp" -S tests/native -B "$folder"
        "$cmake" --build "$folder"' sh "$bin" "$folder" "$watched" "$headers" "$llama_cpp"
    echo "Native tests: $name"
    $fixed_addresses "$bin/ctest" --test-dir "$folder" --output-on-failure --no-tests=error
done
