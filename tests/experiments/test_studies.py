"""The commands in the pages of the studies name the runs that the pages speak of."""

import re
from pathlib import Path

import pytest

from diffjax.sweep.grid import parse_grid
from diffjax.sweep.plan import plan_runs
from diffjax.train import config as configs

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r'diffjax sweep (\S+)\s+--grid="([^"]+)"(?:\s+--seeds=(\S+))?')


@pytest.mark.parametrize("study, updates, batch", [("parameterisation", 3000, 256), ("dit_scaling", 800, 96)])
def test_the_command_of_the_page_is_twelve_runs_that_can_start(study, updates, batch, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "experiments" / study / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    config, grid, seeds = COMMAND.search(page).groups()
    runs = plan_runs(
        configs.load(config), parse_grid(grid), tuple(map(int, (seeds or "").split(",") if seeds else ())), ""
    )
    assert len(runs) == 12 and "12 runs" in page and f"{updates} updates" in page
    for run in runs:
        assert (run.config.num_steps, run.config.batch_size, run.config.sample_every) == (updates, batch, 0)
