"""The folder of a run: taken for a new one, known again, found; and whether a model in it is whole.

It holds config.toml (everything that was resolved), metrics.jsonl (a row a step), Hugging Face folders step-000200/ ... and
final/, and results.json where the run was evaluated.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nanoredi.common.disk import lock, regular, remove, remove_leftovers
from nanoredi.common.errors import UserError
from nanoredi.common.files import check, parse_json, read_json
from nanoredi.common.flags import Tables, read_recipe, resolve, write_recipe

_PATHS = {"model", "data", "watch", "cache", "benchmarks"}  # options that hold paths (a benchmark's name has no dot)
INDEX = "model.safetensors.index.json"


def open_run(out: str, configs: dict[str, Any]) -> bool:
    """Take the folder `out` for a run of {table: dataclass}, and keep other processes out of it. Call on one rank.

    Returns:
        True when the folder holds this very run, finished; False when the training may begin, or go on.

    Raises:
        UserError: when no folder is named, when it holds anything else, and when another process has it. Nothing is
            overwritten; what a kill left half-written goes, and of a finished run the states.
    """
    if not out:
        raise UserError("the run needs a folder: give --out DIR")
    folder = Path(out)
    path = folder / "config.toml"
    if folder.exists() and not path.exists() and (folder.is_file() or _contents(folder)):
        raise UserError(f"{out} is not empty and holds no nanoredi run: give another --out")
    lock(folder)
    remove_leftovers(folder, locked=True)
    remove_leftovers(folder / "state", locked=True)
    # A run that stopped at bad input has left its config.toml and nothing else: the next one may be another.
    if path.exists() and _contents(folder):
        _refuse_another_run(path, configs)
        if holds_model(folder / "final"):
            remove(folder / "state")
            return True
    else:
        write_recipe(path, configs)
    return False


def _contents(folder: Path) -> list[Path]:
    """What a folder holds besides the files that every run begins with."""
    return [path for path in folder.iterdir() if path.name != ".lock" and not path.name.startswith("config.toml")]


def _refuse_another_run(path: Path, configs: dict[str, Any]) -> None:
    before = read_recipe(path)
    out = _out(before) or path.parent
    for table, config in configs.items():
        then = resolve(type(config), table, before)
        for f in dataclasses.fields(config):
            old, new = getattr(then, f.name), getattr(config, f.name)
            undecided = f.name == "dtype" and old == "auto"  # a run of former times; its state knows
            same = old == new or f.name in _PATHS and _same(old, new, out, path.parent)
            if not (same or f.metadata["free"] or undecided):
                raise UserError(
                    f"{path.parent} holds another run: {table}.{f.name} is {old!r} there and {new!r} here; "
                    "give another --out"
                )


def _same(old: Any, new: Any, out: str | Path, folder: Path) -> bool:
    """Whether a path, or a list of them, is another name for one that was given when the run's folder was `out`; or its new
    place, where it has moved with the folder."""
    if isinstance(old, list):
        return len(old) == len(new) and all(_same(a, b, out, folder) for a, b in zip(old, new))
    if old == new or not (old and new):
        return old == new
    if os.path.exists(old) and os.path.exists(new):
        return os.path.samefile(old, new)
    moved = os.path.relpath(old, out) == os.path.relpath(new, folder)
    return moved and os.path.isabs(old) == os.path.isabs(out) and not os.path.exists(old)


def dtype_of_run(out: str, table: str) -> str:
    """The compute dtype that the run in a folder began with; auto where none did."""
    path = Path(out) / "config.toml"
    return read_recipe(path).get(table, {}).get("dtype", "auto") if path.exists() else "auto"


def recipe_of(model: str | Path) -> Tables:
    """The recipe of the run that a model's folder lies in; empty where it lies in none. Its relative paths, which were
    given where the run was started, lead from here to the same places, if they are still where they were beside the run."""
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
                value = values[name]
                values[name] = (
                    [moved(one) if "." in one else one for one in value]
                    if isinstance(value, list)
                    else value and moved(value)
                )
    return tables


def _out(tables: Tables) -> str:
    """The folder of the run that a recipe is of; empty where it says none."""
    return next((tables[name]["out"] for name in ("redi", "sft") if tables.get(name, {}).get("out")), "")


def models_along(run: Path) -> dict[str, Path]:
    """{name in a table: folder} of a run's models: the one that it started from, every step-*, and the final one, as far as
    they are there.

    Raises:
        UserError: when there is no run, or none of its own models.
    """
    tables = recipe_of(run / "final")
    if not tables:
        raise UserError(f"{run} is no run's folder, which holds its config.toml and metrics.jsonl")
    stage = tables.get("redi") or tables.get("sft", {})
    start, final = ("SFT", final_name(stage.get("objective", "redi"))) if "redi" in tables else ("start", "final")
    steps = {path.name: path for path in sorted(run.glob("step-*")) if path.name[5:].isdigit()}
    own = {name: path for name, path in {**steps, final: run / "final"}.items() if holds_model(path)}
    if not own:
        raise UserError(f"{run} holds no model of its own yet")
    before = stage.get("model")
    return {**({start: Path(before)} if before and holds_model(Path(before)) else {}), **own}


def final_name(objective: str) -> str:
    """What a table calls the model that stage 2 comes to; the one from before is SFT."""
    return "SFT continued" if objective == "sft" else objective.upper()


def check_model(folder: str, file: str = "config.json") -> str:
    """The folder of a model, as it was given. The file is what it must hold.

    Raises:
        UserError: where it holds none: what it is instead, and what would help.
    """
    path = Path(folder)
    if (path / file).exists():
        return folder
    if path.is_file():
        raise UserError(f"{folder} is a file; give the folder that holds it beside the model's {file}")
    if not path.exists():
        help = f"give the one that holds the model's {file}"
        name = re.search(r"^(?:https?://[\w.]+/)?(\w[\w.-]*/\w[\w.-]*)/?$", folder)
        if name and not path.parent.is_dir():
            own = name[1].split("/")[1]
            help = f"if it is a model's name on the hub: hf download {name[1]} --local-dir {own}; then give {own}"
        raise UserError(f"there is no folder {folder}; {help}")
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter and no whole model: merge it into its base model, and give that one"
        )
    # A run's final/, the hub's models--*/snapshots/*/, and either a few folders further down.
    found = [f for depth in range(1, 5) for f in path.glob("*/" * depth + file)]
    found.sort(key=lambda f: (f == path / "final" / file, f.stat().st_mtime), reverse=True)
    if not found:
        is_model = (path / "config.json").exists()
        end = "; copy that of the model that it was made from" if is_model else ", so it is no model's folder"
        raise UserError(f"{folder} has no {file}{end}")
    kind = "a run's folder" if (path / "config.toml").exists() else "a folder of models"
    if (path / "snapshots").is_dir() or next(path.glob("models--*"), None):
        kind = "the hub's cache"
    more = f", or another of the {len(found)} in it" if len(found) > 1 else ""
    raise UserError(f"{folder} is {kind} and no model's: give {found[0].parent}{more}")


def holds_model(folder: Path) -> bool:
    """Whether a whole model is there; an empty folder is none.

    Raises:
        UserError: when something else is there.
    """
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    try:
        read_json(folder / "config.json")
        open_weights(folder)
    except UserError as error:
        raise UserError(f"{folder} is no whole model ({error}): move it away, and the same command goes on") from None
    return True


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model's weights are in."""
    if (folder / INDEX).exists():
        weight_map = check(str(folder / INDEX), read_json(folder / INDEX), {"weight_map": {str: str}})["weight_map"]
        # Only names inside the folder: an index is data from elsewhere.
        return [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    if not (folder / "model.safetensors").exists():
        bins = "; a .bin can run code when it is read: save it as safetensors" * any(folder.glob("*.bin"))
        raise UserError(f"{folder} holds no model.safetensors and no {INDEX}{bins}")
    return [folder / "model.safetensors"]


def open_weights(folder: Path) -> dict[str, Any]:
    """{name: the open safetensors file that it is in}. A file that was cut short is found here: its length is checked.

    Raises:
        UserError: naming the file that is missing or broken.
    """
    files: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            handle = safe_open(regular(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the weights {path}: {error}") from None
        files.update((name, handle) for name in handle.keys())
    return files


_ROW = {"step": range(1, 2**31), str: (float, bool, None)}


def metrics_row(where: str, line: str) -> dict[str, Any]:
    """A line of metrics.jsonl.

    Raises:
        UserError: naming `where`, for anything else.
    """
    return check(where, parse_json(where, line), _ROW)


def newest_model(root: str = "runs") -> str:
    """The final model under root that was written last.

    Raises:
        UserError: when there is none.
    """
    configs = sorted(Path(root).glob("**/final/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise UserError(f"there is no model under {root}/ yet: train one (python train_redi.py) or give --model DIR")
    return str(configs[-1].parent)
