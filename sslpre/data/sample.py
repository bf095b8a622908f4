"""The built-in sample set: small scenes drawn by code from a seed, so that every command works with nothing downloaded.

A scene has an up (sky, ground, light from above, a shadow on the ground) and one object. The object's class is which
parts it has and how they are arranged: every object is fitted into a box drawn without regard to its class, and its
parts take their materials from one table that all classes share. A material's texture tells its colour. So rotation,
relative position and colour can be learned from the pixels, while neither the colours nor the position of an object
give its class.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from sslpre.data.find import Found

SIDE = 64
COUNT = 4000
VERSION = 1  # stands in the fingerprint: raise it whenever a pixel of the set changes
WHERE = "the built-in sample set"
FINE = 2 * SIDE  # scenes are drawn at twice the side and averaged down

Polygon = np.ndarray  # float [K, 2]
Part = tuple[Polygon, int]  # an outline, and which of the object's three materials fills it
Draw = Callable[[], float]  # the next uniform number in [0, 1)


# Outlines in the object's own unit square: x to the right, y up.


def _quad(x0: float, x1: float, y0: float, y1: float, top: float = 1.0, shift: float = 0.0) -> Polygon:
    """An upright trapezoid; `top` is the width of its upper edge relative to the lower one."""
    middle, half = (x0 + x1) / 2 + shift, (x1 - x0) / 2 * top
    return np.array([(x0, y0), (x1, y0), (middle + half, y1), (middle - half, y1)])


def _disc(x: float, y: float, rx: float, ry: float) -> Polygon:
    turn = np.linspace(0, 2 * math.pi, 20, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], 1)


def _bar(x0: float, y0: float, x1: float, y1: float, width: float) -> Polygon:
    """A straight bar from one point to another."""
    along = np.array([x1 - x0, y1 - y0])
    side = np.array([-along[1], along[0]]) / np.hypot(*along) * width / 2
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.stack([start - side, end - side, end + side, start + side])


# The classes: parts in the order they are painted over one another. All reach all four sides of the square and fill
# about half of it, so that neither the extent nor the area gives the class.


def _house(u: Draw) -> list[Part]:
    eaves, door = 0.5 + 0.12 * u(), 0.24 + 0.2 * u()
    return [
        (_quad(0.17, 0.83, 0, eaves), 0),
        (_quad(0, 1, eaves, 1, top=0.05 + 0.2 * u()), 1),
        (_quad(door, door + 0.2, 0, 0.36), 2),
        (_quad(door + 0.26, door + 0.42, 0.18, 0.4), 2),
    ]


def _tree(u: Draw) -> list[Part]:
    crown, lean = 0.4 + 0.1 * u(), 0.1 * (u() - 0.5)
    return [
        (_quad(0.38, 0.62, 0, crown + 0.15, top=0.7, shift=lean), 0),
        (_disc(0.22, crown + 0.16, 0.22, 0.19), 1),
        (_disc(0.78, crown + 0.16, 0.22, 0.19), 1),
        (_disc(0.5 + lean, 0.72, 0.3, 0.28), 2),
    ]


def _car(u: Draw) -> list[Part]:
    back, hood = 0.12 + 0.15 * u(), 0.52 + 0.08 * u()
    return [
        (_quad(back, back + 0.6, hood, 1, top=0.5), 1),
        (_quad(0, 1, 0.2, hood, top=0.85), 0),
        (_disc(0.24, 0.18, 0.16, 0.18), 2),
        (_disc(0.76, 0.18, 0.16, 0.18), 2),
    ]


def _boat(u: Draw) -> list[Part]:
    deck, mast = 0.25 + 0.1 * u(), 0.4 + 0.15 * u()
    return [
        (_bar(mast, deck, mast, 1, 0.07), 2),
        (np.array([(mast + 0.06, deck + 0.06), (1.0, deck + 0.1), (mast + 0.06, 0.98)]), 1),
        (np.array([(mast - 0.06, deck + 0.06), (0.04, deck + 0.06), (mast - 0.06, 0.85)]), 2),
        (_quad(0.2, 0.8, 0, deck, top=1.66), 0),
    ]


def _lamp(u: Draw) -> list[Part]:
    shade, post = 0.52 + 0.1 * u(), 0.5 + 0.1 * (u() - 0.5)
    return [
        (_bar(post, 0.05, post, shade + 0.1, 0.13), 0),
        (_quad(0.12, 0.88, 0, 0.16, top=0.6), 2),
        (_quad(0, 1, shade, 1, top=0.4 + 0.2 * u()), 1),
    ]


def _table(u: Draw) -> list[Part]:
    top, leg = 0.54 + 0.1 * u(), 0.03 + 0.1 * u()
    return [
        (_quad(leg, leg + 0.17, 0, top), 0),
        (_quad(1 - leg - 0.17, 1 - leg, 0, top), 0),
        (_quad(0, 1, top, top + 0.18), 1),
        (_disc(0.3 + 0.4 * u(), (top + 1.16) / 2, 0.2, (0.84 - top) / 2), 2),
    ]


def _mill(u: Draw) -> list[Part]:
    hub, turn = 0.58, u() * math.pi / 2
    ends = [(math.cos(turn + k * math.pi / 2), math.sin(turn + k * math.pi / 2)) for k in range(4)]
    return [
        (_quad(0.22, 0.78, 0, hub + 0.1, top=0.6), 0),
        *((_bar(0.5, hub, 0.5 + 0.48 * x, hub + 0.42 * y, 0.17), 1) for x, y in ends),
        (_disc(0.5, hub, 0.14, 0.14), 2),
    ]


def _snowman(u: Draw) -> list[Part]:
    waist, wave = 0.4 + 0.08 * u(), 0.2 * u()
    return [
        (_bar(0.5, waist + 0.08, 0.02, waist + 0.14 + wave, 0.07), 2),
        (_bar(0.5, waist + 0.08, 0.98, waist + 0.34 - wave, 0.07), 2),
        (_disc(0.5, waist / 2 + 0.03, 0.35, waist / 2 + 0.03), 0),
        (_disc(0.5, waist + 0.12, 0.27, 0.17), 1),
        (_disc(0.5, waist + 0.33, 0.2, 0.13), 0),
        (_quad(0.22, 0.78, waist + 0.4, 1, top=0.5), 2),
    ]


def _gate(u: Draw) -> list[Part]:
    lintel, width = 0.6 + 0.1 * u(), 0.18 + 0.06 * u()
    return [
        (_quad(0, width, 0, lintel), 0),
        (_quad(1 - width, 1, 0, lintel), 0),
        (_quad(0, 1, lintel, lintel + 0.16), 1),
        (_quad(0.2, 0.8, lintel + 0.16, 1, top=0.1 + 0.7 * u()), 2),
    ]


def _horse(u: Draw) -> list[Part]:
    belly, legs = 0.4 + 0.08 * u(), 0.04 * u()
    return [
        *((_quad(x + legs, x + legs + 0.11, 0, belly), 1) for x in (0.13, 0.28, 0.54, 0.69)),
        (_bar(0.04, belly - 0.12, 0.16, belly + 0.12, 0.08), 2),
        (_bar(0.7, belly, 0.84, 0.9, 0.18), 2),
        (_disc(0.47, belly + 0.1, 0.38, 0.17), 0),
        (_quad(0.68, 1, 0.76, 1, top=0.7), 2),
    ]


CLASSES: dict[str, Callable[[Draw], list[Part]]] = {
    "boat": _boat,
    "car": _car,
    "gate": _gate,
    "horse": _horse,
    "house": _house,
    "lamp": _lamp,
    "mill": _mill,
    "snowman": _snowman,
    "table": _table,
    "tree": _tree,
}

# Materials: texture, and the two ends of the range of colours that go with it (RGB, 0..255).
MATERIALS = (
    ("grain", (120, 72, 36), (176, 122, 70)),  # wood
    ("brick", (158, 60, 44), (196, 92, 70)),
    ("sheen", (104, 122, 150), (160, 178, 204)),  # metal
    ("leaf", (46, 104, 40), (104, 160, 64)),
    ("speckle", (128, 124, 116), (190, 184, 172)),  # stone
    ("stripe", (206, 158, 44), (238, 208, 104)),  # straw
    ("plain", (120, 50, 120), (190, 110, 180)),  # cloth
)
LOW, HIGH = (np.array([m[k] for m in MATERIALS], np.float32) for k in (1, 2))
GROUNDS = (3, 4)  # rows of MATERIALS
# zenith and horizon of clear, overcast and evening skies; a scene mixes two
SKIES = np.array(
    [[(96, 150, 220), (190, 216, 240)], [(150, 160, 176), (214, 218, 222)], [(110, 120, 190), (244, 200, 170)]],
    np.float32,
)


@cache
def _textures() -> np.ndarray:
    """Brightness of every material about 1, float32 [M, 2·FINE, 2·FINE]; all images cut their surfaces out of these."""
    side = 2 * FINE
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    noise, shades = np.random.default_rng(0).random((2, side, side))

    def smooth(image: np.ndarray, down: int, across: int) -> np.ndarray:
        for axis, width in ((0, down), (1, across)):
            image = np.mean([np.roll(image, k, axis) for k in range(width)], 0)
        return np.clip((image - image.mean()) / image.std(), -2, 2)

    course = np.floor(y / 7)
    along = x + 6 * (course % 2)
    bricks = shades[course.astype(int), (along // 12).astype(int)]
    made = {
        "grain": 0.065 * smooth(noise, 24, 2),
        "brick": np.where((y % 7 < 1.5) | (along % 12 < 1.5), 0.175, 0.125 * bricks - 0.075),
        "sheen": 0.08 * np.sin((x + y) / 9),
        "leaf": 0.09 * smooth(noise, 4, 4),
        "speckle": 0.075 * smooth(noise, 2, 2),
        "stripe": 0.09 * np.sign(np.sin((x - 0.6 * y) / 1.9)),
        "plain": np.zeros((side, side)),
    }
    return np.stack([1 + made[texture] for texture, _, _ in MATERIALS]).astype(np.float32)


def _inside(outline: Polygon, height: int, width: int) -> np.ndarray:
    """bool [height, width]: the pixels of a polygon given as (x to the right, y down)."""
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in outline.tolist()], fill=1)
    return np.asarray(mask, dtype=bool)


def _paint(
    canvas: np.ndarray, outline: Polygon, material: int, tone: float, u: Draw, light: tuple[float, float]
) -> None:
    """Fill a polygon with a material, its brightness running from `light[0]` at its top to `light[1]` at its foot."""
    across, down = int(u() * FINE), int(u() * FINE)
    x0, y0 = np.clip(np.floor(outline.min(0)), 0, FINE).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(outline.max(0)) + 1, 0, FINE).astype(int).tolist()
    if x1 <= x0 or y1 <= y0:  # wholly outside the picture
        return
    height, width = y1 - y0, x1 - x0
    inside = _inside(outline - (x0, y0), height, width)
    surface = _textures()[material, down : down + height, across : across + width]
    surface = surface * np.linspace(*light, height, dtype=np.float32)[:, None]
    colour = LOW[material] + (HIGH[material] - LOW[material]) * np.float32(tone)
    canvas[y0:y1, x0:x1][inside] = surface[inside][:, None] * colour


LIT = (1.22, 0.68)  # objects: light from above
FLAT = (0.8, 0.6)  # the ground: darker than the sky, and darker towards the viewer


def layout(u: Draw, kind: int) -> tuple[float, Polygon, list[Part]]:
    """Horizon, shadow and parts of one object of class `kind`, in pixels of the fine canvas from its upper left corner.

    The box, its turn, shear and mirroring are drawn before anything that depends on the class.
    """
    horizon = FINE * (0.4 + 0.3 * u())
    height = FINE * (0.42 + 0.28 * u())
    width = height * (0.75 + 0.55 * u())
    x = FINE * (0.28 + 0.44 * u())
    foot = min(max(horizon + FINE * 0.06, height * 0.95) + FINE * 0.3 * u(), FINE * 0.97)
    turn, shear, mirror = 0.25 * (u() - 0.5), 0.3 * (u() - 0.5), 1 if u() < 0.5 else -1
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    place = rotation @ np.array([[mirror * width, shear * width], [0, -height]])
    shadow = (x, foot) + _disc(0.12, 0, 0.6, 0.09) * (width, height)
    parts = list(CLASSES.values())[kind](u)
    return horizon, shadow, [((outline - (0.5, 0)) @ place.T + (x, foot), slot) for outline, slot in parts]


def _background(u: Draw, horizon: float) -> np.ndarray:
    """float32 [FINE, FINE, 3]: sky, ground, and up to two stray parts shaped and made like those of the objects."""
    mix = np.float32(u())
    zenith, low = SKIES[int(u() * len(SKIES))] * mix + SKIES[int(u() * len(SKIES))] * (1 - mix)
    height = np.clip(np.arange(FINE, dtype=np.float32) / horizon, 0, 1)[:, None]
    canvas = np.repeat((zenith + (low - zenith) * height)[:, None], FINE, 1)
    slope = 8 * (u() - 0.5)
    ground = np.array([(0, horizon - slope), (FINE, horizon + slope), (FINE, FINE), (0, FINE)])
    _paint(canvas, ground, GROUNDS[int(u() * len(GROUNDS))], u(), u, FLAT)
    for _ in range(int(u() * 3)):
        size, x, foot = FINE * (0.07 + 0.09 * u()), FINE * u(), horizon + (FINE - horizon) * (0.1 + 0.8 * u())
        shape = (_quad(-0.5, 0.5, 0, 1), _quad(-0.5, 0.5, 0, 1, top=0.1), _disc(0, 0.5, 0.5, 0.5))[int(u() * 3)]
        _paint(canvas, (x, foot) + shape * (size, -size), int(u() * len(MATERIALS)), u(), u, LIT)
    return canvas


def draw(seed: int, split: int, index: int) -> np.ndarray:
    """One scene, uint8 [64, 64, 3] RGB: a function of its arguments alone. Its class is `index` modulo the classes."""
    u: Draw = iter(np.random.default_rng([seed, split, index]).random(256).tolist()).__next__
    horizon, shadow, parts = layout(u, index % len(CLASSES))
    canvas = _background(u, horizon)
    canvas[_inside(shadow, FINE, FINE)] *= 0.6
    materials = [(int(u() * len(MATERIALS)), u()) for _ in range(3)]
    for outline, slot in parts:
        _paint(canvas, outline, *materials[slot], u, LIT)
    # brightness and tint of the light: without them a colour histogram would betray how much of each object is in shade
    canvas *= np.float32(0.65 + 0.5 * u()) * np.array([0.88 + 0.24 * u() for _ in range(3)], np.float32)
    np.clip(canvas, 0, 255, out=canvas)
    rows = canvas[0::2] + canvas[1::2]
    return np.rint((rows[:, 0::2] + rows[:, 1::2]) / 4).astype(np.uint8)


class Scenes:
    """One split of the sample set: a Source whose images are drawn when they are first read, and kept."""

    def __init__(self, count: int, seed: int, split: int):
        self.where = WHERE
        self.classes = list(CLASSES)
        self.labels = np.arange(count, dtype=np.int64) % len(CLASSES)
        self.fingerprint = hashlib.sha256(f"sample {VERSION} {seed} {split} {count}".encode()).hexdigest()
        self.written = self.fingerprint
        self._seed, self._split = seed, split
        self._pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
        self._drawn = np.zeros(count, bool)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"{('train', 'test')[self._split]}/{self.classes[self.labels[i]]}/{i:05d}.png"

    def read(self, i: int, side: int | None = None) -> np.ndarray:
        """uint8 [64, 64, 3] RGB, the caller's own copy; `side` changes nothing."""
        if not self._drawn[i]:
            # two threads may draw one image twice: they write the same bytes, and the mark comes after the pixels
            self._pixels[i] = draw(self._seed, self._split, i)
            self._drawn[i] = True
        return self._pixels[i].copy()

    def size(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return SIDE, SIDE

    def grey(self, i: int) -> bool:
        """False: every scene is painted in colour."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return False


def sample(count: int = COUNT, seed: int = 0) -> Found:
    """The built-in set: `count` scenes to train on and a quarter as many to test on, 64×64, ten classes in equal parts.

    Image `i` depends on the seed, the split and `i` alone, not on `count`; the splits are different draws.
    """
    from sslpre.data.find import Found

    return Found(train=Scenes(count, seed, 0), test=Scenes(count // 4, seed, 1), skipped={}, note="")
