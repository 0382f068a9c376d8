#!/bin/sh
# What must be built and what must be refused: macOS's tools (stand-ins for them), flags that change values, 32 bits, a
# processor without the instructions. Ends with `N passed, N failed`; what this machine lacks is named and left out.
cd "$(dirname "$0")/../.." || exit 1
unset ARCH CFLAGS MAKEFLAGS
here=$PWD work=$(mktemp -d) passed=0 failed=0
cp -R Makefile ./*.c ./*.cu dev "$work" && cd "$work" || exit 1

check() { # name, command
    name=$1; shift
    if sh -c "$*" >log 2>&1; then passed=$((passed + 1)); echo "ok     $name"
    else failed=$((failed + 1)); echo "FAILED $name: $*"; tail -n 5 log; fi
}
lacks() { for tool; do command -v "$tool" >/dev/null || { echo "left out: no $tool here"; return 0; }; done; return 1; }

make -s build/embedded.h && mv build/embedded.h expected
check "macOS's od" "rm -rf build; PATH=$here/dev/builds/macos:\$PATH make -s build/embedded.h && cmp build/embedded.h expected"
check "no call of the shell that old makes run without one" "! grep -n '(shell command -v [a-z]*)' Makefile"
lacks musl-gcc || check "a library of OpenMP that does not fit is not taken" \
    "make CC=musl-gcc CFLAGS='-O0 -static' all | grep 'OpenMP: *not found' && ./train_moe --version"
for cc in gcc gcc-11 clang clang-13; do
    lacks $cc && continue
    for flag in -Ofast -ffast-math -ffinite-math-only -funsafe-math-optimizations "-fassociative-math -fno-signed-zeros" \
        -freciprocal-math; do
        rm -f train_moe
        # either the compiler refuses, with our line, or the program does
        check "$cc $flag" "make CC=$cc CFLAGS='-O1 $flag' train_moe 2>err; if [ -x train_moe ]; then
            ./train_moe --version 2>err; [ \$? -eq 1 ] && [ \$(wc -l <err) -eq 1 ]; fi && grep 'flags that change values' err"
    done
done
lacks clang || check "macOS's clang" "LIBOMP=$(dirname "$(find /usr/lib/llvm-* -name libomp.so 2>/dev/null | head -n 1)") \
    make CC=$here/dev/builds/macos/clang CFLAGS=-O0 all | grep 'OpenMP: *found' && \
    make -n -W train_moe.c CC=$here/dev/builds/macos/clang train_moe >out && grep train_moe.c out && ! grep thread-jumps out"
check "other flags build anew, the same do not" "make CFLAGS=-O0 build/encode && make CFLAGS=-O0 build/encode >out && \
    ! grep encode.c out && make CFLAGS=-O0 PLAIN=1 build/encode | grep DPLAIN=1"
lacks arm-linux-gnueabihf-gcc || check "32 bits" "arm-linux-gnueabihf-gcc -std=gnu11 -w -I. -fsyntax-only train_moe.c 2>err; \
    [ \$? -ne 0 ] && grep '64-bit machine is needed' err"
lacks riscv64-linux-gnu-gcc || check "RISC-V: a hint at ARCH" "make CC=riscv64-linux-gnu-gcc CFLAGS=-O0 all | grep 'ARCH: .*ARCH=-march'"
lacks qemu-x86_64 || for program in train_moe upcycle; do
    check "$program on a processor without its instructions" "make -B CC=gcc ARCH='-mavx2 -mfma' CFLAGS=-O1 $program
        qemu-x86_64 -cpu Nehalem ./$program --help >out 2>err; [ \$? -eq 1 ] && [ \$(wc -l <err) -eq 1 ] && grep 'lacks instructions' err"
done
lacks gcc || [ "$(uname -sm)" != "Linux x86_64" ] || check "AMX: instructions that trap, are refused, add otherwise" \
    "cc -O2 -Wall -Wextra -Werror -march=native -shared -fPIC dev/builds/amx.c -o amx.so -lm
    make -B CC=gcc ARCH='-march=native -mamx-tile -mamx-bf16' CFLAGS='-O1 -Werror' train_moe
    run() { AMX=\$1 LD_PRELOAD=\$PWD/amx.so ./train_moe --precision bf16 --layers 1 --hidden 32 --batch 1 --seq 16 --steps 1 --val none >said
        grep \"products: bf16, \$2\" said; }
    run '' 'by TDPBF16PS$' && run refused '.*; TDPBF16PS is not permitted' && run wrong '.*; TDPBF16PS is not permitted'"
rm -rf "$work"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
