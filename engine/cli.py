"""The `layerloom` command: layered video, checkpoints, training and scores without ComfyUI."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from .errors import LayerLoomError

try:
    import typer
except ModuleNotFoundError as missing:
    sys.stderr.write(
        "layerloom: the command needs more packages; pip install 'layerloom[standalone]'.\n"
    )
    raise SystemExit(2) from missing

from .animate_cli import animate
from .bench_cli import bench_app
from .click_cli import click
from .console import (
    CheckpointOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    progress_bar,
    require,
    say,
)
from .data_cli import data_app
from .eval_cli import eval_app
from .segment_cli import segment
from .trajectory_cli import InOrder, trajectory

# Plain help and no rich at start-up: `layerloom --help` answers at once.
app = typer.Typer(
    name="layerloom",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Layered video from one command: transparent foreground, background, blended scene.",
)
app.command("animate")(animate)
app.command("click")(click)
app.command("segment")(segment)
app.command("trajectory", cls=InOrder)(trajectory)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")

_INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from .versions import package_version

        typer.echo(f"layerloom {package_version('layerloom')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("layered")
def layered(
    foreground: Annotated[str, typer.Option(help="What the foreground shows.")],
    background: Annotated[str, typer.Option(help="What the background shows.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")],
    blended: Annotated[str | None, typer.Option(help="The whole scene in words.")] = None,
    given_foreground: Annotated[
        Path | None, typer.Option(metavar="CLIP", help="Keep this foreground.")
    ] = None,
    given_alpha: Annotated[
        Path | None,
        typer.Option(metavar="CLIP", help="Its matte, white = opaque; default: its own alpha."),
    ] = None,
    given_background: Annotated[
        Path | None, typer.Option(metavar="CLIP", help="Keep this background.")
    ] = None,
    decompose: Annotated[
        Path | None, typer.Option(metavar="CLIP", help="Take this clip apart into layers.")
    ] = None,
    checkpoint: CheckpointOption = None,
    vae: Annotated[
        Path | None, typer.Option(help="VAE file or folder, for published weights.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="Text encoder folder, for published weights.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    guidance_mode: Annotated[
        str | None, typer.Option(help="constant, dynamic or dynamic-released.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="dpmpp-2m-sde, ddim or released.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same layers.")] = 0,
    frames: Annotated[int | None, typer.Option(help="Frames a layer.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the checkpoint's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the checkpoint's.")] = None,
    motion_lora: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="Strength of the motion adapter, -1 to 2: 1 stands still, 0 is off."
        ),
    ] = None,
    content_lora: Annotated[
        float | None,
        typer.Option(metavar="S", help="Strength of the content adapter, -1 to 2: 0 is off."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE:S", help="Add an adapter file at strength S, -10 to 10. Repeatable."
        ),
    ] = None,
    reuse_given: Annotated[
        bool,
        typer.Option(
            "--reuse-given",
            help="Compute given layers at some steps alone: faster, and not quite the same.",
        ),
    ] = False,
    reuse_refresh: Annotated[
        int | None,
        typer.Option(help="Steps after which given layers are computed anew; 0 is never."),
    ] = None,
    reuse_memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Most memory to keep given layers in; default: 8."),
    ] = None,
    arrays: Annotated[bool, typer.Option("--arrays", help="Also write layers.npz.")] = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Make the layers of a video, or take a video apart into layers.

    Clips: any video, a folder of PNGs, or an animated GIF, PNG or WebP.
    """
    from .adapter_options import AdapterOptions
    from .layered_job import LayeredJob

    job = LayeredJob(
        foreground=foreground,
        background=background,
        out=out,
        blended=blended,
        given_foreground=given_foreground,
        given_alpha=given_alpha,
        given_background=given_background,
        decompose=decompose,
        checkpoint=checkpoint,
        vae=vae,
        text_encoder=text_encoder,
        steps=steps,
        guidance=guidance,
        guidance_mode=guidance_mode,
        sampler=sampler,
        seed=seed,
        frames=frames,
        width=width,
        height=height,
        adapters=AdapterOptions(motion_lora, content_lora, tuple(lora or ())),
        reuse_given=reuse_given,
        reuse_refresh=reuse_refresh,
        reuse_memory=reuse_memory,
        arrays=arrays,
        device=device,
    )
    job.check()
    with progress_bar("Loading", quiet) as advance:
        report = job.run(
            note=lambda text: None if quiet else say(text),
            progress=lambda done, total: advance(done, total, "Denoising"),
        )
    typer.echo(report.summary())


@app.command("info")
def info(
    file: Annotated[Path, typer.Argument(help="Checkpoint file or folder, or adapter file.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint or adapter (LoRA) is: family, variant, sizes, adapters."""
    require(file, "checkpoint")
    from dataclasses import asdict

    from .checkpoints.lora import inspect_file

    found = asdict(inspect_file(file))
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(file), title_justify="left", show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), _cell(name, value))
    Console().print(table)


@app.command("convert")
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A published checkpoint, or an adapter.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Write this adapter of a checkpoint, and it alone."),
    ] = None,
    naming: Annotated[
        str, typer.Option(help="Names in an adapter file: host (ComfyUI) or diffusers.")
    ] = "host",
    dtype: Annotated[
        str | None,
        typer.Option(help="Store weights as fp32, fp16, bf16 or fp8; default: as they are."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Which DynamiCrafter it is, where weights look alike: 512, 1024, ..."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Stable Diffusion 1.5, for motion modules alone: both become one file."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Turn a published checkpoint, or an adapter (LoRA), into one .safetensors."""
    require(source, "checkpoint")
    if target.suffix != ".safetensors":
        raise LayerLoomError(f"{target} must end in .safetensors; choose such a name.")
    if target.is_dir():
        raise LayerLoomError(f"{target} is a folder; give the name of a file.")
    if target.exists() and target.samefile(source):
        raise LayerLoomError(f"{target} is the file to convert; choose another name.")
    if target.exists() and not force:
        raise LayerLoomError(f"{target} exists; choose another name or add --force.")
    from .checkpoints.convert import convert_adapter, convert_checkpoint, element_type
    from .checkpoints.lora import is_adapter_file

    stored_as = element_type(dtype)
    if base is not None:
        require(base, "base")
    if adapter is not None or is_adapter_file(source):
        made = convert_adapter(source, target, adapter, naming)
        typer.echo(f"Wrote {target} (adapter {made.name}, {len(made.targets)} modules).")
        return
    with progress_bar("Converting", quiet, in_bytes=True) as advance:
        convert_checkpoint(source, target, advance, dtype=stored_as, variant=variant, base=base)
    typer.echo(f"Wrote {target} ({target.stat().st_size / 2**20:.1f} MiB).")


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of golden cases.")],
) -> None:
    """Compare with golden numbers of the official code.

    Exits with 1 if any case is off.
    """
    if not folder.is_dir():
        raise LayerLoomError(f"{folder} is not a folder; give the folder of the golden cases.")
    from .checkpoints.golden import run_cases

    results = run_cases(folder)
    if all(result.passed is None for result in results):
        raise LayerLoomError(f"{folder} has no golden case that is known; give another folder.")
    width = max(len(result.case) for result in results)
    typer.echo(f"{'case':<{width}}  {'max error':>10}  {'tolerance':>10}  verdict")
    for result in results:
        error, tolerance = (
            "-" if number is None else f"{number:.2e}"
            for number in (result.max_error, result.tolerance)
        )
        verdict = {True: "pass ", False: "FAIL ", None: ""}[result.passed] + result.note
        typer.echo(f"{result.case:<{width}}  {error:>10}  {tolerance:>10}  {verdict.rstrip()}")
    verdicts = [result.passed for result in results]
    passed, failed = verdicts.count(True), verdicts.count(False)
    typer.echo(f"{passed} passed, {failed} failed, {verdicts.count(None)} skipped")
    if failed:
        raise typer.Exit(1)


@app.command("train")
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Replace recipe entries.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the estimate only.")
    ] = False,
) -> None:
    """Train by a recipe, or by a file that lists several."""
    path = _recipe_path(recipe)
    pairs = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise LayerLoomError(f"{item!r} is not of the form key=value; write steps=100, say.")
        pairs[key.strip()] = value.strip()
    from .training.distributed import leave_together
    from .training.recipe import train_from_recipe

    if dry_run:
        train_from_recipe(path, pairs, resume, None, typer.echo, True)
        return
    # Of several processes the first one talks.
    quiet = os.environ.get("RANK", "0") != "0"
    with progress_bar("Training", quiet) as advance:

        def report(phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
            loss = f", loss {numbers['loss']:.4f}" if "loss" in numbers else ""
            advance(done, total, title=phase.capitalize() + loss)

        def note(text: str) -> None:
            if not quiet:
                say(text)

        checkpoint = train_from_recipe(path, pairs, resume, report, note)
    if not quiet:
        typer.echo(f"Wrote {checkpoint}")
    leave_together()


@app.command("submit")
def submit(
    workflow: Annotated[
        Path, typer.Argument(metavar="WORKFLOW_API.json", help="Exported with Export (API).")
    ],
    server: Annotated[str, typer.Option(metavar="URL", help="Address of a running ComfyUI.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NODE.INPUT=VALUE",
            help="Change an input; NODE is an id, a title or a class. Repeatable.",
        ),
    ] = None,
    uploads: Annotated[
        list[str] | None,
        typer.Option(
            "--upload", metavar="NODE.INPUT=FILE", help="Send a file for an input. Repeatable."
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Give up and cancel after so long.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Run a workflow on a ComfyUI and fetch its results.

    Ctrl-C stops the prompt it queued and no other.
    """
    from .submit import prepare

    submission = prepare(workflow, server, out, settings or (), uploads or (), timeout)
    from rich.markup import escape

    with progress_bar("Connecting", quiet) as advance:
        report = submission.run(
            note=lambda text: None if quiet else say(text),
            progress=lambda done, total, title: advance(done, total, escape(title)),
        )
    typer.echo(report.summary())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0, 1 (a verdict), 2 (what the user gave), 130 (interrupted)."""
    if not sys.warnoptions:
        # Libraries warn their developers; a person is told things in our sentences.
        warnings.simplefilter("ignore")
    # A polite stop cleans up as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # typer brings its own click in later versions and uses click's before: both derive so.
    usage_error = typer.BadParameter.__base__
    try:
        code = app(args=arguments, prog_name="layerloom", standalone_mode=False)
    except LayerLoomError as error:
        _fail(str(error))
    except usage_error as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "layerloom"
        _fail(f"{error.format_message().rstrip('.')}; see {where} --help.")
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code == _INTERRUPTED:
        say("layerloom: interrupted")
    raise SystemExit(code or 0)


def _fail(message: str) -> NoReturn:
    say(f"layerloom: {message}")
    raise SystemExit(2)


def _recipe_path(recipe: str) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = Path(__file__).parent / "training" / "recipes"
    names = sorted(entry.stem for entry in shipped.glob("*.toml"))
    if recipe in names:
        return shipped / f"{recipe}.toml"
    known = ", ".join(names) or "none"
    raise LayerLoomError(
        f"The recipe {recipe} is neither a file nor a shipped one; shipped are: {known}."
    )


def _cell(name: str, value: Any) -> str:
    if value in (None, "", {}, [], ()):
        return "-"
    if name == "parameters":
        return f"{value / 1e6:,.2f} million"
    if name == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {entry}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(entry) for entry in value)
    return str(value)


if __name__ == "__main__":
    main()
