"""The trainer and its recipes: exact resume, the moving average, and every way a run can end."""

import errno
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import RECIPES, SMALL_LAYERED, small_autoencoder
from torch import nn
from torch.nn import Linear

from layerloom.engine.conditioning.encoders import StarterCodec
from layerloom.engine.conditioning.layers import GIVEN, RGBA, LayerSequence
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.layered import LayeredPipeline, LayeredRequest
from layerloom.engine.models.segmenter import SegmenterSettings
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_text import WordTokenizer
from layerloom.engine.training.autoencoder import AutoencoderStage, SpriteData, load_autoencoder
from layerloom.engine.training.card import Card
from layerloom.engine.training.data.clip_folder import CaptionedClips
from layerloom.engine.training.data.moving_sprites import MovingClips
from layerloom.engine.training.data.plan import FolderClips
from layerloom.engine.training.data.source import DataParts
from layerloom.engine.training.data.sprites import SpriteClips, SpriteSource
from layerloom.engine.training.data.trajectory_sprites import TrajectoryClips
from layerloom.engine.training.layered import LayeredStage, LayeredTask
from layerloom.engine.training.networks import build_network
from layerloom.engine.training.recipe import check_recipe, load_recipe, train_from_recipe
from layerloom.engine.training.segmenter import SegmentData
from layerloom.engine.training.settings import AdapterSettings, TrainingSettings, settings_from
from layerloom.engine.training.sprite_world import VOCABULARY
from layerloom.engine.training.trainer import Trainer
from layerloom.engine.training.trajectory import TrajectoryTask

SHIPPED = sorted(RECIPES.glob("*.toml"))


class ToyStage:
    """A two-layer regression that writes its weights as they are."""

    hidden = ("inner",)

    def __init__(self, seed: int = 0, fail_at: int | None = None, factor: float = math.nan):
        torch.manual_seed(seed)
        self.network = nn.Sequential()
        self.network.add_module("inner", Linear(4, 4))
        self.network.add_module("outer", Linear(4, 1))
        self.network.register_buffer("seen", torch.zeros(1))
        self.blocks = [self.network.inner]
        self.fail_at, self.factor, self.steps = fail_at, factor, 0

    def draw(self, generator, shares):
        x = torch.randn(8 * shares.count, 4, generator=generator)
        return [x[rows] for rows in shares.rows(8)]

    def loss(self, x):
        self.network.seen += 1
        loss = (self.network(x) - x.sum(1, keepdim=True)).square().mean()
        self.steps += 1
        if self.steps - 1 == self.fail_at:
            loss = loss * self.factor
        numbers = {"odd": 5.0} if self.steps % 2 else {}
        return loss, {"first": x[0, 0].item(), **numbers}

    def export(self, path, state):
        torch.save(dict(state), path)


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(
        **{"steps": 6, "batch": 8, "learning_rate": 1e-2, "warmup": 2, "log_every": 2, **changes}
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.network.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Training and resuming


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer):
    straight = Trainer(ToyStage(), settings(optimizer=optimizer), tmp_path / "straight")
    straight.run()
    start = weights(Trainer(ToyStage(), settings(), tmp_path))
    assert not equal(start, weights(straight))

    half = tmp_path / "half"
    first = Trainer(ToyStage(), settings(optimizer=optimizer), half)
    half.mkdir()
    for _ in range(3):
        first.train_step()
    first.save()
    # Another initialisation: everything that counts comes from the file.
    second = Trainer(ToyStage(seed=9), settings(optimizer=optimizer), half)
    assert second.resume() and second.step == 3
    second.run()
    assert equal(weights(second), weights(straight))
    assert equal(second.average, straight.average)
    exported = [
        torch.load(io.BytesIO((folder / "final.safetensors").read_bytes()), weights_only=True)
        for folder in (half, tmp_path / "straight")
    ]
    assert equal(*exported)


def test_muon_takes_the_hidden_matrices_only(tmp_path):
    trainer = Trainer(ToyStage(), settings(optimizer="muon"), tmp_path)
    adamw, muon = trainer.optimizers.each
    assert [p is trainer.network.inner.weight for p in muon.param_groups[0]["params"]] == [True]
    assert len(adamw.param_groups[0]["params"]) == 3
    assert len(Trainer(ToyStage(), settings(), tmp_path).optimizers.each) == 1


def test_only_the_stages_blocks_are_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Linear, "compile", lambda self, **options: compiled.append(self))
    stage = ToyStage()
    Trainer(stage, settings(), tmp_path)
    assert not compiled
    Trainer(stage, settings(compile=True), tmp_path)
    assert compiled == stage.blocks


def test_nothing_to_resume_starts_afresh(tmp_path):
    trainer = Trainer(ToyStage(), settings(), tmp_path)
    assert not trainer.resume() and trainer.step == 0


def test_the_moving_average_follows_its_formula(tmp_path):
    trainer = Trainer(ToyStage(), settings(ema=0.3), tmp_path)
    expected = {key: value.double() for key, value in weights(trainer).items()}
    for step in range(5):
        trainer.train_step()
        decay = min(0.3, (1 + step) / (10 + step))
        for key, value in weights(trainer).items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
    for key, value in trainer.average.items():
        # Five float32 roundings of values under 10.
        assert float((value - expected[key]).abs().max()) < 5e-6, key

    current = weights(trainer)
    assert equal(dict(trainer.averaged().state_dict()), trainer.average)
    assert not trainer.network.training
    trainer.restore()
    assert equal(weights(trainer), current) and trainer.network.training


def test_the_learning_rate_warms_up_stays_and_falls():
    plan = settings(steps=100, learning_rate=2.0, warmup=10, decay_from=0.5)
    assert plan.rate(0) == pytest.approx(0.2)
    assert plan.rate(9) == plan.rate(49) == 2.0
    assert plan.rate(75) == pytest.approx(1.0)
    assert plan.rate(100) == pytest.approx(0.0)


def test_progress_gets_the_mean_since_the_last_report(tmp_path):
    reports = []
    trainer = Trainer(ToyStage(), settings(steps=4), tmp_path, lambda *r: reports.append(r))
    trainer.run()
    assert [(done, total) for done, total, _ in reports] == [(2, 4), (4, 4)]
    draws = [
        torch.randn(8, 4, generator=torch.Generator().manual_seed(step))[0, 0].item()
        for step in range(4)
    ]
    for (_, _, numbers), expected in zip(reports, (draws[:2], draws[2:]), strict=True):
        assert numbers["first"] == pytest.approx(sum(expected) / 2)
        assert numbers["odd"] == 5.0  # of the one step that gave it
        assert numbers["seconds_per_step"] > 0


def test_a_stop_saves_and_the_run_goes_on_from_there(tmp_path):
    def stop(done, total, numbers):
        if done == 4:
            raise KeyboardInterrupt

    straight = Trainer(ToyStage(), settings(), tmp_path / "straight")
    straight.run()
    trainer = Trainer(ToyStage(), settings(), tmp_path / "run", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not (tmp_path / "run" / "final.safetensors").exists()
    again = Trainer(ToyStage(), settings(), tmp_path / "run")
    assert again.resume() and again.step == 4
    again.run()
    assert equal(weights(again), weights(straight))


@pytest.mark.parametrize(("factor", "what"), [(math.nan, "loss"), (1e30, "gradients")])
def test_a_run_that_blows_up_can_be_resumed(tmp_path, factor, what):
    # 1e30 leaves the loss finite and overflows the norm of its gradient.
    trainer = Trainer(ToyStage(fail_at=3, factor=factor), settings(), tmp_path)
    with pytest.raises(LayerLoomError, match=f"{what}.* at step 3: lower learning_rate"):
        trainer.run()
    again = Trainer(ToyStage(), settings(learning_rate=1e-3), tmp_path)
    assert again.resume() and again.step == 3
    assert all(value.isfinite().all() for value in weights(again).values())
    again.run()
    assert all(value.isfinite().all() for value in weights(again).values())


def test_a_full_disk_keeps_the_last_whole_state(tmp_path, monkeypatch):
    trainer = Trainer(ToyStage(), settings(), tmp_path)
    trainer.train_step()
    trainer.save()
    kept = trainer.state_file.read_bytes()

    def full(state, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LayerLoomError, match=r"state\.pt .*No space left.*last whole checkpoint"):
        trainer.run()
    assert trainer.state_file.read_bytes() == kept
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["other network", "other optimizer", "cut", "text"])
def test_a_state_that_does_not_fit_is_named(tmp_path, kind):
    trainer = Trainer(ToyStage(), settings(), tmp_path)
    trainer.train_step()
    trainer.save()
    stage, chosen = ToyStage(), settings()
    if kind == "other network":
        stage.network.outer = Linear(4, 2)
    elif kind == "other optimizer":
        chosen = settings(optimizer="muon")
    elif kind == "cut":
        trainer.state_file.write_bytes(trainer.state_file.read_bytes()[:300])
    else:
        trainer.state_file.write_text("not a state")
    with pytest.raises(LayerLoomError, match=r"state\.pt is damaged or of a run with another"):
        Trainer(stage, chosen, tmp_path).resume()


# Settings and recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 5}, "key 'step' is unknown; known are accumulate"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"optimizer": "sgd"}, "Unknown optimizer 'sgd'"),
        ({"precision": "fp16"}, "Unknown precision 'fp16'"),
        ({"steps": "many"}, "steps is 'many'; it must be of type int"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    table = {"steps": 6, "batch": 8, "learning_rate": 1, **changes}
    with pytest.raises(LayerLoomError, match=message):
        settings_from(table, TrainingSettings)


def test_a_missing_setting_is_named():
    with pytest.raises(LayerLoomError, match="incomplete: it lacks learning_rate"):
        settings_from({"steps": 6, "batch": 8}, TrainingSettings)


@pytest.mark.parametrize(("key", "value"), [("frames", 6), ("size", 20), ("size", 0)])
def test_sizes_the_autoencoder_cannot_code_are_refused(key, value):
    with pytest.raises(LayerLoomError, match=f"{key} is {value}; it must be a multiple of"):
        SpriteData(**{key: value})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    recipe = load_recipe(path)
    check_recipe(recipe, path)
    table = {key: value for key, value in recipe["data"].items() if key != "kind"}
    if recipe["stage"] == "autoencoder":
        settings_from(table, SpriteData)
        assert set(recipe["loss"]["shares"]) == set(RGBA)
        return
    if recipe["stage"] == "segmenter":
        settings_from(table, SegmentData)
        settings_from(recipe["segmenter"], SegmenterSettings)
        return
    folder = recipe["data"].get("kind") == "folder"
    if recipe["stage"] == "trajectory":
        settings_from(table, CaptionedClips if folder else TrajectoryClips)
        settings_from(recipe["task"], TrajectoryTask)
        return
    if recipe["stage"] in ("animate", "click"):
        if recipe["stage"] == "click" and folder:
            # A path, read apart.
            assert table.pop("raft").endswith(".pth")
        settings_from(table, CaptionedClips if folder else MovingClips)
        return
    data = settings_from(table, FolderClips if folder else SpriteClips)
    settings_from(recipe["task"], LayeredTask)
    if recipe["stage"] == "lora":
        settings_from(recipe["adapter"], AdapterSettings)
    elif not folder:
        assert data.size % (8 * recipe["transformer"]["patch_size"]) == 0
        assert recipe["transformer"]["text_embed_dim"] == recipe["text"]["dim"]


def test_shipped_recipes_fit_together():
    shipped = {path.stem: load_recipe(path) for path in SHIPPED}
    layered = shipped["starter_layered"]
    makers = {recipe["folder"]: recipe for recipe in shipped.values()}
    maker = makers[str(Path(layered["autoencoder"]).parent)]
    assert maker["autoencoder"]["latent_channels"] == layered["transformer"]["in_channels"]
    assert (maker["data"]["size"], maker["data"]["frames"]) == (
        layered["data"]["size"],
        layered["data"]["frames"],
    )


def test_overrides_replace_entries(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('folder = "a"\n[training]\nsteps = 5\n[task.layer_weights]\nalpha = 1.0\n')
    overrides = {
        "folder": "some/where",
        "training.steps": "7",
        "training.learning_rate": "1e-3",
        "task.layer_weights.alpha": "2.5",
    }
    assert load_recipe(path, overrides) == {
        "folder": "some/where",
        "training": {"steps": 7, "learning_rate": 1e-3},
        "task": {"layer_weights": {"alpha": 2.5}},
    }
    with pytest.raises(LayerLoomError, match="fodler is not in the recipe; its entries are folder"):
        load_recipe(path, {"fodler": "x"})
    with pytest.raises(LayerLoomError, match=r"no table \[traning\]"):
        load_recipe(path, {"traning.steps": "1"})
    with pytest.raises(LayerLoomError, match=r"no table \[folder\]"):
        load_recipe(path, {"folder.steps": "1"})
    path.write_text("steps = ")
    with pytest.raises(LayerLoomError, match=r"r\.toml cannot be read"):
        load_recipe(path)
    with pytest.raises(LayerLoomError, match=r"none\.toml cannot be read"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("starter_autoencoder", {"training.stps": "1"}, "'stps' is unknown"),
        ("starter_autoencoder", {"data.frames": "6"}, "frames is 6"),
        ("starter_autoencoder", {"autoencoder.wdth": "1"}, r"autoencoder\.wdth is unknown"),
        (
            "starter_autoencoder",
            {"loss.nois": "1"},
            r"loss\.nois is unknown; known are edge_weight",
        ),
        ("starter_autoencoder", {"loss.shares": "{ alpha = 1 }"}, "lacks the entry 'foreground'"),
        ("starter_autoencoder", {"stage": "pixels"}, "Unknown stage 'pixels'"),
        ("starter_autoencoder", {"data": "5"}, r"no table \[data\]"),
        ("starter_layered", {"transformer.depth": "1"}, r"transformer\.depth is unknown"),
        ("starter_layered", {"text.vocabulary": "1"}, "'vocabulary' is unknown; known are dim"),
        ("starter_layered", {"autoencoder": "nowhere.safetensors"}, "nowhere.*train it first"),
        ("starter_layered", {"autoencoder": "FOLDER/text.safetensors"}, "not an autoencoder"),
        ("starter_layered", {"autoencoder": "FOLDER"}, "not an autoencoder that LayerLoom"),
    ],
)
def test_recipes_that_cannot_be_built_say_why(tmp_path, name, overrides, message):
    (tmp_path / "text.safetensors").write_text("no tensors here")
    overrides = {key: value.replace("FOLDER", str(tmp_path)) for key, value in overrides.items()}
    with pytest.raises(LayerLoomError, match=message):
        train_from_recipe(RECIPES / f"{name}.toml", {"folder": str(tmp_path / "run"), **overrides})


def test_a_recipe_without_an_entry_names_it(tmp_path, monkeypatch):
    path = tmp_path / "r.toml"
    monkeypatch.chdir(tmp_path)
    path.write_text(
        'stage = "layered"\n[training]\nsteps = 1\nbatch = 1\nlearning_rate = 1\n[data]\n'
    )
    with pytest.raises(LayerLoomError, match="neither an autoencoder nor a start"):
        train_from_recipe(path)


# The stages


def test_from_autoencoder_to_frames(tmp_path):
    """Both shipped recipes at small width, two steps each; the result opens and generates."""
    first = small_autoencoder(tmp_path / "first")
    motion = small_autoencoder(tmp_path / "second", "starter_autoencoder_motion", start=str(first))
    config, model = load_autoencoder(motion)
    assert config["latent_channels"] == 4 and isinstance(model, StarterAutoencoder)

    phases = []
    run = tmp_path / "run"
    overrides = {**SMALL_LAYERED, "folder": str(run), "autoencoder": str(motion)}
    path = RECIPES / "starter_layered.toml"
    exported = train_from_recipe(path, overrides, False, lambda *r: phases.append(r[:3]))
    assert phases == [("encoding", 4, 4), ("training", 1, 2), ("training", 2, 2)]

    pipeline = LayeredPipeline.open(exported, device="cpu")
    assert pipeline.native_size == (32, 32) and pipeline.sequence().frames == 4
    stored = pipeline.codec.model.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(stored[key], value.half().float()), key
    result = pipeline.run(LayeredRequest("generate", "a red circle", "plain blue", steps=2))
    assert result.foreground.shape == (4, 32, 32, 3) and result.alpha.shape == (4, 32, 32)
    blended = {"blended": np.zeros((4, 32, 32, 3), np.uint8)}
    request = LayeredRequest("decompose", "a red circle", "plain blue", given=blended, steps=2)
    assert pipeline.run(request).background.dtype == np.uint8

    with pytest.raises(LayerLoomError, match="already holds a run; add --resume"):
        train_from_recipe(path, overrides)
    longer = {**overrides, "training.steps": "3"}
    phases.clear()
    train_from_recipe(path, longer, True, lambda *r: phases.append(r[:3]))
    assert phases == [("training", 3, 3)]  # latents are kept, finished steps too


class Scenes(SpriteSource):
    """Five scenes of sprite world with random latents."""

    def __init__(self, parts: DataParts, scenes: int = 5):
        super().__init__(SpriteClips(frames=4, size=32, seed=3, scenes=scenes), parts)
        frames = sum(self.sequence.latent_frames(layer) for layer in RGBA)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(5, frames, 4, 4, 4, generator=generator).bfloat16()
        self._latents = (latents[:scenes], None)


def tiny_stage(task: LayeredTask, batch: int = 3, scenes: int = 5) -> LayeredStage:
    config = {"latent_channels": 4, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
    torch.manual_seed(0)
    transformer = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 8,
    }
    words = {"tokens": 8, "dim": 8, "vocabulary": list(VOCABULARY)}
    network = build_network(transformer, {**words, "vocabulary": len(VOCABULARY)})
    autoencoder, sequence = StarterAutoencoder(**config), LayerSequence(frames=4)
    parts = DataParts(StarterCodec(autoencoder), sequence, (32, 32), 16, Path())
    card = Card("starter", transformer, sequence, {}, {}, words, autoencoder, config)
    tokenizer = WordTokenizer(VOCABULARY, 8)
    return LayeredStage(network, Scenes(parts, scenes), task, batch, card, tokenizer)


def loss_of(stage, seed: int):
    (drawn,) = stage.draw(torch.Generator().manual_seed(seed))
    return stage.loss(drawn)


def only(task: str, **changes) -> LayeredTask:
    return LayeredTask(**{name: float(name == task) for name in GIVEN}, **changes)


class Recorded(nn.Module):
    """Stands for the transformer: keeps what it is given, answers with ``answer(latents)``."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, latents, timestep, text, segments, clean=None):
        self.latents, self.timestep, self.text = latents, timestep, text
        self.segments, self.clean = segments, clean
        return self.answer(latents)


@pytest.mark.parametrize("task", GIVEN)
def test_the_loss_is_v_on_the_layers_made(task):
    # One scene, so the test knows which was drawn.
    stage = tiny_stage(only(task, layer_weights={"foreground": 3.0, "blended": 0.5}), scenes=1)
    network = stage.network.transformer = Recorded(torch.zeros_like)
    loss, numbers = loss_of(stage, 1)

    made = [layer for layer in RGBA if layer not in GIVEN[task]]
    layers = stage.sequence.split_latents(stage.source._all()[0].float())
    assert [s.name for s in network.segments if not s.clean] == made
    if GIVEN[task]:
        given = torch.cat([layers[layer] for layer in GIVEN[task]], dim=1)
        assert torch.equal(network.clean, given.expand(3, -1, -1, -1, -1))
    else:
        assert network.clean is None
    # One timestep from each third of the range.
    assert (network.timestep * 3 // 1000).tolist() == [0, 1, 2]

    # v = sqrt(a) noise - sqrt(1 - a) x0 (Salimans & Ho 2022), the noise read off x_t.
    x0 = torch.cat([layers[layer] for layer in made], dim=1).double()
    a = stage.schedule.alphas_cumprod[network.timestep].view(-1, 1, 1, 1, 1)
    noise = (network.latents.double() - a.sqrt() * x0) / (1 - a).sqrt()
    assert float(noise.std()) == pytest.approx(1, abs=0.2)
    square = (a.sqrt() * noise - (1 - a).sqrt() * x0).square().mean((0, 2, 3, 4))
    weight = {"foreground": 3.0, "alpha": 1.0, "background": 1.0, "blended": 0.5}
    weights = torch.tensor([weight[layer] for layer in made]).double()
    # Float32 noise divided by a small sqrt(1 - a) where t is near 0.
    assert loss.item() == pytest.approx(float((square * weights).sum() / weights.sum()), rel=1e-3)
    assert list(numbers) == [f"loss/{task}"]
    assert numbers[f"loss/{task}"] == pytest.approx(square.mean().item(), rel=1e-3)


def test_a_perfect_answer_has_no_loss(monkeypatch):
    stage = tiny_stage(only("generate"))
    targets = []
    velocity = type(stage.schedule).velocity

    def keep(schedule, x0, noise, t):
        targets.append(velocity(schedule, x0, noise, t))
        return targets[-1]

    monkeypatch.setattr(type(stage.schedule), "velocity", keep)
    stage.network.transformer = Recorded(torch.zeros_like)
    loss, _ = loss_of(stage, 4)
    assert loss > 0.1
    stage.network.transformer = Recorded(lambda latents: targets[0])
    loss, _ = loss_of(stage, 4)
    assert loss == 0


def test_text_is_dropped_in_the_share_asked_for():
    for share in (0.0, 1.0, 0.5):
        stage = tiny_stage(only("decompose", text_dropout=share), batch=40)
        stage.network.transformer = Recorded(torch.zeros_like)
        loss_of(stage, 2)
        text = stage.network.transformer.text
        assert text.shape == (40, 2, 8, 8)
        empty = (text == 0).flatten(1).all(1).float().mean().item()
        # Forty draws: the share is met within three standard deviations.
        assert abs(empty - share) <= 3 * math.sqrt(share * (1 - share) / 40)


def test_one_seed_one_batch():
    stage = tiny_stage(LayeredTask())
    losses = [loss_of(stage, 7)[0].item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert loss_of(stage, 8)[0].item() != losses[0]


def test_training_starts_from_a_network_that_passes_nothing_on():
    stage = tiny_stage(LayeredTask())
    loss_of(stage, 0)[0].backward()
    reached = {
        n for n, p in stage.network.named_parameters() if p.grad is not None and p.grad.any()
    }
    # AdaLN-zero: gates and output projection are 0, so only the projection learns at first.
    assert reached == {"transformer.proj_out.weight", "transformer.proj_out.bias"}


def test_autoencoder_groups_are_four_frames_of_one_layer():
    data = SpriteData(frames=8, size=16, seed=1)
    config = {"latent_channels": 2, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
    shares = {**dict.fromkeys(RGBA, 0.0), "alpha": 1.0}
    network = StarterAutoencoder(**config)
    stage = AutoencoderStage(network, config, data, 5, 0.2, 4.0, shares)
    groups = stage.groups(torch.Generator().manual_seed(0), 5)
    assert groups.shape == (5, 4, 3, 16, 16)
    # Only mattes were asked for: three equal channels.
    assert torch.equal(groups[:, :, 0], groups[:, :, 2])
    loss, numbers = loss_of(stage, 0)
    loss.backward()
    assert math.isfinite(numbers["psnr"])
    assert all(parameter.grad.any() for parameter in network.parameters())
    # The weight of moving pixels only adds.
    plain = AutoencoderStage(network, config, data, 5, 0.2, 0.0, shares)
    assert loss_of(plain, 0)[0] < loss
