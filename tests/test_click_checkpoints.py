"""Networks that animate regions: the official, AnimateDiff's, PIA's and our files, and names."""

import gzip
import json
import re

import pytest
import torch
from test_video_unet import randomised

from layerloom.engine.checkpoints.click import from_store, grown_state, load_click, open_click
from layerloom.engine.checkpoints.click_save import save_click
from layerloom.engine.checkpoints.convert import convert_checkpoint
from layerloom.engine.checkpoints.golden import load_case
from layerloom.engine.checkpoints.load import open_checkpoint
from layerloom.engine.checkpoints.lora import inspect_file
from layerloom.engine.checkpoints.reader import memory_store
from layerloom.engine.checkpoints.video_names import unet_modules
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.follow_your_click import (
    READINGS,
    ClickSettings,
    FollowYourClick,
    affinity,
    click_unet,
    join_conditions,
    latent_mask,
)
from layerloom.engine.models.video_unet import VideoUNet

# Stable Diffusion 1.5 in miniature, as diffusers takes it: eight heads, groups that divide 32.
WIDTHS = (16, 32)
SMALL = {
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 24,
}


def spatial():
    from diffusers import UNet2DConditionModel

    return randomised(
        UNet2DConditionModel(
            **SMALL,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )


def adapter(version, channels=None):
    from diffusers import MotionAdapter

    return randomised(
        MotionAdapter(
            block_out_channels=WIDTHS,
            motion_layers_per_block=1,
            motion_norm_num_groups=16,
            motion_max_seq_length=24 if version == "v1" else 32,
            use_motion_mid_block=version == "v2",
            conv_in_channels=channels,
        ),
        1,
    )


def animatediff_names(state, prefix="module."):
    """A motion adapter as AnimateDiff's own files have it."""
    made = {}
    for name, tensor in state.items():
        head, found, rest = name.partition(".transformer_blocks.")
        name = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", head + found)
        rest = re.sub(r"attn(\d)", lambda m: f"attention_blocks.{int(m[1]) - 1}", rest)
        rest = re.sub(r"norm([12])\.", lambda m: f"norms.{int(m[1]) - 1}.", rest)
        rest = rest.replace("norm3.", "ff_norm.")
        if rest.endswith("pos_embed.pe"):
            for index in (0, 1):
                made[f"{prefix}{name}0.attention_blocks.{index}.pos_encoder.pe"] = tensor
            continue
        if not found:
            name = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", head)
        made[f"{prefix}{name}{rest}"] = tensor
    return made


def original_names(state):
    """Stable Diffusion's UNet under its original names."""
    unet = from_store(memory_store(state, "sd")).info.unet
    modules = {engine: original for original, engine in unet_modules(unet).items()}
    made = {}
    for name, tensor in state.items():
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if (module := modules.get(".".join(parts[:length]))) is not None:
                key = ".".join(["model.diffusion_model", module, *parts[length:]])
                made[key] = tensor
                break
        else:
            raise AssertionError(name)
    return made


# The official format


@pytest.fixture
def official(tmp_path, golden_dir):
    """A tiny file as the official loader reads it."""
    weights = load_case(golden_dir, "fyc_unet_tiny_stored").weights("")
    state = {f"module.{key}": tensor for key, tensor in weights.items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "click.ckpt")
    return tmp_path / "click.ckpt"


def test_the_official_format_is_what_it_is(official, tmp_path):
    info = inspect_file(official)
    assert (info.family, info.variant, info.source) == ("follow-your-click",) * 3
    assert (info.motion, info.reading, info.needs_base) == ("v1", "code", False)
    assert info.unet["in_channels"] == 9 and info.unet["norm_over_frames"]
    checkpoint = open_click(official)
    checkpoint.check()
    assert checkpoint.variant.positions == 24 and checkpoint.variant.prediction == "v"
    convert_checkpoint(official, tmp_path / "click.safetensors")
    again = open_click(tmp_path / "click.safetensors")
    assert again.info.source == "layerloom" and again.variant == checkpoint.variant
    assert again.info.unet == checkpoint.info.unet and again.info.motion == "v1"
    first, second = load_click(official).state_dict(), load_click(again).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_full_size_names_are_the_networks(manifest_dir):
    """1254 names, of which 40 are tables of positions, which are computed here."""
    packed = (manifest_dir / "follow_your_click.json.gz").read_bytes()
    shapes = json.loads(gzip.decompress(packed))
    state = {f"module.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    checkpoint = from_store(memory_store(state, "full"))
    checkpoint.check()
    assert checkpoint.info.unet == click_unet("v1")
    tables = sum(key.endswith(".pe") for key in shapes)
    assert len(shapes) == 1254 and checkpoint.info.ignored == tables == 40
    assert checkpoint.info.parameters == 1280774084


def test_a_damaged_file_is_a_sentence(official, golden_dir):
    state = load_case(golden_dir, "fyc_unet_tiny_stored").weights("")
    lacking = {key: t for key, t in state.items() if "up_blocks.1.resnets.0.conv2" not in key}
    with pytest.raises(LayerLoomError, match="up_blocks.1.resnets.0.conv2.bias is missing"):
        from_store(memory_store(lacking, "half.ckpt")).check()
    with pytest.raises(LayerLoomError, match="layerloom click"):
        open_checkpoint(official)
    with pytest.raises(LayerLoomError, match="neither motion modules nor"):
        from_store(memory_store({"a.weight": torch.zeros(2)}, "other.ckpt"))


# AnimateDiff and PIA


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_motion_modules_on_stable_diffusion_are_diffusers_network(version, naming):
    from diffusers import UNetMotionModel

    unet, motion = spatial(), adapter(version)
    theirs = UNetMotionModel.from_unet2d(unet, motion).eval()
    modules, base = motion.state_dict(), unet.state_dict()
    if naming == "original":
        modules, base = animatediff_names(modules), original_names(base)
    alone = from_store(memory_store(modules, "mm.ckpt"))
    assert alone.info.variant == f"animatediff-{version}" and alone.info.needs_base
    assert alone.info.source == ("animatediff" if naming == "original" else "diffusers")
    with pytest.raises(LayerLoomError, match="--base"):
        alone.check()
    whole = from_store(memory_store(modules, "mm.ckpt"), memory_store(base, "sd15.ckpt"))
    whole.check()
    assert not whole.info.needs_base and whole.info.motion == version
    assert whole.variant.positions == (24 if version == "v1" else 32)
    ours = whole.load("cpu", None, None)
    # diffusers takes a motion module's GroupNorm over all frames, the original frame by frame.
    for module in ours.modules():
        if hasattr(module, "norm_over_frames") and type(module).__name__ == "TemporalTransformer":
            module.norm_over_frames = True
    x, t = torch.randn(2, 4, 5, 8, 12), torch.tensor([7, 981])
    text = torch.randn(2, 11, 24)
    with torch.no_grad():
        # diffusers wants the text once a frame.
        expected = theirs(x, t, text.repeat_interleave(5, dim=0)).sample
        found = ours.unet(x, t, text)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 2e-5


def test_pia_is_offered_as_what_it_is():
    modules = adapter("v3", channels=9).state_dict()
    base = memory_store(spatial().state_dict(), "sd15")
    for naming in (dict, animatediff_names):
        checkpoint = from_store(memory_store(naming(modules), "pia.ckpt"), base)
        checkpoint.check()
        assert checkpoint.info.variant == "pia" and checkpoint.info.unet["in_channels"] == 9
        settings = checkpoint.variant
        assert settings.mask == "affinity" and not settings.reads_regions
        assert settings.reads_picture and settings.prediction == "eps"
        network = checkpoint.load("cpu", None, None)
        assert torch.equal(network.unet.conv_in.weight, modules["conv_in.weight"])
    row = affinity(4.0, 5)
    assert row[0] == 1 and row[1:].tolist() == [pytest.approx(0.9)] * 4
    assert affinity(16.0, 2)[1] == pytest.approx(0.6) and affinity(99.0, 2)[1] == 0.5


def test_adapters_of_motion_modules_are_no_motion_modules():
    key = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0."
    key += "attention_blocks.0.processor.to_q_lora.down.weight"
    with pytest.raises(LayerLoomError, match="neither motion modules nor"):
        from_store(memory_store({key: torch.zeros(4, 16)}, "motion_lora.ckpt"))


def test_a_base_must_be_stable_diffusion_itself():
    modules = memory_store(adapter("v2").state_dict(), "mm.ckpt")
    with pytest.raises(LayerLoomError, match="other.ckpt is not what mm.ckpt stands on"):
        from_store(modules, memory_store(adapter("v2").state_dict(), "other.ckpt"))


def test_converting_puts_both_into_one_file(tmp_path):
    from safetensors.torch import save_file

    def write(name, state):
        save_file({k: t.clone() for k, t in state.items()}, tmp_path / name)
        return tmp_path / name

    modules = write("mm.safetensors", animatediff_names(adapter("v2").state_dict(), ""))
    base = write("sd15.safetensors", original_names(spatial().state_dict()))
    target = tmp_path / "both.safetensors"
    with pytest.raises(LayerLoomError, match="--base"):
        convert_checkpoint(modules, target)
    assert not target.exists()
    convert_checkpoint(modules, target, base=base)
    assert inspect_file(target).variant == "animatediff-v2"
    assert inspect_file(base).variant == "stable-diffusion"
    open_click(target).check()
    with pytest.raises(LayerLoomError, match="leave --base out"):
        convert_checkpoint(write("a.safetensors", {"x": torch.zeros(1)}), target, base=base)


# The network


def small_unet(**changes):
    return click_unet(
        "v2",
        block_channels=WIDTHS,
        layers_per_block=1,
        attention_levels=(True, False),
        context_dim=24,
        norm_groups=16,
        **changes,
    )


def run(network, **changes):
    torch.manual_seed(3)
    given = {
        "noisy": torch.randn(2, 4, 5, 8, 8),
        "timestep": torch.tensor([7, 981]),
        "context": torch.randn(2, 6, 24),
        "mask": torch.ones(2, 1, 8, 8),
        "picture": torch.randn(2, 4, 8, 8),
        "strength": torch.tensor([4.0, 8.0]),
        "stride": torch.tensor([4.0, 4.0]),
    }
    with torch.no_grad():
        return network(**{**given, **changes})


def test_the_motion_augmented_module_begins_without_an_effect():
    """Paper's new attention, its output zero: the network equals the one without it exactly."""
    plain = randomised(FollowYourClick(unet=small_unet()))
    augmented = FollowYourClick(unet=small_unet(phrase=True)).eval()
    missing = augmented.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(".phrase_" in name for name in missing)
    phrase = torch.randn(2, 3, 24)
    assert torch.equal(run(augmented, phrase=phrase), run(plain))
    randomised(augmented)
    moved = run(augmented, phrase=phrase) - run(augmented, phrase=torch.randn(2, 3, 24))
    assert moved.abs().max() > 1e-3
    # Without one it reads the caption's features, as the paper does at inference.
    text = torch.randn(2, 6, 24)
    assert torch.equal(run(augmented, context=text), run(augmented, context=text, phrase=text))


def test_a_start_that_reads_less_is_grown_without_an_effect():
    base = randomised(VideoUNet(**small_unet(in_channels=4, scalar_embeddings=())))
    wanted = FollowYourClick(unet=small_unet(phrase=True), settings=ClickSettings()).unet
    for name in ("fps_embedding", "motion_embedding"):
        torch.nn.init.zeros_(getattr(wanted, name).linear_2.weight)
        torch.nn.init.zeros_(getattr(wanted, name).linear_2.bias)
    shapes = {name: tuple(t.shape) for name, t in wanted.state_dict().items()}
    wanted.load_state_dict(grown_state(base.state_dict(), shapes), strict=False)
    x, t, text = torch.randn(1, 9, 5, 8, 8), torch.tensor([7]), torch.randn(1, 6, 24)
    scalars = {name: torch.tensor([5.0]) for name in ("fps_embedding", "motion_embedding")}
    with torch.no_grad():
        expected = base(x[:, :4], t, text)
        found = wanted.eval()(x, t, text, scalars=scalars)
    assert (found - expected).abs().max() < 1e-5
    with pytest.raises(LayerLoomError, match="conv_out.bias has the shape"):
        grown_state({**base.state_dict(), "conv_out.bias": torch.zeros(5)}, shapes)


@pytest.mark.parametrize("reading", READINGS)
def test_both_readings_place_picture_and_mask(reading):
    picture, mask = READINGS[reading]
    settings = ClickSettings(picture=picture, mask=mask)
    assert settings.reading == reading
    noisy, still = torch.randn(1, 4, 3, 2, 2), torch.randn(1, 4, 2, 2)
    joined = join_conditions(noisy, torch.ones(1, 1, 2, 2), still, settings)
    assert joined.shape == (1, 9, 3, 2, 2) and torch.equal(joined[:, :4], noisy)
    for frame in range(3):
        first = frame == 0
        assert bool(joined[:, 4, frame].all()) == (first or mask == "all")
        shown = joined[:, 5:, frame]
        assert torch.equal(shown, still if first or picture == "all" else still * 0)


def test_a_mask_is_cut_at_one_half_and_small_regions_stay():
    soft = torch.zeros(64, 64)
    soft[8:40, 8:40] = 0.4  # the released code would take it for full
    soft[16:32, 16:32] = 0.6
    small = latent_mask(soft, (8, 8))
    assert small.sum() == 4 and small[2:4, 2:4].all()
    dot = torch.zeros(2, 64, 64)
    dot[0, 13, 21] = 1.0
    assert latent_mask(dot, (8, 8))[0].nonzero().tolist() == [[1, 2]]
    assert not latent_mask(dot, (8, 8))[1].any()


def test_our_own_file_keeps_its_settings(tmp_path):
    settings = ClickSettings(name="mine", picture="all", mask="all", frames=8, strength_default=2.0)
    unet = small_unet(phrase=True)
    network = randomised(FollowYourClick(unet=unet, settings=settings))
    path = tmp_path / "mine.safetensors"
    save_click(path, {"unet": network.unet.state_dict()}, settings=settings, unet=unet)
    checkpoint = open_click(path)
    assert checkpoint.variant == settings and checkpoint.info.reading == "own"
    assert checkpoint.info.unet == {**unet, "scalar_embeddings": unet["scalar_embeddings"]}
    loaded = load_click(checkpoint)
    assert torch.equal(run(loaded), run(network))
    with pytest.raises(ValueError, match="part"):
        save_click(path, {"other": {}}, settings=settings, unet=unet)
