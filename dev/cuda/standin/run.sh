#!/bin/sh
# Tests the stand-in, as it is and under the address and undefined-behaviour sanitizers. Needs g++ (CXX=clang++ works as
# well), python3, the CUDA headers in $CUDA_HOME/include (default /usr/local/cuda) and those of cuBLAS, there or in
# $CUBLAS_INCLUDE. No GPU.
#     dev/cuda/standin/run.sh
set -eu
cd "$(dirname "$0")"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
compile="${CXX:-g++} -std=gnu++17 -march=native -fopenmp -Wall -Wextra -I. -include standin.h
         -I${CUBLAS_INCLUDE:-.} -I${CUDA_HOME:-/usr/local/cuda}/include"
export OMP_WAIT_POLICY=passive  # idle threads leave the processor to the others

passed=0 failed=0
count() { passed=$((passed + $1)) failed=$((failed + $2)); }
run() {
    "$@" >"$out/log" 2>&1 || true
    sed '$d' "$out/log"
    # shellcheck disable=SC2046
    count $(sed -n '$s/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$out/log" | grep . || echo 0 1)
}
# $1: what is wrong with the code in $2, which must not compile
refuses() {
    echo "#include <cuda_runtime.h>
          __global__ static void f(float* x) { $2 }" >"$out/wrong.cu"
    python3 translate.py "$out/wrong.cu" >"$out/wrong.cpp"
    if $compile -fsyntax-only "$out/wrong.cpp" 2>/dev/null; then
        echo "FAILED: compiles: $1"
        count 0 1
    else
        count 1 0
    fi
}

python3 translate.py test_standin.cu >"$out/test.cpp"
$compile -O2 "$out/test.cpp" standin.cpp cublas.cpp -o "$out/plain"
run "$out/plain"
$compile -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    "$out/test.cpp" standin.cpp cublas.cpp -o "$out/sanitized"
run "$out/sanitized"
refuses "a sum of floats in any order" 'atomicAdd(x, 1.0f);'
refuses "a call without an argument" 'cudaMemcpyAsync(x, x, 4);'
refuses "a wrong type of argument" 'cudaStreamSynchronize(x);'
echo "$passed passed, $failed failed"
test "$failed" = 0
