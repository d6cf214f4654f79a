"""The loss over the vocabulary, forward and backward: time, memory and error of nanoredi's kernels and of peers.

    python bench/kernels.py                     this machine's sizes: a GPU's or a CPU's
    python bench/kernels.py --chunks            how nanoredi's time and memory depend on the size of a chunk
    python bench/kernels.py --n 512 --rounds 1  smaller, for a dry run

Each method runs in a fresh process, all of them once a round; a time is the median over the rounds; compare times
within a table only. Memory is the peak above the inputs: of the process on a CPU, of the tensors on a GPU. The errors
are those of the gradients, |got - want| / |want|, against float64 on a sample of the rows of hidden and of lm_head.
Methods without token weights take the mean over tokens. A peer that is not installed is skipped with a message.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanoredi.kernels import linear_logprob, weighted_cross_entropy  # noqa: E402
from nanoredi.kernels import logits as head  # noqa: E402
from nanoredi.kernels.layers import add_product, product, put_product  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Tokens, hidden size, vocabulary, dtype: a pair of the paper's longest traces, then one of its mean length; and a model
# of 135M parameters on a CPU.
SIZES = (
    [(39_600, 1536, 151_936, "bfloat16"), (8_192, 1536, 151_936, "bfloat16")]
    if DEVICE.type == "cuda"
    else [(4_096, 576, 49_152, "float32")]
)
SAMPLE = 128  # rows of each gradient that are compared with float64


class Case:
    """Inputs like a model's: logits with a standard deviation of 3, half of the tokens chosen, half rejected."""

    def __init__(self, n: int, d: int, v: int, dtype: str):
        kind = getattr(torch, dtype)
        generator = torch.Generator(DEVICE).manual_seed(0)
        normal = {"generator": generator, "device": DEVICE, "dtype": kind}
        self.hidden = torch.randn(n, d, **normal).requires_grad_()
        self.lm_head = torch.randn(v, d, **normal).mul_(3 / d**0.5).requires_grad_()
        self.targets = torch.randint(v, (n,), generator=generator, device=DEVICE)
        self.weights = torch.full((n,), -1 / n, device=DEVICE)
        self.weights[n // 2 :] = 0.8 / n
        self.rows = torch.arange(n, device=DEVICE)
        self.uniform = torch.full((n,), -1 / n, device=DEVICE)


Method = Callable[[Case], Tensor]  # the loss


def nanoredi(case: Case) -> Tensor:
    return weighted_cross_entropy(case.hidden, case.lm_head, case.targets, case.weights, case.rows)[0]


def nanoredi_logprob(case: Case) -> Tensor:
    return (linear_logprob(case.hidden, case.lm_head, case.targets, case.rows) * case.weights).sum()


def naive(case: Case) -> Tensor:
    logps = (case.hidden @ case.lm_head.T).float().log_softmax(-1).gather(1, case.targets[:, None]).squeeze(1)
    return (logps * case.weights).sum()


def compiled(case: Case) -> Tensor:
    return torch.compile(naive)(case)


def torch_plain(case: Case) -> Tensor:
    return F.linear_cross_entropy(case.hidden, case.lm_head, case.targets)


def torch_chunked(case: Case) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(case.hidden, case.lm_head, case.targets, options=options)


def liger(case: Case) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(case.lm_head, case.hidden, case.targets)


def cut_cross_entropy(case: Case) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(case.hidden, case.lm_head, case.targets)


METHODS: dict[str, Method] = {
    "nanoredi weighted_cross_entropy": nanoredi,
    "nanoredi linear_logprob": nanoredi_logprob,
    "log_softmax over full logits": naive,
    "the same, torch.compile": compiled,
    "torch linear_cross_entropy": torch_plain,
    "torch linear_cross_entropy, chunked": torch_chunked,
    "Liger fused linear cross-entropy": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
WEIGHTED = {nanoredi, nanoredi_logprob, naive, compiled}
GPU_ONLY = {liger, cut_cross_entropy}


def products(size: tuple[int, int, int, str], times: int) -> dict[int, float]:
    """Seconds of the matrix products alone, in chunks as nanoredi computes them: 3 are those of the logits and of both
    gradients, 4 include the logits' recomputation for the log-probs' backward."""
    case = Case(*size)
    hidden, lm_head = case.hidden.detach(), case.lm_head.detach()

    def multiply(number: int) -> None:
        grad_head = torch.zeros_like(lm_head, dtype=torch.float32)
        for _, x, logits in head.logits_by_chunks(hidden, lm_head, case.rows):
            for _ in range(number - 3):
                put_product(logits, x, lm_head.T)
            product(logits, lm_head)
            add_product(grad_head, logits.T, x)

    return {number: statistics.median(timed(partial(multiply, number), times + 1)[1:]) for number in (3, 4)}


def large_product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of several."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, 10))


def timed(work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each of several runs."""
    seconds = []
    for _ in range(times):
        if DEVICE.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
    return seconds


def float64_gradients(case: Case, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sampled rows of hidden and of lm_head (2, SAMPLE), and their gradients in float64, (SAMPLE, D) each."""
    h, m = case.hidden.detach(), case.lm_head.detach()
    n, v = len(h), len(m)
    at_hidden = torch.linspace(0, n - 1, min(n, SAMPLE), device=DEVICE).long()
    at_head = torch.cat((case.targets[: SAMPLE // 2], torch.arange(v - SAMPLE // 2, v, device=DEVICE)))
    few = m[at_head].double()
    lse = torch.cat([(part.double() @ m.double().T).logsumexp(1) for part in h.split(512)])
    z = h[at_hidden].double() @ m.double().T
    g = -weights[at_hidden, None].double() * (z - lse[at_hidden, None]).exp()
    g[torch.arange(len(g)), case.targets[at_hidden]] += weights[at_hidden].double()
    want_hidden = g @ m.double()
    g = weights[:, None].double() * (
        (case.targets[:, None] == at_head).double() - (h.double() @ few.T - lse[:, None]).exp()
    )
    return torch.stack((at_hidden, at_head)), want_hidden, g.T @ h.double()


def measure(name: str, size: tuple[int, int, int, str], times: int, with_error: bool) -> dict:
    """Measure a method in this process."""
    case, method = Case(*size), METHODS[name]

    def step() -> None:
        case.hidden.grad = case.lm_head.grad = None
        method(case).backward()

    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        method(Case(16, 16, 64, size[3])).backward()  # so that the libraries are loaded and have reserved their memory
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the first run may have compiled and tuned
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"bytes": peak - before, "seconds": timed(step, times)}
    if with_error:
        at, want_hidden, want_head = float64_gradients(case, case.weights if method in WEIGHTED else case.uniform)
        result["error_hidden"] = relative(case.hidden.grad[at[0]], want_hidden)
        result["error_head"] = relative(case.lm_head.grad[at[1]], want_head)
    return result


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def in_fresh_process(*words: str) -> dict | str:
    """What `bench/kernels.py *words` prints as JSON, or the line that says why it failed."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["killed"]
    return lines[-1].strip()[:90]


def table(size: tuple[int, int, int, str], rounds: int, times: int) -> Iterator[str]:
    """The table of one size, in Markdown."""
    n, d, v, dtype = size
    rate = large_product_rate(getattr(torch, dtype))
    floors = products(size, times)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()  # so that the measured processes can use the memory
    yield f"N = {n:,}, D = {d:,}, V = {v:,}, {dtype}; one large product runs at {rate / 1e12:.3g} Tflop/s:"
    for number in (3, 4):
        floor = 2 * number * n * d * v / rate
        yield f"{number} products at that rate {floor:.4g} s, in chunks as nanoredi computes them {floors[number]:.4g} s."
    yield ""
    columns = "method", "s", "of log_softmax's", "of 3 products", "GB over inputs", "error hidden", "error lm_head"
    yield f"| {' | '.join(columns)} |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    names = [name for name, method in METHODS.items() if DEVICE.type == "cuda" or method not in GPU_ONLY]
    results: dict[str, list[dict]] = {name: [] for name in names}
    failures = {}
    for turn in range(rounds):
        for name in names:
            if name not in failures:
                result = in_fresh_process(
                    "--one", name, "--size", *map(str, size), "--times", str(times), "--turn", str(turn)
                )
                if isinstance(result, str):
                    failures[name] = result
                else:
                    results[name].append(result)
    seconds = {name: statistics.median(s for r in rs for s in r["seconds"]) for name, rs in results.items() if rs}
    peer = seconds.get("log_softmax over full logits")
    for name in names:
        if name in failures:
            yield f"| {name} | {failures[name]} | | | | | |"
            continue
        first, s = results[name][0], seconds[name]
        memory = statistics.median(r["bytes"] for r in results[name]) / 1e9
        ratio = f"{s / peer:.2f}" if peer else ""
        yield (
            f"| {name} | {s:.4g} | {ratio} | {s / (6 * n * d * v / rate):.2f} | {memory:.3f} | "
            f"{first['error_hidden']:.1e} | {first['error_head']:.1e} |"
        )


def chunk_table(size: tuple[int, int, int, str], times: int) -> Iterator[str]:
    """nanoredi's time and memory for several sizes of a chunk."""
    n, _, v, _ = size
    yield "| tokens a chunk | million logits | seconds | GB over the inputs |"
    yield "| --- | --- | --- | --- |"
    for elements in [1 << 22, 1 << 23, 1 << 24, 1 << 25, 1 << 26, 3 << 25, 1 << 27, 3 << 26, 1 << 28, 1 << 29]:
        if elements // v < 16 or elements // v > 2 * n:
            continue
        words = ("--one", "nanoredi weighted_cross_entropy", "--size", *map(str, size), "--times", str(times))
        result = in_fresh_process(*words, "--turn", "1", "--elements", str(elements))
        if isinstance(result, str):
            yield f"| {elements // v} | {elements / 1e6:.0f} | {result} | |"
        else:
            seconds = statistics.median(result["seconds"])
            yield f"| {elements // v} | {elements / 1e6:.0f} | {seconds:.4g} | {result['bytes'] / 1e9:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, help="tokens")
    parser.add_argument("--d", type=int, help="hidden size")
    parser.add_argument("--v", type=int, help="vocabulary")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each method [3]")
    parser.add_argument(
        "--times", type=int, default=20 if DEVICE.type == "cuda" else 2, help="timed runs in each process"
    )
    parser.add_argument("--chunks", action="store_true", help="vary the size of a chunk instead")
    for hidden in ("--one", "--turn", "--elements"):  # for the fresh processes
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--size", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        if flags.elements:
            head.MAX_CPU_ELEMENTS = head.MAX_GPU_ELEMENTS = int(flags.elements)
        n, d, v = map(int, flags.size[:3])
        print(json.dumps(measure(flags.one, (n, d, v, flags.size[3]), flags.times, flags.turn == "0")))
        return
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; torch {torch.__version__}", flush=True)
    for n, d, v, dtype in SIZES:
        size = flags.n or n, flags.d or d, flags.v or v, dtype
        for line in chunk_table(size, flags.times) if flags.chunks else table(size, flags.rounds, flags.times):
            print(line, flush=True)


if __name__ == "__main__":
    main()
