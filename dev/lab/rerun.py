#!/usr/bin/env python3
"""Repeats one row of dev/lab/results/stages.csv with the programs that are there now, and all that it comes from.

    python3 dev/lab/rerun.py STAGE|EXPERIMENT/ARM/SEED      in out/lab-rerun, which goes when all is well

Exact where the programs have the row's canary: every loss has the same digits. Elsewhere sums
are taken in another order, which training magnifies: losses are within TOLERANCE. (Two seeds of one arm differ by
.02.)
"""
import json
import os
import shutil
import sys

import lab

TOLERANCE = 0.03


def chain(rows, name):
    """The specs of a row's stage and of all that it comes from, that first."""
    spec = json.loads(rows[name]["spec"])
    return {**(chain(rows, spec["parent"]) if "parent" in spec else {}), name: spec}


def main():
    if len(sys.argv) != 2:
        lab.fail("rerun.py STAGE|EXPERIMENT/ARM/SEED: a row of dev/lab/results/stages.csv")
    rows, name = {r["stage"]: r for r in lab.rows_of(lab.RESULTS / "stages.csv")}, sys.argv[1]
    if name.count("/") == 2:
        experiment, arm, seed = name.split("/")
        name = lab.stages_of(lab.read_experiment(experiment))[0].get((arm, int(seed) if seed.isdigit() else seed), name)
    if name not in rows:
        lab.fail(f"{name}: no such row in dev/lab/results/stages.csv")
    specs = chain(rows, name)
    if "LAB" not in os.environ:
        lab.LAB = lab.ROOT / "out/lab-rerun"
    lab.LAB.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(lab.LAB / "bin", ignore_errors=True)
    now = lab.freeze(True)
    (lab.LAB / "plan").mkdir(exist_ok=True)
    for each, spec in specs.items():
        if lab.digest(spec) != each.rsplit("-", 1)[1]:
            lab.fail(f"{each}: its spec is not what its name was made of")
        data = lab.sha(lab.text_file(f"{spec['text']}-train.txt"))
        if data != rows[each]["data"]:
            lab.fail(f"{spec['text']}-train.txt is {data}, the row was made from {rows[each]['data']}: packages "
                     "change, see data/README.md")
        (lab.LAB / "plan" / f"{each}.json").write_text(json.dumps(spec))
    for each in specs:
        lab.stage(each)
    was, new = rows[name], lab.rows_of(lab.LAB / "done" / f"{name}.csv")[0]
    exact = was["canary"] == now["canary"]
    wrong = 0
    for key in (k for k in new if k.startswith("loss")):
        difference = abs(float(new[key]) - float(was[key]))
        good = new[key] == was[key] if exact else difference <= TOLERANCE
        wrong += not good
        print(f"{'ok    ' if good else 'FAILED'} {key}: was {was[key]}, now {new[key]}")
    print("the same canary: digit by digit" if exact else f"another canary: within {TOLERANCE}")
    if not wrong and "LAB" not in os.environ:
        shutil.rmtree(lab.LAB)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
