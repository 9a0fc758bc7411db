import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.attention import attend


def test_float64_attention_is_that_of_float32_but_for_rounding(x64):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4), jnp.float64) for i in range(3))
    for scale in (None, 0.3):
        single = attend(*(a.astype(jnp.float32) for a in (q, k, v)), scale)
        double = attend(q, k, v, scale)
        assert single.dtype == jnp.float32 and double.dtype == jnp.float64
        # Products of some 10 float32 numbers of size 1.
        np.testing.assert_allclose(double, single, rtol=1e-5, atol=1e-6)


def test_a_shift_of_all_keys_changes_nothing_in_float64(x64):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4), jnp.float64) for i in range(3))
    grad = jax.grad(lambda shift: jnp.sum(attend(q, k + shift, v) ** 2))(jnp.zeros(4))
    # The true gradient is zero; a softmax in float32 gives 1e-7.
    assert np.abs(grad).max() < 1e-13
