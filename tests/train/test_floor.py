"""A trained network against the exact minimiser of its loss: the empirical denoiser of its own training set."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffjax as dj
from diffjax.data import digits
from diffjax.models import mlp

HEAD = dj.edm(sigma_data=0.5)
SIGMAS = (0.05, 0.2, 0.6, 1.5, 5.0)


def trained(data, num_steps=250):
    """The loss function of a small class-conditional MLP after a few seconds of Adam on the digits."""
    model = mlp(shape=data.shape, num_classes=data.num_classes, width=128, depth=2)
    params = model.init(jax.random.key(0))
    optimizer = optax.adam(3e-3)
    images, labels = jnp.asarray(data.train[:]["image"]), jnp.asarray(data.train[:]["label"])

    @jax.jit
    def step(params, opt_state, key):
        key_index, key_time, key_noise = jax.random.split(key, 3)
        index = jax.random.randint(key_index, (128,), 0, len(images))
        level = dj.EDM()(dj.TIMES["lognormal"](-1.2, 1.2)(key_time, 128))

        def objective(params):
            f = lambda x, t: model.apply(params, x, t, labels[index])
            return dj.loss(f, HEAD, images[index], level, key=key_noise).mean()

        updates, opt_state = optimizer.update(jax.grad(objective)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for i in range(num_steps):
        params, opt_state = step(params, opt_state, jax.random.fold_in(jax.random.key(1), i))
    return lambda labels: lambda x, t: model.apply(params, x, t, labels)


@pytest.mark.slow
def test_training_loss_stays_above_the_empirical_denoiser():
    data = digits()
    network = trained(data)
    x0, labels = (jnp.asarray(data.train[:][k]) for k in ("image", "label"))
    empirical = dj.Empirical(np.asarray(x0), np.asarray(labels))
    gaps = []
    for i, sigma in enumerate(SIGMAS):
        level = dj.EDM()(jnp.full(len(x0), sigma))

        def exact(x, t, level=level):
            noisy = x / HEAD.scale_in(level)[:, None, None, None]
            prediction = empirical.denoise(noisy, level, labels)
            return HEAD.target(prediction.x0, prediction.eps, level)

        key = jax.random.fold_in(jax.random.key(2), i)
        gap = dj.loss(network(labels), HEAD, x0, level, key=key) - dj.loss(exact, HEAD, x0, level, key=key)
        # Paired on the same images and noise: the mean gap is >= 0 in expectation for any network.
        assert gap.mean() > -4 * gap.std() / np.sqrt(len(gap)), sigma
        gaps.append(float(gap.mean()))
    # The network did learn: predicting nothing has loss 1, as the target has unit variance. At low noise the empirical
    # denoiser knows the answer by heart, so only at high noise is its loss within reach of a small network.
    assert gaps[-1] < 0.2 and gaps[-2] < 0.4
