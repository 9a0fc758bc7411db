"""Every Python block in the docs and the README runs as it stands; tables name all there is, as it was measured."""

import importlib
import json
import re
from pathlib import Path

import pytest
from drawn import stable_diffusion

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# These take 7 s or more each, and other tests run what they show.
LONG = ("fit.md", "guidance.md", "likelihood.md", "optim.md", "pipelines.md")
EXAMPLES = [
    pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in LONG else ())
    for page in PAGES
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if page.name == "pipelines.md":  # whose example draws with the checkpoint in `sd`
        stable_diffusion(tmp_path / "sd")
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
        if name := re.match(r"# (\S+\.py)\n", block):  # a block that starts with a file's name is that file
            path = tmp_path / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
        else:
            exec(compile(block, str(page), "exec"), namespace)  # blocks of one page build on each other


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def rows(page):
    """The cells of every table of a page."""
    lines = [line.strip("| ") for line in page.read_text().splitlines() if line.startswith("|")]
    return [re.split(r" *(?<!\\)\| *", line) for line in lines]


def test_the_table_of_networks_has_every_class():
    from diffjax.models import NETWORKS

    named = set()
    for first, *_ in rows(ROOT / "docs" / "checkpoints.md"):
        names = re.findall(r"`([\w.]+)`", first)
        named |= {name.replace("...", names[0]) for name in names}
    assert not NETWORKS.keys() - named


def test_the_table_of_memory_is_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["rows"]
    told = {(row[0], row[1].strip("`")): row[2:5] for row in rows(ROOT / "docs" / "networks.md") if len(row) == 5}
    for row in found:
        column = ("none", "dots", "full").index(row["remat"])
        assert float(told[row["network"], row["attention"]][column]) == round(row["temp_gib"], 2), row


def test_the_table_of_speed_is_what_was_measured():
    results = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("networks", "networks_jax_0.10")]
    found = [list(json.loads(path.read_text())["networks"].values()) for path in results]
    page = (ROOT / "docs" / "networks.md").read_text().partition("## Speed beside PyTorch")[2]
    told = [[float(cell) for cell in re.findall(r"(?<=\| )\d\.\d\d(?= \|)", line)] for line in page.splitlines()]
    both = zip(*found, strict=True)
    measured = [[round(row[what]["ratio"], 2) for row in pair for what in ("forward", "both")] for pair in both]
    assert [row for row in told if row] == measured


def test_published_checkpoints_are_counted_alike():
    from diffjax.models.published import PUBLISHED

    told = re.findall(r"(\d+) (?:published )?checkpoints|settings\n? +of (\d+)", "".join(p.read_text() for p in PAGES))
    assert told and {int(a or b) for a, b in told} == {len(PUBLISHED)}


def test_names_of_the_library_are_there():
    """What docstrings and pages call `diffjax.a.b` can be imported."""
    sources = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "diffjax").rglob("*.py"))]
    named = {name: path for path in sources for name in re.findall(r"`(diffjax(?:\.\w+)+)", path.read_text())}
    assert len(named) > 50
    for name, path in named.items():
        assert found(name), f"{path.relative_to(ROOT)}: {name}"


def found(name):
    """Whether a dotted name is a module, something in one, or an attribute of that."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            if part in getattr(thing, "__annotations__", {}):
                return True
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False
