#!/usr/bin/env python3
"""Tests of the page: makes small runs, draws them, and opens the page in headless Chromium, light and dark, 400 and
1,400 pixels wide. Numbers on the page must be those of the CSV files, the console silent, nothing wider than the
window.

    python3 dev/report/test_page.py [DIR for the page and four screenshots]      after `make`; wants chromium
"""
import csv
import html
import html.parser
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import xml.dom.minidom

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import draw         # noqa: E402
import export       # noqa: E402
import run as report    # noqa: E402

passed = failed = 0
PROBE = """<script>
const visible = which => [...document.querySelectorAll(which)].filter(e => e.checkVisibility());
const seen = () => visible('.layer').map(l => l.dataset.layer);
const drawn = () => visible('.by-step, .by-tokens').map(l => l.className);
const found = {page: document.documentElement.scrollWidth, view: innerWidth, layers: seen(), axes: drawn(),
               back: getComputedStyle(document.body).backgroundColor};
const select = document.querySelector('select');
select.value = '1'; select.dispatchEvent(new Event('change')); document.querySelector('#x-tokens').click();
found.layers_then = seen(); found.axes_then = drawn();
document.documentElement.dataset.found = JSON.stringify(found);
</script>"""


def check(ok, what, said=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("ok    " if ok else "FAILED", what, "" if ok else said)


def run(*command, **how):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", **how)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done


def make_runs(folder):
    (folder / "my.txt").write_text(pathlib.Path("LICENSE").read_text() * 9)
    train = ["./train_moe", "--data", folder / "my.txt", "--steps", 30, "--batch", 1, "--seq", 32, "--val-every", 10]
    run(*train, "--layers", 2, "--hidden", 32, "--dense", "--ffn", 64, "--out", folder / "dense")
    run("./upcycle", folder / "dense", folder / "start4", "--experts", 4, "--topk", 2, "--norm-topk", 1)
    run(*train, "--model", folder / "start4", "--out", folder / "moe4")
    run("./upcycle", folder / "moe4", folder / "start8", "--experts", 8, "--method", "family")
    run(*train, "--model", folder / "start8", "--out", folder / "moe<8>")       # names are text, not markup
    run("./train_moe", "--model", folder / "moe<8>", "--data", folder / "my.txt", "--eval", "--seq", 128,
        "--val-batches", 1, "--trace", folder / "moe<8>/trace.csv")
    return [folder / n for n in ("dense", "moe4", "moe<8>")]


class Page(html.parser.HTMLParser):
    """Tables with an id as lists of cells, the attributes of all elements, texts of titles."""

    def __init__(self, source):
        super().__init__()
        self.tables, self.elements, self.titles, self.rows, self.cell, self.title = {}, [], [], None, None, None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "table":
            self.rows = self.tables[attributes.get("id", len(self.tables))] = []
        elif tag == "tr" and self.rows is not None:
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ""
        elif tag == "title":
            self.title = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None
        elif tag == "title":
            self.titles.append(self.title)
            self.title = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        if self.title is not None:
            self.title += data


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.reader(f))


def check_numbers(page, runs):
    titles = set(page.titles)
    for i, out in enumerate(runs):
        log, val = rows_of(out / "log.csv"), rows_of(out / "val.csv")
        check(page.tables[f"log-{i}"] == log, f"{out.name}: the table is log.csv")
        check(page.tables[f"val-{i}"] == val, f"{out.name}: the table is val.csv")
        fact = page.tables["models"][i + 1]
        check([fact[0], *fact[-4:]] == [out.name, *log[-1][:3], val[-1][2]], f"{out.name}: last losses", fact)
        parameters = re.search(r"(\d+) parameters", (out / "README.md").read_text()).group(1)
        check(parameters in fact, f"{out.name}: parameters")
        load = [dict(zip(rows_of(out / "load.csv")[0], r)) for r in rows_of(out / "load.csv")[1:]] if i else []
        missing, mean = [], {}
        for r in load:
            mean.setdefault((r["step"], r["layer"]), []).append(int(r["assignments"]))
        for r in load:
            counts = mean[r["step"], r["layer"]]
            share = int(r["assignments"]) * len(counts) / sum(counts)
            if f"{r['layer']}.{r['expert']}, {r['step']}: {share:.4g}" not in titles:
                missing.append((r, share))
        check(not missing, f"{out.name}: {len(load)} cells of the heat map are load.csv", missing[:3])
        if load:
            shares = {(f"{r['layer']}.{r['expert']}", r["step"]):
                      f"{int(r['assignments']) * len(c) / sum(c):.4g}" for r in load
                      for c in [mean[r["step"], r["layer"]]]}
            head, *body = page.tables[f"loads-{i}"]
            told = {(row[0], step): v for row in body for step, v in zip(head[1:], row[1:])}
            check(told == shares, f"{out.name}: the table of loads is load.csv", told)
            gini = [[float(r["gini"]) for r in load if r["step"] == row[0] and r["expert"] == "0"]
                    for row in page.tables[f"means-{i}"][1:]]
            check([row[1] for row in page.tables[f"means-{i}"][1:]] == [f"{sum(g) / len(g):.4g}" for g in gini],
                  f"{out.name}: the means over layers are those of load.csv", gini)
        last = [r for r in load if r["step"] == load[-1]["step"]]
        for line in page.tables.get(f"load-{i}", [])[1:]:
            counts = " ".join(r["assignments"] for r in last if r["layer"] == line[0])
            row = next(r for r in last if r["layer"] == line[0])
            check(line[-1] == counts and all(row[n] == v for n, v in zip(page.tables[f"load-{i}"][0][:-1], line)),
                  f"{out.name}, layer {line[0]}: last loads", line)
    trace = rows_of(runs[-1] / "trace.csv")
    spans = [a for t, a in page.elements if t == "span" and "data-e" in a]
    wanted = [f"expert {r[4]}, {r[5]}; gates {r[6]}, {r[7]}" for layer in "01" for r in trace[1:] if r[3] == layer]
    check([a["title"] for a in spans] == wanted[:len(spans)] if len(wanted) == len(spans) else
          set(a["title"] for a in spans) <= set(wanted), f"{len(spans)} tokens have the experts and gates of trace.csv")
    for layer in "01":
        told = [[row[0], *row[2:]] for row in page.tables[f"gates-2-{layer}"][1:]]
        rows = [r for r in trace[1:] if r[3] == layer][:report.MOST_TOKENS]
        check(told == [[str(i), f"{r[4]}, {r[5]}", f"{r[6]}, {r[7]}"] for i, r in enumerate(rows)],
              f"layer {layer}: the table of gates is trace.csv", told[:2])
    for name in ("similar-1-0", "similar-2-1", "kinds-2-0"):
        head, *body = page.tables[name]
        cells = [f"{row[0]}, {column}: {v}" for row in body for column, v in zip(head[1:], row[1:])]
        check(len(cells) > 15 and set(cells) <= titles, f"{name}: the table has the figure's numbers", cells[:3])
    receipt = json.loads((runs[-1] / "upcycle.json").read_text())
    check("dense to moe4: copy" in titles and "moe4 to moe<8>: family" in titles, "the tree of models has its methods")
    for layer in receipt["layers"][:1]:
        edges = [f"{s} to {e}: family" for e, s in enumerate(layer["source"])]
        check(all(e in titles for e in edges), "each edge of the tree has its experts and method", edges)


def check_markup(page, source):
    check(not re.search(r'(src|href)="?(?!#|data:)[^"#]', source) and "@import" not in source and "url(" not in source,
          "the page wants nothing else")
    names = [a["id"] for _, a in page.elements if "id" in a]
    check(len(names) == len(set(names)), "ids are unique")
    svgs = [a for t, a in page.elements if t == "svg"]
    check(svgs and all(a.get("role") == "img" and a.get("aria-label") for a in svgs), f"{len(svgs)} figures have names")
    similar = re.search('id="similarity".*id="lineage"', source)[0]
    square = re.findall(r'width="([0-9.]+)" height="([0-9.]+)" stroke', similar)
    check(square and all(float(w) == float(h) for w, h in square), "cells of similarities are squares", square[:3])
    labelled = {a["for"] for t, a in page.elements if t == "label" and "for" in a}
    switches = [a for t, a in page.elements if t == "input" and a.get("type") == "radio"]
    check(all(a.get("id") in labelled for a in switches), "switches have labels")
    check(not re.search(r"\b(nan|inf|None)\b", re.sub(r"<script.*?</script>", "", source)), "no numbers that are none")


def page_of(folder, *arguments, **how):
    run(sys.executable, HERE / "run.py", *arguments, "--to", folder / "of.html", **how)
    return Page((folder / "of.html").read_text(encoding="utf-8"))


def check_names(folder, runs):
    """Runs are read from where they are, whatever lies here, and told apart."""
    page = page_of(folder, *runs, cwd=runs[-1])
    check([page.tables[f"log-{i}"] for i in range(3)] == [rows_of(out / "log.csv") for out in runs],
          "a log.csv in the current directory is nobody's")
    for out, copy in (runs[1], "a/x"), (runs[2], "b/x"):
        shutil.copytree(out, folder / copy)
    run("./upcycle", folder / "b/x", folder / "b/y", "--experts", 16)
    for name in "cd":
        (folder / name).mkdir()
    for here, source, made in (folder, "a/x", "c/x"), (folder / "a", "x", "z"), (folder / "a", "x", "../d/x"):
        run(pathlib.Path("upcycle").resolve(), source, made, "--experts", 8, cwd=here)
    page = page_of(folder, *(folder / n for n in ("a/x", "b/x", "b/y", "c/x", "a/z", "a/x")))
    check([row[0] for row in page.tables["models"][1:]] == ["a/x", "b/x", "y", "c/x", "z", "a/x (2)"],
          "runs have as much of their paths as tells them apart", page.tables["models"])
    edges = {"dense to a/x: copy", "b/x to y: copy", "moe4 to b/x: family", "a/x to c/x: copy", "a/x to z: copy"}
    check(edges <= set(page.titles), "so do the models that they come from", edges - set(page.titles))
    page = page_of(folder, folder / "d/x")
    check("x to d/x: copy" in page.titles, "no run comes from itself", page.titles)


def check_lineage(folder, runs):
    """More layers, wider FFNs, merged experts: each step has its name, each expert all of its parents."""
    made = {"deep": (runs[1], "--experts", 8, "--layers-to", 4),
            "later": ("deep", "--experts", 16, "--method", "family"),
            "stack": (runs[0], "--layers-to", 4, "--depth", "stack"), "after": ("stack", "--experts", 4),
            "wide": (runs[1], "--ffn-to", 128),
            "merged": (runs[1], "--experts", 2, "--method", "merge", "--calibrate", folder / "my.txt")}
    for name, (source, *options) in made.items():
        run("./upcycle", folder / source, folder / name, *options)
    page = page_of(folder, *(folder / n for n in made))
    titles, steps = set(page.titles), {(row[0], row[1]) for row in page.tables["steps"][1:]}
    wanted = {("deep", "2 → 4 layers, interpose; copy"), ("later", "family"), ("stack", "2 → 4 layers, stack"),
              ("after", "copy"), ("wide", "width 64 → 128"), ("merged", "merge")}
    check(wanted <= steps, "steps that add layers or widen are named", steps)
    wanted = {"moe4 to deep: 2 → 4 layers, interpose; copy", "1 to 5: 2 → 4 layers, interpose; copy",
              "5 to 13: family", "FFN to FFN: 2 → 4 layers, stack", "FFN to 3: copy",
              "moe4 to wide: width 64 → 128"}
    check(wanted <= titles, "their edges, too", wanted - titles)
    groups = [e["group"] for e in json.loads((folder / "merged/upcycle.json").read_text())["layers"]]
    wanted = {f"{e} to {g}: merge" for group in groups for e, g in enumerate(group)}
    check(len(wanted) > 2 and wanted <= titles, "a merged expert has all of its parents", wanted - titles)


def handmade(folder, config, tokenizer, trace):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    head = "window,position,token,layer,expert_1,expert_2,gate_1,gate_2"
    (folder / "trace.csv").write_text("\n".join([head, *trace]) + "\n")
    return folder


def check_tokens(folder):
    """Numbers of experts by all names, tokens of Unigram and of bytes, tokens with fewer experts, many experts."""
    names = [({"n_routed_experts": 6}, "6"), ({"num_experts": 3}, "3"), ({"num_local_experts": 5}, "5"),
             ({"model_type": "mixtral"}, "8"), ({"model_type": "qwen3"}, "dense")]
    page = page_of(folder, *(handmade(folder / f"E{i}", c, None, []) for i, (c, _) in enumerate(names)),
                   "dev/reference/golden/dots1")
    found = [row[4] for row in page.tables["models"][1:]]
    check(found == [n for _, n in names] + ["6"], "the number of experts has several names", found)

    vocab = [["<unk>", 0], ["\u2581the", -1], ["<0x0A>", -2], ["<0xC3>", -2], ["\u00e9", -3]]
    tokenizer = {"model": {"type": "Unigram", "vocab": vocab, "byte_fallback": True}, "decoder": {"type": "Metaspace"},
                 "added_tokens": [{"id": 5, "content": "<|end|>"}]}
    trace = ["0,0,1,0,2,1,.5,.5", "0,1,2,0,0,-1,1.0,0.0", "0,2,3,0,2,0,.6,.4", "0,3,4,0,-1,-1,0.0,0.0",
             "0,4,5,0,1,2,.9,.1", "0,5,9,0,0,-1,1.0,0.0"]
    odd = handmade(folder / "odd", {"n_routed_experts": 3, "vocab_size": 10}, tokenizer, trace)
    many = handmade(folder / "many", {"num_experts": 64, "vocab_size": 256}, None,
                    [f"0,{e},{97 + e % 26},0,{e},{(e + 1) % 64},.5,.5" for e in range(64)])
    page = page_of(folder, odd, many, "--svg", folder)
    rows = page.tables["gates-0-0"][1:]
    check([r[1] for r in rows] == ["␣the", "↵", "\\xc3", "\u00e9", "<|end|>", "<9>"],
          "pieces are text, <0x0A> is a byte", rows)
    check([r[2:] for r in rows[1:4]] == [["0", "1.0"], ["2, 0", ".6, .4"], ["", ""]], "an expert -1 is none", rows)
    counts = [r[1] for r in page.tables["favourites-0-0"][1:]]
    spans = [a for t, a in page.elements if t == "span" and "-1" in a.get("title", "")]
    check(counts == ["3", "2", "3"] and not spans, "neither in sums nor in titles", (counts, spans))
    kinds = [sum(float(r[e]) for r in page.tables["kinds-0-0"][1:]) for e in (1, 2, 3)]
    check(all(abs(k - 1) < .01 for k in kinds), "kinds of input are shares", kinds)
    kinds = [report.kind_of(text) for text in ("\t", "\n", "  \n", "\tfoo", " ", " Foo")]
    check(kinds == ["space", "line end", "line end", "lower case", "space", "capital"], "a tab is no line end", kinds)

    colours = {report.colour(e, 64) for e in range(64)}
    hues = sorted({hue for hue, _, _ in colours})
    check(len(colours) == 64 and min(b - a for a, b in zip(hues, hues[1:])) > 20, "64 experts differ in colour", hues)
    numbers = [("checked" in a) for t, a in page.elements if t == "input" and a.get("class") == "numbers"]
    check(numbers == [False, True], "and have their numbers from the start", numbers)
    figure = (folder / "tokens.svg").read_text(encoding="utf-8")
    places = [float(x) for x in re.findall(r'd="M([0-9.]+) ', figure)]
    check(len(places) > 64 and max(places) < 700, "the key of 64 experts fits", max(places))
    square = draw.heat("", [[.5] * 64] * 64, range(64), range(64), cell=None)
    sizes = {(w, h) for w, h in re.findall(r'<rect [^>]*width="([0-9.]+)" height="([0-9.]+)" stroke', square)}
    check(sizes and all(float(w) == float(h) for w, h in sizes), "cells of 64 by 64 are squares", sizes)


def check_picture():
    """The picture in README.md shows the text that lies beside it."""
    source = (HERE / "pictures/tokens.svg").read_text(encoding="utf-8")
    shown = [html.unescape(words) for words in re.findall(r'<text [^>]*textLength="[^>]*>([^<]*)<', source)]
    lines = (HERE / "pictures/text.txt").read_text(encoding="utf-8").split("\n")
    wanted = [line[i:i + 88] for line in lines for i in range(0, len(line) or 1, 88)][:6]
    check(shown == 3 * [w for w in wanted if w], "pictures/tokens.svg has the text of pictures/text.txt", shown)


def check_errors(folder, runs):
    """What is wrong is one line."""
    cut = shutil.copytree(runs[1], folder / "cut")
    (cut / "upcycle.json").write_text('{"sources": [')
    for script, *arguments in [("run.py", runs[0], "--to", folder / "nosuch/dir/r.html"), ("run.py", cut),
                               ("run.py", runs[1], "--trace", folder / "nosuch.csv"), ("run.py", folder / "nothere"),
                               ("run.py", runs[1], "--trace", runs[1] / "log.csv"), ("run.py", runs[0], "--to", folder),
                               ("run.py", runs[2], "--trace", runs[2] / "trace.csv", runs[2] / "trace.csv"),
                               ("export.py", "tensorboard", folder / "nothere"), ("export.py", "tensorboard")]:
        done = subprocess.run([sys.executable, HERE / script, *arguments], capture_output=True, text=True)
        lines = done.stderr.strip().split("\n")
        usage = len(arguments) < 2 and script == "export.py"
        said = "there is no folder" if "nosuch/dir" in str(arguments) else script
        check(done.returncode and (usage or len(lines) == 1 and lines[0].startswith(script) and said in lines[0]),
              " ".join([script, *(str(a).replace(str(folder), "DIR") for a in arguments)]) + ": one line", lines[-1])


def chromium(page, *flags, width, dark):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
               f"--window-size={width},3000", *flags, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def check_browser(page, probed, to):
    for width in (400, 1400):
        for dark in (False, True):
            name = f"{width} pixels, {'dark' if dark else 'light'}"
            dom, console = chromium(probed, "--dump-dom", width=width, dark=dark)
            said = [a["data-found"] for _, a in Page(dom).elements if "data-found" in a]
            found = json.loads(said[0]) if said else None
            check(found and not console, f"{name}: the console is silent", console)
            if not found:
                continue
            check(found["page"] <= found["view"] <= width + 100, f"{name}: nothing is wider than the window", found)
            check(found["back"] == ("rgb(15, 20, 26)" if dark else "rgb(255, 255, 255)"), f"{name}: the colours", found)
            check((found["layers"], found["layers_then"]) == (["0"], ["1"]), f"{name}: one layer at a time", found)
            check((found["axes"], found["axes_then"]) == (["by-step"], ["by-tokens"]), f"{name}: one x axis", found)
            picture = to / f"page-{width}-{'dark' if dark else 'light'}.png"
            chromium(page, f"--screenshot={picture}", width=width, dark=dark)
            check(picture.exists() and picture.stat().st_size > 50000, f"{name}: a screenshot that is not empty")


def check_export(out):
    run(sys.executable, HERE / "export.py", "tensorboard", out)
    data, sizes = (out / "events.out.tfevents.0.train_moe").read_bytes(), []
    while data:
        size = struct.unpack("<Q", data[:8])[0]
        parts = data[:8], data[8:12], data[12:12 + size], data[12 + size:16 + size]
        sound = [export.masked_crc(parts[0]), export.masked_crc(parts[2])] == [parts[1], parts[3]]
        sizes.append(size if sound else -1)
        data = data[16 + size:]
    check(len(sizes) == len(rows_of(out / "log.csv")) + len(rows_of(out / "val.csv")) - 1 and min(sizes) > 0,
          "TensorBoard's file has a sound record for each row", sizes[:5])
    crc = 0xE3069283
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    check(export.masked_crc(b"123456789") == struct.pack("<I", masked), "CRC-32C of 123456789 is e3069283")


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        to = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else folder
        to.mkdir(parents=True, exist_ok=True)
        runs, page = make_runs(folder), to / "page.html"
        run(sys.executable, HERE / "run.py", *runs, "--to", page, "--svg", to)
        source = page.read_text(encoding="utf-8")
        parsed = Page(source)
        check_numbers(parsed, runs)
        check_markup(parsed, source)
        for name in ("loss", "lineage", "tokens"):
            figure = xml.dom.minidom.parse(str(to / f"{name}.svg")).documentElement
            check(figure.tagName == "svg" and figure.getElementsByTagName("style"), f"{name}.svg stands alone")
        check_names(folder, runs)
        check_lineage(folder, runs)
        check_tokens(folder)
        check_picture()
        check_errors(folder, runs)
        check_export(runs[1])
        if shutil.which("chromium"):
            probed = folder / "probed.html"
            probed.write_text(source.replace("</body>", PROBE + "</body>"), encoding="utf-8")
            check_browser(page, probed, to)
        else:
            check(False, "chromium is there")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
