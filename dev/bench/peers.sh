#!/bin/sh
# Compares train_moe.c with PyTorch, see peers.py. Needs torch and transformers; arguments are passed on.
set -e
cd "$(dirname "$0")/../.."
make build/bench
exec python3 dev/bench/peers.py "$@"
