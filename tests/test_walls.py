"""The walls between the folders, and what `import diffjax` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffjax"
STANDARD = sys.stdlib_module_names
# Imports nothing but the standard library, as is tested below, so that every folder may have it.
FILES = {"diffjax.files"}

# What each folder may import besides the standard library, jax and numpy.
ALLOWED = {
    "core": {"diffjax.core"},
    "sampling": {"diffjax.core", "diffjax.sampling"},
    "guidance": {"diffjax.core", "diffjax.guidance"},
    "convert": {
        "scipy", "diffjax.core", "diffjax.sampling", "diffjax.models", "diffjax.nn.functional", "diffjax.adapters",
        "diffjax.convert",
    },
    "nn": {"absl", "flax", "tokamax", "diffjax.nn"},
    "models": {"flax", "diffjax.nn", "diffjax.models", "diffjax.core.types", "diffjax.registry"},
    "adapters": {
        "flax", "diffjax.nn", "diffjax.models", "diffjax.core.types", "diffjax.registry", "diffjax.adapters",
    },
    "data": {"grain", "absl", "PIL", "tensorflow_datasets", "sklearn", "scipy", "diffjax.data", "diffjax.registry"},
    "metrics": {"sklearn", "scipy", "threadpoolctl", "diffjax.metrics", "diffjax.data", "diffjax.registry"},
    "viz": {"matplotlib", "diffjax.viz"},
}


def imports(path):
    """Every module that a file imports, at any depth; `from a import b` counts as `a`, or `a.b` if that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                yield full if is_module else node.module


@pytest.mark.parametrize("folder", ALLOWED)
def test_walls(folder):
    allowed = ALLOWED[folder] | STANDARD | FILES | {"jax", "numpy"}
    files = list((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            prefixes = {".".join(module.split(".")[: i + 1]) for i in range(module.count(".") + 1)}
            assert prefixes & allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_every_class_of_a_checkpoint_is_in_models_or_adapters():
    """`NETWORKS` names functions as text, past the walls: what it names is there, in these two folders alone."""
    (table,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((PACKAGE / "models" / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "NETWORKS"
    )
    for name, place in table.items():
        module, _, function = place.partition(":")
        assert module.startswith(("diffjax.models.", "diffjax.adapters.")), name
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_files_imports_the_standard_library_alone():
    assert {module.split(".")[0] for module in imports(PACKAGE / "files.py")} <= STANDARD


def test_nothing_imports_what_lies_outside_the_package():
    for path in PACKAGE.rglob("*.py"):
        for module in imports(path):
            assert module.split(".")[0] not in {
                "experiments",
                "configs",
                "tests",
                "benchmarks",
                "torch",
                "tensorflow",
            }, path
    for path in (ROOT / "configs").rglob("*.py"):
        for module in imports(path):
            assert module.split(".")[0] in {"ml_collections", "configs"} | STANDARD, path


def test_samplers_can_be_imported_where_there_are_no_file_locks():
    code = "import sys; sys.modules['fcntl'] = None; import diffjax, diffjax.data, diffjax.models"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_import_loads_jax_and_numpy_only():
    heavy = "flax optax orbax grain tensorflow torch clu ml_collections matplotlib sklearn absl tqdm".split()
    code = f"import sys, diffjax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_object_is_exported_and_documented():
    import diffjax

    for name in diffjax.__all__:
        thing = getattr(diffjax, name)
        if callable(thing) and getattr(thing, "__module__", "").startswith("diffjax"):
            assert thing.__doc__, name
