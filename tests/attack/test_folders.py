"""Model folders by mutation of a whole one: they load, or end in one sentence."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoredi.common.errors import UserError
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.hf_folder import stop_ids
from nanoredi.model.qwen2 import Qwen2

VALUES = [None, True, "", "96", "\x1b[2J", 0, -1, 1, 3, 10**9, 10**30, 0.5, -1e-9, 1e300, [], [1], ["a"], {}, {"a": 1}]
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts dropped, added or made another."""
    value = copy.deepcopy(value)
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    way = rng.random()
    if way < 0.15:
        del value[key]
    elif way < 0.25 and isinstance(value, dict):
        value[rng.choice(["rope_scaling", "rope_parameters", "layer_types", "head_dim", "x"])] = rng.choice(VALUES)
    else:
        value[key] = mutated(value[key], rng)
    return value


def mutate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if rng.random() < 0.15:
        return path.write_bytes(data[: rng.randrange(len(data))]) and None
    if rng.random() < 0.1:
        place = rng.randrange(len(data))
        return path.write_bytes(data[:place] + rng.randbytes(3) + data[place + 3 :]) and None
    if path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(data), rng)))
        return None
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(mutated(json.loads(data[8 : 8 + length]), rng)).encode()
    if rng.random() < 0.3:
        name = rng.choice(["I64", "BOOL", "F16", "C64", "I32", "U8"]).encode()
        header = data[8 : 8 + length].replace(b'"F32"', b'"' + name + b'"', 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_mutated_model_folder_loads_or_ends_in_a_sentence(count, toy_data, tmp_path):
    rng, refused = random.Random(count), 0
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(toy_data / "model", folder)
        mutate(folder / rng.choice(FILES), rng)
        try:
            model = Qwen2.from_pretrained(folder)
            stop_ids(Tokenizer(folder))
            ids = torch.zeros(3, dtype=torch.int64)
            model(ids, torch.arange(3), torch.tensor([0, 3], dtype=torch.int32))
            model.save_pretrained(folder / "again")
        except UserError as error:
            refused += 1
            assert str(error) and "\n" not in str(error), number
        shutil.rmtree(folder)
    assert refused > count // 4
