"""A small game with exact cameras and actions: scenes, renderer, characters, clock and explorer.

What it does. `simulate` walks a player through a scene and stores camera, player and action of
every tick; `true_views` renders what any camera would see there. Scenes, pictures, figures and
walks are made in game/.
Paper: §4, where Unreal is the game: many scenes, all streams captured at the same tick,
explorers that follow a navigation mesh or have learnt where to go, characters put together from
parts. Not released.

Why it works. A world model learns from four streams: frames, cameras, players and actions. At every
t all four must belong to the same moment. A recorder of somebody else's game has to find out which
do. Our own game has one clock, and writes all four down before anything moves. Then it is t + 1:

    pose[t+1] = slide(step(pose[t], action[t]))                                                  (1)

`step` is camera.py's and knows no walls, `slide` corrects it. The body is a disc of radius R. Let
g be the distance from its centre to the nearest point of a solid cell, and n the direction from
that point to the centre. Where g < R, the body is R − g too deep in the wall, and is pushed out
along n:

    p' = p + (R − g)·n                                                                           (2)

What the step did along the wall remains, so the player slides. Where (2) moved anything, the pose
is not what the action alone would have made of it: such a tick is marked as `contact`.

In third person the camera hangs on an arm behind the player's eye, and comes closer where a wall,
the floor or the ceiling is in its way:

    camera = eye + (0, −LIFT, 0) + s·back                                                        (3)

where back points away from what is looked at, and s is the last of 57 lengths before the first
blocked one.

A frame depends on its own camera alone, in third person also on where the figure stands; and
cameras are rounded to float32 before anything is drawn with them. So a camera that was stored
draws the same frame again, to the bit:

    c2w = float32(matrix(float32(pose)))                                                         (4)

How far the figure's legs have swung follows from where it stands, so its pose is all that is
stored. A scene follows from its seed, and a seed belongs to one split (SPLITS): a place seen in
training is never a place of the test.

What differs. It is not Unreal: one wall height per cell, only the player moves, cameras do not
roll and look up or down by 35° at most. Ours where the paper is silent: paint without fine
detail, since a small VAE must learn it; what the explorer looks at; how often which walk is
taken.
Try it: python world.py      Tests: pytest tests/test_world.py
"""

import functools
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray

from camera import ARM, LIFT, TILT, intrinsics, pose_to_c2w, step_pose
from game.explore import POLICY, NavMesh, explore
from game.figure import N_CHARACTERS as N_CHARACTERS
from game.render import MAX_PITCH, bake, render
from game.scene import CEILING, EYE, RADIUS, SPLITS, Scene, make_scene
from game.scene import KINDS as KINDS
from game.scene import scene_caption as scene_caption
from game.walks import MIXTURE, W, plan

ARM_LENGTHS = np.linspace(0, ARM, 57)  # metres: where along its arm a camera may stop
# metres along x and z: the corners of a square about the camera, which must all be free of walls
ROUND_THE_CAMERA = ((-0.2, -0.2), (-0.2, 0.2), (0.2, -0.2), (0.2, 0.2))


# ---- cameras -----------------------------------------------------------------------------------------------


def cameras(scene: Scene, player: ndarray, view: str = "first") -> ndarray:
    """The cameras of a player: (T, 5) -> (T, 4, 4), exact in float32."""
    pose = np.array(player, np.float64)
    if view == "third":
        pose = on_spring_arm(scene, pose)
    c2w = pose_to_c2w(torch.from_numpy(pose)).numpy()
    return c2w.astype(np.float32).astype(np.float64)  # (4), of a rounded pose


def on_spring_arm(scene: Scene, pose: ndarray) -> ndarray:
    """Poses of the eye -> poses of a camera on a spring arm that shortens before it enters a wall."""
    pitch = np.radians(np.clip(pose[:, 3] - TILT, -MAX_PITCH, MAX_PITCH))
    yaw = np.radians(pose[:, 4])
    ahead = [np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)]
    back = -np.stack(ahead, 1)

    # all places where it may stop, from the player outwards
    top = pose[:, None, :3] + (0, -LIFT, 0)  # y points down
    points = top + ARM_LENGTHS[:, None] * back[:, None]  # (T, 57, 3)

    # argmax is the first that is blocked; the one before it is free, and the end of a free arm, too
    is_blocked = blocked(scene, points)
    last_free = np.where(is_blocked.any(1), is_blocked.argmax(1) - 1, len(ARM_LENGTHS) - 1)
    place = points[np.arange(len(pose)), last_free.clip(0)]  # (3)
    return np.concatenate([place, np.degrees(pitch)[:, None], pose[:, 4:]], 1)


def blocked(scene: Scene, points: ndarray) -> ndarray:
    """Is a camera at these points (..., 3) too near to floor, ceiling or a wall?"""
    height = -points[..., 1]  # y points down
    found = height < 0.3
    if not scene.outdoor:
        found |= height > CEILING - 0.25
    for corner in ROUND_THE_CAMERA:
        cell = np.clip(points[..., (0, 2)] + corner, 0, len(scene.solid) - 1).astype(int)
        found |= scene.solid[cell[..., 0], cell[..., 1]]
    return found


# ---- the clock ---------------------------------------------------------------------------------------------


class World:
    """The game: a player in a scene, and a clock that moves on with every `tick`."""

    def __init__(
        self,
        scene: Scene,
        view: str = "first",
        character: int = 0,
        pose: Sequence[float] | None = None,  # None: somewhere free, as the seed says
        seed: int = 0,
        size: int = 0,  # pixels of a square frame; 0 draws none
    ) -> None:
        self.scene = scene
        self.view = view
        self.character = character
        self.size = size
        self.time = 0
        self.grid = scene.solid.tolist()
        self.nav = NavMesh(scene)
        self.pose = self.somewhere(seed) if pose is None else tuple(map(float, pose))
        self.check()

    def somewhere(self, seed: int) -> tuple[float, ...]:
        """A pose in the middle of a free cell, looking anywhere: a multiple of 1.5 degrees."""
        rng = np.random.default_rng([self.scene.seed, seed])
        x, z = self.nav.point(*rng.choice(self.nav.cells))
        return x, -EYE, z, 0.0, 1.5 * int(rng.integers(240))

    def check(self) -> None:
        """A view that there is, and a player who does not begin inside a wall or outside the scene."""
        if self.view not in ("first", "third"):
            raise ValueError(f"view must be first or third, got {self.view!r}")
        x, z = self.pose[0], self.pose[2]
        i, j = math.floor(x), math.floor(z)
        inside = 0 <= min(i, j) and max(i, j) < len(self.grid)
        if not inside or self.grid[i][j]:
            raise ValueError(f"x, z must be a free cell, got {x}, {z}")

    def move(self, keyboard: Sequence[float], mouse: Sequence[float]) -> bool:
        """Take the step, then slide along the walls it entered. True: it touched one."""
        pose = step_pose(self.pose, keyboard, mouse, MAX_PITCH)
        touched = False
        # out of one wall may be into another: in a corner it is pushed twice
        for _ in range(3):
            pose, pushed = self.push_out(pose)
            if not pushed:
                break
            touched = True
        self.pose = pose  # (1)
        self.time += 1
        return touched

    def push_out(self, pose: tuple[float, ...]) -> tuple[tuple[float, ...], bool]:
        """Out of every solid cell that the body, a disc, has entered."""
        x, y, z, pitch, yaw = pose
        touched = False
        for i in range(int(x - RADIUS), int(x + RADIUS) + 1):
            for j in range(int(z - RADIUS), int(z + RADIUS) + 1):
                # from the nearest point of the cell
                dx = x - min(max(x, i), i + 1)
                dz = z - min(max(z, j), j + 1)
                gap = math.hypot(dx, dz)
                if self.grid[i][j] and 0 < gap < RADIUS - 1e-9:
                    x += dx / gap * (RADIUS - gap)  # (2)
                    z += dz / gap * (RADIUS - gap)
                    touched = True
        return (x, y, z, pitch, yaw), touched

    def tick(self, keyboard: Sequence[float], mouse: Sequence[float]) -> dict:
        """Frame t and the action that leaves it; then the game is at t + 1."""
        player = np.array([self.pose], np.float32).astype(np.float64)
        c2w = cameras(self.scene, player, self.view)
        record = {
            "time": self.time,
            "player": player[0],
            "c2w": c2w[0],
            "keyboard": np.array(keyboard, np.uint8),
            "mouse": np.array(mouse, np.float32),
        }
        if self.size:
            K = intrinsics(self.size, self.size).numpy()
            shown = (player, self.character) if self.view == "third" else None
            frame, depth = render(self.scene, c2w, K, self.size, self.size, shown)
            record |= {"frame": frame[0], "depth": depth[0]}
        record["contact"] = self.move(record["keyboard"].tolist(), record["mouse"].tolist())
        return record


def stop_at_walls(
    scene: Scene, pose: Sequence[float], keyboard: ndarray, mouse: ndarray
) -> ndarray:  # (n, 6), (n, 2) -> (n, 6)
    """The same keys without the steps that would touch a wall.

    For play in a world that is known: a model imagines it, and knows nothing of walls. No training
    clip was taken inside or behind one, so what it would draw there is no world at all.
    """
    start = tuple(float(value) for value in pose)
    still = [0.0] * 6
    player = World(scene, pose=start, size=0)
    # a walk that begins in a wall already would never leave it: it may do what it likes
    if player.move(still, [0.0, 0.0]):
        return keyboard

    player.pose = start
    kept = keyboard.copy()
    for t, (keys, turn) in enumerate(zip(keyboard.tolist(), mouse.tolist(), strict=True)):
        here = player.pose
        if player.move(keys, turn):
            # w a s d are let go; the look remains
            kept[t, :4] = 0
            player.pose = step_pose(here, still, turn, MAX_PITCH)
    return kept


def simulate(
    scene: Scene, seed: int, frames: int = 241, behaviour: str | None = None, view: str = "first"
) -> dict:
    """A whole walk, without a picture: those can be rendered later.

    behaviour names how the player walks, one of MIXTURE; None draws one. What is returned, with
    T = frames:

        c2w       (T, 4, 4) float64, though every number is one that float32 has
        player    (T, 5) likewise: x, y, z, pitch and yaw of the player's eye
        keyboard  (T, 6) uint8, and
        mouse     (T, 2) float32: action t leads from frame t to t + 1; the last is none
        contact   (T,) bool: action t led into a wall, and the player was pushed out of it
    """
    rng = np.random.default_rng([scene.seed, seed, 7])
    behaviour = behaviour or str(rng.choice(list(MIXTURE), p=list(MIXTURE.values())))
    if behaviour not in MIXTURE:
        allowed = ", ".join(MIXTURE)
        raise ValueError(f"behaviour must be one of {allowed} or None, got {behaviour!r}")

    world = World(scene, view, seed=seed)
    actions = plan(world, rng, behaviour, steps=frames - 1)
    keyboard = np.zeros((frames, 6), np.uint8)
    mouse = np.zeros((frames, 2), np.float32)
    contact = np.zeros(frames, bool)
    poses = [world.pose]
    for t in range(frames - 1):
        keyboard[t], mouse[t] = next(actions)
        contact[t] = world.move(keyboard[t].tolist(), mouse[t].tolist())
        poses.append(world.pose)

    player = np.array(poses, np.float32).astype(np.float64)
    return {
        "c2w": cameras(scene, player, view),
        "player": player,
        "keyboard": keyboard,
        "mouse": mouse,
        "contact": contact,
        "behaviour": behaviour,
    }


# ---- the truth about a recorded episode --------------------------------------------------------------------

scene_of = functools.lru_cache(maxsize=64)(make_scene)


def eyes(meta: dict, player: ndarray) -> ndarray:
    """The cameras of this episode's player, by its view: (T, 5) -> (T, 4, 4)."""
    return cameras(scene_of(**meta["scene"]), player, meta.get("view", "first"))


def true_views(
    meta: dict, c2w: ndarray | None, H: int, W: int, player: ndarray | None = None
) -> tuple[ndarray, ndarray]:
    """What any camera (B, 4, 4) sees in the world an episode was recorded in.

    Frames (B, H, W, 3) uint8 and depth (B, H, W) in metres. In third person the figure is drawn
    where `player` (B, 5) stands, and left out without it. c2w None: the player's own camera.
    """
    if "scene" not in meta:
        origin = f"this one comes from {meta.get('source')}"
        raise ValueError(f"only episodes of the embedded world can be rendered again; {origin}")
    shown = None
    if player is not None and meta.get("view") == "third":
        shown = player, meta["character"]
    if c2w is None:
        c2w = eyes(meta, player)
    return render(scene_of(**meta["scene"]), c2w, intrinsics(H, W).numpy(), H, W, shown)


def true_frames(
    meta: dict, c2w: ndarray | None, H: int, W: int, player: ndarray | None = None
) -> ndarray:
    """Those frames alone: (B, H, W, 3) uint8."""
    return true_views(meta, c2w, H, W, player)[0]


# ---- demo --------------------------------------------------------------------------------------------------


def frames_per_second(scene: Scene, player: ndarray, view: str, size: int) -> float:
    """How fast one core draws; every pixel is sampled once, so that edges are hard."""
    c2w = cameras(scene, player, view)
    K = intrinsics(size, size).numpy()
    shown = (player, 0) if view == "third" else None
    bake(scene)
    began = time.process_time()
    render(scene, c2w, K, size, size, shown, supersample=1)
    return len(c2w) / (time.process_time() - began)


def shares_explored(weights: ndarray | None, count: int) -> list[float]:
    """The shares of the free cells that an explorer sees in 120 steps, in places that it never saw."""
    shares = []
    for i in range(count):
        scene = scene_of(SPLITS["test"][i])
        share, _ = explore(scene, weights, np.random.default_rng(i))
        shares.append(share)
    return shares


def demo() -> None:
    """A walk that undoes itself, a circle that closes, and how fast it is all drawn and explored."""
    place = make_scene(SPLITS["test"][2])
    walk = simulate(place, seed=0, frames=129, behaviour="palindrome")
    first, middle, last = walk["player"][[0, 64, 128]]
    home = math.dist(first, last)
    away = math.dist(first[:3], middle[:3])
    print(f"64 actions, and undone: {home:.1e} m from home, {away:.1f} m away in between")

    pose = (0.0, -EYE, 0.0, 0.0, 0.0)
    farthest = 0.0
    for _ in range(240):
        pose = step_pose(pose, W, (0.0, 0.1))
        farthest = max(farthest, math.hypot(pose[0], pose[2]))
    left = math.hypot(pose[0], pose[2])
    print(f"240 steps of 1.5 degrees: a circle {farthest:.1f} m wide that closes to {left:.1e} m")

    for view in ("first", "third"):
        speed = frames_per_second(place, walk["player"], view, 64)
        print(f"64x64, {view} person: {speed:.0f} frames/s drawn, 16 frames/s are played")

    explorers = {"learned": POLICY, "random waypoints": np.zeros(4), "a random walk": None}
    print("16 unseen places, 120 steps: how much of them is seen")
    for name, weights in explorers.items():
        print(f"    {name:16} {np.mean(shares_explored(weights, 16)):.2f}")


if __name__ == "__main__":
    demo()
