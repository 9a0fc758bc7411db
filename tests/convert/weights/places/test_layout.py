"""Where parameters lie in checkpoints: `place`, `read` and `split` fit each other."""

import numpy as np
import pytest

from diffjax.convert.weights import WeightsError
from diffjax.convert.weights.places.layout import MOST_LAYERS, place, read, split
from diffjax.convert.weights.tensors import Source, read_header, write


@pytest.mark.parametrize(
    "name, shape, keys, tensor",
    [
        ("a/b/kernel", (3, 5), ["a.b.weight"], (5, 3)),
        ("a/kernel", (7, 3, 5), ["a.weight"], (5, 3, 7)),
        ("a/kernel", (7, 8, 3, 5), ["a.weight"], (5, 3, 7, 8)),
        ("a/kernel", (6, 7, 8, 3, 5), ["a.weight"], (5, 3, 6, 7, 8)),
        ("a/scale", (3,), ["a.weight"], (3,)),
        ("a/embedding", (9, 3), ["a.weight"], (9, 3)),
        ("a/bias", (3,), ["a.bias"], (3,)),
        ("table", (2, 3), ["table"], (2, 3)),
        ("logit", (), ["logit"], ()),
        ("b/1:3/a/0/kernel", (2, 3, 5), ["b.1.a.0.weight", "b.2.a.0.weight"], (5, 3)),
        ("b/0:1/gate", (1,), ["b.0.gate"], ()),
    ],
)
def test_names_and_shapes_of_the_checkpoint(name, shape, keys, tensor):
    found = place(name, shape)
    assert (list(found.keys), found.shape) == (keys, tensor)


def test_more_layers_than_any_network_has():
    with pytest.raises(WeightsError, match="10001 layers"):
        place(f"b/0:{MOST_LAYERS + 1}/bias", (MOST_LAYERS + 1, 3))


@pytest.mark.parametrize("held", [(4, 5), (2, 5), (3,), (5, 3)])
def test_a_tensor_of_another_shape_is_not_read_for_a_part_of_it(tmp_path, held):
    array = np.zeros(held, np.float32)
    write(tmp_path / "a.safetensors", {"a.weight": Source(array.dtype, held, lambda: array)}, {})
    tensors = read_header(tmp_path / "a.safetensors")[0]
    with pytest.raises(WeightsError, match=r"tensor 'a.weight' has the shape .* instead of \[3, 5\]"):
        read(place("a/kernel", (5, 3)), tensors, (), np.dtype("f4"))
    with pytest.raises(ValueError, match="an array of shape"):
        tensors["a.weight"].fill(np.zeros((7, 5), np.float32))


@pytest.mark.parametrize("seed", range(12))
def test_read_is_the_inverse_of_split_in_every_part(tmp_path, seed):
    rng = np.random.default_rng(seed)
    parameters = {}
    for i in range(8):
        leaf = rng.choice(["kernel", "bias", "embedding", "table"])
        axes = rng.integers(2, 6) if leaf == "kernel" else rng.integers(0, 4)
        shape = tuple(int(n) for n in rng.integers(0 if seed == 0 else 1, 6, axes))
        first, layers = int(rng.integers(3)), int(rng.integers(1, 5))
        stacked = bool(rng.integers(2))
        name = f"{i}/{first}:{first + layers}/{leaf}" if stacked else f"{i}/{leaf}"
        parameters[name] = rng.normal(size=(layers,) * stacked + shape).astype(rng.choice(["f4", "f2"]))
    sources = {}
    for name, array in parameters.items():
        for key, part in split(place(name, array.shape), array).items():
            sources[key] = Source(part.dtype, part.shape, lambda part=part: part)
    write(tmp_path / "a.safetensors", sources, {})
    tensors = read_header(tmp_path / "a.safetensors")[0]
    for name, array in parameters.items():
        where = place(name, array.shape)
        whole = read(where, tensors, (), array.dtype)
        assert whole.dtype == array.dtype and whole.flags.c_contiguous
        assert whole.ctypes.data % 64 == 0 or not whole.size
        np.testing.assert_array_equal(whole, array)
        for _ in range(6):
            ends = [np.sort(rng.integers(0, n + 1, 2)) for n in array.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(read(where, tensors, index, np.dtype("f8")), array[index])
        again = {key: part.tobytes() for key, part in split(where, whole).items()}
        assert again == {key: tensors[key].part().tobytes() for key in where.keys}
