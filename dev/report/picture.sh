#!/bin/sh
# The page and the README's pictures of a small story, a few minutes: a dense model, 4 experts from it (copy), 8 from
# these (copy, and family), each trained on, on this project's own source. The tokens are those of pictures/text.txt,
# an older piece of it that stays what it is.
#
#     dev/report/picture.sh [FACTOR of all steps, 1]       writes out/picture/report.html and out/picture/*.svg
set -e
cd "$(dirname "$0")/../.."
factor=${1:-1}
dir=out/picture
rm -rf $dir
mkdir -p $dir
train() { # steps, options
    steps=$(echo "$1" | awk -v f="$factor" '{n = int($1 * f); print (n > 4 ? n : 4)}')
    shift
    every=$((steps > 10 ? steps / 10 : 1))
    ./train_moe --data build/embedded.txt --steps "$steps" --val-every $every --save-every 0 "$@" \
        >$dir/log 2>&1 || { cat $dir/log >&2; exit 1; }
}
grow() { ./upcycle "$@" >$dir/log 2>&1 || { cat $dir/log >&2; exit 1; }; }

echo "1. a dense model"
train 600 --dense --ffn 128 --hidden 64 --schedule constant --out $dir/dense
echo "2. 4 experts"
grow $dir/dense $dir/moe4.start --experts 4 --topk 2 --norm-topk 1
train 300 --model $dir/moe4.start --lr 1e-3 --schedule constant --seed 2 --out $dir/moe4
for method in copy family; do
    echo "3. 8 experts, $method"
    grow $dir/moe4 $dir/moe8-$method.start --experts 8 --method $method
    train 400 --model $dir/moe8-$method.start --lr 1e-3 --decay-frac 0.5 --seed 3 --out $dir/moe8-$method
    ./train_moe --model $dir/moe8-$method --data dev/report/pictures/text.txt --eval \
        --trace $dir/moe8-$method/trace.csv >$dir/log 2>&1 || { cat $dir/log >&2; exit 1; }
done
python3 dev/report/run.py $dir/dense $dir/moe4 $dir/moe8-copy $dir/moe8-family --to $dir/report.html --svg $dir
