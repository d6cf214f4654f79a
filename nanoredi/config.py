"""The options of every command. Each dataclass is a table of a recipe, each field an option with help and bounds.

common/flags.py reads them from flags and recipes.
"""

import dataclasses
from dataclasses import dataclass

from nanoredi.common.errors import UserError
from nanoredi.common.flags import TABLES, option

DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class TrainConfig:
    """The options that both stages share. The defaults are the paper's where it gives them (arXiv 2505.24850)."""

    model: str = option("", "Hugging Face folder of the Qwen2 model to start from; empty: run the toy task")
    data: str = option("", "file of the training rows: JSONL, JSON, CSV, Parquet or Arrow")
    out: str = option("", "the run's folder", free=True)
    epochs: int = option(1, "passes over the data", low=1)
    max_steps: int = option(0, "stop after this many optimiser steps; 0: after the epochs", low=0)
    batch_size: int = option(32, "pairs per optimiser step, over all ranks", low=1)
    lr: float = option(1e-6, "peak learning rate", low=0)
    warmup: float = option(0.1, "fraction of the steps with a rising rate; then it falls to 0", low=0, high=1)
    weight_decay: float = option(1e-4, "AdamW's decoupled weight decay", low=0)
    clip: float = option(1.0, "maximum gradient norm; a larger gradient is scaled down to it", above=0)
    dtype: str = option("auto", "compute dtype; auto: bfloat16 if the device is fast at it", choices=DTYPES)
    activation_checkpointing: str = option(
        "attention",
        "what a block keeps for backward: its input and attention's result (attention), also its matrix products "
        "(products), or everything (off); each is faster and takes more memory than the one before",
        choices=("attention", "products", "off"),
        free=True,
    )
    reshard_after_forward: bool = option(True, "gather a block's weights again in backward: less memory", free=True)
    shard_size: int = option(0, "ranks that share one copy of the weights; 0: all ranks", low=0, free=True)
    offload: bool = option(False, "keep fp32 weights and Adam's moments in host memory", free=True)
    max_tokens_per_micro_batch: int = option(40_000, "on each rank; a longer sequence goes alone", low=1, free=True)
    save_every: int = option(200, "steps between checkpoints; 0: only at the end", low=0, free=True)
    log_every: int = option(10, "steps between printed lines", low=1, free=True)
    tensorboard: bool = option(False, "also write the metrics for TensorBoard (package tensorboard)", free=True)
    max_bad_steps: int = option(5, "stop after so many non-finite losses or gradients in a row", low=1, free=True)
    timeout_minutes: float = option(10.0, "end the job when a rank has not responded for this long", above=0, free=True)
    seed: int = option(42, "seed of the data's order, and of everything that the toy makes", low=0)
    rope_theta: float = option(0.0, "base of the rotary embedding to train with; 0: the model's own", low=0)
    max_position_embeddings: int = option(0, "context length to train with; 0: the model's own", low=0)
    cache: str = option("runs/cache", "folder for tokenised data, keyed by data and tokenizer", free=True)


@dataclass
class SftConfig(TrainConfig):
    """Stage 1: supervised fine-tuning on correct traces."""

    label = "stage 1"  # in messages
    objective, alpha = "sft", None
    epochs: int = option(5, "passes over the data", low=1)
    batch_size: int = option(128, "sequences per optimiser step, over all ranks", low=1)
    lr: float = option(5e-5, "peak learning rate", low=0)
    max_tokens: int = option(32_768, "longest conversation; a longer one is cut on the right", low=1)


@dataclass
class RediConfig(TrainConfig):
    """Stage 2: pairs of a correct and an incorrect trace."""

    label = "stage 2"
    objective: str = option("redi", "the loss; sft: on correct traces only", choices=("redi", "sft", "dpo", "simpo"))
    alpha: float | None = option(None, "weight of the incorrect trace", low=0, of={"redi": 0.8})
    chosen_weight: float | None = option(None, "weight of the correct trace", low=0, of={"redi": 1.0})
    neg_weight_gamma: float | None = option(
        None, "also weight the incorrect trace by exp(this * its mean log-prob per token)", low=0, of={"redi": 0.0}
    )
    beta: float | None = option(None, "scale of the log-prob difference", above=0, of={"dpo": 0.001, "simpo": 2.0})
    gamma: float | None = option(None, "target margin", low=0, of={"simpo": 1.0})
    max_prompt_tokens: int = option(800, "longest prompt; a longer one is cut on the left", low=1)
    max_response_tokens: int = option(19_000, "longest response; a longer one is cut on the right", low=1)
    collapse_nats: float = option(0.3, "warn when the chosen log-prob falls this far, ever faster", above=0, free=True)
    on_collapse: str = option("warn", "what to do at a collapse", choices=("warn", "stop"), free=True)
    watch: str = option("", "file of pairs kept out of training, whose log-probs are in the final table")
    watch_every: int = option(0, "steps between evaluations of the watched pairs; 0: none", low=0, free=True)
    evaluate: bool = option(False, "at the end, compare the initial and the final model on [evaluate]'s benchmarks")

    def __post_init__(self):
        """Fill in the defaults of the objective's own parameters, and refuse another objective's."""
        for f in dataclasses.fields(self):
            of, given = f.metadata["of"], getattr(self, f.name) is not None
            if self.objective in of and not given:
                setattr(self, f.name, of[self.objective])
            elif of and self.objective not in of and given:
                raise UserError(f"{f.name} is a parameter of {' and '.join(of)}; the objective is {self.objective}")
        if self.objective == "redi" and not (self.alpha or self.chosen_weight):
            raise UserError("alpha and chosen_weight are both 0, so nothing would be learned")


StageConfig = SftConfig | RediConfig


@dataclass
class SamplingConfig:
    """How completions are sampled. The defaults are those of the paper's evaluation."""

    n: int = option(16, "samples per prompt", low=1, high=2**16)
    temperature: float = option(0.6, "sampling temperature; 0: always the most likely token", low=0)
    top_p: float = option(0.95, "sample from the most likely tokens of this total probability", above=0, high=1)
    top_k: int = option(0, "sample from the k most likely tokens; 0: from all", low=0)
    max_tokens: int = option(32_768, "longest completion, within the model's context", low=1)
    seed: int = option(42, "seed of the samples", low=0)
    batch_size: int = option(0, "samples decoded at once; 0: 64, on a GPU up to 256", low=0, high=2**16, free=True)
    cache_gb: float = option(0.0, "size of the key-value cache in GB; 0: from free memory", low=0, high=1e6, free=True)
    page_size: int = option(0, "tokens per page of the cache; 0: 32, on a GPU 256", low=0, high=2**16, free=True)
    dtype: str = option("auto", "compute dtype; auto: bfloat16 if the device is fast at it", choices=DTYPES)
    batch_invariant: bool = option(True, "make the same samples, bit for bit, whatever else is in the batch")
    template: str = option(
        "",
        "how a problem is asked: paper (the paper's words), plain (the problem alone), or a text with {problem} where "
        "it goes; empty: paper for the paper's benchmarks, plain for all others",
    )
    system: str = option("", "system message; empty: the chat template's default")

    def __post_init__(self):
        if self.template not in ("", "paper", "plain") and "{problem}" not in self.template:
            raise UserError(
                f"--template takes paper, plain, or a text with {{problem}} where that goes, not {self.template!r}"
            )


@dataclass
class EvaluateConfig(SamplingConfig):
    """Models on benchmarks."""

    benchmarks: list[str] = option(
        ["math500", "aime24", "amc23", "minerva", "olympiad_bench"], "names, or files of rows with problem and answer"
    )
    data: str = option("", "folder with the files of the named benchmarks")
    limit: int = option(0, "problems per benchmark, from its start; 0: all", low=0)
    timeout_minutes: float = option(10.0, "end the job when a rank has not responded for this long", above=0, free=True)
    think: str = option("forced", "forced: prompts open <think>; own: as the template does", choices=("forced", "own"))


@dataclass
class ToyConfig:
    """The embedded task (toy.py). The sizes of data and model were found by experiment."""

    sft_rows: int = option(4000, "problems with a correct trace, for stage 1", low=1, high=10**6)
    pairs: int = option(2000, "pairs for stage 2; their correct traces are among stage 1's", low=1)
    watch_pairs: int = option(64, "pairs kept out of stage 2, to watch their log-probs", low=1)
    heldout: int = option(200, "unseen problems for evaluation", low=1, high=10**6)
    num_layers: int = option(3, "blocks of the model", low=1, high=1000)
    hidden_size: int = option(96, "the model's width; 4 heads share it, the MLP is 3 times as wide", low=8, high=2**14)


TABLES.update(sft=SftConfig, redi=RediConfig, evaluate=EvaluateConfig, toy=ToyConfig)
