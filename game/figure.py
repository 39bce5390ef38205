"""Characters from a number, and how they are drawn.

A character is seven boxes, torso, head, hat, two legs, two arms, each with three bands of colour.
Its number is read digit by digit in mixed radix, one digit per choice, so every number is a
character and every character one number: more than 10¹⁰ of them.

A ray o + λ·d meets a box of half sizes h between two planes per axis, at λ = (±h − o)/d. It is
inside of the box where it is inside of all three slabs:

    enter = max over axes of the smaller λ,  leave = min of the larger;  hit if enter < leave     (1)

Every box has its own frame, in which it is a box at rest: the hinge is the origin, and legs and arms
swing about it by an angle that depends on where the figure stands and on nothing else. So a figure is
drawn the same again from its stored pose.
Tests: pytest tests/test_figure.py tests/test_world.py
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from game import scene

f32 = np.float32
SKINS = scene.rgb("fadcc0 eec09a d8a878 b98860 96684a 74503a 543a2c 3c2a22")
HAIRS = scene.rgb("241c1a 6a4428 c89a50 a84a28 b8b8b8")
SHOES = scene.rgb("201e20 5c3a26 f0f0ec b03030 2a4a8a 3c6e3c d8b03c 8a8a90")
SLOTS = dict(
    skin=8,
    hair=10,
    hat=9,
    torso=12,
    colour=16,
    legs=16,
    shoes=8,
    arms=6,
    pattern=6,
    height=5,
    build=5,
)
N_CHARACTERS = math.prod(SLOTS.values())  # 15,925,248,000
NO_HAT = (0.001, 0.001, 0.001)
BRIMS = [NO_HAT, (0.2, 0.03, 0.2), (0.125, 0.1, 0.135)]  # half sizes


def character(number: int) -> dict[str, int]:
    """One digit per slot."""
    if not 0 <= number < N_CHARACTERS:
        raise ValueError(f"a character is a number from 0 to {N_CHARACTERS - 1}, got {number}")
    digits = {}
    for slot, size in SLOTS.items():
        number, digits[slot] = divmod(number, size)
    return digits


# ---- seven boxes -------------------------------------------------------------------------------------------


class Box(NamedTuple):
    hinge: tuple  # x, y, z in metres from the feet: where it hangs
    middle: float  # metres below the hinge
    half: tuple  # half sizes
    swing: float  # how far, and to which side it swings
    bands: tuple  # three colours from bottom to top
    ends: tuple  # where the first two end, as shares of the height


class Body(NamedTuple):
    boxes: Box  # every field an array, (7, ...)
    trim: ndarray  # colour of what is printed on the torso
    pattern: int  # what is printed there


@lru_cache(256)
def body(number: int) -> Body:
    who = character(number)
    tall = 0.86 + 0.07 * who["height"]
    wide = 0.8 + 0.1 * who["build"]
    trim = scene.TRIMS[[0, 1, 2, 6]][who["torso"] % 4]
    boxes = [*upper_body(who, wide, trim), *limbs(who, wide, trim)]

    columns = [np.array(column, f32) for column in zip(*boxes, strict=True)]
    stacked = Box(*columns)
    stacked = stacked._replace(
        hinge=stacked.hinge * tall,
        middle=stacked.middle * tall,
        half=stacked.half * f32((1, tall, 1)),
    )
    return Body(stacked, trim, who["pattern"])


def upper_body(who: dict[str, int], wide: float, trim: ndarray) -> list[Box]:
    """Torso, head, hat."""
    cloth = scene.WALLS[who["colour"]]
    skin = SKINS[who["skin"]]
    hair = HAIRS[who["hair"] % 5]
    cap = scene.TRIMS[[6, 4, 5, 0]][who["hat"] % 4]
    brim = BRIMS[(who["hat"] + 3) // 4]
    hem = 0.18 + 0.16 * (who["torso"] // 4)
    locks = (0.72, 0.38)[who["hair"] // 5]

    chest = (0.21 * wide, 0.31, 0.125 * wide)
    return [
        Box((0, 1.12, 0), 0, chest, 0, (trim, cloth, cloth), (hem, 1)),
        Box((0, 1.58, 0), 0, (0.12, 0.15, 0.13), 0, (skin, skin, hair), (0.1, locks)),
        Box((0, 1.74, 0), 0, brim, 0, (cap, cap, cap), (0, 1)),
    ]


def limbs(who: dict[str, int], wide: float, trim: ndarray) -> list[Box]:
    """Two legs, two arms; an arm swings against the leg of its side."""
    skin = SKINS[who["skin"]]
    sleeve = (scene.WALLS[who["colour"]], trim)[who["arms"] % 2]
    trousers = scene.WALLS[who["legs"]] * 0.75
    shoe = SHOES[who["shoes"]]
    bare = (0.18, 0.45, 0.75)[who["arms"] // 2]  # share of the arm
    leg = wide * 0.09
    arm = wide * 0.065

    found = []
    for side in (-1, 1):
        hip = (side * 0.1 * wide, 0.83, 0)
        colours = (shoe, trousers, trousers)
        found.append(Box(hip, 0.415, (leg, 0.415, leg), side, colours, (0.2, 1)))
    for side in (-1, 1):
        shoulder = (side * (0.21 * wide + arm), 1.4, 0)
        colours = (skin, skin, sleeve)
        found.append(Box(shoulder, 0.32, (arm, 0.32, arm), -side, colours, (0.1, bare)))
    return found


# ---- drawing -----------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """The part of the picture in which a figure can be, and the rays through it."""

    rows: slice
    columns: slice
    eye: ndarray  # (3,) the camera, from the feet, in the player's frame: x right, y up
    ray: ndarray  # (3, h, w): z-depth λ is at eye + λ·ray


def draw_player(
    rgb: ndarray,  # (3, H, W) colours, drawn into
    inverse: ndarray,  # (H, W) 1/z-depth, drawn into
    c2w: ndarray,
    K: ndarray,
    pose: ndarray,  # (5,) of the player
    number: int,
) -> None:
    """Where a box is nearer than what is there, it is seen."""
    x, _, z, _, yaw = map(float, pose)
    window = window_of(rgb.shape[1:], c2w, K, (x, z, yaw))
    if window is None:
        return
    colours = rgb[:, window.rows, window.columns]
    depth = inverse[window.rows, window.columns]
    draw_shadow(colours, depth, window)
    draw_boxes(colours, depth, window, body(number), walk_cycle(x, z))


def window_of(size: tuple, c2w: ndarray, K: ndarray, at: tuple) -> Window | None:
    """None: out of sight, or so close that it would fill the view."""
    x, z, yaw = at
    H, W = size
    eye = c2w[:3, 3]
    cx, cy, cz = c2w[:3, :3].T @ ((x, -0.9, z) - eye)  # the middle of the body, from the camera
    u = (np.arange(W) + 0.5 - K[2]) / K[0]
    v = (np.arange(H) + 0.5 - K[3]) / K[1]
    reach = max(cz - 0.45, 0.25)
    columns = np.flatnonzero(np.abs(u - cx / cz) < 0.6 / reach)
    rows = np.flatnonzero(np.abs(v - cy / cz) < 1.15 / reach)
    if cz < 0.7 or not len(columns) or not len(rows):
        return None

    sin = math.sin(math.radians(yaw))
    cos = math.cos(math.radians(yaw))
    turn = np.array([[cos, 0, -sin], [0, -1, 0], [sin, 0, cos]])  # world -> player
    pixels = np.broadcast_arrays(u[columns], v[rows][:, None], 1.0)
    ray = np.tensordot(turn @ c2w[:3, :3], np.stack(pixels), 1)
    return Window(
        rows=slice(rows[0], rows[-1] + 1),
        columns=slice(columns[0], columns[-1] + 1),
        eye=turn @ (eye - (x, 0, z)),
        ray=not_zero(ray).astype(f32),
    )


def not_zero(x: ndarray) -> ndarray:
    """So that it can be divided by."""
    return np.where(np.abs(x) < 1e-6, x.dtype.type(1e-6), x)


def draw_shadow(colours: ndarray, inverse: ndarray, window: Window) -> None:
    """Dark ground at the feet."""
    eye = window.eye
    ray = window.ray
    floor = -ray[1] / f32(eye[1])  # 1/z-depth of the ground
    x = eye[0] + ray[0] / floor
    z = eye[2] + ray[2] / floor
    soft = 0.5 * np.exp(-(x**2 + z**2) / 0.1)
    on_ground = np.abs(inverse - floor) < 1e-3
    colours *= 1 - np.where(on_ground, soft, 0).astype(f32)


def walk_cycle(x: float, z: float) -> float:
    """The angle of the legs, from the place alone."""
    return 0.55 * math.sin(2 * math.pi * (x + 0.62 * z) / 1.5)


def draw_boxes(colours: ndarray, inverse: ndarray, window: Window, who: Body, angle: float) -> None:
    boxes = who.boxes

    # the rays in the frame of every box
    to_box = rotations(angle * boxes.swing)
    origin = np.einsum("kij,kj->ki", to_box, window.eye.astype(f32) - boxes.hinge)
    origin[:, 1] += boxes.middle
    ray = not_zero(np.einsum("kij,jhw->kihw", to_box, window.ray))

    # where each ray enters and leaves each box
    one = (-1 * boxes.half - origin)[:, :, None, None] / ray
    two = (1 * boxes.half - origin)[:, :, None, None] / ray
    enter = np.minimum(one, two).max(1)  # (7, h, w)
    leave = np.maximum(one, two).min(1)
    met = (enter < leave) & (enter > 0)  # (1)
    enter = np.where(met, enter, f32(scene.FAR))
    nearest = enter.argmin(0)
    hit = enter.min(0)

    # only where that is in front of the scene
    i, j = np.nonzero(1 / hit > inverse)
    box = nearest[i, j]
    hit = hit[i, j]
    point = origin[box] + hit[:, None] * ray[box, :, i, j]
    point = point / boxes.half[box]  # (pixels, 3), from -1 to 1
    colours[:, i, j] = (paint(who, box, point) * 255).T
    inverse[i, j] = 1 / hit


def rotations(angle: ndarray) -> ndarray:
    """(7,) -> (7, 3, 3): about the x axis, to the right of the player."""
    sin = np.sin(angle)
    cos = np.cos(angle)
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = cos
    turn[:, 1, 2] = sin
    turn[:, 2, 1] = -sin
    turn[:, 2, 2] = cos
    return turn.astype(f32)


def paint(who: Body, box: ndarray, point: ndarray) -> ndarray:
    """The colours of points on boxes: (pixels, 3)."""
    x = point[:, 0]
    y = point[:, 1]
    height = (y + 1)[:, None] / 2
    band = (height > who.boxes.ends[box]).sum(1)  # bottom, middle or top
    colour = who.boxes.bands[box, band]

    prints = (  # positive where printed
        -1 + 0 * x,  # nothing
        0.3 - np.abs(x),  # a stripe down
        np.sin(9 * y),  # stripes across
        0.45 - np.hypot(x, y - 0.3),  # a disc
        np.sin(4 * x + 5 * y),  # slanting stripes
        x,  # one half
    )
    on_chest = (box == 0) & (band == 1)
    colour[(prints[who.pattern] > 0) & on_chest] = who.trim

    light = f32((0.8, 1, 0.9))  # of faces to the side, up and down, ahead
    face = np.abs(point).argmax(1)
    return colour * light[face][:, None]
