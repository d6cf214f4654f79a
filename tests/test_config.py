"""Recipes and flags: which take precedence, what is refused and how, and which runs a folder may hold."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import save_file

from nanoredi.common.errors import UserError
from nanoredi.common.flags import _builtin_recipes, read_flags, read_recipe, resolve, write_recipe
from nanoredi.common.runs import check_model, dtype_of_run, open_run, recipe_of, weight_files
from nanoredi.config import EvaluateConfig, RediConfig, SftConfig, ToyConfig


def flags(*argv):
    return read_flags("", list(argv), "redi", RediConfig, others=("evaluate", "toy"))


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[redi]\nalpha = 0.5\nlr = 1\n[evaluate]\nn = 3\n")
    name, given = flags(
        "--recipe", str(path), "--alpha", "0.25", "--evaluate.benchmarks", "aime24", "my.jsonl", "--evaluate", "true"
    )
    config = resolve(RediConfig, "redi", read_recipe(name), given)
    assert (config.alpha, config.lr, config.batch_size, config.evaluate) == (0.25, 1.0, 32, True)
    evaluation = resolve(EvaluateConfig, "evaluate", read_recipe(name), given)
    assert (evaluation.n, evaluation.benchmarks) == (3, ["aime24", "my.jsonl"])
    assert flags("--evaluate", "--lr", "1")[1] == flags("--evaluate", "true", "--lr", "1")[1]
    again = flags("--evaluate.benchmarks", "a", "b", "--evaluate.benchmarks=c", "--lr", "1", "--lr", "2")[1]
    assert again == {"evaluate": {"benchmarks": ["a", "b", "c"]}, "redi": {"lr": 2.0}}


@pytest.mark.parametrize("name", _builtin_recipes())
def test_built_in_recipes_are_sound(name):
    assert set(read_recipe(name)) >= {"sft", "redi", "evaluate"}


def test_the_paper_s_recipe():
    tables = read_recipe("qwen2.5-math-1.5b")
    sft, redi = resolve(SftConfig, "sft", tables), resolve(RediConfig, "redi", tables)
    assert (sft.lr, sft.batch_size, sft.epochs, sft.max_tokens, sft.rope_theta, sft.max_position_embeddings) == (
        5e-5,
        128,
        5,
        32768,
        300000,
        32768,
    )
    assert (redi.lr, redi.alpha, redi.batch_size, redi.epochs, redi.max_prompt_tokens, redi.max_response_tokens) == (
        1e-6,
        0.8,
        32,
        1,
        800,
        19000,
    )
    for config in (sft, redi):
        assert (config.warmup, config.weight_decay, config.clip, config.save_every, config.seed) == (
            0.1,
            1e-4,
            1.0,
            200,
            42,
        )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--alhpa", "1"], r"there is no flag --alhpa \(did you mean '--alpha'\?\)"),
        (["-alpha", "1"], r"there is no flag -alpha \(did you mean '--alpha'\?\)"),
        (["--evaluate.m=4"], r"there is no flag --evaluate.m \(did you mean '--evaluate.n'\?\)"),
        (["runs"], "'runs' follows no flag"),
        (["--lr", "fast"], "--lr takes a number, not 'fast'"),
        (["--lr", "nan"], "--lr takes a number, not nan"),
        (["--lr", "inf"], "--lr takes a number, not inf"),
        (["--epochs", "1.5"], "--epochs takes a whole number, not '1.5'"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--lr", "-1e-6"], "--lr is -1e-06; it must be at least 0"),
        (["--clip", "0"], "--clip is 0.0; it must be above 0"),
        (["--warmup", "2"], "--warmup is 2.0; it must be at most 1"),
        (["--evaluate", "yes"], "--evaluate takes true or false, not 'yes'"),
        (
            ["--dtype", "bfloat"],
            r"--dtype takes auto or float32 or bfloat16, not 'bfloat' \(did you mean 'bfloat16'\?\)",
        ),
        (["--objective", "ppo"], "--objective takes redi or sft or dpo or simpo, not 'ppo'"),
        (["--beta", "0"], "--beta is 0.0; it must be above 0"),
        (["--alpha"], "--alpha: expected one argument"),
        (["--recipe", ""], "--recipe is empty: give it a value, or leave it out"),
        (["--model="], "--model is empty"),
        (["--evaluate.benchmarks", "a", ""], "--evaluate.benchmarks is empty"),
        (["--evaluate.batch_size", "2000000000"], "--evaluate.batch_size is 2000000000; it must be at most 65536"),
        (["--evaluate.cache_gb", "1e300"], r"cache_gb is 1e\+300; it must be at most 1000000.0"),
        (["--seed", "1" + "0" * 30], "--seed is 10*; it must be at most 2147483647"),
        (["--seed", "1" + "0" * 5000], "--seed takes a whole number, not '10"),
        (["--lr", "1" + "0" * 400], "--lr takes a number, not inf"),
    ],
)
def test_invalid_flags(argv, words):
    with pytest.raises(UserError, match=words):
        flags(*argv)


def test_a_tilde_is_the_home_folder_but_not_in_prose(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.toml").write_text("[redi]\nout = '~/run'\n")
    assert read_recipe("~/r.toml")["redi"]["out"] == flags("--out=~/run")[1]["redi"]["out"] == f"{tmp_path}/run"
    text = "~/{problem}"
    given = flags(f"--evaluate.template={text}", "--evaluate.benchmarks", text, "a")[1]["evaluate"]
    assert given == {"template": text, "benchmarks": [f"{tmp_path}/{{problem}}", "a"]}


@pytest.mark.parametrize(
    "text, words",
    [
        ("[redi]\nalpa = 1\n", r"\[redi\] has no key 'alpa' \(did you mean 'alpha'\?\)"),
        ("[rdi]\nalpha = 1\n", r"there is no table \[rdi\] \(did you mean 'redi'\?\)"),
        ("alpha = 1\n", r"there is no table \[alpha\]"),
        ("[redi]\nalpha = 'x'\n", "redi.alpha takes a number, not 'x'"),
        ("[redi]\nepochs = true\n", "redi.epochs takes a whole number, not True"),
        (
            "[redi]\nactivation_checkpointing = true\n",
            "redi.activation_checkpointing takes attention or products or off, not True",
        ),
        ("[evaluate]\nbenchmarks = 'math500'\n", "evaluate.benchmarks takes a list of one or more texts"),
        ("[evaluate]\nbenchmarks = [1]\n", "evaluate.benchmarks takes a list of one or more texts"),
        ("[evaluate]\nbenchmarks = ['a', './a']\n", "evaluate.benchmarks names a twice"),
        ("[evaluate]\nbenchmarks = []\n", r"evaluate.benchmarks takes a list of one or more texts, not \[\]"),
        ("[REDI]\nalpha = 1\n", r"there is no table \[REDI\] \(did you mean 'redi'\?\)"),
        ("[redi\n", "is not TOML"),
        ("[redi]\nmodel = " + "[" * 10**5, "is not TOML"),
        ('[redi]\nmodel = "a\\u0000"\n', "redi.model takes text, not "),
        ("[redi]\nlr = 1" + "0" * 400 + "\n", "redi.lr takes a number, not 10"),
    ],
)
def test_invalid_recipes(tmp_path, text, words):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize(
    "objective, want",
    [
        ("redi", (0.8, 0.0, None, None)),
        ("sft", (None, None, None, None)),
        ("dpo", (None, None, 0.001, None)),
        ("simpo", (None, None, 2.0, 1.0)),
    ],
)
def test_every_objective_has_its_own_parameters(tmp_path, objective, want):
    """Also over a recipe with another objective, and when read back from config.toml."""
    config = resolve(RediConfig, "redi", read_recipe("toy"), flags("--objective", objective)[1])
    assert (config.alpha, config.neg_weight_gamma, config.beta, config.gamma) == want
    write_recipe(tmp_path / "config.toml", {"redi": config})
    assert resolve(RediConfig, "redi", read_recipe(tmp_path / "config.toml")) == config


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--beta", "0.1"], "beta is a parameter of dpo and simpo; the objective is redi"),
        (["--objective", "dpo", "--alpha", "0.8"], "alpha is a parameter of redi; the objective is dpo"),
        (["--objective", "dpo", "--gamma", "0"], "gamma is a parameter of simpo; the objective is dpo"),
        (["--objective", "sft", "--neg_weight_gamma", "1"], "neg_weight_gamma is a parameter of redi; .* is sft"),
    ],
)
def test_another_objective_s_parameter_is_refused(argv, words):
    with pytest.raises(UserError, match=words):
        resolve(RediConfig, "redi", flags(*argv)[1])


def test_a_recipe_over_its_base(tmp_path):
    (tmp_path / "base.toml").write_text("[redi]\nobjective = 'dpo'\nbeta = 0.5\nlr = 1e-3\n[sft]\nepochs = 2\n")
    (tmp_path / "r.toml").write_text("base = 'base.toml'\n[redi]\nlr = 2e-3\n[evaluate]\nn = 3\n")
    assert read_recipe(tmp_path / "r.toml") == {
        "redi": {"objective": "dpo", "beta": 0.5, "lr": 2e-3},
        "sft": {"epochs": 2},
        "evaluate": {"n": 3},
    }
    (tmp_path / "s.toml").write_text("base = 'base.toml'\n[redi]\nobjective = 'simpo'\n")
    assert read_recipe(tmp_path / "s.toml")["redi"] == {"objective": "simpo", "lr": 1e-3}  # not DPO's beta
    (tmp_path / "t.toml").write_text("base = 's.toml'\n")
    with pytest.raises(UserError, match="s.toml: base is 'base.toml'; .* of a recipe that has no base itself"):
        read_recipe(tmp_path / "t.toml")
    (tmp_path / "u.toml").write_text("base = 1\n")
    with pytest.raises(UserError, match="u.toml: base is 1; it must be the name or file of a recipe"):
        read_recipe(tmp_path / "u.toml")


DPO_RATES = ("1e-6", "5e-7", "2e-7", "1e-7")


@pytest.mark.parametrize(
    "name, epochs, stage_2",
    [
        ("", 5, {"objective": "redi", "alpha": 0.8, "lr": 1e-6}),
        ("-3-epochs", 3, {"objective": "redi", "alpha": 0.8, "lr": 1e-6}),
        ("-alpha-0.2", 3, {"objective": "redi", "alpha": 0.2, "lr": 1e-6}),
        ("-alpha-0.5", 3, {"objective": "redi", "alpha": 0.5, "lr": 1e-6}),
        ("-symmetric", 3, {"objective": "redi", "alpha": 1.0, "lr": 2e-7}),
        ("-symmetric-high-rate", 3, {"objective": "redi", "alpha": 1.0, "lr": 1e-6}),
        ("-dpo", 3, {"objective": "dpo", "alpha": None, "beta": 0.001, "lr": 2e-7}),
        ("-simpo", 3, {"objective": "simpo", "alpha": None, "beta": 2.0, "gamma": 1.0, "lr": 5e-7}),
        ("-alpha-0.5-lr-2e-6", 3, {"objective": "redi", "alpha": 0.5, "lr": 2e-6}),
        ("-symmetric-lr-1e-7", 3, {"objective": "redi", "alpha": 1.0, "lr": 1e-7}),
        *((f"-dpo-0.01-lr-{lr}", 3, {"objective": "dpo", "beta": 0.01, "lr": float(lr)}) for lr in DPO_RATES),
        ("-dpo-0.1-lr-1e-6", 3, {"objective": "dpo", "beta": 0.1, "lr": 1e-6}),
        ("-dpo-0.1-lr-1e-7", 3, {"objective": "dpo", "beta": 0.1, "lr": 1e-7}),
        ("-dpo-0.1-lr-1e-8", 3, {"objective": "dpo", "beta": 0.1, "lr": 1e-8}),
        ("-simpo-10", 3, {"objective": "simpo", "alpha": None, "beta": 10.0, "gamma": 5.0, "lr": 3e-7}),
    ],
)
def test_the_recipes_of_the_paper_s_comparison(name, epochs, stage_2):
    tables = read_recipe(f"qwen2.5-math-1.5b{name}")
    sft, redi = resolve(SftConfig, "sft", tables), resolve(RediConfig, "redi", tables)
    assert sft.epochs == epochs and {key: getattr(redi, key) for key in stage_2} == stage_2
    # Everything else comes from the base.
    base = read_recipe("qwen2.5-math-1.5b")
    assert {**vars(sft), "epochs": 5} == vars(resolve(SftConfig, "sft", base))
    own = {f.name for f in dataclasses.fields(RediConfig) if f.metadata["of"]}
    same = vars(resolve(RediConfig, "redi", base)).keys() - {"objective", "lr", *own}
    assert all(getattr(redi, key) == getattr(resolve(RediConfig, "redi", base), key) for key in same)


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"there is no recipe toi \(did you mean 'toy'\?\)"):
        read_recipe("toi")
    with pytest.raises(UserError, match="there is no recipe ~nobody-by-this-name/r.toml$"):
        read_recipe("~nobody-by-this-name/r.toml")


def test_a_written_recipe_reads_back(tmp_path):
    config = EvaluateConfig(benchmarks=['a "quoted" \\ path\n\x7f\x1b', "ü😀"], data="", temperature=1e-7, n=2)
    write_recipe(tmp_path / "config.toml", {"evaluate": config, "toy": ToyConfig()})
    assert resolve(EvaluateConfig, "evaluate", read_recipe(tmp_path / "config.toml")) == config


def test_a_model_s_recipe_is_its_run_s(tmp_path):
    write_recipe(tmp_path / "config.toml", {"toy": ToyConfig(pairs=7)})
    assert recipe_of(tmp_path / "final") == {}  # a config.toml without metrics.jsonl is not a run's
    (tmp_path / "metrics.jsonl").touch()
    assert recipe_of(tmp_path / "final")["toy"]["pairs"] == 7
    assert recipe_of(tmp_path / "other" / "final") == {}


def test_which_runs_a_folder_may_hold(tmp_path):
    out, config = str(tmp_path / "run"), RediConfig(alpha=0.5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").touch()  # a file manager has looked into it
    assert open_run(out, {"redi": config}) is False
    assert open_run(out, {"redi": config}) is False  # nothing but config.toml is there yet
    assert open_run(out, {"redi": RediConfig(alpha=0.7)}) is False  # so another run may start there
    assert open_run(out, {"redi": config}) is False
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds another run: redi.alpha is 0.5 there and 0.8 here"):
        open_run(out, {"redi": RediConfig()})
    assert open_run(out, {"redi": config}) is False  # interrupted: it resumes
    # Options that do not change the result may differ.
    assert open_run(out, {"redi": RediConfig(alpha=0.5, shard_size=8, max_tokens_per_micro_batch=9)}) is False
    (tmp_path / "run" / "state" / "step-000010").mkdir(parents=True)
    assert open_run(out, {"redi": config}) is False
    assert (tmp_path / "run" / "state" / "step-000010").exists()
    # Killed after the final model was renamed and before the states were removed: they are removed now.
    (tmp_path / "run" / "final").mkdir()
    assert open_run(out, {"redi": config}) is False  # an empty folder is not a model
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="final is not a complete model .*: move it away"):
        open_run(out, {"redi": config})
    save_file({"w": torch.zeros(9)}, tmp_path / "run" / "final" / "model.safetensors")
    assert open_run(out, {"redi": config}) is True
    names = [".DS_Store", ".lock", "config.toml", "final", "metrics.jsonl"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    (tmp_path / "run" / "final" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="final is not a complete model .*: move it away"):
        open_run(out, {"redi": config})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="not an empty folder and holds no nanoredi run"):
        open_run(str(tmp_path / "mine"), {"redi": config})
    (tmp_path / "mine" / "thesis.txt").rename(tmp_path / "mine" / "config.toml")  # or a recipe of the user's
    with pytest.raises(UserError, match="not an empty folder and holds no nanoredi run"):
        open_run(str(tmp_path / "mine"), {"redi": config})
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["dear"]
    (tmp_path / "mine" / "config.toml").write_text("[redi]\nalpha = 0.5\n")  # which asks for this very run
    (tmp_path / "mine" / "pairs.jsonl").touch()
    with pytest.raises(UserError, match="not an empty folder and holds no nanoredi run"):
        open_run(str(tmp_path / "mine"), {"redi": config})
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.toml", "pairs.jsonl"]
    with pytest.raises(UserError, match="--out"):
        open_run("", {"redi": config})


def test_a_run_s_folder_by_another_path(tmp_path, monkeypatch):
    def config(out, model):
        benchmarks = EvaluateConfig(benchmarks=[f"{out}/data/toy.jsonl", "math500"])
        return {"redi": RediConfig(out=out, model=model, data=f"{out}/data/pairs.jsonl"), "evaluate": benchmarks}

    monkeypatch.chdir(tmp_path)
    open_run("run", config("run", "run/sft/final"))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    whole = str(tmp_path / "run")
    assert open_run(whole, config(whole, f"{whole}/sft/final")) is False
    (tmp_path / "run").rename(tmp_path / "moved")
    assert open_run("moved", config("moved", "moved/sft/final")) is False
    (tmp_path / "run" / "sft" / "final").mkdir(parents=True)  # another run where the first one was
    (tmp_path / "moved" / "sft" / "final").mkdir(parents=True)
    for model in ("final", "moved/sft", "moved/sft/final", "other/sft/final"):
        with pytest.raises(UserError, match="redi.model is 'run/sft/final' there"):
            open_run("moved", config("moved", model))


def test_a_template_needs_a_slot_for_the_problem():
    for template in ("", "paper", "plain", "Solve {problem}!"):
        assert resolve(EvaluateConfig, "evaluate", {"evaluate": {"template": template}}).template == template
    with pytest.raises(
        UserError, match=r"--template takes paper, plain, or a text with \{problem\} where.* not 'papre'"
    ):
        resolve(EvaluateConfig, "evaluate", {"evaluate": {"template": "papre"}})


@pytest.mark.parametrize(
    "given, files, words",
    [
        ("Qwen/Qwen2.5-Math-1.5B", [], "--local-dir Qwen2.5-Math-1.5B; then give Qwen2.5-Math-1.5B"),
        ("https://huggingface.co/Qwen/Qwen2-7B", [], "hf download Qwen/Qwen2-7B --local-dir Qwen2-7B"),
        ("runs/nowhere", ["runs/a/config.json"], "there is no folder runs/nowhere; give the one that holds"),
        ("nowhere", [], "there is no folder nowhere; give the one that holds the model's config.json"),
        ("m/x.gguf", ["m/x.gguf"], "m/x.gguf is a file; give the folder"),
        (
            "run",
            ["run/config.toml", "run/final/config.json", "run/step-000002/config.json"],
            "run is not a model's folder: give run/final,",
        ),
        (
            "run",
            ["run/config.toml", "run/step-000002/config.json"],
            "run is not a model's folder: give run/step-000002$",
        ),
        (
            "hub/models--a--b",
            ["hub/models--a--b/snapshots/c0/config.json"],
            "b is not a model's folder: give hub/models--a--b/snapshots/c0",
        ),
        (
            "hub",
            ["hub/models--a--b/snapshots/c0/config.json"],
            "hub is not a model's folder: give hub/models--a--b/snapshots/c0",
        ),
        ("runs", ["runs/a/final/config.json"], "runs is not a model's folder: give runs/a/final"),
        ("m", ["m/adapter_config.json"], "m has no config.json; it holds only an adapter"),
        ("m", ["m/model.safetensors"], "m has no config.json; it is not a model's folder"),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(given, files, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=words):
        check_model(given)


def test_a_model_s_folder_is_accepted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert check_model(str(tmp_path)) == check_model(f"{tmp_path}/./") == str(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no model.safetensors and no model.safetensors.index.json$"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="a .bin can run code when it is read: save it as safetensors"):
        weight_files(tmp_path)
    (tmp_path / "adapter_config.json").touch()  # some trainers also write config.json beside an adapter
    with pytest.raises(UserError, match="no model.safetensors and no .*; it holds only an adapter: merge it"):
        weight_files(tmp_path)


def test_a_run_resumes_in_its_dtype(tmp_path):
    out = str(tmp_path / "run")
    assert dtype_of_run(out, "redi") == "auto"
    for began in ("auto", "bfloat16"):  # older versions did not write the resolved dtype
        shutil.rmtree(out, ignore_errors=True)
        open_run(out, {"redi": RediConfig(dtype=began)})
        (tmp_path / "run" / "metrics.jsonl").touch()
        assert dtype_of_run(out, "redi") == began and dtype_of_run(out, "sft") == "auto"
        assert not open_run(out, {"redi": RediConfig(dtype="bfloat16")})
    with pytest.raises(UserError, match="redi.dtype is 'bfloat16' there and 'float32' here"):
        open_run(out, {"redi": RediConfig(dtype="float32")})
