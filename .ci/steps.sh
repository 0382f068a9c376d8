# Sourced by .ci/run and .ci/nightly, in the project's root: steps that are counted, and what they need.
set -u
passed=0
failed=0

count() { # adds the closing line `N passed, N failed` of a log; without one, the step itself counts
    local line
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$1" | tail -n 1)
    if [ -n "$line" ]; then
        passed=$((passed + $(echo "$line" | cut -d' ' -f1)))
        failed=$((failed + $(echo "$line" | cut -d' ' -f3)))
    fi
    if [ "$2" -eq 0 ]; then [ -n "$line" ] || passed=$((passed + 1)); else failed=$((failed + 1)); fi
}

step() { # minutes, name, command: runs it, no longer than that, and shows the end of its output if it failed
    local minutes=$1 name=$2 log status start=$SECONDS
    shift 2
    log=$(mktemp)
    timeout -k 10 "${minutes}m" bash -c "$*" >"$log" 2>&1 </dev/null
    status=$?
    count "$log" "$status"
    if [ "$status" -eq 0 ]; then
        echo "ok     $name ($((SECONDS - start)) s) $(grep -E '^[0-9]+ passed' "$log" | tail -n 1)"
    else # as one piece, whatever runs beside it
        echo "FAILED $name ($((SECONDS - start)) s of at most $minutes minutes): $*
$(grep -E '^FAILED|error:|Error|warning:' "$log" | head -n 20)
$(tail -n 25 "$log")"
    fi
    rm -f "$log"
}

side_by_side() { # functions: the first one's steps run here, the others' at the same time in copies of the folder
    local copies line here=$1
    copies=$(mktemp -d)
    shift
    for line; do mkdir "$copies/$line" && git ls-files -z | xargs -0 cp --parents -t "$copies/$line" && \
        cp -R build train_moe upcycle test_moe "$copies/$line"; done
    for line; do
        (passed=0 failed=0; cd "$copies/$line" && "$line"; echo "$passed $failed" >"$copies/$line.counts") &
    done
    "$here"
    wait
    for line; do
        set -- $(cat "$copies/$line.counts" || echo 0 1)
        passed=$((passed + $1)) failed=$((failed + $2))
    done
    rm -rf "$copies"
}

install() {
    local packages=""
    command -v gcc >/dev/null || packages="$packages gcc"
    command -v clang >/dev/null || packages="$packages clang libclang-rt-14-dev"
    ls /usr/lib/llvm-14/lib/libomp.so >/dev/null 2>&1 || packages="$packages libomp-dev"
    command -v gcc-11 >/dev/null || packages="$packages gcc-11"
    command -v clang-13 >/dev/null || packages="$packages clang-13"
    command -v musl-gcc >/dev/null || packages="$packages musl-tools"
    command -v chromium >/dev/null || packages="$packages chromium"
    command -v qemu-aarch64 >/dev/null || packages="$packages qemu-user"
    ctags --version 2>/dev/null | grep -q Universal || packages="$packages universal-ctags"
    local machine
    for machine in aarch64-linux-gnu riscv64-linux-gnu arm-linux-gnueabihf; do
        command -v $machine-gcc >/dev/null || packages="$packages gcc-$machine"
    done
    ls /usr/aarch64-linux-gnu/lib/libc.so >/dev/null 2>&1 || packages="$packages libc6-dev-arm64-cross"
    ls /usr/riscv64-linux-gnu/lib/libc.so >/dev/null 2>&1 || packages="$packages libc6-dev-riscv64-cross"
    ls /usr/arm-linux-gnueabihf/lib/libc.so >/dev/null 2>&1 || packages="$packages libc6-dev-armhf-cross"
    [ -z "$packages" ] || { apt-get update && apt-get install -y $packages; } || return 1
    # torch first and alone: a range that another package asks for would bring the build for GPUs
    python3 -c 'import torch' 2>/dev/null || python3 -m pip install -q torch==2.13.0 || return 1
    python3 -m pip install -q -r dev/reference/requirements.txt -r data/requirements.txt \
        -r dev/lab/requirements.txt -r dev/scale/requirements.txt || return 1
    # cuBLAS: its headers for the stand-in, and for nvcc where the toolkit comes without
    [ -d "$CUBLAS" ] || python3 -m pip install -q --no-deps --target "${CUBLAS%/nvidia/cu13}" 'nvidia-cublas==13.1.*'
}
export -f install
export CUBLAS=${CUBLAS:-/tmp/train_moe_cublas/nvidia/cu13}

finish() {
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}
