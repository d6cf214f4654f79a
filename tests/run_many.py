"""Runs scripts one after the other in one process, which spares each the seconds that torch takes to import.

Reads from stdin a JSON list of [folder to run in, script, flags]; writes one of [exit code, stdout, stderr].
"""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(folder: str, script: str, flags: list[str]) -> tuple[int, str, str]:
    os.chdir(folder)
    sys.argv = [script, *flags]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


print(json.dumps([run(*job) for job in json.load(sys.stdin)]))
