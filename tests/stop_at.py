"""Runs train_redi.py, and sends it SIGTERM once the metrics of a step are written.

python tests/stop_at.py STEP FLAG ...
"""

import os
import signal
import sys

import train_redi
from nanoredi.common.errors import run_script
from nanoredi.trainer.guards import Guards

observe = Guards.observe


def observe_and_stop(self, steps):
    observe(self, steps)
    if any(step.number == int(sys.argv[1]) for step, _ in steps):
        os.kill(os.getpid(), signal.SIGTERM)


Guards.observe = observe_and_stop
run_script(lambda argv: train_redi.main(argv[1:]))
