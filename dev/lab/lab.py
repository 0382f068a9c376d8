"""From experiments (YAML) to stages, and from stages to rows. The Snakefile runs `lab.py stage ID`; by hand:

    python3 dev/lab/lab.py list                  the experiments, what they cost, what is done
    python3 dev/lab/lab.py freeze                take over ./train_moe and ./upcycle, if they give the same bytes
    python3 dev/lab/lab.py collect               copy finished stages' rows to dev/lab/results/

A stage is one call of upcycle or train_moe with its evaluation. Its id is a hash of all that decides its result, so
that experiments which want the same source model or baseline share it. The folder LAB (out/lab unless the environment
says otherwise) holds bin/ (frozen programs), text/, plan/ (stages as JSON), run/ (models) and done/ (rows of finished
stages).
"""
import csv
import fcntl
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LAB = pathlib.Path(os.environ.get("LAB") or ROOT / "out/lab").resolve()
TRAINER = os.environ.get("TRAINER") or "train_moe"          # or train_moe_cu: the one setting for a GPU
RESULTS = HERE / "results"
KINDS = {"debian": ["prose", "manuals", "code"], "tiny": ["words", "sums", "lists"], "shakespeare": ["plays"]}
WINDOW, ROWS = 128, 8                                       # tokens of a sequence, sequences of a batch, in evaluations
SETTINGS = ("text", "seeds", "train", "evaluate")
ROW = ("stage seed step tokens total_tokens flops loss jump gini min_max max_vio dead entropy top_gate "
       "twin_cosine twins_together sources overlap reading experts topk active parameters text data commit binary "
       "canary processor program threads load seconds command spec").split()
READERS = "stage layer kind shares".split()
CURVE = "stage step tokens val_loss max_vio dead gini min_max twin_cosine twins_together sources".split()


def fail(message):
    print(f"lab: {message}", file=sys.stderr)
    sys.exit(2)


# Experiments

def read_yaml(text):
    """YAML, in which words stay words: yes and no, as in YAML 1.2, and identifiers of papers, as 2509.26520."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            for key, value in node.value:
                if isinstance(value, yaml.ScalarNode) and key.value in ("claim", "source", "paper", "expected"):
                    value.tag = "tag:yaml.org,2002:str"
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [r for r in rules if r[0] != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    return yaml.load(text, Loader)


def arm_of(words, arms):
    """ARM, ARM@grow, ARM.KEY, ARM@grow.KEY -> (ARM or ARM@grow, KEY or loss); names of arms may have points. None: no
    arm."""
    words = str(words)
    arm = max((a for a in arms if words == a or words.startswith((f"{a}.", f"{a}@grow"))), key=len, default=None)
    rest = words[len(arm or ""):]
    grown, rest = rest.startswith("@grow"), rest.removeprefix("@grow")
    return (arm + "@grow" * grown, rest[1:] or "loss") if arm and rest[:1] in ("", ".") else None


def strings(x):
    """All that stands in lists and dicts, as strings."""
    if not isinstance(x, (list, dict)):
        return [str(x)]
    return [s for y in (x.values() if isinstance(x, dict) else x) for s in strings(y)]


def wrong_in(own):
    """What is no experiment in a file, in words; None: nothing was found."""
    def is_range(r):
        return isinstance(r, list) and len(r) == 2 and all(isinstance(v, (int, float)) for v in r)

    for key, kind, what in (("seeds", list, "a list of whole numbers"), ("use", list, "a list of arms"),
                            ("arms", dict, "arms by name"), ("train", str, "options of train_moe"),
                            ("evaluate", dict, "batches, trace or speed"), ("claims", list, "a list"),
                            ("extends", str, "an experiment"), ("gap", list, "[SMALLER, LARGER]"),
                            ("readings", dict, "after, total, alone, flops")):
        if key in own and not isinstance(own[key], kind):
            return f"{key} is {own[key]!r}, not {what}"
    if not own.get("seeds", [1]) or not all(type(s) is int for s in own.get("seeds", [])):
        return f"seeds is {own['seeds']}, not a list of whole numbers"
    if own.get("text", "debian") not in KINDS:
        return f"text '{own['text']}' is none of {', '.join(KINDS)}; a new one wants a line in KINDS of lab.py"
    for name, arm in own.get("arms", {}).items():
        if not isinstance(arm or {}, dict):
            return f"arm '{name}' is {arm!r}, not {{from, grow, train, ..}}"
        if unknown := set(arm or {}) - {"from", "grow", "train", "branch", "needs", "topk", "label"}:
            return f"arm '{name}' has unknown {', '.join(sorted(unknown))}"
    for c in own.get("claims", []):
        if not isinstance(c, dict) or not {"claim", "measure", "verdict"} <= set(c):
            return f"a claim has claim, measure and verdict; {c!r} lacks one"
        kinds = {"difference", "value", "ratio", "noise", "closure", "closures", "equal"}
        if not isinstance(c["measure"], dict) or len(c["measure"]) != 1 or not set(c["measure"]) <= kinds:
            return f"'{c['claim']}': its measure is one of {', '.join(sorted(kinds))}"
        if not isinstance(c["verdict"], dict) or not c["verdict"] or not all(
                is_range(r) or isinstance(r, list) and r and all(map(is_range, r)) for r in c["verdict"].values()):
            return f"'{c['claim']}': verdict gives each name a range [LEAST, MOST], or a list of them"
    return None


def read_experiment(name, within=()):
    """The YAML file NAME (as seen from FROM, where make was called) or experiments/NAME.yaml; with `extends`, settings
    and arms of that file stand before its own."""
    import yaml
    path = pathlib.Path(os.environ.get("FROM", ""), name) if name.endswith((".yaml", ".yml")) else \
        HERE / "experiments" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (HERE / "experiments").glob("*.yaml")))
        fail(f"{path}: no such file; an experiment is a YAML file or one of {known}")
    try:
        own = read_yaml(path.read_text()) or {}
    except yaml.YAMLError as e:
        fail(f"{path}: {' '.join(str(e).split())}")
    if wrong := "no keys and values" if not isinstance(own, dict) else wrong_in(own):
        fail(f"{path}: {wrong}; see template.yaml")
    own.setdefault("name", path.stem)
    own["given"] = name
    if "extends" in own:
        if own["extends"] in (name, *within):
            fail(f"{path}: extends itself")
        before = read_experiment(own["extends"], (name, *within))
        # the other arms only stand there to be built on
        asked = own.get("use", []) + list(own.get("arms") or {})
        own = {**{k: before[k] for k in SETTINGS if k in before}, **own,
               "arms": {**before["arms"], **own.get("arms", {})}}
        own["asked"] = asked
        # what is compared, if it is there
        if "gap" in before and set(before["gap"]) <= set(asked):
            own.setdefault("gap", before["gap"])
        own.setdefault("readings", {k: v for k, v in before.get("readings", {}).items()
                                    if set(strings(v)) <= set(asked)})
    unknown = set(own) - {"name", "given", "title", "extends", "arms", "asked", "use",
                          "tier", "notes", "gap", "claims", "readings", "figure", *SETTINGS}
    unknown |= set(own.get("asked", ())) - set(own.get("arms") or {})
    if unknown or not own.get("arms") or "train" not in own:
        wrong = "unknown " + ", ".join(sorted(unknown)) if unknown else "needs train and arms"
        fail(f"{path}: {wrong}; see template.yaml")
    own.setdefault("text", "debian")
    own.setdefault("seeds", [1, 2, 3])
    own.setdefault("asked", list(own["arms"]))
    for c in own.get("claims", []):
        kind, item = next(iter(c["measure"].items()))
        if kind == "equal" and not (isinstance(item, dict) and {"arms", "with", "by"} == set(item)):
            fail(f"{path}: '{c['claim']}': equal wants arms, with and by; see template.yaml")
        for words in strings([item["arms"], item["with"]] if kind == "equal" else item):
            if not arm_of(words, own["arms"]):
                fail(f"{path}: '{c['claim']}': '{words}' is no arm")
    return own


def words(text):
    try:
        return shlex.split(str(text)) if text else []
    except ValueError as e:
        fail(f"options {text}: {e}")


def known_options():
    """What the frozen programs' help names; an arm that wants more waits for it."""
    return {p: subprocess.run([LAB / "bin" / p, "--help"], capture_output=True, text=True).stdout
            for p in ("train_moe", "upcycle")}


def missing(arm, known):
    """The first option of an arm that the programs do not have."""
    for program, key in (("upcycle", "grow"), ("train_moe", "train")):
        for option in re.findall(r"--[a-z0-9-]+", arm.get(key) or ""):
            if not re.search(rf"{option}(?![a-z0-9-])", known[program]):
                return option
    for program, text in (arm.get("needs") or {}).items():
        if text not in known[program]:
            return text
    return None


def digest(spec):
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]


def stages_of(experiment, known=None):
    """{(arm, seed): id of its last stage; (arm@grow, seed): before it is trained on}, {id: spec}, [lines on arms left
    out]. An arm is `from` another one (or from nothing), then `grow` (options of upcycle), then `train` (options of
    train_moe); `branch: true` goes on with the very run, its optimizer and schedule, in a copy, which may have been
    grown with --optimizer."""
    last, specs, left, arms = {}, {}, [], experiment["arms"]

    def add(spec, kind):
        spec = {k: v for k, v in spec.items() if v is not None}
        name = f"{kind}-s{spec['seed']}-{digest(spec)}"
        specs[name] = spec
        return name

    def build(arm, seed, path=()):
        if (arm, seed) in last:
            return last[arm, seed]
        if arm not in arms or arm in path:
            fail(f"{experiment['name']}: arm '{path[-1] if path else arm}' is from '{arm}', which is "
                 f"{'itself' if arm in path else 'no arm'}")
        a, parent = arms[arm] or {}, None
        if known and (lacking := missing(a, known)):
            last[arm, seed] = None
            left.append(f"{experiment['name']}: {arm} is left out until the programs have {lacking}")
            return None
        if a.get("from"):
            parent = build(a["from"], seed, (*path, arm))
            if parent is None:
                last[arm, seed] = None
                return None
        text, evaluate = experiment["text"], experiment.get("evaluate", {})
        topk = a.get("topk")
        if "grow" in a:
            last[f"{arm}@grow", seed] = parent = add(dict(
                              text=text, seed=seed, parent=parent, grow=words(a["grow"]), evaluate=evaluate,
                              topk=None if "train" in a else topk), "grow")
        if a.get("branch") and "grow" in specs.get(parent, {}) and \
                option(specs[parent]["grow"], "--optimizer", "reset") == "reset":
            fail(f"{experiment['name']}: arm '{arm}': a branch that was grown wants --optimizer copy, scale or "
                 "interpolate in `grow`: a run goes on with its moments")
        if "train" in a:
            options = words(a["train"]) if a.get("branch") else words(experiment["train"]) + words(a["train"])
            # what is read after a transition is another epoch's order of the same text: no arm has seen it in this
            # order
            parent = add(dict(text=text, seed=seed, parent=parent, train=options, branch=a.get("branch"), topk=topk,
                              evaluate=evaluate), "branch" if a.get("branch") else "on" if parent else "scratch")
        last[arm, seed] = parent
        return parent

    for seed in experiment["seeds"]:
        for arm in experiment["asked"]:
            build(arm, seed)
    return {k: v for k, v in last.items() if v}, specs, sorted(set(left))


def option(words_, name, default=None):
    """The value of the last --name, as train_moe reads it."""
    found = [words_[n + 1] for n, w in enumerate(words_[:-1]) if w == name]
    return found[-1] if found else default


def whole(words_, name, default):
    """The same, a whole number."""
    value = str(option(words_, name, default))
    if not value.isdecimal():
        fail(f"{name} {value}: expected a whole number")
    return int(value)


def tokens_of(spec, specs):
    """Tokens that a stage trains on, and those with all before it."""
    own = before = 0
    if "parent" in spec:
        before = tokens_of(specs[spec["parent"]], specs)[1]
    if "train" in spec:
        chain, begun, size = whole_options(spec, specs), begun_at(spec, specs), 1
        for name, default in (("--batch", 8), ("--seq", 128), ("--accum", 1)):
            size *= whole(chain, name, default)
        own = (whole(chain, "--steps", 1000) - begun) * size
    return own, before + own


def whole_options(spec, specs):
    """Those that a branch has from the runs that it goes on with, also through a growth, and its own."""
    before = specs[spec["parent"]] if spec.get("branch") or "grow" in spec else None
    return (whole_options(before, specs) if before else []) + spec.get("train", [])


def begun_at(spec, specs):
    """The steps that the run had made before a branch of it; else 0."""
    return whole(whole_options(specs[spec["parent"]], specs), "--steps", 1000) if spec.get("branch") else 0


# Texts

def text_file(name):
    """A file of LAB/text, of data/text, or made: the tiny text that CI uses is written anew each time."""
    for folder in (LAB / "text", ROOT / "data/text"):
        if (folder / name).is_file():
            return folder / name
    if name.startswith("tiny-"):
        make_tiny()
    elif name.startswith("shakespeare-"):
        split_shakespeare()
    else:
        fail(f"{name} is neither in {LAB}/text nor in data/text: python3 data/fetch.py debian")
    return LAB / "text" / name


def write_texts(texts):
    (LAB / "text").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        temporary = LAB / "text" / f".{name}.{os.getpid()}"
        temporary.write_bytes(text)
        temporary.rename(LAB / "text" / name)


def make_tiny():
    """Three kinds of lines, from a generator of our own, so that all versions of Python write the same bytes."""
    state = 1

    def draw(n):
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % n

    def line(kind):
        if kind == "words":
            return " ".join("the cat dog bird sees likes hears a small red old house tree".split()[draw(13)]
                            for _ in range(6))
        a, b = draw(50), draw(50)
        return f"{a} + {b} = {a + b}" if kind == "sums" else ", ".join(str(a + n) for n in range(5))

    texts, train, short = {}, "", ""
    for kind in KINDS["tiny"]:
        lines = "".join(line(kind) + "\n" for _ in range(2500))
        texts[f"tiny-val-{kind}.txt"], train = lines[:8 * 1024 + 1].encode(), train + lines[8 * 1024 + 1:]
        short += lines[:1024]
    write_texts({**texts, "tiny-val.txt": (short + "\n").encode(), "tiny-train.txt": train.encode()})


def split_shakespeare():
    """tinyshakespeare: its last tenth is for validation."""
    text = text_file("tinyshakespeare.txt").read_bytes()
    cut = len(text) * 9 // 10
    write_texts({"shakespeare-train.txt": text[:cut], "shakespeare-val.txt": text[cut:cut + 64 * 1024 + 1],
                 "shakespeare-val-plays.txt": text[cut:]})


# Stages

def processor():
    """Which kind of processor: results have the same bytes on another machine of the kind."""
    found = {}
    with open("/proc/cpuinfo") as f:
        for text in f:
            key, _, value = text.partition(":")
            found.setdefault(key.strip(), value.strip())
    return (f"{found.get('model name', os.uname().machine)} "
            f"(family {found.get('cpu family', '?')} model {found.get('model', '?')})")


def sha(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]


def run(command, quiet=True):
    """Runs to the end. A signal that wants to stop us stops the program first, which saves."""
    child = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM))
    out, err = child.communicate()
    if child.returncode:
        lines = [line for line in err.splitlines() if not line.startswith("step ")] or [f"exit code {child.returncode}"]
        print(f"lab: {' '.join(map(str, command))}: {lines[-1]}", file=sys.stderr)
        sys.exit(child.returncode)
    return out


def canary(programs):
    """A fingerprint of what programs compute here: of the weights of 12 tiny steps, a growth and 12 more."""
    folder = LAB / f"canary.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    small = ["--data", text_file("tiny-train.txt"), "--val", "none", "--steps", "12", "--batch", "4", "--seq", "64",
             "--lr", "2e-3", "--warmup", "4", "--threads", "1"]
    run([programs / TRAINER, *small, "--layers", "2", "--hidden", "64", "--experts", "4", "--out", folder / "a"])
    run([programs / "upcycle", folder / "a", folder / "b", "--experts", "8", "--threads", "1"])
    run([programs / TRAINER, *small, "--model", folder / "b", "--out", folder / "c"])
    found = sha(folder / "c/model.safetensors")
    shutil.rmtree(folder)
    return found


def freeze(replace):
    """Copies the programs to LAB/bin, where builds of later days do not reach them. Another build may take their place
    if it computes the same bytes. Returns what is frozen."""
    folder, note = LAB / "bin", LAB / "bin/frozen.json"
    old = json.loads(note.read_text()) if note.is_file() else None
    if old and not replace:
        if old["processor"] != processor() and canary(folder) != old["canary"]:
            fail(f"{LAB} was begun on {old['processor']}, on this {processor()} its programs compute other bytes: take "
                 "another folder, LAB=out/lab2, and programs built for both, make ARCH=-march=...")
        return dict(old, processor=processor())
    LAB.mkdir(parents=True, exist_ok=True)
    fresh = LAB / "bin.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for program in {"train_moe", "upcycle", TRAINER}:
        if not (ROOT / program).is_file():
            fail(f"{ROOT / program} is not there: make {program}")
        shutil.copy2(ROOT / program, fresh / program)
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=10"], capture_output=True,
                         text=True)
    new = dict(commit=git.stdout.strip(), processor=processor(), canary=canary(fresh), program=TRAINER,
               binary=hashlib.sha256(b"".join((fresh / p).read_bytes() for p in (TRAINER, "upcycle"))).hexdigest()[:12])
    if old and old["canary"] != new["canary"]:
        shutil.rmtree(fresh)
        fail(f"the new programs compute other bytes (canary {new['canary']}, in {LAB} {old['canary']}): pairs want the "
             "same; take another folder, LAB=out/lab2")
    (fresh / "frozen.json").write_text(json.dumps(new, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return new


def command_of(name, spec, threads):
    """The command that makes a stage's model."""
    out, seed = LAB / "run" / name, spec["seed"]
    texts = [text_file(f"{spec['text']}-{t}.txt") for t in ("train", "val")]
    parent = LAB / "run" / spec["parent"] if "parent" in spec else None
    if "grow" in spec:
        calibrate = ["--calibrate", texts[0]] if "--select" in spec["grow"] or "cluster" in spec["grow"] else []
        return [LAB / "bin/upcycle", parent, out, *spec["grow"], *calibrate, "--seed", seed, "--threads", threads,
                "--force"]
    begin = [] if parent is None or spec.get("branch") else ["--model", parent]
    seeded = [] if spec.get("branch") else ["--seed", seed if parent is None else 1000 + seed]
    return [LAB / "bin" / TRAINER, *begin, "--data", texts[0], "--val", texts[1], *seeded, *spec["train"], "--threads",
            threads, "--val-batches", 0, "--save-every", 500, "--resume", "--out", out]


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def twins_of(folder):
    """Of each layer, the family of every expert, as upcycle's receipt has it; None without."""
    path = folder / "upcycle.json"
    if not path.is_file():
        return None
    return {layer["layer"]: layer["family"] for layer in json.loads(path.read_text())["layers"] if "family" in layer}


def routing(traces, twins, experts):
    """Figures from lists of tokens and their experts. MaxVio and the like: means over layers. overlap: of the tokens
    that reach either of two twins, the share that reaches both. reading: what an expert's name says about the kind of
    text, the mutual information in nats. Also, for each kind, its share of every expert's tokens."""
    import numpy
    import pandas
    kinds = list(traces)
    tables = [pandas.read_csv(traces[kind]).assign(kind=n) for n, kind in enumerate(kinds)]
    table, figures, readers = pandas.concat(tables), {}, []
    columns = [c for c in table if c.startswith("expert_")]
    for layer, rows in table.groupby("layer"):
        chosen, kind = rows[columns].to_numpy(), rows["kind"].to_numpy()
        hit = numpy.zeros((len(rows), experts), bool)
        numpy.put_along_axis(hit, chosen, True, 1)
        counts = numpy.array([hit[kind == n].sum(0) for n in range(len(kinds))], float)         # kind, expert
        load = counts.sum(0)
        figures.setdefault("max_vio", []).append(load.max() / load.mean() - 1)
        figures.setdefault("gini", []).append(numpy.abs(load[:, None] - load).sum() / (2 * experts * load.sum()))
        figures.setdefault("min_max", []).append(load.min() / load.max())
        figures.setdefault("dead", []).append(int((load == 0).sum()))
        p = counts / counts.sum()
        seen, independent = p > 0, p.sum(0) * p.sum(1, keepdims=True)
        figures.setdefault("reading", []).append(float((p[seen] * numpy.log(p[seen] / independent[seen])).sum()))
        readers += [(layer, k, " ".join(f"{s:.3f}" for s in counts[n] / numpy.maximum(load, 1))) for n,
                    k in enumerate(kinds)]
        family = numpy.array((twins or {}).get(layer) or range(experts))
        if len(set(family)) < experts:
            figures.setdefault("sources", []).append(
                numpy.mean([(hit[:, family == f].any(1)).sum() for f in set(family)]) * len(set(family)) / len(rows))
            figures.setdefault("twins_together", []).append(
                numpy.mean(numpy.any([hit[:, family == f].sum(1) > 1 for f in set(family)], 0)))
            pairs = [(a, b) for a in range(experts) for b in range(a)
                     if family[a] == family[b] and load[a] + load[b] > 0]
            figures.setdefault("overlap", []).append(numpy.mean(
                [(hit[:, a] & hit[:, b]).sum() / (hit[:, a] | hit[:, b]).sum() for a, b in pairs]) if pairs else 0)
    return {k: sum(v) if k == "dead" else float(numpy.mean(v)) for k, v in figures.items()}, readers


def in_turns(rate, model, source, turns=9):
    """Medians of the model's rate and of its share of the source's. A bare rate says as much of the machine's minute as
    of the model, so the two take turns; without a source the share is 1."""
    pairs = [(rate(model), rate(source) if source else None) for _ in range(turns)]
    return statistics.median(own for own, _ in pairs), statistics.median(own / (other or own) for own, other in pairs)


def grown_from(spec, specs):
    """The stage whose model a stage's model was grown from, if it was, also when it has been trained on since."""
    while spec and "grow" not in spec:
        spec = specs.get(spec.get("parent"))
    return spec and spec.get("parent")


def evaluate(name, spec, source, threads):
    """Figures of a stage's model: loss on each kind of text and on all; where it is asked for, with other K, and its
    speed beside that of the stage `source`; routing."""
    folder, kinds, traces, found, readers = LAB / "run" / name, KINDS[spec["text"]], {}, {}, []
    batches = spec["evaluate"].get("batches", 0)
    common = [LAB / "bin" / TRAINER, "--model", folder, "--eval", "--batch", ROWS, "--seq", WINDOW, "--threads",
              threads]
    config = json.loads((folder / "config.json").read_text())
    experts = int(config.get("num_local_experts") or config.get("n_routed_experts") or config.get("num_experts") or 0)

    def loss(kind, *more):
        return run([*common, "--data", text_file(f"{spec['text']}-val-{kind}.txt"), "--val-batches", batches, *more])

    def rate(model, batch):
        """Tokens/s of 32K tokens; the later of two --model and of two --batch holds."""
        said = run([*common, "--model", model, "--data", text_file(f"{spec['text']}-val-{kinds[0]}.txt"), "--batch",
                    batch, "--val-batches", 32768 // (batch * WINDOW)])
        return float(re.search(r"([\d.]+) tokens/s", said).group(1))

    def mean(losses):
        return sum(float(x) * int(n) for x, n in losses) / sum(int(n) for _, n in losses)

    score = re.compile(r"loss ([\d.]+) .*\| (\d+) tokens")
    losses = []
    for kind in kinds:
        said = loss(kind)
        losses.append(score.search(said).groups())
        found[f"loss_{kind}"] = float(losses[-1][0])
        if experts:
            traces[kind] = LAB / "run" / f"{name}.{kind}.trace"
            said = run([*common, "--data", text_file(f"{spec['text']}-val-{kind}.txt"), "--val-batches",
                        spec["evaluate"].get("trace", 16), "--load", "--trace", traces[kind]])
            summary = [line for line in said.splitlines() if line.startswith("load: ")][-1]
            for key, pattern in (("entropy", r"entropy ([\d.]+)"), ("top_gate", r"top gate ([\d.]+)"),
                                 ("twin_cosine", r"twins' cosine (-?[\d.]+)")):
                if m := re.search(pattern, summary):
                    found[key] = float(m.group(1))
    found["loss"] = mean(losses)
    for k in spec.get("topk") or ():
        found[f"loss_k{k}"] = mean([score.search(loss(kind, "--topk", k)).groups() for kind in kinds])
    for batch in spec["evaluate"].get("speed") or ():
        found[f"speed_b{batch}"], share = in_turns(lambda model: rate(model, batch), folder,
                                                   source and LAB / "run" / source)
        if source:
            found[f"speed_b{batch}_share"] = share
    if experts:
        figures, readers = routing(traces, twins_of(folder), experts)
        found.update(figures)
        for path in traces.values():
            path.unlink()
    total, active = re.search(r"parameters: (\d+)(?:, (\d+))?", said).groups()
    active = int(active or total)
    width = int(config["hidden_size"])
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    per_token = 6 * (active - int(config["vocab_size"]) * width) + \
        6 * layers * heads * int(config.get("head_dim") or width // heads) * WINDOW
    if (folder / "load.csv").is_file() and experts and "train" in spec:
        rows = rows_of(folder / "load.csv")
        rows = [r for r in rows if r["step"] == rows[-1]["step"] and r["expert"] == "0"]        # one for each layer
        for key in ("gini", "min_max", "max_vio", "dead", "entropy", "top_gate"):
            found[f"train_{key}"] = sum(float(r[key]) for r in rows) / (1 if key == "dead" else len(rows))
    found.update(experts=experts, topk=int(config.get("num_experts_per_tok") or 0), active=active,
                 parameters=int(total))
    return found, readers, per_token


def stage(name):
    """Runs a stage and writes its rows. What is there already is gone on with."""
    specs = {p.stem: json.loads(p.read_text()) for p in (LAB / "plan").glob("*.json")}
    spec, frozen, threads = specs[name], freeze(False), os.environ.get("THREADS", "1")
    out, started, command = LAB / "run" / name, time.time(), command_of(name, spec, threads)
    kept = LAB / "run" / f"{name}.seconds"                   # of the tries before this one, if they were stopped
    if spec.get("branch") and not out.is_dir():
        copy = LAB / "run" / f"{name}.copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(LAB / "run" / spec["parent"], copy)
        copy.rename(out)
    try:
        run(command)
    finally:
        seconds = time.time() - started + (float(kept.read_text()) if kept.is_file() else 0)
        kept.write_text(f"{seconds:.1f}")
    load = os.getloadavg()[1]
    figures, readers, per_token = evaluate(name, spec, grown_from(spec, specs), threads)
    parent = rows_of(LAB / "done" / f"{spec['parent']}.csv")[0] if "parent" in spec else None
    own, total = tokens_of(spec, specs)
    curve, begun = [], begun_at(spec, specs)
    if "train" in spec:
        by_step = {}
        for row in rows_of(out / "load.csv") if figures["experts"] else ():
            if row["expert"] == "0":
                by_step.setdefault(row["step"], []).append(row)
        for row in rows_of(out / "val.csv"):
            steps = int(row["step"])
            if steps <= begun:
                continue
            layers = by_step.get(row["step"], [])
            curve.append({"stage": name, **row, "tokens": int(row["tokens"]) * (steps - begun) // steps,
                          **{k: f"{sum(float(r[k]) for r in layers) / (1 if k == 'dead' else len(layers)):.6g}"
                                                   for k in CURVE[4:] if layers and layers[0][k] != ""}})
    row = dict(figures, stage=name, seed=spec["seed"], step=curve[-1]["step"] if curve else 0,
               tokens=own, total_tokens=total, flops=f"{own * per_token + float(parent['flops'] if parent else 0):.6g}",
               jump=figures["loss"] - float(parent["loss"]) if "grow" in spec else None, text=spec["text"],
               data=sha(text_file(f"{spec['text']}-train.txt")), threads=threads, load=f"{load:.2f}",
               seconds=f"{seconds:.1f}",
               command=" ".join(shlex.quote(relative(c)) for c in command), spec=json.dumps(spec),
               **frozen)
    (LAB / "done").mkdir(exist_ok=True)
    write_rows(LAB / "done" / f"{name}.readers", READERS, [dict(zip(READERS, (name, *r))) for r in readers])
    write_rows(LAB / "done" / f"{name}.curve", CURVE, curve)
    extra = sorted(k for k in row if k.startswith(("loss_", "train_", "speed_")))
    columns = ROW[:ROW.index("jump")] + extra + ROW[ROW.index("jump"):]
    write_rows(LAB / "done" / f"{name}.csv", columns, [row])
    kept.unlink(missing_ok=True)
    progress(name, row, seconds)


def relative(word):
    """A word of a command as it stands in rows: without the folders that a machine has LAB and the project in."""
    return str(word).replace(f"{LAB}/", "").replace(f"{ROOT}/", "")


def write_rows(path, columns, rows):
    """The whole file or nothing."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: f"{v:.6f}".rstrip("0").rstrip(".") if isinstance(v, float) else v for k, v in row.items()})
    temporary = path.with_name(path.name + f".{os.getpid()}")
    temporary.write_text(text.getvalue())
    temporary.rename(path)


def progress(name, row, seconds):
    """One line: what is done, how much is left, when it will be, at the pace since the plan was made."""
    wanted = json.loads((LAB / "wanted.json").read_text()) if (LAB / "wanted.json").is_file() else {"stages": {}}
    left = {n: tokens for n, tokens in wanted["stages"].items() if not (LAB / "done" / f"{n}.csv").is_file()}
    title = wanted.get("names", {}).get(name, name)
    line = f"{title}: loss {float(row['loss']):.4f}, {seconds:.0f} s; {len(left)} stages left"
    done = sum(wanted["stages"].values()) - sum(left.values())
    if left and done > 0:
        seconds_left = (time.time() - wanted["begun"]) * sum(left.values()) / done
        line += f", {int(seconds_left // 3600)}:{int(seconds_left % 3600 // 60):02d} h at this pace"
    print(line, file=sys.stderr, flush=True)


# Plans and results

def plan(names):
    """Writes the stages of experiments to LAB/plan; returns {id: spec}, with what they want before them."""
    freeze(False)
    specs, known, titles = {}, known_options(), {}
    for name in names:
        experiment = read_experiment(name)
        last, found, left = stages_of(experiment, known)
        specs.update(found)
        titles.update({n: f"{experiment['name']}/{arm}/{seed}" for (arm, seed), n in last.items() if n})
        for line in left:
            print(f"lab: {line}", file=sys.stderr)
    (LAB / "plan").mkdir(exist_ok=True)
    for name, spec in specs.items():
        path = LAB / "plan" / f"{name}.json"
        if not path.is_file():
            path.write_text(json.dumps(spec))
    # a stage costs its tokens, and about a third of a token for each that is evaluated
    todo = {n: tokens_of(s, specs)[0] + 170_000 for n, s in specs.items() if not (LAB / "done" / f"{n}.csv").is_file()}
    if "remote" not in sys.argv:                # a job of a cluster makes the plan again
        (LAB / "wanted.json").write_text(json.dumps(dict(begun=time.time(), stages=todo, names=titles)))
    return specs


def collect():
    """Brings the rows of finished stages into dev/lab/results/, those of the experiments in experiments/: what somebody
    asks in a file of his own stays in LAB. A row that is there and not in LAB stays; so does one of another canary,
    whose pairs LAB's would take away."""
    RESULTS.mkdir(exist_ok=True)
    there = {r["stage"]: r["canary"] for r in rows_of(RESULTS / "stages.csv")} if (RESULTS / "stages.csv").is_file() \
        else {}
    other = {p.stem for p in (LAB / "done").glob("*.csv")
             if p.stem in there and rows_of(p)[0]["canary"] != there[p.stem]}
    if other:
        print(f"lab: {len(other)} rows of dev/lab/results/ stay as they are: {LAB}'s have another canary. Delete them "
              "there, with their pairs, to replace them", file=sys.stderr)
    wanted = {n for p in (HERE / "experiments").glob("*.yaml") for n in stages_of(read_experiment(p.stem))[1]}
    for target, pattern, sort in (("stages", "*.csv", "stage"), ("curves", "*.curve", "stage"),
                                  ("readers", "*.readers", "stage")):
        rows, columns, path = {}, [], RESULTS / f"{target}.csv"
        for source in [path, *sorted((LAB / "done").glob(pattern))]:
            for row in rows_of(source) if source.is_file() else ():
                if row[sort] not in wanted or source != path and row[sort] in other:
                    continue
                if target == "readers" and "-s1-" not in row[sort]:     # all seeds' are MBs; `reading` sums them up
                    continue
                key = (row[sort], row["step"] if target == "curves" else "", row.get("layer"), row.get("kind"))
                rows[key] = row
                columns += [c for c in row if c not in columns]
        if rows:
            write_rows(path, columns, [rows[k] for k in sorted(rows, key=lambda k: [str(x).rjust(12) for x in k])])
            print(f"{relative(path)}: {len(rows)} rows")


def show_list():
    for path in sorted((HERE / "experiments").glob("*.yaml")):
        experiment = read_experiment(path.stem)
        last, specs, left = stages_of(experiment, known_options() if (LAB / "bin").is_dir() else None)
        done = sum((LAB / "done" / f"{n}.csv").is_file() for n in specs)
        tokens = sum(tokens_of(s, specs)[0] for s in specs.values())
        print(f"{path.stem:<14} {tokens / 1e6:6.1f}M tokens, {done} of {len(specs)} stages done   "
              f"{experiment.get('title', '')}")
        for line in left:
            print(f"           {line}")


def main():
    action, names = (sys.argv[1:2] or ["list"])[0], sys.argv[2:]
    if action == "stage":
        stage(names[0])
    elif action == "freeze":
        print(json.dumps(freeze(True), indent=1))
    elif action == "collect":
        with open(HERE / "lab.py") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            collect()
    elif action == "list":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # list | head
        show_list()
    else:
        fail(f"'{action}' is none of list, freeze, collect, stage")


if __name__ == "__main__":
    main()
