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
KINDS = ["space", "line end", "lower case", "capital", "digit", "bracket", "other sign", "not ASCII"]


class Run:
    """What a directory holds. Rows of csv files are dictionaries of the text that stands there."""

    def __init__(self, path, trace):
        self.path = pathlib.Path(path)
        if not self.path.is_dir():
            sys.exit(f"run.py: {path}: not a directory; give what train_moe --out or upcycle wrote")
        self.name = self.path.resolve().name
        self.log, self.val, self.load = (self.rows(f"{n}.csv") for n in ("log", "val", "load"))
        self.config, self.trainer, self.receipt = (self.json(f"{n}.json") for n in ("config", "trainer", "upcycle"))
        self.trace = self.rows(trace or "trace.csv")
        card = self.path / "README.md"
        self.card = card.read_text(encoding="utf-8") if card.exists() else ""
        commands = re.search(r"## Commands\n\n((?:    .*\n)+)", self.card)
        self.commands = re.sub("^    ", "", commands.group(1), flags=re.M) if commands else ""

    def rows(self, name):
        path = self.path / name if not pathlib.Path(name).exists() else pathlib.Path(name)
        if not path.exists():
            return []
        with open(path, newline="", encoding="utf-8") as f:
            return [r for r in csv.DictReader(f) if None not in r.values()]     # a killed run's last row may be cut

    def json(self, name):
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def points(self, rows, x, y):
        return [(float(r[x]), float(r[y])) for r in rows if r[y] and math.isfinite(float(r[y]))]


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


def load_heat(run):
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
    return heat(f"{run.name}: load", rows, names, steps, cell=cell, groups=groups,
                share=lambda v: math.log2(max(v, .5)), key=("half of the mean or less", "twice the mean or more"),
                row_label="layer.expert", column_label="step",
                describe="blank is the mean; experts without a token are the strongest blue")


def load_section(runs):
    runs = [(slot, r) for slot, r in enumerate(runs) if r.load]
    drawn = [figure(load_heat(r)) for _, r in runs]
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
                series.append(Series(r.name, [(s, sum(v) / len(v)) for s, v in sorted(points.items())], slot=slot))
        if series:
            drawn.append(figure(lines(f"{title}, mean over layers", series, "step", "")))
    figures = [c for c in runs[0][1].load[0] if c not in ("step", "expert", "assignments")]
    tables = "".join(draw.details(f"{r.name}: last rows of load.csv", table(
        [*figures, "assignments of experts 0, 1, .."],
        [[rows[0][c] for c in figures] + [" ".join(x["assignments"] for x in rows)] for (s, _), rows in
         sorted(by_layer(r.load).items()) if s == int(r.load[-1]["step"])],
        f"{r.name}/load.csv, step {r.load[-1]['step']}", f"load-{slot}")) for slot, r in runs)
    return grid(drawn) + tables


def expert_weights(run):
    """{layer: {expert: floats}} of some layers, and every how manieth weight that is."""
    E = run.config.get("num_experts") or run.config.get("num_local_experts") or 1
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
    for r in runs:
        layers, step = expert_weights(r)
        some |= step > 1
        for layer, experts in sorted(layers.items()):
            numbers = [experts[e] for e in sorted(experts)]
            norms = [math.sqrt(sum(map(operator.mul, w, w))) for w in numbers]
            rows = [[0.0] * len(numbers) for _ in numbers]
            for i, a in enumerate(numbers):
                for j, b in enumerate(numbers[:i + 1]):
                    rows[i][j] = rows[j][i] = sum(map(operator.mul, a, b)) / (norms[i] * norms[j])
            low = min(map(min, rows))
            drawn.append(figure(heat(f"{r.name}, layer {layer}", rows, range(len(rows)), range(len(rows)),
                                     share=lambda v, low=low: (v - low) / (1 - low) if low < 1 else 1,
                                     key=("", f"cosine 1; blank: {low:.4f}"), row_label="expert", cell=18, widest=26)))
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


def lineage(run, layer, width=360):
    """The experts of one layer (an index of the receipts' lists) as a tree."""
    steps = generations(run.receipt)
    first = steps[0]
    levels = [[f"expert {e}" for e in range(first["experts"][0])] or
              (["FFN"] if len(first["sources"]) == 1 else [pathlib.Path(s).name for s in first["sources"]])]
    edges = [s["layers"][layer]["source"] for s in steps]
    levels += [[str(e) for e in range(len(parents))] for parents in edges]
    slots = [list(range(len(levels[0])))]
    for parents in edges:                               # branches get colours where they first part
        fresh = len(set(slots[-1])) < 2
        slots.append([i if fresh or p < 0 else slots[-1][p] for i, p in enumerate(parents)])
    said = ", ".join(f"{s['method']}: {s['experts'][0] or 'dense'} to {s['experts'][1]} experts" for s in steps)
    return draw.tree(f"{run.name}: experts of layer {first['layers'][layer]['layer']}", levels, edges,
                     [s["method"] for s in steps], width=width, describe=said, slots=slots)


def model_tree(runs):
    """All models that the runs come from, each a node in the generation that it was made in."""
    depth, parent, method = {}, {}, {}
    for r in runs:
        before, chain = None, generations(r.receipt)
        for i, step in enumerate(chain):
            source = pathlib.Path(step["sources"][0]).name
            if source not in depth:
                depth[source], parent[source], method[source] = i, before, chain[i - 1]["method"] if i else ""
            before = source
        if r.name not in depth:
            depth[r.name], parent[r.name] = len(chain), before
            method[r.name] = chain[-1]["method"] if chain else ""
    levels = [[n for n in depth if depth[n] == i] for i in range(max(depth.values()) + 1)]
    if len(levels) < 2:
        return ""
    edges = [[levels[i - 1].index(parent[n]) if parent[n] in levels[i - 1] else -1 for n in levels[i]]
             for i in range(1, len(levels))]
    gaps = [[method[n] for n in level] for level in levels[1:]]
    return draw.tree("Models", levels, edges, gaps, slots=[list(range(len(level))) for level in levels])


def lineage_section(runs):
    models = model_tree(runs)
    drawn = [figure(models, "Each model and what it was upcycled from, by which method.")] if models else []
    sentences = []
    for r in runs:
        if not r.receipt:
            continue
        seen = []
        for layer, entry in enumerate(r.receipt["layers"]):
            history = [s["layers"][layer]["source"] for s in generations(r.receipt)]
            if history not in seen:                     # layers that are alike are drawn once
                seen.append(history)
                drawn.append(figure(lineage(r, layer)))
        for s in generations(r.receipt):
            sentences.append([r.name, s["method"], f"{s['experts'][0] or 'dense'} → {s['experts'][1]}", s["function"]])
    return grid(drawn) + table(["run", "method", "experts", "function"], sentences, "What each step keeps")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

def vocabulary(run):
    """What turns a token into text: bytes as themselves, others by tokenizer.json."""
    path = run.path / "tokenizer.json"
    known = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"] if path.exists() else {}
    pieces = {i: piece for piece, i in known.items()}
    if run.trainer.get("reads_bytes") or run.config.get("vocab_size") == 256 or not pieces:
        return lambda token: bytes([token]).decode("latin-1") if token < 128 else f"\\x{token:02x}"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]   # GPT-2's letters for bytes
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def decode(token):
        piece = pieces.get(token, f"<{token}>")
        if all(c in letters for c in piece):
            return bytes(letters[c] for c in piece).decode("utf-8", "replace")
        return piece.replace("\u2581", " ")
    return decode


def kind_of(text):
    c = text.strip(" ")[:1] or " "
    tests = [c == " ", c in "\n\r\t", c.islower(), c.isupper(), c.isdigit(), c in "()[]{}<>", c.isascii()]
    return KINDS[next((i for i, found in enumerate(tests) if found), 7)] if c.isascii() else KINDS[7]


def shown(text):
    return text.replace("\n", "↵").replace("\r", "␍").replace("\t", "⇥").replace(" ", "␣")


def traced(run):
    """{layer: [(token's text, experts, gates), ..]} in the order of the text."""
    decode, layers = vocabulary(run), collections.defaultdict(list)
    K = sum(c.startswith("expert_") for c in run.trace[0])
    for row in run.trace:
        experts = [int(row[f"expert_{k + 1}"]) for k in range(K) if row[f"expert_{k + 1}"]]
        gates = [row[f"gate_{k + 1}"] for k in range(len(experts))]
        layers[int(row["layer"])].append((decode(int(row["token"])), experts, gates))
    return layers


def tokens_of(run):
    layers, parts = traced(run), []
    E = run.config.get("num_experts") or run.config.get("num_local_experts")
    for layer, tokens in sorted(layers.items()):
        spans = "".join(
            f'<span style="--h:{e[0] * 360 // E}" title="expert {", ".join(map(str, e))}; gates {", ".join(g)}" '
            f'data-e="{e[0]}">{html.escape(t).replace(chr(10), "↵" + chr(10))}</span>'
            for t, e, g in tokens[:MOST_TOKENS])
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
        drawn = heat(f"Layer {layer}: kinds of input of each expert", [[s[i] for s in shares] for i in used],
                     [KINDS[i] for i in used], range(E), cell=18, widest=32, column_label="expert",
                     key=("", "share of its assignments, from 0 to 1"))
        favourites = table(["expert", "assignments", "favourite tokens"], rows,
                           f"Layer {layer}: tokens that an expert reads more often than others do")
        legend = " ".join(f'<span class=key style="--h:{e * 360 // E}">{e}</span>' for e in range(E))
        parts.append(
            f'<div class="layer" data-layer="{layer}"><h3>Layer {layer}</h3><p>Experts {legend}</p>'
            f'<p class="tokens" lang="">{spans}</p>{grid([favourites, figure(drawn)])}</div>')
    options = "".join(f'<option value="{layer}">{layer}</option>' for layer in sorted(layers))
    return (f'<div class="trace"><h3>{html.escape(run.name)}</h3><p><label>Layer <select>{options}</select></label> '
            f'<label><input type="checkbox" class="numbers"> show the experts\' numbers</label></p>'
            f'{"".join(parts)}</div>')


def tokens_svg(run, width=720, columns=88, rows=6):
    """The first lines of the text, for up to three layers, each character in the colour of its first expert."""
    E = run.config.get("num_experts") or run.config.get("num_local_experts")
    title = f"{run.name}: which expert reads which token"
    layers, body, y = traced(run), [draw.text(8, 16, title, kind="title")], 40
    size, names = (width - 20) / columns, sorted(layers)

    def colour(e):
        return f'fill="hsl({e * 360 // E} 75% 50%)" fill-opacity=".4"'

    for layer in sorted({names[0], names[len(names) // 2], names[-1]}):
        body.append(draw.text(8, y, f"layer {layer}, experts", kind="small"))
        for e in range(E):
            body += [f'<rect x="{116 + 24 * e}" y="{y - 11}" width="20" height="14" {colour(e)}/>',
                     draw.text(126 + 24 * e, y, e, "middle", "small")]
        text, cells, y = [""], collections.defaultdict(list), y + 20
        for c, expert in ((c, experts[0]) for piece, experts, _ in layers[layer] for c in piece):
            if c == "\n" or len(text[-1]) >= columns:
                text.append("")
            if len(text) > rows:
                break
            if c != "\n":
                corner = f"M{10 + len(text[-1]) * size:.1f} {y + (len(text) - 1) * 17 - 12}"
                cells[expert].append(f"{corner}h{size:.1f}v16h-{size:.1f}z")
                text[-1] += c
        body += [f'<path d="{"".join(boxes)}" {colour(e)}/>' for e, boxes in sorted(cells.items())]
        how = ' lengthAdjust="spacingAndGlyphs" font-family="monospace" style="white-space:pre"'
        body += [draw.text(10, y + i * 17, words, more=f'{how} textLength="{len(words) * size:.1f}"')
                 for i, words in enumerate(text[:rows]) if words]
        y += rows * 17 + 14
    return draw.svg(title, width, y - 8, body, "characters coloured by their first expert")


STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; max-width: 70rem; }
.tokens span, .key { background: hsl(var(--h) 75% 50% / .38); } .key { padding: 0 .5em; }
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
        experts = r.config.get("num_experts") or r.config.get("num_local_experts") or "dense"
        last, val = r.log[-1] if r.log else {}, r.val[-1] if r.val else {}
        rows.append([r.name, r.config.get("architectures", ["?"])[0], r.config.get("num_hidden_layers", ""),
                     r.config.get("hidden_size", ""), experts, r.config.get("num_experts_per_tok", ""),
                     size[1] if size else "", (size[2] or size[1]) if size else "", last.get("step", ""),
                     last.get("tokens", ""), last.get("train_loss", ""), val.get("val_loss", "")])
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
    runs = [Run(path, args.trace[i] if i < len(args.trace) else None) for i, path in enumerate(args.out)]
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
        sections.append(draw.section("tokens", "Tokens and experts", "".join(tokens_of(r) for r in runs if r.trace)))
    sections.append(draw.section("commands", "Commands", commands(runs)))
    to = pathlib.Path(args.to) if args.to else runs[0].path / "report.html"
    to.write_text(draw.page(", ".join(r.name for r in runs), sections, STYLE, SCRIPT), encoding="utf-8")
    print(to)
    if args.svg:
        draw.save(f"{args.svg}/loss.svg", loss_figure(runs, "step", width=720, height=300))
        for name, has, make in (("lineage", "receipt", lambda r: lineage(r, 0, 720)), ("tokens", "trace", tokens_svg)):
            having = [r for r in runs if getattr(r, has)]
            if having:
                draw.save(f"{args.svg}/{name}.svg", make(having[-1]))


if __name__ == "__main__":
    main()
