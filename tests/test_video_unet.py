"""The video UNet against diffusers' own networks on shared weights, and what is ours alone."""

import pytest
import torch

from layerloom.engine.models.dynamicrafter import (
    IMAGE_PROJECTOR,
    VARIANTS,
    DynamiCrafter,
    QueryTransformer,
    published_unet,
)
from layerloom.engine.models.video_blocks import frame_positions
from layerloom.engine.models.video_unet import VideoUNet

SMALL = {
    "block_channels": (16, 32, 32),
    "layers_per_block": 2,
    "attention_levels": (True, True, False),
    "context_dim": 24,
    "norm_groups": 8,
}
DIFFUSERS = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}
DYNAMIC = {
    **SMALL,
    "head_dim": 8,
    "in_channels": 8,
    "image_attention": True,
    "image_tokens_per_frame": 3,
    "scalar_embeddings": ("fps_embedding",),
}
SPEED = {"fps_embedding": torch.tensor([24.0])}


def randomised(network, seed=0):
    """Non-zero weights everywhere: a layer that starts at zero would hide what is behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            spread = max(1, parameter[0].numel() if parameter.dim() > 1 else 4) ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * spread
            norm = "norm" in name or name.rpartition(".")[0].endswith((".0", ".ln0", ".ln1"))
            parameter.copy_(noise + float(norm and parameter.dim() == 1 and "weight" in name))
    return network.eval()


def inputs(channels=4, batch=2, frames=5, height=8, width=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, frames, height, width, generator=generator)
    return x, torch.tensor([7, 981][:batch]), torch.randn(batch, 11, 24, generator=generator)


def shared(ours, theirs, dropped="pos_embed.pe"):
    """Their weights in our network; every name must be the same."""
    state = {k: t for k, t in theirs.state_dict().items() if not k.endswith(dropped)}
    ours.load_state_dict(state, strict=True)
    return ours.eval()


# Against diffusers


@pytest.mark.parametrize("size", [(8, 12), (10, 6)])
def test_configured_as_modelscope_it_is_diffusers_unet3d(size):
    from diffusers import UNet3DConditionModel

    theirs = UNet3DConditionModel(
        **DIFFUSERS,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
    )
    ours = shared(VideoUNet(**SMALL, head_dim=8), randomised(theirs))
    x, t, text = inputs(height=size[0], width=size[1])
    with torch.no_grad():
        expected = theirs(x, t, text).sample
        found = ours(x, t, text)
    # Sides that the resolutions do not divide work too: each step up goes to its skip's size.
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 2e-5


def test_control_residuals_go_where_diffusers_adds_them():
    from diffusers import UNet3DConditionModel

    theirs = UNet3DConditionModel(
        **DIFFUSERS,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
    )
    ours = shared(VideoUNet(**SMALL, head_dim=8), randomised(theirs))
    x, t, text = inputs(batch=1)
    sides = [(16, 8, 12)] * 3 + [(16, 4, 6)] + [(32, 4, 6)] * 2 + [(32, 2, 3)] * 3
    residuals = [torch.randn(5, *side) for side in sides]
    middle = torch.randn(5, 32, 2, 3)
    with torch.no_grad():
        expected = theirs(
            x,
            t,
            text,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=middle,
        ).sample
        found = ours(x, t, text, down_residuals=residuals, mid_residual=middle)
        without = ours(x, t, text)
    assert (found - expected).abs().max() <= 2e-5
    assert (found - without).abs().max() > 0.1
    with pytest.raises(ValueError), torch.no_grad():
        ours(x, t, text, down_residuals=residuals[:-1])


@pytest.mark.parametrize("middle", [True, False])
def test_configured_with_motion_modules_it_is_diffusers_motion_unet(middle):
    from diffusers import UNetMotionModel

    theirs = UNetMotionModel(
        **DIFFUSERS,
        num_attention_heads=2,
        motion_num_attention_heads=4,
        motion_max_seq_length=24,
        use_motion_mid_block=middle,
        down_block_types=(
            "CrossAttnDownBlockMotion",
            "CrossAttnDownBlockMotion",
            "DownBlockMotion",
        ),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
    )
    # diffusers takes a motion module's GroupNorm over all frames, the original frame by frame.
    motion = {"heads": 4, "middle": middle, "norm_over_frames": True}
    ours = VideoUNet(
        **SMALL,
        head_dim=None,
        num_heads=2,
        linear_projection=False,
        temporal_convolution=False,
        temporal_transformer=False,
        initial_temporal_transformer=False,
        motion_modules=motion,
    )
    shared(ours, randomised(theirs))
    x, t, text = inputs()
    with torch.no_grad():
        # diffusers wants the text once a frame.
        expected = theirs(x, t, text.repeat_interleave(5, dim=0)).sample
        found = ours(x, t, text)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 2e-5


def test_positions_are_the_ones_motion_modules_store():
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    stored = SinusoidalPositionalEmbedding(40, max_seq_length=32).pe[0]
    assert torch.equal(frame_positions(32, 40), stored)
    assert torch.equal(frame_positions(16, 40), stored[:16])


def test_the_query_transformer_is_diffusers_image_projection():
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    theirs = IPAdapterPlusImageProjection(
        embed_dims=20, output_dims=24, hidden_dims=32, depth=2, dim_head=8, heads=3, num_queries=6
    )
    ours = QueryTransformer(
        dim=32, depth=2, heads=3, head_dim=8, queries=6, in_dim=20, out_dim=24, mlp_ratio=4
    )
    shared(ours, randomised(theirs))
    tokens = torch.randn(2, 9, 20)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens)).abs().max() <= 2e-5


# The image stream


@pytest.fixture(scope="module")
def dynamic():
    return randomised(VideoUNet(**DYNAMIC))


def predict(network, image, **more):
    x, t, text = inputs(channels=8, batch=1)
    with torch.no_grad():
        return network(x, t, text, image_context=image, scalars=SPEED, **more)


def test_a_frame_has_its_own_tokens_only_where_their_number_says_so(dynamic):
    """Five frames of 3 tokens: 15 are five times three; any other number all frames see."""
    image = torch.randn(1, 15, 24)
    turned = image.flip(1)
    assert (predict(dynamic, image) - predict(dynamic, turned)).abs().max() > 0.1
    image = torch.randn(1, 16, 24)
    turned = image.flip(1)
    assert (predict(dynamic, image) - predict(dynamic, turned)).abs().max() < 1e-4


def test_the_image_scale_moves_all_or_one_layer(dynamic):
    image = torch.randn(1, 15, 24)
    layers = dynamic.spatial_transformers()
    assert len(layers) == dynamic.spatial_count == 4 + 1 + 6
    assert [layer.index for layer in layers] == list(range(11))
    assert layers[4] is dynamic.mid_block.attentions[0]
    plain, off = predict(dynamic, image), predict(dynamic, image, image_scale=0.0)
    assert torch.equal(off, predict(dynamic, None))
    assert torch.equal(plain, predict(dynamic, image, image_scale=[1.0] * 11))
    middle = [1.0] * 4 + [0.3] + [1.0] * 6
    some = predict(dynamic, image, image_scale=middle)
    assert (some - plain).abs().max() > 1e-3 and (some - off).abs().max() > 1e-3
    with pytest.raises(ValueError, match="10 entries for 11 layers"):
        predict(dynamic, image, image_scale=[1.0] * 10)


def test_a_gate_of_zero_is_a_factor_of_one(dynamic):
    gated = VideoUNet(**DYNAMIC, image_gate=True).eval()
    missing = gated.load_state_dict(dynamic.state_dict(), strict=False).missing_keys
    assert len(missing) == 11 and all(name.endswith("attn2.alpha") for name in missing)
    image = torch.randn(1, 15, 24)
    assert (predict(gated, image) - predict(dynamic, image)).abs().max() < 1e-6
    for layer in gated.spatial_transformers():
        # tanh(alpha) + 1 = 2: as a user's scale of 2 on the ungated network.
        layer.transformer_blocks[0].attn2.alpha.data.fill_(30.0)
    doubled = predict(dynamic, image, image_scale=2.0)
    assert (predict(gated, image) - doubled).abs().max() < 1e-4


def test_every_clip_of_a_batch_keeps_its_own_conditions(dynamic):
    x, _, text = inputs(channels=8)
    image, t = torch.randn(2, 15, 24), torch.tensor([981, 7])
    with torch.no_grad():
        speed = {"fps_embedding": torch.tensor([5, 24])}
        both = dynamic(x, t, text, image_context=image, scalars=speed)
        for clip in range(2):
            one = slice(clip, clip + 1)
            alone = dynamic(
                x[one],
                t[one],
                text[one],
                image_context=image[one],
                scalars={"fps_embedding": speed["fps_embedding"][one]},
            )
            assert (both[one] - alone).abs().max() < 2e-5


def test_a_given_attention_function_does_all_attention(dynamic):
    calls = []

    def counted(q, k, v, scale):
        calls.append((q.shape[1], scale))
        return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v

    image = torch.randn(1, 15, 24)
    found = predict(dynamic, image, attention=counted)
    # Self, text and image in 11 spatial transformers; twice in 10 + 1 + 1 temporal ones.
    assert len(calls) == 3 * 11 + 2 * 12
    assert {scale for _, scale in calls} == {8**-0.5}
    assert (found - predict(dynamic, image)).abs().max() < 2e-5


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="head_dim or num_heads"):
        VideoUNet(**SMALL, head_dim=8, num_heads=8)
    with pytest.raises(ValueError, match="attention_levels"):
        VideoUNet(**{**SMALL, "attention_levels": (True,)})
    plain = VideoUNet(**SMALL, head_dim=8)
    x, t, text = inputs(batch=1)
    with pytest.raises(ValueError, match="without image_attention"):
        plain(x, t, text, image_context=text)


def test_the_published_networks_have_their_published_size():
    """1.4389 B parameters, and 16 gates in the 256 one."""
    for name, gates in (("512", 0), ("256", 16)):
        networks = DynamiCrafter(
            unet=published_unet(VARIANTS[name]), image_projector=IMAGE_PROJECTOR, device="meta"
        )
        count = sum(p.numel() for p in networks.unet.parameters())
        assert count == 1_438_854_980 + gates
        assert networks.unet.spatial_count == 16


def test_operations_come_from_outside():
    made = []

    class Counted:
        def __getattr__(self, name):
            made.append(name)
            return getattr(torch.nn, name)

    VideoUNet(**DYNAMIC, operations=Counted(), device="meta", dtype=torch.bfloat16)
    assert set(made) == {"Linear", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm"}


def test_what_adds_to_an_attention_attaches_from_outside(dynamic):
    """As reference attention will: features of every layer read, then added to its output."""
    seen = {}

    def keep(module, inputs, output):
        seen[module] = output

    def add(module, inputs, output):
        return output + 0.1 * seen[module].roll(1, dims=1)

    image = torch.randn(1, 15, 24)
    plain = predict(dynamic, image)
    layers = [t.transformer_blocks[0] for t in dynamic.spatial_transformers()]
    attentions = [attention for layer in layers for attention in (layer.attn1, layer.attn2)]
    for hook in (keep, add):
        handles = [attention.register_forward_hook(hook) for attention in attentions]
        found = predict(dynamic, image)
        for handle in handles:
            handle.remove()
        assert torch.equal(found, plain) == (hook is keep)
    assert len(seen) == 2 * 11
    assert torch.equal(predict(dynamic, image), plain)
