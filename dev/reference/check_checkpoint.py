#!/usr/bin/env python3
"""Opens a checkpoint with transformers and compares a dump of train_moe with what transformers computes in fp64.

DUMP.safetensors is what `./train_moe --model DIR --data F --dump DUMP.safetensors` writes. tokens, targets and logits
must be there; of loss, aux_loss, z_loss, router.L and grad.NAME what it has is checked.
"""

import argparse
import sys

import torch

import hf

failed = False


def check(name, error, tolerance, note=""):
    global failed
    passed = error <= tolerance
    failed |= not passed
    print(f"{'ok    ' if passed else 'FAILED'} {name:<29} {error:.2e} (at most {tolerance:.0e}) {note}")


def differing(experts, chosen, tolerance):
    """How many tokens go elsewhere. Experts whose scores are closer than the tolerance may stand for each other."""
    if experts.shape != chosen.experts.shape or experts.min() < 0 or experts.max() >= chosen.scores.shape[1]:
        return float("inf")
    gap = (chosen.scores.gather(1, experts) - chosen.scores.gather(1, chosen.experts)).abs() > tolerance
    ordered = experts.sort(dim=-1)[0]
    twice = ordered[:, 1:] == ordered[:, :-1]
    return int((gap.any(dim=-1) | twice.any(dim=-1)).sum())


def print_yardstick(args, tokens, targets, logits, gradients):
    """How far transformers in fp32 is from itself in fp64: what may be asked of a model with large activations."""
    model = hf.load(args.directory, torch.float32, exact=False)
    fp32_logits, routing = hf.run(model, tokens)
    loss = hf.cross_entropy(fp32_logits, targets)
    (loss + args.aux * hf.aux_loss(routing, args.aux_form) + args.z_loss * hf.z_loss(routing)).backward()
    worst, name = max((hf.relative_error(g, gradients[f"grad.{name}"]), name)
                      for name, g in hf.gradients(model).items() if g.numel())
    print(f"transformers in fp32: logits {float((fp32_logits.detach() - logits).abs().max()):.2e}, "
          f"gradients {worst:.2e} (worst: grad.{name})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("dump", metavar="DUMP.safetensors")
    parser.add_argument("--class", dest="class_name", help="the class that transformers must choose")
    parser.add_argument("--aux", type=float, default=0.0, help="coefficient of the balance loss in the gradient")
    parser.add_argument("--aux-form", choices=("switch", "hf"), default="switch")
    parser.add_argument("--z-loss", type=float, default=0.0, help="coefficient of the z-loss in the gradient")
    parser.add_argument("--fp32", action="store_true", help="transformers' own arithmetic, for large models")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--yardstick", action="store_true", help="print the error of transformers itself in fp32")
    parser.add_argument("--verbose", action="store_true", help="a line for every gradient, not only for the ten worst")
    args = parser.parse_args()

    model = hf.load(args.directory, torch.float32 if args.fp32 else torch.float64, exact=not args.fp32)
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters())} parameters, all keys found and used")
    if args.class_name and type(model).__name__ != args.class_name:
        sys.exit(f"FAILED class is {type(model).__name__}, expected {args.class_name}")

    dump, _ = hf.read(args.dump)
    tokens, targets = dump["tokens"].long(), dump["targets"].long()
    logits, routing = hf.run(model, tokens)
    loss = hf.cross_entropy(logits, targets)
    aux, z = hf.aux_loss(routing, args.aux_form), hf.z_loss(routing)
    check("logits, max abs error", float((dump["logits"] - logits.detach()).abs().max()), args.tolerance,
          f"std {float(logits.detach().std()):.2f}")
    for name, value in (("loss", loss), ("aux_loss", aux), ("z_loss", z)):
        if name == "aux_loss" and model.config.model_type == "dots1":
            continue  # not defined for sigmoid scores
        if name in dump:
            exact = float(value.detach())
            check(f"{name}, relative error", abs(float(dump[name]) - exact) / max(1.0, abs(exact)), args.tolerance,
                  f"{exact:.6f}")

    for layer, chosen in routing.items():
        if f"router.{layer}" in dump:
            count = differing(dump[f"router.{layer}"].long(), chosen, args.tolerance)
            check(f"router.{layer}, tokens that differ", count, 0, f"of {len(chosen.experts)}")
    unknown = {key for key in dump if key.startswith("router.")} - {f"router.{layer}" for layer in routing}
    if unknown:
        check("router.L of no sparse layer", len(unknown), 0, " ".join(sorted(unknown)))

    if any(key.startswith("grad.") for key in dump):
        (loss + args.aux * aux + args.z_loss * z).backward()
        gradients = {f"grad.{name}": g for name, g in hf.gradients(model).items() if g.numel()}
        names = {key for key in dump if key.startswith("grad.") and dump[key].numel()} ^ gradients.keys()
        if names:
            check("gradients without partner", len(names), 0, " ".join(sorted(names)[:5]))
        errors = []
        for name in sorted(gradients.keys() - names):
            if dump[name].shape != gradients[name].shape:
                check(f"{name} shape", float("inf"), 0, f"{tuple(dump[name].shape)} {tuple(gradients[name].shape)}")
                continue
            # What cancels to rounding noise is zero: the router of a renormalised top-1, an expert without tokens.
            exact = gradients[name] * (gradients[name].norm() > 1e-14)
            errors.append((hf.relative_error(dump[name], exact), name))
        failing = [pair for pair in sorted(errors, reverse=True) if pair[0] > args.tolerance]
        for error, name in sorted(errors, reverse=True) if args.verbose else failing[:10]:
            check(name, error, args.tolerance)
        if errors:
            worst, name = max(errors)
            check(f"{len(errors)} gradients, relative L2", worst, args.tolerance,
                  f"worst: {name}, above: {len(failing)}")
        if args.yardstick:
            print_yardstick(args, tokens, targets, logits.detach(), gradients)
    sys.exit(failed)


if __name__ == "__main__":
    main()
