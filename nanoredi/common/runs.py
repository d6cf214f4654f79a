"""A run's folder: starting or resuming a run in it, finding the models in it, and checking that a model is complete.

The folder holds config.toml (all resolved options), metrics.jsonl (one row per step), Hugging Face folders such as
step-000200/ and final/, and results.json if the run was evaluated.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nanoredi.common.disk import lock, regular, remove
from nanoredi.common.errors import UserError
from nanoredi.common.files import check, parse_json, read_json
from nanoredi.common.flags import Tables, read_recipe, resolve, write_recipe

_PATHS = {"model", "data", "watch", "cache", "benchmarks"}  # options with paths (a benchmark's name has no dot)
INDEX = "model.safetensors.index.json"
_ADAPTER = "it holds only an adapter: merge it into its base model, and give that one"


def open_run(out: str, configs: dict[str, Any]) -> bool:
    """Take the folder `out` for a run with the options {table: dataclass}, and lock it. Call on one rank.

    Nothing is overwritten. Half-written files of a killed process are removed, and a finished run's resume states.

    Returns:
        True when the folder holds this very run, finished; False when training may begin or resume.

    Raises:
        UserError: when no folder is named, when it holds anything else, and when another process has locked it.
    """
    if not out:
        raise UserError("the run needs a folder: give --out DIR")
    folder = Path(out)
    path = folder / "config.toml"
    # A run locks its folder before it writes config.toml, and a copy without hidden files has metrics.jsonl.
    is_run = path.exists() and any((folder / name).exists() for name in (".lock", "metrics.jsonl"))
    if os.path.lexists(folder) and not is_run and (not folder.is_dir() or path.exists() or _contents(folder)):
        raise UserError(f"{out} is not an empty folder and holds no nanoredi run: give another --out")
    lock(folder)
    # A run that ended at bad input has left only its config.toml, and may be followed by a different run.
    if path.exists() and _contents(folder):
        _refuse_another_run(path, configs)
        if holds_model(folder / "final"):
            remove(folder / "state")
            return True
    else:
        write_recipe(path, configs)
    return False


def _contents(folder: Path) -> list[Path]:
    """What a folder holds besides the files that every run starts with, and hidden ones (.DS_Store, .gitkeep)."""
    return [path for path in folder.iterdir() if not path.name.startswith((".", "config.toml"))]


def _refuse_another_run(path: Path, configs: dict[str, Any]) -> None:
    before = read_recipe(path)
    out = _out(before) or path.parent
    for table, config in configs.items():
        then = resolve(type(config), table, before)
        for f in dataclasses.fields(config):
            old, new = getattr(then, f.name), getattr(config, f.name)
            undecided = f.name == "dtype" and old == "auto"  # of an older version; the state has the dtype
            same = old == new or f.name in _PATHS and _same(old, new, out, path.parent)
            if not (same or f.metadata["free"] or undecided):
                raise UserError(
                    f"{path.parent} holds another run: {table}.{f.name} is {old!r} there and {new!r} here; "
                    "give another --out"
                )


def _same(old: Any, new: Any, out: str | Path, folder: Path) -> bool:
    """Whether two paths, or lists of paths, are the same place. `old` was given when the run's folder was `out`; if the
    folder has moved to `folder` since, the path may have moved with it."""
    if isinstance(old, list):
        return len(old) == len(new) and all(_same(a, b, out, folder) for a, b in zip(old, new))
    if old == new or not (old and new):
        return old == new
    if os.path.exists(old) and os.path.exists(new):
        return os.path.samefile(old, new)
    moved = os.path.relpath(old, out) == os.path.relpath(new, folder)
    return moved and os.path.isabs(old) == os.path.isabs(out) and not os.path.exists(old)


def dtype_of_run(out: str, table: str) -> str:
    """The compute dtype that the run in a folder was started with; auto if there is no run."""
    path = Path(out) / "config.toml"
    return read_recipe(path).get(table, {}).get("dtype", "auto") if path.exists() else "auto"


def recipe_of(model: str | Path) -> Tables:
    """The recipe of the run that a model's folder belongs to; empty if there is none. Its relative paths, which start
    from where the run was started, are changed to start from here, if they still exist at the same place."""
    folder = Path(model).parent
    is_run = (folder / "config.toml").exists() and (folder / "metrics.jsonl").exists()
    tables = read_recipe(folder / "config.toml") if is_run else {}
    out = _out(tables)

    def moved(path: str) -> str:
        here = os.path.relpath(folder / os.path.relpath(path, out))
        return path if os.path.isabs(path) or not os.path.exists(here) else here

    if out and not Path(out).is_absolute():
        for values in tables.values():
            for name in _PATHS & values.keys():
                if isinstance(value := values[name], list):
                    values[name] = [moved(one) if "." in one else one for one in value]
                else:
                    values[name] = value and moved(value)
    return tables


def _out(tables: Tables) -> str:
    """The `out` folder that a run's recipe names; empty if it names none."""
    return next((tables[name]["out"] for name in ("redi", "sft") if tables.get(name, {}).get("out")), "")


def models_along(run: Path) -> dict[str, Path]:
    """{name in a table: folder} of those models of a run that exist: the initial one, every step-*, and the final one.

    Raises:
        UserError: when there is no run, or none of its own models exists.
    """
    tables = recipe_of(run / "final")
    if not tables:
        raise UserError(f"{run} is not a run's folder: it has no config.toml or no metrics.jsonl")
    stage = tables.get("redi") or tables.get("sft", {})
    start, final = ("SFT", final_name(stage.get("objective", "redi"))) if "redi" in tables else ("start", "final")
    steps = {path.name: path for path in saved_steps(run).values()}
    own = {name: path for name, path in {**steps, final: run / "final"}.items() if holds_model(path)}
    if not own:
        raise UserError(f"the run {run} has not saved a model yet")
    before = stage.get("model")
    return {**({start: Path(before)} if before and holds_model(Path(before)) else {}), **own}


def saved_steps(folder: Path) -> dict[int, Path]:
    """{step: folder} of what was saved along a run, its models or its states, from the first step to the last."""
    found = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    return dict(sorted(found.items()))


def final_name(objective: str) -> str:
    """The name in tables of stage 2's final model; the initial model is SFT."""
    return "SFT continued" if objective == "sft" else objective.upper()


def check_model(folder: str, file: str = "config.json") -> str:
    """The folder, without a slash at its end, if it contains `file`.

    Raises:
        UserError: if it does not, saying what the folder is instead, and what would help.
    """
    path = Path(folder)
    if (path / file).exists():
        return str(path)
    if path.is_file():
        raise UserError(f"{folder} is a file; give the folder that holds it beside the model's {file}")
    if not path.exists():
        help = f"give the one that holds the model's {file}"
        name = re.search(r"^(?:https?://[\w.]+/)?(\w[\w.-]*/(\w[\w.-]*))/?$", folder)
        if name and not path.parent.is_dir():
            help = f"if it is on the hub: hf download {name[1]} --local-dir {name[2]}; then give {name[2]}"
        raise UserError(f"there is no folder {folder}; {help}")
    # Look for a run's final/, the hub's models--*/snapshots/*/, or either a few folders further down.
    found = [f for depth in range(1, 5) for f in path.glob("*/" * depth + file)]
    found.sort(key=lambda f: (f == path / "final" / file, f.stat().st_mtime), reverse=True)
    if not found:
        known = {"adapter_config.json": _ADAPTER, "config.json": "copy the one of the model that it was made from"}
        help = next((text for name, text in known.items() if (path / name).exists()), "it is not a model's folder")
        raise UserError(f"{folder} has no {file}; {help}")
    more = f", or another of the {len(found)} in it" if len(found) > 1 else ""
    raise UserError(f"{folder} is not a model's folder: give {found[0].parent}{more}")


def holds_model(folder: Path) -> bool:
    """Whether the folder holds a complete model; False if it is empty or missing.

    Raises:
        UserError: when it holds anything else.
    """
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    try:
        read_json(folder / "config.json")
        open_weights(folder)
    except UserError as error:
        raise UserError(f"{folder} is not a complete model ({error}): move it away and start again") from None
    return True


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights."""
    single = folder / "model.safetensors"
    if (folder / INDEX).exists():
        weight_map = check(str(folder / INDEX), read_json(folder / INDEX), {"weight_map": {str: str}})["weight_map"]
        # An index comes from elsewhere: a path in it must not lead out of the folder.
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        if single.exists() and single not in files:
            raise UserError(f"{folder} has weights in {single.name} and others in {INDEX}'s files: keep one of them")
        return files
    if not single.exists():
        help = "; a .bin can run code when it is read: save it as safetensors" * any(folder.glob("*.bin"))
        help = f"; {_ADAPTER}" if (folder / "adapter_config.json").exists() else help
        raise UserError(f"{folder} has no model.safetensors and no {INDEX}{help}")
    return [single]


def open_weights(folder: Path) -> dict[str, Any]:
    """{weight's name: its open safetensors file}. Opening a file checks its length, so a truncated file is found here.

    Raises:
        UserError: naming the file that is missing or broken.
    """
    files: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            open(path, "rb").close()  # of a file that may not be read, safetensors says that there is none
            handle = safe_open(regular(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the weights {path}: {getattr(error, 'strerror', None) or error}") from None
        files.update((name, handle) for name in handle.keys())
    return files


_ROW = {"step": range(1, 2**31), str: (float, bool, None)}


def metrics_row(where: str, line: str) -> dict[str, Any]:
    """Parse a line of metrics.jsonl. Raises a UserError naming `where` for anything else."""
    return check(where, parse_json(where, line), _ROW)


def newest_model(root: str = "runs") -> str:
    """The newest final model under root. Raises a UserError if there is none."""
    configs = sorted(Path(root).glob("**/final/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise UserError(f"there is no model under {root}/ yet: train one (python train_redi.py) or give --model DIR")
    return str(configs[-1].parent)
