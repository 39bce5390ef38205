"""Characters from a number, and how they are drawn."""

import math
from functools import lru_cache

import numpy as np
from numpy import ndarray

from game import scene

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


def character(number: int) -> dict[str, int]:
    """A number in mixed radix, one digit per slot."""
    if not 0 <= number < N_CHARACTERS:
        raise ValueError(f"a character is a number from 0 to {N_CHARACTERS - 1}, got {number}")
    return {
        slot: number // math.prod(list(SLOTS.values())[:k]) % size
        for k, (slot, size) in enumerate(SLOTS.items())
    }


@lru_cache(256)
def _body(number: int) -> tuple:
    """Seven boxes: torso, head, hat, two legs, two arms; each with three bands of colour from bottom to top."""
    who = character(number)
    tall, wide = 0.86 + 0.07 * who["height"], 0.8 + 0.1 * who["build"]
    cloth, trim = scene.WALLS[who["colour"]], scene.TRIMS[[0, 1, 2, 6]][who["torso"] % 4]
    skin, hair, shoe, leg = (
        SKINS[who["skin"]],
        HAIRS[who["hair"] % 5],
        SHOES[who["shoes"]],
        scene.WALLS[who["legs"]] * 0.75,
    )
    sleeve, cap = (cloth, trim)[who["arms"] % 2], scene.TRIMS[[6, 4, 5, 0]][who["hat"] % 4]
    brim = [(0.001, 0.001, 0.001), (0.2, 0.03, 0.2), (0.125, 0.1, 0.135)][(who["hat"] + 3) // 4]
    hem, bare, locks = (
        0.18 + 0.16 * (who["torso"] // 4),
        (0.18, 0.45, 0.75)[who["arms"] // 2],
        (0.72, 0.38)[who["hair"] // 5],
    )
    limb, arm = wide * 0.09, wide * 0.065
    boxes = [  # hinge (x, y, z), middle below the hinge, half sizes, swing, bands, where the bands end
        ((0, 1.12, 0), 0, (0.21 * wide, 0.31, 0.125 * wide), 0, (trim, cloth, cloth), (hem, 1)),
        ((0, 1.58, 0), 0, (0.12, 0.15, 0.13), 0, (skin, skin, hair), (0.1, locks)),
        ((0, 1.74, 0), 0, brim, 0, (cap, cap, cap), (0, 1)),
        *(
            ((x * 0.1 * wide, 0.83, 0), 0.415, (limb, 0.415, limb), x, (shoe, leg, leg), (0.2, 1))
            for x in (-1, 1)
        ),
        *(
            (
                (x * (0.21 * wide + arm), 1.4, 0),
                0.32,
                (arm, 0.32, arm),
                -x,
                (skin, skin, sleeve),
                (0.1, bare),
            )
            for x in (-1, 1)
        ),
    ]
    hinge, middle, half, swing, bands, ends = (
        np.array(part, np.float32) for part in zip(*boxes, strict=True)
    )
    return (
        hinge * tall,
        middle * tall,
        half * np.float32((1, tall, 1)),
        swing,
        bands,
        ends,
        trim,
        who["pattern"],
    )


def draw_player(
    rgb: ndarray, inverse: ndarray, c2w: ndarray, K: ndarray, pose: ndarray, number: int
) -> None:
    """Slab test of seven boxes inside the figure's part of the image, in the player's own frame (x right, y up)."""
    hinge, middle, half, swing, bands, ends, trim, pattern = _body(number)
    x, _, z, _, yaw = map(float, pose)
    sin, cos = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
    turn = np.array([[cos, 0, -sin], [0, -1, 0], [sin, 0, cos]])
    o = turn @ (c2w[:3, 3] - (x, 0, z))  # camera, from the feet
    cx, cy, cz = c2w[:3, :3].T @ ((x, -0.9, z) - c2w[:3, 3])
    u, v = (
        (np.arange(rgb.shape[2]) + 0.5 - K[2]) / K[0],
        (np.arange(rgb.shape[1]) + 0.5 - K[3]) / K[1],
    )
    reach = max(cz - 0.45, 0.25)
    columns, rows = (
        np.flatnonzero(np.abs(u - cx / cz) < 0.6 / reach),
        np.flatnonzero(np.abs(v - cy / cz) < 1.15 / reach),
    )
    if cz < 0.7 or not len(columns) or not len(rows):  # too close it would fill the view
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    d = np.tensordot(
        turn @ c2w[:3, :3], np.stack(np.broadcast_arrays(u[columns], v[rows][:, None], 1.0)), 1
    )
    d = np.where(np.abs(d) < 1e-6, 1e-6, d).astype(np.float32)  # (3, h, w); z-depth λ is at o + λ·d
    back, colours, floor = inverse[window], rgb[:, window[0], window[1]], -d[1] / np.float32(o[1])
    soft = 0.5 * np.exp(
        -((o[0] + d[0] / floor) ** 2 + (o[2] + d[2] / floor) ** 2) / 0.1
    )  # the shadow at the feet
    colours *= 1 - np.where(np.abs(back - floor) < 1e-3, soft, 0).astype(np.float32)
    angle = (
        0.55 * math.sin(2 * math.pi * (x + 0.62 * z) / 1.5) * swing
    )  # a walk cycle from the place alone
    (s, c), o_, l_ = np.stack([np.sin(angle), np.cos(angle)]), np.zeros(7), np.ones(7)
    to_box = np.stack([l_, o_, o_, o_, c, s, o_, -s, c], 1).reshape(7, 3, 3).astype(np.float32)
    origin = np.einsum("kij,kj->ki", to_box, o.astype(np.float32) - hinge)
    origin[:, 1] += middle
    ray = np.einsum("kij,jhw->kihw", to_box, d)
    ray = np.where(np.abs(ray) < 1e-6, np.float32(1e-6), ray)
    one, two = ((side * half - origin)[:, :, None, None] / ray for side in (-1, 1))
    enter, leave = np.minimum(one, two).max(1), np.maximum(one, two).min(1)  # (7, h, w)
    enter = np.where((enter < leave) & (enter > 0), enter, np.float32(scene.FAR))
    box, hit = enter.argmin(0), enter.min(0)
    i, j = np.nonzero(1 / hit > back)
    box, hit = box[i, j], hit[i, j]
    point = (origin[box] + hit[:, None] * ray[box, :, i, j]) / half[box]  # (pixels, 3) in [-1, 1]
    px, py = point[:, 0], point[:, 1]
    band = ((py + 1)[:, None] / 2 > ends[box]).sum(1)  # bottom, middle or top
    paint = bands[box, band]
    print_ = (
        -1 + 0 * px,
        0.3 - np.abs(px),
        np.sin(9 * py),
        0.45 - np.hypot(px, py - 0.3),
        np.sin(4 * px + 5 * py),
        px,
    )[pattern]
    paint[(print_ > 0) & (box == 0) & (band == 1)] = trim
    colours[:, i, j] = (paint * np.float32((0.8, 1, 0.9))[np.abs(point).argmax(1)][:, None] * 255).T
    back[i, j] = 1 / hit
