#!/usr/bin/env python3
"""A PyTorch that ends during a measurement is one line of peers.py, without PyTorch: a script plays the worker.

    python3 dev/bench/test_peers.py
"""
import contextlib
import io
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import peers       # noqa: E402

WORKERS = {                     # what it does after it has said that it is ready; what peers.py then says
    "read seconds; echo 0.5; read seconds": "PyTorch ended during a measurement",
    "exec <&-; sleep 1": "PyTorch ended during a measurement",      # and the question cannot even be written
    "while read seconds; do echo 0.5; done": "",
}


def said(worker):
    """peers.py's table, and what it ends with."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        script = pathlib.Path(folder, "python")
        script.write_text(f"#!/bin/sh\necho ready\n{worker}\n")
        script.chmod(0o755)
        peers.ours = lambda *_: time.sleep(.2) or [2048.0]      # until the worker is where it is to be
        sys.argv, sys.executable = ["peers.py", "--configs", "default", "--ways", "eager"], str(script)
        try:
            return peers.main() or "", out.getvalue()
        except SystemExit as e:
            return str(e), out.getvalue()


def main():
    failed = 0
    for worker, wanted in WORKERS.items():
        error, table = said(worker)
        ok = wanted in error and "\n" not in error and (error or table.split()[-3:-1] == ["2048", "2048"])
        failed += not ok
        print("ok    " if ok else "FAILED", worker, "" if ok else (error, table))
    print(f"{len(WORKERS) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
