"""The objectives that need pairs, computed from token log-probs, and compared with TRL's losses."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kept import KeepingAdamW

from nanoredi.config import RediConfig, SftConfig
from nanoredi.data.batch import step_rows
from nanoredi.data.sequences import Sequence, load_pairs
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.qwen2 import Qwen2
from nanoredi.objectives import needs_pairs, pair_losses, simpo, units
from nanoredi.trainer.distributed import shard
from nanoredi.trainer.step import train_step


def test_which_objectives_need_pairs():
    assert not any(map(needs_pairs, (SftConfig(), RediConfig(), RediConfig(objective="sft"))))
    assert not needs_pairs(RediConfig(alpha=0.0, neg_weight_gamma=1.0))  # no negatives to weigh
    assert all(map(needs_pairs, (RediConfig(objective="dpo"), RediConfig(objective="simpo"))))
    assert needs_pairs(RediConfig(neg_weight_gamma=1.0))


def test_a_pair_s_losses_from_its_tokens():
    """Two pairs: 2 and 1 learned tokens, then 1 and 3, behind prompts of 1 and 2 tokens."""

    def sequence(prompt, learned, reference):
        n = prompt + learned
        return Sequence(np.arange(n), np.arange(n) >= prompt, reference=reference)

    pairs = [(sequence(1, 2, -5.0), sequence(1, 1, -2.0)), (sequence(2, 1, -1.0), sequence(2, 3, -6.0))]
    logps = torch.tensor([-1.0, -3.0, -2.0, 0.0, -0.5, 0.0, -1.0, -1.0, -4.0], requires_grad=True)
    losses = pair_losses(RediConfig(objective="dpo", beta=0.5), pairs, logps)
    # Ratios: -4 + 5 = 1 and -2 + 2 = 0; -0.5 + 1 = 0.5 and -6 + 6 = 0.
    assert losses.tolist() == pytest.approx([np.log1p(np.exp(-0.5)), np.log1p(np.exp(-0.25))])
    losses = pair_losses(RediConfig(objective="simpo", beta=2.0, gamma=1.0), pairs, logps)
    # Means: -2 and -2; -0.5 and -2.
    assert losses.tolist() == pytest.approx([np.log1p(np.exp(1)), np.log1p(np.exp(-2))])
    losses.sum().backward()
    # -beta * sigmoid(gamma - beta * difference) / |y_w| on a chosen token, the opposite / |y_l| on a rejected one.
    first, second = 2 / (1 + np.exp(-1)), 2 / (1 + np.exp(2))
    third = second / 3
    learned = logps.grad[[0, 1, 2, 4, 6, 7, 8]].tolist()
    assert learned == pytest.approx([-first / 2] * 2 + [first, -second] + [third] * 3)


def test_dpo_s_loss_and_gradients_are_trl_s(toy_data, tmp_path, one_rank):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    import datasets
    import transformers

    config = RediConfig(
        model=str(toy_data / "model"),
        data=str(toy_data / "pairs.jsonl"),
        cache=str(tmp_path / "cache"),
        clip=1e9,
        objective="dpo",
        beta=0.05,
    )
    data = load_pairs(config.data, Tokenizer(config.model), 800, 19_000, config.cache)
    data.reference = -3.3 * np.array([[s.num_learned for s in data.row(i)] for i in range(len(data))], dtype=np.float32)
    pairs = units(config, [data.row(i) for i in step_rows(0, 40, 8, seed=3)])
    sequences = [s for side in zip(*pairs) for s in side]  # TRL expects all chosen ones first
    ours = shard(Qwen2.from_pretrained(config.model), one_rank, torch.float32, config)
    optimizer = KeepingAdamW(ours)
    figures, _, _ = train_step(ours, optimizer, pairs, config, one_rank)

    model = transformers.AutoModelForCausalLM.from_pretrained(toy_data / "model", dtype=torch.float32)
    options = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=config.beta, **options),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a=1b+2", "chosen": "3", "rejected": "4"}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(toy_data / "model"),
    )
    trainer.precompute_ref_logps = True  # the batch contains them
    padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids, learned = ([torch.from_numpy(np.array(x)).long() for x in xs] for xs in list(zip(*sequences))[:2])
    chosen_reference, rejected_reference = torch.tensor([s.reference for s in sequences]).chunk(2)
    batch = {
        "input_ids": padded(ids),
        "attention_mask": padded([torch.ones_like(x) for x in ids]),
        "completion_mask": padded(learned),
        "ref_chosen_logps": chosen_reference,
        "ref_rejected_logps": rejected_reference,
    }
    theirs = trainer.compute_loss(model, batch)
    theirs.backward()
    assert figures[4].item() == pytest.approx(theirs.item(), abs=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(optimizer.grads[name], p.grad, rtol=1e-3, atol=1e-5)


def test_simpo_s_loss_is_trl_s():
    cpo = pytest.importorskip("trl.experimental.cpo", reason="TRL is not installed, or has no CPO")
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "alpha": 0.0, "label_smoothing": 0.0}
    trainer = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = -torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)
    torch.testing.assert_close(simpo(chosen, rejected, beta=2.0, gamma=1.0), theirs)
