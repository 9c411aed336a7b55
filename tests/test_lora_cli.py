"""Adapters from the command line: what they change, what is recorded, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapter_files import random_lora, starter_with_adapters

from layerloom.engine import cli
from layerloom.engine.checkpoints.lora import read_lora, save_lora

WORDS = ("--foreground", "a red circle moving right", "--background", "green stripes")


def run(*arguments) -> int:
    """Exit code of the command with these arguments."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    starter_with_adapters(folder / "carried.safetensors")
    starter_with_adapters(folder / "bare.safetensors", {})
    style = random_lora("style", 2, 3.0, 0.02)
    save_lora(folder / "style.safetensors", style, "host")
    wide = {module: (torch.zeros(2, 5), b) for module, (_, b) in style.weights.items()}
    save_lora(folder / "wide.safetensors", replace(style, name="wide", weights=wide))
    return folder


@pytest.fixture
def layered(files, tmp_path, capsys):
    """Runs `layerloom layered` on a checkpoint; the layers and the record."""
    count = 0

    def make(*options, checkpoint="carried"):
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        given = ("--checkpoint", files / f"{checkpoint}.safetensors", "--out", out, *options)
        code = run("layered", *WORDS, *given, "--steps", 2, "--arrays", "--quiet")
        assert code == 0, capsys.readouterr().err
        layers = dict(np.load(out / "layers.npz"))
        return layers, json.loads((out / "run.json").read_text())

    return make


def distance(first, second) -> float:
    return float(np.square(first["blended"].astype(float) - second["blended"]).mean())


def test_strengths_change_the_layers_and_are_recorded(files, layered):
    style = files / "style.safetensors"
    default, record = layered()
    assert record["settings"]["adapters"] == {"motion": 0.0, "content": 1.0}
    assert record["loras"] == record["settings"]["loras"] == []
    said, _ = layered("--motion-lora", 0, "--content-lora", 1)
    assert all(np.array_equal(default[layer], said[layer]) for layer in default)

    off, record = layered("--content-lora", 0)
    assert record["settings"]["adapters"] == {"motion": 0.0, "content": 0.0}
    bare, _ = layered(checkpoint="bare")
    assert all(np.array_equal(off[layer], bare[layer]) for layer in bare)
    assert distance(off, default) > 1

    more, record = layered("--motion-lora", -0.5, "--lora", f"{style}:0.5", "--lora", style)
    assert record["settings"]["adapters"] == {"motion": -0.5, "content": 1.0}
    assert record["loras"] == [
        {"file": str(style), "strength": 0.5},
        {"file": str(style), "strength": 1.0},
    ]
    assert [entry["name"] for entry in record["settings"]["loras"]] == ["style", "style"]
    assert distance(more, default) > 1
    # Given twice is given at the sum.
    summed, _ = layered("--motion-lora", -0.5, "--lora", f"{style}:1.5")
    assert distance(more, summed) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--motion-lora", 3), "--motion-lora is 3; give a number from -1 to 2."),
        (("--content-lora", "nan"), "--content-lora is nan; give a number from -1 to 2."),
        (("--motion-lora", "much"), "Invalid value for '--motion-lora'"),
        (("--lora", "{style}:much"), "ends in 'much', which is no number; write FILE:STRENGTH"),
        (("--lora", "{style}:11"), "style.safetensors:11 is 11; give a number from -10 to 10."),
        (("--lora", "{style}:inf"), "give a number from -10 to 10."),
        (("--lora", "absent.safetensors:1"), "--lora absent.safetensors does not exist"),
        (("--lora", "C:\\loras\\absent.safetensors"), "absent.safetensors does not exist"),
        (("--lora", ":1"), "does not exist"),
        (("--lora", "{wide}:1"), "The adapter wide does not fit carried.safetensors: transformer"),
        (("--lora", "{bare}:1"), "bare.safetensors is a checkpoint without adapters"),
        (("--lora", "{carried}:1"), "several adapters (motion, content)"),
        (("--lora", "{words}:1"), "words.txt is not a checkpoint"),
        (("--checkpoint", "{style}"), "style.safetensors is an adapter (LoRA) and no checkpoint"),
        (
            ("--checkpoint", "{bare}", "--motion-lora", 1),
            "bare.safetensors has no adapter 'motion'; its adapters: none.",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(files, tmp_path, capsys, options, message):
    (files / "words.txt").write_text("only words in here")
    names = {path.stem: path for path in files.iterdir()}
    given = ["--checkpoint", files / "carried.safetensors"]
    given += [str(option).format(**names) for option in options]
    assert run("layered", *WORDS, *given, "--out", tmp_path / "out", "--quiet") == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.startswith("layerloom: ") and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_info_says_what_an_adapter_is(files, capsys):
    assert run("info", files / "style.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["name"], found["rank"]) == ("adapter", "style", 2)
    assert (found["alpha"], found["scale"]) == (3.0, 1.5)
    assert found["kinds"] == ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
    assert found["modules"] == 4 * len(found["blocks"])
    assert found["dtype"] == "float32"
    assert run("info", files / "style.safetensors") == 0
    shown = capsys.readouterr().out
    assert "adapter" in shown and "attn1.to_q" in shown
    assert run("info", files / "carried.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == {"motion": 4, "content": 8}


@pytest.mark.parametrize("naming", ["host", "diffusers"])
def test_adapters_are_converted_and_taken_out_of_checkpoints(files, tmp_path, capsys, naming):
    out = tmp_path / "out.safetensors"
    assert run("convert", files / "style.safetensors", out, "--naming", naming) == 0
    assert "adapter style" in capsys.readouterr().out
    first, again = read_lora(files / "style.safetensors"), read_lora(out)
    for module in first.targets:
        assert torch.allclose(first.delta(module), again.delta(module), rtol=1e-6, atol=1e-7)
    carried = files / "carried.safetensors"
    assert run("convert", carried, out, "--adapter", "motion", "--naming", naming) == 2
    assert "--force" in capsys.readouterr().err
    assert run("convert", carried, out, "--adapter", "motion", "--naming", naming, "--force") == 0
    capsys.readouterr()
    assert read_lora(out).name == "motion"
    for options, message in (
        (("--adapter", "style"), "no adapter 'style'; it holds motion, content"),
        (("--adapter", "motion", "--naming", "kohya"), "'kohya'; give one of diffusers, host"),
    ):
        assert run("convert", carried, tmp_path / "other.safetensors", *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()
