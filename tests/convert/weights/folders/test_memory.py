"""Loading and saving take little memory besides the parameters."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[4] / "benchmarks" / "load_memory.py"


@pytest.mark.slow
def test_a_stack_of_layers_is_not_in_memory_twice(tmp_path):
    spec = importlib.util.spec_from_file_location("load_memory", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.measure(0.4, str(tmp_path / "folder"))
    assert found["parameters_mb"] > 300
    # Of it about 50 MB are what building any network takes.
    assert found["load_above_parameters_mb"] < found["largest_parameter_mb"]
    assert (found["save_above_parameters_mb"] or 0) < found["largest_parameter_mb"]
