#!/usr/bin/env python3
"""Tests of the page: makes small runs, draws them, and opens the page in headless Chromium, light and dark, 400 and
1,400 pixels wide. Numbers on the page must be those of the CSV files, the console silent, nothing wider than the
window.

    python3 dev/report/test_page.py [DIR for the page and four screenshots]      after `make`; wants chromium
"""
import csv
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
import export       # noqa: E402

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
    labelled = {a["for"] for t, a in page.elements if t == "label" and "for" in a}
    switches = [a for t, a in page.elements if t == "input" and a.get("type") == "radio"]
    check(all(a.get("id") in labelled for a in switches), "switches have labels")
    check(not re.search(r"\b(nan|inf|None)\b", re.sub(r"<script.*?</script>", "", source)), "no numbers that are none")


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
