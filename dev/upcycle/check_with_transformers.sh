#!/bin/sh
# Upcycles the small golden models, opens the results with transformers and compares logits, losses, chosen experts and
# every gradient with a dump of train_moe: one result for each class that upcycle writes.
#     sh dev/upcycle/check_with_transformers.sh            in the repository, after `make`
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
golden=dev/reference/golden
python3 - "$work/data.bin" <<'PYTHON'
import random, struct, sys
random.seed(1)
tokens = [random.randrange(29) for _ in range(200)]
open(sys.argv[1], "wb").write(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack("<200H", *tokens))
PYTHON
try() { # class, then the arguments of upcycle without DST
    class=$1
    shift
    rm -rf "$work/result"
    ./upcycle "$1" "$work/result" $(shift; echo "$@") >"$work/log" || { cat "$work/log"; exit 1; }
    ./train_moe --model "$work/result" --data "$work/data.bin" --batch 2 --seq 16 --aux 0 --dump "$work/dump.safetensors" >/dev/null
    echo "$@"
    (cd dev/reference && python3 check_checkpoint.py "$work/result" "$work/dump.safetensors" --class "$class")
}
# what the receipt says of the balance loss: transformers adds it, the router has a gradient, and generation still works
balance() {
    python3 - "$work/result" <<'PYTHON'
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, experts_implementation="eager")
tokens = torch.arange(1, 25)[None]
out = model(input_ids=tokens, labels=tokens)
out.loss.backward()
gradient = max(float(p.grad.abs().max()) for name, p in model.named_parameters() if name.endswith("gate.weight"))
length = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1]
print(f"balance loss {float(out.aux_loss):.4f}, largest gradient of a router {gradient:.1e}, {length - 24} tokens generated")
sys.exit(gradient < 1e-6 or length != 28)
PYTHON
}
try MixtralForCausalLM $golden/llama --experts 4
balance
try Qwen3MoeForCausalLM $golden/qwen3 --experts 4
balance
try MixtralForCausalLM $golden/llama --experts 4 --method drop
try MixtralForCausalLM $golden/llama_tied --experts 3 --method noise
try Qwen3MoeForCausalLM $golden/qwen3 --experts 4 --layers every-2 --method drop --norm-topk 0
try Qwen3MoeForCausalLM $golden/qwen3 --experts 6 --method granular --granularity 3
try OlmoeForCausalLM $golden/olmoe --experts 13 --method drop --router perturb-new --shard-size 20K
try Dots1ForCausalLM $golden/dots1 --experts 12 --method drop
try Qwen3ForCausalLM $golden/qwen3 --layers-to 5 --new-layers copy --ffn-to 30
try Qwen3MoeForCausalLM $golden/qwen3_moe --layers-to 6 --depth stack --ffn-to 18 --experts 10 --method multiply
try Dots1ForCausalLM $golden/dots1_shared --experts 14
try Qwen2MoeForCausalLM $golden/qwen2 --experts 4 --method drop
balance
try Qwen2MoeForCausalLM $golden/qwen2 --experts 3 --layers every-2
text="--calibrate $work/data.bin --calibrate-batches 2 --batch 2 --seq 16"
try Dots1ForCausalLM $golden/qwen3 --experts 3 --shared 2 --method marks $text
try Qwen2MoeForCausalLM $golden/qwen2 --experts 12 --shared 5 --method importance $text
try Qwen2MoeForCausalLM $golden/qwen2_moe --experts 12 --topk 4 --dtype bf16
