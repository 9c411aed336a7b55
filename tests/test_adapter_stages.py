"""Training adapters beside a frozen base, the chain that makes the starter, and previews."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_training import (
    RECIPES,
    SMALL_ADAPTER,
    SMALL_AUTOENCODER,
    SMALL_LAYERED,
    small_adapter,
    small_starter,
)

from layerloom.engine.checkpoints.load import open_checkpoint
from layerloom.engine.checkpoints.lora import read_lora
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.layered import LayeredPipeline
from layerloom.engine.training.adapter import AdapterStage
from layerloom.engine.training.recipe import load_recipe, train_from_recipe

STARTER = Path(__file__).parent.parent / "starter" / "layered.toml"


@pytest.fixture(scope="module")
def starter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("starter")
    return small_starter(folder, **{"transformer.num_layers": "6"})


@pytest.fixture(scope="module")
def motion(starter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("motion")
    return small_adapter("starter_motion", starter, folder, **{"training.learning_rate": "0.1"})


def base_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(path).items() if not k.startswith("adapters.")}


def test_an_adapter_leaves_the_base_bit_for_bit(starter, motion):
    before, after = load_file(starter), base_tensors(motion)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lora = read_lora(motion, "motion")
    assert lora.rank == 2 and len(lora.targets) == 24
    assert any(b.any() for _, b in lora.weights.values())


def test_the_adapter_is_also_there_alone(motion):
    alone = read_lora(motion.with_name("motion.safetensors"))
    inside = read_lora(motion, "motion")
    assert alone.name == "motion" and alone.targets == inside.targets
    for module in alone.targets:
        # Half precision inside the checkpoint.
        assert torch.allclose(alone.delta(module), inside.delta(module), atol=2e-3)


def test_the_checkpoint_carries_its_adapter_at_the_recipes_strength(motion):
    checkpoint = open_checkpoint(motion)
    assert checkpoint.adapter_scales == {"motion": 0.0}
    assert checkpoint.metadata["variant"] == "starter"
    notes = checkpoint.metadata["adapters_trained_with"]["motion"]
    assert notes["rank"] == 2 and notes["steps"] == 2
    assert checkpoint.metadata["trained_with"]["text_dropout"] == 0.1
    off, on = (checkpoint.transformer_state({"motion": strength}) for strength in (0.0, 1.0))
    changed = {name for name in off if not torch.equal(off[name], on[name])}
    assert changed == {f"{module}.weight" for module in read_lora(motion).targets}
    LayeredPipeline.open(motion, device="cpu", adapters={"motion": 1.0})


def test_content_goes_beside_motion(motion, tmp_path):
    changes = {"adapter.blocks": '"all"', "data.still": "0.5"}
    final = small_adapter("starter_content", motion, tmp_path, **changes)
    checkpoint = open_checkpoint(final)
    assert set(checkpoint.info.adapters) == {"motion", "content"}
    assert checkpoint.adapter_scales == {"motion": 0.0, "content": 1.0}
    before, after = load_file(motion), load_file(final)
    # The base and the motion adapter as they were.
    assert all(torch.equal(after[name], before[name]) for name in before)
    checkpoint.check()


def stage_of(monkeypatch, name: str, start: Path, folder: Path, **changes) -> AdapterStage:
    """The stage a recipe builds, caught before its first step."""
    from layerloom.engine.training import recipe

    caught = {}

    class Caught(Exception):
        pass

    def trainer(stage, *rest):
        caught["stage"] = stage
        raise Caught

    monkeypatch.setattr(recipe, "Trainer", trainer)
    with pytest.raises(Caught):
        small_adapter(name, start, folder, **changes)
    return caught["stage"]


def test_motion_is_on_for_still_clips_alone(motion, tmp_path, monkeypatch):
    changes = {"adapter.blocks": '"all"', "data.still": "0.5"}
    stage = stage_of(monkeypatch, "starter_content", motion, tmp_path, **changes)
    seen = {}
    for seed in range(12):
        (drawn,) = stage.draw(torch.Generator().manual_seed(seed))
        _, numbers = stage.loss(drawn)
        still = bool(drawn.samples.still[0])
        assert bool(drawn.samples.still.all()) == still
        assert ("loss/still" in numbers) == still
        seen[still] = float(stage.network.others["motion"].strength)
        assert float(stage.network.adapter.strength) == 1.0
    assert seen == {True: 1.0, False: 0.0}
    trained = {name for name, p in stage.network.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("adapter.pairs.") for name in trained)


def test_gradients_reach_the_adapter_alone(motion, tmp_path, monkeypatch):
    changes = {"adapter.blocks": '"all"', "data.still": "1.0"}
    stage = stage_of(monkeypatch, "starter_content", motion, tmp_path, **changes)
    (drawn,) = stage.draw(torch.Generator().manual_seed(0))
    stage.loss(drawn)[0].backward()
    reached = {n for n, p in stage.network.named_parameters() if p.grad is not None}
    assert reached and all(name.startswith("adapter.pairs.") for name in reached)


def test_an_adapter_goes_on_from_a_file(starter, motion, tmp_path, monkeypatch):
    first = read_lora(motion.with_name("motion.safetensors"))
    stage = stage_of(
        monkeypatch,
        "starter_motion",
        starter,
        tmp_path,
        **{"adapter.init": str(motion.with_name("motion.safetensors"))},
    )
    found = stage.network.adapter.as_lora()
    for module in first.targets:
        assert torch.allclose(found.delta(module), first.delta(module), atol=1e-6)


def test_a_resumed_adapter_needs_the_base_it_began_with(starter, motion, tmp_path):
    small_adapter("starter_motion", starter, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    # The frozen base is the recipe's to give, not the state's to keep.
    assert all(name.startswith("adapter.") for name in state["network"])
    wide = {"transformer.num_layers": "6", "training.seed": "5"}
    other = small_starter(tmp_path / "other", **wide)
    with pytest.raises(LayerLoomError, match="begun from other weights than the recipe's start"):
        changes = {**SMALL_ADAPTER, "start": str(other), "folder": str(tmp_path / "run")}
        train_from_recipe(RECIPES / "starter_motion.toml", changes, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.rnk": "2"}, "'rnk' is unknown; known are alpha, blocks"),
        ({"adapter.rank": "0"}, "adapter.rank .* above 0"),
        ({"adapter.name": '"my adapter"'}, "without dots, slashes or spaces"),
        ({"adapter.blocks": "[7]"}, "which has 6"),
        ({"adapter.blocks": '"half"'}, "give all, sixth or a list"),
        ({"adapter.init": "nowhere.safetensors"}, "adapter.init .* does not exist"),
        ({"adapter.still": "{ motion = 1.0 }"}, "carries none; train motion first"),
        ({"adapter.still": "1.0"}, "adapter.still is 1.0; it must be a table"),
        ({"data.stil": "1.0"}, "'stil' is unknown"),
        ({"data.kind": '"films"'}, "data.kind is 'films'"),
        ({"task.dropout": "1"}, "'dropout' is unknown"),
        ({"start": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_adapter_recipes_that_cannot_be_built_say_why(starter, tmp_path, changes, message):
    changes = {"adapter.name": '"other"', **changes}
    with pytest.raises(LayerLoomError, match=message):
        changes = {"start": str(starter), "folder": str(tmp_path / "run"), **changes}
        train_from_recipe(RECIPES / "starter_motion.toml", {**SMALL_ADAPTER, **changes})


# Parts of the base


@pytest.mark.parametrize(("trainable", "blocks"), [('"sixth"', {5}), ("[0, 2]", {0, 2})])
def test_a_part_of_the_blocks_is_trained(tmp_path, starter, trainable, blocks):
    recipe = tmp_path / "part.toml"
    recipe.write_text(
        f'stage = "layered"\nstart = "{starter}"\ntrainable = {trainable}\n'
        "[data]\nframes = 4\nsize = 32\nscenes = 4\n[task]\n"
        "[training]\nsteps = 2\nbatch = 2\nlearning_rate = 1e-2\nwarmup = 1\n"
    )
    final = _train(recipe, tmp_path / "run")
    before, after = load_file(starter), load_file(final)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {int(name.split(".")[2]) for name in changed} == blocks
    assert all(name.startswith("transformer.transformer_blocks.") for name in changed)


def _train(recipe: Path, folder: Path, **changes) -> Path:
    text = recipe.read_text()
    recipe.write_text(f'folder = "{folder}"\n{text}')
    return train_from_recipe(recipe, changes)


def test_blocks_that_are_not_there_are_named(tmp_path, starter):
    recipe = tmp_path / "part.toml"
    recipe.write_text(
        f'stage = "layered"\nstart = "{starter}"\ntrainable = [9]\n'
        "[data]\nframes = 4\nsize = 32\nscenes = 4\n[task]\n"
        "[training]\nsteps = 2\nbatch = 2\nlearning_rate = 1e-2\n"
    )
    with pytest.raises(LayerLoomError, match=r"trainable is \[9\], but .* 0 to 5"):
        _train(recipe, tmp_path / "run")


# Previews


def test_sheets_are_drawn_while_training(starter, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tmp_path / "seen.toml"
    recipe.write_text(
        (RECIPES / "starter_motion.toml").read_text()
        + '\n[preview]\nprompts = [["a red circle", "plain blue"]]\nevery = 2\nsteps = 2\n'
    )
    changes = {**SMALL_ADAPTER, "start": str(starter), "training.steps": "4"}
    plain = small_adapter("starter_motion", starter, tmp_path / "a", **{"training.steps": "4"})
    seen = train_from_recipe(recipe, {**changes, "folder": str(tmp_path / "b")})
    # Looking changes nothing.
    assert plain.read_bytes() == seen.read_bytes()
    events = EventAccumulator(str(tmp_path / "b" / "log"), size_guidance={"images": 0})
    events.Reload()
    names = ["preview 1, motion 0", "preview 1, motion 1"]
    assert sorted(events.Tags()["images"]) == names
    assert [e.step for e in events.Images(names[0])] == [2, 4]
    assert {"loss", "loss/still", "grad_norm"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("prompts = []", "must list pairs"),
        ('prompts = [["a red circle"]]', "must list pairs"),
        ('prompts = [["a", "b"]]\nevry = 2', "'evry' is unknown"),
        ('prompts = [["a", "b"]]\nevery = 0', "at least 1"),
        ("every = 2", "lacks prompts"),
    ],
)
def test_previews_that_cannot_be_drawn_say_why(starter, tmp_path, table, message):
    recipe = tmp_path / "seen.toml"
    text = (RECIPES / "starter_motion.toml").read_text()
    recipe.write_text(f"{text}\n[preview]\n{table}\n")
    changes = {**SMALL_ADAPTER, "start": str(starter), "folder": str(tmp_path / "run")}
    with pytest.raises(LayerLoomError, match=message):
        train_from_recipe(recipe, changes)


# The chain that makes the starter


def chain_changes() -> dict[str, str]:
    """Every stage of starter/layered.toml at tiny width."""
    changes = {}
    for name in load_recipe(STARTER)["stages"]:
        recipe = load_recipe(RECIPES / f"{name}.toml")
        small = {"autoencoder": SMALL_AUTOENCODER, "layered": SMALL_LAYERED, "lora": SMALL_ADAPTER}
        changes |= {f"{name}.{key}": value for key, value in small[recipe["stage"]].items()}
    return changes


def test_one_file_makes_the_starter_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()
    recipe = tmp_path / "starter" / "layered.toml"
    recipe.write_bytes(STARTER.read_bytes())
    said: list[str] = []
    changes = chain_changes()

    stopped = {"at": "starter_layered_polish"}

    def report(phase, done, total, numbers):
        if phase == "training" and stopped["at"] and stopped["at"] in said[-1] and done == 1:
            raise KeyboardInterrupt

    def note(text):
        if text.startswith("Stage "):
            said.append(text)

    with pytest.raises(KeyboardInterrupt):
        train_from_recipe(recipe, changes, progress=report, note=note)
    assert not (tmp_path / "starter" / "layered.safetensors").exists()
    stopped["at"] = ""
    said.clear()
    final = train_from_recipe(recipe, changes, progress=report, note=note)
    assert ["finished" in line for line in said] == [True] * 5 + [False] * 4
    assert final == tmp_path / "starter" / "layered.safetensors"
    made = open_checkpoint(final)
    assert set(made.info.adapters) == {"motion", "content"}
    assert made.adapter_scales == {"motion": 0.0, "content": 1.0}
    assert made.info.transformer["patch_size"] == 1
    assert set(made.info.parts) == {"transformer", "vae", "text_encoder"}
    made.check()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ('stages = ["nowhere"]', {}, "nowhere is neither a file nor a shipped one"),
        ("stages = []", {}, "must list the names"),
        ('stages = ["starter_motion"]\nexprt = "a"', {}, "'exprt' is unknown"),
        ('stages = ["starter_motion"]', {"training.steps": "1"}, "names no stage"),
        ('stages = ["starter_motion"]', {"starter_motion.fodler": "a"}, "fodler is not in"),
    ],
)
def test_chains_that_cannot_run_say_why(tmp_path, text, overrides, message):
    recipe = tmp_path / "chain.toml"
    recipe.write_text(text)
    with pytest.raises(LayerLoomError, match=message):
        train_from_recipe(recipe, overrides)


def test_the_shipped_recipes_hand_over_to_each_other():
    recipes = {
        name: load_recipe(RECIPES / f"{name}.toml") for name in load_recipe(STARTER)["stages"]
    }
    made = set()
    for name, recipe in recipes.items():
        for key in ("start", "autoencoder"):
            if isinstance(recipe.get(key), str):
                assert recipe[key] in made, (name, key)
        made.add(f"{recipe['folder']}/final.safetensors")
    assert json.dumps(recipes["starter_content"]["adapter"]["still"]) == '{"motion": 1.0}'
