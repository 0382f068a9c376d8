#!/bin/sh
# Builds the fuzz targets with clang, makes a small corpus from the golden files and runs each for SECONDS (default
# 60). The exit code is not 0 if anything was found; the input that shows it stays in build/fuzz. With a SEED (default:
# another one each time) a run on a fresh build/fuzz tries the same inputs in the same order.
#     dev/fuzz/run.sh [SECONDS [SEED]]            TARGETS="json data": only these
set -eu
cd "$(dirname "$0")/../.."
seconds=${1:-60}
seed=${2:-0}
targets=${TARGETS:-json safetensors data tokenizer}
work=build/fuzz
mkdir -p $work/json $work/safetensors $work/data $work/tokenizer
status=0

for target in $targets; do
    ${CLANG:-clang} -std=gnu11 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -DPLAIN=1 \
        -Wno-unused-function dev/fuzz/fuzz_$target.c -o $work/fuzz_$target -lm
done

# seeds: configurations and the headers of the golden checkpoints, cut short; a checkpoint that loads
for dir in dev/reference/golden/*/; do
    name=$(basename "$dir")
    cp "$dir/config.json" "$work/json/$name"
    head -c 3000 "$dir/model.safetensors" | tail -c +9 >"$work/json/$name.header"
done
head -c 20000 dev/reference/golden/llama/model.safetensors >$work/safetensors/cut
echo '{"weight_map": {"model.embed_tokens.weight": "a.safetensors", "model.norm.weight": "a.safetensors"}}' >$work/safetensors/index
echo '{"step": 5, "sequences": 40, "data_files": [{"file": "t", "bytes": 9, "hash": "ab"}], "options": {"batch": 8, "seq": 4}}' \
    >$work/json/trainer
# shards of 6 tokens, 16 and 32 bits wide, behind the byte that chooses how they are read; a text
shard() { printf "$1"; head -c $((1012 + $2)) /dev/zero; }
shard '\001\210\330\064\001\001\000\000\000\006\000\000\000' 12 >$work/data/shard16
shard '\001\241\331\064\001\007\000\000\000\006\000\000\000' 24 >$work/data/shard32
printf '\101some text, of which bytes are tokens' >$work/data/text
# small tokenizers of both dialects, a zero, a text
model='"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<0x41>": 3}, "merges": ["a b"], "byte_fallback": true}'
for parts in '"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true}' \
        '"normalizer": {"type": "Prepend", "prepend": "b"}, "added_tokens": [{"id": 9, "content": "ba", "rstrip": true}]' \
        '"normalizer": {"type": "NFC"}, "added_tokens": [{"id": 9, "content": "ba", "normalized": true}]'; do
    printf '{%s, %s}\0abba A b e\314\201\n' "$parts" "$model" >"$work/tokenizer/${#parts}"
done
[ ! -x $work/fuzz_safetensors ] ||
    WRITE_SEED=$work/safetensors/valid $work/fuzz_safetensors -runs=0 $work/safetensors >$work/seed.log 2>&1

# words that mutation would be slow to find
for word in model_type num_hidden_layers hidden_size num_attention_heads vocab_size intermediate_size num_experts \
        mlp_only_layers rope_parameters rope_type llama mixtral olmoe qwen2 qwen3 qwen3_moe dots1 train_moe \
        base_model_type sliding_window use_sliding_window max_window_layers layer_types rope_scaling rope_theta \
        output_router_logits router_type family_penalty lpr lpr_align_form eos_token_id default inf \
        weight_map a.safetensors sequences tokens step options data_files bytes hash dtype shape data_offsets \
        __metadata__ F32 BF16 F16 I32 null true false lm_head.weight 1e-06 18446744073709551616 9223372036854775807; do
    echo "\"$word\""
done >$work/words
printf '"\\\\u0000"\n"\\\\ud800"\n"\\\\udc00"\n"[["\n"{}"\n' >>$work/words

for target in $targets; do
    echo "fuzz_$target: $seconds s"
    if ! $work/fuzz_$target -max_total_time="$seconds" -seed="$seed" -max_len=4096 -timeout=10 -rss_limit_mb=2048 \
            -dict=$work/words -artifact_prefix=$work/found_${target}_ -print_final_stats=1 \
            $work/$target >$work/$target.log 2>&1; then
        echo "fuzz_$target found something:"
        tail -n 40 $work/$target.log
        status=1
    fi
    grep -E 'number_of_executed_units|average_exec_per_sec' $work/$target.log || true
    grep -E ' cov: ' $work/$target.log | tail -n 1
    rm -rf $work/folder.*
done
exit $status
