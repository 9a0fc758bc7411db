"""How much a network keeps between its forward and its backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.core import Literal


def kept_activations(config, parts) -> tuple[float, float]:
    """Bytes per row of the batch, and bytes whatever the batch, that differentiation keeps for the backward pass.

    They are what JAX keeps: results in the network's own dtypes, after its rematerialisation, without the parameters
    themselves; copies of the parameters in another dtype are among the second. A compiler may keep less (it computes
    elementwise functions again, and its fused attention keeps no [tokens, tokens] matrix), and needs working memory
    besides.
    """
    two, four = (_kept(config, parts, rows) for rows in (2, 4))
    per_row = (four - two) / 2
    return per_row, two - 2 * per_row


def _kept(config, parts, rows: int) -> float:
    from diffjax.train.setup import abstract_batch
    from diffjax.train.state import abstract_state
    from diffjax.train.step import make_train_step

    found = []

    def spy(loss_fn):
        def gradient(params, rows, key):
            def residuals(params, rows, key):
                mean = lambda params: jnp.mean(loss_fn(params, rows, key)[0])
                return jax.tree.leaves(jax.vjp(mean, params)[1])

            jaxpr = jax.make_jaxpr(residuals)(params, rows, key).jaxpr
            given = {*jaxpr.invars, *jaxpr.constvars}
            kept = {var for var in jaxpr.outvars if not isinstance(var, Literal) and var not in given}
            found.append(float(sum(var.aval.size * var.aval.dtype.itemsize for var in kept)))
            # In place of gradients something of their shapes: what the step makes of them is of no interest.
            return *loss_fn(params, rows, key), params

        return gradient

    # Noise is paired before anything is differentiated, in groups that need more rows.
    parts = parts._replace(objective=parts.objective._replace(pair=None))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size = rows
    jax.eval_shape(make_train_step(parts, config, spy), abstract_state(parts), abstract_batch(config, parts))
    return found[0]
