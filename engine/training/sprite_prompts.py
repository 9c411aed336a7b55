"""The words of sprite world: what a scene is called, in paraphrases, and the closed vocabulary."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .sprite_world import Scene

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
DIRECTIONS = (
    "left",
    "right",
    "up",
    "down",
    "up-left",
    "up-right",
    "down-left",
    "down-right",
    "still",
)
SPEEDS = ("slow", "fast")
CHANGES = ("none", "grow", "turn")
PATTERNS = ("plain", "stripes", "checker", "gradient")

# 16 tokens a prompt, less the index prefix ("2" and a comma).
MAX_TOKENS = 16
MAX_PROMPT_TOKENS = MAX_TOKENS - 2

_VERBS = ("moving", "moves", "drifting", "drifts", "gliding", "glides", "travelling", "going")
_VERB_WEIGHTS = (0.4, 0.15, 0.1, 0.1, 0.07, 0.06, 0.06, 0.06)
_ADVERBS = {"slow": ("slowly", "slow"), "fast": ("quickly", "fast")}
_CHANGE_WORDS = {"grow": ("growing", "getting bigger"), "turn": ("turning", "rotating")}
_STILL = ("standing still", "stands still", "not moving", "at rest")
_OVER = ("over", "on", "in front of", "above")

# Words no template produces, but which a person may type.
_SYNONYMS = (
    "backdrop behind big bigger board chequered checkered checkerboard chess diagonally disc disk "
    "downward downwards fading fast faster flying ball box grows in into is it large lines lower "
    "motionless moved of one pink purple rapidly rectangle rotates round shape shrinking sideways "
    "single sliding slides slower small solid spinning spins sprite static stationary still "
    "striped stripe the there to towards transparent turns uniform upper upward upwards video "
    "while with without scene colour color wall leftwards rightwards leftward rightward fills"
).split()


class RandomSource(Protocol):
    """Anything with ``random()`` in [0, 1): ``random.Random`` or a numpy ``Generator``."""

    def random(self) -> float:
        """Return the next number."""
        ...


def tokenise(text: str) -> list[str]:
    """Split text into lower-case words, single digits and commas; all else only separates."""
    return re.findall(r"[a-z]+|[0-9]|,", text.lower())


def choose(rng: RandomSource, options, weights=None):
    """Draw one of ``options`` using one ``rng.random()``, so any random source gives one draw."""
    draw = float(rng.random())
    if weights is None:
        return options[min(int(draw * len(options)), len(options) - 1)]
    draw *= sum(weights)
    for option, weight in zip(options, weights, strict=True):
        draw -= weight
        if draw < 0:
            return option
    return options[-1]


def direction_phrases(direction: str) -> tuple[str, ...]:
    """Every way the prompts name a moving direction, the plain one first."""
    if direction in ("left", "right"):
        return (direction, f"to the {direction}", f"{direction}wards")
    if direction in ("up", "down"):
        return (direction, f"{direction}wards")
    vertical, horizontal = direction.split("-")
    corner = "upper" if vertical == "up" else "lower"
    return (
        f"{vertical} and {horizontal}",
        f"{vertical} {horizontal}",
        f"to the {corner} {horizontal}",
        f"diagonally {vertical} and {horizontal}",
    )


def background_phrases(pattern: str, colour: str) -> tuple[str, ...]:
    """Every way the prompts name a background, the plain one first."""
    if pattern == "plain":
        return (
            f"plain {colour}",
            f"a plain {colour} background",
            f"solid {colour}",
            f"a {colour} background",
        )
    if pattern == "stripes":
        return (
            f"{colour} stripes",
            f"a background of {colour} stripes",
            f"{colour} striped background",
            f"a {colour} striped background",
        )
    if pattern == "checker":
        return (
            f"{colour} checker",
            f"a {colour} checker background",
            f"a {colour} checkerboard",
            f"{colour} checkered background",
        )
    return (
        f"{colour} gradient",
        f"a {colour} gradient",
        f"a background with a {colour} gradient",
        f"a {colour} gradient background",
    )


def foreground_phrase(scene: Scene, rng: RandomSource, limit: int = MAX_PROMPT_TOKENS) -> str:
    """Describe the sprite; speed and change are named only sometimes, and never wrongly."""
    noun = f"{choose(rng, ('a ', '', 'one '), (0.7, 0.25, 0.05))}{scene.colour} {scene.shape}"
    joint = ", " if rng.random() < 0.15 else " "
    if scene.direction == "still":
        motion, adverb, adverb_first = choose(rng, _STILL, (0.5, 0.2, 0.15, 0.15)), "", False
        choose(rng, SPEEDS)
    else:
        phrases = direction_phrases(scene.direction)
        where = phrases[0] if rng.random() < 0.5 else choose(rng, phrases)
        motion = f"{choose(rng, _VERBS, _VERB_WEIGHTS)} {where}"
        adverb = choose(rng, _ADVERBS[scene.speed]) if rng.random() < 0.5 else ""
        adverb_first = adverb.endswith("ly") and rng.random() < 0.4
    change = ""
    if scene.change != "none" and rng.random() < 0.6:
        change = choose(rng, (" and ", " while ", ", "))
        change += choose(rng, _CHANGE_WORDS[scene.change])
    # What does not fit goes in the order of how little the clip depends on it.
    for with_adverb, with_change in ((True, True), (True, False), (False, False)):
        words = motion
        if adverb and with_adverb:
            words = f"{adverb} {motion}" if adverb_first else f"{motion} {adverb}"
        text = noun + joint + words + (change if with_change else "")
        if len(tokenise(text)) <= limit:
            return text
    return f"{scene.colour} {scene.shape} {motion}"


def background_phrase(scene: Scene, rng: RandomSource, limit: int = MAX_PROMPT_TOKENS) -> str:
    """Describe the background; the plain phrase where a longer one would not fit."""
    phrases = background_phrases(scene.pattern, scene.background_colour)
    text = phrases[0] if rng.random() < 0.4 else choose(rng, phrases)
    return text if len(tokenise(text)) <= limit else phrases[0]


def prompts(scene: Scene, rng: RandomSource) -> tuple[str, str, str]:
    """Return (foreground, background, blended) prompts of one scene, drawn from paraphrases.

    Each has at most ``MAX_PROMPT_TOKENS`` tokens (``tokenise``) and only words of ``VOCABULARY``.
    """
    foreground = foreground_phrase(scene, rng)
    background = background_phrase(scene, rng)
    # The shortest tail is one connecting word and two for the background.
    sprite = foreground_phrase(scene, rng, MAX_PROMPT_TOKENS - 3)
    left = MAX_PROMPT_TOKENS - len(tokenise(sprite))
    over = choose(rng, _OVER, (0.6, 0.2, 0.15, 0.05))
    if len(tokenise(over)) + 2 > left:
        over = "over"
    scenery = background_phrase(scene, rng, left - len(tokenise(over)))
    return foreground, background, f"{sprite} {over} {scenery}"


def _vocabulary() -> tuple[str, ...]:
    words: set[str] = set(_SYNONYMS) | set("0123456789") | {",", "a", "one", "and", "while"}
    phrases = [*SHAPES, *COLOURS, *PATTERNS, *SPEEDS, *_VERBS, *_STILL, *_OVER, "grow", "turn"]
    for group in (*_ADVERBS.values(), *_CHANGE_WORDS.values()):
        phrases.extend(group)
    for direction in DIRECTIONS[:-1]:
        phrases.extend(direction_phrases(direction))
    for pattern in PATTERNS:
        phrases.extend(background_phrases(pattern, "red"))
    for phrase in phrases:
        words.update(tokenise(phrase))
    return tuple(sorted(words))


VOCABULARY: tuple[str, ...] = _vocabulary()
