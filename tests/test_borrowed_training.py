"""Training an adapter on somebody else's network, from layers in memory (ComfyUI's node)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from layerloom.engine.checkpoints.load import load_transformer, open_checkpoint
from layerloom.engine.checkpoints.lora import inspect_file, read_lora
from layerloom.engine.conditioning.encoders import load_codec, load_text
from layerloom.engine.conditioning.layers import RGB, RGBA, LayerSequence
from layerloom.engine.conditioning.prompts import indexed_prompts
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.layered import STARTER, LayeredPipeline, LayeredRequest
from layerloom.engine.sampling.schedules import layerflow_schedule
from layerloom.engine.training.borrowed import AdapterRun, borrow, borrowed_stage, step_memory
from layerloom.engine.training.data.in_memory import GivenClip, MemorySource, cut, given_clip
from layerloom.engine.training.data.source import Pick
from layerloom.engine.training.layered import LayeredTask
from layerloom.engine.training.loss_plot import loss_plot, running_means
from layerloom.engine.training.settings import AdapterSettings, TrainingSettings
from layerloom.engine.training.sprite_world import render, scene_at

CPU = torch.device("cpu")
SEQUENCE = LayerSequence(frames=4)
SIZE = (32, 32)
TEXT = torch.zeros(3, 2, 4)


def images(count: int, size: int = 32, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * size)
    return torch.rand(count, size, size, channels, generator=generator)


class Joined:
    """An autoencoder that keeps what it is given, so that tests see it."""

    spatial_factor, temporal_factor = 1, 1

    def encode(self, clip, generator):
        return clip


# --- clips and their pieces -----------------------------------------------------------------------


def test_alpha_comes_as_a_mask_or_as_a_fourth_channel():
    foreground, alpha = images(4, channels=4), images(4)[..., 0]
    of_mask = given_clip("it", foreground, alpha, images(1), None, TEXT, SEQUENCE)
    of_channel = given_clip("it", foreground, None, images(1), None, TEXT, SEQUENCE)
    assert torch.equal(of_mask.layers["alpha"], alpha[:, None])
    assert torch.equal(of_channel.layers["alpha"][:, 0], foreground[..., 3])
    assert of_mask.layers["foreground"].shape == (4, 3, 32, 32) and of_mask.count == 4


@pytest.mark.parametrize(
    ("given", "layers", "message"),
    [
        ((images(4), None, images(4), None), RGBA, "no alpha; connect a MASK"),
        ((images(4), None, images(4), None), RGB, "cannot be put together; connect alpha"),
        (
            (images(4), images(3)[..., 0], images(4), None),
            RGBA,
            r"differ in length \(frames: foreground 4, background 4, alpha 3\)",
        ),
        ((images(1), images(1)[..., 0], images(4), images(2)), RGBA, "blended 2"),
    ],
)
def test_layers_that_do_not_fit_are_a_sentence(given, layers, message):
    with pytest.raises(LayerLoomError, match=message):
        given_clip("clip 2", *given, TEXT, LayerSequence(layers, 4))


def clip(count: int) -> GivenClip:
    mask = images(count)[..., 0]
    return given_clip("it", images(count), mask, images(1, 24), None, TEXT, SEQUENCE)


def test_a_kind_says_what_is_cut_from_clips():
    clips = [clip(9), clip(4)]
    plain = cut(clips, "plain", 4, 0.1)
    assert [(p.clip, p.start, p.still) for p in plain] == [
        (0, 0, False),
        (0, 4, False),
        (1, 0, False),
    ]
    motion = cut(clips, "motion", 4, 0.1)
    assert len(motion) == 13 and all(piece.still for piece in motion)
    assert cut(clips, "content", 4, 0.1) == motion + plain
    assert cut(clips, "content", 4, 0.0) == motion
    # Pictures alone: nothing moves.
    assert cut([clip(1)], "content", 4, 0.5) == cut([clip(1)], "motion", 4, 0)
    with pytest.raises(LayerLoomError, match="Clip 2 has 3 frames, but 4 a layer are needed"):
        cut([clip(4), clip(3)], "plain", 4, 0)


def test_pieces_are_what_the_network_reads_joined_and_blended():
    source = MemorySource([clip(9)], "content", SEQUENCE, SIZE, Joined(), 0.25)
    source.encode()
    moving, still = (source.load([Pick(group[1], 0)]) for group in source.groups)
    assert moving.latents.shape == still.latents.shape == (1, 16, 3, 32, 32)
    assert not moving.still.any() and still.still.all()
    fg, alpha, bg, blended = moving.latents[0].unflatten(0, (4, 4))
    given = source.clips[0].layers
    matte = given["alpha"][4:8]
    assert torch.allclose(alpha, (matte * 2 - 1).expand(-1, 3, -1, -1))
    # Premultiplied onto mid-grey; the scene is straight colour over the resized background.
    assert torch.allclose(fg, (given["foreground"][4:8] * 2 - 1) * matte, atol=1e-6)
    together = matte * given["foreground"][4:8] * 2 - matte + (1 - matte) * bg
    assert torch.allclose(blended, together, atol=1e-5)
    assert torch.equal(bg[0], bg[3])
    # A still clip is one frame in all of its layers.
    for layer in still.latents[0].unflatten(0, (4, 4)):
        assert all(torch.equal(frame, layer[0]) for frame in layer)


def test_batches_stand_still_or_move_as_a_whole():
    source = MemorySource([clip(8)], "content", SEQUENCE, SIZE, Joined(), 0.25)
    source.encode()
    kinds = []
    for seed in range(200):
        batch = source.batch(torch.Generator().manual_seed(seed), 3)
        assert len(set(batch.still.tolist())) == 1
        kinds.append(bool(batch.still[0]))
    assert 0.65 < np.mean(kinds) < 0.85
    assert "2 moving and 8 still samples of 4 frames, 32x32." in source.describe()
    assert "Layers of 24x24 are resized to that." in source.describe()
    plain = MemorySource([clip(9)], "plain", SEQUENCE, SIZE, Joined())
    assert "1 frames at the ends of clips are left out." in plain.describe()


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starter():
    """The starter's network, and one small clip it has not seen: a shape over plain orange."""
    checkpoint = open_checkpoint(STARTER)
    codec, text = load_codec(checkpoint, None, CPU), load_text(checkpoint, None, CPU)
    scene = render([scene_at(77, 3)], 8, (96, 96))
    words = indexed_prompts("generate", "a blue triangle turning", "plain yellow")
    given = given_clip(
        "it",
        scene.foreground[0].movedim(1, -1),
        scene.alpha[0, :, 0],
        torch.tensor([1.0, 0.5, 0.1]).expand(1, 96, 96, 3),
        None,
        text.encode(words).detach(),
        SEQUENCE,
    )
    source = MemorySource([given], "plain", SEQUENCE, (48, 48), codec)
    source.encode()
    return checkpoint, source


def training(starter, file: Path, steps: int, report=None, start=None, **changes) -> AdapterRun:
    checkpoint, source = starter
    network = load_transformer(checkpoint).float().requires_grad_(False)
    rank, alpha = (start.rank, start.alpha) if start else (4, 4.0)
    adapter = AdapterSettings(name="orange", rank=rank, alpha=alpha)
    borrowed = borrow(network, network, adapter, {}, start, seed=1)
    defaults = {"steps": steps, "batch": 2, "learning_rate": 3e-3, "warmup": 1, "ema": 0.9}
    settings = TrainingSettings(
        **{**defaults, "weight_decay": 0.0, "checkpoint_every": 5, **changes}
    )
    task = LayeredTask(text_dropout=0.0)
    stage = borrowed_stage(borrowed, adapter, source, task, 2, layerflow_schedule())
    return AdapterRun(stage, settings, file, report)


def test_the_loss_falls_and_the_network_stays_as_it_was(starter, tmp_path):
    seen = []
    run = training(starter, tmp_path / "orange.safetensors", 24, lambda *now: seen.append(now[0]))
    network = run.stage.network.transformer
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = run.check()
    run.run()
    # Measured: from 0.31 to 0.19.
    assert run.check() < 0.8 * first
    assert seen == list(range(1, 25)) and len(run.losses) == 24
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(tmp_path.iterdir()) == [tmp_path / "orange.safetensors"]


def test_the_file_is_what_was_trained_and_changes_what_is_made(starter, tmp_path):
    file = tmp_path / "orange.safetensors"
    run = training(starter, file, 6)
    run.run()
    lora, trained = read_lora(file), run.adapter()
    assert (lora.name, lora.rank, lora.alpha) == ("orange", 4, 4.0)
    for module in trained.targets:
        for stored, here in zip(lora.weights[module], trained.weights[module], strict=True):
            assert torch.equal(stored, here)
    assert inspect_file(file).notes["steps"] == 6
    request = LayeredRequest("generate", "a red circle", "plain yellow", steps=2)
    made = [
        LayeredPipeline.open(STARTER, device="cpu", loras=loras).run(request).background
        for loras in ([], [(lora, 1.0)])
    ]
    assert not np.array_equal(*made)


def test_a_stop_keeps_the_adapter_of_the_last_whole_step(starter, tmp_path):
    file = tmp_path / "orange.safetensors"

    def stop(step, losses):
        if step == 3:
            raise KeyboardInterrupt

    stopped = training(starter, file, 6, stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert stopped.saved_step == 3 and inspect_file(file).notes["steps"] == 3
    lora = read_lora(file)
    # The same steps of a run that was not stopped.
    whole = training(starter, tmp_path / "whole.safetensors", 6)
    whole.network.train()
    for _ in range(3):
        whole.train_step()
    for module, pair in whole.adapter().weights.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, lora.weights[module], strict=True))


def test_a_stop_before_the_first_step_leaves_no_file(starter, tmp_path):
    run = training(starter, tmp_path / "orange.safetensors", 6)
    run.train_step = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_from_a_file(starter, tmp_path):
    first = training(starter, tmp_path / "first.safetensors", 12)
    first.run()
    lora = read_lora(tmp_path / "first.safetensors")
    second = training(starter, tmp_path / "second.safetensors", 12, start=lora)
    assert second.check() == pytest.approx(first.check(), rel=1e-5)
    with pytest.raises(LayerLoomError, match="keeps no state"):
        second.resume()


def test_an_adapter_for_another_network_is_refused(starter, tmp_path):
    checkpoint, _ = starter
    network = load_transformer(checkpoint)
    lora = training(starter, tmp_path / "a.safetensors", 1).adapter()
    odd = {f"other.{module}": pair for module, pair in lora.weights.items()}
    strange = type(lora)("strange", lora.rank, lora.alpha, odd)
    settings = AdapterSettings("new", 4, 4.0)
    with pytest.raises(LayerLoomError, match="does not fit the model, which has no other"):
        borrow(network, network, settings, {}, strange)
    assert not any(type(m).__name__.startswith("Adapted") for m in network.modules())


def test_checkpointing_takes_less_memory_and_gives_the_same_losses(starter, tmp_path):
    plain = training(starter, tmp_path / "plain.safetensors", 2)
    again = training(starter, tmp_path / "again.safetensors", 2, gradient_checkpointing=True)
    # Room for a step is asked of the host before it loads the model.
    needed = [
        step_memory(run.stage.network, 336, run.settings, bf16=False) for run in (plain, again)
    ]
    assert 0 < needed[1] < needed[0]
    plain.run(), again.run()
    # fp32; recomputing sums in the same order, so only rounding of fused kernels may differ.
    assert again.losses == pytest.approx(plain.losses, rel=1e-5)


# --- the plot -------------------------------------------------------------------------------------


def test_running_means_are_of_the_last_losses():
    assert running_means([4.0, 2.0, 0.0, 1.0], 2) == [4.0, 3.0, 1.0, 0.5]


def test_the_plot_shows_a_fall_and_survives_anything():
    falling = np.asarray(loss_plot([1 / (1 + n) for n in range(50)], 100))
    assert falling.shape == (320, 512, 3)
    # Nothing is drawn yet in the second half of the run.
    dots = (falling == (62, 88, 120)).all(-1)
    assert dots[:, :256].any() and not dots[:, 300:].any()
    rows = [np.argwhere(dots[:, column]).mean() for column in np.argwhere(dots.any(0))[:, 0]]
    assert rows[-1] > rows[0] + 100
    for losses in ([], [0.0], [1e-9, 1e-9], [5.0] * 3, [1.0, 1e6]):
        loss_plot(losses, 3, "odd")
