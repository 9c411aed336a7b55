"""Stills to clips on tiny networks: modes, guidance, windows, chains, exact frames, settings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from animate_files import whole_state, write_checkpoint, write_tokenizer
from torch import nn

from layerloom.engine.animate import AnimatePipeline
from layerloom.engine.animate_request import AnimateRequest
from layerloom.engine.checkpoints.dynamicrafter import open_dynamicrafter
from layerloom.engine.checkpoints.dynamicrafter_save import save_dynamicrafter
from layerloom.engine.clips import as_signed
from layerloom.engine.conditioning.pictures import cover
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.dynamicrafter import VARIANTS
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_image import StarterImageEncoder
from layerloom.engine.models.starter_text import WordEncoder

SIDE = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory, golden_dir, manifest_dir):
    """Whole tiny checkpoints, of the 512 and the 256 kind, and CLIP's tokenizer."""
    folder = tmp_path_factory.mktemp("animate")
    write_tokenizer(folder / "tokenizer")
    for name in ("512", "256"):
        write_checkpoint(folder / f"{name}.ckpt", whole_state(golden_dir, manifest_dir, name))
    return folder


def opened(files, name="512", variant=None):
    return AnimatePipeline.open(
        files / f"{name}.ckpt", text_encoder=files / "tokenizer", device="cpu", variant=variant
    )


@pytest.fixture(scope="module")
def pipeline(files):
    return opened(files, variant="512")


@pytest.fixture(scope="module")
def exact(files):
    """One in float64: networks this narrow blow rounding up a hundred thousand times."""
    pipeline = opened(files, variant="512")
    pipeline.network.double()
    return pipeline


def picture(seed, height=SIDE, width=SIDE):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def request(**changes):
    settings = {"image": picture(0), "prompt": "a boat", "steps": 2, "width": SIDE, "height": SIDE}
    return AnimateRequest(**{**settings, **changes})


class Pointwise(nn.Module):
    """Stands in for the UNet: looks at one number at a time, and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, timestep, context, *, image_context, scalars, image_scale):
        self.calls.append(
            {
                "x": x,
                "timestep": timestep,
                "context": context,
                "image": image_context,
                "scalars": scalars,
                "gate": image_scale,
            }
        )
        channels = x.shape[1] // 2
        noisy, detail = x[:, :channels], x[:, channels:]
        return torch.tanh(noisy) + 0.5 * detail + 0.1 * context.mean((1, 2)).view(-1, 1, 1, 1, 1)


class Watched:
    """The autoencoder, remembering what went through."""

    def __init__(self, codec):
        self.codec, self.encoded, self.decoded = codec, [], []
        self.channels, self.spatial_factor = codec.channels, codec.spatial_factor

    def encode(self, pictures, generator):
        latents = self.codec.encode(pictures, generator)
        self.encoded.append((pictures, latents))
        return latents

    def decode(self, latents):
        self.decoded.append(latents)
        return self.codec.decode(latents)


@pytest.fixture
def watched(pipeline, monkeypatch):
    """The pipeline with a watched autoencoder."""
    monkeypatch.setattr(pipeline, "codec", Watched(pipeline.codec))
    return pipeline


@pytest.fixture
def spied(watched):
    """The same with a pointwise network: (pipeline, network)."""
    real, watched.network.unet = watched.network.unet, Pointwise()
    yield watched, watched.network.unet
    watched.network.unet = real


def assert_shows(pipeline, frame, latents):
    """A frame uint8 [H, W, 3] is what the autoencoder makes of latents [1, C, h, w]."""
    shown = (pipeline.codec.codec.decode(latents).clamp(-1, 1) + 1) / 2 * 255
    found = torch.from_numpy(frame).float().movedim(-1, 0)
    assert (shown[0] - found).abs().max() <= 0.51


# --- the whole way with the real network ----------------------------------------------------


def test_a_still_becomes_a_clip_and_the_seed_repeats_it(pipeline):
    told = []
    result = pipeline.run(request(), lambda *progress: told.append(progress))
    assert result.frames.shape == (16, SIDE, SIDE, 3) and result.frames.dtype == np.uint8
    assert result.keys == ((0, 0),) and result.fps == 8
    assert told[:2] == [("Denoising", 1, 2), ("Denoising", 2, 2)]
    assert told[2:] == [("Decoding", frame, 16) for frame in range(1, 17)]
    assert result.settings["motion"] == 24 and result.settings["eta"] == 1.0
    assert result.settings["text_scale"] == result.settings["image_scale"] == 7.5
    assert result.settings["rescale"] == 0.7 and result.settings["spacing"] == "trailing"
    again = pipeline.run(request())
    other = pipeline.run(request(seed=1))
    assert np.array_equal(result.frames, again.frames)
    assert not np.array_equal(result.frames, other.frames)


def test_every_control_reaches_the_real_network(pipeline):
    plain = pipeline.run(request(steps=1)).frames
    for changes in (
        {"prompt": "another thing"},
        {"image": picture(5)},
        {"motion": 15},
        {"gate": 0.0},
        {"gate": 0.0, "gate_layers": "middle"},
        {"text_scale": 2.0},
        {"image_scale": 2.0},
        {"rescale": 0.0},
        {"eta": 0.0},
        {"negative": "blur"},
    ):
        assert not np.array_equal(pipeline.run(request(steps=1, **changes)).frames, plain), changes


def test_a_batch_makes_what_single_runs_make(exact):
    asked = [
        request(image=picture(0), prompt="a boat", seed=3),
        request(image=picture(1), prompt="two birds fly", seed=4),
    ]
    batch = exact.generate_batch(asked)
    for clip, one in zip(batch, asked, strict=True):
        # Half a grey level may tip over.
        assert np.abs(clip.astype(int) - exact.run(one).frames).max() <= 1


def test_branches_one_by_one_equal_branches_at_once(exact, monkeypatch):
    asked = request(text_scale=5.0, image_scale=2.0)
    together = exact.run(asked).frames
    monkeypatch.setattr(exact, "branches_at_once", False)
    assert np.abs(exact.run(asked).frames.astype(int) - together).max() <= 1


def test_a_network_in_half_precision_samples_in_full(files):
    """Large networks run in bfloat16; states, guidance and the autoencoder stay in float32."""
    pipeline = opened(files, variant="512")
    pipeline.network.bfloat16()
    previews = []
    asked = request(end=picture(3), image_scale=2.0, exact_first_frame=True)
    result = pipeline.run(asked, callback=lambda info: previews.append(info.denoised))
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in previews)
    assert [tuple(p.shape) for p in previews] == [(1, 4, 16, 8, 8)] * 2
    assert result.frames.std() > 1


def test_the_256_weights_sample_without_zero_snr_and_rescale(files):
    pipeline = opened(files, "256")
    settings = pipeline.run(request(steps=2)).settings
    assert settings["variant"] == "256" and settings["motion"] == 3
    assert settings["rescale"] == 0 and settings["spacing"] == "uniform"
    schedule = pipeline.schedule
    assert schedule.prediction == "eps" and not schedule.zero_terminal_snr
    assert pipeline._plan(request()).table.scales.unique().tolist() == [1.0]
    # 30 steps are 30; the published spacing makes 31 of them, which has to be asked for.
    assert len(pipeline._plan(request(steps=30)).table.timesteps) == 30
    released = request(steps=30, spacing="uniform-released")
    assert len(pipeline._plan(released).table.timesteps) == 31


def test_a_starter_brings_its_own_parts_modes_and_sampling(files, tmp_path):
    source = open_dynamicrafter(files / "512.ckpt", "512")
    unet, projector = source.info.unet, source.info.image_projector
    vae = {"latent_channels": 4, "temporal_factor": 1, "width": 32}
    image = {"size": 32, "dim": projector["in_dim"], "width": 8}
    vocabulary = ["a", "red", "circle", "moving", "right"]
    text = {"tokens": 8, "dim": unet["context_dim"]}
    save_dynamicrafter(
        tmp_path / "starter.safetensors",
        {
            "unet": source.part_state("unet"),
            "image_projector": source.part_state("image_projector"),
            "vae": StarterAutoencoder(**vae).state_dict(),
            "text_encoder": WordEncoder(vocabulary=len(vocabulary), **text).state_dict(),
            "image_encoder": StarterImageEncoder(**image).state_dict(),
        },
        variant=replace(VARIANTS["512"], name="starter", height=SIDE, width=SIDE, steps=2),
        unet=unet,
        image_projector=projector,
        vae={"kind": "starter", **vae},
        text_encoder={**text, "vocabulary": vocabulary},
        image_encoder=image,
        metadata={
            "modes": ["animate", "loop"],
            "sampling": {"text_scale": 3.0, "image_scale": 1.5, "frames_per_second": 6.0},
        },
    )
    pipeline = AnimatePipeline.open(tmp_path / "starter.safetensors", device="cpu")
    asked = AnimateRequest(image=picture(0, 90, 90), prompt="a red boat", loop=True)
    assert pipeline.prepare(asked)[:1] == ["The image of 90x90 is resized to 64x64."]
    assert any("'boat'" in note for note in pipeline.prepare(asked))
    assert not any("may not come out" in note for note in pipeline.prepare(asked))
    result = pipeline.run(asked)
    assert result.frames.shape == (15, SIDE, SIDE, 3) and result.fps == 6
    assert result.settings["text_scale"] == 3 and result.settings["image_scale"] == 1.5
    # A text scale that is asked for moves both, unless the image's is asked for, too.
    assert pipeline._plan(replace(asked, text_scale=4.0)).guidance.image == 4.0


# --- what the network is told ---------------------------------------------------------------


def test_the_published_schedule_is_used(pipeline):
    """Zero terminal SNR and the dynamic rescale, which a known port leaves out."""
    table = pipeline._plan(request(steps=50)).table
    assert table.timesteps == list(range(999, 0, -20))
    assert float(table.alphas[0]) == 0.0
    assert float(table.scales[0]) == pytest.approx(0.7)
    assert float(table.scales[-1]) == pytest.approx(1 - 0.3 * 19 / 399)
    assert pipeline.schedule.prediction == "v"


def test_animating_joins_the_images_latent_to_every_frame(spied):
    pipeline, network = spied
    pipeline.run(request())
    (_, latents), *others = pipeline.codec.encoded
    assert not others
    for call in network.calls:
        detail = call["x"][:, 4:]
        assert detail.shape == (2, 4, 16, 8, 8)
        for frame in range(16):
            assert torch.equal(detail[:, :, frame], latents.expand(2, -1, -1, -1))


def test_an_end_image_of_another_size_is_the_last_frame_and_said(spied):
    """A known port puts the start image there without a word."""
    pipeline, network = spied
    end = picture(7, 100, 75)
    asked = request(end=end)
    notes = pipeline.prepare(asked)
    assert "The end image of 75x100 is resized to 64x64, and 25% of its height is cut off." in notes
    result = pipeline.run(asked)
    assert result.keys == ((0, 0), (15, 1))
    (first, start_latents), (last, end_latents) = pipeline.codec.encoded
    torch.testing.assert_close(first, as_signed(asked.image[None]))
    torch.testing.assert_close(last, as_signed(cover(end, (SIDE, SIDE))[None]))
    assert not torch.allclose(start_latents, end_latents, atol=0.01)
    detail = network.calls[0]["x"][0, 4:]
    assert torch.equal(detail[:, 0], start_latents[0])
    assert torch.equal(detail[:, 15], end_latents[0])
    assert detail[:, 1:15].abs().max() == 0


def test_a_loop_holds_the_same_latent_at_both_ends_and_drops_the_last_frame(spied):
    pipeline, network = spied
    result = pipeline.run(request(loop=True))
    assert len(result.frames) == 15 and result.keys == ((0, 0),)
    assert len(pipeline.codec.encoded) == 1
    detail = network.calls[0]["x"][0, 4:]
    assert detail.shape[1] == 16
    assert torch.equal(detail[:, 0], detail[:, 15]) and detail[:, 1:15].abs().max() == 0
    assert len(pipeline.codec.decoded) == 15
    assert len(pipeline.run(request(loop=True, frames=20)).frames) == 20


@torch.no_grad()
def test_a_chain_makes_each_frame_once_and_sees_each_pieces_first_image(spied):
    pipeline, network = spied
    keys = [picture(seed) for seed in range(4)]
    asked = request(image=keys[0], key_images=keys[1:3], end=keys[3], exact_first_frame=True)
    result = pipeline.run(asked)
    # Three clips of 16 joined at two images: 46 frames, not 48 (doubled) nor 44 (trimmed twice).
    assert len(result.frames) == 46
    assert result.keys == ((0, 0), (15, 1), (30, 2), (45, 3))
    latents = [latents for _, latents in pipeline.codec.encoded]
    for frame, image in result.keys:
        assert_shows(pipeline, result.frames[frame], latents[image])
    first_step = network.calls[:3]
    grey = torch.zeros(1, 3, SIDE, SIDE)
    for piece, call in enumerate(first_step):
        assert call["x"].shape[2] == 16
        tokens, none = call["image"]
        expected = pipeline.network.image_projector(
            pipeline.image.encode(as_signed(keys[piece][None]))
        )
        torch.testing.assert_close(tokens, expected[0])
        torch.testing.assert_close(
            none, pipeline.network.image_projector(pipeline.image.encode(grey))[0]
        )
        detail = call["x"][0, 4:]
        assert torch.equal(detail[:, 0], latents[piece][0])
        assert torch.equal(detail[:, 15], latents[piece + 1][0])


def test_a_closed_chain_passes_every_image_once(spied):
    pipeline, _ = spied
    asked = request(key_images=[picture(1), picture(2)], loop=True)
    result = pipeline.run(asked)
    assert len(result.frames) == 45
    assert result.keys == ((0, 0), (15, 1), (30, 2))


def test_one_scale_takes_two_forwards_and_two_scales_three(spied):
    """Multi-condition guidance: the middle branch has the picture and the empty text."""
    pipeline, network = spied
    pipeline.run(request(steps=1))
    (call,) = network.calls
    text, empty = pipeline.text.encode(["a boat", ""])
    assert call["x"].shape[0] == 2
    torch.testing.assert_close(call["context"][0], text)
    torch.testing.assert_close(call["context"][1], empty)
    # The joined latent stays in every branch, and so does the motion.
    assert torch.equal(call["x"][0, 4:], call["x"][1, 4:])

    network.calls.clear()
    pipeline.run(request(steps=1, text_scale=7.5, image_scale=2.0))
    (call,) = network.calls
    assert call["x"].shape[0] == 3
    for row, (words, same_image) in enumerate(((text, True), (empty, True), (empty, False))):
        torch.testing.assert_close(call["context"][row], words)
        assert torch.equal(call["image"][row], call["image"][0]) == same_image

    network.calls.clear()
    pipeline.run(request(steps=1, text_scale=1.0))
    assert network.calls[0]["x"].shape[0] == 1


def test_motion_gate_and_timesteps_are_passed_on(spied):
    pipeline, network = spied
    pipeline.run(request(steps=3, motion=17.5, gate=0.5))
    assert [int(call["timestep"][0]) for call in network.calls] == [999, 666, 332]
    assert network.calls[0]["scalars"]["fps_embedding"].tolist() == [17.5, 17.5]
    assert network.calls[0]["gate"] == 0.5
    network.calls.clear()
    pipeline.run(request(steps=1, gate=0.25, gate_layers="middle"))
    # The paper's layers 7 to 9 of 16.
    assert network.calls[0]["gate"] == (1.0,) * 6 + (0.25,) * 3 + (1.0,) * 7


# --- long clips -----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 7, 16, 17, 18, 41])
def test_clips_of_any_length_reach_the_network_in_windows_it_knows(spied, frames):
    pipeline, network = spied
    result = pipeline.run(request(frames=frames, steps=3))
    assert len(result.frames) == frames
    assert {call["x"].shape[2] for call in network.calls} == {min(frames, 16)}
    # The last frames too are denoised: nothing of the noise is left where the image is seen.
    per_frame = result.frames.reshape(frames, -1).astype(float).std(1)
    assert per_frame[-3:].min() > 0.5 * per_frame.mean()


def test_windows_change_nothing_for_a_network_that_is_pointwise_in_time(spied, monkeypatch):
    pipeline, _ = spied
    clips = {
        overlap: pipeline.run(request(frames=27, overlap=overlap, steps=3)).frames
        for overlap in (1, 8, 15)
    }
    variant = replace(pipeline.settings.variant, frames=27)
    monkeypatch.setattr(pipeline, "settings", replace(pipeline.settings, variant=variant))
    whole = pipeline.run(request(frames=27, steps=3)).frames
    for overlap, clip in clips.items():
        assert np.array_equal(clip, whole), overlap


def test_windows_move_from_step_to_step(spied):
    pipeline, network = spied
    told = []
    pipeline.run(request(frames=48, steps=5), lambda *progress: told.append(progress))
    assert len(network.calls) > 5 * 4
    # The cue: which image latents and noise a call saw, by the first frame's noise.
    starts = [call["x"][0, :4, 0] for call in network.calls]
    assert len({tuple(start.flatten()[:3].tolist()) for start in starts}) == len(starts)
    notes = pipeline.prepare(request(frames=48))
    assert any("windows of 16" in note for note in notes)


# --- exact frames ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_exact_first_frame_is_the_autoencoders_own_and_said_to_be_so(spied, eta):
    pipeline, _ = spied
    asked = request(exact_first_frame=True, eta=eta, steps=4)
    assert any("latents" in note and "not their pixels" in note for note in pipeline.prepare(asked))
    result = pipeline.run(asked)
    ((_, latents),) = pipeline.codec.encoded
    assert_shows(pipeline, result.frames[0], latents)
    free = pipeline.run(request(eta=eta, steps=4))
    assert not np.array_equal(free.frames[0], result.frames[0])


@torch.no_grad()
def test_exact_frames_hold_with_the_real_network(watched):
    asked = request(end=picture(3), exact_first_frame=True)
    result = watched.run(asked)
    for (_, latents), frame in zip(watched.codec.encoded, (0, 15), strict=True):
        assert_shows(watched, result.frames[frame], latents)


def test_frames_are_decoded_one_by_one(spied):
    pipeline, _ = spied
    pipeline.run(request())
    assert [tuple(latents.shape) for latents in pipeline.codec.decoded] == [(1, 4, 8, 8)] * 16


# --- sizes and notes ------------------------------------------------------------------------


def test_the_result_has_the_size_that_is_asked_for(spied):
    pipeline, network = spied
    result = pipeline.run(request(width=70, height=62, steps=1))
    assert result.frames.shape[1:3] == (62, 70)
    assert network.calls[0]["x"].shape[-2:] == (8, 8)
    notes = pipeline.prepare(request(width=70, height=62))
    assert any("made at 64x64 and resized" in note for note in notes)


def test_sizes_left_open_follow_the_image(pipeline):
    def sizes(tall, wide, **asked):
        open_size = {"width": None, "height": None, **asked}
        plan = pipeline._plan(request(image=picture(0, tall, wide), **open_size))
        return plan.size, plan.output_size

    assert sizes(320, 512) == ((320, 512), (320, 512))
    assert sizes(1000, 1600) == ((320, 512), (320, 512))
    (height, width), _ = sizes(400, 300)
    assert height > width and height * width <= 1.1 * 320 * 512
    assert sizes(100, 200, width=256) == ((128, 256), (128, 256))
    assert sizes(100, 200, height=64) == ((64, 128), (64, 128))


def test_what_the_weights_were_not_trained_for_is_said(pipeline, files):
    def notes(**asked):
        return " ".join(pipeline.prepare(request(**asked)))

    assert "to loop may not" in notes(loop=True)
    assert "to interpolate may not" in notes(end=picture(1))
    assert "15 to 30" in notes(motion=5)
    assert "512x320" in notes()
    assert "16 frames at once; 9" in notes(frames=9)
    assert "longer than 77 tokens" in notes(prompt="a" * 100)
    unsure = opened(files)
    assert any("512 or 512_interp" in note for note in unsure.prepare(request()))
    interp = opened(files, variant="512_interp")
    said = " ".join(interp.prepare(request(end=picture(1))))
    assert "may not come out" not in said and "--variant" not in said
    assert "to animate may not" in " ".join(interp.prepare(request()))
    assert interp._plan(request()).motion == 5


# --- what cannot be done --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"loop": True, "end": picture(1)}, "loop ends on its first image"),
        ({"key_images": [picture(1)]}, "need an end image or a loop"),
        ({"image": picture(0).astype(np.float32)}, "uint8"),
        ({"end": picture(0)[..., 0]}, "height x width x 3"),
        ({"width": 0}, "width is 0"),
        ({"motion": -1}, "motion is -1"),
        ({"gate": -0.5}, "gate is -0.5"),
        ({"gate_layers": "some"}, "all, middle"),
        ({"frames": 0}, "0 frames"),
        ({"frames": 1, "loop": True}, "too few"),
        ({"frames": 1, "end": picture(1)}, "too few"),
        ({"steps": 0}, "1 to 1000"),
        ({"steps": 1001}, "1 to 1000"),
        ({"eta": 2.0}, "eta is 2"),
        ({"spacing": "leading"}, "spacing 'leading'"),
        ({"text_scale": -1.0}, "text scale is -1"),
        ({"image_scale": float("nan")}, "image scale is nan"),
        ({"rescale": 2.0}, "rescale is 2"),
        ({"overlap": 16}, "cannot overlap by 16"),
    ],
)
def test_requests_that_cannot_be_met_are_a_sentence_before_any_work(spied, changed, words):
    pipeline, network = spied
    for ask in (pipeline.prepare, pipeline.run):
        with pytest.raises(LayerLoomError, match=words) as caught:
            ask(request(**changed))
        assert ". " not in str(caught.value)
    assert not network.calls and not pipeline.codec.encoded


def test_cancel_from_progress_ends_the_run(spied):
    pipeline, network = spied

    class Cancelled(BaseException):
        pass

    def progress(title, done, total):
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline.run(request(steps=9), progress)
    assert len(network.calls) == 2


def test_files_without_what_is_needed_are_a_sentence(files, tmp_path):
    from layerloom.engine.layered import STARTER

    with pytest.raises(LayerLoomError, match="DynamiCrafter"):
        AnimatePipeline.open(STARTER)
    state = torch.load(files / "512.ckpt", weights_only=True)["state_dict"]
    bare = {k: t for k, t in state.items() if not k.startswith("image_proj_model.")}
    write_checkpoint(tmp_path / "bare.ckpt", bare)
    assert open_dynamicrafter(tmp_path / "bare.ckpt").info.image_projector is None
    with pytest.raises(LayerLoomError, match="no image projector"):
        AnimatePipeline.open(tmp_path / "bare.ckpt")
    with pytest.raises(LayerLoomError, match="1024"):
        AnimatePipeline.open(files / "512.ckpt", variant="1024")
    with pytest.raises(LayerLoomError, match="device"):
        AnimatePipeline.open(files / "512.ckpt", device="none:9")
