"""Where given images belong: modes, chains without doubled or missing frames, pictures fitted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from layerloom.engine.conditioning.key_images import clip_plan
from layerloom.engine.conditioning.pictures import (
    cover,
    fitting_note,
    fitting_size,
    read_picture,
)
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.sampling.windows import SlidingWindows

SLIDING = SlidingWindows(16, 8)


def test_one_image_is_animated_over_any_length():
    for frames in (1, 15, 16, 17, 50):
        plan = clip_plan(1, False, frames, 16)
        assert (plan.mode, plan.frames, plan.kept, plan.keys) == (
            "animate",
            frames,
            frames,
            ((0, 0),),
        )
        covered = {f for w in plan.windows(SLIDING, 4) for f in range(w.start, w.stop)}
        assert covered == set(range(frames))
    assert clip_plan(1, False, None, 16).frames == 16


def test_two_images_are_the_first_and_the_last_frame():
    plan = clip_plan(2, False, None, 16)
    assert (plan.mode, plan.frames, plan.kept) == ("interpolate", 16, 16)
    assert plan.keys == ((0, 0), (15, 1))
    assert clip_plan(2, False, 30, 16).keys == ((0, 0), (29, 1))


def test_a_loop_passes_the_same_image_twice_and_leaves_out_the_last_frame():
    plan = clip_plan(1, True, None, 16)
    assert (plan.mode, plan.frames, plan.kept) == ("loop", 16, 15)
    assert plan.keys == ((0, 0), (15, 0))
    # A number that is asked for is what comes out.
    assert clip_plan(1, True, 16, 16).kept == 16


@given(
    st.integers(2, 8), st.booleans(), st.one_of(st.none(), st.integers(2, 40)), st.integers(2, 20)
)
@settings(deadline=None)
def test_chains_have_every_key_image_once_and_no_frame_twice(images, loop, frames, trained):
    plan = clip_plan(images, loop, frames, trained)
    pieces = images if loop else images - 1
    assert plan.pieces == pieces
    assert plan.frames == pieces * (plan.length - 1) + 1
    # Joined clips of their own would have pieces * length frames: each inner image twice.
    assert plan.kept == plan.frames - loop
    if frames is not None:
        assert plan.kept == (pieces * frames if loop else pieces * (frames - 1) + 1)
    shown = [image for frame, image in plan.keys if frame < plan.kept]
    assert shown == list(range(images))
    windows = plan.windows(SLIDING, 3)
    for window in windows:
        keys = dict(plan.keys)
        # A piece sees its two images at its ends, and those alone.
        inside = [frame for frame in keys if window.start <= frame < window.stop]
        assert inside == [window.start, window.stop - 1]
        assert plan.first_image(window.piece) == keys[window.start]
    covered = [frame for window in windows for frame in range(window.start, window.stop)]
    assert set(covered) == set(range(plan.frames))
    assert len(covered) == plan.frames + pieces - 1


def test_clips_too_short_for_their_images_are_a_sentence():
    for images, loop, frames in ((2, False, 1), (1, True, 1), (1, False, 0), (3, True, 0)):
        with pytest.raises(LayerLoomError, match="frames"):
            clip_plan(images, loop, frames, 16)


# Pictures


def test_sizes_follow_the_picture_at_about_the_native_area():
    native = (320, 512)
    assert fitting_size((320, 512), native, 64) == native
    assert fitting_size((1280, 2048), native, 64) == native
    assert fitting_size((300, 500), native, 64) == native
    for picture in ((512, 320), (400, 400), (1000, 750), (200, 900)):
        height, width = fitting_size(picture, native, 64)
        assert height % 64 == 0 and width % 64 == 0
        assert height * width <= 1.1 * 320 * 512
        wanted, natural = picture[1] / picture[0], 512 / 320
        assert abs(np.log(width / height / wanted)) < abs(np.log(natural / wanted))
    # A size so small that its neighbours lose half of it stays.
    assert fitting_size((75, 100), (96, 96), 32) == (96, 96)


def test_cover_keeps_the_middle_and_the_proportions():
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 255
    fitted = cover(picture, (50, 50))
    assert fitted.shape == (50, 50, 3)
    # A square of the middle is all white; the black sides are cut off.
    assert fitted.min() > 230
    same = cover(picture, (100, 300))
    assert same is picture
    assert cover(picture, (64, 512)).shape == (64, 512, 3)


def test_what_is_resized_or_cut_is_said():
    assert fitting_note("end image", (320, 512), (320, 512)) is None
    assert fitting_note("end image", (640, 1024), (320, 512)) == (
        "The end image of 1024x640 is resized to 512x320."
    )
    assert fitting_note("image", (100, 300), (100, 150)) == (
        "The image of 300x100 is resized to 150x100, and 50% of its width is cut off."
    )


def test_pictures_are_read_upright_opaque_and_still(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = (255, 0, 0)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = read_picture(tmp_path / "turned.jpg")
    assert turned.pixels.shape == (40, 20, 3)
    assert turned.pixels[5, 10, 0] > 200 and turned.pixels[35, 10, 0] < 50

    matte = np.dstack([pixels, np.full((20, 40), 255, np.uint8)])
    matte[:10, :, 3] = 0
    Image.fromarray(matte).save(tmp_path / "hole.png")
    hole = read_picture(tmp_path / "hole.png")
    assert hole.transparent and hole.pixels[:10].max() == 0 and hole.pixels[15, 5, 0] == 255

    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    moving = read_picture(tmp_path / "moves.gif")
    assert moving.moving and moving.pixels[10, 5, 0] > 200

    grey = Image.fromarray((np.arange(800).reshape(20, 40) * 80).astype(np.uint16))
    grey.save(tmp_path / "deep.png")
    deep = read_picture(tmp_path / "deep.png").pixels
    assert deep.shape == (20, 40, 3) and 245 < deep.max() <= 255


def test_files_that_are_no_pictures_are_a_sentence(tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) - 30])
    for name, words in (
        ("words.png", "not a picture"),
        ("empty.png", "is empty"),
        ("half.png", "damaged"),
        ("absent.png", "does not exist"),
        ("", "folder"),
    ):
        with pytest.raises(LayerLoomError, match=words) as caught:
            read_picture(tmp_path / name, "end image")
        assert str(caught.value).startswith("The end image ")
