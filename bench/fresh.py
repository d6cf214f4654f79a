"""Measure a method in a fresh process, so that it inherits neither memory nor warm caches from another one."""

import json
import subprocess
import sys


def figures(script: str, words: list[str], name: str, profiled: bool) -> dict | None:
    """The last line, parsed as JSON, that a script prints when it is run with these words; None when it fails, after
    its last line of stderr was printed.

    Args:
        name: of the method, for that message.
        profiled: print its stderr in any case.
    """
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if profiled:
        print(done.stderr)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}", file=sys.stderr)
    return None
