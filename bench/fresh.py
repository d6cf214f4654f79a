"""Measure a method in a fresh process, so that it inherits neither memory nor warm caches from another one."""

import json
import subprocess
import sys


def figures(script: str, words: list[str], name: str, profiled: bool) -> dict | None:
    """Run a script with these arguments. Returns the last line that it prints, parsed as JSON; None if it fails, once
    the last line of its stderr has been printed.

    Args:
        name: of the method, for that message.
        profiled: print all of its stderr as well.
    """
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if profiled:
        print(done.stderr)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}", file=sys.stderr)
    return None
