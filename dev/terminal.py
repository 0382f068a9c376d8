"""What the programs leave on a terminal of 80 and of 40 columns, by the emulator pyte (pip install pyte): 120 steps of
training, --eval, upcycle with calibration and check, and dev/story.sh. Run it where `make` has run; about a minute.
"""
import fcntl
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte

os.chdir(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
failed = passed = 0


def check(what, ok, lines):
    global failed, passed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("ok    " if ok else "FAILED", what)
    if not ok:
        print("\n".join("       |" + line for line in lines))


def screen_of(columns, *command):
    """The exit code and the lines that are left; every one of at most `columns` - 1 characters did not wrap."""
    screen = pyte.HistoryScreen(columns, 300)
    stream = pyte.ByteStream(screen)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 300, columns, 0, 0))
    process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=slave, stderr=slave)
    os.close(slave)
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        if not data:
            break
        stream.feed(data)
    return process.wait(), [line.rstrip() for line in screen.display if line.strip()]


with tempfile.TemporaryDirectory() as d:
    d = Path(d)
    (d / "text.txt").write_text("the router sends each token to two of the experts, and the layer adds them up\n" * 500)
    small = ["--data", d / "text.txt", "--val", "none", "--layers", 2, "--hidden", 32, "--seq", 32, "--batch", 2]
    for columns in 80, 40:
        code, lines = screen_of(columns, "./train_moe", *small, "--steps", 120, "--out", d / f"a{columns}")
        steps = [line for line in lines if line.startswith("step ")]
        check(f"120 steps at {columns} columns leave one progress line: {steps}",
              code == 0 and len(steps) == 1 and steps[0].startswith("step 120/120 | loss ")
              and steps[0].endswith("left") and len(steps[0]) < columns, lines)
        code, lines = screen_of(columns, "./train_moe", "--model", d / f"a{columns}", "--data", d / "text.txt", "--eval")
        check(f"--eval at {columns} columns leaves none", code == 0 and not any("window 0" in line for line in lines),
              lines)
        code, lines = screen_of(columns, "./upcycle", d / f"a{columns}", d / f"b{columns}", "--experts", 16, "--select",
                                "grad2", "--calibrate", d / "text.txt", "--check", d / "text.txt")
        check(f"upcycle at {columns} columns leaves none", code == 0 and
              not any(line.startswith(("calibration", "check: ")) or "MB/s" in line for line in lines), lines)
    for command in ["./train_moe", "--help"], ["./upcycle", "--help"], ["./upcycle"]:
        code, lines = screen_of(80, *command)
        wide = screen_of(300, *command)[1]
        check(f"{' '.join(command)} fits 80 columns", lines == wide, lines)
    Path("out/story").mkdir(parents=True, exist_ok=True)
    Path("out/story/kept").touch()
    for wrong in [d / "none"], [d / "text.txt", "abc"], [d / "text.txt", 9, 0]:
        code, lines = screen_of(80, "dev/story.sh", *wrong)
        check(f"dev/story.sh {' '.join(map(str, wrong[1:]))}: one line, and the last story stays",
              code == 2 and len(lines) == 1 and Path("out/story/kept").exists(), lines)
    code, lines = screen_of(80, "dev/story.sh", d / "text.txt", 9, 3)
    steps = [line for line in lines if line.startswith("step ")]
    told = [line for line in lines if line.endswith(" left in all)")]
    check("dev/story.sh: a line for each of 7 runs, what it is and how long all takes, a table of 6 rows",
          code == 0 and len(steps) == 7 and len(told) == 8 and len([line for line in lines if " experts" in line
          and line[-1].isdigit()]) == 5 and max(map(len, steps)) < 80, lines)
    print("\n".join("       |" + line for line in lines))
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
