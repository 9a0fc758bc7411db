"""Numbers of parameters against those that the papers and their code report."""

import math

import jax
import pytest

from diffjax.models import MODELS, preset
from diffjax.registry import build


def count(name, **settings):
    model = build(preset(name), MODELS, "model", **settings)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


@pytest.mark.parametrize("name, millions", [("dit_s_2", 33), ("dit_b_2", 130), ("dit_l_2", 458), ("dit_xl_2", 675)])
def test_dit_sizes_of_the_paper(name, millions):
    # arXiv:2212.09748, Table 4, rounded there; theirs also predict a variance and count the fixed positions (0.05 %).
    assert round(count(name, shape=(32, 32, 4), num_classes=1000) / 1e6) == millions


def test_dit_xl_2_to_the_last_parameter():
    # The released code reports 675,129,632 for 256 x 256. It counts 256 x 1152 fixed positions, and its last layer has
    # 32 outputs (patch 2, 8 channels) where this one has 16.
    expected = 675_129_632 - 256 * 1152 - 16 * (1152 + 1)
    assert count("dit_xl_2", shape=(32, 32, 4), num_classes=1000) == expected


def test_dit_patch_changes_only_the_two_ends():
    small, large = (count(f"dit_s_{patch}", shape=(32, 32, 4), num_classes=1000) for patch in (2, 8))
    extra = (8 * 8 - 2 * 2) * 4
    assert large - small == extra * 384 + extra * (384 + 1)


def test_adm_64_size_of_the_paper():
    # 295.9 M in EDM's table of networks (arXiv:2206.00364, Table 7, ADM), 296 M in arXiv:2105.05233, Table 4. Theirs
    # predicts a variance as well there (3 more channels out of 192 x 9).
    assert count("adm_64", shape=(64, 64, 3), num_classes=1000) == pytest.approx(295.9e6, abs=0.05e6)
