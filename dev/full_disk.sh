#!/bin/sh
# Trains onto a disk that is really full: a small tmpfs, on which a first checkpoint fits and a second one beside it does
# not. Needs root, for the mount. The run must end with exit code 1 and one line, and leave the first checkpoint as it
# was; with room again it must go on. `./test_moe "disk full"` checks the same with a limit on the size of files.
#     dev/full_disk.sh
set -eu
cd "$(dirname "$0")/.."
disk=$(mktemp -d)
finish() { umount "$disk" 2>/dev/null || true; rmdir "$disk" 2>/dev/null || true; }
trap finish EXIT
mount -t tmpfs -o size=3m tmpfs "$disk"

# a checkpoint (parameters and two moments) is 1.9 MB
train="./train_moe --data train_moe.c --layers 2 --hidden 64 --experts 4 --expert-ffn 64 --seq 64 --batch 2
       --schedule constant --warmup 1 --val-every 1000 --out $disk/run"
sum() { cat "$disk/run/model.safetensors" "$disk/run/trainer/optimizer.safetensors" "$disk/run/trainer.json" | cksum; }

$train --steps 2 >/dev/null 2>&1
before=$(sum)
code=0
./train_moe --out "$disk/run" --resume --steps 4 >/dev/null 2>"$disk.err" || code=$?
message=$(grep -v '^step .*loss' "$disk.err" || true)
rm -f "$disk.err"
echo "exit code $code: $message"
test "$code" = 1
test "$(echo "$message" | wc -l)" = 1
echo "$message" | grep -q 'No space left on device.*the checkpoint of step 2.*is intact'
test "$(sum)" = "$before"
test ! -e "$disk/run/.saving"
test ! -e "$disk/run/.ready"
mount -o remount,size=20m "$disk"
./train_moe --out "$disk/run" --resume --steps 4 >/dev/null 2>&1
test "$(sum)" != "$before"
echo "ok: the last checkpoint was kept, and with room again the run went on"
