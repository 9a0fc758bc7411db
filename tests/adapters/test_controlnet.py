"""ControlNet of Stable Diffusion: what it has of its own beside what it shares with its U-Net."""

from flax import nnx

from diffjax.adapters import controlnet
from diffjax.nn import ACTIVATIONS, Compute


def test_a_time_among_the_labels_has_an_activation_of_its_own():
    c = controlnet.Settings(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), mid_block_type="UNetMidBlock2D", act_fn="gelu",
        class_embed_type="timestep",
    )  # fmt: skip
    net = nnx.eval_shape(lambda: controlnet.ControlNet(c, compute=Compute(), rngs=nnx.Rngs(0)))
    assert net.time_embedding.activation is ACTIVATIONS["gelu"]
    assert net.class_embedding.activation is ACTIVATIONS["silu"]
