#!/usr/bin/env python3
"""Four ways to balance a router, on the same text, budget and seeds: no balancing, the balance loss, the loss-free bias of
a sigmoid router, and Latent Prototype Routing. Prints a table of what each costs and brings.

    python3 dev/ablations/routers.py data/text/tinyshakespeare.txt
"""
import argparse
import csv
import pathlib
import statistics
import subprocess
import sys

VARIANTS = {
    "softmax, no balancing": ["--aux", "0"],
    "softmax, aux 0.01": ["--aux", "0.01"],
    "sigmoid, loss-free bias": ["--router", "sigmoid"],
    "LPR": ["--router", "lpr"],
}
MODEL = ["--experts", "16", "--expert-ffn", "128", "--topk", "2"]


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def figures(out):
    """Of a finished run: the last validation loss, the layers' mean load figures since the validation before, the speed."""
    last = rows(out / "load.csv")
    last = [r for r in last if r["step"] == last[-1]["step"] and r["expert"] == "0"]      # one row for each layer

    def mean(key):
        return statistics.mean(float(r[key]) for r in last)

    return dict(loss=float(rows(out / "val.csv")[-1]["val_loss"]), gini=mean("gini"), min_max=mean("min_max"),
                max_vio=mean("max_vio"), dead=sum(int(r["dead"]) for r in last), entropy=mean("entropy"),
                top_gate=mean("top_gate"),
                speed=statistics.median(float(r["tokens_per_s"]) for r in rows(out / "log.csv")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("text")
    parser.add_argument("--steps", default="2000")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--out", default="out/routers", type=pathlib.Path)
    args = parser.parse_args()
    print("| router | seed | validation loss | Gini | min/max | MaxVio | dead | entropy | top gate | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, options in VARIANTS.items():
        for seed in args.seeds.split(","):
            out = args.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            out.parent.mkdir(parents=True, exist_ok=True)
            if not (out / "trainer.json").exists():
                command = ["./train_moe", "--data", args.text, "--steps", args.steps, "--schedule", "cosine", "--seed", seed,
                           "--val-every", "500", "--val-batches", "0", "--save-every", "0", "--out", str(out)]
                done = subprocess.run(command + MODEL + options, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-500:])
            f = figures(out)
            print(f"| {name} | {seed} | {f['loss']:.4f} | {f['gini']:.3f} | {f['min_max']:.3f} | {f['max_vio']:.2f} | "
                  f"{f['dead']} | {f['entropy']:.3f} | {f['top_gate']:.3f} | {f['speed']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
