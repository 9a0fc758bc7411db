"""Every Python block in the docs and the README runs as it stands, each file in a process of its own namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# These two take 9 s each to compile, and other tests run what they show.
LONG = ("fit.md", "optim.md")
EXAMPLES = [
    pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in LONG else ())
    for page in PAGES
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
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
