#!/usr/bin/env python3
"""What opens the models, and computes the same. From the project's folder, after `make`:

    python3 dev/engines/check.py [ENGINE ...]            runs engines (all), compares with results.json
    python3 dev/engines/check.py --write [ENGINE ...]    takes what they do into results.json and README.md
    python3 dev/engines/check.py --check                 runs nothing: do versions, results.json and README.md agree?

Trains a tiny model of each class and lets each engine, at its version and in an environment of its own in
build/engines/, continue a text: COUNT greedy tokens and the logits of the first one, beside train_moe's. "same": equal
tokens and log-probabilities within TOLERANCE. Ends with `N passed, N failed`.
"""
import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import venv

from engines import COUNT, ENGINES, PROMPT, ROOT, VOCABULARY, error_in

HERE, TOLERANCE = ROOT / "dev/engines", 1e-3       # of log-probabilities; 2e-5 was seen
MARGIN = 0.01                                       # of the likeliest token's logit over the next, at least
NEW = "--steps 150 --batch 4 --seq 128 --lr 0.005 --layers 2 --hidden 64 --heads 2"
MORE = "--steps 60 --batch 4 --seq 128 --lr 0.003"
# label: the model it comes from, options of train_moe; or the options of upcycle that come before
MODELS = {
    "Llama": ("", f"{NEW} --arch mixtral --dense"),
    "Qwen2": ("biases in Llama", MORE),
    "Qwen3, tied": ("", f"{NEW} --dense --tie"),
    "Mixtral": ("", f"{NEW} --arch mixtral --experts 4"),
    "Mixtral, upcycled from that Llama": ("upcycle Llama --experts 4 --shard-size 1M", ""),
    "Qwen2-MoE": ("upcycle Qwen2 --experts 4 --norm-topk 0", MORE),
    "Qwen2-MoE, `norm_topk_prob` true": ("upcycle Qwen2 --experts 4", MORE),
    "Qwen3-MoE": ("", f"{NEW} --experts 4"),
    "Qwen3-MoE, `norm_topk_prob` false": ("", f"{NEW} --experts 4 --norm-topk 0"),
    "Qwen3-MoE, every second layer dense": ("", f"{NEW} --experts 4 --sparse-step 2"),
    "OLMoE": ("", f"{NEW} --arch olmoe --experts 4"),
    "OLMoE, `norm_topk_prob` true": ("", f"{NEW} --arch olmoe --experts 4 --norm-topk 1"),
    "OLMoE, fewer key and value heads": ("", f"{NEW} --arch olmoe --experts 4 --kv-heads 1"),
    "Dots1": ("", f"{NEW} --router sigmoid --experts 4"),
    "Dots1, no fewer key and value heads": ("", f"{NEW} --router sigmoid --experts 4 --kv-heads 2"),
    "Dots1, no fewer, and a shared expert": ("shared expert in Dots1, no fewer key and value heads", MORE),
    "`train_moe`: the router lpr": ("", f"{NEW} --router lpr --experts 4")}


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.decode()}")
    return done.stdout


# ---- models ----------------------------------------------------------------------------------------------------------

def read_tensors(path):
    """{name: (dtype, shape, bytes)} of a safetensors file, without a library."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[start + t["data_offsets"][0]:start + t["data_offsets"][1]])
            for name, t in header.items()}


def write_tensors(path, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(t[2] for t in tensors.values()))


def waves(*shape, size):
    """Numbers that are neither 0 nor alike."""
    count = math.prod(shape)
    return "F32", list(shape), struct.pack(f"<{count}f", *(size * math.sin(1 + 1.7 * i) for i in range(count)))


def add_to(source, target, what):
    """What train_moe reads and trains, but does not begin: Qwen2's biases, Dots1's shared expert."""
    shutil.copytree(source, target)
    config, tensors = json.loads((target / "config.json").read_text()), read_tensors(target / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        if what.startswith("biases"):
            config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
            for x in "qkv":
                rows = tensors[f"{name}self_attn.{x}_proj.weight"][1][0]
                tensors[f"{name}self_attn.{x}_proj.bias"] = waves(rows, size=0.3)
        else:
            config["n_shared_experts"] = 1
            width, hidden = tensors[f"{name}mlp.experts.0.up_proj.weight"][1]
            for x, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                tensors[f"{name}mlp.shared_experts.{x}_proj.weight"] = waves(*shape, size=0.05)
    (target / "config.json").write_text(json.dumps(config))
    if config["model_type"] == "qwen2":             # or transformers adds an unknown token as id 256
        path = target / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": "\0"}))
    write_tensors(target / "model.safetensors", tensors)


def make_model(label, folder):
    """The directory, and what train_moe says of it. Drawn again while two tokens are nearly as likely somewhere."""
    source, options = MODELS[label]
    target, start = folder / label, folder / f"start of {label}"
    if source.startswith("upcycle"):
        _, dense, *more = source.split()
        run("./upcycle", folder / dense, start if options else target, *more)
    elif source:
        add_to(folder / source.split(" in ")[1], start, source)
    for seed in range(1, 20):
        if options:
            shutil.rmtree(target, ignore_errors=True)
            run("./train_moe", *(["--model", start] if source else []), "--data", "LICENSE", "--val", "none",
                *options.split(), "--seed", seed, "--out", target)
        logits, tokens, margin = ours(target, folder)
        if margin > MARGIN or not options:
            return target, (logits, tokens)
    sys.exit(f"{label}: every seed gives a text in which two tokens are as likely")


def ours(directory, folder):
    """What train_moe says: log-probabilities after the prompt, the greedy tokens, and their smallest margin."""
    prompt = PROMPT.encode()
    text = run("./train_moe", "--model", directory, "--prompt", PROMPT, "--tokens", COUNT, "--temperature", 0)
    text = text[:len(prompt) + COUNT]               # a sample ends its line
    (folder / "text").write_bytes(text + b"\n")
    run("./train_moe", "--model", directory, "--data", folder / "text", "--batch", 1, "--seq", len(text), "--dump",
        folder / "dump")
    _, shape, data = read_tensors(folder / "dump")["logits"]
    rows = range(len(prompt) - 1, shape[1] - 1)
    logits = [struct.unpack_from(f"<{VOCABULARY}f", data, 4 * VOCABULARY * t) for t in rows]
    margins = [sorted(row)[-1] - sorted(row)[-2] for row in logits]
    if [row.index(max(row)) for row in logits] != list(text[len(prompt):]):
        sys.exit(f"{directory}: --dump and --temperature 0 disagree")
    return logits[0], list(text[len(prompt):]), min(margins)


def log_probabilities(logits):
    most = max(logits)
    total = most + math.log(sum(math.exp(x - most) for x in logits))
    return [x - total for x in logits]


# ---- engines ---------------------------------------------------------------------------------------------------------

def environment(engine):
    """The Python of build/engines/ENGINE, which has the packages that this Python does not have at that version."""
    e, place = ENGINES[engine], ROOT / "build/engines" / engine
    wanted = json.dumps([e.packages, e.sources, e.without])
    python, done = place / "bin/python", place / "packages.json"
    if not done.exists() or done.read_text() != wanted:
        venv.create(place, clear=True, with_pip=True, system_site_packages=True)
        run(python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", *e.packages)
        if e.without:
            run(python, "-m", "pip", "uninstall", "-q", "-y", *e.without)
        for source in e.sources:
            run(python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", place / "source",
                source)
            archive, = (place / "source").glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(place / "source", [m for m in tar if m.name.endswith(".py")])
            archive.unlink()
        done.write_text(wanted)
    return python


def answers(engine, directories):
    """One for each directory; a process that dies has failed on the one that it was at."""
    python, given = environment(engine), []
    log = ROOT / "build/engines" / engine / "log.txt"
    while len(given) < len(directories):
        todo = directories[len(given):]
        done = subprocess.run([python, HERE / "engines.py", engine, log, *todo], capture_output=True, timeout=3600)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if len(lines) < len(todo):
            lines.append({"problem": f"ended with {done.returncode}: {error_in(log)}"})
        given += lines
    return given


def judge(answer, reference):
    logits, tokens = reference
    if "problem" in answer:
        return "refuses", " ".join(answer["problem"].split())
    off = max(abs(a - b) for a, b in zip(log_probabilities(answer["logits"]), log_probabilities(logits)))
    equal = sum(a == b for a, b in zip(answer["tokens"], tokens))
    said = f"log-probabilities off by {off:.1g}, {equal} of {COUNT} tokens equal"
    return "same" if off <= TOLERANCE and answer["tokens"] == tokens else "other", said


# ---- the page --------------------------------------------------------------------------------------------------------

def version(engine):
    return f"{engine} {ENGINES[engine].packages[0].split('==')[1]}"


def table(results):
    yield f"| saved as | {' | '.join(map(version, ENGINES))} |"
    yield "|---" * (1 + len(ENGINES)) + "|"
    words = {"same": "same", "other": "**other**", "refuses": "refuses"}
    for label in MODELS:
        yield f"| {label} | {' | '.join(words[results[version(engine)][label][0]] for engine in ENGINES)} |"
    yield ""
    for engine in ENGINES:
        reasons = {}
        for label, (result, said) in results[version(engine)].items():
            if result != "same":
                reasons.setdefault(said, []).append(label)
        for said, labels in reasons.items():
            yield f"- {engine}, {'; '.join(labels)}: {said}"


def page(results):
    text = (HERE / "README.md").read_text()
    for engine in ENGINES:
        if set(results.get(version(engine), ())) != set(MODELS):
            sys.exit(f"results.json has not these models with {version(engine)}: check.py --write '{engine}'")
    before, rest = text.split("<!-- check.py -->\n")
    after = rest.split("<!-- end -->\n")[1]
    return f"{before}<!-- check.py -->\n" + "\n".join(table(results)) + f"\n\n<!-- end -->\n{after}"


def recorded():
    path = HERE / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main():
    names, write, done = [a for a in sys.argv[1:] if not a.startswith("--")], "--write" in sys.argv, {}
    if wrong := {a for a in sys.argv[1:] if a.startswith("--")} - {"--check", "--write"}:
        sys.exit(f"no option {', '.join(wrong)}; there are --check and --write")
    if "--check" in sys.argv:
        current = page(recorded()) == (HERE / "README.md").read_text()
        sys.exit(0 if current else "README.md has another table; --write writes it")
    if unknown := set(names) - set(ENGINES):
        sys.exit(f"no engine {', '.join(sorted(unknown))}; there are: {', '.join(ENGINES)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        directories, references = zip(*[make_model(label, folder) for label in MODELS])
        for engine in names or ENGINES:
            results, before = done.setdefault(version(engine), {}), recorded().get(version(engine), {})
            for label, reference, answer in zip(MODELS, references, answers(engine, directories)):
                result, said = judge(answer, reference)
                results[label] = result, said.replace(f"{folder}/", "")[:160]
                right = write or before.get(label, [""])[0] == result
                print(f"{'ok    ' if right else 'FAILED'} {version(engine)}, {label}: {result}: {said}", flush=True)
                passed, failed = passed + right, failed + (not right)
    if write:
        known = recorded() | done
        known = {version(engine): known[version(engine)] for engine in ENGINES if version(engine) in known}
        (HERE / "results.json").write_text(json.dumps(known, indent=1) + "\n")
        (HERE / "README.md").write_text(page(known))
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
