#!/usr/bin/env python3
"""One page that shows runs: what train_moe and upcycle left in OUT, as one HTML file that needs nothing else.

    python3 dev/report/run.py OUT [OUT2 ...] [--to FILE.html] [--trace T.csv ...] [--svg DIR]

It reads log.csv, val.csv, load.csv, upcycle.json, config.json, trainer.json, the commands in README.md, experts'
weights in model.safetensors, and what `./train_moe --model OUT --data F --eval --trace OUT/trace.csv` wrote (or
--trace, one for each OUT, in their order). What is missing is left out. The page is OUT/report.html unless --to says
otherwise. --svg writes three figures as files of their own: loss.svg (all runs), lineage.svg and tokens.svg (the last
run that has them).
"""
import argparse
import array
import collections
import csv
import html
import json
import math
import operator
import pathlib
import re
import struct
import sys

import draw
from draw import Series, figure, grid, heat, lines, table

MOST_TOKENS = 480               # of a text that is shown
MOST_ROWS = 60                  # of log.csv in its table
MOST_PRODUCTS = 1 << 23         # for the similarities of a layer: of large experts every n-th weight is taken
MOST_LAYERS = 4                 # whose similarities are shown
MOST_STEPS = 24                 # of load.csv in the table of loads
HUES = 16                       # of experts; with more of them these come again paler or underlined
UNSAID = {"mixtral": 8, "olmoe": 64, "qwen3_moe": 128, "qwen2_moe": 60}     # experts, where config.json has no number
KINDS = ["space", "line end", "lower case", "capital", "digit", "bracket", "other sign", "not ASCII"]


class Run:
    """What a directory holds. Rows of csv files are dictionaries of the text that stands there."""

    def __init__(self, path, trace):
        self.path = pathlib.Path(path)
        if not self.path.is_dir():
            sys.exit(f"run.py: {path}: not a directory; give what train_moe --out or upcycle wrote")
        self.folder = self.path.resolve()
        self.name = self.folder.name
        self.log, self.val, self.load = (self.rows(self.path / f"{n}.csv") for n in ("log", "val", "load"))
        self.config, self.trainer, self.receipt = (self.json(f"{n}.json") for n in ("config", "trainer", "upcycle"))
        if trace and not pathlib.Path(trace).is_file():
            sys.exit(f"run.py: --trace {trace}: no such file; train_moe --model {path} --data F --eval --trace {trace} "
                     "makes it")
        self.trace = self.rows(pathlib.Path(trace or self.path / "trace.csv"))
        if self.trace and not {"token", "layer", "expert_1", "gate_1"} <= set(self.trace[0]):
            sys.exit(f"run.py: {trace or self.path / 'trace.csv'}: not a trace, which has the columns token, layer, "
                     "expert_1, gate_1")
        names = [self.config.get(k) for k in ("n_routed_experts", "num_experts", "num_local_experts")]
        self.experts = next((n for n in names if n), UNSAID.get(self.config.get("model_type"), 0))
        card = self.path / "README.md"
        self.card = card.read_text(encoding="utf-8") if card.exists() else ""
        commands = re.search(r"## Commands\n\n((?:    .*\n)+)", self.card)
        self.commands = re.sub("^    ", "", commands.group(1), flags=re.M) if commands else ""

    def rows(self, path):
        if not path.exists():
            return []
        with open(path, newline="", encoding="utf-8") as f:
            return [r for r in csv.DictReader(f) if None not in r.values()]     # a killed run's last row may be cut

    def json(self, name):
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as e:
            sys.exit(f"run.py: {path}: not JSON: {e}")

    def points(self, rows, x, y):
        return [(float(r[x]), float(r[y])) for r in rows if r[y] and math.isfinite(float(r[y]))]


def tell_apart(paths):
    """Of each path its last name, or as many of its last as no other path has; one that comes again is numbered."""
    parts, names = [p.parts for p in paths], []
    for i, mine in enumerate(parts):
        others = [p for p in parts if p != mine]
        n = next((n for n in range(1, len(mine)) if all(p[-n:] != mine[-n:] for p in others)), len(mine))
        again = parts[:i].count(mine)
        names.append(pathlib.Path(*mine[-n:]).as_posix() + (f" ({again + 1})" if again else ""))
    return names


def smooth(points):
    """The mean of each point and those around it, 4 % of all."""
    n, sums = len(points), [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    half = n // 50
    return [(points[i][0], (sums[min(n, i + half + 1)] - sums[max(0, i - half)]) /
             (min(n, i + half + 1) - max(0, i - half))) for i in range(n)]


def spaced(rows, most=MOST_ROWS):
    """At most so many rows, first and last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def csv_table(rows, name, caption):
    return table(rows[0].keys(), [r.values() for r in rows], caption, name)


def with_numbers(drawing, corner, rows, row_names, column_names, caption, name):
    """A heat map and, to be opened, the same numbers as a table."""
    cells = [[n, *("" if v is None else f"{v:.4g}" for v in row)] for n, row in zip(row_names, rows)]
    numbers = draw.details(f"{caption}: numbers", table([corner, *column_names], cells, caption, name))
    return f"<div>{figure(drawing)}{numbers}</div>"


# ---------------------------------------------------------------------------------------------------------------------
# Curves

def loss_figure(runs, x, **size):
    series = []
    for slot, r in enumerate(runs):
        train, val = r.points(r.log, x, "train_loss"), r.points(r.val, x, "val_loss")
        if len(train) > 100 and not val:
            series.append(Series(r.name, train, slot=slot, faint=True))
        if val or train:
            series.append(Series(r.name, val or smooth(train), slot=slot))
    what = "validation loss" if any(r.val for r in runs) else "training loss"
    return lines(f"{what.capitalize()} against {x}", series, x, "nats a token", describe=f"{len(runs)} runs", **size)


def curves(runs):
    parts = []
    for x in ("step", "tokens"):
        drawn = [figure(loss_figure(runs, x))]
        for column, title, unit, log in (("train_loss", "Training loss", "nats a token", False),
                                         ("lr", "Learning rate", "", False), ("grad_norm", "Gradient norm", "", True)):
            series = []
            for slot, r in enumerate(runs):
                points = r.points(r.log, x, column)
                if column != "lr" and len(points) > 100:
                    series += [Series(r.name, points, slot=slot, faint=True), Series(r.name, smooth(points), slot=slot)]
                elif points:
                    series.append(Series(r.name, points, slot=slot))
            drawn.append(figure(lines(f"{title} against {x}", series, x, unit, log_y=log)))
        parts.append(f'<div class="by-{x}">{grid(drawn)}</div>')
    tables = []
    for i, r in enumerate(runs):
        kept = spaced(r.log)
        inside = csv_table(kept, f"log-{i}", f"{r.name}/log.csv: {len(kept)} of {len(r.log)} rows") if kept else ""
        inside += csv_table(r.val, f"val-{i}", f"{r.name}/val.csv") if r.val else ""
        tables += [draw.details(f"{r.name}: numbers of log.csv and val.csv", inside)] if inside else []
    switch = ('<input type="radio" name="x" id="x-step" checked><label for="x-step">against steps</label> '
              '<input type="radio" name="x" id="x-tokens"><label for="x-tokens">against tokens</label>')
    note = "<p class=note>Pale lines are single steps, strong ones means over 4 % of the run.</p>"
    return note + switch + "".join(parts + tables)


# ---------------------------------------------------------------------------------------------------------------------
# Experts

def by_layer(rows):
    """{(step, layer): its rows, one an expert}"""
    found = collections.defaultdict(list)
    for row in rows:
        found[int(row["step"]), int(row["layer"])].append(row)
    return found


def load_heat(run, slot):
    cells = by_layer(run.load)
    steps, layers = sorted({s for s, _ in cells}), sorted({layer for _, layer in cells})
    rows, names, groups = [], [], []
    for layer in layers:
        groups.append(len(rows))
        for e in range(len(cells[steps[-1], layer])):
            row = []
            for step in steps:
                counts = [int(r["assignments"]) for r in cells.get((step, layer), [])]
                row.append(counts[e] * len(counts) / sum(counts) if counts and sum(counts) else None)
            rows.append(row)
            names.append(f"{layer}.{e}")
    cell = max(3, min(14, 700 // len(rows)))
    drawn = heat(f"{run.name}: load", rows, names, steps, cell=cell, groups=groups,
                 share=lambda v: math.log2(max(v, .5)), key=("half of the mean or less", "twice the mean or more"),
                 row_label="layer.expert", column_label="step",
                 describe="blank is the mean; experts without a token are the strongest blue")
    kept = spaced(range(len(steps)), MOST_STEPS)
    return with_numbers(drawn, "layer.expert", [[row[i] for i in kept] for row in rows], names,
                        [steps[i] for i in kept], f"{run.name}: load, 1 is the mean, {len(kept)} of {len(steps)} steps",
                        f"loads-{slot}")


def load_section(runs):
    runs = [(slot, r) for slot, r in enumerate(runs) if r.load]
    drawn, means = [load_heat(r, slot) for slot, r in runs], {slot: {} for slot, _ in runs}
    for column, title in (("gini", "Gini of the loads"), ("max_vio", "MaxVio"), ("dead", "Dead experts in a layer"),
                          ("entropy", "Router entropy, nats"), ("top_gate", "Top gate"),
                          ("twin_cosine", "Twins' cosine"), ("twins_together", "Tokens with two twins"),
                          ("sources", "Sources a token")):
        series = []
        for slot, r in runs:
            points = collections.defaultdict(list)
            for (step, _), rows in by_layer(r.load).items():
                if rows[0][column]:
                    points[step].append(float(rows[0][column]))
            if points:
                means[slot][title] = {s: sum(v) / len(v) for s, v in sorted(points.items())}
                series.append(Series(r.name, list(means[slot][title].items()), slot=slot))
        if series:
            drawn.append(figure(lines(f"{title}, mean over layers", series, "step", "")))
    figures = [c for c in runs[0][1].load[0] if c not in ("step", "expert", "assignments")]
    tables = "".join(draw.details(f"{r.name}: last rows of load.csv", table(
        [*figures, "assignments of experts 0, 1, .."],
        [[rows[0][c] for c in figures] + [" ".join(x["assignments"] for x in rows)] for (s, _), rows in
         sorted(by_layer(r.load).items()) if s == int(r.load[-1]["step"])],
        f"{r.name}/load.csv, step {r.load[-1]['step']}", f"load-{slot}")) for slot, r in runs)
    for slot, r in runs:
        steps = spaced(sorted({s for points in means[slot].values() for s in points}))
        cells = [[s, *(f"{p[s]:.4g}" if s in p else "" for p in means[slot].values())] for s in steps]
        tables += draw.details(f"{r.name}: means over layers", table(["step", *means[slot]], cells, "means over layers",
                                                                     f"means-{slot}")) if steps else ""
    return grid(drawn) + tables


def expert_weights(run):
    """{layer: {expert: floats}} of some layers, and every how manieth weight that is."""
    E = run.experts or 1
    L = run.config.get("num_hidden_layers", 1)
    wanted = {round(i * (L - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)}
    found, step = collections.defaultdict(lambda: collections.defaultdict(lambda: array.array("f"))), 1
    for path in sorted(run.path.glob("model*.safetensors")):
        with open(path, "rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(size))
            for name, tensor in sorted(header.items()):
                at = re.search(r"layers\.(\d+)\..*experts\.(\d+)\..*weight$", name)
                if not at or int(at[1]) not in wanted or tensor["dtype"] not in ("F32", "BF16", "F16"):
                    continue
                start, end = tensor["data_offsets"]
                f.seek(8 + size + start)
                data, width = f.read(end - start), 4 if tensor["dtype"] == "F32" else 2
                step = max(1, 3 * (end - start) // width * E * E // 2 // MOST_PRODUCTS)
                if tensor["dtype"] == "BF16":       # the upper half of a float
                    data = b"\0\0".join([b""] + [data[i:i + 2] for i in range(0, len(data), 2 * step)])
                halves = tensor["dtype"] == "F16"
                numbers = struct.unpack(f"<{len(data) // 2}e", data) if halves else array.array("f", data)
                found[int(at[1])][int(at[2])].extend(numbers[::1 if tensor["dtype"] == "BF16" else step])
    return found, step


def similarity_section(runs):
    drawn, some = [], False
    for slot, r in enumerate(runs):
        layers, step = expert_weights(r)
        some |= step > 1
        for layer, experts in sorted(layers.items()):
            numbers = [experts[e] for e in sorted(experts)]
            norms = [math.sqrt(sum(map(operator.mul, w, w))) or 1 for w in numbers]
            rows = [[0.0] * len(numbers) for _ in numbers]
            for i, a in enumerate(numbers):
                for j, b in enumerate(numbers[:i + 1]):
                    rows[i][j] = rows[j][i] = sum(map(operator.mul, a, b)) / (norms[i] * norms[j])
            low = min(map(min, rows))
            square = heat(f"{r.name}, layer {layer}", rows, range(len(rows)), range(len(rows)), cell=None, widest=26,
                          share=lambda v, low=low: (v - low) / (1 - low) if low < 1 - 1e-6 else 1,
                          key=("", f"cosine 1; blank: {low:.4f}"), row_label="expert")
            drawn.append(with_numbers(square, "expert", rows, range(len(rows)), range(len(rows)),
                                      f"{r.name}, layer {layer}: cosines", f"similar-{slot}-{layer}"))
    note = f"Cosine of the weights of two experts, in at most {MOST_LAYERS} layers." + (
        " Of large experts some of the weights were taken." if some else "")
    return f"<p class=note>{note}</p>{grid(drawn)}" if drawn else ""


# ---------------------------------------------------------------------------------------------------------------------
# Lineage

def generations(receipt):
    """Receipts from the oldest to the last."""
    found = []
    while receipt:
        found.append(receipt)
        receipt = receipt.get("parent")
    return found[::-1]


def step_name(step):
    """The method; of a step that adds layers or widens, these, and the method if it did more."""
    words, growth = [], step.get("growth")
    if growth:
        old, new = max(growth["layers"]) + 1, len(growth["layers"])
        if new > old:
            how = "interpose" if growth["layers"] == sorted(growth["layers"]) else "stack"
            words.append(f"{old} → {new} layers, {how}")
        if growth["width"][0] < growth["width"][1]:
            words.append("width {} → {}".format(*growth["width"]))
    if not growth or step["experts"][0] != step["experts"][1] or step["method"] != "copy":
        words.append(step["method"])
    return "; ".join(words)


def ancestry(receipt, number):
    """For each step, the oldest first, the parents of the experts in what is now layer `number`: lists of places in
    the step's source, -1 for what is new. A layer that a step does not list was a dense FFN then: None."""
    found = []
    for step in reversed(generations(receipt)):
        entry = next((e for e in step["layers"] if e["layer"] == number), {})
        found.append(entry.get("source"))
        if "group" in entry:                            # merged: an expert has all of its group as parents
            found[-1] = [[e for e, g in enumerate(entry["group"]) if g == m] for m in range(len(entry["source"]))]
        number = step["growth"]["layers"][number] if step.get("growth") else number
    return found[::-1]


def lineage(run, number, width=360):
    """The experts of layer `number` as a tree."""
    steps, history = generations(run.receipt), ancestry(run.receipt, number)
    first = steps[0]
    levels = [[f"expert {e}" for e in range(first["experts"][0])] or
              (["FFN"] if len(first["sources"]) == 1 else tell_apart([pathlib.Path(s) for s in first["sources"]]))]
    levels += [["FFN"] if parents is None else [str(e) for e in range(len(parents))] for parents in history]
    edges = [parents or [0] for parents in history]
    slots = [list(range(len(levels[0])))]
    for parents in edges:                               # branches get colours where they first part
        fresh, firsts = len(set(slots[-1])) < 2, [p[0] if isinstance(p, list) else p for p in parents]
        slots.append([i if fresh or p < 0 else slots[-1][p] for i, p in enumerate(firsts)])
    said = ", ".join(f"{step_name(s)}: {s['experts'][0] or 'dense'} to {s['experts'][1] or 'dense'} experts"
                     for s in steps)
    return draw.tree(f"{run.name}: experts of layer {number}", levels, edges, list(map(step_name, steps)), width=width,
                     describe=said, slots=slots)


def folder_of(source, run, runs):
    """The folder that a receipt names: relative to where upcycle ran, perhaps here or in a folder above the run. What
    has moved is a run whose last two names it has."""
    for base in (pathlib.Path.cwd(), *run.folder.parents):
        found = (base / source).resolve()
        if found.is_dir() and found != run.folder:
            return found
    tail = pathlib.Path(source).parts[-2:]
    moved = {r.folder for r in runs if r.folder != run.folder and r.folder.parts[-2:] == tail}
    return moved.pop() if len(moved) == 1 else pathlib.Path(source)


def model_tree(runs):
    """All models that the runs come from, each a node in the generation that it was made in."""
    made = {}                                           # by folder: generation, parents, how
    for r in runs:
        chain, before = generations(r.receipt), []
        for i in range(len(chain) + 1):
            here = [folder_of(s, r, runs) for s in chain[i]["sources"]] if i < len(chain) else [r.folder]
            for n, model in enumerate(here):            # only of the first source the receipt tells the parents
                if model not in made or made[model][0] < i and n == 0:
                    made[model] = (i, before, step_name(chain[i - 1])) if i and n == 0 else (i, [], "")
            before = here
    levels = [[m for m in made if made[m][0] == i] for i in range(max(i for i, _, _ in made.values()) + 1)]
    if len(levels) < 2:
        return ""
    edges = [[[above.index(p) for p in made[m][1] if p in above] for m in level]
             for above, level in zip(levels, levels[1:])]
    names, gaps = dict(zip(made, tell_apart(list(made)))), [[made[m][2] for m in level] for level in levels[1:]]
    return draw.tree("Models", [[names[m] for m in level] for level in levels], edges, gaps,
                     slots=[list(range(len(level))) for level in levels])


def lineage_section(runs):
    models = model_tree(runs)
    drawn = [figure(models, "Each model and what it was upcycled from, by which method.")] if models else []
    sentences = []
    for r in runs:
        if not r.receipt:
            continue
        seen = []
        for entry in r.receipt["layers"]:
            history = ancestry(r.receipt, entry["layer"])
            if history not in seen:                     # layers that are alike are drawn once
                seen.append(history)
                drawn.append(figure(lineage(r, entry["layer"])))
        for s in generations(r.receipt):
            before, after = (n or "dense" for n in s["experts"])
            sentences.append([r.name, step_name(s), f"{before} → {after}", s["function"]])
    return grid(drawn) + table(["run", "step", "experts", "function"], sentences, "What each step keeps", "steps")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

def vocabulary(run):
    """What turns a token into text: bytes as themselves, others by tokenizer.json. Parts of a character are \\x.."""
    def said(some):
        return some.decode("utf-8", "backslashreplace")

    known = run.json("tokenizer.json")
    if run.trainer.get("reads_bytes", run.receipt.get("reads_bytes")) or run.config.get("vocab_size") == 256:
        return lambda token: said(bytes([token])) if token < 256 else f"<{token}>"
    model = known.get("model", {})
    pieces = model.get("vocab", {})
    unigram = [(piece, i) for i, (piece, _) in enumerate(pieces)] if isinstance(pieces, list) else pieces.items()
    pieces = {i: piece for piece, i in unigram}
    added = {t["id"]: t["content"] for t in known.get("added_tokens", [])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]   # GPT-2's letters for bytes
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    letters = letters if '"ByteLevel"' in json.dumps(known.get("decoder")) else {}

    def decode(token):
        piece = pieces.get(token, f"<{token}>")
        if token in added:
            return added[token]
        if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return said(bytes([int(piece[3:5], 16)]))
        if all(c in letters for c in piece):
            return said(bytes(letters[c] for c in piece))
        return piece.replace("\u2581", " ")
    return decode


def kind_of(text):
    c = text.strip(" \t")[:1] or " "
    tests = [c == " ", c in "\n\r", c.islower(), c.isupper(), c.isdigit(), c in "()[]{}<>", c.isascii()]
    return KINDS[next((i for i, found in enumerate(tests) if found), 7)] if c.isascii() else KINDS[7]


def shown(text):
    return text.replace("\n", "↵").replace("\r", "␍").replace("\t", "⇥").replace(" ", "␣")


def traced(run):
    """{layer: [(token's text, experts, gates), ..]} in the order of the text, and the number of experts. A token that
    gets fewer than K has -1 for the others."""
    decode, layers = vocabulary(run), collections.defaultdict(list)
    K = sum(c.startswith("expert_") for c in run.trace[0])
    for row in run.trace:
        ran = [k for k in range(1, K + 1) if row[f"expert_{k}"] and int(row[f"expert_{k}"]) >= 0]
        experts, gates = [int(row[f"expert_{k}"]) for k in ran], [row[f"gate_{k}"] for k in ran]
        layers[int(row["layer"])].append((decode(int(row["token"])), experts, gates))
    return layers, max([run.experts] + [e + 1 for tokens in layers.values() for _, es, _ in tokens for e in es])


def colour(expert, E):
    """Hue, strength and whether a line goes below it."""
    hues = min(E, HUES)
    return expert % hues * 360 // hues, (.38, .38, .16, .16)[expert // hues % 4], expert // hues % 2


def coloured(expert, E):
    hue, strength, line = colour(expert, E)
    return f'style="--h:{hue};--a:{strength}"' + ' data-line' * line


def tokens_of(run, slot):
    (layers, E), parts = traced(run), []
    for layer, tokens in sorted(layers.items()):
        spans = "".join(
            f'<span {coloured(e[0], E)} title="expert {", ".join(map(str, e))}; gates {", ".join(g)}" '
            f'data-e="{e[0]}">{html.escape(t).replace(chr(10), "↵" + chr(10))}</span>' if e else
            f'<span title="no expert">{html.escape(t)}</span>' for t, e, g in tokens[:MOST_TOKENS])
        gates = table(["place", "token", "experts", "gates"],
                      [[i, shown(t), ", ".join(map(str, e)), ", ".join(g)]
                       for i, (t, e, g) in enumerate(tokens[:MOST_TOKENS])],
                      f"Layer {layer}: experts and gates of each token", f"gates-{slot}-{layer}")
        everywhere = collections.Counter(t for t, e, _ in tokens for _ in e)
        total, rows, shares = sum(everywhere.values()), [], []
        for expert in range(E):
            mine = collections.Counter(t for t, e, _ in tokens if expert in e)
            count = sum(mine.values())
            score = {t: n * math.log(n * total / count / everywhere[t]) for t, n in mine.items()}
            best = sorted(score, key=lambda t: -score[t])[:8]
            kinds = collections.Counter()
            for t, n in mine.items():
                kinds[kind_of(t)] += n
            rows.append([expert, count, "  ".join(shown(t) for t in best if score[t] > 0)])
            shares.append([kinds[k] / count if count else 0 for k in KINDS])
        used = [i for i in range(len(KINDS)) if any(s[i] for s in shares)]
        numbers = [[s[i] for s in shares] for i in used], [KINDS[i] for i in used], range(E)
        drawn = heat(f"Layer {layer}: kinds of input of each expert", *numbers, cell=18, widest=32,
                     column_label="expert", key=("", "share of its assignments, from 0 to 1"))
        favourites = table(["expert", "assignments", "favourite tokens"], rows,
                           f"Layer {layer}: tokens that an expert reads more often than others do",
                           f"favourites-{slot}-{layer}")
        legend = " ".join(f'<span class=key {coloured(e, E)}>{e}</span>' for e in range(E))
        kinds = with_numbers(drawn, "kind", *numbers, f"Layer {layer}: kinds of input", f"kinds-{slot}-{layer}")
        parts.append(
            f'<div class="layer" data-layer="{layer}"><h3>Layer {layer}</h3><p>Experts {legend}</p>'
            f'<p class="tokens" lang="">{spans}</p>'
            f'{draw.details("experts and gates of each token", gates)}{grid([favourites, kinds])}</div>')
    options = "".join(f'<option value="{layer}">{layer}</option>' for layer in sorted(layers))
    shows = (" show-numbers", " checked") if E > HUES else ("", "")     # more experts than an eye can tell by colour
    return (f'<div class="trace{shows[0]}"><h3>{html.escape(run.name)}</h3><p><label>Layer <select>{options}</select>'
            f'</label> <label><input type="checkbox" class="numbers"{shows[1]}> show the experts\' numbers</label></p>'
            f'{"".join(parts)}</div>')


def tokens_svg(run, width=720, columns=88, rows=6):
    """The first lines of the text, for up to three layers, each character in the colour of its first expert."""
    title = f"{run.name}: which expert reads which token"
    (layers, E), body, y = traced(run), [draw.text(8, 16, title, kind="title")], 40
    size, names, keys = (width - 20) / columns, sorted(layers), (width - 116) // 24

    def area(expert, boxes):
        """boxes: x, y, width and height of each; the line is the last 2 units of the height."""
        hue, strength, line = colour(expert, E)
        paths = [(strength + .02, "".join(f"M{x:.1f} {y}h{w:.1f}v{h}h-{w:.1f}z" for x, y, w, h in boxes))]
        paths += [(1, "".join(f"M{x:.1f} {y + h - 2}h{w:.1f}v2h-{w:.1f}z" for x, y, w, h in boxes))] * line
        return "".join(f'<path d="{d}" fill="hsl({hue} 75% 50%)" fill-opacity="{a:.2g}"/>' for a, d in paths)

    for layer in sorted({names[0], names[len(names) // 2], names[-1]}):
        body.append(draw.text(8, y, f"layer {layer}, experts", kind="small"))
        for e in range(E):
            x, below = 116 + 24 * (e % keys), y + 18 * (e // keys)
            body += [area(e, [(x, below - 11, 20, 14)]), draw.text(x + 10, below, e, "middle", "small")]
        y += 18 * ((E - 1) // keys) + 20
        text, cells = [""], collections.defaultdict(list)
        for c, expert in ((c, experts[:1]) for piece, experts, _ in layers[layer] for c in piece):
            if c == "\n" or len(text[-1]) >= columns:
                text.append("")
            if len(text) > rows:
                break
            if c != "\n":
                for e in expert:
                    cells[e].append((10 + len(text[-1]) * size, y + (len(text) - 1) * 17 - 12, size, 16))
                text[-1] += c
        body += [area(e, boxes) for e, boxes in sorted(cells.items())]
        how = ' lengthAdjust="spacingAndGlyphs" font-family="monospace" style="white-space:pre"'
        body += [draw.text(10, y + i * 17, words, more=f'{how} textLength="{len(words) * size:.1f}"')
                 for i, words in enumerate(text[:rows]) if words]
        y += rows * 17 + 14
    return draw.svg(title, width, y - 8, body, "characters coloured by their first expert")


STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; max-width: 70rem; }
.tokens span[style], .key { background: hsl(var(--h) 75% 50% / var(--a)); } .key { padding: 0 .5em; }
[data-line] { box-shadow: inset 0 -2px hsl(var(--h) 75% 50%); }
.show-numbers .tokens span::after { content: attr(data-e); font-size: .65em; vertical-align: super; }
[hidden] { display: none; } #x-step:checked ~ .by-tokens, #x-tokens:checked ~ .by-step { display: none; }
label, select, input { font: inherit; color: inherit; }
select { background: var(--paper); border: 1px solid var(--muted); }
"""
SCRIPT = """
for (const trace of document.querySelectorAll('.trace')) {
  const select = trace.querySelector('select'), layers = trace.querySelectorAll('.layer');
  const show = () => layers.forEach(l => l.hidden = l.dataset.layer !== select.value);
  select.addEventListener('change', show);
  const numbers = trace.querySelector('.numbers');
  numbers.addEventListener('change', () => trace.classList.toggle('show-numbers', numbers.checked));
  show();
}
"""


# ---------------------------------------------------------------------------------------------------------------------

def facts(runs):
    rows = []
    for r in runs:
        size = re.search(r"(\d+) parameters(?:, (\d+) of them active)?", r.card)
        last, val = r.log[-1] if r.log else {}, r.val[-1] if r.val else {}
        rows.append([r.name, r.config.get("architectures", ["?"])[0], r.config.get("num_hidden_layers", ""),
                     r.config.get("hidden_size", ""), r.experts or "dense",
                     r.config.get("num_experts_per_tok", ""), size[1] if size else "",
                     (size[2] or size[1]) if size else "", last.get("step", ""), last.get("tokens", ""),
                     last.get("train_loss", ""), val.get("val_loss", "")])
    return table(["run", "class", "layers", "hidden", "experts", "per token", "parameters", "active", "steps", "tokens",
                  "last train_loss", "last val_loss"], rows, "Losses: nats a token, the last of log.csv and val.csv",
                 "models")


def commands(runs):
    def listing(words):
        return f"<pre tabindex=0>{html.escape(words)}</pre>"

    return "".join(f"<h3>{html.escape(r.name)}</h3>" + listing(r.commands or "no model card tells") +
                   draw.details("config.json", listing(json.dumps(r.config, indent=2))) for r in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="+")
    parser.add_argument("--to")
    parser.add_argument("--trace", nargs="*", default=[])
    parser.add_argument("--svg")
    args = parser.parse_args()
    if len(args.trace) > len(args.out):
        sys.exit(f"run.py: --trace: {len(args.trace)} files for {len(args.out)} OUT; it wants one for each, in order")
    runs = [Run(path, args.trace[i] if i < len(args.trace) else None) for i, path in enumerate(args.out)]
    for r, name in zip(runs, tell_apart([r.folder for r in runs])):
        r.name = name
    to = pathlib.Path(args.to) if args.to else runs[0].path / "report.html"
    if not to.parent.is_dir():
        sys.exit(f"run.py: --to {to}: there is no folder {to.parent}")
    sections = [draw.section("facts", "Models", facts(runs))]
    if any(r.log for r in runs):
        sections.append(draw.section("curves", "Loss, learning rate, gradient", curves(runs)))
    if any(r.load for r in runs):
        sections.append(draw.section("load", "Load of the experts", load_section(runs)))
    similarity = similarity_section(runs)
    if similarity:
        sections.append(draw.section("similarity", "Similarity of experts", similarity))
    if any(r.receipt for r in runs):
        sections.append(draw.section("lineage", "Lineage", lineage_section(runs)))
    if any(r.trace for r in runs):
        inside = "".join(tokens_of(r, i) for i, r in enumerate(runs) if r.trace)
        sections.append(draw.section("tokens", "Tokens and experts", inside))
    sections.append(draw.section("commands", "Commands", commands(runs)))
    to.write_text(draw.page(", ".join(r.name for r in runs), sections, STYLE, SCRIPT), encoding="utf-8")
    print(to)
    if args.svg:
        draw.save(f"{args.svg}/loss.svg", loss_figure(runs, "step", width=720, height=300))
        for name, has, make in (("lineage", lambda r: r.receipt.get("layers"),
                                 lambda r: lineage(r, r.receipt["layers"][0]["layer"], 720)),
                                ("tokens", lambda r: r.trace, tokens_svg)):
            having = [r for r in runs if has(r)]
            if having:
                draw.save(f"{args.svg}/{name}.svg", make(having[-1]))


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        sys.exit(f"run.py: {e.filename}: {e.strerror}")
