"""The trial on a real model: its data, the converter, and all of its stages with a tiny model and hardly any steps."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from experiments import real, real_page
from experiments.gguf_folder import BLOCK, CONTROL, convert, write_tokenizer
from nanoredi.common.errors import UserError
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.config import Qwen2Config
from nanoredi.model.qwen2 import Qwen2

NAMES = ("Robin", "Fred", "Mary", "Joan", "Tom", "Sam")


def write_problems(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"problem": f"{name} has {i} and gets 3. How many?", "answer": str(i + 3), "steps": [f"{i} + 3 = {i + 3}"]}
        for i, name in enumerate(NAMES * 3)
    ]
    rows += [rows[0], {**rows[1], "answer": "77"}]  # one again, and one with another answer
    real.write_rows(folder / "train.jsonl", rows)
    real.write_rows(folder / "test.jsonl", [{"problem": f"{n} has 5. How many?", "answer": "5"} for n in NAMES])
    return folder


def test_a_problem_has_a_trace_for_each_order_of_what_commutes():
    assert real.phrasings(["4 + 3 = 7", "7 - 2 = 5"], "5") == [
        "<think>\n4 + 3 = 7\n7 - 2 = 5\n</think>\n\\boxed{5}",
        "<think>\n3 + 4 = 7\n7 - 2 = 5\n</think>\n\\boxed{5}",
    ]
    assert len(real.phrasings(["7 - 2 = 5"], "5")) == 1


def test_the_parts_of_the_data_share_no_problem(tmp_path):
    sizes = real.Sizes(validation=4, stage_1=6, tests=5)
    real.write_data(write_problems(tmp_path / "problems"), tmp_path / "data", sizes)
    parts = {
        name: [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("stage-1", "prompts", "validation", "test")
    }
    asked = [{row.get("prompt") or row["problem"] for row in rows} for rows in parts.values()]
    assert [len(part) for part in asked] == [6, 17 - 4 - 6, 4, 5]
    assert len(set.union(*asked)) == sum(map(len, asked))


BYTES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
FACTS = {
    "tokenizer.ggml.tokens": BYTES,
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [CONTROL] * 3 + [1] * 257,
    "tokenizer.ggml.eos_token_id": 2,
}


def tiny_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(BYTES),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


@pytest.fixture
def model(tmp_path) -> Path:
    """A random Qwen2 with a token a byte."""
    write_tokenizer(FACTS, tmp_path / "tokenizer", real.PAD, real.TEMPLATE)
    Qwen2(tiny_config(), tmp_path / "tokenizer").init_weights(0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def half_right(words: list[str]) -> None:
    """A random model is never right: put right every other sample of those that sample.py has written."""
    path = Path(words[words.index("--out") + 1])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"completion": f"\\boxed{{{row['answer'] if row['sample'] else -1}}}", "finish_reason": "stop"}
    real.write_rows(path, rows)


def test_every_stage_runs_once_and_makes_the_page(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    methods = {name: real_page.METHODS[name] for name in ("SFT continued", "REDI 0.8")}
    monkeypatch.setattr(real, "METHODS", methods)
    monkeypatch.setattr(real_page, "METHODS", methods)
    monkeypatch.setattr(real.Experiment, "at_once", lambda self, jobs: [job() for job in jobs])
    monkeypatch.setattr(real_page, "CLAIMS", real_page.CLAIMS[:2])
    sizes = real.Sizes(
        validation=4,
        stage_1=6,
        rounds=1,
        samples=2,
        epochs=1,
        steps=2,
        batch=2,
        tests=5,
        max_tokens=8,
        rates=(1e-3, 2e-3),
    )
    problems, commands = write_problems(tmp_path / "problems"), []

    def run(words, log, threads):
        # In this process: one of its own would take seconds to begin.
        name, *flags = words[1:] if words[0] == "-m" else [words[0].removesuffix(".py"), *words[1:]]
        commands.append(name)
        importlib.import_module(name).main(flags)
        if name == "sample":
            half_right(words)
        return 0, 1.5

    def again(seeds):
        commands.clear()
        real.run_all(tmp_path / "out", problems, model, sizes, seeds, run)
        real_page.write_page(tmp_path / "out", sizes.rates, seeds, tmp_path)
        return len(commands), (tmp_path / "real-model.md").read_text()

    count, page = again(seeds=1)
    assert count == 3 + 2 * 4 + 3
    assert "[14/14]" in capsys.readouterr().out
    assert "| REDI 0.8 |" in page and "one seed" in page and "took 0 minutes of processor time" in page
    assert again(seeds=1) == (0, page)
    # Another seed has no sweep: it trains at the rates that stand.
    count, page = again(seeds=2)
    assert count == 3 + 2 + 3 and "2 seeds" in page
    assert (tmp_path / "real-model.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stage_that_fails_is_made_again(tmp_path):
    answers = iter([(2, 1.0), (0, 2.0)])
    for _ in range(2):
        experiment = real.Experiment(tmp_path, real.Sizes(), 1, lambda *_: next(answers))
        try:
            experiment.stage("seed 1: stage 1", "train_sft.py")
        except UserError as error:
            assert "seed 1: stage 1 failed" in str(error)
    assert "seed 1: stage 1" not in real.Experiment(tmp_path, real.Sizes(), 1, None).left
    rows = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert [row["cpu"] for row in rows] == [1.0, 2.0] and rows[0]["stage"].endswith("broken off")


@pytest.mark.parametrize(
    "low, high, want", [(0.01, 0.02, "**holds**"), (-0.02, -0.01, "**the opposite holds**"), (-0.01, 0.02, "undecided")]
)
def test_a_verdict_follows_the_interval(low, high, want):
    assert real_page.verdict({"difference": 0.0, "low": low, "high": high}) == want


def test_a_llama_of_a_gguf_file_computes_the_same_as_a_qwen2(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = tiny_config()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{name: getattr(config, name) for name in names}, rope_parameters=rope)
    )
    with torch.no_grad():
        for number, weight in enumerate(llama.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        llama.lm_head.weight = llama.model.embed_tokens.weight
    write_gguf(gguf, tmp_path / "tiny.gguf", llama.state_dict(), config, rope["rope_theta"])
    convert(tmp_path / "tiny.gguf", tmp_path / "folder", real.PAD, real.TEMPLATE)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert type(ours).__name__ == "Qwen2ForCausalLM"
    ids = torch.arange(40)[None] * 6
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, llama(ids).logits)
    tokenizer = Tokenizer(tmp_path / "folder")
    text = "<|im_start|>user\nÄ 42?<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == text and ids[0] == 1 and ids[-1] == 2
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (2, 0, [2])
    Qwen2.from_pretrained(tmp_path / "folder")


def write_gguf(gguf, path: Path, weights: dict[str, torch.Tensor], config: Qwen2Config, rope_theta: float) -> None:
    """A Llama in the layout of llama.cpp's converter."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(BYTES)
    writer.add_token_types(FACTS["tokenizer.ggml.token_type"])
    writer.add_token_merges(FACTS["tokenizer.ggml.merges"])
    writer.add_eos_token_id(2)
    theirs = {ours: name for name, ours in BLOCK.items()}
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, weight in weights.items():
        if name == "lm_head.weight":
            continue
        if name in top:
            writer.add_tensor(top[name], weight.numpy())
            continue
        _, _, block, rest = name.split(".", 3)
        kind = theirs[rest.removesuffix(".weight")]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
        if heads:
            weight = weight.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"blk.{block}.{kind}.weight", np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
