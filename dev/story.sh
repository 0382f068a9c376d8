#!/bin/sh
# What upcycling is, told on a text (by default on this project's own source) in a few minutes:
#     a small dense model is trained; it becomes a mixture of 4 experts (copy, and drop) and is trained on; that becomes one
#     of 8 experts (copy, and family) and is trained on; beside each, its source is given the same extra steps.
# Prints a table of the losses on the last tenth of the text: before, at step 0, and after the extra steps.
#
#     dev/story.sh [TEXT] [STEPS of the dense model, 1000] [extra steps, 400]
set -e
text=${1:-build/embedded.txt}
steps=${2:-1000}
extra=${3:-400}
dir=out/story
rm -rf $dir
mkdir -p $dir
size=$(wc -c <"$text")
head -c $((size - size / 10)) "$text" >$dir/train.txt
tail -c $((size / 10)) "$text" >$dir/val.txt

quietly() { "$@" >$dir/log 2>&1 || { cat $dir/log >&2; exit 1; }; }
train() { # the last two options say which model and where to
    quietly ./train_moe --data $dir/train.txt --val none --schedule wsd --save-every 0 "$@"
}
loss() { ./train_moe --model $dir/"$1" --data $dir/val.txt --eval 2>/dev/null | sed -n 's/^loss \([0-9.]*\).*/\1/p'; }
sizes() { ./train_moe --model $dir/"$1" --data $dir/val.txt --eval 2>/dev/null | sed -n 's/^parameters: \([0-9]*\), \([0-9]*\).*/\1 \2/p'; }
row() { # what, the model before, at step 0, after
    set -- "$1" "$(loss "$2")" "$(loss "$3")" "$(loss "$4")" $(sizes "$4")
    printf '%-42s %9d %9d   %s   %s   %s\n' "$1" "$5" "$6" "$2" "$3" "$4" | tee -a $dir/table
}
printf '%-42s %9s %9s   %-8s   %-8s   %s\n' "model" "total" "active" "before" "step 0" "after" >$dir/table

echo "1. a dense model, $steps steps"
# the schedule stays at its constant part: all that is compared decays at the end of its own extra steps
train --dense --ffn 256 --steps "$steps" --lr 2e-3 --schedule constant --out $dir/dense
on="--steps $extra --lr 1e-3 --decay-frac 0.5"
train --model $dir/dense --seed 2 $on --out $dir/dense-on
echo "2. each FFN becomes 4 experts, 2 per token; $extra more steps"
for method in copy drop; do
    quietly ./upcycle $dir/dense $dir/moe4-$method --experts 4 --topk 2 --norm-topk 1 --method $method
    train --model $dir/moe4-$method --seed 2 $on --out $dir/moe4-$method-on
done
echo "3. the 4 experts become 8; $extra more steps"
train --model $dir/moe4-copy-on --seed 3 $on --out $dir/moe4-again
for method in copy family; do
    quietly ./upcycle $dir/moe4-copy-on $dir/moe8-$method --experts 8 --method $method
    train --model $dir/moe8-$method --seed 3 $on --out $dir/moe8-$method-on
done
echo
head -n 1 $dir/table
row "dense" dense dense dense-on
row "dense -> 4 experts, copy" dense moe4-copy moe4-copy-on
row "dense -> 4 experts, drop" dense moe4-drop moe4-drop-on
row "4 experts" moe4-copy-on moe4-copy-on moe4-again
row "4 -> 8 experts, copy" moe4-copy-on moe8-copy moe8-copy-on
row "4 -> 8 experts, family" moe4-copy-on moe8-family moe8-family-on
