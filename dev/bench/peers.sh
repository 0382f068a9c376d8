#!/bin/sh
# Compares train_moe.c with PyTorch, see peers.py. Needs torch and transformers; arguments are passed on.
set -e
cd "$(dirname "$0")/../.."
make build/bench
echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' | cc -shared -fPIC -x c - -o build/fast_mkl.so # see peers.py
exec python3 dev/bench/peers.py "$@"
