"""Clicked regions to clips on a tiny network: masks, several regions, guidance, held background."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from animate_files import write_tokenizer
from test_click_checkpoints import adapter, spatial
from tiny_clicker import SETTINGS, SIDE, write_clicker

from layerloom.engine.checkpoints.golden import load_case
from layerloom.engine.click import ClickPipeline
from layerloom.engine.click_composite import hold_still, moving_area
from layerloom.engine.click_request import ClickRequest, Region
from layerloom.engine.click_sampling import territories
from layerloom.engine.errors import LayerLoomError


@pytest.fixture(scope="module")
def clicker(tmp_path_factory):
    return write_clicker(tmp_path_factory.mktemp("click") / "tiny.safetensors")


@pytest.fixture
def pipeline(clicker):
    return ClickPipeline.open(clicker, device="cpu")


def picture(seed=0, height=SIDE, width=SIDE):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask(rows, columns, height=SIDE, width=SIDE):
    made = np.zeros((height, width), np.float32)
    made[rows, columns] = 1
    return made


LEFT = mask(slice(8, 24), slice(0, 16))
RIGHT = mask(slice(8, 24), slice(24, 32))


def request(*regions, **changes):
    regions = regions or (Region(LEFT, "moving left"),)
    return ClickRequest(**{"image": picture(), "regions": regions, "steps": 2, **changes})


class Spy(torch.nn.Module):
    """Stands in for the network: looks at one number at a time, remembers what it was given."""

    def __init__(self, network):
        super().__init__()
        self.settings, self.calls = network.settings, []
        self.weight = next(network.parameters())

    def forward(self, noisy, timestep, context, **given):
        self.calls.append({"noisy": noisy, "timestep": timestep, "context": context, **given})
        text = context.mean((1, 2)) + given["phrase"].mean((1, 2)) + 0.1 * given["strength"]
        return torch.tanh(noisy) + text.view(-1, 1, 1, 1, 1)


@pytest.fixture
def spy(pipeline):
    pipeline.network = Spy(pipeline.network)
    return pipeline


def test_a_run_and_its_record(pipeline):
    steps = []
    result = pipeline.run(
        request(Region(LEFT, "moving left", 3.0), fps=12),
        lambda *numbers: steps.append(numbers),
    )
    assert result.frames.shape == (4, SIDE, SIDE, 3) and result.frames.dtype == np.uint8
    assert np.array_equal(result.masks, LEFT[None] > 0) and result.fps == 12
    assert result.settings["regions"] == [{"phrase": "moving left", "strength": 3.0}]
    assert result.settings["steps"] == 2 and result.settings["reading"] == "own"
    assert steps[:2] == [("Denoising", 1, 2), ("Denoising", 2, 2)]
    assert steps[-1] == ("Decoding", 4, 4)
    again = pipeline.run(request(Region(LEFT, "moving left", 3.0)))
    assert np.array_equal(again.frames, result.frames)
    other = pipeline.run(request(Region(LEFT, "moving left", 3.0), seed=1))
    assert not np.array_equal(other.frames, result.frames)


def test_what_the_network_is_told(spy):
    spy.run(request(Region(LEFT, "moving left", 3.0), prompt="a red circle", guidance=2))
    call = spy.network.calls[0]
    # Conditional and unconditional in one batch; only the text differs.
    assert call["noisy"].shape == (2, 4, 4, 4, 4)
    assert torch.equal(call["noisy"][0], call["noisy"][1])
    small = torch.zeros(4, 4)
    small[1:3, 0:2] = 1
    assert torch.equal(call["mask"], small.expand(2, 1, 4, 4))
    assert torch.equal(call["picture"][0], call["picture"][1])
    assert call["strength"].tolist() == [3, 3] and call["stride"].tolist() == [1, 1]
    caption, phrase, empty = spy.text.encode(["a red circle", "moving left", ""])
    assert torch.equal(call["context"], torch.stack([caption, empty]))
    assert torch.equal(call["phrase"], torch.stack([phrase, empty]))
    # Leading spacing: two steps of a thousand begin at 501, never at 999.
    assert [c["timestep"][0].item() for c in spy.network.calls] == [501, 1]


def test_without_a_caption_the_phrase_is_read_by_both(spy):
    spy.run(request(guidance=1))
    call = spy.network.calls[0]
    assert call["context"].shape[0] == 1 and torch.equal(call["context"], call["phrase"])
    assert call["strength"].tolist() == [SETTINGS.strength_default]


def test_a_cut_picture_and_its_mask_stay_together(spy):
    """The released code cuts the picture and squeezes the mask."""
    wide = mask(slice(8, 24), slice(16, 32), 32, 64)
    shown = picture(0, 32, 64)
    notes = spy.prepare(request(Region(wide, "moving left"), image=shown, width=32, height=32))
    assert any("50% of its width is cut off" in note for note in notes)
    result = spy.run(request(Region(wide, "moving left"), image=shown, width=32, height=32))
    assert np.array_equal(result.masks[0], mask(slice(8, 24), slice(0, 16)) > 0)
    assert spy.network.calls[0]["mask"][0, 0, 1:3, :2].all()
    outside = mask(slice(8, 24), slice(0, 8), 32, 64)
    with pytest.raises(LayerLoomError, match="Nothing of region 1 is left"):
        spy.prepare(request(Region(outside, "moving left"), image=shown, width=32, height=32))


# Several regions


def test_each_place_belongs_to_the_nearest_region():
    masks = torch.zeros(2, 1, 1, 4, 12)
    masks[0, ..., :2], masks[1, ..., 10:] = 1, 1
    shares = territories(masks)
    assert torch.allclose(shares.sum(0), torch.ones(1, 1, 4, 12))
    first = shares[0, 0, 0, 0]
    assert first[0] > 0.99 and first[11] < 0.01 and (first.diff() <= 1e-6).all()
    # Half way between them both say as much.
    assert first[5] + first[6] == pytest.approx(1.0)
    masks[1] = masks[0]
    assert torch.allclose(territories(masks), torch.full_like(masks, 0.5))
    assert torch.equal(territories(masks[:1]), torch.ones(1, 1, 1, 4, 12))


def test_two_regions_have_their_own_phrase_and_strength(spy):
    regions = (Region(LEFT, "moving left", 1.0), Region(RIGHT, "jumps", 4.0))
    result = spy.run(request(*regions, guidance=2))
    assert result.masks.shape == (2, SIDE, SIDE)
    call = spy.network.calls[0]
    assert call["strength"].tolist() == [1, 1, 4, 4]
    phrases = spy.text.encode(["moving left", "", "jumps", ""])
    assert torch.equal(call["phrase"], phrases)
    assert call["mask"][0].any() and not torch.equal(call["mask"][0], call["mask"][2])


def test_regions_decide_in_their_own_neighbourhood(spy):
    columns = (slice(0, 16), slice(80, 96))
    masks = [mask(slice(8, 24), part, 32, 96) for part in columns]
    regions = [Region(masks[0], "moving left", 1.0), Region(masks[1], "jumps", 4.0)]

    def latents(*chosen):
        asked = request(*chosen, image=picture(0, 32, 96), width=96, height=32)
        return spy._sample(spy._plan(asked), [asked], None)

    both = latents(*regions)
    first, second = ((both - latents(region)).abs().amax((0, 1, 2, 3)) for region in regions)
    # What things do outside of their masks is theirs too, up to half way.
    assert first[:4].max() < 0.05 * first[-4:].min()
    assert second[-4:].max() < 0.05 * second[:4].min()


def test_the_same_region_twice_is_the_region_once(pipeline):
    once = pipeline.run(request()).frames.astype(int)
    twice = pipeline.run(request(*[Region(LEFT, "moving left")] * 2)).frames.astype(int)
    assert np.abs(once - twice).max() <= 1


def test_passes_at_once_or_one_by_one_are_the_same(pipeline):
    regions = (Region(LEFT, "moving left", 1.0), Region(RIGHT, "jumps", 4.0))
    together = pipeline.run(request(*regions)).frames.astype(int)
    pipeline.passes_at_once = False
    apart = pipeline.run(request(*regions)).frames.astype(int)
    assert np.abs(together - apart).max() <= 1


def test_a_batch_is_its_single_runs(pipeline):
    asked = [
        request(Region(LEFT, "moving left", 1.0), seed=3),
        request(Region(RIGHT, "jumps"), seed=4, image=picture(1), prompt="a red circle"),
    ]
    batch = pipeline.generate_batch(asked).astype(int)
    for made, each in zip(batch, asked, strict=True):
        assert np.abs(made - pipeline.run(each).frames).max() <= 1


# Background and first frame


def test_a_held_background_is_the_pictures_own(pipeline):
    shown = picture()
    result = pipeline.run(request(hold_background=True))
    free = pipeline.run(request())
    assert not np.array_equal(free.frames, result.frames)
    still = pipeline.reconstruct(shown[None])[0]
    area = moving_area(free.frames, still, LEFT > 0).numpy()
    assert area[LEFT > 0].all()
    # Past the margin and the fade the picture is there to the pixel.
    far = torch.nn.functional.max_pool2d(torch.tensor(area)[None], 25, 1, 12)[0].numpy() == 0
    assert (result.frames[:, far] == shown[far]).all()
    assert any("composite" in note for note in pipeline.prepare(request(hold_background=True)))


def test_what_moves_out_of_its_mask_is_kept_and_other_changes_are_not():
    shown = np.full((40, 60, 3), 90, np.uint8)
    frames = np.stack([shown] * 3)
    for index in range(3):
        frames[index, 10:18, 4 + 5 * index : 12 + 5 * index] = 250  # leaves its mask
    frames[2, 30:36, 50:56] = 200  # nobody asked for this
    region = mask(slice(10, 18), slice(4, 12), 40, 60) > 0
    area = moving_area(frames, shown, region)
    assert area[10:18, 4:21].all() and not area[25:].any()
    held = hold_still(frames, shown, shown, region)
    assert np.array_equal(held[0, 12:16, 5:11], frames[0, 12:16, 5:11])
    assert np.array_equal(held[2, 12:16, 15:21], frames[2, 12:16, 15:21])
    assert (held[:, 25:] == 90).all()


def test_an_exact_first_frame_is_the_reencoded_picture(pipeline):
    result = pipeline.run(request(exact_first_frame=True))
    coded = pipeline.reconstruct(picture()[None])[0].astype(int)
    assert np.abs(result.frames[0].astype(int) - coded).max() <= 1
    assert np.abs(result.frames[2].astype(int) - coded).mean() > 1


# What is refused


def test_bad_requests_are_a_sentence(pipeline):
    for asked, words in (
        (request(Region(LEFT, " ")), "phrase of region 1 is empty"),
        (request(Region(LEFT[:8], "x")), "is 32x8 and the picture is 32x32"),
        (request(Region(LEFT * 0, "x")), "mask is empty"),
        (request(Region(LEFT * np.nan, "x")), "no numbers"),
        (request(Region(LEFT, "x", -1.0)), "strength of region 1 is -1"),
        (request(Region(LEFT, "x", float("nan"))), "strength of region 1 is nan"),
        (request(*[Region(LEFT, "x")] * 17), "17 regions; give 1 to 16"),
        (request(frames=9), "9 frames are more than the 8"),
        (request(steps=0), "steps is 0"),
        (request(guidance=float("inf")), "guidance is inf"),
        (request(width=0), "width is 0"),
    ):
        with pytest.raises(LayerLoomError, match=words):
            pipeline.prepare(asked)
    with pytest.raises(LayerLoomError, match="0 regions"):
        pipeline.prepare(ClickRequest(picture(), ()))


def test_notes_say_what_is_untrained(pipeline):
    asked = request(Region(LEFT, "flying", 9.0), frames=6, width=48, height=44)
    notes = " ".join(pipeline.prepare(asked))
    for words in ("48x44 does not divide by 16", "trained on 4 frames", "strength 9", "'flying'"):
        assert words in notes


def test_without_a_starter_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("layerloom.engine.click.STARTER", tmp_path / "click.safetensors")
    with pytest.raises(LayerLoomError, match="layerloom train starter/click.toml"):
        ClickPipeline.open(device="cpu")


# Published weights


def write_base(folder, width):
    """Stable Diffusion 1.5's folder in miniature, text features so wide."""
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    kinds = [f"{side}{k}Block2D" for side, k in (("Down", "Encoder"), ("Up", "Decoder"))]
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=8,
        down_block_types=[kinds[0]] * 4,
        up_block_types=[kinds[1]] * 4,
    ).save_pretrained(folder / "vae")
    words = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
        )
    )
    words.save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    (folder / "unet").mkdir()
    state = {k: t.contiguous() for k, t in spatial().state_dict().items()}
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return words.eval()


def test_the_official_format_runs_with_stable_diffusions_parts(tmp_path, golden_dir):
    case = load_case(golden_dir, "fyc_unet_tiny_stored")
    weights = {f"module.{key}": tensor for key, tensor in case.weights("").items()}
    torch.save(weights, tmp_path / "click.ckpt")
    width = case.description["config"]["cross_attention_dim"]
    words = write_base(tmp_path / "sd15", width)
    pipeline = ClickPipeline.open(tmp_path / "click.ckpt", base=tmp_path / "sd15", device="cpu")
    with torch.no_grad():
        row = torch.tensor([[512, *pipeline.text.tokenize("a")[1:-1]] + [513] * 75])
        expected = words(input_ids=row).last_hidden_state
    # All blocks, prompts filled up with the end token.
    assert torch.allclose(pipeline.text.encode(["a"]), expected, atol=1e-5)
    asked = request(frames=3, width=64, height=64, steps=1)
    result = pipeline.run(asked)
    assert result.frames.shape == (3, 64, 64, 3)
    assert result.settings["reading"] == "code" and result.settings["guidance"] == 7.5
    with pytest.raises(LayerLoomError, match="--vae"):
        ClickPipeline.open(tmp_path / "click.ckpt", device="cpu")


def test_pia_moves_the_whole_picture_and_animatediff_is_a_start_alone(tmp_path):
    write_base(tmp_path / "sd15", 24)
    for name, channels in (("pia.ckpt", 9), ("mm.ckpt", None)):
        torch.save(dict(adapter("v3", channels).state_dict()), tmp_path / name)
    pipeline = ClickPipeline.open(tmp_path / "pia.ckpt", base=tmp_path / "sd15", device="cpu")
    asked = request(frames=3, width=64, height=64, steps=1, hold_background=True)
    assert any("PIA reads no mask" in note for note in pipeline.prepare(asked))
    assert pipeline.run(asked).frames.shape == (3, 64, 64, 3)
    with pytest.raises(LayerLoomError, match="a start for training alone"):
        ClickPipeline.open(tmp_path / "mm.ckpt", base=tmp_path / "sd15", device="cpu")


def test_a_reading_changes_what_the_frames_are_told(tmp_path, clicker):
    first = replace(SETTINGS, picture="first", mask="first")
    other = write_clicker(tmp_path / "first.safetensors", first)
    frames = [ClickPipeline.open(p, device="cpu").run(request()).frames for p in (clicker, other)]
    assert not np.array_equal(*frames)
