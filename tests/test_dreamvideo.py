"""DreamVideo-2's network: equal to its base at first, subjects and boxes where they belong."""

import pytest
import torch
from test_video_unet import SMALL, inputs, randomised

from layerloom.engine.models.box_control import FrameControl, block_keywords, frame_settings
from layerloom.engine.models.dreamvideo import (
    BoxShares,
    DreamVideo,
    TrajectorySettings,
    owned,
    pool_masks,
    whole_network,
)

BASE = {**SMALL, "head_dim": 8}
CONTROL = {"widths": (4, 8, 8, 16), "heads": 2}
# The paper's reference attention, and with places in the pictures.
KINDS = [TrajectorySettings(), TrajectorySettings(placed_reference=True)]
FRAMES, HEIGHT, WIDTH = 5, 8, 12


def network(seed=0, **changes):
    keywords = {"unet": BASE, "reference": True, "control": CONTROL, **changes}
    torch.manual_seed(seed)
    return DreamVideo(**keywords).eval()


def trained(seed=0, **changes):
    """As after a training: nothing is zero any more."""
    return randomised(network(**changes), seed)


def boxes(*places, batch=1):
    """Masks [B, S, T, H, W] of (x0, y0, x1, y1) in latent places, the same in all frames."""
    masks = torch.zeros(batch, len(places), FRAMES, HEIGHT * 8, WIDTH * 8)
    for index, (x0, y0, x1, y1) in enumerate(places):
        masks[:, index, :, y0 * 8 : y1 * 8, x0 * 8 : x1 * 8] = 1
    return masks


def subjects(count=1, batch=1):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, count, 4, HEIGHT, WIDTH, generator=generator)


def predict(model, masks, pictures=None, weight=None, batch=1):
    x, t, text = inputs(batch=batch)
    with torch.no_grad():
        features = None
        if pictures is not None:
            features = model.subject_features(pictures, torch.zeros(batch, 11, 24))
        placement = model.place(masks, features, weight)
        return model(x, t, text, placement=placement)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("places", [[(1, 1, 5, 5)], [(1, 1, 5, 5), (3, 2, 9, 7)]])
def test_at_first_it_is_its_base_exactly(places, settings):
    model = network(settings=settings)
    x, t, text = inputs(batch=1)
    with torch.no_grad():
        base = model.unet(x, t, text)
        assert torch.equal(model(x, t, text), base)
    model.start_from_base()
    assert torch.equal(predict(model, boxes(*places), subjects(len(places))), base)
    # One training step moves what ends in zeros, and no more is needed for all to count.
    for output in (model.control.controlnet_mid_block, model.reference[0].attn1.to_out[0]):
        torch.nn.init.constant_(output.weight, 0.01)
        assert not torch.equal(predict(model, boxes(*places), subjects(len(places))), base)


def test_the_controlnet_begins_as_the_bases_way_down():
    model = network()
    model.start_from_base()
    base, control = model.unet.state_dict(), model.control.state_dict()
    copied = [name for name in control if not name.startswith("controlnet_")]
    assert all(torch.equal(control[name], base[name]) for name in copied)
    assert not any(".temp_" in name or "transformer_in" in name for name in copied)


def test_the_controlnet_is_diffusers_own():
    from diffusers import ControlNetModel

    theirs = randomised(
        ControlNetModel(
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            conditioning_embedding_out_channels=(4, 8, 8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        )
    )
    settings = frame_settings(**block_keywords(BASE))
    ours = FrameControl(
        block_channels=(16, 32, 32), attention_levels=(True, True, False), settings=settings
    )
    state = theirs.state_dict()
    ours.load_state_dict({k: t for k, t in state.items() if "cond_embedding" not in k})
    x, t, text = inputs(batch=1)
    picture = torch.rand(FRAMES, 3, HEIGHT * 8, WIDTH * 8)
    with torch.no_grad():
        hint = theirs.controlnet_cond_embedding(picture)
        down, middle = ours.eval()(x, t, text, hint)
        frames = x.transpose(1, 2).flatten(0, 1)
        texts = text.repeat_interleave(FRAMES, 0)
        expected = theirs(frames, t.repeat(FRAMES), texts, picture, return_dict=False)
    assert len(down) == len(expected[0])
    for ours_, theirs_ in zip([*down, middle], [*expected[0], expected[1]], strict=True):
        assert (ours_ - theirs_).abs().max() <= 2e-5
    assert middle.std() > 0.01


# Where subjects count


def test_shares_of_one_subject_are_the_papers():
    masks = boxes((1, 1, 5, 5))
    shares = BoxShares(masks, 0.75).at((HEIGHT, WIDTH)).unflatten(2, (FRAMES, HEIGHT, WIDTH))
    small = pool_masks(masks, (HEIGHT, WIDTH))
    assert torch.equal(shares, small + 0.75 * (1 - small))
    half = BoxShares(masks, 0.0).at((HEIGHT // 2, WIDTH // 2)).unflatten(2, (FRAMES, 4, 6))
    assert half[0, 0, 0].tolist()[0][:3] == [0.25, 0.5, 0.25]


def test_where_boxes_overlap_the_first_subject_stands_in_front():
    masks = boxes((0, 0, 6, 4), (3, 2, 9, 7), (0, 0, 9, 7))
    first, second, third = owned(masks)[0, :, 0]
    assert torch.equal(first, masks[0, 0, 0])
    assert torch.equal(second, masks[0, 1, 0] * (1 - masks[0, 0, 0]))
    assert (first + second + third).max() == 1
    shares = BoxShares(masks, 0.75).at((HEIGHT, WIDTH)).unflatten(2, (FRAMES, HEIGHT, WIDTH))
    assert shares[0, :, 0, 0, 0].tolist() == [1, 0, 0]
    assert shares[0, :, 0, 5, 8].tolist() == [0, 1, 0]
    # Outside of all boxes they divide lambda.
    assert shares[0, :, 0, 7, 11].tolist() == [0.25, 0.25, 0.25]


def test_with_lambda_0_a_subject_changes_nothing_at_its_layer_outside_of_its_box():
    model = trained()
    layer = model.reference[4].attn1
    width = layer.to_q.in_features
    x, seen = torch.randn(FRAMES, HEIGHT * WIDTH, width), torch.randn(1, 1, 7, width)
    masks = boxes((2, 1, 5, 4))
    shares = BoxShares(masks, 0.0).at((HEIGHT, WIDTH))
    with torch.no_grad():
        out = layer(x, seen, shares)
    inside = shares[0, 0].reshape(FRAMES, -1) > 0
    assert torch.equal(out[~inside], x[~inside])
    assert (out[inside] - x[inside]).abs().amax(-1).min() > 0


def test_two_subjects_are_the_sum_of_what_each_gives_alone():
    model = trained()
    layer = model.reference[0].attn2
    width = layer.to_q.in_features
    x, seen = torch.randn(FRAMES, HEIGHT * WIDTH, width), torch.randn(1, 2, 7, width)
    shares = BoxShares(boxes((0, 0, 6, 4), (3, 2, 9, 7)), 0.5).at((HEIGHT, WIDTH))
    with torch.no_grad():
        both = layer(x, seen, shares)
        alone = [layer(x, seen[:, [i]], shares[:, [i]]) for i in (0, 1)]
    assert (both - (alone[0] + alone[1] - x)).abs().max() < 1e-5


@pytest.mark.parametrize("settings", KINDS)
def test_subjects_boxes_and_weight_all_count(settings):
    model = trained(settings=settings)
    masks, pictures = boxes((1, 1, 5, 5), (6, 2, 11, 7)), subjects(2)
    found = predict(model, masks, pictures)
    for other in (
        predict(model, masks),
        predict(model, masks, pictures, weight=0.2),
        predict(model, masks.flip(-1), pictures),
        predict(model, masks, pictures.flip(1)),
    ):
        assert (found - other).abs().max() > 1e-3
    without = trained(control=None, settings=settings)
    assert without.box_encoder is None and without.control is None
    assert predict(without, masks, pictures).shape == found.shape


@pytest.mark.parametrize("settings", KINDS)
def test_clips_of_a_batch_do_not_see_each_other(settings):
    model = trained(settings=settings)
    masks = torch.cat([boxes((1, 1, 5, 5)), boxes((6, 2, 11, 7))])
    pictures = subjects(1, batch=2)
    both = predict(model, masks, pictures, batch=2)
    x, t, text = inputs(batch=2)
    for clip in range(2):
        one = slice(clip, clip + 1)
        with torch.no_grad():
            features = model.subject_features(pictures[one], torch.zeros(1, 11, 24))
            placement = model.place(masks[one], features)
            alone = model(x[one], t[one], text[one], placement=placement)
            twice = model(
                x[one].repeat(2, 1, 1, 1, 1),
                t[one].repeat(2),
                text[one].repeat(2, 1, 1),
                placement=placement.repeated(2),
            )
        assert (both[one] - alone).abs().max() < 2e-5
        assert (twice - alone).abs().max() < 2e-5


@pytest.mark.parametrize("settings", KINDS)
def test_only_what_is_new_learns_where_the_base_is_frozen(settings):
    model = network(settings=settings)
    model.start_from_base()
    model.unet.requires_grad_(False)
    x, t, text = inputs(batch=1)
    for _ in range(2):
        features = model.subject_features(subjects(), torch.zeros(1, 11, 24))
        placement = model.place(boxes((1, 1, 5, 5)), features)
        model(x, t, text, placement=placement).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert all(p.grad is None for p in model.unet.parameters())
    new = [(n, p) for n, p in model.named_parameters() if not n.startswith("unet.")]
    still = [n for n, p in new if p.grad is None or not p.grad.abs().any()]
    assert still == []


def test_the_published_size():
    """ModelScope's 1.41 billion and, as the paper says, 99 million of reference attention."""
    from diffusers import UNet3DConditionModel

    with torch.device("meta"):
        base = UNet3DConditionModel()  # the default settings are ModelScope's
    model = DreamVideo(**whole_network(), device="meta")
    count = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    assert model.unet.spatial_count == 16 and len(model.reference) == 16
    assert count["reference"] == 4 * 2 * (5 * 320**2 + 5 * 640**2 + 6 * 1280**2)
    assert round(count["reference"] / 1e6) == 99
    assert count["unet"] == sum(map(torch.numel, base.parameters())) == 1_411_233_860
    assert model.unet.state_dict().keys() == base.state_dict().keys()


def test_operations_come_from_outside():
    made = []

    class Counted:
        def __getattr__(self, name):
            made.append(name)
            return getattr(torch.nn, name)

    DreamVideo(unet=BASE, reference=True, control=CONTROL, operations=Counted(), device="meta")
    assert set(made) == {"Linear", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm"}
