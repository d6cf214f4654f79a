"""Model folders by mutation of a whole one: they load, or end in one sentence."""

import json
import random
import shutil
from pathlib import Path

import torch
from mutation import break_file, end, limits, mutated

from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.hf_folder import stop_ids
from nanoredi.model.qwen2 import Qwen2

FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
FILES += ("chat_template.jinja", "model.safetensors.index.json")
NAMES = ("rope_scaling", "rope_parameters", "layer_types", "head_dim", "sliding_window", "eos_token_id", "weight_map")
DTYPES = (b"I64", b"BOOL", b"F16", b"C64", b"I32", b"U8", b"F8_E4M3")


def break_folder(folder: Path, rng: random.Random) -> None:
    """Mutate one of a folder's files: of the weights their header, or how long that is said to be."""
    path = folder / rng.choice(FILES)
    if path.suffix != ".safetensors" or rng.random() < 0.3:
        return break_file(path, rng, NAMES)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if rng.random() < 0.3:
        header = header.replace(b'"F32"', b'"' + rng.choice(DTYPES) + b'"', 1)
    else:
        header = json.dumps(mutated(json.loads(header), rng)).encode()
    told = rng.choice([len(header)] * 8 + [0, 2**31, 2**63])
    path.write_bytes(told.to_bytes(8, "little") + header + data[8 + length :])


def use(folder: Path) -> None:
    model = Qwen2.from_pretrained(folder)
    stop_ids(Tokenizer(folder))
    ids = torch.zeros(3, dtype=torch.int64)
    model(ids, torch.arange(3), torch.tensor([0, 3], dtype=torch.int32))
    model.save_pretrained(folder / "again")


def test_a_mutated_model_folder_loads_or_ends_in_a_sentence(share, toy_data, hasty, tmp_path):
    rng, ends, whole = random.Random(share), [], tmp_path / "whole"
    shutil.copytree(toy_data / "model", whole)
    config = json.loads((whole / "tokenizer_config.json").read_text())
    (whole / "chat_template.jinja").write_text(config["chat_template"])
    weight_map = dict.fromkeys(Qwen2.from_pretrained(whole).state_dict(), "model.safetensors")
    (whole / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for number in range(share * 150):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        break_folder(folder, rng)
        try:
            with limits():
                ends.append(end(lambda: use(folder)))
        except BaseException as error:
            error.add_note(f"folder {number}")
            raise
        shutil.rmtree(folder)
    refused = [text for text in ends if text]
    print(f"{len(ends)} tried, {len(refused)} ended in a sentence")
    assert len(ends) // 4 < len(refused) < len(ends)
