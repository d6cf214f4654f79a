"""One method's figures from a process of its own, so that none inherits another's memory or warmth."""

import json
import subprocess
import sys


def figures(script: str, words: list[str], name: str, profiled: bool) -> dict | None:
    """What a script prints last, as JSON, when it is run on words; None when it failed, with its last words shown.

    Args:
        name: what to call it then.
        profiled: show what it says on stderr in any case.
    """
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if profiled:
        print(done.stderr)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}", file=sys.stderr)
    return None
