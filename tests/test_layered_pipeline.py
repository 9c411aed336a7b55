"""LayeredPipeline end to end: own checkpoints with random weights, LayerFlow's with tiny parts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerloom.engine import layered
from layerloom.engine.checkpoints.save import save_checkpoint
from layerloom.engine.conditioning.encoders import CogVideoXCodec
from layerloom.engine.conditioning.layers import GIVEN, RGB, RGBA
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.layered import LayeredPipeline, LayeredRequest
from layerloom.engine.models.layered_transformer import LayeredTransformer
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_text import WordEncoder
from layerloom.engine.reuse import GivenReuse
from layerloom.engine.sampling.guidance import GUIDANCE_NAMES
from layerloom.engine.sampling.samplers import SAMPLER_NAMES

FRAMES, SIDE = 4, 32
WORDS = ["0", "1", "2", "a", "red", "blue", "circle", "wall", "over"]
AUTOENCODER = {"latent_channels": 4, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
TEXT = {"tokens": 8, "dim": 8}
TRANSFORMER = {
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "patch_size": 2,
    "spatial_interpolation_scale": 1.0,
    "layer_embedding": True,
    "clean_embedding": True,
}


@torch.no_grad()
def randomise(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Unit-gain weights everywhere, so that gates are open and outputs depend on all inputs."""
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        fan = math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 3.0
        scale = "norm" in name and name.endswith("weight") and parameter.ndim == 1
        parameter.copy_(torch.randn_like(parameter) / fan + float(scale))
    return network


def write_checkpoint(path, layers=RGBA, tasks=tuple(GIVEN), **sequence):
    """A file as the layered training stage exports it, with random weights."""
    save_checkpoint(
        path,
        randomise(LayeredTransformer(**TRANSFORMER), 0).state_dict(),
        variant="starter",
        transformer=TRANSFORMER,
        vae={"kind": "starter", **AUTOENCODER},
        text_encoder={"kind": "words", **TEXT, "vocabulary": WORDS},
        sequence={"layers": list(layers), "frames": FRAMES, **sequence},
        sampling={
            "sampler": "ddim",
            "steps": 3,
            "guidance": 2.0,
            "guidance_formula": "constant",
            "guidance_by_task": {"decompose": 1.0},
        },
        parts={
            "vae": randomise(StarterAutoencoder(**AUTOENCODER), 1).state_dict(),
            "text_encoder": randomise(WordEncoder(vocabulary=len(WORDS), **TEXT), 2).state_dict(),
        },
        metadata={
            "tasks": list(tasks),
            "video": {"frames_per_second": 8, "height": SIDE, "width": SIDE},
        },
        half=True,
    )
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("own") / "tiny.safetensors")
    return LayeredPipeline.open(path, device="cpu")


def clip(name: str, frames: int = FRAMES, height: int = SIDE, width: int = SIDE, seed: int = 0):
    rng = np.random.default_rng([seed, len(name)])
    shape = (frames, height, width) if name == "alpha" else (frames, height, width, 3)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def request(task: str = "generate", **changes) -> LayeredRequest:
    given = {name: clip(name) for name in GIVEN.get(task, ())}
    return LayeredRequest(
        **{
            "task": task,
            "foreground": "a red circle",
            "background": "a blue wall",
            "given": given,
            **changes,
        }
    )


def arrays(result) -> dict[str, np.ndarray]:
    return {name: getattr(result, name) for name in (*RGBA, "recomposed")}


def same(a, b) -> bool:
    return all(np.array_equal(arrays(a)[name], arrays(b)[name]) for name in arrays(a))


class Calls:
    """What the network was called with; a context manager around a run."""

    def __init__(self, pipeline: LayeredPipeline):
        self.pipeline = pipeline
        self.batches: list[int] = []
        self.texts: list[torch.Tensor] = []

    def _record(self, module, arguments, keywords):
        self.batches.append(arguments[0].shape[0])
        self.texts.append(arguments[2])

    def __enter__(self):
        network = self.pipeline.transformer
        self._hook = network.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self._hook.remove()


# What comes out


@pytest.mark.parametrize("task", GIVEN)
def test_every_task_returns_all_layers_and_the_given_ones_as_they_were(pipeline, task):
    result = pipeline.run(request(task))
    for name, array in arrays(result).items():
        shape = (FRAMES, SIDE, SIDE) if name == "alpha" else (FRAMES, SIDE, SIDE, 3)
        assert (array.shape, array.dtype) == (shape, np.uint8), name
        if name not in GIVEN[task]:
            assert array.std() > 1, name
    for name in GIVEN[task]:
        assert np.array_equal(arrays(result)[name], clip(name)), name
    assert result.seconds_per_step > 0
    assert result.settings["steps"] == 3
    assert result.settings["guidance"] == (1.0 if task == "decompose" else 2.0)


@pytest.mark.parametrize("task", GIVEN)
def test_recomposed_is_the_composite_of_what_is_returned(pipeline, task):
    result = pipeline.run(request(task))
    alpha = result.alpha[..., None] / 255.0
    scene = alpha * result.foreground + (1 - alpha) * result.background
    # Half a level each from the colours, the alpha and the result's own rounding.
    assert np.abs(scene - result.recomposed).max() <= 1.5 + 1e-3
    assert not np.array_equal(result.recomposed, result.blended)


def test_the_seed_decides_the_frames(pipeline):
    first = pipeline.run(request(seed=5))
    assert same(first, pipeline.run(request(seed=5)))
    other = pipeline.run(request(seed=6))
    for name in RGBA:
        assert not np.array_equal(arrays(first)[name], arrays(other)[name]), name


def test_prompts_and_given_layers_count(pipeline):
    base = pipeline.run(request("background"))
    changed = {
        "foreground prompt": request("background", foreground="a blue circle"),
        "background prompt": request("background", background="a red wall"),
        "scene prompt": request("background", blended="a circle"),
        "given layer": request("background", given={"background": clip("background", seed=1)}),
    }
    for what, changed_request in changed.items():
        result = pipeline.run(changed_request)
        assert not np.array_equal(result.foreground, base.foreground), what
    # The scene prompt that is put together is the one a user may write.
    written = request("background", blended="a red circle over a blue wall")
    assert same(pipeline.run(written), base)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize("mode", GUIDANCE_NAMES)
def test_every_sampler_and_guidance_runs(pipeline, sampler, mode):
    steps = []
    asked = request(sampler=sampler, guidance_mode=mode, steps=2)
    result = pipeline.run(asked, lambda info: steps.append((info.step, info.total)))
    assert steps == [(1, 2), (2, 2)]
    assert (result.settings["sampler"], result.settings["guidance_mode"]) == (sampler, mode)
    assert result.blended.std() > 1


def test_guidance_1_runs_one_branch_and_2_runs_two(pipeline):
    with Calls(pipeline) as calls:
        pipeline.run(request("background", guidance=1.0))
    assert calls.batches == [1, 1, 1]
    assert all(text.any() for text in calls.texts)
    with Calls(pipeline) as calls:
        pipeline.run(request("background", guidance=2.0))
    assert calls.batches == [2, 2, 2]
    for without, text in calls.texts:
        assert not without.any() and text.any()


def test_guidance_extrapolates_from_no_text_to_text(pipeline):
    denoised = {}
    for scale in (0.0, 1.0, 3.0):
        pipeline.run(
            request(steps=1, guidance=scale),
            lambda info, scale=scale: denoised.update({scale: info.denoised}),
        )
    # At pure noise the denoised latent is -v, so guidance shows in it undistorted.
    expected = denoised[0.0] + 3 * (denoised[1.0] - denoised[0.0])
    assert float((denoised[1.0] - denoised[0.0]).abs().max()) > 0.1
    assert torch.allclose(denoised[3.0], expected, atol=1e-4)


def test_a_cancel_stops_within_a_step(pipeline):
    class Cancelled(Exception):
        pass

    def cancel(info):
        if info.step == 2:
            raise Cancelled

    with Calls(pipeline) as calls, pytest.raises(Cancelled):
        pipeline.run(request(steps=10), cancel)
    assert len(calls.batches) == 2


def test_a_batch_is_its_samples(pipeline):
    prompts = [("a red circle", "a blue wall", None), ("a blue circle", "a red wall", None)]
    given = {"background": np.stack([clip("background"), clip("background", seed=1)])}
    made = pipeline.generate_batch("background", prompts, given, steps=2)
    assert made["alpha"].shape == (2, FRAMES, SIDE, SIDE)
    assert made["foreground"].shape == (2, FRAMES, SIDE, SIDE, 3)
    assert np.array_equal(made["background"], given["background"])
    alone = pipeline.run(request("background", steps=2, given={"background": clip("background")}))
    # The first sample has the noise of a single run; batched sums may round to the next level.
    for name in ("foreground", "alpha", "blended"):
        gap = np.abs(made[name][0].astype(int) - arrays(alone)[name].astype(int))
        assert gap.max() <= 1, name


@pytest.mark.parametrize("task", [task for task in GIVEN if GIVEN[task]])
def test_given_layers_are_reused_as_asked(pipeline, task):
    isolated = pipeline.run(request(task, reuse=GivenReuse(keep=False)))
    assert isolated.settings["reuse_given"]["held_bytes"] == 0
    always = pipeline.run(request(task, reuse=GivenReuse(refresh=1)))
    assert same(always, isolated)
    kept = pipeline.run(request(task, reuse=GivenReuse()))
    again = pipeline.run(request(task, reuse=GivenReuse()))
    assert same(kept, again) and not same(kept, isolated)
    assert kept.settings["reuse_given"]["held_bytes"] > 0
    too_much = pipeline.run(request(task, reuse=GivenReuse(memory=1e-6)))
    assert same(too_much, isolated) and too_much.settings["reuse_given"]["held_bytes"] == 0
    # One block deep, noisy layers read given ones before these have read anything.
    full = pipeline.run(request(task))
    assert full.settings["reuse_given"] is None and same(full, isolated)


def test_a_batch_reuses_each_samples_own_given_layer(pipeline):
    prompts = [("a red circle", "a blue wall", None), ("a blue circle", "a red wall", None)]
    given = {"background": np.stack([clip("background"), clip("background", seed=1)])}
    made = pipeline.generate_batch("background", prompts, given, reuse=GivenReuse())
    alone = request("background", given={"background": clip("background")}, reuse=GivenReuse())
    alone = arrays(pipeline.run(alone))
    for name in ("foreground", "alpha", "blended"):
        gap = np.abs(made[name][0].astype(int) - alone[name].astype(int))
        assert gap.max() <= 1, name  # batched sums may round to the next level


def test_reconstruction_is_the_autoencoders(pipeline):
    layers = {name: clip(name)[None] for name in RGBA}
    made = pipeline.reconstruct(layers)
    model = pipeline.codec.model
    background = torch.from_numpy(layers["background"]).movedim(-1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = (model.decode(model.encode(background)).clamp(-1, 1) + 1) * 127.5
    # The network's clip is all layers at once; half a level of rounding.
    gap = np.abs(made["background"] - expected.movedim(2, -1).numpy())
    assert gap.max() <= 0.5 + 1e-2
    assert made["alpha"].shape == (1, FRAMES, SIDE, SIDE)


def test_colour_under_full_transparency_does_not_count(pipeline):
    """A given foreground is premultiplied: what cannot be seen is not told to the network."""
    nothing = np.zeros((FRAMES, SIDE, SIDE), np.uint8)
    made = []
    for seed in (0, 1):
        given = {"foreground": clip("foreground", seed=seed), "alpha": nothing}
        made.append(pipeline.run(request("foreground", given=given)))
    assert np.array_equal(made[0].background, made[1].background)
    given["alpha"] = nothing + 255
    opaque = pipeline.run(request("foreground", given=given))
    assert not np.array_equal(opaque.background, made[0].background)


def test_the_decoded_foreground_is_straight_colour(pipeline, monkeypatch):
    class Lossless:
        """Pixels folded into latent channels, four frames and 8x8 pixels each."""

        def encode(self, clip, generator):
            groups = clip.unflatten(1, (-1, 4)).flatten(2, 3)
            return torch.nn.functional.pixel_unshuffle(groups, 8)

        def decode(self, latents):
            groups = torch.nn.functional.pixel_shuffle(latents, 8)
            return groups.unflatten(2, (4, 3)).flatten(1, 2)

    monkeypatch.setattr(pipeline, "codec", Lossless())
    layers = {name: clip(name)[None] for name in RGBA}
    made = pipeline.reconstruct(layers)
    for name in ("alpha", "background", "blended"):
        assert np.array_equal(made[name], layers[name]), name
    seen = layers["alpha"] >= 64  # from a quarter of coverage on the quotient is exact
    assert 0 < seen.sum() < seen.size
    assert np.array_equal(made["foreground"][seen], layers["foreground"][seen])


def test_rgb_checkpoints_have_no_alpha(tmp_path):
    path = write_checkpoint(tmp_path / "rgb.safetensors", RGB, decompose_latents=1)
    rgb = LayeredPipeline.open(path, device="cpu")
    for task in ("generate", "background", "decompose"):
        given = {name: clip(name, frames=8) for name in GIVEN[task]}
        result = rgb.run(request(task, frames=8, given=given))
        assert result.alpha is None and result.recomposed is None
        assert result.foreground.shape == (8, SIDE, SIDE, 3)
    given = {"foreground": clip("foreground")}
    result = rgb.run(request("foreground", given=given))
    assert result.alpha is None
    assert np.array_equal(result.foreground, given["foreground"])
    # A given matte is kept: it says where the foreground lies over the new background.
    result = rgb.run(request("foreground"))
    assert np.array_equal(result.alpha, clip("alpha"))
    assert result.recomposed.shape == result.background.shape


# Sizes and lengths


def test_native_size_needs_no_note(pipeline):
    assert pipeline.prepare(request()) == []
    assert pipeline.prepare(request("decompose")) == []


def test_a_size_that_does_not_divide_is_resized(pipeline):
    asked = request(width=60, height=40, steps=1)
    notes = pipeline.prepare(asked)
    assert any("60x40 does not divide by 16: made at 64x32" in note for note in notes)
    result = pipeline.run(asked)
    assert result.foreground.shape == (FRAMES, 40, 60, 3) and result.alpha.shape[1:] == (40, 60)
    assert result.settings["network_size"] == [32, 64]


def test_another_size_is_made_and_noted(pipeline):
    asked = request(width=48, steps=1)
    assert pipeline.prepare(asked) == [
        "The checkpoint was trained on 32x32; other sizes may look worse."
    ]
    assert pipeline.run(asked).blended.shape == (FRAMES, SIDE, 48, 3)


def test_a_given_clip_keeps_its_size(pipeline):
    given = {"blended": clip("blended", height=24, width=40)}
    asked = request("decompose", given=given, steps=1)
    notes = pipeline.prepare(asked)
    assert any("40x24 is resized to 32x32" in note for note in notes)
    result = pipeline.run(asked)
    assert {array.shape[1:3] for array in arrays(result).values()} == {(24, 40)}
    assert np.array_equal(result.blended, given["blended"])
    # A size asked for wins over the clip's.
    smaller = pipeline.run(replace(asked, width=16, height=16))
    assert {array.shape[1:3] for array in arrays(smaller).values()} == {(16, 16)}


def test_frame_counts(pipeline):
    asked = request(frames=8, steps=1)
    assert any("trained on 4 frames" in note for note in pipeline.prepare(asked))
    assert len(pipeline.run(asked).alpha) == 8
    with pytest.raises(LayerLoomError, match="6 frames a layer do not divide by 4; use"):
        pipeline.prepare(request(frames=6))
    long = {"blended": clip("blended", frames=7)}
    asked = request("decompose", given=long, steps=1)
    assert any("first 4 of the given blended's 7" in note for note in pipeline.prepare(asked))
    assert np.array_equal(pipeline.run(asked).blended, long["blended"][:4])
    with pytest.raises(LayerLoomError, match="blended has 3 frames, but 4 .* give a longer clip"):
        pipeline.prepare(request("decompose", given={"blended": clip("blended", frames=3)}))


# What cannot be done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "erase"}, "Unknown task 'erase'"),
        ({"foreground": " "}, "foreground prompt is empty"),
        ({"given": {"alpha": clip("alpha")}}, "'generate' takes no given alpha"),
        ({"task": "background"}, "needs the background layer"),
        (
            {"task": "foreground", "given": {"foreground": clip("foreground")}},
            "has no alpha; give a clip with transparency",
        ),
        (
            {
                "task": "foreground",
                "given": {"foreground": clip("foreground"), "alpha": clip("alpha", frames=5)},
            },
            "differ in length or size",
        ),
        ({"sampler": "euler"}, "no sampler named 'euler'.*released, dpmpp-2m-sde, ddim"),
        ({"guidance_mode": "loud"}, "no guidance named 'loud'"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"width": 0}, "width is 0"),
        ({"height": -16}, "height is -16"),
        ({"frames": 0}, "0 frames"),
        ({"reuse": GivenReuse()}, "nothing to reuse, since no layer is given"),
        ({"task": "decompose", "reuse": GivenReuse(refresh=0)}, "after 0 steps; give 1"),
        ({"task": "decompose", "reuse": GivenReuse(memory=0.0)}, "0 GiB is no memory"),
    ],
)
def test_bad_requests_are_refused_before_work_starts(pipeline, changes, message):
    with Calls(pipeline) as calls, pytest.raises(LayerLoomError, match=message):
        pipeline.run(request(**{"given": {}, **changes}))
    assert not calls.batches
    with pytest.raises(LayerLoomError, match=message):
        pipeline.prepare(request(**{"given": {}, **changes}))


def test_a_checkpoint_made_for_other_tasks_says_so(tmp_path):
    path = write_checkpoint(tmp_path / "one.safetensors", tasks=("generate", "background"))
    one = LayeredPipeline.open(path, device="cpu")
    one.prepare(request("background"))
    with pytest.raises(LayerLoomError, match="made for generate, background, not for 'decompose'"):
        one.prepare(request("decompose"))


def test_devices_and_files_that_are_not_there(tmp_path):
    path = write_checkpoint(tmp_path / "tiny.safetensors")
    for device in ("cuda:99", "tpu9"):
        with pytest.raises(LayerLoomError, match=f"'{device}' cannot be used here; try cpu"):
            LayeredPipeline.open(path, device=device)
    with pytest.raises(LayerLoomError, match="nowhere"):
        LayeredPipeline.open(tmp_path / "nowhere.safetensors")


def test_plain_cogvideox_is_not_layered(tmp_path):
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, text_embed_dim=6
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(LayerLoomError, match="cogvideox, which makes plain video"):
        LayeredPipeline.open(tmp_path)


def test_words_the_starter_does_not_know_are_noted(pipeline):
    notes = pipeline.prepare(request(foreground="a red zebra"))
    assert any("does not know 'zebra'" in note for note in notes)
    notes = pipeline.prepare(request(background="a wall " * 5))
    assert any("longer than 8 words" in note for note in notes)


# LayerFlow's file with CogVideoX's parts


def save_vae(folder, latent_channels: int = 16):
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=latent_channels,
    )
    vae.save_pretrained(folder / "vae")


def save_text_encoder(folder, width: int = 12):
    """A one-layer T5 and a word tokenizer, in the folders of the CogVideoX-2b repository."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", ",", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder laid out as the CogVideoX-2b repository, with tiny networks."""
    folder = tmp_path_factory.mktemp("CogVideoX-2b")
    save_vae(folder)
    save_text_encoder(folder)
    return folder


@pytest.fixture
def layerflow(tiny_sat, tmp_path):
    def write(name: str):
        path = tmp_path / f"{name}.pt"
        torch.save({"module": tiny_sat(f"layerflow_{name}", layers=1)}, path)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "task", "frames", "large"),
    [
        ("rgba_generate", "generate", 16, False),
        ("rgba_conditioned", "background", 4, False),
        ("rgba_conditioned", "foreground", 4, False),
        ("rgba_decompose", "decompose", 4, True),
        ("rgb_generate", "generate", 8, False),
    ],
)
def test_layerflow_runs_with_its_parts(layerflow, parts, monkeypatch, name, task, frames, large):
    if large:
        monkeypatch.setattr(layered, "LARGE", 1)
    opened = LayeredPipeline.open(layerflow(name), parts, parts, device="cpu")
    assert opened.native_size == (480, 720)
    given = {layer: clip(layer, frames) for layer in GIVEN[task]}
    asked = request(task, given=given, frames=frames, width=32, height=32, steps=2)
    result = opened.run(asked)
    assert (result.settings["sampler"], result.settings["guidance_mode"]) == (
        "released",
        "dynamic-released",
    )
    assert result.settings["dtype"] == ("bfloat16" if large else "float32")
    assert result.settings["adapters"] == {"motion": 0.0, "content": 1.0}
    assert result.blended.shape == (frames, 32, 32, 3)
    assert (result.alpha is None) == name.startswith("rgb_")
    for layer in GIVEN[task]:
        assert np.array_equal(arrays(result)[layer], given[layer])
    assert same(result, opened.run(asked))
    made = next(layer for layer in ("foreground", "background") if layer not in GIVEN[task])
    other = opened.run(replace(asked, seed=1))
    assert not np.array_equal(arrays(other)[made], arrays(result)[made])


def test_frame_counts_the_vae_cannot_decode_are_refused(layerflow, parts):
    rgb = LayeredPipeline.open(layerflow("rgb_generate"), parts, parts, device="cpu")
    # Three layers of 4 frames are 3 latent frames: a causal video of 9 frames, not 12.
    with pytest.raises(LayerLoomError, match="3 latent frames.* use --frames 8"):
        rgb.prepare(request(frames=4))
    with pytest.raises(LayerLoomError, match="made for generate, foreground, background"):
        rgb.prepare(request("decompose"))


@torch.no_grad()
def test_the_codec_is_diffusers_posterior_sample_scaled(parts):
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(parts / "vae")
    codec = CogVideoXCodec(vae)
    generator = torch.Generator().manual_seed(7)
    frames = torch.rand(1, 5, 3, 16, 24, generator=generator) * 2 - 1
    found = codec.encode(frames, torch.Generator().manual_seed(3))
    posterior = vae.encode(frames.transpose(1, 2)).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(3)) * 1.15258426
    assert found.shape == (1, 2, 16, 2, 3)
    assert torch.allclose(found, drawn.transpose(1, 2), atol=1e-6)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    by_hand = (posterior.mean + posterior.std * noise) * 1.15258426
    assert torch.allclose(found, by_hand.transpose(1, 2), atol=1e-6)
    assert float(posterior.std.min()) > 0.1  # so that the noise counts above
    decoded = vae.decode(drawn / 1.15258426).sample
    assert torch.allclose(codec.decode(found), decoded.transpose(1, 2), atol=1e-5)
    for count in (2, 3, 4, 5):
        pixels = codec.decode(torch.zeros(1, count, 16, 1, 1))
        assert pixels.shape == (1, codec.pixel_frames(count), 3, 8, 8)


def test_missing_and_wrong_parts_are_named(layerflow, parts, tmp_path):
    path = layerflow("rgba_generate")
    with pytest.raises(LayerLoomError, match="--vae.*`vae` folder.*THUDM/CogVideoX-2b"):
        LayeredPipeline.open(path, None, parts, device="cpu")
    with pytest.raises(LayerLoomError, match="--text-encoder.*`tokenizer`.*THUDM/CogVideoX-2b"):
        LayeredPipeline.open(path, parts, None, device="cpu")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LayerLoomError, match="--vae .*empty is not the CogVideoX VAE"):
        LayeredPipeline.open(path, empty, parts, device="cpu")
    with pytest.raises(LayerLoomError, match="--vae .*is not the CogVideoX VAE"):
        LayeredPipeline.open(path, path, parts, device="cpu")
    with pytest.raises(LayerLoomError, match="--text-encoder .*empty does not hold T5"):
        LayeredPipeline.open(path, parts, empty, device="cpu")
    with pytest.raises(LayerLoomError, match="--text-encoder .* is a file"):
        LayeredPipeline.open(path, parts, path, device="cpu")
    other = tmp_path / "other"
    save_vae(other, latent_channels=4)
    save_text_encoder(other, width=8)
    with pytest.raises(LayerLoomError, match="has 4 latent channels and .* reads 16"):
        LayeredPipeline.open(path, other, parts, device="cpu")
    with pytest.raises(LayerLoomError, match="features 8 wide and .* reads 12"):
        LayeredPipeline.open(path, parts, other, device="cpu")


def test_prompts_longer_than_t5_reads_are_noted(layerflow, parts):
    opened = LayeredPipeline.open(layerflow("rgba_generate"), parts, parts, device="cpu")
    notes = opened.prepare(request(background="wall " * 300, width=32, height=32))
    assert any("longer than 226 tokens" in note for note in notes)
    assert opened.text.encode(["a", "a wall"]).shape == (2, 226, 12)
