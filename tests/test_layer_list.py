"""Lists of layers as a person writes them."""

import pytest

from layerloom.engine.conditioning.layer_list import layer_strengths
from layerloom.engine.errors import LayerLoomError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", [1, 0.5, 1, 1]),
        ("2-3", [1, 0.5, 0.5, 1]),
        (" 1 - 2 , 4:0 ", [0.5, 0.5, 1, 0]),
        ("1-4, 3:1.25,", [0.5, 0.5, 1.25, 0.5]),
        ("1:.75", [0.75, 1, 1, 1]),
    ],
)
def test_layers_ranges_and_strengths_of_their_own(text, expected):
    assert layer_strengths(text, 4, 0.5) == tuple(expected)


@pytest.mark.parametrize(
    "text", ["", " , ", "0", "5", "3-2", "1-9", "a", "1;2", "2:x", "2:11", "-1"]
)
def test_anything_else_is_a_sentence(text):
    with pytest.raises(LayerLoomError) as error:
        layer_strengths(text, 4, 0.5)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_the_strength_itself_is_checked():
    with pytest.raises(LayerLoomError, match="0 to 10"):
        layer_strengths("1-4", 4, -1)
