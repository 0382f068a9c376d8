#!/bin/sh
# What upcycling is, told on a text (by default on this project's own source) in a few minutes:
#     a small dense model is trained; it becomes a mixture of 4 experts (copy, and drop) and is trained on; that becomes
#     one of 8 experts (copy, and family) and is trained on; beside each, its source is given the same extra steps.
# Says what it is doing and how long everything takes on this machine, by a few steps of each size that it makes first.
# Prints a table of the losses on the last tenth of the text: before, at step 0, and after the extra steps.
#
#     dev/story.sh [TEXT] [STEPS of the dense model, 1000] [extra steps, 400]
set -e
[ -z "$1" ] || text=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
text=${text:-$PWD/build/embedded.txt}
steps=${2:-1000}
extra=${3:-400}
dir=out/story
for n in "$steps" "$extra"; do
    case $n in '' | 0* | *[!0-9]*) echo "dev/story.sh: steps are a whole number from 1 on, not '$n'" >&2; exit 2 ;; esac
done
size=$(wc -c <"$text")      # what cannot be read ends here
rm -rf $dir
mkdir -p $dir
head -c $((size - size / 10)) "$text" >$dir/train.txt
tail -c $((size / 10)) "$text" >$dir/val.txt

quietly() { # on a terminal stderr, which is progress, is shown
    if [ -t 2 ]; then "$@" >$dir/log; else "$@" >$dir/log 2>&1 || { cat $dir/log >&2; exit 1; }; fi
}
train() { # the last two options say which model and where to
    quietly ./train_moe --data $dir/train.txt --val none --schedule wsd --save-every 0 "$@"
}
score() { # the model's loss and sizes, in NAME.eval
    quietly ./train_moe --model $dir/"$1" --data $dir/val.txt --eval
    mv $dir/log $dir/"$1".eval
}
loss() { sed -n 's/^loss \([0-9.]*\).*/\1/p' $dir/"$1".eval; }
row() { # what, the model before, at step 0, after
    set -- "$1" "$(loss "$2")" "$(loss "$3")" "$(loss "$4")" \
        $(sed -n 's/^parameters: \([0-9]*\), \([0-9]*\).*/\1 \2/p' $dir/"$4".eval)
    printf '%-30s %9d %9d  %8s %8s %8s\n' "$1" "$5" "$6" "$2" "$3" "$4" | tee -a $dir/table
}

# Seconds of one step (1,024 tokens) of a model, the median of 8. To score tokens takes a third of training on them.
pace() {
    ./train_moe --data $dir/train.txt --val none --steps 8 "$@" 2>&1 >/dev/null |
        sed -n 's/.* \([0-9]*\) tokens\/s.*/\1/p' | sort -n | awk '{a[NR] = $1} END {print 1024 / a[4]}'
}
dense=$(pace --dense --ffn 256)
moe4=$(pace --experts 4 --expert-ffn 256)
moe8=$(pace --experts 8 --expert-ffn 256)
work() { # seconds of so many steps of the dense model, of 4 experts, of 8 experts; and of so many scores of each
    awk "BEGIN {score = $size / 10 / 1024 / 3
                print $dense * ($1 + score * $4) + $moe4 * ($2 + score * $5) + $moe8 * ($3 + score * $6)}"
}
all=$(work $((steps + extra)) $((3 * extra)) $((2 * extra)) 2 5 4)
started=$(date +%s)
say() { # what is done now, and what was done before, as work's arguments: it tells what the machine is like today
    what=$1
    shift
    echo "$(work "$@") $all $(($(date +%s) - started))" | awk -v what="$what" \
        '{left = ($2 - $1) * ($1 > 5 ? $3 / $1 : 1); printf "%s (%d:%02d left in all)\n", what, left / 60, left % 60}'
}

say "1. a dense model, $steps steps" 0 0 0 0 0 0
# the schedule stays at its constant part: all that is compared decays at the end of its own extra steps
train --dense --ffn 256 --steps "$steps" --lr 2e-3 --schedule constant --out $dir/dense
say "   the same, trained on for $extra steps" "$steps" 0 0 0 0 0
on="--steps $extra --lr 1e-3 --decay-frac 0.5"
train --model $dir/dense --seed 2 $on --out $dir/dense-on
n=0
for method in copy drop; do
    say "2. each FFN becomes 4 experts by $method, trained on for $extra steps" $((steps + extra)) $n 0 0 0 0
    quietly ./upcycle $dir/dense $dir/moe4-$method --experts 4 --topk 2 --norm-topk 1 --method $method
    train --model $dir/moe4-$method --seed 2 $on --out $dir/moe4-$method-on
    n=$((n + extra))
done
say "   those of copy, trained on for $extra steps" $((steps + extra)) $n 0 0 0 0
train --model $dir/moe4-copy-on --seed 3 $on --out $dir/moe4-again
n=0
for method in copy family; do
    say "3. its 4 experts become 8 by $method, trained on for $extra steps" $((steps + extra)) $((3 * extra)) $n 0 0 0
    quietly ./upcycle $dir/moe4-copy-on $dir/moe8-$method --experts 8 --method $method
    train --model $dir/moe8-$method --seed 3 $on --out $dir/moe8-$method-on
    n=$((n + extra))
done
say "4. the losses on the last tenth of the text, nats a byte" $((steps + extra)) $((3 * extra)) $n 0 0 0
for model in dense dense-on moe4-copy moe4-copy-on moe4-drop moe4-drop-on moe4-again moe8-copy moe8-copy-on \
    moe8-family moe8-family-on; do
    score $model
done
echo
printf '%-30s %9s %9s  %8s %8s %8s\n' model total active before "step 0" after | tee $dir/table
row "dense" dense dense dense-on
row "dense -> 4 experts, copy" dense moe4-copy moe4-copy-on
row "dense -> 4 experts, drop" dense moe4-drop moe4-drop-on
row "4 experts" moe4-copy-on moe4-copy-on moe4-again
row "4 -> 8 experts, copy" moe4-copy-on moe8-copy moe8-copy-on
row "4 -> 8 experts, family" moe4-copy-on moe8-family moe8-family-on
