#!/usr/bin/env python3
"""Checks the lab's own parts: statistics, experiments, reading of routing, stopping and going on. From the project's
folder, after `make`:  python3 dev/lab/test_lab.py"""
import contextlib
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import zlib

FOLDER = tempfile.TemporaryDirectory()
os.environ["LAB"] = FOLDER.name
import lab                                                                              # noqa: E402, wants LAB
import numpy                                                                            # noqa: E402
import report                                                                           # noqa: E402
import stats                                                                            # noqa: E402

failed = passed = 0


def check(ok, what, said=""):
    global failed, passed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("ok    " if ok else "FAILED", what, "" if ok else f"   {said}")


def near(x, y, by=1e-9):
    return all(abs(a - b) <= by for a, b in zip(x, y))


def test_stats():
    # by hand: mean 2, s 1, n 3: 2 +- 4.302653 / sqrt 3; t = 3.4641, p = .0742
    check(near(stats.mean_interval([1, 2, 3]), (2, -0.484138, 4.484138, 0.074180), 1e-5), "Student's interval")
    x = [.001, .004, .002, .003]
    check(near(stats.holm([.01, .001, .3, .04]), [1 - .05 / 3, 1 - .05 / 4, .975, .975])
          and near(stats.holm([.03, .9]), [.975, .975]), "Holm's levels, down to the first that fails")
    check(near(stats.holm([.001, .02], stats.of_looks(2)), [1 - .0294 / 2, 1 - .0294]), "... and after two looks")
    p = stats.verdict_p(lambda level: stats.mean_interval(x, level)[1:3], {"yes": [-9, .004]})
    check(stats.verdict(*stats.mean_interval(x, 1 - p * 1.01)[1:3], {"yes": [-9, .004]}) == "yes"
          and stats.verdict(*stats.mean_interval(x, 1 - p * .99)[1:3], {"yes": [-9, .004]}) == "cannot tell",
          "the level at which a verdict ends", p)
    check(stats.mean_interval(x, .99)[1] < stats.mean_interval(x)[1],
          "one of several claims has a wider interval")
    check(math.isclose(stats.detectable(.004, 8), .004 / math.sqrt(8) * (2.364624 + 0.896030), rel_tol=1e-5),
          "what 8 pairs see")
    rng, inside, hits = numpy.random.default_rng(1), 0, 0
    for _ in range(1000):
        low = rng.normal(1.56, .01, 8)
        high, x = low - .035 + rng.normal(0, .004, 8), low - .02 + rng.normal(0, .004, 8)
        _, least, most = stats.closure(low, high, x)
        inside += least <= 4 / 7 <= most
        _, least, most = stats.jackknife(lambda s: (low[s] - x[s]).mean() / (low[s] - high[s]).mean(), 8)
        hits += least <= 4 / 7 <= most
    check(930 <= inside <= 970, "Fieller's interval holds the truth in 95 of 100 tries", inside)
    check(925 <= hits <= 975, "so does the jackknife's", hits)
    check(stats.closure([1, 1.1, 1.2], [1, 1.11, 1.19], [1, 1.1, 1.2])[1] == -math.inf,
          "without a gap no interval of closure")
    check(stats.gap_is_wide([1.557, 1.574, 1.56], [1.527, 1.534, 1.51])          # .03, .04, .05: 4 deviations
          and not stats.gap_is_wide([1.557, 1.574, 1.56], [1.55, 1.532, 1.53])
          and not stats.gap_is_wide([1.557, 1.574], [1.527, 1.545]), "five standard errors, three pairs")
    ranges = {"yes": [-9, 0], "partial": [-.002, .002], "no": [0, 9]}
    check([stats.verdict(-.01, -.001, ranges), stats.verdict(-.001, .001, ranges), stats.verdict(-.01, .01, ranges)]
          == ["yes", "partial", "cannot tell"], "verdicts")
    ranges = {"same": [-.002, .002], "no": [[-9, -.002], [.002, 9]]}
    check([stats.verdict(x, x + .001, ranges) for x in (-.01, 0, .01)] == ["no", "same", "no"], "a range of two parts")


def refused(text, expected):
    path = pathlib.Path(FOLDER.name) / "my.yaml"
    path.write_text(text.replace("{path}", str(path)))
    code = f"import lab; s = lab.stages_of(lab.read_experiment('{path}'))[1]; [lab.tokens_of(x, s) for x in s.values()]"
    done = subprocess.run([sys.executable, "-c", code],
                          cwd=lab.HERE, capture_output=True, text=True)
    check(done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1,
          f"refused: {expected}", done.stderr)


def test_experiments():
    claim = lab.read_yaml("{source: 2509.26520, paper: yes, expected: on, verdict: {yes: [0, .5], no: [-1, 0]}}")
    check(str(claim) == "{'source': '2509.26520', 'paper': 'yes', 'expected': 'on', "
          "'verdict': {'yes': [0, 0.5], 'no': [-1, 0]}}", "words of a YAML file stay words", claim)
    refused("train: ''\narms: {a: {from: b}}", "'a' is from 'b'")
    refused("train: ''\narms: {a: {from: b}, b: {from: a, train: ''}}", "itself")
    refused("train: ''\narms: {a: {form: b}}", "unknown form")
    refused("train: ''\narm: {}", "unknown arm")
    refused("arms: {a: {train: ''}}", "needs train and arms")
    refused("extends: tiny\nuse: [nothing]", "unknown nothing")
    refused("arms: [", "my.yaml")
    refused("[1, 2]", "no keys and values")
    refused("extends: tiny\nseeds: 3", "seeds is 3, not a list")
    refused("extends: tiny\nseeds: [a]", "seeds is ['a'], not a list")
    refused("extends: tiny\nuse: copy", "use is 'copy', not a list")
    refused("extends: {path}", "extends itself")
    refused("extends: tiny\ntext: mine", "text 'mine' is none of")
    refused("train: ''\narms: {a: {train: '--steps \"5'}}", "No closing quotation")
    refused("train: ''\narms: {a: {train: --steps abc}}", "--steps abc: expected a whole number")
    refused("extends: tiny\nclaims: [{claim: x, verdict: {yes: [0, 1]}}]", "lacks one")
    refused("extends: tiny\nclaims: [{claim: x, measure: {value: copy}, verdict: {yes: 0}}]", "a range [LEAST, MOST]")
    refused("extends: tiny\nclaims: [{claim: x, measure: {value: cope}, verdict: {yes: [0, 1]}}]", "'cope' is no arm")
    refused("extends: tiny\nclaims: [{claim: x, measure: {difference: [1, 2]}, verdict: {yes: [0, 1]}}]", "'1' is no")
    refused("extends: tiny\nclaims: [{claim: x, measure: {equal: [a]}, verdict: {yes: [0, 1]}}]", "equal wants arms")
    refused("extends: [tiny]", "not an experiment")
    mine = pathlib.Path(FOLDER.name) / "readings.yaml"
    mine.write_text("extends: L1\nuse: [none]")
    check("gap" not in lab.read_experiment(str(mine)), "an arm may be called none")
    mine.write_text("extends: E1\nuse: [continued, copy]")
    check(lab.read_experiment(str(mine))["readings"] == {"after": "continued"}, "readings of the arms that are there")
    os.environ["FROM"] = FOLDER.name
    check(lab.read_experiment("readings.yaml")["asked"] == ["continued", "copy"],
          "a file is named from where one stands")
    del os.environ["FROM"]
    ids = {}
    for path in (lab.HERE / "experiments").glob("*.yaml"):
        last, specs, _ = lab.stages_of(lab.read_experiment(path.stem))
        ids[path.stem] = last, specs
        for claim in lab.read_experiment(path.stem).get("claims", []):
            # names that are not there stop it
            report.measure(report.Experiment(path.stem, report.Results()), claim)
            if set(claim) - {"claim", "readme", "written", "looks", "source", "paper", "expected", "measure",
                             "verdict"} or \
                    not claim.get("expected"):
                check(False, f"{path.stem}: {claim}")
    check(all(n in specs for last, specs in ids.values() for n in last.values()),
          "all arms of all experiments have stages")
    new = {}                                        # one of each set of options, whatever their numbers
    for options in (s["train"] for _, specs in ids.values() for n, s in specs.items() if n.startswith("scratch-")):
        new[tuple(w for w in options if not w[0].isdecimal())] = options
    for options in new.values():
        done = subprocess.run(["./train_moe", *options, "--data", "LICENSE", "--val", "none", "--steps", "0"],
                              capture_output=True, text=True)
        if done.returncode:
            check(False, " ".join(options), done.stderr)
    check(len(new) > 20, "what begins an arm of any experiment is no error")
    check(ids["E7"][1][ids["E7"][0]["plain@grow", 1]]["parent"] == ids["E1"][0]["sigmoid-source", 1],
          "E7 shares E1's source")
    last, specs = ids["tiny"]
    check(lab.tokens_of(specs[last["source", 1]], specs) == (10 * 256, 30 * 256)
          and lab.tokens_of(specs[last["copy", 1]], specs) == (30 * 256, 60 * 256)
          and lab.tokens_of(specs[last["carried", 1]], specs) == (20 * 256, 40 * 256),
          "tokens of a branch, of one that was grown, and in all")
    arms = dict(a=dict(train="--steps 5"), b={"from": "a", "grow": "--experts 8"},
                c={"from": "b", "branch": True, "train": "--steps 9"})
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        lab.stages_of(dict(name="x", arms=arms, asked=["c"], seeds=[1], train="", text="tiny"))
    check("wants --optimizer copy" in said.getvalue(), "a branch of a growth without moments is refused")
    known = {"upcycle": "--experts M\n", "train_moe": "--steps --experts --expert-ffn --schedule --decay-frac"}
    left = lab.stages_of(lab.read_experiment("tiny"), known)[2]
    check(len(left) == 3 and "--method" in left[1], "arms whose options do not exist are left out with a line", left)
    known["upcycle"] = "--experts-max --method"
    left = lab.stages_of(lab.read_experiment("tiny"), known)[2]
    check(any("copy is left out until the programs have --experts" in line for line in left),
          "... a longer name is no such option", left)


def test_routing():
    """Four tokens of two kinds, one layer, K 2; experts 0 and 2 are twins, and 1 and 3; nobody chooses 4."""
    folder = pathlib.Path(FOLDER.name)
    for kind, rows in (("a", ["0,2", "0,2"]), ("b", ["1,3", "0,1"])):
        (folder / kind).write_text("window,position,token,layer,expert_1,expert_2\n" +
                                   "".join(f"0,{n},0,0,{row}\n" for n, row in enumerate(rows)))
    found, readers = lab.routing({k: folder / k for k in "ab"}, {0: [0, 1, 0, 1, 4]}, 5)
    # twins 0, 2: 3 and 2 tokens, 2 of them the same; 1, 3: 2 and 1, one the same. Loads 3 2 2 1 0
    check(near([found["overlap"], found["twins_together"], found["sources"]], [(2 / 3 + 1 / 2) / 2, 3 / 4, 5 / 4]),
          "overlap, twins together, sources a token", found)
    check(near([found["max_vio"], found["gini"], found["dead"]], [3 / 1.6 - 1, 28 / 80, 1]), "MaxVio, Gini, dead",
          found)
    p = numpy.array([[2, 0, 2, 0], [1, 2, 0, 1]]) / 8
    seen = p > 0
    independent = p.sum(0) * p.sum(1, keepdims=True)
    check(math.isclose(found["reading"], (p[seen] * numpy.log(p[seen] / independent[seen])).sum()),
          "what experts read", found)
    check(readers == [(0, "a", "0.667 0.000 1.000 0.000 0.000"), (0, "b", "0.333 1.000 0.000 1.000 0.000")],
          "shares of the kinds", readers)


def test_collect():
    stage = sorted(lab.stages_of(lab.read_experiment("tiny"))[1])[0]
    results, lab.RESULTS = lab.RESULTS, pathlib.Path(FOLDER.name) / "results"
    (lab.LAB / "done").mkdir(exist_ok=True)
    kept = []
    for canary, loss in (("a", 1), ("b", 2), ("a", 3)):
        lab.write_rows(lab.LAB / "done" / f"{stage}.csv", ["stage", "canary", "loss"],
                       [dict(stage=stage, canary=canary, loss=loss)])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            lab.collect()
        kept.append(lab.rows_of(lab.RESULTS / "stages.csv")[0]["loss"])
    for name in sorted(lab.stages_of(lab.read_experiment("noise"))[1]):
        lab.write_rows(lab.LAB / "done" / f"{name}.readers", lab.READERS, [dict(zip(lab.READERS, (name, 0, "a", "1")))])
    with contextlib.redirect_stdout(io.StringIO()):
        lab.collect()
    seeds = {row["stage"].split("-")[1] for row in lab.rows_of(lab.RESULTS / "readers.csv")}
    check(seeds == {"s1"}, "what experts read is kept of one seed", seeds)
    for path in (lab.LAB / "done").glob("*.readers"):
        path.unlink()
    (lab.LAB / "done" / f"{stage}.csv").unlink()
    lab.RESULTS = results
    check(kept == ["1", "1", "3"], "a row takes the place of one of the same canary alone", kept)


def test_in_turns():
    rates = iter([10, 20, 30, 10, 20, 5])           # shares .5, 3, 4; the median speeds' share would be 2
    check(lab.in_turns(lambda _: next(rates), "model", "source", 3) == (20, 3), "speed and share are medians of turns")
    check(lab.in_turns(lambda _: 7, "model", None, 3) == (7, 1), "a model without a source has a speed alone")
    specs = {"dense": {"train": []}, "grown": {"parent": "dense", "grow": []}, "on": {"parent": "grown", "train": []}}
    check([lab.grown_from(specs[n], specs) for n in ("on", "grown", "dense")] == ["dense", "dense", None],
          "what a model was grown from")


def test_report():
    """Made-up rows of all stages: what is judged of them, and that every page can be made."""
    results = report.Results()
    results.stages, results.curves = {}, {}
    effects = dict(continued16=0, copy=0.015, continued=0.03, random=0.015, grad2=0.0149)
    effects["copy-perturbed"] = 0.015
    names = sorted(p.stem for p in (lab.HERE / "experiments").glob("*.yaml") if p.stem not in report.SKIPPED)
    for name in names:
        e = report.Experiment(name, results)
        for (arm, seed), stage in sorted(e.ids.items()):
            rng = numpy.random.default_rng(zlib.crc32(f"{arm} {seed}".encode()))    # whatever else is run
            row = dict.fromkeys(["canary", "processor", "commit", "binary"], "x")
            row.update(stage=stage, loss=1.5 + effects.get(arm, 0.02) + seed / 50 + rng.normal(0, 0.001), jump=0.05,
                       tokens=2e6,
                       total_tokens=4e6, flops=4e12 if arm in ("fixed16", "continued16", "scratch-continued") else 2e12,
                       spec=json.dumps(e.specs[stage]), topk=2,
                       **{k: rng.uniform(0.1, 1)
                          for k in "gini max_vio dead train_gini train_max_vio twin_cosine overlap sources "
                          "reading loss_k1 loss_k2 loss_k3 loss_k4 loss_k6 loss_k8 speed_b1_share "
                          "speed_b8_share".split()})
            results.stages.setdefault(stage, row)
            results.curves.setdefault(stage,
                                      [dict(step=str(s), tokens=s * 1024, val_loss=3 - s / 1000) for s in (100, 200)])
    judged = {c["claim"]: (verdict, f) for c, f, verdict, _ in report.judged(report.Experiment("E1", results))}
    closure = judged["copies with noise on the router's new rows reach the larger model at equal tokens in all"]
    check(closure[0] == "partial" and abs(closure[1]["value"] - 0.5) < 0.1
          and 0.3 < closure[1]["low"] < closure[1]["value"] < closure[1]["high"] < 0.7,
          "half of the gap closed is partial", closure)
    check(judged["exact copies end better than their source continued"][0] == "yes"
          and judged["exact copies, more of experts with large gradients, beat four of each"][0]
          in ("same", "cannot tell"),
          "verdicts of made-up results",
          {k: v[0] for k, v in judged.items()})
    parts = list(report.blocks([report.Experiment(n, results) for n in names], results))
    text = report.to_markdown(parts)
    check("not run yet" not in text and "joint law" in text and "nan" not in text, "a report of all experiments",
          [line for line in text.splitlines() if "not run yet" in line or "nan" in line][:2])
    if report.draw:
        drawings = {k: v for n in names for k, v in report.figures(report.Experiment(n, results)).items()}
        page = report.to_html(parts, drawings)
        check(len(drawings) > len(names) and page.count("<svg") == len(drawings), "and a page with all figures",
              list(drawings))
    test_judging(results)
    some = report.Experiment("E1", results)
    results.stages[some.ids["copy", 1]]["canary"] = "another"
    check(len(some.together("copy", "continued")[1]) == 7, "pairs of two builds are left out")


def test_judging(results):
    """What a sceptic asks of the verdicts of made-up results."""
    def e1(seeds, losses, about=None, **more):
        """E1 with so many seeds run and these losses; a claim for each pair of arms in about, or on each of these arms
        and the first of them."""
        e = report.Experiment("E1", report.Results())
        e.results.stages = {k: dict(v) for k, v in results.stages.items()}
        for (arm, seed), stage in e.ids.items():
            if seed > seeds:
                e.results.stages.pop(stage, None)
            elif arm in losses:
                e.results.stages[stage]["loss"] = losses[arm][seed - 1]
        about = about or [[arm, "continued"] for arm in list(losses)[1:]]
        e.spec["claims"] = [dict(claim=a[0] if a is about[0] else " ".join(a), expected="x",
                                 measure=dict(difference=a), verdict={"yes": [-9, 0]}, **more) for a in about]
        return {c["claim"]: verdict for c, _, verdict, _ in report.judged(e)}

    flat, better = [1.5] * 8, [1.49, 1.4901, 1.488, 1.491, 1.49, 1.489, 1.49, 1.49]
    check([e1(n, dict(continued=flat, copy=better))["copy"] for n in (2, 3, 8)] == ["cannot tell", "so far yes", "yes"],
          "nothing is said of two pairs, and so far of three of eight")
    # three pairs with p = .04: enough for one claim, not for two
    near_enough = [1.5 - x for x in (.01, .0135, .0065)] + flat[3:]
    low, high = stats.mean_interval([-.01, -.0135, -.0065])[1:3]
    check(low < high < 0 and e1(3, dict(continued=flat, copy=near_enough))["copy"] == "so far yes" and
          e1(3, {"continued": flat, "copy": near_enough, "copy-perturbed": near_enough})["copy"] == "cannot tell",
          "one claim of two wants more than one alone", (low, high))
    check(e1(3, dict(continued=flat, copy=near_enough), about=[["copy", "continued"], ["copy", "random"]])["copy"] ==
          "cannot tell", "... also if the arm is the first of both")
    check(e1(3, dict(continued=flat, copy=near_enough), looks=2)["copy"] == "cannot tell",
          "and so does a claim that was looked at twice")
    # p between .0294 / 2 and .05 / 2: enough for two claims, not for two after two looks
    clear = [1.5 - x for x in (.01, .0122, .0078)] + flat[3:]
    two = {"continued": flat, "copy": clear, "copy-perturbed": clear}
    check(e1(3, two)["copy"] == "so far yes" and e1(3, two, looks=2)["copy"] == "cannot tell", "both add up")

    # a closure is one of its arm's claims: with two others that say nothing it wants 1 - .05 / 3
    e = report.Experiment("E1", report.Results())
    e.results.stages = {k: dict(v) for k, v in results.stages.items()}
    e.spec["claims"] = [c for c in e.spec["claims"] if c["measure"] == {"closure": "copy-perturbed"}] + [
        dict(claim=other, measure=dict(difference=["copy-perturbed", other]), verdict={"yes": [9, 99]})
        for other in ("random", "continued")]
    (_, f, _, why), *_ = report.judged(e)
    low, high = stats.closure(*(e.together(*e.ends("copy-perturbed"))[0][n] for n in (1, 2, 0)), 1 - .05 / 3)[1:]
    check(near([f["least"], f["most"]], [low, high]) and "3 claims about copy-perturbed" in why and f["low"] > low,
          "gap closure is corrected, too", why)

    # two unrelated arms: the pair's deviation is as large as that of two seeds
    e, rng = report.Experiment("noise", report.Results()), numpy.random.default_rng(3)
    e.seeds = list(range(2000))
    e.ids = {(arm, seed): f"{arm}{seed}" for arm in ("copy", "continued") for seed in e.seeds}
    e.results.stages = {stage: dict(canary="x", processor="x", loss=rng.normal()) for stage in e.ids.values()}
    columns, _ = e.together("copy", "continued")
    check(near([report.noise_ratio(*columns)], [1], 0.05), "without pairing the ratio of noise is 1")

    e = report.Experiment("E1", report.Results())
    e.results.stages, e.results.curves = {}, {}
    worse = dict(zip("1234", (1.4, 1.6, 1.4, 1.4)))     # level, worse again, level for good from step 3 on
    for arm, losses in (("copy", worse), ("continued", dict.fromkeys("1234", 1.5))):
        e.results.curves[e.ids[arm, 1]] = [dict(step=k, tokens=int(k) * 1e6, val_loss=v) for k, v in losses.items()]
        e.results.stages[e.ids[arm, 1]] = dict(loss=1.5, tokens=4e6, total_tokens=6e6)
    check(report.healed(e, "copy", "continued") == "3.00M", "level for good, not for a moment",
          report.healed(e, "copy", "continued"))
    # trained in two steps, the second begun 2M later: its first point is the other's third
    e.results.curves[e.ids["copy", 1]] = [dict(step=1, tokens=1e6, val_loss=1.4)]
    e.results.stages[e.ids["copy", 1]].update(tokens=2e6)
    check(report.healed(e, "copy", "continued") == "3.00M" and
          report.curve_series(e, "copy", "continued") == {5e6: [1.4 - 1.5]}, "curves meet at equal tokens in all")
    heads, rows = report.arm_table(report.Experiment("E1", results))
    told = {row[0]: dict(zip(heads, row))["minus the source continued"] for row in rows}
    check(told["exact copies"] and not told["sigmoid-copy"] and not told["continued16"],
          "arms of another source are not compared with this one continued", told)
    e = report.Experiment("E1", report.Results())
    e.results.stages = {k: dict(v) for k, v in results.stages.items()}
    for seed in e.seeds:
        e.results.stages[e.ids["family", seed]]["total_tokens"] = 3e6
    heads, rows = report.arm_table(e)
    told = {row[0]: dict(zip(heads, row))["minus the source continued"] for row in rows}
    check(told["random"] and not told["family"], "nor are arms after other numbers of tokens", told)
    check(report.ranges({"yes": [-9, -.002], "same": [-.002, .002], "no": [[-9, -1], [.002, 9]]}) ==
          "yes: below -.002; same: -.002 to .002; no: below -1 or above .002", "ranges in words")
    broken = subprocess.run([sys.executable, "-c", "import report; report.Experiment('E1', report.Results())"
                             ".values('copyx')"], cwd=lab.HERE, capture_output=True, text=True)
    check(broken.returncode == 2 and "'copyx' is no arm" in broken.stderr, "refused: an arm that is not there",
          broken.stderr)
    cut = subprocess.run(f"{sys.executable} lab.py list | head -n 1", shell=True, cwd=lab.HERE, capture_output=True,
                         text=True)
    check(not cut.stderr and len(cut.stdout.splitlines()) == 1, "list | head", cut.stderr)


def test_going_on():
    """A stage that is stopped goes on, and ends with the row of one that never was."""
    name = lab.stages_of(lab.read_experiment("tiny"))[0]["fixed8", 1]
    lab.plan(["tiny"])
    command = [sys.executable, lab.HERE / "lab.py", "stage", name]
    child = subprocess.Popen(command, stderr=subprocess.PIPE)
    out = lab.LAB / "run" / name
    for _ in range(3000):
        steps = len((out / "log.csv").read_text().splitlines()) if (out / "log.csv").is_file() else 0
        if steps > 5 or child.poll() is not None:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    code, done = child.wait(), lab.LAB / "done" / f"{name}.csv"
    check(code == 143 and not done.is_file(), "a stopped stage has no row", f"exit {code}")
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    first = lab.rows_of(done)[0]
    done.unlink()
    subprocess.run(["rm", "-r", out], check=True)
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    second = lab.rows_of(done)[0]
    differ = [k for k in first if first[k] != second[k] and k not in ("seconds", "load")]
    check(not differ, "stopped and gone on with: the same row", differ)
    words = [lab.relative(lab.LAB / "run/a"), lab.relative(lab.ROOT / "data/text/b.txt"), lab.relative("--steps")]
    check(words == ["run/a", "data/text/b.txt", "--steps"], "commands in rows begin at the folder or the project",
          words)
    committed = [r["command"] for r in lab.rows_of(lab.HERE / "results/stages.csv")]
    check(not [c for c in [second["command"], *committed] if " /" in c], "and no row names a folder of its machine")
    check(json.loads(second["spec"])["seed"] == 1 and second["stage"] == name and float(second["loss"]) > 0,
          "a row says what it is")
    # stem, its growth, and the branch that goes on with it: from step 20 to 40, with the stem's seed and moments
    ids = lab.stages_of(lab.read_experiment("tiny"))[0]
    for arm in ("stem", "carried@grow", "carried"):
        subprocess.run([*command[:-1], ids[arm, 1]], check=True, stderr=subprocess.PIPE)
    row, points = (lab.rows_of(lab.LAB / "done" / f"{ids['carried', 1]}{end}")[-1] for end in (".csv", ".curve"))
    log = lab.rows_of(lab.LAB / "run" / ids["carried", 1] / "log.csv")
    check([row["tokens"], row["total_tokens"], points["step"], points["tokens"]] == ["5120", "10240", "40", "5120"] and
          row["experts"] == "8" and log[-1]["step"] == "40", "a run goes on in a grown model", (row["tokens"], points))
    frozen = json.loads((lab.LAB / "bin/frozen.json").read_text())
    (lab.LAB / "bin/frozen.json").write_text(json.dumps({**frozen, "processor": "another"}))
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    check(lab.rows_of(done)[0]["processor"] == lab.processor(), "gone on with: another processor, the same bytes")
    (lab.LAB / "bin/frozen.json").write_text(json.dumps({**frozen, "processor": "another", "canary": "another"}))
    told = subprocess.run(command, capture_output=True, text=True)
    check(told.returncode == 2 and "its programs compute other bytes" in told.stderr,
          "refused: a processor on which the programs compute other bytes", told.stderr)
    (lab.LAB / "bin/frozen.json").write_text(json.dumps({**frozen, "canary": "another"}))
    told = subprocess.run([sys.executable, lab.HERE / "lab.py", "freeze"], capture_output=True, text=True)
    check(told.returncode == 2 and "other bytes" in told.stderr, "refused: programs that compute other bytes",
          told.stderr)


if __name__ == "__main__":
    with FOLDER:
        test_stats()
        test_experiments()
        test_routing()
        test_collect()
        test_in_turns()
        test_report()
        test_going_on()
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)
