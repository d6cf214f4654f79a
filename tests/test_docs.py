"""The pages: the files, commands and flags that they name exist, and the README stays short."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

README = ROOT / "README.md"
PAGES = [*ROOT.glob("*.md"), *(page for room in ("docs", "bench", "experiments") for page in ROOT.glob(f"{room}/*.md"))]
# Flags of other programs: torchrun's, pip's, hf's, pytest's and SLURM's.
OTHERS = set("standalone nproc_per_node nnodes rdzv_backend rdzv_endpoint rdzv_id repo-type local-dir slow".split())
OTHERS |= set("nodes ntasks-per-node gpus-per-node signal signals-to-handle requeue help".split())


def links(page: Path) -> list[tuple[Path, str]]:
    """The files, and the headings in them, that a page links to within the repository."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text())
    return [((page.parent / to).resolve() if to else page, at) for to, at in found if not to.startswith("http")]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page):
    for to, at in links(page):
        assert to.is_file(), f"{page.name} links to {to}"
        assert not at or at in anchors(to), f"{page.name} links to {to.name}#{at}"


def test_every_page_is_reachable_from_the_readme():
    seen, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        if page not in seen:
            seen.add(page)
            ahead += [to for to, _ in links(page) if to.suffix == ".md"]
    assert set(PAGES) <= seen


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_named_is_there(page):
    text = page.read_text()
    for path in re.findall(r"\b(?:nanoredi|tests|bench|experiments|docs)/[\w/.-]+\.(?:py|c|h|md|png|toml)\b", text):
        assert (ROOT / path).is_file(), f"{page.name} names {path}"
    for module in re.findall(r"-m ((?:nanoredi|bench)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name} runs {module}"


def test_every_flag_named_exists():
    files = [
        *ROOT.glob("*.py"),
        *(file for room in ("nanoredi", "bench", "experiments") for file in ROOT.glob(f"{room}/**/*.py")),
    ]
    source = "".join(file.read_text() for file in files)
    # An option of a config, a device's figure in bench/step_costs.py, or an argument of argparse.
    found = re.findall(r"^    (\w+): .* = (?:option|rate)\(|\"--([\w-]+)\"", source, re.MULTILINE)
    known = OTHERS | {name for names in found for name in names}
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--(\w[\w-]*)", page.read_text()):
            assert flag in known, f"{page.name} names --{flag}"
