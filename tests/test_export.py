"""Exported layers open in other programs and come back as they were; failures leave no trace."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from layerloom.engine import export, media
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.export import FORMATS, check_layers, encode_webp, export_layers
from layerloom.engine.media import read_clip
from layerloom.engine.sprite_sheets import sprite_sheets

METADATA = {"prompt": json.dumps({"1": {"text": "a \u00e9 \u96ea"}}), "workflow": '{"nodes": []}'}
needs_ffprobe = pytest.mark.skipif(not shutil.which("ffprobe"), reason="needs ffprobe")


def scene(frames: int = 6, height: int = 64, width: int = 48) -> dict[str, np.ndarray]:
    """Smooth colours (what 4:2:0 keeps) and a matte with soft, hard and still parts."""
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [127 + 110 * np.sin((x + f) / 17 + c) * np.cos(y / 23 - c) for c in range(3)]
    colours = np.stack(waves, axis=-1).round().astype(np.uint8)
    distance = np.hypot(x - width * 0.3 - 2 * f, y - height / 2)
    alpha = (255 * np.clip(height / 4 - distance + 0.5, 0, 1)).round().astype(np.uint8)
    alpha[:, :8] = np.linspace(0, 255, width).round().astype(np.uint8)
    return {
        "foreground": colours,
        "alpha": alpha,
        "background": colours[:, ::-1],
        "blended": np.repeat(colours[:1], frames, axis=0),
    }


def saved(folder: Path, kind: str, layers: dict[str, np.ndarray], fps: float = 8.0, **options):
    files = export_layers(folder, "clip_00001", layers, kind, fps, **options)
    return {name: paths[0].parent if kind == "png" else paths[0] for name, paths in files.items()}


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def probe(path: Path) -> dict:
    command = ["ffprobe", "-v", "error", "-show_streams", "-of", "json", str(path)]
    answer = subprocess.run(command, capture_output=True, check=True, text=True)
    return json.loads(answer.stdout)


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_come_back_as_they_were(tmp_path, kind):
    layers = scene()
    files = saved(tmp_path, kind, layers)
    assert list(files) == list(layers)
    back = {name: read_clip(path) for name, path in files.items()}
    # Lossless formats exactly; 4:2:0 costs the colours a little, and the way through limited
    # range or 10 bits costs alpha one level of the two that are allowed.
    lossless = kind in ("png", "webp")
    for name in ("foreground", "background", "blended"):
        assert back[name].frames.shape == layers[name].shape
        assert difference(back[name].frames, layers[name]) <= (0 if lossless else 6)
    assert difference(back["foreground"].alpha, layers["alpha"]) <= (0 if lossless else 2)
    assert difference(back["alpha"].frames[..., 0], layers["alpha"]) <= (0 if lossless else 6)
    assert back["background"].alpha is None
    if kind != "png":  # a folder of pictures has no speed
        assert back["blended"].fps == pytest.approx(8)


@pytest.mark.parametrize("kind", ["webm", "mov"])
def test_alpha_of_noise_survives_within_two_levels(tmp_path, kind):
    alpha = np.random.default_rng(0).integers(0, 256, (3, 33, 47), dtype=np.uint8)
    layers = {"foreground": scene(3, 33, 47)["foreground"], "alpha": alpha}
    back = read_clip(saved(tmp_path, kind, layers)["foreground"])
    assert difference(back.alpha, alpha) <= 2


@needs_ffprobe
def test_ffprobe_finds_an_alpha_plane(tmp_path):
    layers = scene()
    mov = probe(saved(tmp_path, "mov", layers)["foreground"])["streams"][0]
    assert (mov["codec_name"], mov["profile"], mov["codec_tag_string"]) == (
        "prores",
        "4444",
        "ap4h",
    )
    assert mov["pix_fmt"].startswith("yuva444p")
    assert (mov["nb_frames"], mov["r_frame_rate"]) == ("6", "8/1")
    # ffprobe's own VP9 decoder leaves the plane out, but the file says that there is one.
    webm = probe(saved(tmp_path, "webm", layers)["foreground"])["streams"][0]
    assert (webm["codec_name"], webm["color_space"]) == ("vp9", "bt709")
    assert webm["tags"]["alpha_mode"] == "1"


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
@pytest.mark.parametrize(("kind", "decoder"), [("mov", []), ("webm", ["-c:v", "libvpx-vp9"])])
def test_another_program_reads_the_same_alpha(tmp_path, kind, decoder):
    layers = scene()
    path = saved(tmp_path, kind, layers)["foreground"]
    command = ["ffmpeg", "-v", "error", *decoder, "-i", str(path), "-vf", "alphaextract"]
    raw = subprocess.run(
        [*command, "-pix_fmt", "gray", "-f", "rawvideo", "-"], capture_output=True, check=True
    )
    alpha = np.frombuffer(raw.stdout, np.uint8).reshape(layers["alpha"].shape)
    assert difference(alpha, layers["alpha"]) <= 2


def test_videos_carry_the_workflow(tmp_path):
    for kind in ("webm", "mov"):
        path = saved(tmp_path, kind, scene(2), metadata=METADATA)["foreground"]
        with av.open(str(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
        assert METADATA.items() <= tags.items()


def test_pictures_carry_the_workflow_where_comfyui_looks_for_it(tmp_path):
    folder = saved(tmp_path, "png", scene(2), metadata=METADATA)["background"]
    for picture in folder.iterdir():
        assert METADATA.items() <= Image.open(picture).text.items()
    with Image.open(saved(tmp_path, "webp", scene(2), metadata=METADATA)["foreground"]) as image:
        exif = image.getexif()
    # As the core's own save nodes: 0x0110 holds the prompt, 0x010F the workflow.
    assert exif[0x0110] == f"prompt:{METADATA['prompt']}"
    assert exif[0x010F] == f"workflow:{METADATA['workflow']}"


def test_files_are_named_after_layer_and_frame(tmp_path):
    layers = {"foreground": scene(2)["foreground"], "alpha": scene(2)["alpha"]}
    files = export_layers(tmp_path, "clip_00007", layers, "png", 8)
    names = [path.relative_to(tmp_path).as_posix() for path in files["alpha"]]
    assert names == [f"clip_00007_alpha/clip_00007_alpha_000{n}.png" for n in (1, 2)]
    export_layers(tmp_path, "clip_00008", layers, "mov", 8)
    assert (tmp_path / "clip_00008_foreground.mov").is_file()
    assert (tmp_path / "clip_00008_alpha.mov").is_file()


def test_a_still_layer_keeps_its_length_as_webp(tmp_path):
    still = np.zeros((5, 8, 8, 3), np.uint8)
    path = tmp_path / "still.webp"
    path.write_bytes(encode_webp(still, 24))
    with Image.open(path) as image:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
    assert len(durations) == 5
    assert sum(durations) == round(5000 / 24)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cancelled_export_leaves_nothing(tmp_path, kind):
    class Cancelled(BaseException):
        pass

    done = 0

    def cancel():
        nonlocal done
        done += 1
        if done == 9:  # in the second layer
            raise Cancelled

    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Cancelled):
        export_layers(tmp_path, "clip", scene(), kind, 8, on_frame=cancel)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_every_frame_is_reported(tmp_path):
    for kind in FORMATS:
        calls = []
        export_layers(tmp_path, kind, scene(3), kind, 8, on_frame=lambda c=calls: c.append(1))
        assert len(calls) == 4 * 3


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_codec_is_said_before_any_work(tmp_path, monkeypatch, kind):
    if kind == "png":
        pytest.skip("PNG needs no codec")

    def absent(*_):
        raise ValueError("no such codec")

    monkeypatch.setattr("av.codec.Codec", absent)
    monkeypatch.setattr("PIL.features.check", lambda _: False)
    with pytest.raises(LayerLoomError, match="install the wheel"):
        export_layers(tmp_path / "out", "clip", scene(2), kind, 8, on_frame=pytest.fail)
    assert not (tmp_path / "out").exists()


def test_layers_that_do_not_fit_together_are_refused(tmp_path):
    layers = scene()
    with pytest.raises(LayerLoomError, match=r"foreground 6, .*background 5") as caught:
        export_layers(tmp_path, "x", {**layers, "background": layers["background"][:5]}, "webm", 8)
    assert "number of frames" in str(caught.value)
    with pytest.raises(LayerLoomError, match=r"foreground 48x64, .*blended 48x60"):
        check_layers({"foreground": (2, 64, 48), "blended": (2, 60, 48)})
    with pytest.raises(LayerLoomError, match="No layer is connected"):
        check_layers({})
    with pytest.raises(LayerLoomError, match="empty"):
        check_layers({"blended": (0, 64, 48)})
    with pytest.raises(LayerLoomError, match="webm, mov, png, webp"):
        export_layers(tmp_path, "x", layers, "avi", 8)
    with pytest.raises(LayerLoomError, match="16383"):
        export.require_format("webp", (8, 20000))
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_said_in_the_callers_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LayerLoomError, match="file is in the way; try another prefix"):
        export_layers(tmp_path / "file", "x", scene(2), "png", 8, advice="try another prefix")


def test_lossless_webm_is_what_keeps_alpha(tmp_path):
    """The everyday setting is smaller, and coarser: exports must not fall back to it."""
    layers = scene()
    small = media.encode_webm(layers["foreground"], 8, layers["alpha"])
    large = saved(tmp_path, "webm", layers)["foreground"].stat().st_size
    assert len(small) < large


# --- sprite sheets --------------------------------------------------------------------------


def test_sprite_sheets_hold_every_frame_in_its_cell():
    clip = np.random.default_rng(1).integers(0, 256, (7, 10, 12, 4), dtype=np.uint8)
    sheets = sprite_sheets(clip[..., :3], clip[..., 3], max_sheet=30)
    assert (sheets.columns, sheets.per_sheet, len(sheets.pictures)) == (2, 6, 2)
    for index in range(7):
        cell = index % sheets.per_sheet
        left, top = cell % 2 * 12, cell // 2 * 10
        sheet = sheets.pictures[index // sheets.per_sheet]
        found = np.asarray(sheet.crop((left, top, left + 12, top + 10)))
        assert (found == clip[index]).all()


def test_sprite_sheets_stay_within_what_browsers_take():
    frames = np.zeros((40, 90, 1600, 3), np.uint8)
    sheets = sprite_sheets(frames)
    assert (sheets.width, sheets.height) == (512, 29)
    assert all(max(picture.size) <= 4096 for picture in sheets.pictures)


def test_scaled_down_sheets_keep_the_colour_of_edges():
    """Colours under transparent pixels must not bleed: red stays pure red, green never shows."""
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    frames[..., 1] = 255
    alpha = np.zeros((1, 64, 64), np.uint8)
    frames[:, :, 20:41] = (255, 0, 0)
    alpha[:, :, 20:41] = 255
    picture = np.asarray(sprite_sheets(frames, alpha, max_frame=24).pictures[0])
    seen = picture[picture[..., 3] > 8]
    assert len(seen) and seen[:, 1].max() <= 2


def test_saved_sheets_are_exact(tmp_path):
    clip = np.random.default_rng(2).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    sheets = sprite_sheets(clip)
    (name,) = sheets.save(tmp_path, "sheet")
    assert (np.asarray(Image.open(tmp_path / name)) == np.asarray(sheets.pictures[0])).all()
