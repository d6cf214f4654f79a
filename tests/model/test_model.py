"""The model against transformers, packed sequences against separate ones, folders in and out, and what is refused."""

import json
import shutil
from collections import Counter

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from nanoredi import toy
from nanoredi.common.errors import UserError
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.kernels.layers import PRODUCTS
from nanoredi.model import hf_folder as checkpoint
from nanoredi.model.attention import ATTENTION
from nanoredi.model.qwen2 import Qwen2


def logps_of(model: Qwen2, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probs (n, V) of each sequence, all packed into one forward."""
    with torch.no_grad():
        hidden = model(*tiny.packed(ids))
        return (hidden @ model.lm_head_weight.T).log_softmax(-1).split([len(x) for x in ids])


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model with untied embeddings."""
    tiny.tiny_model(tied=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_logps_equal_the_golden_ones_of_transformers(kind):
    golden = json.loads(tiny.GOLDEN.read_text())[kind]
    ids = tiny.sequences()
    for lp, x, want in zip(logps_of(tiny.tiny_model(kind == "tied"), ids), ids, golden):
        got = lp[:-1].gather(1, x[1:, None]).squeeze(1)
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_logps_equal_transformers_on_the_saved_folder(tied, shard_bytes, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed; the golden log-probs stand in")
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", shard_bytes)
    model = tiny.tiny_model(tied)
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    for got, want in zip(logps_of(model, tiny.sequences()), tiny.transformers_logps(tmp_path / "m")):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_computes_the_same(tied, version):
    model, ids = tiny.tiny_model(tied).pack(), tiny.sequences()
    for got, want in zip(logps_of(model, ids), logps_of(tiny.tiny_model(tied), ids)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError):
        model(*tiny.packed(ids)).sum().backward()


def test_packed_sequences_do_not_see_each_other():
    model, ids = tiny.tiny_model(tied=True), tiny.sequences()
    for got, x in zip(logps_of(model, ids), ids):
        torch.testing.assert_close(got, logps_of(model, [x])[0], atol=1e-5, rtol=0)


def test_loss_is_the_weighted_sum_of_logps():
    model, ids = tiny.tiny_model(tied=False), tiny.sequences()
    input_ids, position_ids, cu_seqlens = tiny.packed(ids)
    targets, weights = torch.randint(0, 97, input_ids.shape), torch.randn(input_ids.shape)
    weights[::3] = 0
    loss, logps = model.loss(input_ids, position_ids, cu_seqlens, targets, weights)
    want = torch.cat(logps_of(model, ids)).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps, torch.where(weights == 0, 0, want), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, (weights * want).sum(), atol=1e-4, rtol=0)


class Calls(TorchDispatchMode):
    """How often each operation has run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(model: Qwen2, activation_checkpointing: str) -> tuple[list[torch.Tensor], Counter]:
    """The gradients of a forward and backward, and how often each operation ran."""
    for block in model.model.layers:
        block.activation_checkpointing = activation_checkpointing
    input_ids, position_ids, cu_seqlens = tiny.packed(tiny.sequences())
    with Calls() as mode:
        model.loss(input_ids, position_ids, cu_seqlens, input_ids, torch.ones(len(input_ids)))[0].backward()
    return [p.grad for p in model.parameters()], mode.counts


# In each of the two blocks: the linear layers with a bias (q, k, v), those without, and the activation.
@pytest.mark.parametrize("kept, addmm, mm, silu", [("attention", 3, 3, 1), ("products", 0, 0, 1)])
def test_activation_checkpointing_changes_no_gradient_and_recomputes_what_it_says(kept, addmm, mm, silu, plain):
    grads, calls = zip(*(calls_of_a_step(tiny.tiny_model(tied=True), setting) for setting in ("off", kept)))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    repeated = {op: calls[1][op] - calls[0][op] for op in (aten.addmm.default, aten.mm.default, aten.silu.default)}
    assert list(repeated.values()) == [2 * addmm, 2 * mm, 2 * silu]
    assert calls[0][attention] == calls[1][attention] == 2 * len(tiny.LENGTHS)


@pytest.mark.parametrize("kept", ["attention", "products"])
@pytest.mark.parametrize("mlp_size", [200, 128, 80])
def test_activation_checkpointing_of_any_mlp(mlp_size, kept, version):
    """With this machine's attention and products; down_proj may narrow, widen or do neither."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = tiny.tiny_config(hidden_size=128, intermediate_size=mlp_size, **sizes)
    (want, calls_off), (got, calls) = (
        calls_of_a_step(Qwen2(config).init_weights(0), setting) for setting in ("off", kept)
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    again = {op.name(): calls[op] - calls_off[op] for op in calls}
    assert not any(again.get(name) for name in ATTENTION)
    if kept == "products":
        assert not any(again.get(name) for name in PRODUCTS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_saved_and_loaded_again_is_the_same(tied, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", shard_bytes)
    model = tiny.tiny_model(tied)
    model.save_pretrained(tmp_path / "m")
    again = Qwen2.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    if shard_bytes < 10**9:
        files = sorted((tmp_path / "m").glob("model-*.safetensors"))
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
        assert all(f.stat().st_size < 25_000 for f in files)
        shutil.copy(files[0], tmp_path / "m" / "model.safetensors")
        with pytest.raises(UserError, match="weights in model.safetensors and others in model.safetensors.index.json"):
            Qwen2.from_pretrained(tmp_path / "m")


def test_all_weights_are_gathered_before_any_is_written(tmp_path, monkeypatch):
    """Other ranks wait in the gathering, which would time out during a long write."""
    did, whole, save = [], checkpoint._whole, checkpoint.save_file
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    monkeypatch.setattr(checkpoint, "_whole", lambda weight: did.append("gather") or whole(weight))
    monkeypatch.setattr(checkpoint, "save_file", lambda *args, **told: did.append("write") or save(*args, **told))
    tiny.tiny_model(tied=True).save_pretrained(tmp_path / "m")
    assert did == sorted(did) and did.count("write") > 1


def test_weights_are_mapped_from_the_file(folder):
    model = Qwen2.from_pretrained(folder)
    with open("/proc/self/maps") as maps:
        spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps if str(folder) in line]
    assert spans and all(any(a <= p.data_ptr() < b for a, b in spans) for p in model.parameters())


def test_overrides_are_used_and_saved(folder, tmp_path):
    model = Qwen2.from_pretrained(folder, rope_theta=5e5, max_position_embeddings=4096)
    model.save_pretrained(tmp_path / "longer")
    saved = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert (saved["rope_theta"], saved["max_position_embeddings"]) == (5e5, 4096)
    assert not torch.equal(
        logps_of(model, tiny.sequences())[1], logps_of(Qwen2.from_pretrained(folder), tiny.sequences())[1]
    )
    with pytest.raises(TypeError, match="rope_teta"):
        Qwen2.from_pretrained(folder, rope_teta=1.0)


ROPE = {"rope_type": "default", "rope_theta": 1234.0}


@pytest.mark.parametrize(
    "tables",
    [{"rope_parameters": ROPE}, {"rope_scaling": ROPE}, {"rope_parameters": ROPE, "rope_scaling": {"type": "default"}}],
)
def test_rope_theta_of_any_transformers_layout(folder, tables):
    edit_config(folder, rope_theta=None, **tables)
    assert Qwen2.from_pretrained(folder).config.rope_theta == 1234.0


def test_tokenizer_files_and_stop_tokens_are_saved(toy_data, tmp_path):
    model = Qwen2.from_pretrained(toy_data / "model")
    model.save_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [
        toy.SPECIAL.index("<eos>")
    ]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert Qwen2.from_pretrained(tmp_path / "m").lm_head_weight.dtype == torch.bfloat16


def test_stop_tokens_of_config_json_count_without_a_generation_config(toy_data, tmp_path):
    shutil.copytree(toy_data / "model", tmp_path / "m")
    edit_config(tmp_path / "m", eos_token_id=[5, 7])
    own = checkpoint.stop_ids(Tokenizer(tmp_path / "m"))
    assert 5 not in own
    (tmp_path / "m" / "generation_config.json").unlink()
    assert checkpoint.stop_ids(Tokenizer(tmp_path / "m")) == sorted({*own, 5, 7})


def test_nothing_is_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        tiny.tiny_model(tied=True).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, "model_type is 'llama'; it must be 'qwen2'"),
        ({"use_sliding_window": True}, "plain Qwen2: use_sliding_window is True; it must be False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'; it must"),
        ({"rope_parameters": {"type": "linear", "factor": 4.0}}, "rope_parameters.type is 'linear'; it must"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor is 4.0; it must"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5; it must"),
        ({"model_type": None}, "plain Qwen2: the object has no field 'model_type'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; it must be 0.0"),
        ({"is_causal": False}, "is_causal is False; it must be True"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_attention_heads": 5}, "do not divide"),
        ({"vocab_size": None}, "config.json: its vocab_size takes a whole number, not None"),
        (
            {"vocab_size": 98},
            r"model.embed_tokens.weight has the shape \(97, 48\); its config.json asks for \(98, 48\)",
        ),
        ({"num_hidden_layers": 3}, "lacks the weights model.layers.2"),
        ({"num_hidden_layers": 1}, "no place for: model.layers.1"),
        (
            {"tie_word_embeddings": True},
            "lm_head.weight differs from model.embed_tokens.weight: set tie_word_embeddings",
        ),
    ],
)
def test_anything_but_this_qwen2_is_refused_by_name(folder, changes, words):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=words):
        Qwen2.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},  # Qwen2.5 as published
        {"rope_scaling": None, "head_dim": 8, "quantization_config": None, "is_causal": None},
        {"tie_word_embeddings": None, "attention_dropout": None, "rope_parameters": {"partial_rotary_factor": 1.0}},
    ],
)
def test_settings_without_effect_are_not_refused(folder, changes):
    edit_config(folder, **changes)
    Qwen2.from_pretrained(folder)


def test_weights_under_other_names_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{name}": weight for name, weight in weights.items()}, folder / "model.safetensors")
    with pytest.raises(
        UserError, match="lacks the weights lm_head.weight, .* more; it holds _orig_mod.lm_head.weight, "
    ):
        Qwen2.from_pretrained(folder)


def test_a_redundant_tied_head_is_fine(tmp_path):
    tiny.tiny_model(tied=True).save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        tmp_path / "m" / "model.safetensors",
    )
    Qwen2.from_pretrained(tmp_path / "m")


def test_broken_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder .*nowhere; give the one"):
        Qwen2.from_pretrained(tmp_path / "nowhere")
    shutil.copytree(folder, tmp_path / "torn")
    torn = tmp_path / "torn" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot read the weights .*torn"):
        Qwen2.from_pretrained(tmp_path / "torn")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "loop"}}')
    (folder / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot read the weights .*loop: Too many levels of symbolic links$"):
        Qwen2.from_pretrained(folder)
    index.unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        Qwen2.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        Qwen2.from_pretrained(folder)
