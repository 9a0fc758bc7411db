"""The held-out loss against its closed form, and that it is the same for every schedule and parameterisation."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import EDM, EPS, VP, X0, Flow, V
from diffjax.core.types import Model
from diffjax.data import ArraySource, Dataset, Unreadable, UnreadableError
from diffjax.pipelines.heldout import LOGSNR, heldout_loss
from diffjax.pipelines.judge import read_items

SPREAD = 0.5


class Run(NamedTuple):
    dataset: object
    model: Model
    params: dict
    schedule: object
    head: object


def exact(schedule, head, *, bias=0.0):
    """The best denoiser of Gaussian pixels of that spread, in any parameterisation, with an error added to x0."""

    def apply(params, x, t, y=None):
        # EDM tells its network log(sigma) / 4.
        at = schedule(jnp.exp(4 * t) if isinstance(schedule, EDM) else t)
        alpha, sigma = at.alpha[:, None, None, None], at.sigma[:, None, None, None]
        x0 = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * x + params["bias"]
        return head.target(x0, (x - alpha * x0) / sigma, at)

    images = SPREAD * np.random.default_rng(0).standard_normal((300, 8, 8, 1)).astype(np.float32)
    source = ArraySource(images, np.zeros(300, np.int32))
    dataset = Dataset(source, source, (8, 8, 1), 0, lambda x: x)
    return Run(dataset, Model(lambda key: {}, apply, {}), {"bias": jnp.float32(bias)}, schedule, head)


@pytest.mark.parametrize("schedule, head", [(EDM(), X0), (VP(), EPS), (VP(), V), (Flow(), V)])
def test_the_best_denoiser_of_unit_data_has_loss_one_at_every_level(schedule, head):
    # The posterior variance of x0 is s^2 d^2 / (s^2 + d^2), whose inverse is the weight.
    found = heldout_loss(exact(schedule, head), batch_size=128)
    # A mean over 300 x 64 squares of unit normals: standard error sqrt(2 / 19200) = 0.0102 at a level.
    np.testing.assert_allclose(found["levels"], 1.0, atol=0.041)
    assert found["logsnr"] == list(LOGSNR) and found["images"] == 300
    assert found["loss"] == pytest.approx(np.mean(found["levels"]))


def test_noise_is_the_same_whatever_the_schedule_and_the_batch():
    base = heldout_loss(exact(EDM(), X0))
    # float32 conversions between parameterisations, at log-SNR from -6 to 6, lose three digits of seven.
    np.testing.assert_allclose(heldout_loss(exact(VP(), V))["levels"], base["levels"], rtol=1e-3)
    np.testing.assert_allclose(heldout_loss(exact(EDM(), X0), batch_size=77)["levels"], base["levels"], rtol=1e-5)


class Broken:
    """A source in which some items cannot be read."""

    def __init__(self, source, bad):
        self.source, self.bad = source, bad

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.bad:
            raise Unreadable(f"image {index}", "it is cut")
        return self.source[index]


def test_images_that_cannot_be_read_are_left_out_up_to_a_limit(caplog):
    whole = exact(EDM(), X0)
    run = whole._replace(dataset=whole.dataset._replace(heldout=Broken(whole.dataset.heldout, {0, 7})))
    found = heldout_loss(run)
    assert found["images"] == 298 and "cannot read image 7: it is cut" in caplog.text
    np.testing.assert_allclose(found["levels"], 1.0, atol=0.041)
    with pytest.raises(UnreadableError, match="17 images cannot be read, and the limit .* is 16: cannot read image 0"):
        read_items(Broken(whole.dataset.heldout, set(range(17))))


def test_an_error_of_x0_is_weighted_as_edm_does():
    more = np.subtract(heldout_loss(exact(EDM(), X0, bias=0.1))["levels"], heldout_loss(exact(EDM(), X0))["levels"])
    s = np.exp(-np.asarray(LOGSNR) / 2)
    wanted = 0.01 * (s**2 + SPREAD**2) / (s * SPREAD) ** 2
    # The cross term has the standard error 2 sqrt(weight) 0.1 / sqrt(19200).
    error = 2 * 0.1 * np.sqrt((s**2 + SPREAD**2) / (s * SPREAD) ** 2 / 19200)
    assert np.all(np.abs(more - wanted) < 4 * error)
