"""What watches over an unattended run: steps that are not finite, REDI's collapse, and signals."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanoredi.common.errors import Stopped, UserError
from nanoredi.common.files import check
from nanoredi.common.runs import saved_steps
from nanoredi.config import StageConfig
from nanoredi.trainer.distributed import World
from nanoredi.trainer.log import Step

# The shape of state(), for files.check.
_COUNT = range(2**31)
_COLLAPSE: dict[str, Any] = dict.fromkeys(("start", "mean", "update", "update_mean"), float)
_COLLAPSE |= {"falls": [float], "last_good": _COUNT, "tripped": (_COUNT, None)}


class Guards:
    """Watches the run's steps. Every rank has one and is shown the same steps."""

    def __init__(self, config: StageConfig, world: World):
        self.config, self.world = config, world
        self.skipped = self.in_a_row = 0
        self.collapse = CollapseWatch(getattr(config, "collapse_nats", math.inf))

    def observe(self, steps: list[tuple[Step, dict[str, Any]]]) -> None:
        """Watch steps, given with their rows of metrics.jsonl.

        Raises:
            UserError: when max_bad_steps in a row were skipped; when the log-probs collapse and on_collapse is stop.
        """
        for step, row in steps:
            self.in_a_row = self.in_a_row + 1 if row.get("skipped") else 0
            if self.in_a_row:
                self._report_skip(step)
            elif self.collapse.observe(step.number, row["chosen_logp"], row["update_norm"]):
                self._report_collapse(step.number)

    def state(self) -> dict[str, Any]:
        """What a resume needs."""
        collapse = {name: getattr(self.collapse, name) for name in _COLLAPSE}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "collapse": collapse}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what state() returned, as it was read back from the disk; a UserError where its shape is wrong."""
        shape = {"in_a_row": _COUNT, "collapse": _COLLAPSE, "began_with": {str: str}}
        shape["skipped"] = range(state["step"] + 1)
        check(f"the training state of step {state['step']}", state, shape)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        vars(self.collapse).update({name: state["collapse"][name] for name in _COLLAPSE})
        del self.collapse.falls[state["step"] - self.skipped :]  # earlier versions saved later steps' falls, too

    def _report_skip(self, step: Step) -> None:
        self.skipped += 1
        numbers = ", ".join(str(row + 1) for row in sorted(step.rows.tolist()))
        self.world.say(
            f"warning: step {step.number} was skipped, its loss or gradient is not finite (skipped so far: "
            f"{self.skipped}); it had rows {numbers} of those kept of {self.config.data}"
        )
        if self.in_a_row >= self.config.max_bad_steps:
            raise UserError(
                f"{self.in_a_row} steps in a row, the last of them {step.number}, had a loss or gradient that is not "
                "finite: lower --lr, or look at the rows named above"
            )

    def _report_collapse(self, number: int) -> None:
        good = [path for step, path in saved_steps(Path(self.config.out)).items() if step <= self.collapse.last_good]
        text = (
            f"COLLAPSE at step {number}: the chosen log-prob has fallen by more than {self.config.collapse_nats:g} and "
            f"falls ever faster. Until step {self.collapse.last_good} all was well; the last model saved by then is "
            f"{good[-1] if good else self.config.model}. Lower --lr{' or --alpha' if self.config.alpha else ''}"
        )
        if self.config.on_collapse == "stop":
            raise UserError(text)
        self.world.say(f"\n{'!' * 79}\n{text}; --on_collapse stop stops there\n{'!' * 79}\n")


class CollapseWatch:
    """REDI's own failure: chosen and rejected log-probs plunge together with the accuracy, at large updates (arXiv
    2505.24850, the figure of training dynamics). A slow fall of both is healthy.

    The watch follows how far a running mean of the chosen log-prob has fallen below its start, and a running mean of
    the update norm. It trips when all of these hold:

        the fall is larger than `nats`;
        it accelerates: the last third of the run so far brought more of it than the third before;
        the update norm is above its mean so far: the decaying learning rate has not tamed it.

    experiments/collapse.py measures how well it does on the toy's runs, on which it was tuned.

    Attributes:
        falls: the fall after every step.
        last_good: the last step with a fall of less than half of `nats`.
        tripped: the step it tripped at, or None.
    """

    SHARE, START = 1 / 3, 4  # a new step's share of the running means; steps whose mean is the start

    def __init__(self, nats: float):
        self.nats = nats
        self.falls: list[float] = []
        self.start = self.mean = self.update = self.update_mean = 0.0
        self.last_good = 0
        self.tripped: int | None = None

    def observe(self, step: int, chosen: float, update: float) -> bool:
        """Follow a step; True at the one that trips the watch, once in a run."""
        n = len(self.falls) + 1
        if n <= self.START:
            self.start += (chosen - self.start) / n
            self.mean = self.start
        else:
            self.mean += self.SHARE * (chosen - self.mean)
        self.update += (self.SHARE if n > 1 else 1.0) * (update - self.update)
        fall = self.start - self.mean
        self.falls.append(fall)
        self.update_mean += (update - self.update_mean) / n
        if fall < self.nats / 2:
            self.last_good = step
        third, two_thirds = self.falls[n // 3], self.falls[2 * n // 3]
        accelerates = fall - two_thirds > max(two_thirds - third, 0.0)
        trips = self.tripped is None and fall > self.nats and accelerates and self.update > self.update_mean
        if trips:
            self.tripped = step
        return trips


@contextlib.contextmanager
def signals(status: Callable[[], str], world: World) -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM, SIGHUP (a closed ssh) and Ctrl-C ask the run to stop, unless they are ignored, as under nohup.
    After a Ctrl-C the next one, or SIGTERM, ends the process at once. SIGUSR1 prints the status.

    Yields:
        A function that says, alike on every rank, whether any rank was asked to stop.
    """
    asked: list[int] = []  # the signals to stop so far

    def say(text: str) -> None:
        if world.rank == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"{text}\n".encode())  # print may be in the middle of a line

    def stop(number: int, _: object) -> None:
        asked.append(number)
        if number == signal.SIGINT:
            say("\nstopping when this step is saved; Ctrl-C again ends at once")
            # A launcher that got the same Ctrl-C has half a second to pass it on, as SIGINT or as SIGTERM.
            for seconds, then in ((0.5, signal.SIG_IGN), (0.0, signal.SIG_DFL)):
                signal.signal(signal.SIGINT, then)
                signal.signal(signal.SIGTERM, then)
                time.sleep(seconds)

    heard = [n for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    signal.signal(signal.SIGUSR1, lambda *_: say(status()))
    try:
        yield lambda: world.any(bool(asked))
    except Stopped as stopped:
        stopped.code = 130 if signal.SIGINT in asked else 0
        raise
    finally:
        # A later SIGUSR1 must not end an evaluation; with its handler the log, and its process group, would stay alive.
        for number, handler in (*before.items(), (signal.SIGUSR1, signal.SIG_IGN)):
            signal.signal(number, handler)
