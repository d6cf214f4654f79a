"""The embedded task: REDI at work in two minutes on two cores.

A problem is a start digit and six operations + - * with operands from 2 to 6, applied from left to right modulo 10; the
prompt gives each result a letter:  a=3b+5c-6d+6e-6f*2g-6  means b = a+5, c = b-6, ...  The answer is the last value.

The teacher makes mistakes. It is hasty: instead of writing the next step it may leap over two or three steps and write
only the result, `~f=4;`, which is correct half of the time. Sometimes it notices an error, writes `Wait`, goes back and
takes the steps one by one.

    <user>a=3b-2c+5d-5e+5f+2g+2<assistant>
     correct    <think>~c=7;Waita=3;b-2=1;c+5=6;d-5=1;e+5=6;f+2=8;g+2=0;</think>\\boxed{0}
     incorrect  <think>b-2=1;c+5=6;~f=4;g+2=6;</think>\\boxed{6}

Correct traces contain only lucky and repaired leaps, so a student of these alone learns to leap, but not the luck. The
incorrect traces contain more leaps, and REDI unlearns the habit. The task was built to show the mechanism: it is a
demonstration, not evidence for the paper.
"""

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from nanoredi.common.disk import writing
from nanoredi.common.errors import UserError
from nanoredi.common.flags import Tables, read_recipe
from nanoredi.config import EvaluateConfig, SftConfig, StageConfig, ToyConfig
from nanoredi.model.config import Qwen2Config
from nanoredi.model.qwen2 import Qwen2

NUM_OPS = 6
SAMPLES_A_PROBLEM = 4
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
LETTERS = "abcdefghijklmno"  # LETTERS[i] names the value after i operations
WORDS = ["<think>", "</think>", "\\boxed{", "}", "Wait", *"0123456789", *LETTERS, *"+-*=;~:"]
# The options that the toy sets itself.
_MADE = ("data", "watch", "sft.model", "sft.data", "sft.out", "sft.seed", "evaluate.benchmarks", "evaluate.data")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the toy knows the roles user and assistant') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tables_for(recipe: str | None, flags: Tables, stage: str) -> Tables:
    """The tables of the named recipe. If none is named: the toy's, or none for the user's own model, which gets the
    paper's defaults (the toy's learning rates would ruin a real model).

    Raises:
        UserError: for the user's own data without a model to train on it, and for a flag that has no effect.
    """
    given = flags.get(stage, {})
    tables = read_recipe(recipe or "toy") if recipe or not given.get("model") else {}
    config = {**tables.get(stage, {}), **given}
    names = [name if table == stage else f"{table}.{name}" for table, values in flags.items() for name in values]
    names += ["data"] if config.get("data") else []  # the recipe may name it
    for name in names:
        if config.get("model") and name.startswith(("toy.", "sft.")):
            raise UserError(f"--{name} has no effect with --model")
        if not config.get("model") and name in _MADE:
            raise UserError(f"--{name} has no effect on the toy: to train your own model, give --model DIR")
    return tables


def with_files(folder: Path, config: StageConfig, evaluation: EvaluateConfig) -> tuple[StageConfig, EvaluateConfig]:
    """A stage's config and its evaluation's, with the files that make() writes into a folder."""
    files = {"data": "sft.jsonl"} if isinstance(config, SftConfig) else {"data": "pairs.jsonl", "watch": "watch.jsonl"}
    config = replace(config, **{name: str(folder / file) for name, file in files.items()})
    return config, replace(evaluation, benchmarks=[str(folder / "toy.jsonl")])


@dataclass(frozen=True)
class Problem:
    start: int
    ops: tuple[tuple[str, int], ...]  # (sign, operand)

    @property
    def text(self) -> str:
        steps = [f"{LETTERS[i]}{sign}{operand}" for i, (sign, operand) in enumerate(self.ops, 1)]
        return f"a={self.start}" + "".join(steps)

    def step(self, i: int, value: int) -> str:
        """Operation i written out with a result."""
        sign, operand = self.ops[i]
        return f"{LETTERS[i + 1]}{sign}{operand}={value};"

    def apply(self, value: int, first: int, last: int) -> int:
        """The value after operations first to last - 1, from the value before them."""
        for sign, operand in self.ops[first:last]:
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        return value

    @property
    def answer(self) -> int:
        return self.apply(self.start, 0, len(self.ops))


def draw_problem(rng: random.Random) -> Problem:
    return Problem(rng.randrange(10), tuple((rng.choice("+-*"), rng.randint(2, 6)) for _ in range(NUM_OPS)))


def teach(problem: Problem, rng: random.Random) -> tuple[str, int]:
    """One trace of the teacher, and its answer."""
    out, value, i = ["<think>"], problem.start, 0
    while i < NUM_OPS:
        hasty = NUM_OPS - i >= 2 and rng.random() < (0.7 if problem.ops[i][0] == "*" else 0.2)
        if not hasty:
            value = problem.apply(value, i, i + 1)
            if rng.random() < 0.01:  # a slip
                value = _wrong(value, rng)
            out.append(problem.step(i, value))
            i += 1
            continue
        landing = min(NUM_OPS, i + rng.choice((2, 3)))
        right = problem.apply(value, i, landing)
        leapt = right if rng.random() < 0.5 else _wrong(right, rng)
        out.append(f"~{LETTERS[landing]}={leapt};")
        if leapt != right and rng.random() < 0.3:
            out.append(f"Wait{LETTERS[i]}={value};")
            for repaired in range(i, landing):
                value = problem.apply(value, repaired, repaired + 1)
                out.append(problem.step(repaired, value))
        else:
            value = leapt
        i = landing
    return "".join(out) + f"</think>\\boxed{{{value}}}", value


def _wrong(digit: int, rng: random.Random) -> int:
    return (digit + rng.randint(1, 9)) % 10


def make(folder: Path, config: ToyConfig, seed: int) -> None:
    """Write the task into a folder: sft.jsonl, pairs.jsonl, watch.jsonl (pairs), prompts.jsonl (stage 1's problems with
    their answers, for self-distillation), toy.jsonl (the held-out problems), and model/, a random Qwen2 with the toy's
    tokenizer. A folder that is not empty is complete, because it was renamed when it was, and is kept.

    Raises:
        UserError: if the sizes ask for more pairs than the problems give.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    rng = random.Random(seed)
    seen: set[Problem] = set()
    sft, pairs, prompts = [], [], []
    while len(sft) < config.sft_rows:
        problem = _unseen(seen, rng)
        traces = [teach(problem, rng) for _ in range(SAMPLES_A_PROBLEM)]
        chosen = next((text for text, value in traces if value == problem.answer), None)
        rejected = next((text for text, value in traces if value != problem.answer), None)
        if chosen:
            messages = [{"role": "user", "content": problem.text}, {"role": "assistant", "content": chosen}]
            sft.append({"messages": messages})
            prompts.append({"prompt": problem.text, "answer": str(problem.answer)})
            if rejected:
                pairs.append({"prompt": problem.text, "chosen": chosen, "rejected": rejected})
    wanted = config.pairs + config.watch_pairs
    if len(pairs) < wanted:
        raise UserError(
            f"toy.sft_rows {config.sft_rows} gives {len(pairs)} pairs; toy.pairs and toy.watch_pairs ask for {wanted}"
        )
    heldout = [_unseen(seen, rng) for _ in range(config.heldout)]

    with writing(folder) as beside:
        write_tokenizer(beside / "tokenizer")
        files: dict[str, list] = {"sft": sft, "pairs": pairs[: config.pairs], "watch": pairs[config.pairs : wanted]}
        files |= {"prompts": prompts, "toy": [{"problem": p.text, "answer": str(p.answer)} for p in heldout]}
        for name, rows in files.items():
            (beside / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sizes = Qwen2Config(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.08,  # with the usual 0.02 such a small model stays at chance
        )
        Qwen2(sizes, tokenizer_folder=beside / "tokenizer").init_weights(seed).save_pretrained(beside / "model")


def write_tokenizer(folder: Path) -> None:
    """Write the toy's tokenizer: one token for each of WORDS, and a chat template."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, WORDS))), behavior="isolated")
    backend.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _unseen(seen: set[Problem], rng: random.Random) -> Problem:
    while (problem := draw_problem(rng)) in seen:
        pass
    seen.add(problem)
    return problem
