"""Clips come back as they were written, and what is no clip is refused in one sentence."""

import errno
import io
import os
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from layerloom.engine.contact_sheet import animated_webp, contact_sheet, over_checkerboard
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.media import natural_key, read_clip, write_webm
from layerloom.engine.staging import StagedFolder


def smooth(frames: int = 5, height: int = 64, width: int = 64) -> np.ndarray:
    """Slow colour waves: what 4:2:0 chroma keeps."""
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [127 + 110 * np.sin((x + f) / 17 + c) * np.cos(y / 23 - c) for c in range(3)]
    return np.stack(waves, axis=-1).round().astype(np.uint8)


def disc(frames: int = 5, height: int = 64, width: int = 64) -> np.ndarray:
    """A moving disc with an antialiased edge."""
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    distance = np.hypot(x - width * 0.3 - 2 * f, y - height / 2)
    return (255 * np.clip(min(height, width) / 4 - distance + 0.5, 0, 1)).round().astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


def save_pngs(folder: Path, pictures: np.ndarray, pattern: str = "frame{}.png") -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / pattern.format(index))
    return folder


def refused(path: Path, *words: str, **options) -> str:
    with pytest.raises(LayerLoomError) as caught:
        read_clip(path, "background", **options)
    message = str(caught.value)
    for word in (*words, path.name):
        assert word in message
    assert message.endswith(".") and "\n" not in message and ". " not in message
    return message


# --- videos ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (34, 47)])
def test_webm_keeps_size_colour_and_alpha(tmp_path, size):
    frames, alpha = smooth(5, *size), disc(5, *size)
    write_webm(tmp_path / "clip.webm", frames, 7.5, alpha)
    clip = read_clip(tmp_path / "clip.webm")
    assert clip.frames.shape == frames.shape
    assert clip.fps == 7.5
    # 8 bits, limited range and crf 4 cost half a level on average; a wrong colour matrix costs
    # more than 3, a wrong range more than 10, and truncating instead of rounding a bias of 1.
    assert difference(clip.frames, frames).mean() < 1.0
    assert abs((clip.frames.astype(float) - frames).mean(axis=(0, 1, 2))).max() < 0.4
    # At an antialiased edge crf 4 was at most 8 levels off.
    assert difference(clip.alpha, alpha).max() <= 12
    assert difference(clip.alpha, alpha).mean() < 0.5


def test_webm_says_its_colours(tmp_path):
    write_webm(tmp_path / "clip.webm", smooth(), 8)
    with av.open(str(tmp_path / "clip.webm")) as container:
        context = container.streams.video[0].codec_context
        bt709, limited = 1, 1
        assert (context.colorspace, context.color_primaries, context.color_trc) == (bt709,) * 3
        assert context.color_range == limited
        assert context.name == "vp9"
        assert not container.streams.audio


def test_webm_with_alpha_is_marked_for_browsers(tmp_path):
    write_webm(tmp_path / "clip.webm", smooth(), 8, disc())
    with av.open(str(tmp_path / "clip.webm")) as container:
        assert container.streams.video[0].metadata["alpha_mode"] == "1"


def test_grey_clip_stays_grey_and_serves_as_matte(tmp_path):
    alpha = disc()
    write_webm(tmp_path / "alpha.webm", alpha, 8)
    clip = read_clip(tmp_path / "alpha.webm")
    assert clip.alpha is None
    assert np.ptp(clip.frames.astype(int), axis=-1).max() == 0
    assert difference(clip.as_alpha(), alpha).max() <= 12


def test_full_range_bt601_video_is_read_in_its_own_colours(tmp_path):
    """What phones and cameras write; read as BT.709 limited this is tens of levels off."""
    frames = smooth()
    bt601, full = 5, 2
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = bt601, full
        weights = np.array(
            [[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]]
        )
        for picture in frames:
            yuv = (picture @ weights.T + [0, 128, 128]).round().clip(0, 255).astype(np.uint8)
            planes = np.ascontiguousarray(yuv.transpose(2, 0, 1))
            frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
            frame.colorspace, frame.color_range = bt601, full
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert difference(read_clip(tmp_path / "clip.mkv").frames, frames).max() <= 2


def test_alpha_of_a_lossless_video(tmp_path):
    frames, alpha = smooth(), disc()
    with av.open(str(tmp_path / "clip.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "argb"
        for picture, matte in zip(frames, alpha, strict=True):
            argb = np.dstack([matte, picture])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(argb, format="argb")))
        container.mux(stream.encode())
    clip = read_clip(tmp_path / "clip.mov")
    assert (clip.frames == frames).all() and (clip.alpha == alpha).all()


def test_a_phone_video_is_read_upright(tmp_path):
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = (255, 0, 0)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, "yuv420p", 4_000_000
        stream.set_display_rotation(-90)  # to be shown turned clockwise
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    clip = read_clip(tmp_path / "clip.mp4")
    # The red quarter goes from the top left to the top right.
    expected = np.rot90(frames, -1, axes=(1, 2))
    assert clip.frames.shape == (3, 64, 32, 3)
    assert difference(clip.frames, expected).mean() < 4


def test_max_frames_stops_and_says_so(tmp_path):
    write_webm(tmp_path / "clip.webm", smooth(5), 8)
    assert len(read_clip(tmp_path / "clip.webm", max_frames=3).frames) == 3
    assert read_clip(tmp_path / "clip.webm", max_frames=3).truncated
    assert not read_clip(tmp_path / "clip.webm", max_frames=5).truncated


# --- pictures -------------------------------------------------------------------------------


def test_folder_of_pngs_in_natural_order(tmp_path):
    frames = smooth(12)
    clip = read_clip(save_pngs(tmp_path / "clip", frames))
    assert (clip.frames == frames).all()
    assert clip.alpha is None
    (tmp_path / "clip" / "notes.txt").write_text("not a picture")
    assert len(read_clip(tmp_path / "clip").frames) == 12
    assert read_clip(tmp_path / "clip", max_frames=4).truncated


def test_folder_of_rgba_pngs(tmp_path):
    frames, alpha = smooth(), disc()
    rgba = np.concatenate([frames, alpha[..., None]], axis=-1)
    clip = read_clip(save_pngs(tmp_path / "clip", rgba))
    assert (clip.frames == frames).all() and (clip.alpha == alpha).all()
    assert (clip.as_alpha() == alpha).all()
    shown = clip.over((0, 0, 0))
    assert (shown[alpha == 0] == 0).all()
    assert (shown[alpha == 255] == frames[alpha == 255]).all()


def test_sixteen_bit_pngs_keep_their_greys(tmp_path):
    ramp = np.tile(np.arange(0, 65536, 1024, dtype=np.uint16), (64, 1))
    clip = read_clip(save_pngs(tmp_path / "clip", np.stack([ramp, ramp])))
    assert (clip.frames[0, 0, :, 0] == np.arange(0, 256, 4)).all()


@pytest.mark.parametrize("suffix, lossless", [("webp", True), ("png", True), ("gif", False)])
def test_animations(tmp_path, suffix, lossless):
    path = tmp_path / f"clip.{suffix}"
    frames, alpha = smooth(), np.where(disc() > 127, 255, 0).astype(np.uint8)
    pictures = [Image.fromarray(rgba) for rgba in np.concatenate([frames, alpha[..., None]], -1)]
    options = {"lossless": True, "exact": True} if suffix == "webp" else {"disposal": 2}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50, **options)
    clip = read_clip(path)
    assert clip.fps == pytest.approx(20)
    assert (clip.alpha == alpha).all()
    seen = difference(clip.frames, frames)[alpha == 255]
    # GIF has 256 colours a frame.
    assert seen.max() == 0 if lossless else seen.mean() < 8


def test_natural_key():
    names = ["f10.png", "f2.png", "F1.png", "a.png", "3.png"]
    assert sorted(names, key=natural_key) == ["3.png", "a.png", "F1.png", "f2.png", "f10.png"]


# --- what is no clip ------------------------------------------------------------------------


def test_missing_and_empty(tmp_path):
    refused(tmp_path / "missing.mp4", "background", "does not exist")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "empty")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no pictures")


@pytest.mark.parametrize(
    "name, content",
    [
        ("text.mp4", b"these are words, not pictures\n" * 50),
        ("text.txt", b"these are words, not pictures\n" * 50),  # ffmpeg would draw it
        ("noise.webm", np.random.default_rng(0).bytes(20000)),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
        ("weights.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "),
    ],
)
def test_not_a_video(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "not a video")


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    refused(tmp_path / "sound.wav", "not a video")


def test_one_frame(tmp_path):
    write_webm(tmp_path / "one.webm", smooth(1), 8)
    refused(tmp_path / "one.webm", "only one frame", "at least 2")
    Image.fromarray(smooth(1)[0]).save(tmp_path / "still.jpg")
    refused(tmp_path / "still.jpg", "only one frame")
    refused(save_pngs(tmp_path / "single", smooth(1)), "only one frame")
    assert len(read_clip(tmp_path / "one.webm", min_frames=1).frames) == 1


def test_pictures_of_differing_size(tmp_path):
    folder = save_pngs(tmp_path / "clip", smooth(3))
    Image.fromarray(smooth(1, 32, 48)[0]).save(folder / "frame3.png")
    refused(folder, "frame0.png is 64x64", "frame3.png is 48x32")


def test_damaged_files(tmp_path):
    folder = save_pngs(tmp_path / "clip", smooth(3))
    whole = (folder / "frame1.png").read_bytes()
    (folder / "frame1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LayerLoomError, match=r"frame1\.png"):
        read_clip(folder)
    pictures = [Image.fromarray(picture) for picture in smooth()]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:])
    (tmp_path / "cut.webp").write_bytes(buffer.getvalue()[:200])
    with pytest.raises(LayerLoomError, match=r"cut\.webp"):
        read_clip(tmp_path / "cut.webp")


def test_a_build_without_vp9_is_named(tmp_path, monkeypatch):
    def no_codec(name, mode):
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av.codec, "Codec", no_codec)
    with pytest.raises(LayerLoomError, match="libvpx-vp9"):
        write_webm(tmp_path / "clip.webm", smooth(), 8)
    assert not list(tmp_path.iterdir())


# --- all files or none ----------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_staged_files_appear_together(tmp_path):
    out = tmp_path / "deep" / "out"
    with StagedFolder(out, ["a.txt", "b.txt"]) as staged:
        staged.path("a.txt").write_text("a")
        assert not (out / "a.txt").exists()
        staged.path("b.txt").write_text("b")
    assert tree(out) == {"a.txt": b"a", "b.txt": b"b"}
    assert staged.files == [out / "a.txt", out / "b.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, LayerLoomError])
def test_nothing_is_left_after_a_failure(tmp_path, failure):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.txt").write_text("earlier")
    before = tree(tmp_path)
    for out in (tmp_path / "new" / "deep", tmp_path / "kept"):
        with pytest.raises(failure), StagedFolder(out) as staged:
            staged.path("a.txt").write_text("half")
            raise failure("stop")
    assert tree(tmp_path) == before


def test_earlier_files_come_back_when_moving_fails(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("earlier")
    replace = os.replace

    def failing(source, target):
        if Path(target) == tmp_path / "b.txt":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(LayerLoomError, match="no room left"), StagedFolder(tmp_path) as staged:
        staged.path("a.txt").write_text("later")
        staged.path("b.txt").write_text("later")
    assert tree(tmp_path) == {"a.txt": b"earlier"}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(LayerLoomError, match="file is in the way"), StagedFolder(out):
            pytest.fail("work was started")
    (tmp_path / "out" / "blended.webm").mkdir(parents=True)
    with pytest.raises(LayerLoomError, match=r"blended\.webm is a folder"):
        with StagedFolder(tmp_path / "out", ["blended.webm"]):
            pytest.fail("work was started")
    assert set(tree(tmp_path)) == {"file", "out", "out/blended.webm"}


@pytest.fixture
def locked_folder():
    """A folder the running user may not write in; root becomes somebody else for the while."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    folder.rmdir()


def test_no_permission(locked_folder):
    for out in (locked_folder, locked_folder / "new"):
        with pytest.raises(LayerLoomError, match="no permission to write"), StagedFolder(out):
            pytest.fail("work was started")


# --- pictures of layers ---------------------------------------------------------------------


def test_contact_sheet_shows_every_layer_at_even_moments():
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    frames[...] = (np.arange(9) * 20)[:, None, None, None]
    alpha = disc(9, 32, 48)
    layers = {"foreground": frames, "background": frames, "blended": frames}
    sheet = contact_sheet(layers, alpha, columns=5, cell_width=96)
    # Cells are 96x64 (twice the clip), in 4 rows (alpha joins) and 5 columns.
    left = sheet.width - 14 - 5 * 96 - 4 * 6
    top = sheet.height - 14 - 4 * 64 - 3 * 6
    pixels = np.asarray(sheet)
    middle = top + 2 * (64 + 6) + 32
    shown = [int(pixels[middle, left + column * (96 + 6) + 48, 0]) for column in range(5)]
    assert shown == [0, 40, 80, 120, 160]  # frames 1, 3, 5, 7, 9
    # Where the sprite is not, a light checkerboard shows through the foreground.
    assert pixels[top + 2, left + 90].min() >= 200
    # Labels: ink to the left of every row.
    for row in range(4):
        assert pixels[top + row * 70 : top + row * 70 + 64, :left].max() > 200


def test_contact_sheet_of_opaque_and_of_few_frames():
    frames = smooth(2, 8, 8)
    small = contact_sheet({"background": frames, "blended": frames})
    wide = contact_sheet({"background": smooth(2, 480, 720), "blended": smooth(2, 480, 720)})
    assert small.width < 600 and wide.width < 600


def test_checkerboard_keeps_opaque_pixels():
    frames, alpha = smooth(), disc()
    shown = over_checkerboard(frames, alpha)
    assert (shown[alpha == 255] == frames[alpha == 255]).all()
    assert set(np.unique(shown[alpha == 0])) == {204, 245}


def test_animated_webp_plays_every_frame(tmp_path):
    frames = smooth(4)
    layers = {"foreground": frames, "background": frames, "blended": frames}
    animated_webp(tmp_path / "layers.webp", layers, disc(4), fps=8)
    clip = read_clip(tmp_path / "layers.webp")
    assert clip.frames.shape[0] == 4
    assert clip.fps == pytest.approx(8)
    assert clip.frames.shape[2] > 4 * 190  # four tiles: alpha joins
