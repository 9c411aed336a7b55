"""Many processes, many passes a step, kills, full disks: the training they must not change."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_training import (
    EXACT,
    RECIPES,
    SMALL_LAYERED,
    small_autoencoder,
)
from test_trainer import ToyStage, equal, only, settings, tiny_stage, weights

from layerloom.engine.errors import LayerLoomError
from layerloom.engine.training.distributed import find_processes
from layerloom.engine.training.layered import LayeredTask
from layerloom.engine.training.recipe import train_from_recipe
from layerloom.engine.training.shares import Shares
from layerloom.engine.training.trainer import Trainer

WORKER = Path(__file__).parent / "train_worker.py"
RECIPE = RECIPES / "starter_layered.toml"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return small_autoencoder(tmp_path_factory.mktemp("autoencoder"))


def command(folder: Path, losses: Path, changes: dict[str, str]) -> list[str]:
    words = [str(WORKER), str(RECIPE), str(folder), str(losses)]
    return [*words, *(f"{key}={value}" for key, value in changes.items())]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def several(count: int, *arguments) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(count), *command(*arguments)]
    done = subprocess.run(launch, capture_output=True, text=True, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def curve(losses: Path) -> list[float]:
    lines = losses.read_text(encoding="utf-8").split("\n")[:-1]
    steps = [int(line.split()[0]) for line in lines]
    assert steps == list(range(1, len(steps) + 1))
    return [float(line.split()[1]) for line in lines]


def alone(folder: Path, losses: Path, changes: dict[str, str]) -> None:
    """The same run in this process."""

    def report(phase, done, total, numbers):
        if phase == "training":
            with losses.open("a", encoding="utf-8") as file:
                file.write(f"{done} {numbers['loss']!r}\n")

    train_from_recipe(RECIPE, {**changes, "folder": str(folder)}, False, report)


def changes_of(autoencoder: Path, **more) -> dict[str, str]:
    return {
        **SMALL_LAYERED,
        **EXACT,
        "autoencoder": str(autoencoder),
        "training.steps": "20",
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def apart(a: Path, b: Path) -> float:
    """The largest difference between two runs' last weights and averages."""
    states = [torch.load(f / "state.pt", weights_only=True) for f in (a, b)]
    return max(
        float((states[0][part][name] - states[1][part][name]).abs().max())
        for part in ("network", "average")
        for name in states[0][part]
    )


# Many processes and passes


def test_two_processes_equal_one_with_twice_the_batch(tmp_path, autoencoder):
    changes = changes_of(autoencoder)
    alone(tmp_path / "one", tmp_path / "one.txt", {**changes, "training.batch": "4"})
    several(2, tmp_path / "two", tmp_path / "two.txt", {**changes, "training.batch": "2"})
    one, two = curve(tmp_path / "one.txt"), curve(tmp_path / "two.txt")
    assert len(one) == len(two) == 20
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-4
    # The checkpoint is written once, by the first.
    assert (tmp_path / "two" / "final.safetensors").exists()


UNEVEN = """
import sys
from pathlib import Path
from layerloom.engine.training.distributed import find_processes, leave_together
from layerloom.engine.training.settings import TrainingSettings

processes = find_processes(TrainingSettings(**{settings}))
rank = processes.rank
numbers = {{"loss": float(rank), **({{"loss/noisiest": 5.0}} if rank else {{}})}}
Path(sys.argv[1], str(rank)).write_text(repr(sorted(processes.means(numbers).items())))
leave_together()
"""


def test_a_number_that_one_process_lacks_is_the_others_mean(tmp_path):
    worker = tmp_path / "worker.py"
    needed = {"steps": 1, "batch": 1, "learning_rate": 1.0}
    worker.write_text(UNEVEN.format(settings=needed), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in ("0", "1"):
        said = (tmp_path / rank).read_text(encoding="utf-8")
        assert said == "[('loss', 0.5), ('loss/noisiest', 5.0)]"


@pytest.mark.slow
def test_split_weights_train_the_same_and_resume(tmp_path, autoencoder):
    changes = changes_of(autoencoder)
    alone(tmp_path / "one", tmp_path / "one.txt", {**changes, "training.batch": "4"})
    split = {
        **changes,
        "training.parallel": "fsdp",
        "training.batch": "1",
        "training.accumulate": "2",
        "training.keep": "2",
    }
    folder = tmp_path / "split"
    # Stopped half way: the cosine is over all steps, so the first part is a run cut short.
    first = {**split, "training.checkpoint_every": "10", "training.decay_from": "1.0"}
    several(2, folder, tmp_path / "split.txt", {**first, "training.steps": "10"})
    assert [path.name for path in folder.glob("state-*")] == ["state-00000010"]
    (folder / "final.safetensors").unlink()
    several(2, folder, tmp_path / "split.txt", {**first, "resume": "true"})
    one, two = curve(tmp_path / "one.txt"), curve(tmp_path / "split.txt")
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert sorted(p.name for p in folder.glob("state-*")) == ["state-00000010", "state-00000020"]
    from safetensors.torch import load_file

    found = [load_file(f / "final.safetensors") for f in (tmp_path / "one", folder)]
    for name, tensor in found[0].items():
        # Half precision keeps three digits.
        assert torch.allclose(tensor.float(), found[1][name].float(), atol=1e-3), name


def toy_trainer(folder: Path, stage=None, **changes) -> Trainer:
    return Trainer(stage or ToyStage(), settings(**changes), folder)


def test_many_passes_a_step_equal_one_large_batch(tmp_path):
    large = tiny_stage(LayeredTask(), batch=6)
    small = tiny_stage(LayeredTask(), batch=2)
    plain = {"learning_rate": 1e-2, "steps": 4}
    one = Trainer(large, settings(batch=6, **plain), tmp_path / "one")
    three = Trainer(small, settings(batch=2, accumulate=3, **plain), tmp_path / "three")
    for _ in range(4):
        a, b = one.train_step(), three.train_step()
        # Sums in another order, in float32.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(three)[name], atol=1e-5), name


def test_shares_of_a_draw_are_parts_of_the_whole():
    stage = tiny_stage(LayeredTask(), batch=2)
    whole = tiny_stage(LayeredTask(), batch=6).draw(torch.Generator().manual_seed(3))[0]
    for rank in range(3):
        (part,) = stage.draw(torch.Generator().manual_seed(3), Shares((rank,), 3))
        rows = slice(2 * rank, 2 * rank + 2)
        assert part.task == whole.task
        assert torch.equal(part.noise, whole.noise[rows])
        assert torch.equal(part.samples.latents, whole.samples.latents[rows])
        assert part.samples.text == whole.samples.text[rows]
        assert torch.equal(part.timestep, whole.timestep[rows])


@pytest.mark.parametrize("name", ["gradient_checkpointing", "offload"])
def test_saving_memory_changes_no_weight(tmp_path, name):
    plain = Trainer(tiny_stage(only("generate")), settings(), tmp_path / "a")
    saving = Trainer(tiny_stage(only("generate")), settings(**{name: True}), tmp_path / "b")
    for _ in range(3):
        plain.backward(), saving.backward()
        pairs = zip(plain.optimizers.parameters, saving.optimizers.parameters, strict=True)
        assert all(a.grad is b.grad is None or torch.equal(a.grad, b.grad) for a, b in pairs)
        plain.train_step(), saving.train_step()
    assert equal(weights(plain), weights(saving))
    assert equal(plain.average, saving.average)


def test_an_offloaded_run_resumes(tmp_path):
    straight = toy_trainer(tmp_path / "straight")
    straight.run()
    first = toy_trainer(tmp_path / "run", offload=True)
    (tmp_path / "run").mkdir()
    for _ in range(3):
        first.train_step()
    first.save()
    again = toy_trainer(tmp_path / "run", ToyStage(seed=5), offload=True)
    assert again.resume() and again.step == 3
    again.run()
    assert equal(weights(again), weights(straight)) and equal(again.average, straight.average)


def test_settings_that_exclude_each_other_are_named(monkeypatch):
    with pytest.raises(LayerLoomError, match="frozen = 'bf16' .*precision = 'bf16'"):
        settings(frozen="bf16")
    with pytest.raises(LayerLoomError, match="muon.*fsdp"):
        settings(optimizer="muon", parallel="fsdp")
    with pytest.raises(LayerLoomError, match="offload.*fsdp"):
        settings(offload=True, parallel="fsdp")
    with pytest.raises(LayerLoomError, match="accelerate launch or torchrun"):
        find_processes(settings(parallel="fsdp"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LayerLoomError, match="offload = true is for one process"):
        find_processes(settings(offload=True))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(LayerLoomError, match=r"pip install 'layerloom\[train\]'"):
        find_processes(settings())


# Kills and full disks


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, autoencoder):
    changes = changes_of(autoencoder, training__steps="300", training__checkpoint_every="7")
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path / "killed", tmp_path / "killed.txt", changes)],
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    moment, deadline = random.Random().uniform(10, 150), time.monotonic() + 200
    losses = tmp_path / "killed.txt"
    while not losses.exists() or len(losses.read_bytes().split(b"\n")) < moment:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    saved = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"]
    assert 0 < saved < 300 and saved % 7 == 0

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = {**changes, "folder": str(tmp_path / "killed")}
        train_from_recipe(RECIPE, again, resume=True)
        alone(tmp_path / "straight", tmp_path / "straight.txt", changes)
    finally:
        torch.set_num_threads(threads)
    assert apart(tmp_path / "killed", tmp_path / "straight") == 0.0
    names = ("final.safetensors",)
    for name in names:
        ends = [(tmp_path / run / name).read_bytes() for run in ("killed", "straight")]
        assert ends[0] == ends[1]


def test_a_disk_that_is_really_full_keeps_the_last_state(tmp_path):
    trainer = toy_trainer(tmp_path, checkpoint_every=2)
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    kept = trainer.state_file.read_bytes()
    trainer.train_step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, limits[1]))
    try:
        with pytest.raises(LayerLoomError, match=r"Could not write .*state\.pt .*free some space"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trainer.state_file.read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    again = toy_trainer(tmp_path, ToyStage(seed=3))
    assert again.resume() and again.step == 2


class BadSample(ToyStage):
    """Toys whose sample of one step is broken."""

    def __init__(self, at: int, error: Exception):
        super().__init__()
        self.at, self.error, self.drawn = at, error, 0

    def draw(self, generator, shares):
        self.drawn += 1
        if self.drawn == self.at + 1:
            raise self.error
        return super().draw(generator, shares)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("frame_003.png is truncated"), r"step 3 .*frame_003\.png is truncated.*resume"),
        (LayerLoomError("clips/dog is damaged; make it again."), "clips/dog is damaged"),
    ],
)
def test_a_bad_sample_stops_with_a_sentence_and_a_whole_state(tmp_path, error, message):
    straight = toy_trainer(tmp_path / "straight")
    straight.run()
    with pytest.raises(LayerLoomError, match=message):
        toy_trainer(tmp_path / "run", BadSample(3, error)).run()
    again = toy_trainer(tmp_path / "run")
    assert again.resume() and again.step == 3
    again.run()
    assert equal(weights(again), weights(straight))


def test_a_stop_within_an_update_is_not_saved(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, checkpoint_every=2)

    def stop():
        if trainer.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_follow", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    again = toy_trainer(tmp_path)
    assert again.resume() and again.step == 2


def test_the_last_states_are_kept(tmp_path):
    trainer = toy_trainer(tmp_path, keep=3, checkpoint_every=1)
    trainer.run()
    names = sorted(path.name for path in tmp_path.glob("state*"))
    assert names == ["state-00000004.pt", "state-00000005.pt", "state.pt"]
    steps = [torch.load(tmp_path / name, weights_only=True)["step"] for name in names]
    assert steps == [4, 5, 6]
    # An earlier state is gone back to by its name.
    (tmp_path / "state-00000004.pt").replace(tmp_path / "state.pt")
    again = toy_trainer(tmp_path)
    assert again.resume() and again.step == 4


def test_states_of_earlier_versions_are_read(tmp_path):
    """What 0.1.0 wrote: no digest of frozen weights, the same four entries."""
    trainer = toy_trainer(tmp_path)
    for _ in range(3):
        trainer.train_step()
    written = {
        "step": 3,
        "network": trainer.network.state_dict(),
        "average": trainer.average,
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers.each],
    }
    torch.save(written, tmp_path / "state.pt")
    assert trainer.state().keys() == written.keys()
    again = toy_trainer(tmp_path, ToyStage(seed=4))
    assert again.resume() and again.step == 3
    assert equal(weights(again), weights(trainer)) and equal(again.average, trainer.average)
