#!/usr/bin/env python3
"""dev/lab/results/ -> dev/lab/REPORT.md with figures/, and build/lab.html, which needs nothing else.

    python3 dev/lab/report.py            both
    python3 dev/lab/report.py my.yaml    on an experiment of your own, from LAB/done: prints it, and build/my.html
    python3 dev/lab/report.py --check    whether REPORT.md says what results/ and experiments/ say
    python3 dev/lab/report.py --table summary|routers       a table for a page; dev/readme.py asks for it
"""
import difflib
import html
import json
import math
import statistics
import sys

import lab
import numpy
import stats

sys.path.insert(0, str(lab.ROOT / "dev/report"))
try:
    import draw
except ImportError:                                 # the report stands without its figures
    draw = None

SKIPPED = {"tiny", "routers"}                       # what CI repeats; a table of another page
ORDER = ["E1", "E1-carried", "E1-k4", "E2", "E7", "E7b", "E10", "D1", "D2", "L1", "M1", "bf16", "I1"]


class Results:
    """Rows by stage, and by (arm, seed) of an experiment."""

    def __init__(self, with_lab=False):
        def read(name, pattern):
            own = sorted((lab.LAB / "done").glob(pattern)) if with_lab else []
            return [row for path in [lab.RESULTS / name, *own] if path.is_file() for row in lab.rows_of(path)]

        self.stages = {row["stage"]: row for row in read("stages.csv", "*.csv")}
        self.curves, seen = {}, {(r["stage"], r["step"]): r for r in read("curves.csv", "*.curve")}
        for row in seen.values():
            self.curves.setdefault(row["stage"], []).append(row)
        for rows in self.curves.values():
            rows.sort(key=lambda r: int(r["step"]))


class Experiment:
    def __init__(self, name, results):
        self.spec, self.results = lab.read_experiment(name), results
        self.name = self.spec["name"]
        self.ids, self.specs, _ = lab.stages_of(self.spec)
        self.seeds, self.arms = self.spec["seeds"], self.spec["asked"]

    def row(self, arm, seed):
        return self.results.stages.get(self.ids.get((arm, seed)))

    def done(self):
        return sum(n in self.results.stages for n in self.specs)

    def column(self, arm, key):
        """{seed: value}; a seed without a row or a value is not there."""
        rows = {seed: self.row(arm, seed) for seed in self.seeds}
        return {seed: float(row[key]) for seed, row in rows.items() if row and row.get(key) not in (None, "")}

    def values(self, words):
        """ARM, ARM.KEY, ARM@grow, ARM@grow.KEY: {seed: value}, and which rows they are in."""
        arm, key = lab.arm_of(words, self.spec["arms"]) or lab.fail(f"{self.name}: '{words}' is no arm")
        return self.column(arm, key), arm

    def curve(self, arm, seed):
        """(tokens before the arm's last training, {tokens in all: validation loss}) of one seed."""
        row = self.row(arm, seed)
        before = float(row["total_tokens"]) - float(row["tokens"]) if row else 0
        points = self.results.curves.get(self.ids.get((arm, seed)), []) if row else []
        return before, {before + float(p["tokens"]): float(p["val_loss"]) for p in points}

    def root(self, arm):
        """The arm that this one's models were begun as."""
        before = self.spec["arms"][arm].get("from")
        return self.root(before) if before else arm

    def together(self, *names):
        """Values of seeds that all have, by programs that compute the same bytes: lists, and the seeds."""
        columns = [self.values(name) for name in names]
        seeds = [s for s in self.seeds if all(s in c for c, _ in columns)
                 and len({self.row(arm, s)["canary"] for _, arm in columns}) == 1]
        return [[c[s] for s in seeds] for c, _ in columns], seeds

    def ends(self, item):
        """[arm, smaller, larger] of a closure."""
        return item if isinstance(item, list) else [item, *self.spec["gap"]]

    def equal(self, item):
        """For each seed: the mean difference in loss of item's arms from a line through the others' points, at the same
        `by`; an arm that is beyond the line's ends in any seed says nothing in all."""
        at, loss = ({a: self.column(a, key) for a in item["arms"] + item["with"]} for key in (item["by"], "loss"))
        seeds = [s for s in self.seeds if all(s in values for values in at.values())]
        differences = {arm: [] for arm in item["arms"]}
        for seed in seeds:
            x, y = zip(*sorted((math.log(max(at[a][seed], 1e-6)), loss[a][seed]) for a in item["with"]))
            for arm in item["arms"]:
                here = math.log(max(at[arm][seed], 1e-6))
                if x[0] <= here <= x[-1]:
                    differences[arm].append(loss[arm][seed] - float(numpy.interp(here, x, y)))
        inside = [d for d in differences.values() if d and len(d) == len(seeds)]
        return {seed: statistics.mean(d[n] for d in inside) for n, seed in enumerate(seeds)} if inside else {}


def noise_ratio(x, y):
    """The deviation of pairs over that of two values of different seeds, sqrt(var x + var y): 1 without pairing."""
    return float(numpy.std(numpy.subtract(x, y), ddof=1) / math.sqrt(numpy.var(x, ddof=1) + numpy.var(y, ddof=1)))


def found(at, n, p=None, sd=None, unit="%", why=None):
    """What was measured, from at(level): (value, low, high)."""
    value, low, high = at(stats.LEVEL)
    return dict(value=value, low=low, high=high, at=lambda level: at(level)[1:], n=n, p=p, sd=sd, unit=unit,
                **({"why": why} if why else {}))


def nothing(level):
    return math.nan, -math.inf, math.inf


def measure(e, claim):
    """What a claim's measure came to: dict of value, low, high, n, p, sd (of pairs), why, and at(level): the interval
    of another level than 95 %; None if there is too little."""
    kind, item = next(iter(claim["measure"].items()))
    if kind in ("difference", "value", "equal", "ratio"):
        if kind == "equal":
            x = list(e.equal(item).values())
        else:
            columns, _ = e.together(*(item if isinstance(item, list) else [item]))
            x = columns[0] if kind == "value" else list(numpy.log(numpy.divide(*columns))) if kind == "ratio" else \
                list(numpy.subtract(*columns))
        if len(x) < 2:
            return None
        bare, p = (math.exp if kind == "ratio" else float), stats.mean_interval(x)[3]
        return found(lambda level: [bare(v) for v in stats.mean_interval(x, level)[:3]], n=len(x), unit="",
                     p=p if kind in ("difference", "equal") else None, sd=statistics.stdev(x))
    if kind == "noise":
        (x, y), _ = e.together(*item)
        if len(x) < 3:
            return None

        def of(seeds):
            return math.log(noise_ratio(numpy.array(x)[seeds], numpy.array(y)[seeds]))

        return found(lambda level: [math.exp(v) for v in stats.jackknife(of, len(x), level)], n=len(x), unit="",
                     sd=float(numpy.std(numpy.subtract(x, y), ddof=1)))
    if kind == "closure":
        (x, low, high), _ = e.together(*e.ends(item))
        if len(x) < 2:
            return None
        if not stats.gap_is_wide(low, high):
            gap = numpy.subtract(low, high)
            return found(nothing, n=len(x), why=f"n {len(x)}; gap {short(gap.mean())}, s {short(gap.std(ddof=1))}: not "
                         f"above {stats.SIGMAS} standard errors")
        return found(lambda level: stats.closure(low, high, x, level), n=len(x))
    if kind == "closures":
        (x, a, b, y, c, d), _ = e.together(*e.ends(item[0]), *e.ends(item[1]))
        if len(x) < 3 or not (stats.gap_is_wide(a, b) and stats.gap_is_wide(c, d)):
            return None if len(x) < 3 else found(nothing, n=len(x), why=f"no gap above {stats.SIGMAS} standard errors")
        x, a, b, y, c, d = map(numpy.array, (x, a, b, y, c, d))

        def between(s):
            return float((a[s] - x[s]).mean() / (a[s] - b[s]).mean() - (c[s] - y[s]).mean() / (c[s] - d[s]).mean())

        return found(lambda level: stats.jackknife(between, len(x), level), n=len(x))
    lab.fail(f"{e.name}: '{kind}' is none of difference, value, ratio, noise, closure, closures, equal")


def levels_of(e, measured):
    """For each claim the level of the interval that it is judged by, and why it is not 95 %: several claims, run yet or
    not, compare one of its arms (or a figure of it) with others, or with a gap (Holm; of two arms, the stricter), or
    seeds were added after a look."""
    claims = e.spec["claims"]
    for c in claims:
        if c.get("looks", 2) not in (2, 3):
            lab.fail(f"{e.name}: '{c['claim']}': looks is 2 or 3")

    def compared(measure):
        (kind, item), = measure.items()
        return item if kind == "difference" else [e.ends(item)[0]] if kind == "closure" else \
            [e.ends(i)[0] for i in item] if kind == "closures" else []

    arms = [compared(c["measure"]) for c in claims]
    looks = [c.get("looks", 1) for c in claims]
    levels = [(stats.of_looks(n), f"seeds were planned {n} times" if n > 1 else "") for n in looks]
    for arm in dict.fromkeys(a for pair in arms for a in pair):
        family = [n for n, pair in enumerate(arms) if arm in pair]
        p = [stats.verdict_p(measured[n]["at"], claims[n]["verdict"]) if measured[n] else 1 for n in family]
        most = max(looks[n] for n in family)
        for n, level in zip(family, stats.holm(p, stats.of_looks(most))):
            if level > levels[n][0]:
                levels[n] = level, f"{len(family)} claims about {arm}" + (f", {most} looks" if most > 1 else "")
    return levels


def judged(e):
    """(claim, found, verdict, why) of each claim. found has the interval of 95 % (low, high) and the one that is judged
    (least, most)."""
    rows, claims = [], e.spec.get("claims", [])
    measured = [measure(e, c) for c in claims]
    for claim, f, (level, because) in zip(claims, measured, levels_of(e, measured) if claims else []):
        if f is None:
            rows.append((claim, None, "not run yet" if e.done() < len(e.specs) else "cannot tell", "n below 2"))
            continue
        f["least"], f["most"] = f["at"](level) if because else (f["low"], f["high"])
        said = stats.verdict(f["least"], f["most"], claim["verdict"])
        why = f.get("why") or f"n {f['n']}"
        if f["n"] < stats.FEWEST and f["sd"] != 0:
            said = "cannot tell"
        elif f["n"] < len(e.seeds) and said != "cannot tell":
            said = f"so far {said}"
        if f["sd"] and f["p"] is not None:
            why += f" of {len(e.seeds)}, s {short(f['sd'])}; p {short(f['p'], 3)}"
            if f["n"] > 3:
                why += f"; {f['n']} pairs see {short(stats.detectable(f['sd'], f['n'], level))}"
        if because:
            judging = interval({**f, "low": f["least"], "high": f["most"]}).partition("[")[2]
            why += f"; judged by [{judging}, {100 * level:.1f} %: {because}" if judging else ""
        rows.append((claim, f, said, why))
    return rows


def ranges(verdict):
    """The ranges of a claim's verdict in words, with what is as good as no bound (9 and more) left out."""
    def one(least, most):
        ends = [short(v, 5).rstrip("0").rstrip(".") or "0" for v in (least, most)]
        return (f"below {ends[1]}" if least <= -9 else f"above {ends[0]}" if most >= 9 else f"{ends[0]} to {ends[1]}")

    return "; ".join(f"{name}: " + " or ".join(one(*r) for r in (given if isinstance(given[0], list) else [given]))
                     for name, given in verdict.items())


def short(x, digits=4):
    """-0.0123 is -.0123; what is small keeps two digits."""
    if not math.isfinite(x):
        return "?"
    text = f"{x:.{digits}f}" if abs(x) >= 5 * 10 ** -digits or x == 0 else f"{x:.1e}"
    return (text.replace("-0.", "-.") if text.startswith("-0.") else text[1:] if text.startswith("0.") else text)


def interval(f):
    if not f:
        return "-"
    if not math.isfinite(f["value"]):
        return "no clear gap"
    scale, end = (100, " %") if f["unit"] else (1, "")
    digits = 0 if f["unit"] else 4
    ends = [f"{v * scale:.0f}" if f["unit"] and math.isfinite(v) else short(v, digits) for v in (f["low"], f["high"])]
    middle = f"{f['value'] * scale:.0f}" if f["unit"] else short(f["value"], digits)
    return f"{middle}{end} [{ends[0]}, {ends[1]}]" if math.isfinite(f["low"]) else "no bound"


# Arms

def flops_matched(e, arm, names):
    """loss(arm) - loss of the larger model from nothing at the same FLOPs, between or beyond the ends of two lengths of
    it."""
    found, beyond = [], False
    for seed in e.seeds:
        rows = [e.row(a, seed) for a in (arm, *names)]
        if all(rows):
            x = [math.log(float(r["flops"])) for r in rows]
            y = [float(r["loss"]) for r in rows]
            share = (x[0] - x[1]) / (x[2] - x[1])
            beyond |= not -0.02 <= share <= 1.02
            found.append(y[0] - y[1] - share * (y[2] - y[1]))
    return found, beyond


def healed(e, arm, continued):
    """Tokens after the transition from which on the arm is no worse than its source continued (or left alone): median
    of seeds."""
    found = []
    for seed in e.seeds:
        (begun, mine), (transition, other) = (e.curve(a, seed) for a in (arm, continued))
        shared = [t for t in mine if t in other]
        if shared:
            worse = [n for n, t in enumerate(shared) if mine[t] > other[t]]
            level = worse[-1] + 1 if worse else 0
            found.append(shared[level] - (transition or begun) if level < len(shared) else math.inf)
    if not found:
        return ""
    middle = statistics.median_high(found)
    return f"{middle / 1e6:.2f}M" if math.isfinite(middle) else "not yet"


def arm_table(e):
    """One row for each arm that has one, with all figures; columns without any are left out."""
    readings = e.spec.get("readings", {})
    # what `after` names is the source continued, or else a grown arm
    other = readings.get("after") if "grow" in e.spec["arms"].get(readings.get("after"), {}) else None
    after = f"minus {other}" if other else "minus the source continued"
    heads = ["arm", "n", "tokens", "loss (s)", after, "minus the small model left alone",
             "minus the larger all along", "the same at equal FLOPs", "gap closure", "jump", "level for good after",
             "Gini", "min/max", "MaxVio", "dead", "twins' cosine", "overlap", "distinct sources a token",
             "expert and kind: shared nats"]
    rows, of_balance = [], "gini" in str(e.spec.get("claims"))
    # of training tokens, if all arms have been trained, else of validation
    load = "train_" if all(e.column(a, "train_max_vio") for a in e.arms if e.column(a, "loss")) else ""
    for arm in e.arms:
        losses = e.column(arm, "loss")
        if not losses:
            continue
        first = e.row(arm, next(iter(losses)))
        row = dict.fromkeys(heads, "")
        row.update({"arm": e.spec["arms"][arm].get("label", arm), "n": len(losses),
                    "tokens": f"{float(first['total_tokens']) / 1e6:.2f}M",
                    "loss (s)": f"{statistics.mean(losses.values()):.4f}" + (
                        f" ({short(statistics.stdev(losses.values()))})" if len(losses) > 1 else "")})
        # readings are for what was made from the source that they continue
        grown = "from" in e.spec["arms"][arm] and e.root(arm) == e.root(readings.get("of", readings.get("after", arm)))

        def compared(other):
            """Whether the arm is another one than `other`, after as many tokens."""
            rows = [e.row(a, seed) for a in (arm, other) for seed in e.seeds] if other and other != arm else []
            return len({r["total_tokens"] for r in rows if r}) == 1

        def cell(found, n):
            """An interval, with the number of pairs where not all have run."""
            return interval(dict(zip(("value", "low", "high"), found), unit="")) + (
                f", n {n}" if n < len(losses) else "")

        for head, key in ((after, "after"), ("minus the small model left alone", "alone"),
                          ("minus the larger all along", "total")):
            if grown and compared(readings.get(key)):
                pairs, _ = e.together(arm, readings[key])
                if len(pairs[0]) > 1:
                    row[head] = cell(stats.paired(*pairs), len(pairs[0]))
        if readings.get("flops") and grown:
            found, beyond = flops_matched(e, arm, readings["flops"])
            if len(found) > 1:
                row["the same at equal FLOPs"] = cell(stats.mean_interval(found), len(found)) + \
                    (" (beyond)" if beyond else "")
        if e.spec.get("gap") and grown:
            found = measure(e, dict(measure=dict(closure=arm)))
            row["gap closure"] = interval(found) + (f", n {found['n']}" if found["n"] < len(losses) else "") \
                if found else ""
        jumps = e.column(arm, "jump") or e.column(f"{arm}@grow", "jump")
        if jumps:
            row["jump"] = short(round(statistics.mean(jumps.values()), 6))
        if grown and not other and "grow" in e.spec["arms"][arm] and compared(readings.get("after")):
            row["level for good after"] = healed(e, arm, readings["after"])
        for head, key, digits in (*(("Gini", load + "gini", 3), ("min/max", load + "min_max", 3))[:2 * of_balance],
                                  ("MaxVio", load + "max_vio", 2), ("dead", load + "dead", 1),
                                  ("twins' cosine", "twin_cosine", 3), ("overlap", "overlap", 3),
                                  ("distinct sources a token", "sources", 2),
                                  ("expert and kind: shared nats", "reading", 3)):
            if values := e.column(arm, key):
                row[head] = f"{statistics.mean(values.values()):.{digits}f}"
        rows.append(row)
    kept = [h for h in heads if any(r[h] != "" for r in rows)]
    return kept, [[r[h] for h in kept] for r in rows]


# Figures: all drawing is in the next three functions

def band(by_x):
    """{x: values of seeds} -> points and 95 % bands."""
    points, bands = [], []
    for x, values in sorted(by_x.items()):
        mean, low, high, _ = stats.mean_interval(values)
        points.append((x, mean))
        if math.isfinite(low):
            bands.append((x, low, high))
    return points, bands


def curve_series(e, arm, reference=None):
    """{tokens in all: losses of seeds}, or those less the reference's after as many tokens."""
    found = {}
    for seed in e.seeds:
        mine, other = e.curve(arm, seed)[1], e.curve(reference, seed)[1] if reference else {}
        for tokens, loss in mine.items():
            if not reference or tokens in other:
                found.setdefault(tokens, []).append(loss - other.get(tokens, 0))
    return found


def figures(e):
    """{name: (svg, caption)} of an experiment: what its `figure` asks for, else curves, and differences from the source
    continued."""
    if not draw:
        return {}
    made, asked = {}, e.spec.get("figure") or {}

    def add(name, title, series, x, y, caption, **options):
        series = [s for s in series if s.points]
        if series:
            made[f"{e.name}-{name}"] = draw.lines(title, series, x, y, width=640, height=330, describe=caption,
                                                  **options), caption

    if asked.get("kind") == "points":                       # lists of arms, each a mean with its interval
        series = []
        for slot, (label, arms) in enumerate(asked["groups"].items()):
            found = {}
            for arm in arms:
                x, y = (e.values(f"{arm}.{asked[k]}" if asked[k] != "loss" else arm)[0] for k in ("x", "y"))
                if x and y:
                    found[statistics.mean(x.values())] = list(y.values())
            points, bands = band(found)
            series.append(draw.Series(label, points, bands, slot=slot, dots=True))
        add("points", asked["title"], series, asked["x"], asked["y"], "Means of seeds with 95 % intervals.",
            log_x=bool(asked.get("log_x")))
    elif asked.get("kind") == "closure":                    # lists of [x, arm, smaller, larger], and the paper's points
        series = [draw.Series(asked["source"], asked["paper"], slot=0)]
        for slot, (label, points) in enumerate(asked["groups"].items(), 1):
            found = [(x, measure(e, dict(measure=dict(closure=ends)))) for x, *ends in points]
            found = [(x, f) for x, f in found if f and math.isfinite(f["value"])]
            series.append(draw.Series(label, [(x, f["value"]) for x, f in found],
                                      [(x, f["low"], f["high"]) for x, f in found],
                                      slot=slot, dots=True))
        if any(s.points for s in series[1:]):
            add("closure", asked["title"], series, asked["x"], "gap closure",
                "Ratios of means with Fieller's 95 % intervals.")
    elif asked.get("kind") == "topk":
        series = []
        for arm in e.arms:
            found = {k: list(e.column(arm, f"loss_k{k}").values()) for k in e.spec["arms"][arm].get("topk", ())}
            points, bands = band({k: v for k, v in found.items() if v})
            series.append(draw.Series(arm, points, bands))
        add("topk", asked["title"], series, "K at evaluation", "nats a byte", "Means of seeds with 95 % bands.")
    else:
        shown = asked.get("arms") or e.arms[:8]
        add("curves", "Validation loss",
            [draw.Series(a, *band(curve_series(e, a)), slot=n) for n, a in enumerate(shown)],
            "tokens in all", "nats a byte", "Means over seeds of the loss on 64 KB, with 95 % bands.")
        after = e.spec.get("readings", {}).get("after")
        if after:
            add("differences", f"Difference from {after}, pair by pair",
                [draw.Series(a, *band(curve_series(e, a, after)), slot=n) for n, a in enumerate(shown) if a != after],
                "tokens in all", "nats a byte",
                f"Each seed's loss less that of {after} after as many tokens; 95 % bands.")
    return made


def joint_law(e):
    """2502.03009's law, L = A D1^-a D2^(-b + c log D1) + L0, with D1 tokens before and D2 after the transition, in
    millions, A, a, b and L0 not below 0, fitted to the means of tNcM. Five numbers from nine points: shown, nothing is
    concluded."""
    from scipy.optimize import curve_fit
    found = [(t, c, list(e.column(f"t{t}c{c}", "loss").values())) for t in (1, 2, 3) for c in (1, 2, 3)]
    if not all(losses for _, _, losses in found):
        return None
    tokens = numpy.array([(t * 0.512, c * 0.512) for t, c, _ in found]).T       # 1,000 steps: 0.512M
    losses = numpy.array([statistics.mean(x) for _, _, x in found])

    def law(d, A, a, b, c, least):
        return A * d[0] ** -a * d[1] ** (-b + c * numpy.log(d[0])) + least

    try:
        fitted, _ = curve_fit(law, tokens, losses, p0=(0.5, 0.1, 0.1, 0, losses.min() - 0.3), maxfev=20000,
                              bounds=([0, 0, 0, -numpy.inf, 0], numpy.inf))
    except RuntimeError:
        return "The joint law of 2502.03009 could not be fitted."
    A, a, b, c, least = fitted
    residual = abs(law(tokens, *fitted) - losses).max()
    return (f"The joint law of 2502.03009, fitted to nine means: L = {A:.3f} D1^{-a:.3f} D2^({-b:.3f} + {c:.3f} ln D1) "
            f"+ {least:.3f}, D1 and D2 in millions of tokens; largest residual {residual:.4f}. " +
            ("Its floor falls to 0: these points tell no law apart." if least < 0.01 else
             "Five numbers from nine points: nothing is concluded."))


# The report: a list of ("h", level, text), ("p", text), ("table", heads, rows), ("figure", name, caption), ("code",
# text)

def summary(experiments):
    heads = ["", "claim", "number claimed (where)", "ours [95 %]", "verdict",
             "pairs, their deviation s, p; what is judged"]
    return heads, [[e.name, c["claim"], f"{c.get('paper', '')} ({c.get('source', '')})", interval(f), verdict, why]
                   for e in experiments for c, f, verdict, why in judged(e)]


def headlines(experiments):
    """README.md's table: claims that have a name there (`readme`) and have been run, with the interval that is
    judged."""
    return ["claim", "paper", "here [interval]", "verdict"], [
        [c["readme"], f"{c['paper']} ({c['source']})" if c["paper"] != "-" else "-",
         interval({**f, "low": f["least"], "high": f["most"]}), verdict]
        for e in experiments for c, f, verdict, _ in judged(e) if f and "readme" in c]


def blocks(experiments, results):
    rows = results.stages.values()
    yield "h", 1, "The lab's report"
    yield "p", ("Made by `dev/lab/report.py` from `results/` and `experiments/`. Losses are nats a byte (the papers' a "
                "token), a token is a byte, a negative difference says that the first named is better; intervals are "
                "of 95 %. A verdict is given by at least three pairs whose whole interval lies in a range that was "
                "written down before the run (or when the claim says), else it is *cannot tell*; *so far*: not all "
                "seeds have been run. Where several claims compare one figure of an arm, or close a gap by it, the "
                "interval that is judged is wider (Holm: in 19 of 20 tries all verdicts on these are right); other "
                "claims, other arms and other experiments are not corrected for each other. *n pairs see x*: an "
                "effect of x is found by n pairs in four of five tries, at the level that judges.")
    yield "p", ("In the tables of arms: loss (s): mean and deviation over seeds. minus: after as many tokens, pair by "
                "pair, only for arms from the source that is continued; n, where fewer pairs than seeds have been run. "
                "level for good after: the tokens after the transition from which on the arm is no worse than that, to "
                "the nearest validation. at equal FLOPs: between two lengths of the larger model (the longer with the "
                "transition's reset; beyond: outside of them). MaxVio and dead (of all layers) of training tokens, if "
                "all arms were trained, else of validation. overlap: of the tokens that reach either of two twins, the "
                "share that reaches both. Seconds are in `results/stages.csv`, with the load of the machine beside "
                "them: where it is above the number of cores they say nothing.")
    if rows:
        kinds = sorted({f"{r['processor']}, commit {r['commit']}, binary {r['binary']}" for r in rows})
        yield "p", f"{len(results.stages)} stages, made by: {'; '.join(kinds)}."
    heads, found = summary(experiments)
    yield "table", heads, [r for r in found if r[4] != "not run yet"]
    waiting = [(e, sum(r[0] == e.name and r[4] == "not run yet" for r in found)) for e in experiments]
    if any(n for _, n in waiting):
        yield "p", "Claims that wait for their runs; what is expected of them stands below:"
        yield "table", ["experiment", "what it asks", "claims", "stages done"], [
            [e.name, e.spec.get("title", ""), n, f"{e.done()} of {len(e.specs)}"] for e, n in waiting if n]
    for e in experiments:
        yield "h", 2, f"{e.name}: {e.spec.get('title', '')}"
        budget = sum(lab.tokens_of(s, e.specs)[0] for s in e.specs.values()) / 1e6
        yield "p", (f"Text {e.spec['text']}, {len(e.seeds)} seeds, {budget:.1f}M tokens in all; {e.done()} of "
                    f"{len(e.specs)} stages are done. It is repeated by")
        yield "code", f"make lab E={e.spec['given']}"
        yield ("table", ["claim", "expected", "ranges", "seen [95 %]", "verdict"],
               [[c["claim"], " ".join(str(c.get("expected", "")).split()) +
                 (f" (written {c['written']})" if "written" in c else ""), ranges(c["verdict"]),
                 f"{interval(f)}; {why}" if f else "", verdict]
                for c, f, verdict, why in judged(e)])
        heads, arms = arm_table(e)
        if arms:
            yield "table", heads, arms
        if e.name == "E2" and (fitted := joint_law(e)):
            yield "p", fitted
        for name, (_, caption) in figures(e).items():
            yield "figure", name, caption
        if e.spec.get("notes"):
            yield "p", "Notes: " + " ".join(e.spec["notes"].split())


def to_markdown(parts):
    def cell(x):
        return str(x).replace("|", "\\|").replace("\n", " ")

    out = []
    for kind, *what in parts:
        if kind == "h":
            out.append(f"{'#' * what[0]} {what[1]}")
        elif kind == "p":
            out.append(what[0])
        elif kind == "code":
            out.append(f"    {what[0]}")
        elif kind == "figure":
            out.append(f"![{what[1]}](figures/{what[0]}.svg)")
        elif what[1]:
            rows = [what[0], ["---"] * len(what[0]), *what[1]]
            out.append("\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows))
    return "\n\n".join(out) + "\n"


def to_html(parts, drawings):
    sections, inside, name = [], [], ("summary", "Claims")
    for kind, *what in parts:
        if kind == "h" and what[0] == 2:
            sections.append(draw.section(*name, "".join(inside)))
            inside, name = [], (what[1].split(":")[0], what[1])
        elif kind == "p":
            inside.append(f"<p class=note>{html.escape(what[0]).replace('`', '').replace('*', '')}</p>")
        elif kind == "code":
            inside.append(f"<pre>{html.escape(what[0])}</pre>")
        elif kind == "figure":
            inside.append(draw.figure(drawings[what[0]][0], html.escape(what[1])))
        elif kind == "table" and what[1]:
            inside.append(draw.table(*what))
    sections.append(draw.section(*name, "".join(inside)))
    return draw.page("The lab's report", sections)


def routers_table(results):
    """The table of routers, see README.md."""
    e, rows = Experiment("routers", results), []
    digits = ("gini", 3), ("min_max", 3), ("max_vio", 2), ("dead", 0), ("entropy", 3), ("top_gate", 3)
    for arm in e.arms:
        for seed in e.seeds:
            if r := e.row(arm, seed):
                rows.append([e.spec["arms"][arm].get("label", arm), seed, f"{float(r['loss']):.4f}"] +
                            [f"{float(r[f'train_{k}']):.{d}f}" for k, d in digits])
    return ["router", "seed", "validation loss", "Gini", "min/max", "MaxVio", "dead", "entropy", "top gate"], rows


def write_page(path, parts, experiments):
    """The page and its figures; returns the figures."""
    drawings = {k: v for e in experiments for k, v in figures(e).items()} if draw else {}
    if draw:
        path.parent.mkdir(exist_ok=True)
        path.write_text(to_html(parts, drawings))
    return drawings


def main():
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        results = Results(with_lab=True)
        own = [Experiment(name, results) for name in sys.argv[1:]]
        parts = list(blocks(own, results))
        print(to_markdown(parts))
        write_page(lab.ROOT / "build" / f"{own[0].spec['name']}.html", parts, own)
        return 0
    results = Results()
    names = sorted((p.stem for p in (lab.HERE / "experiments").glob("*.yaml") if p.stem not in SKIPPED),
                   key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    experiments = [Experiment(name, results) for name in names]
    if sys.argv[1:2] == ["--table"]:
        table = (routers_table(results) if sys.argv[2] == "routers" else
                 headlines(experiments) if sys.argv[2] == "readme" else summary(experiments))
        print(to_markdown([("table", *table)]), end="")
        return 0
    parts = list(blocks(experiments, results))
    text, path = to_markdown(parts), lab.HERE / "REPORT.md"
    if sys.argv[1:] == ["--check"]:
        old, new = ([line for line in t.splitlines() if line and (draw or not line.startswith("!["))]
                    for t in (path.read_text() if path.is_file() else "", text))         # without draw.py no figures
        changed = list(difflib.unified_diff(old, new, lineterm="", n=0))
        if to_markdown([("table", *headlines(experiments))]) not in (lab.ROOT / "README.md").read_text():
            changed.append("README.md is not: python3 dev/readme.py lab")
        print("\n".join(changed[:6]) or "REPORT.md and README.md are current")
        return bool(changed)
    path.write_text(text)
    for name, (drawing, _) in write_page(lab.ROOT / "build/lab.html", parts, experiments).items():
        draw.save(lab.HERE / "figures" / f"{name}.svg", drawing)
    print(f"{path.relative_to(lab.ROOT)}" + (", build/lab.html" if draw
                                             else "; no figures and no page without dev/report/draw.py"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
