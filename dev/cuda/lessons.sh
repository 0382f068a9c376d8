#!/bin/sh
# Builds grouped_gemm.cu and attention.cu for the stand-in, a CPU that plays a GPU, and runs their checks: as on an
# H100, as on an A100 with copies as late as they may be, and with threads in three orders. Needs g++ (CXX=clang++ works
# as well), python3, the CUDA headers in $CUDA_HOME/include (default /usr/local/cuda) and those of cuBLAS, there or in
# $CUBLAS/include. Arguments go to the compiler:
#     dev/cuda/lessons.sh [-fsanitize=address,undefined]
set -eu
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
standin=dev/cuda/standin
compile="${CXX:-g++} -std=gnu++17 -O1 -march=native -fopenmp -I. -I$standin -include standin.h
         ${CUBLAS:+-I$CUBLAS/include} -I${CUDA_HOME:-/usr/local/cuda}/include $*"
export OMP_WAIT_POLICY=passive  # idle threads leave the processor to the others

passed=0 failed=0
run() { # settings, program, arguments: as `env` wants them
    bad=0
    env "$@" >"$out/log" 2>&1 || bad=1
    # shellcheck disable=SC2046
    set -- "$*" $(sed -n '$s/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$out/log" | grep . || echo 0 1)
    [ "$bad" = 0 ] || [ "$3" -gt 0 ] || set -- "$1" "$2" 1  # it says that all is well, and leaves with an error
    [ "$3" = 0 ] || tail -n 50 "$out/log"
    echo "$1: $2 passed, $3 failed"
    passed=$((passed + $2)) failed=$((failed + $3))
}

for lesson in grouped_gemm attention; do
    python3 $standin/translate.py dev/cuda/$lesson.cu >"$out/$lesson.cpp"
    $compile -c "$out/$lesson.cpp" -o "$out/$lesson.o" &
done
$compile -c $standin/standin.cpp -o "$out/standin.o"
$compile -c $standin/cublas.cpp -o "$out/cublas.o"
wait
cd "$out"
for lesson in grouped_gemm attention; do $compile $lesson.o standin.o cublas.o -o $lesson; done
check() { # program, sizes
    run "$@"
    cat "$out/log"                  # with sizes there are times, too; here they are the CPU's
    run STANDIN_ARCH=80 STANDIN_LAZY=7 "$1"
    run STANDIN_LAZY=7 STANDIN_CHECK=1 "$1"
}
check ./grouped_gemm 64 2 4 64 64
check ./attention 20 2 1 16 1
echo "$passed passed, $failed failed"
test "$failed" = 0
