"""How fast train_moe.c is, compared with PyTorch: Hugging Face's Qwen3-MoE of the same sizes, the same step.

    python dev/bench/peers.py [--configs default,small,...] [--rounds 3] [--seconds 5] [--threads N] [--bf16]

For each configuration of bench.c it starts PyTorch in several ways (experts one by one, grouped_mm, each also through
torch.compile), and measures them in turns with `build/bench`, so that both see the same machine. The fastest step
counts, and the fastest of PyTorch's ways. A step is forward, cross-entropy, backward, clipping and AdamW (fused) on a
fixed batch in fp32; ours adds the balance loss, theirs is spared it. --bf16 measures --precision bf16 too, PyTorch's
ways under bf16's autocast, which does not reach grouped_mm, and with its operands made bf16 as well ("+bf16").

PyTorch's matrix products come from MKL, which takes its slow code on processors of other makers than Intel, also where
they have AVX-512. peers.sh compiles one function that lets it take the fast one, so that the ratios mean something
everywhere (it makes PyTorch about twice as fast on a Zen 5).
"""
import argparse
import contextlib
import os
import subprocess
import sys
import time

#           L   H    NH NKV HD  I     E   K  V      B  T       as in bench.c
CONFIGS = {
    "default": (4, 128, 4, 2, 32, 256, 8, 2, 256, 8, 128),
    "small": (6, 256, 8, 4, 32, 512, 8, 2, 512, 4, 256),
    "medium": (8, 512, 8, 4, 64, 1024, 8, 2, 8192, 4, 256),
    "large": (12, 768, 12, 4, 64, 1024, 8, 2, 32000, 2, 256),
    "fine": (6, 384, 6, 6, 64, 192, 64, 8, 4096, 4, 256),
}
WAYS = ["eager", "grouped_mm", "eager+compile", "grouped_mm+compile"]
HERE = os.path.dirname(os.path.abspath(__file__))
BENCH = os.path.join(HERE, "..", "..", "build", "bench")
FAST_MKL = os.path.join(HERE, "..", "..", "build", "fast_mkl.so")


def worker(name, way, threads):
    """Answers each line on stdin, a number of seconds, with the time of the fastest step within them."""
    import torch
    import torch.nn.functional as F
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    L, H, NH, NKV, HD, I, E, K, V, B, T = CONFIGS[name]
    config = Qwen3MoeConfig(
        num_hidden_layers=L, hidden_size=H, num_attention_heads=NH, num_key_value_heads=NKV, head_dim=HD,
        moe_intermediate_size=I, intermediate_size=I, num_experts=E, num_experts_per_tok=K, vocab_size=V,
        norm_topk_prob=True, max_position_embeddings=T, tie_word_embeddings=False, use_cache=False)
    model = Qwen3MoeForCausalLM(config).float().train()
    model.set_experts_implementation(way.split("+")[0])
    if way.endswith("+bf16"):
        import transformers.integrations.moe as moe
        moe._grouped_mm = lambda x, w, offs: F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=offs)
    bf16 = way.endswith(("+autocast", "+bf16"))
    run = torch.compile(model) if "compile" in way else model
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, targets = torch.randint(V, (B, T)), torch.randint(V, (B * T,))

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = run(input_ids=tokens).logits
        loss = F.cross_entropy(logits.float().view(-1, V), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        best, end, steps = float("inf"), time.perf_counter() + float(line), 0
        while steps < 2 or time.perf_counter() < end:
            start = time.perf_counter()
            step()
            best = min(best, time.perf_counter() - start)
            steps += 1
        print(best, flush=True)


def ours(name, seconds, bf16, environment):
    """Tokens/s of build/bench in fp32 and, if asked for, in bf16."""
    command = [BENCH, "--config", name, "--seconds", str(seconds)] + ["--bf16"] * bf16
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return [float(row.split()[1]) for row in out.splitlines()[-1 - bf16:]]


def answer(process, seconds):
    """The worker's fastest step within these seconds; None if the worker has ended."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        print(seconds, file=process.stdin, flush=True)
        return float(process.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--ways", help="of " + ", ".join(WAYS) + ", each also with +autocast or +bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bf16", action="store_true", help="and all of it in bf16")
    parser.add_argument("--as-installed", action="store_true", help="leave MKL's choice of code to MKL")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, options.threads)
        return
    environment = dict(os.environ, OMP_NUM_THREADS=str(options.threads))
    for_torch = environment if options.as_installed else dict(environment, LD_PRELOAD=FAST_MKL)
    kinds = ["", "+autocast", "+bf16"] if options.bf16 else [""]
    ways = options.ways.split(",") if options.ways else [way + kind for kind in kinds for way in WAYS]
    head = ["ours"] + ["ours+bf16"] * options.bf16 + ways + ["ours / best"] + ["bf16 / any"] * options.bf16
    print("tokens/s\n" + f"{'config':8}" + "".join(f" {title:>{max(9, len(title))}}" for title in head))
    for name in options.configs.split(","):
        tokens = CONFIGS[name][-1] * CONFIGS[name][-2]
        mine, theirs = [0.0] * (1 + options.bf16), {}
        for way in ways:
            command = [sys.executable, __file__, "--threads", str(options.threads), "--worker", name, way]
            best = 0
            with subprocess.Popen(command, env=for_torch, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True) as process:
                if process.stdout.readline().strip() == "ready":  # otherwise this way does not exist here
                    for _ in range(options.rounds):
                        now = ours(name, options.seconds, options.bf16, environment)
                        mine = [max(pair) for pair in zip(mine, now)]
                        best = answer(process, options.seconds)
                        if best is None:
                            break
                        theirs[way] = max(theirs.get(way, 0), tokens / best)
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            if best is None:
                sys.exit(f"peers.py: {name}, {way}: PyTorch ended during a measurement (out of memory?); "
                         f"echo 1 | python {sys.argv[0]} --worker {name} {way} shows what it says")
        ratios = []
        for bf16, speed in enumerate(mine):
            known = [theirs[way] for way in theirs if bf16 or not way.endswith(("+autocast", "+bf16"))]
            ratios.append(f"{speed / max(known):.2f}" if known else "-")
        cells = [f"{speed:.0f}" for speed in mine] + [f"{theirs[w]:.0f}" if w in theirs else "-" for w in ways] + ratios
        print(f"{name:8}" + "".join(f" {c:>{max(9, len(t))}}" for t, c in zip(head, cells)), flush=True)


if __name__ == "__main__":
    main()
