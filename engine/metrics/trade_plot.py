"""Draws what image scale and text scale trade against each other, from `layerloom eval animate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

# Measure, what it says above its panel, and the span of its axis (None: what is there).
PANELS = (
    ("first_db", "first frame against the image, dB", None),
    ("direction", "direction as the text says", (0.0, 1.0)),
    ("shape", "shape kept", (0.0, 1.0)),
)
_BACKDROP, _GRID, _INK, _FAINT = (255, 255, 255), (226, 228, 232), (32, 36, 44), (112, 118, 130)
# Light to dark: the image scale rises.
_LINES = ((146, 197, 222), (67, 147, 195), (33, 102, 172), (5, 48, 97))
_WIDTH, _HEIGHT = 300, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 34, 52


def trade_plot(trade: Sequence[Mapping[str, float]]) -> Image.Image:
    """A panel a measure over the text scale, a line for each image scale.

    ``trade`` is the list of that name that ``evaluate_animation`` returns; its gates are left out.
    """
    points = [point for point in trade if "text_scale" in point]
    texts = sorted({point["text_scale"] for point in points})
    images = sorted({point["image_scale"] for point in points})
    found = {(point["text_scale"], point["image_scale"]): point for point in points}
    picture = Image.new("RGB", (_WIDTH * len(PANELS), _HEIGHT), _BACKDROP)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for number, (measure, title, span) in enumerate(PANELS):
        box = (
            number * _WIDTH + _LEFT,
            _TOP,
            (number + 1) * _WIDTH - _RIGHT,
            _HEIGHT - _BOTTOM,
        )
        values = [point[measure] for point in points]
        low, high = span or (min(values) - 0.5, max(values) + 0.5)
        draw.text((box[0], _TOP // 2), title, _INK, font, anchor="lm")
        for row in range(5):
            y = box[3] - (box[3] - box[1]) * row / 4
            draw.line([(box[0], y), (box[2], y)], _GRID)
            value = low + (high - low) * row / 4
            draw.text((box[0] - 6, y), f"{value:.3g}", _FAINT, font, anchor="rm")
        for index, image in enumerate(images):
            line = []
            for column, text in enumerate(texts):
                x = box[0] + (box[2] - box[0]) * (column + 0.5) / len(texts)
                share = (found[text, image][measure] - low) / (high - low)
                line.append((x, box[3] - (box[3] - box[1]) * share))
                draw.text((x, box[3] + 6), f"{text:g}", _FAINT, font, anchor="mt")
            colour = _LINES[min(index, len(_LINES) - 1)]
            draw.line(line, colour, width=2)
            for x, y in line:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
    x = _LEFT
    draw.text((x, _HEIGHT - 16), "over the text scale; image scale", _FAINT, font, anchor="lm")
    x += 200
    for index, image in enumerate(images):
        colour = _LINES[min(index, len(_LINES) - 1)]
        draw.ellipse([x, _HEIGHT - 20, x + 8, _HEIGHT - 12], colour)
        draw.text((x + 13, _HEIGHT - 16), f"{image:g}", _INK, font, anchor="lm")
        x += 48
    return picture
