#!/bin/sh
# Trains a small model of every class for a few steps, saves it, and lets transformers open it: class, logits, losses,
# chosen experts and every gradient must agree. Run from the project's folder after `make`.
set -e
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0
failed=0
check() { # name, expected class, options of the model
    name=$1 class=$2
    shift 2
    ./train_moe --data LICENSE --val none --steps 20 --batch 2 --seq 24 --layers 2 --hidden 24 --heads 2 --lr 0.01 \
        --out "$dir/$name" "$@" >"$dir/log" 2>&1 || { cat "$dir/log"; failed=$((failed + 1)); return; }
    ./train_moe --model "$dir/$name" --data LICENSE --batch 2 --seq 24 --aux 0.01 --dump "$dir/$name.dump" >"$dir/log"
    aux="--aux 0.01"
    case $class in Llama* | Qwen3ForCausalLM | Dots1*) aux="" ;; esac      # no aux loss in transformers
    [ "$class" = Dots1ForCausalLM ] && ./train_moe --model "$dir/$name" --data LICENSE --batch 2 --seq 24 --aux 0 \
        --dump "$dir/$name.dump" >"$dir/log"
    if python3 dev/reference/check_checkpoint.py "$dir/$name" "$dir/$name.dump" --class "$class" $aux >"$dir/log" 2>&1; then
        echo "ok     $name opens as $class with our logits and gradients"
        passed=$((passed + 1))
    else
        cat "$dir/log"
        echo "FAILED $name as $class"
        failed=$((failed + 1))
    fi
}
check qwen3_moe Qwen3MoeForCausalLM --experts 4
check qwen3_moe_mixed Qwen3MoeForCausalLM --experts 4 --sparse-step 2 --norm-topk 0 --tie
check qwen3 Qwen3ForCausalLM --dense
check mixtral MixtralForCausalLM --arch mixtral --experts 3
check llama LlamaForCausalLM --arch mixtral --dense
check olmoe OlmoeForCausalLM --arch olmoe --experts 5 --topk 3 --norm-topk 0
check dots1 Dots1ForCausalLM --router sigmoid --experts 4
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
