"""The rooms have an order, and no file imports one from a later room."""

import ast
import re
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms in the order to read in; README.md says the same. A file may import from its own room and those before it.
ROOMS = [
    "common",
    "config",
    "grader",
    "data",
    "objectives",
    "prepare",
    "kernels",
    "model",
    "cpu",
    "cuda",
    "toy",
    "trainer",
    "sampler",
    "chat",
    "evaluation",
    "report",
]
ALLOWED = {"torch", "safetensors", "tokenizers", "numpy", "triton", "jinja2", "mpmath", "tqdm"}
OPTIONAL = {"pyarrow", "matplotlib"}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "nanoredi" else {node.module}
            )
    return names


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / "nanoredi").parts[0].removesuffix(".py")


def test_every_file_is_in_a_room():
    rooms = {room_of(p) for p in (ROOT / "nanoredi").rglob("*.py")} | {"cpu"}  # cpu/ may be deleted
    assert sorted(rooms) == sorted([*ROOMS, "__init__"])


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_a_later_one(room):
    for file in (ROOT / "nanoredi").rglob("*.py"):
        if room_of(file) != room:
            continue
        for module in imports(file):
            if module.startswith("nanoredi."):
                other = module.split(".")[1]
                assert ROOMS.index(other) <= ROOMS.index(room), f"{file.name} imports {module}, a later room"
                assert other == room or other not in ("cpu", "cuda"), (
                    f"{file.name} imports {module}, which registers itself"
                )


def test_what_only_a_cpu_needs_is_in_cpu():
    words = re.compile(
        r"\b(oneDNN|MKL|AVX\w*|AMX|gcc|ctypes)\b|mkldnn|malloc|\b(in|of|by|for|to) C[.,:; ]|\bC('s| code| compiler| library)\b"
    )
    for file in (ROOT / "nanoredi").rglob("*.py"):
        if room_of(file) != "cpu":
            for number, line in enumerate(file.read_text().splitlines(), 1):
                assert not words.search(line), f"{file}, line {number}: {line.strip()}"


def test_the_readme_has_the_rooms_in_this_order():
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == [*ROOMS, "recipes"]


def lines(*patterns: str, but: tuple[str, ...] = ()) -> int:
    """Lines of the files in nanoredi/ that match the patterns, each of which must match one."""
    files: set[Path] = set()
    for pattern in patterns:
        found = set((ROOT / "nanoredi").glob(pattern))
        assert found, f"nanoredi/ has no {pattern}"
        files |= {file for file in found if file.suffix in (".py", ".c", ".h")}
    return sum(len(file.read_text().splitlines()) for file in files if file.name not in but)


def says_by_how_much(what: str, number: int, planned: int, at_most: int) -> None:
    """Fail if there are more lines than `at_most`, which is lowered as the code shrinks; warn if more than planned."""
    if number > planned:
        warnings.warn(f"{what} has {number:,} lines, {number - planned:,} more than planned", stacklevel=2)
    assert number <= at_most, f"{what} has {number:,} lines; it had {at_most:,}, where {planned:,} were planned"


def test_the_method_stays_short():
    files = [
        "objectives.py",
        "config.py",
        "data/sequences.py",
        "data/batch.py",
        "model/**/*",
        "kernels/**/*",
        "sampler/**/*",
    ]
    files += [f"trainer/{name}.py" for name in ("loop", "step", "optimizer", "distributed", "reference")]
    number = lines(*files, but=("hf_folder.py", "top_p.py", "paged_attention.py"))
    says_by_how_much("the method's path", number, planned=3000, at_most=2948)


def test_nanoredi_without_cpu_stays_short():
    number = lines("**/*") - (lines("cpu/**/*") if (ROOT / "nanoredi" / "cpu").exists() else 0)
    says_by_how_much("nanoredi/ without cpu/", number, planned=7900, at_most=11655)


@pytest.mark.parametrize("script", ["train_sft.py", "train_redi.py", "sample.py", "evaluate.py"])
def test_a_script_imports_nanoredi_before_torch(script):
    """nanoredi sets environment variables that torch reads when it is loaded."""
    names = re.findall(r"^(?:import|from) (nanoredi|torch)\b", (ROOT / script).read_text(), flags=re.MULTILINE)
    assert names[0] == "nanoredi"


def test_nothing_but_the_required_packages_is_imported():
    for file in [*ROOT.glob("*.py"), *(ROOT / "nanoredi").rglob("*.py")]:
        for module in imports(file):
            top = module.split(".")[0]
            assert top in ALLOWED | {"nanoredi"} | sys.stdlib_module_names or top in OPTIONAL, (
                f"{file} imports {module}"
            )


def test_nothing_read_is_executed_or_unpickled():
    for file in [*ROOT.glob("*.py"), *(ROOT / "nanoredi").rglob("*.py")]:
        assert not imports(file) & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "torch.load"), f"{file}, line {node.lineno}"
                if ast.unparse(node.func) == "np.load":
                    assert "allow_pickle=False" in ast.unparse(node), f"{file}, line {node.lineno}"
