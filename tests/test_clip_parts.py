"""CLIP's towers and the autoencoder, from official names: against plain re-implementations."""

import builtins
import json
import shutil
import sys

import pytest
import torch
from animate_files import BLOCKS, whole_state, write_checkpoint, write_tokenizer
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from layerloom.engine.checkpoints.dynamicrafter import open_dynamicrafter
from layerloom.engine.conditioning.clip import (
    MEAN,
    STD,
    TEXT_MODEL,
    TOKENS,
    VISION_MODEL,
    image_tower,
    read_tower,
    squash,
    text_tower,
)
from layerloom.engine.conditioning.frame_codec import KLCodec, read_autoencoder
from layerloom.engine.conditioning.video_encoders import (
    load_frame_codec,
    load_image_features,
    load_text_features,
)
from layerloom.engine.errors import LayerLoomError

CPU = torch.device("cpu")
TEXT, IMAGE, VAE = "cond_stage_model.model.", "embedder.model.", "first_stage_model."


@pytest.fixture(scope="module")
def state(golden_dir, manifest_dir):
    return whole_state(golden_dir, manifest_dir)


@pytest.fixture(scope="module")
def whole(state, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "model.ckpt", state)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def behind(state, prefix):
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def openclip_blocks(x, state, blocks, mask=None):
    """OpenCLIP's residual attention blocks, with one head, on [B, N, D]."""
    for index in range(blocks):
        part = behind(state, f"transformer.resblocks.{index}.")
        width = x.shape[-1]
        y = functional.layer_norm(x, (width,), part["ln_1.weight"], part["ln_1.bias"])
        attention = nn.MultiheadAttention(width, 1, batch_first=True)
        attention.load_state_dict(behind(part, "attn."))
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = functional.layer_norm(x, (width,), part["ln_2.weight"], part["ln_2.bias"])
        y = functional.linear(y, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"])
        y = functional.linear(functional.gelu(y), part["mlp.c_proj.weight"])
        x = x + y + part["mlp.c_proj.bias"]
    return x


@torch.no_grad()
def test_image_tokens_are_the_last_blocks_without_final_norm(state, whole):
    features = load_image_features(open_dynamicrafter(whole), None, CPU)
    pictures = torch.rand(2, 3, 224, 224) * 2 - 1
    part = behind(state, IMAGE + "visual.")
    pixels = ((pictures + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    x = functional.conv2d(pixels, part["conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([part["class_embedding"].expand(2, 1, -1), x], 1) + part["positional_embedding"]
    x = functional.layer_norm(x, (20,), part["ln_pre.weight"], part["ln_pre.bias"])
    expected = openclip_blocks(x, part, BLOCKS)
    found = features.encode(pictures)
    assert found.shape == (2, 257, 20)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_text_features_are_the_last_block_but_one_then_the_norm(state, whole, words):
    features = load_text_features(open_dynamicrafter(whole), words, CPU)
    part = behind(state, TEXT)
    start, end = 512, 513
    letters = json.loads((words / "vocab.json").read_text(encoding="utf-8"))
    ids = [start, letters["r"], letters["e"], letters["d</w>"], end]
    padded = torch.tensor([ids + [0] * (77 - len(ids)), [start, end] + [0] * 75])
    x = part["token_embedding.weight"][padded] + part["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf).triu(1)
    x = openclip_blocks(x, part, BLOCKS - 1, mask)
    expected = functional.layer_norm(x, (16,), part["ln_final.weight"], part["ln_final.bias"])
    found = features.encode(["red", ""])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_long_prompts_are_cut_before_the_end_token_and_said(whole, words):
    features = load_text_features(open_dynamicrafter(whole), words, CPU)
    long = "a" * 200
    assert features.encode([long]).shape == (1, TOKENS, 16)
    assert "longer than 77 tokens" in features.notes(["red", long])[0]
    assert len(features.notes(["red", long])) == 1
    cut = "a" * 75  # fits with start and end, all but the word's end mark
    torch.testing.assert_close(features.encode([long])[0, :75], features.encode([cut])[0, :75])


def test_the_other_blocks_and_padding_matter(state, whole, words):
    """What the towers must not do: end on the last block, mask the padding, norm the tokens."""
    part = {k: t.clone() for k, t in state.items()}
    last = f"{TEXT}transformer.resblocks.{BLOCKS - 1}."
    for key in part:
        if key.startswith(last):
            part[key] = torch.randn_like(part[key])
    changed = write_checkpoint(whole.with_name("changed.ckpt"), part)
    first, second = (
        load_text_features(open_dynamicrafter(path), words, CPU).encode(["red"])
        for path in (whole, changed)
    )
    assert torch.equal(first, second)


# The picture CLIP sees


def test_pictures_are_squashed_whole_not_cropped():
    """A centre crop of a wide picture, as known ports take it, would not show its ends."""
    wide = torch.zeros(1, 3, 64, 256)
    wide[..., :40] = 1  # outside the middle square
    square = squash(wide, 224)
    assert square.shape == (1, 3, 224, 224)
    assert float(square[..., :30].mean()) > 0.95
    assert float(square[..., 60:].abs().mean()) < 0.05
    # The share of the picture that is lit stays.
    assert float(square.mean()) == pytest.approx(float(wide.mean()), abs=0.02)


def test_squash_is_bicubic_with_aligned_corners_after_a_gaussian():
    """The formula of kornia's antialiased resize, written out."""
    picture = torch.rand(1, 3, 320, 512)
    blurred = picture
    for dim, side in ((2, 320), (3, 512)):
        factor = side / 224
        sigma = max((factor - 1) / 2, 0.001)
        size = int(max(4 * sigma, 3))
        size += 1 - size % 2
        x = torch.arange(size) - size // 2
        kernel = torch.exp(-(x**2) / (2 * sigma**2))
        kernel = (
            (kernel / kernel.sum())
            .expand(3, 1, size)
            .reshape((3, 1, size, 1) if dim == 2 else (3, 1, 1, size))
        )
        pad = size // 2
        padded = functional.pad(
            blurred, (0, 0, pad, pad) if dim == 2 else (pad, pad, 0, 0), mode="reflect"
        )
        blurred = functional.conv2d(padded, kernel, groups=3)
    expected = functional.interpolate(blurred, (224, 224), mode="bicubic", align_corners=True)
    torch.testing.assert_close(squash(picture, 224), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_tokens_of_a_wide_picture_depend_on_its_ends(whole):
    features = load_image_features(open_dynamicrafter(whole), None, CPU)
    picture = torch.zeros(1, 3, 64, 256)
    other = picture.clone()
    other[..., :40] = 1
    moved = (features.encode(picture) - features.encode(other)).abs().max()
    assert float(moved) > 0.1


def test_without_kornia_it_is_a_sentence(monkeypatch):
    real = builtins.__import__

    def blocked(name, *arguments, **options):
        if name.startswith("kornia"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(LayerLoomError, match="pip install kornia"):
        squash(torch.zeros(1, 3, 8, 8), 4)


# Where parts come from


@torch.no_grad()
def test_parts_from_files_and_folders_equal_those_inside(state, whole, words, tmp_path):
    checkpoint = open_dynamicrafter(whole)
    bare = {
        key: tensor
        for key, tensor in state.items()
        if key.startswith(("model.diffusion_model.", "image_proj_model."))
    }
    bare = open_dynamicrafter(write_checkpoint(tmp_path / "bare.ckpt", bare))
    openclip = tmp_path / "open_clip.safetensors"
    # The image encoder's file drags a text half along; here it is the other one's.
    clip = {**behind(state, IMAGE), **behind(state, TEXT)}
    save_file({k: t.contiguous() for k, t in clip.items()}, openclip)
    image = load_image_features(checkpoint, None, CPU)
    text = load_text_features(checkpoint, words, CPU)
    image_folder, text_folder = tmp_path / "image_encoder", tmp_path / "sd"
    image.model.save_pretrained(image_folder)
    text.model.save_pretrained(text_folder / "text_encoder")
    shutil.copytree(words, text_folder / "tokenizer")
    picture = torch.rand(1, 3, 40, 60) * 2 - 1
    for path in (openclip, whole, image_folder):
        found = load_image_features(bare, path, CPU)
        torch.testing.assert_close(found.encode(picture), image.encode(picture))
    found = load_text_features(bare, text_folder, CPU)
    torch.testing.assert_close(found.encode(["red"]), text.encode(["red"]))
    tower = text_tower(read_tower(openclip, TEXT_MODEL), openclip.name)
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, text.model.state_dict()[name])


@torch.no_grad()
def test_autoencoders_from_every_form_are_the_same(state, whole, tmp_path):
    checkpoint = open_dynamicrafter(whole)
    inside = load_frame_codec(checkpoint, None, CPU)
    original, named = tmp_path / "vae.safetensors", tmp_path / "diffusers.safetensors"
    save_file({k: t.contiguous() for k, t in behind(state, VAE).items()}, original)
    save_file({k: t.contiguous() for k, t in inside.vae.state_dict().items()}, named)
    inside.vae.save_pretrained(tmp_path / "sd" / "vae")
    latents = torch.randn(1, 4, 4, 6)
    for path in (original, named, whole, tmp_path / "sd", tmp_path / "sd" / "vae"):
        found = load_frame_codec(checkpoint, path, CPU)
        torch.testing.assert_close(found.decode(latents), inside.decode(latents))
    assert inside.decode(latents).shape == (1, 3, 32, 48)


@torch.no_grad()
def test_the_conditioning_latent_is_a_posterior_sample_of_the_seed(whole):
    codec = load_frame_codec(open_dynamicrafter(whole), None, CPU)
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    first, again, other = (codec.encode(picture, seed) for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-4)
    posterior = codec.vae.encode(picture).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = (posterior.mean + posterior.std * noise) * 0.18215
    torch.testing.assert_close(first, expected)


def test_missing_and_wrong_parts_are_a_sentence(state, whole, words, tmp_path, monkeypatch):
    bare = {k: t for k, t in state.items() if k.startswith(("model.", "image_proj_model."))}
    bare = open_dynamicrafter(write_checkpoint(tmp_path / "bare.ckpt", bare))
    with pytest.raises(LayerLoomError, match="--vae"):
        load_frame_codec(bare, None, CPU)
    with pytest.raises(LayerLoomError, match="--image-encoder"):
        load_image_features(bare, None, CPU)
    with pytest.raises(LayerLoomError, match="--text-encoder"):
        load_text_features(bare, words, CPU)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(LayerLoomError, match="pip install open_clip_torch"):
        load_text_features(open_dynamicrafter(whole), None, CPU)
    wrong = tmp_path / "wrong.safetensors"
    save_file({"some.weight": torch.zeros(3)}, wrong)
    (tmp_path / "empty").mkdir()
    for path in (wrong, tmp_path / "empty"):
        with pytest.raises(LayerLoomError, match="autoencoder"):
            load_frame_codec(bare, path, CPU)
        with pytest.raises(LayerLoomError, match="CLIP image encoder"):
            load_image_features(bare, path, CPU)
    with pytest.raises(LayerLoomError, match="CLIP text encoder"):
        load_text_features(bare, wrong, CPU)


def test_parts_of_other_widths_are_a_sentence(state, whole, tmp_path, words):
    narrow = {
        key: tensor[..., :12].contiguous() if tensor.ndim and tensor.shape[-1] == 16 else tensor
        for key, tensor in read_tower(whole, TEXT_MODEL).items()
    }
    with pytest.raises(LayerLoomError, match=r"mlp|layer_norm|self_attn"):
        text_tower(narrow, "narrow.safetensors")
    with pytest.raises(LayerLoomError, match="embeddings.patch_embedding"):
        image_tower({}, "nothing.safetensors")
    assert read_tower(whole, VISION_MODEL)
    from diffusers import AutoencoderKL

    small = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(LayerLoomError, match="codes 2x2 pixels"):
        load_frame_codec(open_dynamicrafter(whole), tmp_path / "small", CPU)
    assert KLCodec(read_autoencoder(tmp_path / "small"), 1.0).spatial_factor == 2
