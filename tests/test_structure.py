"""The story runs one way: no file imports one that comes later in it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The order to read in; README.md says the same. Each file may import only those before it.
STORY = [
    "errors",
    "files",
    "progress",
    "fields",
    "config",
    "runs",
    "tokenizer",
    "precise",
    "expression",
    "plain",
    "answer",
    "reading",
    "deepscaler",
    "grader",
    "benchmarks",
    "raw",
    "spool",
    "gates",
    "own",
    "overlap",
    "prepare",
    "data",
    "lengths",
    "objectives",
    "batch",
    "pairs",
    "kernels",
    "architecture",
    "attention",
    "recompute",
    "checkpoint",
    "model",
    "toy",
    "distributed",
    "optimizer",
    "heap",
    "log",
    "guards",
    "state",
    "reference",
    "trainer",
    "draw",
    "pages",
    "scheduler",
    "paged",
    "sampler",
    "scores",
    "samples",
    "completions",
    "evaluation",
    "tables",
    "failures",
    "figures",
    "report",
]
ALLOWED = {"torch", "safetensors", "tokenizers", "numpy", "triton", "jinja2", "tqdm"}
OPTIONAL = {"pyarrow", "matplotlib"}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports."""
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


def test_every_file_is_in_the_story():
    assert sorted(p.stem for p in (ROOT / "nanoredi").iterdir() if p.suffix == ".py" or p.name == "kernels") == sorted(
        [*STORY, "__init__"]
    )


@pytest.mark.parametrize("name", STORY)
def test_no_import_runs_against_the_story(name):
    path = ROOT / "nanoredi" / name
    for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for module in imports(file):
            if module.startswith("nanoredi."):
                other = module.split(".")[1]
                assert other == name or STORY.index(other) < STORY.index(name), (
                    f"{file.name} imports {module}, which comes later"
                )


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
