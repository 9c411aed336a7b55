"""Published video networks in training: a person's clips, the paper's phases, missing parts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from animate_files import whole_state, write_checkpoint, write_tokenizer
from PIL import Image
from safetensors.torch import save_file
from small_animation import (
    PROJECTOR,
    UNET,
)
from small_training import RECIPES

from layerloom.engine.checkpoints.dynamicrafter import open_dynamicrafter
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.dynamicrafter import VARIANTS
from layerloom.engine.models.video_unet import VideoUNet
from layerloom.engine.training.animate_card import AnimateCard
from layerloom.engine.training.animate_networks import (
    TEMPORAL,
    Shapes,
    build_animate_network,
)
from layerloom.engine.training.data.clip_folder import CaptionedClips, plan_clips
from layerloom.engine.training.recipe import train_from_recipe

# Published weights and a person's clips


def write_clips(folder, count: int = 2, frames: int = 9):
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        place = folder / "clips" / f"clip{number}"
        place.mkdir(parents=True)
        for frame in range(frames):
            picture = rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(picture).save(place / f"{frame:02}.png")
        lines.append({"sample": f"clips/clip{number}", "caption": [f"clip {number}", "a clip"]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory, golden_dir, manifest_dir):
    """A whole official file in miniature, and a tokenizer."""
    folder = tmp_path_factory.mktemp("official")
    write_tokenizer(folder / "tokenizer")
    write_checkpoint(folder / "model.ckpt", whole_state(golden_dir, manifest_dir))
    return folder


def finetuning(official, folder, name: str = "finetune", **changes) -> dict[str, str]:
    return {
        "start": str(official / "model.ckpt"),
        "text_encoder": str(official / "tokenizer"),
        "folder": str(folder / "run"),
        "data.path": str(folder / "data"),
        "data.frames": "4",
        "data.height": "64",
        "data.width": "64",
        "training.steps": "2",
        "training.accumulate": "1",
        "training.log_every": "1",
        "training.warmup": "1",
        **changes,
    }


@pytest.fixture
def recipe_with_encoders(tmp_path):
    """The shipped fine-tuning recipe with places for the parts that the tests name."""

    def write(name: str) -> Path:
        text = (RECIPES / f"dynamicrafter_{name}.toml").read_text()
        path = tmp_path / f"{name}.toml"
        path.write_text('text_encoder = ""\nimage_encoder = ""\nvae = ""\n' + text)
        return path

    return write


@pytest.mark.parametrize("name", ["finetune", "interpolate"])
def test_published_weights_are_fine_tuned_on_a_folder(
    official, tmp_path, recipe_with_encoders, name
):
    write_clips(tmp_path / "data")
    notes = []
    overrides = finetuning(official, tmp_path)
    path = train_from_recipe(recipe_with_encoders(name), overrides, note=notes.append)
    made, start = open_dynamicrafter(path), open_dynamicrafter(official / "model.ckpt", "512")
    made.check()
    assert made.variant.name == "512" and made.variant.frames == 4
    assert made.info.parts == ("unet", "image_projector", "vae")
    before, after = start.part_state("unet"), made.part_state("unet")
    still = [k for k in before if any(mark in k for mark in TEMPORAL)]
    assert still and all(torch.equal(before[k].half(), after[k]) for k in still)
    moved = [k for k in before if not torch.equal(before[k].half(), after[k])]
    assert "conv_in.weight" in moved and any("to_k_ip" in k for k in moved)
    assert any("2 clips" in note for note in notes)
    # Everything was encoded once; a second run reads it.
    cache = tmp_path / "data" / ".layerloom"
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    assert len(stamps) >= 2 * 2 + 3
    train_from_recipe(recipe_with_encoders(name), {**overrides, "folder": str(tmp_path / "second")})
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")} == stamps


def test_a_folders_clips_are_told_with_their_pace(official, tmp_path):
    plan = plan_clips(
        CaptionedClips(str(write_clips(tmp_path)), 4, 64, 64, strides=[2, 2], pieces=3), 8
    )
    assert {piece.stride for piece in plan.pieces} == {2}
    assert all(piece.numbers(4)[-1] <= 8 for piece in plan.pieces)
    assert {piece.bucket for piece in plan.pieces} == {(56, 72)}  # nearest to the clips' shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "captions.jsonl").unlink(), "captions.jsonl"),
        (lambda folder: (folder / "clips" / "new").mkdir(), "clips/new"),
        (
            lambda folder: [p.unlink() for p in (folder / "clips" / "clip0").glob("0[3-9].png")],
            "clips/clip0: has 3 frames; give at least 4",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, change, message):
    change(write_clips(tmp_path))
    with pytest.raises(LayerLoomError, match=message):
        plan_clips(CaptionedClips(str(tmp_path), 4, 64, 64), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": [3, 1]}, "strides is"),
        ({"strides": 2}, "strides is"),
        ({"pictures": 1}, "pictures is 1"),
    ],
)
def test_bad_folder_settings_are_named(changes, message):
    with pytest.raises(LayerLoomError, match=message):
        CaptionedClips("somewhere", **changes)


def test_missing_parts_are_named_before_anything_is_read(official, tmp_path):
    write_clips(tmp_path / "data")
    overrides = finetuning(official, tmp_path, start=str(tmp_path / "pruned.safetensors"))
    overrides.pop("text_encoder")
    state = torch.load(official / "model.ckpt", weights_only=True)["state_dict"]
    kept = ("model.diffusion_model.", "image_proj_model.")
    save_file(
        {k: t.contiguous() for k, t in state.items() if k.startswith(kept)},
        tmp_path / "pruned.safetensors",
    )
    with pytest.raises(LayerLoomError, match="The recipe needs Stable Diffusion's autoencoder"):
        train_from_recipe(RECIPES / "dynamicrafter_finetune.toml", overrides)


def test_the_papers_phases_start_from_image_and_video_networks(tmp_path):
    """The video UNet of phase 2 takes the image UNet's place, but for the image stream."""
    torch.manual_seed(3)
    flat = {"temporal_convolution": False, "temporal_transformer": False}
    plain = {**UNET, "in_channels": 4, "image_attention": False, "scalar_embeddings": ()}
    image = VideoUNet(**{**plain, **flat, "initial_temporal_transformer": False})
    video = VideoUNet(**plain)
    save_file(image.state_dict(), tmp_path / "image.safetensors")
    save_file(video.state_dict(), tmp_path / "video.safetensors")
    shape = {**UNET, **flat, "initial_temporal_transformer": False, "in_channels": 4}
    shape["scalar_embeddings"] = ()
    first = build_animate_network(
        Shapes(shape, PROJECTOR), base=tmp_path / "image.safetensors", trainable="projector"
    )
    x, t, text = torch.randn(1, 4, 1, 4, 4), torch.tensor([3]), torch.randn(1, 3, 8)
    tokens = first.image_projector(torch.randn(1, 5, 8))
    with torch.no_grad():
        made = first.unet(x, t, text, image_context=tokens)
        torch.testing.assert_close(made, image(x, t, text))
    trained = {n for n, p in first.named_parameters() if p.requires_grad}
    assert all("_ip." in n or n.startswith("image_projector.") for n in trained)

    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if name in trained:
                parameter.add_(0.01)
    card = AnimateCard(VARIANTS["256"], shape, PROJECTOR)
    card.write(tmp_path / "phase1.safetensors", first.state_dict())
    start = open_dynamicrafter(tmp_path / "phase1.safetensors")
    second = build_animate_network(
        Shapes({**UNET, "in_channels": 4}, PROJECTOR),
        start,
        tmp_path / "video.safetensors",
        "spatial",
    )
    state = second.unet.state_dict()
    for name, tensor in video.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for name, tensor in first.unet.state_dict().items():
        if "_ip." in name:
            assert torch.equal(state[name], tensor.half().float()), name


def test_an_image_network_of_another_kind_is_refused(tmp_path):
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(LayerLoomError, match="holds no UNet of Stable Diffusion's kind"):
        build_animate_network(
            Shapes({**UNET, "in_channels": 4}, PROJECTOR), base=tmp_path / "other.safetensors"
        )
