"""An optimiser step does not depend on how it is divided into micro-batches and ranks, and equals float64 autograd over
full logits, for every objective."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kept import KeepingAdamW
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy

from nanoredi import objectives
from nanoredi.common.errors import UserError
from nanoredi.config import SftConfig
from nanoredi.data.batch import step_rows
from nanoredi.data.sequences import load_pairs, load_sft
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.kernels import logits
from nanoredi.kernels.dispatch import after_step
from nanoredi.model.qwen2 import Block, Qwen2
from nanoredi.trainer import distributed, loop
from nanoredi.trainer.distributed import local, shard
from nanoredi.trainer.loop import train
from nanoredi.trainer.step import train_step


@pytest.fixture
def sft(redi, toy_data):
    shared = {k: v for k, v in vars(redi).items() if k in SftConfig.__dataclass_fields__}
    return SftConfig(**{**shared, "data": str(toy_data / "sft.jsonl")})


@pytest.fixture
def dpo(redi):
    return replace(redi, objective="dpo", alpha=None, chosen_weight=None, neg_weight_gamma=None, beta=0.05)


@pytest.fixture
def simpo(redi):
    return replace(redi, objective="simpo", alpha=None, chosen_weight=None, neg_weight_gamma=None, beta=2.0, gamma=1.0)


@pytest.fixture
def weighted(redi):
    return replace(redi, neg_weight_gamma=0.2)


@pytest.fixture
def negatives(redi):
    return replace(redi, chosen_weight=0.0)


@pytest.fixture
def half(redi):
    return replace(redi, chosen_weight=0.5, neg_weight_gamma=0.2)


@pytest.fixture
def signed(sft, toy_data, tmp_path):
    """Stage 1 on rows with weights of their own."""
    rows = [json.loads(line) for line in (toy_data / "sft.jsonl").read_text().splitlines()][:40]
    for i, row in enumerate(rows):
        row["weight"] = (1, -0.5, 0.25, None)[i % 4]
    (tmp_path / "signed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(sft, data=str(tmp_path / "signed.jsonl"))


@pytest.fixture
def row_weights(half, toy_data, tmp_path):
    """Stage 2 on pairs whose correct traces count differently."""
    rows = [json.loads(line) for line in (toy_data / "pairs.jsonl").read_text().splitlines()][:40]
    for i, row in enumerate(rows):
        row["chosen_weight"] = (1, 0.5, 0)[i % 3]
    (tmp_path / "weights.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(half, data=str(tmp_path / "weights.jsonl"))


EVERY = pytest.mark.parametrize(
    "stage", ["sft", "redi", "dpo", "simpo", "weighted", "negatives", "half", "signed", "row_weights"]
)


def reference_of(config, data):
    """Another model's log-probs of all pairs, (rows, 2) fp32: 3 nats a token, and some noise."""
    lengths = np.array([[s.num_learned for s in data.row(i)] for i in range(len(data))], dtype=np.float32)
    return -3 * lengths - np.random.default_rng(5).uniform(0, 20, lengths.shape).astype(np.float32)


def load(config):
    tokenizer = Tokenizer(config.model)
    if isinstance(config, SftConfig):
        return load_sft(config.data, tokenizer, config.max_tokens, config.cache)
    return load_pairs(config.data, tokenizer, config.max_prompt_tokens, config.max_response_tokens, config.cache)


def one_step(config, world):
    """The figures of one optimiser step, the gradients it took (they are dropped by the step, so kept here), and the
    model."""
    model = shard(Qwen2.from_pretrained(config.model, dtype=torch.float32), world, torch.float32, config)
    data = load(config)
    rows = step_rows(0, 40, config.batch_size, seed=3)
    optimizer = KeepingAdamW(model, config.lr, 0.1)
    figures, tokens, _ = train_step(model, optimizer, units_of(config, data, rows), config, world)
    return figures, optimizer.grads, tokens, model


def units_of(config, data, rows):
    if not stage_1(config):
        data.reference = reference_of(config, data)
    return objectives.units(config, [data.row(i) for i in rows])


def stage_1(config):
    return isinstance(config, SftConfig)


def reference(config):
    """Loss, gradients and {side: each sequence's entropies} by the papers' formulas, each sequence alone, whole logits,
    float64."""
    entropies = {"chosen": [], "rejected": []}
    model = Qwen2.from_pretrained(config.model, dtype=torch.float64)
    data = load(config)
    rows = step_rows(0, 40, config.batch_size, seed=3)

    def logps(sequence):
        tokens, learned = (torch.from_numpy(np.array(x)) for x in sequence[:2])
        n = len(tokens) - 1
        hidden = model(tokens[:-1].long(), torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
        lp = (hidden @ model.lm_head_weight.T).log_softmax(-1)[learned[1:]]
        entropies[sequence.side].append(torch.special.entr(lp.detach().exp()).sum(1))
        return lp.gather(1, tokens[1:][learned[1:], None].long()).squeeze(1)

    def loss_of(i):
        chosen, rejected = map(logps, data.row(i))
        if config.objective == "redi":
            weight = torch.exp(config.neg_weight_gamma * rejected.mean())
            c = config.chosen_weight * data.row(i)[0].row_weight
            return -c * chosen.mean() + config.alpha * weight * rejected.mean()
        if config.objective == "simpo":
            return torch.log1p(torch.exp(config.gamma - config.beta * (chosen.mean() - rejected.mean())))
        ref = reference_of(config, data)[i].astype(float)
        return torch.log1p(torch.exp(-config.beta * (chosen.sum() - ref[0] - rejected.sum() + ref[1])))

    if stage_1(config):
        traces = [data.row(i)[0] for i in rows]
        loss = -torch.cat([s.row_weight * logps(s) for s in traces]).sum() / sum(s.num_learned for s in traces)
    else:
        loss = torch.stack([loss_of(i) for i in rows]).mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}, entropies


def relative(got, want):
    return max(((got[n].double() - want[n]).norm() / want[n].norm()).item() for n in want if want[n].norm() > 1e-9)


@EVERY
def test_gradients_are_the_formula_s(stage, request, one_rank):
    config = replace(request.getfixturevalue(stage), clip=1e9)
    figures, grads, _, _ = one_step(config, one_rank)
    loss, want, entropies = reference(config)
    chosen, rejected = figures[:2].tolist()
    for side, got in zip(("chosen", "rejected"), figures[5:].tolist()):
        # A mean over tokens in stage 1, over traces of their own means in stage 2.
        each = [torch.cat(entropies[side] or [torch.zeros(1)])] if stage_1(config) else entropies[side]
        assert got == pytest.approx(torch.stack([e.mean() for e in each]).mean().item(), rel=1e-5)
    assert figures[4].item() == pytest.approx(loss, abs=1e-5)
    if stage in ("sft", "redi"):
        assert -chosen + (config.alpha * rejected if stage == "redi" else 0) == pytest.approx(loss, abs=1e-5)
    assert relative(grads, want) < 1e-5
    assert figures[2].item() == pytest.approx(torch.stack([g.norm() for g in want.values()]).norm().item(), rel=1e-4)


def test_the_device_s_package_is_told_of_a_step(redi, one_rank, monkeypatch):
    told = []
    monkeypatch.setitem(after_step.faster, one_rank.device.type, lambda *args: told.append(args))
    *_, model = one_step(redi, one_rank)
    assert told == [(1, 1, sum(p.numel() for p in model.parameters()), torch.float32)]


def test_all_objectives_tell_the_same_log_probs(request, one_rank):
    figures = [one_step(request.getfixturevalue(name), one_rank)[0] for name in ("redi", "dpo", "simpo", "weighted")]
    for other in figures[1:]:
        torch.testing.assert_close(other[:2], figures[0][:2], rtol=1e-5, atol=1e-5)


@EVERY
def test_micro_batches_change_nothing(stage, request, one_rank):
    config = request.getfixturevalue(stage)
    figures, grads, tokens, _ = one_step(config, one_rank)
    many_figures, many, many_tokens, _ = one_step(replace(config, max_tokens_per_micro_batch=150), one_rank)
    assert tokens == many_tokens > 600
    torch.testing.assert_close(figures, many_figures, rtol=1e-5, atol=1e-5)
    assert relative(many, grads) < 1e-5


@pytest.mark.parametrize("kept", ["attention", "products", "off"])
def test_blocks_keep_what_the_run_was_told(kept, redi, one_rank, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    seen, plain = set(), Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: seen.add(self.activation_checkpointing) or plain(self, *a))
    train(replace(redi, activation_checkpointing=kept, max_steps=1), one_rank)
    assert seen == {kept}


def test_alpha_0_is_sft_on_the_chosen_with_each_trace_counting_the_same(redi, one_rank):
    _, grads, tokens, _ = one_step(replace(redi, alpha=0.0, clip=1e9), one_rank)
    data = load(redi)
    rows = step_rows(0, 40, redi.batch_size, seed=3)
    model = Qwen2.from_pretrained(redi.model, dtype=torch.float32)
    for i in rows:
        ids, learned = (torch.from_numpy(np.array(x)) for x in data.row(i)[0][:2])
        n = len(ids) - 1
        weights = -learned[1:].float() / learned[1:].sum() / len(rows)
        model.loss(ids[:-1].long(), torch.arange(n), torch.tensor([0, n], dtype=torch.int32), ids[1:].long(), weights)[
            0
        ].backward()
    assert relative(grads, {n: p.grad for n, p in model.named_parameters()}) < 1e-5
    # The rejected traces cost nothing then.
    assert tokens == sum(data.row(i)[0].num_inputs for i in rows)


def test_objective_sft_goes_on_with_the_chosen(redi, one_rank):
    data = load(redi)
    config = replace(redi, objective="sft", alpha=None, chosen_weight=None, neg_weight_gamma=None)
    rows = [data.row(i) for i in (3, 5)]
    units = objectives.units(config, rows)
    total = sum(row[0].num_learned for row in rows)
    assert [(s.weight, s.share) for (s,) in units] == [(-1 / total, 1 / total)] * 2
    assert [s.tokens.tolist() for (s,) in units] == [row[0].tokens.tolist() for row in rows]


def test_the_mean_of_the_chosen_is_over_those_that_are_learned(sft, redi, one_rank):
    data = load(sft)
    rows = [data.row(i)[0] for i in (3, 5, 7)]
    for weights in ((0.0, 0.5, -1.0), (0.0, 0.0, 0.0)):
        step = [(s._replace(row_weight=w, side="rejected" if w < 0 else "chosen"),) for s, w in zip(rows, weights)]
        units = [unit[0] for unit in objectives.units(sft, step)]
        assert len(units) == max(1, sum(w != 0 for w in weights))
        assert [s.share * s.num_learned for s in units] == [1.0] * len(units)  # one of each side
        assert sum(s.weight for s in units) == -sum(weights) / sum(s.num_learned for s in rows)


def test_a_chosen_weight_that_the_objective_does_not_know_is_found_before_the_first_step(row_weights, simpo, one_rank):
    config = replace(simpo, data=row_weights.data)
    with pytest.raises(
        UserError, match="row 2 of those kept of .*weights.jsonl: simpo has no chosen_weight; take it out"
    ):
        loop._Run(config, one_rank)
    loop._Run(replace(simpo, watch=config.data), one_rank)  # nothing is learned from what is watched


def test_update_norm_is_what_the_weights_moved(redi, one_rank):
    before = Qwen2.from_pretrained(redi.model, dtype=torch.float32)
    figures, _, _, model = one_step(redi, one_rank)
    moved = [(local(new).cpu() - old).norm() for new, old in zip(model.parameters(), before.parameters())]
    assert figures[3].item() == pytest.approx(torch.stack(moved).norm().item(), rel=1e-4)


@pytest.mark.parametrize("stage", ["redi", "dpo"])
def test_offloaded_training_comes_to_the_same(stage, request, one_rank, tmp_path, monkeypatch):
    """On a CPU, whose memory is both the host's and the device's, so that nothing is copied between them."""
    config = replace(request.getfixturevalue(stage), max_steps=3, max_tokens_per_micro_batch=300, save_every=2)
    for name in ("plain", "run"):
        (tmp_path / name).mkdir()
    train(replace(config, out=str(tmp_path / "plain"), offload=True), one_rank)  # which a CPU does not heed
    mesh, device, places = distributed.shard_mesh(one_rank, 0), torch.device("cuda"), []

    def place():
        places.append(CPUOffloadPolicy(pin_memory=False))
        return places[-1]

    monkeypatch.setattr(distributed, "shard_mesh", lambda *_: mesh)
    monkeypatch.setattr(distributed.fsdp, "CPUOffloadPolicy", place)
    monkeypatch.setattr(loop, "shard", lambda model, world, *how: shard(model, replace(world, device=device), *how))
    train(replace(config, offload=True), one_rank)
    assert len(places) == 1
    plain, offloaded = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("plain", "run"))
    start = load_file(Path(config.model) / "model.safetensors")
    moved = {name: plain[name] - start[name] for name in start}
    assert relative({name: offloaded[name] - start[name] for name in start}, moved) < 1e-3


@pytest.mark.parametrize("stage", ["redi", "dpo"])
def test_bfloat16_compute_keeps_fp32_masters_and_follows_fp32(stage, request, one_rank, monkeypatch):
    config = request.getfixturevalue(stage)
    monkeypatch.setattr(logits, "MAX_CPU_ELEMENTS", 41 * 50)  # several chunks, whose sum is fp32
    _, grads, _, _ = one_step(config, one_rank)
    model = shard(Qwen2.from_pretrained(config.model, dtype=torch.float32), one_rank, torch.bfloat16, config)
    optimizer = KeepingAdamW(model)
    data = load(config)
    train_step(model, optimizer, units_of(config, data, step_rows(0, 40, 16, seed=3)), config, one_rank)
    half = optimizer.grads
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in half.values()} == {torch.float32}
    assert 1e-5 < relative(half, grads) < 0.1
    head = half["model.embed_tokens.weight"]
    assert (head != head.bfloat16()).float().mean() > 0.5  # never rounded to the weight's dtype


@pytest.mark.parametrize(
    "ranks, shard_size",
    [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_gradients_of_many_ranks_are_those_of_one(ranks, shard_size, run, toy_data, tmp_path):
    """16 pairs in several micro-batches, and 1 pair whose two sequences leave ranks with nothing to do; with the
    weights shared by all ranks, and in several copies."""
    for number, size in ((0, 0), (ranks, shard_size)):
        done = run("tests/rank_gradients.py", toy_data, tmp_path / f"{number}", size, ranks=number, gpus=ranks)
        assert done.returncode == 0, done.stderr
    for name in ("many", "one", "many-dpo", "one-dpo"):
        want, got = (load_file(tmp_path / f"{number}" / f"{name}.safetensors") for number in (0, ranks))
        assert relative(got, {n: g.double() for n, g in want.items()}) < 1e-5


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused(redi, one_rank):
    with pytest.raises(UserError, match="--shard_size 2 must divide the number of ranks, which is 1"):
        shard(Qwen2.from_pretrained(redi.model), one_rank, torch.float32, replace(redi, shard_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("others", [["2", "4", "agents"]])
def test_the_loss_curve_depends_on_neither_ranks_nor_machines(others, run, toy_data, tmp_path):
    """20 steps on 1 rank and on 2, 4, and two torchrun agents of 2 ranks that each hold a copy of the weights; 5 pairs
    a step leave some ranks with less to do."""
    words = "--recipe toy --epochs 2 --batch_size 5 --max_steps 20 --evaluate false --dtype float32".split()
    flags = ["train_redi.py", *words, "--model", toy_data / "model", "--data", toy_data / "pairs.jsonl"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    agents = f"--nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint {endpoint} --rdzv_id test".split()
    for name in ["1", *others]:
        if name == "agents":
            with ThreadPoolExecutor() as threads:
                words = [*flags, "--out", tmp_path / name, "--shard_size", "2"]
                both = [threads.submit(run, *words, torchrun=agents, gpus=4) for _ in range(2)]
                ended = [future.result() for future in both]
        else:
            ended = [run(*flags, "--out", tmp_path / name, ranks=int(name), gpus=4)]
        for done in ended:
            assert done.returncode == 0, done.stderr
    want, *curves = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ["1", *others]
    )
    assert len(want) == 20
    for rows in curves:
        for a, b in zip(want, rows, strict=True):
            for key in ("loss", "chosen_logp", "rejected_logp", "grad_norm", "update_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4 if key == "loss" else 1e-5)
    start = dict(Qwen2.from_pretrained(tmp_path / "1" / "final").named_parameters())
    for name in others:
        for key, p in Qwen2.from_pretrained(tmp_path / name / "final").named_parameters():
            torch.testing.assert_close(p, start[key], rtol=1e-3, atol=1e-4)
