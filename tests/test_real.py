"""Every part on real data: a Qwen2 of some 10 million parameters with the real vocabulary, from raw rows to the
benchmarks' table.

Its scores mean nothing; what counts is that the parts fit together.
"""

import json

import pytest
from tiny import tiny_config

from nanoredi.data.benchmarks import PAPER
from nanoredi.model.qwen2 import Qwen2


def test_from_raw_rows_to_the_table(run, shared, tmp_path):
    sizes = {"vocab_size": 151_936, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = tiny_config(**sizes, max_position_embeddings=4096, tie_word_embeddings=True)
    Qwen2(config, tokenizer_folder=shared / "qwen2.5-tokenizer").init_weights(0).save_pretrained(tmp_path / "base")

    def done(*words, **options):
        result = run(*words, **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    done(
        "nanoredi/prepare.py",
        "--raw",
        shared / "openr1_math_raw_sample.jsonl",
        "--tokenizer",
        tmp_path / "base",
        "--out",
        "prepared",
    )
    recipe = [
        "--recipe",
        "qwen2.5-math-1.5b",
        "--max_steps",
        "2",
        "--batch_size",
        "2",
        "--max_tokens_per_micro_batch",
        "2000",
        "--dtype",
        "float32",
    ]
    done("train_sft.py", *recipe, "--model", "base", "--data", "prepared/sft.jsonl", "--out", "sft")
    done("train_redi.py", *recipe, "--model", "sft/final", "--data", "prepared/pairs.jsonl", "--out", "redi")
    config = json.loads((tmp_path / "redi/final/config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"], config["tie_word_embeddings"]) == (
        300_000,
        32_768,
        True,
    )
    rows = [json.loads(line) for line in (tmp_path / "redi/metrics.jsonl").read_text().splitlines()]
    # An untrained model finds every token about equally likely: log(1/151,936) = -11.9.
    assert -12.1 < rows[0]["chosen_logp"] < -11.5 and -12.1 < rows[0]["rejected_logp"] < -11.5

    said = done("sample.py", "--model", "redi/final", "--prompt", "What is 1+1?", "--max_tokens", "8")
    assert "--- What is 1+1?" in said and "(8 tokens, cut off)" in said
    said = done(
        "evaluate.py",
        "--model",
        "redi/final",
        "--benchmarks",
        *PAPER,
        "--data",
        shared / "benchmarks",
        "--limit",
        "2",
        "--n",
        "2",
        "--max_tokens",
        "8",
        "--out",
        "table",
    )
    results = json.loads((tmp_path / "table/results.json").read_text())
    assert [row["benchmark"] for row in results] == list(PAPER) and all(row["problems"] == 2 for row in results)
    assert all(name in said for name in PAPER)
    samples = [json.loads(line) for line in (tmp_path / "table/samples.jsonl").read_text().splitlines()]
    # Thinking was forced, and 8 tokens do not end it: no answer, and wrong.
    assert len(samples) == 20 and all(
        s["response"].startswith("<think>\n") and s["answer"] is None and not s["correct"] for s in samples
    )


def test_the_saved_folder_loads_in_transformers(shared, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 151_936, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = tiny_config(**sizes, num_hidden_layers=1, max_position_embeddings=4096, tie_word_embeddings=True)
    Qwen2(config, tokenizer_folder=shared / "qwen2.5-tokenizer").init_weights(0).save_pretrained(tmp_path / "m")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()) and sorted(model.generation_config.eos_token_id) == [151643, 151645]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")
