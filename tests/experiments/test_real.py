"""The experiment on a real model: its data, the converter, and all of its stages with a tiny model and few steps."""

import json
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config
from tokenizers import pre_tokenizers

from evaluate import EvaluateFlags
from experiments import real, real_page
from experiments.gguf_folder import BLOCK, CONTROL, convert, write_tokenizer
from nanoredi.common.errors import UserError
from nanoredi.common.files import write_json
from nanoredi.common.flags import read_flags, resolve, write_recipe
from nanoredi.config import RediConfig, SftConfig
from nanoredi.data.benchmarks import load_all
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.evaluation import scores
from nanoredi.evaluation.scores import graded, summarise
from nanoredi.model.config import Qwen2Config
from nanoredi.model.qwen2 import Qwen2
from nanoredi.prepare import PrepareFlags
from sample import SampleFlags

NAMES = ("Robin", "Fred", "Mary", "Joan", "Tom", "Sam")


def write_problems(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"problem": f"{name} has {i} and gets 3. How many?", "answer": str(i + 3), "steps": [f"{i} + 3 = {i + 3}"]}
        for i, name in enumerate(NAMES * 3)
    ]
    rows += [rows[0], {**rows[1], "answer": "77"}]  # a duplicate, and one with another answer
    real.write_rows(folder / "train.jsonl", rows)
    real.write_rows(folder / "test.jsonl", [{"problem": f"{n} has 5. How many?", "answer": "5"} for n in NAMES])
    return folder


def test_a_problem_has_a_trace_for_each_order_of_its_operands():
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


def byte_config() -> Qwen2Config:
    sizes = {"vocab_size": len(BYTES), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4}
    return tiny_config(**sizes, max_position_embeddings=256, tie_word_embeddings=True)


@pytest.fixture
def model(tmp_path) -> Path:
    """A random Qwen2 whose tokens are bytes."""
    write_tokenizer(FACTS, tmp_path / "tokenizer", real.PAD, real.TEMPLATE)
    Qwen2(byte_config(), tmp_path / "tokenizer").init_weights(0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def few_methods(monkeypatch) -> dict[str, list[str]]:
    """Two methods, and their claims."""
    methods = {name: real_page.METHODS[name] for name in ("SFT continued", "REDI 0.8")}
    monkeypatch.setattr(real, "METHODS", methods)
    monkeypatch.setattr(real_page, "METHODS", methods)
    rates = {name: (1e-3, 2e-3) for name in methods}
    monkeypatch.setattr(real, "RATES", rates)
    monkeypatch.setattr(real_page, "RATES", rates)
    monkeypatch.setattr(real_page, "CLAIMS", real_page.CLAIMS[:2])
    monkeypatch.setattr(scores, "_DRAWS", 200)
    return methods


SIZES = real.Sizes(
    validation=4,
    stage_1=6,
    samples=2,
    test_samples=2,
    epochs=1,
    steps=2,
    batch=2,
    max_tokens=8,
)


class Pretence:
    """Parses the commands' flags as they do, and writes their outputs as if the answers were correct where `right` says."""

    def __init__(self, right: Callable[[str, int], bool]):
        self.right, self.commands = right, []

    def __call__(self, words: list[str], log: Path, threads: int) -> tuple[int, float]:
        name, *flags = words[1:] if words[0] == "-m" else [words[0].removesuffix(".py"), *words[1:]]
        self.commands.append(name)
        table, kind, play = {
            "train_sft": ("sft", SftConfig, self.train),
            "train_redi": ("redi", RediConfig, self.train),
            "sample": ("evaluate", SampleFlags, self.sample),
            "nanoredi.prepare": ("prepare", PrepareFlags, self.prepare),
            "evaluate": ("evaluate", EvaluateFlags, self.evaluate),
        }[name]
        config = resolve(kind, table, read_flags("", flags, table, kind)[1])
        play(table, config, Path(config.out))
        return 0, 30.0

    def train(self, table: str, config: SftConfig | RediConfig, out: Path) -> None:
        out.mkdir(parents=True)
        write_recipe(out / "config.toml", {table: config})
        logps = {"chosen_logp": -0.1, "rejected_logp": None if config.out.endswith("sft") else -0.25}
        real.write_rows(out / "metrics.jsonl", [{"step": step, **logps, "update_norm": 0.1} for step in (1, 2)])

    def sample(self, table: str, config: SampleFlags, out: Path) -> None:
        prompts = [json.loads(line) for line in Path(config.prompts).read_text().splitlines()]
        real.write_rows(out, [{**row, "completion": "", "sample": i} for row in prompts for i in range(config.n)])

    def prepare(self, table: str, config: PrepareFlags, out: Path) -> None:
        assert config.grade and Path(config.raw[0]).exists()
        out.mkdir()
        real.write_rows(
            out / "pairs.jsonl", [{"prompt": [{"role": "user", "content": "2 + 2?"}], "chosen": "4", "rejected": "5"}]
        )

    def evaluate(self, table: str, config: EvaluateFlags, out: Path) -> None:
        [benchmark] = load_all(config.benchmarks, "", 0, config.template)
        run = Path(config.model[0]).parent.name
        rows = [
            graded(run, benchmark, problem, i, f"\\boxed{{{gold if self.right(run, problem) else 'no'}}}", 9, "stop")
            for problem, [gold] in enumerate(benchmark.golds)
            for i in range(config.n)
        ]
        out.mkdir(parents=True)
        real.write_rows(out / "samples.jsonl", rows)
        write_json(out / "results.json", [{"model": run, "benchmark": benchmark.name, **summarise(rows, config.n)}])


def make(folder: Path, model: Path, seeds: int, run: real.Run) -> str:
    """Run all stages. Returns the page."""
    if not (folder / "problems").exists():
        write_problems(folder / "problems")
    real.run_all(folder / "out", folder / "problems", model, SIZES, seeds, run)
    real_page.write_page(folder / "out", seeds, folder)
    return (folder / "real-model.md").read_text()


@pytest.mark.parametrize("redi, sft, verdicts", [(6, 3, ["holds"] * 2), (2, 3, ["the opposite holds", "undecided"])])
def test_the_page_says_what_the_runs_say(few_methods, tmp_path, redi, sft, verdicts):
    pytest.importorskip("matplotlib")
    first_right = {"stage-1": 0 if redi == 6 else 6, "REDI-0.8-0.002": redi, "SFT-continued-0.001": sft}
    play = Pretence(lambda run, problem: problem < first_right.get(run, 1))
    page = make(tmp_path, tmp_path / "model", 1, play)
    assert len(play.commands) == 3 + 1 + 2 * 4 + 3
    assert "| REDI 0.8 | 0.002 |" in page and "| SFT continued | 0.001 |" in page  # the best of the validation problems
    assert f"| REDI 0.8 | 25.0 | **{100 / 4 * min(redi, 4):.1f}** |" in page
    said = [line.rsplit("| ", 1)[1] for line in page.splitlines() if line.startswith(("| Learning", "| ... and over"))]
    assert said == [f"**{word}** |" if word != "undecided" else "undecided |" for word in verdicts]
    assert "took 8 minutes of CPU time" in page and (tmp_path / "real-model.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_stages_are_skipped(few_methods, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(real_page, "draw", lambda runs, path: None)
    play = Pretence(lambda run, problem: True)
    page = make(tmp_path, tmp_path / "model", 1, play)
    assert "[15/15]" in capsys.readouterr().out
    play.commands.clear()
    assert make(tmp_path, tmp_path / "model", 1, play) == page and not play.commands
    # Another seed has no sweep: it trains at the rates already chosen.
    assert "With 2 seeds" in make(tmp_path, tmp_path / "model", 2, play)
    assert len(play.commands) == 3 + 2 + 3


@pytest.mark.slow
def test_every_stage_runs_on_a_tiny_model(few_methods, model, tmp_path):
    pytest.importorskip("matplotlib")
    commands = real.Commands()

    def run(words: list[str], log: Path, threads: int) -> tuple[int, float]:
        done = commands(words, log, threads)
        if words[0] == "sample.py":  # a random model is never right: every other sample is put right
            path = Path(words[words.index("--out") + 1])
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                row |= {"completion": f"\\boxed{{{row['answer'] if row['sample'] else -1}}}", "finish_reason": "stop"}
            real.write_rows(path, rows)
        return done

    page = make(tmp_path, model, 1, run)
    assert "| REDI 0.8 |" in page and "undecided" in page


def test_a_failed_stage_is_run_again(tmp_path):
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


def test_a_command_that_is_stopped_has_failed(tmp_path):
    commands = real.Commands()
    threading.Timer(0.5, commands.stop).start()
    code, cpu = commands(["-c", "import time; time.sleep(100)"], tmp_path / "log.txt", 1)
    assert code == -signal.SIGTERM and 0 < cpu < 10


def test_after_a_failure_no_other_command_starts(tmp_path):
    begun = []
    experiment = real.Experiment(tmp_path, real.Sizes(), 1, lambda words, log, threads: begun.append(words) or (1, 0.1))
    with pytest.raises(UserError, match="says why"):
        experiment.at_once([partial(experiment.stage, stage) for stage in experiment.plan])
    assert 1 <= len(begun) <= real.AT_ONCE


@pytest.mark.parametrize(
    "low, high, want", [(0.01, 0.02, "**holds**"), (-0.02, -0.01, "**the opposite holds**"), (-0.01, 0.02, "undecided")]
)
def test_a_verdict_follows_the_interval(low, high, want):
    assert real_page.verdict({"difference": 0.0, "low": low, "high": high}) == want


def test_a_llama_of_a_gguf_file_computes_the_same_as_a_qwen2(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = byte_config()
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
    """Write a Llama in the layout of llama.cpp's converter."""
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
