"""Figures as SVG and a page around them, by the standard library alone: curves, heat maps, trees. What run.py draws
runs with, for other reports, too.

Every function returns text. Colours are variables of FIGURE_STYLE, which has a light and a dark set, so that a figure
follows the reader's choice; curves differ by dashes as well. A figure is `width` units wide, by default 360: at that
size its letters are as large as a page's on a phone. It has a title for screen readers; `describe` says what it shows
in a sentence.

    page("Runs", [section("loss", "Loss", grid([figure(lines("Loss", [Series("a", points)], "steps", "nats"))]))])
    save("loss.svg", lines("Loss", [Series("a", points)], "steps", "nats", width=720, height=300))
"""
import html
import math
import pathlib
import re
import textwrap
from typing import NamedTuple, Sequence

COLOURS = 8
DASHES = ["", "6 3", "2 2", "8 2 2 2", "4 4", "10 3", "1 3", "6 2 1 2"]
FIGURE_STYLE = """
:root { --ink: #1c2128; --muted: #57606a; --paper: #ffffff; --line: #d0d7de; --more: #c2410c; --less: #1d6fb8;
  --c0: #1d6fb8; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #a16207; --c5: #be185d; --c6: #0f766e;
  --c7: #52525b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9ba7b4; --paper: #0f141a; --line: #353d47;
  --more: #fb923c; --less: #60a5fa; --c0: #60a5fa; --c1: #fb923c; --c2: #4ade80; --c3: #c084fc; --c4: #facc15;
  --c5: #f472b6; --c6: #2dd4bf; --c7: #a1a1aa; } }
svg.figure { font: 12px system-ui, sans-serif; background: var(--paper); }
svg.figure text { fill: var(--ink); } svg.figure text.small { font-size: 10.5px; fill: var(--muted); }
svg.figure .title { font-weight: 600; } svg.figure .grid { stroke: var(--line); fill: none; }
svg.figure .edge { stroke: var(--muted); fill: none; } svg.figure .node { fill: var(--paper); stroke: var(--ink); }
"""
PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 1rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
a { color: var(--c0); } nav a { margin-right: .8rem; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; background: var(--paper); }
:focus-visible { outline: 3px solid var(--c1); outline-offset: 2px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 1rem 1.5rem; }
.grid > * { min-width: 0; } figure { margin: 0; }
svg.figure { display: block; width: 100%; max-width: 520px; height: auto; }
figcaption, .note { color: var(--muted); font-size: .9rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding: .3rem 0; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
.words { text-align: left; } td:first-child { white-space: nowrap; }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line); font-size: .8rem; }
code { overflow-wrap: anywhere; } summary { cursor: pointer; margin: .6rem 0; }
"""


class Series(NamedTuple):
    """One curve. points: (x, y); band: (x, low, high), an interval around it; slot: which colour, the same thing has
    the same one in every figure (None: its place in the list); dots: points instead of a line, intervals as bars;
    faint: a pale line that the legend leaves out, for the raw numbers behind a mean."""
    name: str
    points: Sequence
    band: Sequence = ()
    slot: int | None = None
    dots: bool = False
    faint: bool = False


def text(x, y, words, anchor="start", kind="", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{more}>{html.escape(str(words))}</text>'


def number(value):
    """A number as an axis shows it: 12000 is 12k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def ticks(low, high, log=False, wanted=5):
    """Round numbers from low to high: steps of 1, 2 or 5 times a power of ten; on a log axis these themselves."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        marks = [m * 10.0 ** p for p in range(first, last + 1) for m in ((1, 2, 5) if last - first < 4 else (1,))]
        found = [m for m in marks if low <= m <= high]
        if len(found) > 2:
            return found
    step = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= wanted + .5)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def svg(title, width, height, body, describe=""):
    name = html.escape(f"{title}. {describe}" if describe else title)
    return (f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
            f'width="{width}" height="{height:.0f}" role="img" aria-label="{name}"><title>{name}</title>'
            f'{"".join(body)}</svg>')


def legend(names, width, y, mark):
    """Marks and names in rows from y on; returns the text and the rows' height. mark(i, x, y): a mark 22 wide."""
    out, x = [], 8.0
    for i, name in enumerate(names):
        needed = 38 + 6.4 * len(name)
        if x > 8 and x + needed > width:
            x, y = 8.0, y + 16
        out += [mark(i, x, y), text(x + 26, y + 4, name, kind="small")]
        x += needed
    return out, y


def thin(points, most):
    """At most so many points: of each group the lowest and the highest, so that peaks stay."""
    size = max(1, math.ceil(2 * len(points) / most))
    if size < 3:
        return points
    out = []
    for i in range(0, len(points), size):
        group = points[i:i + size]
        out += sorted({min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])})
    return [points[0]] * (out[0] != points[0]) + out + [points[-1]] * (out[-1] != points[-1])


def lines(title, series, x_label, y_label, width=360, height=250, log_x=False, log_y=False, describe=""):
    """Curves over one another, with a legend; numbers that are not finite (on a log axis: positive) are left out."""
    def sound(*values):
        return all(v is not None and math.isfinite(v) for v in values)

    def kept(points):
        return [p for p in points if sound(*p) and (not log_x or p[0] > 0) and (not log_y or min(p[1:]) > 0)]

    series = [s._replace(points=kept(s.points), band=kept(s.band), slot=i if s.slot is None else s.slot)
              for i, s in enumerate(series)]
    everything = [p for s in series for p in [*s.points, *s.band]]
    body = [text(8, 16, title, kind="title")]
    if not everything:
        return svg(title, width, 60, body + [text(8, 40, "no numbers", kind="small")], describe)

    named = [s for s in series if not s.faint]

    def mark(i, x, y):
        s = named[i]
        colour, dashes = f"var(--c{s.slot % COLOURS})", DASHES[s.slot % len(DASHES)]
        style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        dot = f'<circle cx="{x + 11:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        return dot if s.dots else f'<line x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y:.1f}" y2="{y:.1f}" {style}/>'

    names, top = legend([s.name for s in named], width, 32, mark)
    left, right, top, bottom = 48, width - 14, top + 26, height - 36
    height, bottom = height + max(0, top - 74), bottom + max(0, top - 74)

    def scale(values, low_pixel, high_pixel, log):
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - abs(low) / 2, high + (abs(high) / 2 or 1))
        margin = (math.log(high / low) if log else high - low) * (.04 if high_pixel < low_pixel else .02)
        low, high = (low / math.exp(margin), high * math.exp(margin)) if log else (low - margin, high + margin)
        place = (lambda v: math.log(v / low) / math.log(high / low)) if log else (lambda v: (v - low) / (high - low))
        return low, high, lambda v: low_pixel + (high_pixel - low_pixel) * place(v)

    x_low, x_high, px = scale([p[0] for p in everything], left, right, log_x)
    y_low, y_high, py = scale([v for p in everything for v in p[1:]], bottom, top, log_y)
    for v in ticks(y_low, y_high, log_y):
        body.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{py(v):.1f}" y2="{py(v):.1f}"/>')
        body.append(text(left - 5, py(v) + 4, number(v), "end", "small"))
    for v in ticks(x_low, x_high, log_x, 4):
        body.append(f'<line class="grid" x1="{px(v):.1f}" x2="{px(v):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        body.append(text(px(v), bottom + 16, number(v), "middle", "small"))
    body += [f'<path class="grid" d="M{left} {top}V{bottom}H{right}"/>',
             text((left + right) / 2, height - 6, x_label, "middle", "small"),
             text(8, top - 7, y_label, kind="small"), *names]
    for s in series:
        colour = f"var(--c{s.slot % COLOURS})"
        if s.band and s.dots:
            body += [f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(a):.1f}" y2="{py(b):.1f}" stroke="{colour}" '
                     'stroke-width="2"/>' for x, a, b in s.band]
        elif s.band:
            outline = [(x, low) for x, low, _ in s.band] + [(x, high) for x, _, high in reversed(s.band)]
            body.append(f'<path d="M{"L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in outline)}Z" fill="{colour}" '
                        'fill-opacity=".18"/>')
        if s.dots or len(s.points) == 1:
            body += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in s.points]
        elif s.points:
            path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in thin(list(s.points), 2 * width))
            how = 'stroke-opacity=".3"' if s.faint else f'stroke-dasharray="{DASHES[s.slot % len(DASHES)]}"'
            body.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{1 if s.faint else 1.8}" '
                        f'stroke-linejoin="round" {how}/>')
    return svg(title, width, height, body, describe)


def heat(title, rows, row_names, column_names, width=360, cell=14, share=None, key=("", ""), describe="", groups=(),
         row_label="", column_label="", widest=60):
    """A heat map. rows: numbers, None is left empty. share(v) in -1 .. 1: how strong its colour is, below 0 the other
    colour; without it v itself. key: what the strongest colour of each kind says. groups: a line above these rows.
    cell: the height of a row; None makes squares."""
    share = share or (lambda v: v)
    left = 16 + 6.2 * max([len(str(n)) for n in row_names] + [len(row_label)])
    top = 54 if any(key) else 38
    columns = max(len(r) for r in rows)
    wide, few = min((width - left - 10) / columns, widest), len(rows) * columns <= 4000    # cells that say their number
    cell = cell or round(wide, 1)
    every_row = math.ceil(11 / cell)
    body = [text(8, 16, title, kind="title"), text(left - 6, top - 5, row_label, "end", "small")]
    if any(key):
        for i, (sign, words) in enumerate(zip(("less", "more"), key)):
            x = 8 + i * (34 + 6 * len(key[0])) * bool(key[0])
            if words:
                body += [f'<rect x="{x:.1f}" y="24" width="14" height="12" fill="var(--{sign})"/>',
                         text(x + 18, 34, words, kind="small")]
    for i, row in enumerate(rows):
        y = top + i * cell
        if i % every_row == 0:
            body.append(text(left - 6, y + cell / 2 + 4, row_names[i], "end", "small"))
        for j, value in enumerate(row):
            if value is None:
                continue
            strength = max(-1.0, min(1.0, share(value)))
            words = f"<title>{html.escape(f'{row_names[i]}, {column_names[j]}: {value:.4g}')}</title>" * few
            body.append(f'<rect x="{left + j * wide:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{cell}" '
                        f'stroke="var(--paper)" stroke-width=".6" fill="var(--{"more" if strength >= 0 else "less"})" '
                        f'fill-opacity="{abs(strength):.3f}">{words}</rect>')
    bottom = round(top + len(rows) * cell, 1)
    body += [f'<path class="grid" d="M{left:.1f} {top}H{left + columns * wide:.1f}V{bottom}H{left:.1f}Z"/>']
    body += [f'<path stroke="var(--ink)" d="M6 {top + g * cell}H{left + columns * wide:.1f}"/>' for g in groups if g]
    every = max(1, math.ceil(max(len(str(n)) for n in column_names) * 7 / wide))
    body += [text(left + (j + .5) * wide, bottom + 14, name, "middle", "small")
             for j, name in enumerate(column_names) if j % every == 0]
    body.append(text(left + columns * wide / 2, bottom + 30, column_label, "middle", "small"))
    return svg(title, width, bottom + (38 if column_label else 22), body, describe)


def tree(title, levels, edges, gaps, width=360, row=22, describe="", slots=None):
    """Generations from left to right. levels: the nodes' names of each; edges: for each level but the first, the place
    of each node's parent in the level before it, or -1, or a list of places; gaps: for each of these levels the methods
    of its edges, one for all or a list of each node's, which are written over them.
    Nodes are drawn below their parents, so that no edges of trees cross. slots[level][node]: its colour."""
    edges = [[[p for p in (ps if isinstance(ps, list) else [ps]) if p >= 0] for ps in level] for level in edges]
    order = [list(range(len(levels[0])))]
    if edges and any(len(ps) > 1 for ps in edges[0]):   # what is merged lies together
        order[0].sort(key=lambda n: next((c for c, ps in enumerate(edges[0]) if n in ps), len(edges[0])))
    for parents in edges:                               # a level's nodes in the order of their parents
        place = {node: i for i, node in enumerate(order[-1])}
        first = [min([place[p] for p in ps] or [len(place)]) for ps in parents]
        order.append(sorted(range(len(parents)), key=lambda n: (first[n], n)))
    most = max(len(level) for level in levels)
    boxes = [14 + 7 * max(len(str(n)) for n in names) for names in levels]
    step = (width - 16 - boxes[-1]) / max(1, len(levels) - 1)
    boxes = [min(box, step - 40) if len(levels) > 1 else box for box in boxes]
    above = [gap if isinstance(gap, list) else [gap] for gap in gaps]
    above = [textwrap.wrap(" / ".join(filter(None, dict.fromkeys(gap))), max(8, int(step / 6))) for gap in above]
    heights, body, top = {}, [text(8, 16, title, kind="title")], 50 + 13 * (max(map(len, above), default=1) - 1)
    for level in range(len(levels) - 1, -1, -1):        # leaves are dealt rows; a parent stands amid its children
        nodes = order[level]
        for i, node in enumerate(nodes):
            below = level + 1 < len(levels)
            children = [heights[level + 1, c] + (ps.index(node) - (len(ps) - 1) / 2) * row
                        for c, ps in enumerate(edges[level]) if node in ps] if below else []
            wanted = sum(children) / len(children) if children else top + (i + .5) * row * most / len(nodes)
            heights[level, node] = max(wanted, heights[level, nodes[i - 1]] + row if i else top + row / 2)
    for level, names in enumerate(levels):
        x, box = 8 + level * step, boxes[level]
        if level:
            methods = gaps[level - 1] if isinstance(gaps[level - 1], list) else [gaps[level - 1]] * len(names)
            body += [text(x - (step - boxes[level - 1]) / 2, 36 + 13 * i, said, "middle", "small")
                     for i, said in enumerate(above[level - 1])]
        for node in order[level]:
            y = heights[level, node]
            for parent in edges[level - 1][node] if level else []:
                start, y0 = x - step + boxes[level - 1], heights[level - 1, parent]
                middle, slot = (start + x) / 2, slots[level][node] if slots else 0
                words = html.escape(f"{levels[level - 1][parent]} to {names[node]}: {methods[node]}")
                way = f"M{start:.1f} {y0:.1f}C{middle:.1f} {y0:.1f} {middle:.1f} {y:.1f} {x:.1f} {y:.1f}"
                body.append(f'<path d="{way}" fill="none" stroke="var(--c{slot % COLOURS})" stroke-width="1.6"><title>'
                            f"{words}</title></path>")
            body.append(f'<rect class="node" x="{x:.1f}" y="{y - row * .4:.1f}" width="{box:.1f}" rx="4" '
                        f'height="{row * .8:.1f}"/>')
            body.append(text(x + box / 2, y + 4, names[node], "middle", "small"))
    return svg(title, width, max(heights.values()) + row, body, describe)


def figure(drawing, caption=""):
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{drawing}{below}</figure>"


def grid(parts):
    return f'<div class="grid">{"".join(parts)}</div>'


def table(heads, rows, caption="", name=""):
    """Cells are written as they are given; columns of numbers are set to the right. name: the table's id, for tests."""
    rows = [[str(c) for c in row] for row in rows]
    sides = ["" if all(re.fullmatch(r"[-+0-9.e]*", row[i]) for row in rows) else ' class="words"'
             for i in range(len(list(heads)))]
    head = "".join(f'<th scope="col"{side}>{html.escape(str(h))}</th>' for h, side in zip(heads, sides))
    cells = ("".join(f"<td{side}>{html.escape(c)}</td>" for c, side in zip(row, sides)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    mark = f' id="{html.escape(name)}"' if name else ""
    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    label = html.escape(caption or "table")
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table{mark}>'
            f"{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def details(summary, inside, opened=False):
    return f"<details{' open' if opened else ''}><summary>{html.escape(summary)}</summary>{inside}</details>"


def section(name, title, inside):
    return name, title, inside


def page(title, sections, style="", script=""):
    """One HTML file that needs nothing else; sections: of section()."""
    links = " ".join(f'<a href="#{name}">{html.escape(words)}</a>' for name, words, _ in sections)
    parts = "".join(f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{html.escape(words)}'
                    f"</h2>{inside}</section>" for name, words, inside in sections)
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width='
            'device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
            f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{FIGURE_STYLE}{PAGE_STYLE}'
            f'{style}</style></head><body><a class="skip" href="#main">To the figures</a><h1>{html.escape(title)}</h1>'
            f'<nav aria-label="Sections">{links}</nav><main id="main">{parts}</main>'
            f"{f'<script>{script}</script>' if script else ''}</body></html>\n")


def save(path, drawing):
    """A figure as a file of its own, which follows the reader's light or dark as well."""
    head, rest = drawing.split("><title>", 1)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    style = FIGURE_STYLE.replace(":root", "svg.figure")
    path.write_text(f"{head}><style>{style}</style><title>{rest}\n", encoding="utf-8")
