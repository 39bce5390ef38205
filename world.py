"""A small game with exact cameras and actions: scenes, renderer, characters, clock and explorer.

Paper: §4 (Unreal-Gen: scenes, tick-synchronised capture, navmesh + RL explorer, modular characters). Not released.

    d = F + τ·R,  τ = u/a              heading of a pixel; a, b: forward and up part of the rays of its row
    1/t = (F + τ·R)_k / (w − p)_k      inverse distance to the wall at w: linear in τ, exact in every pixel
    1/t = (b/a) / (h − eye)            inverse distance to floor or ceiling: constant along a row
    the larger 1/t is seen; z-depth = t/a                                                       render()
    pose′ = slide(step_pose(pose, action))      frame, camera, player, action of ONE tick       World.tick()
    Δw = η·(G − baseline)·∇ log π_w    where to go next is learned: REINFORCE on coverage G     train_explorer()

Conventions are camera.py's (OpenCV axes, metres, floor y = 0, eye y = -1.6, action t leads to frame t + 1). A frame
depends on its own float32 camera only: stored cameras render the same bits again. The walk cycle of a figure follows
from where it stands, so its pose is all that must be stored. A scene belongs to the split of its seed (SPLITS).

Not Unreal: one wall height per cell, only the player moves, no roll, |pitch| <= 35°. Ours where the paper is silent:
soft low-frequency paint (a small VAE must learn it), the features, the behaviours. numpy, but for one call of torch.
Demo: python world.py      Tests: pytest tests/test_world.py
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator

from camera import ARM, DEGREES, LIFT, TILT, intrinsics, pose_to_c2w, step_pose
from game.explore import POLICY, NavMesh, choose, explore
from game.figure import N_CHARACTERS as N_CHARACTERS
from game.render import MAX_PITCH, bake, render
from game.scene import CEILING, EYE, RADIUS, SPLITS, Scene, make_scene
from game.scene import scene_caption as scene_caption

Actions = list[
    tuple[tuple[int, ...], tuple[float, float]]
]  # six keys and mouse (pitch, yaw) of every tick

# ---- clock -----------------------------------------------------------------------------------------------------------


def cameras(
    scene: Scene, player: ndarray, view: str = "first"
) -> ndarray:  # (T, 5) -> (T, 4, 4), exact in float32
    """The camera of a player: in the eye, or on a spring arm behind it that shortens before it enters a wall."""
    pose = np.array(player, np.float64)
    if view == "third":
        pitch, yaw = (
            np.radians(np.clip(pose[:, 3] - TILT, -MAX_PITCH, MAX_PITCH)),
            np.radians(pose[:, 4]),
        )
        back = -np.stack(
            [np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)], 1
        )
        arm = np.linspace(0, ARM, 57)
        point = pose[:, None, :3] + (0, -LIFT, 0) + arm[:, None] * back[:, None]  # (T, 57, 3)
        blocked = (-point[..., 1] < 0.3) | (not scene.outdoor) & (-point[..., 1] > CEILING - 0.25)
        for corner in ((-0.2, -0.2), (-0.2, 0.2), (0.2, -0.2), (0.2, 0.2)):
            i, j = (
                np.clip(point[..., (0, 2)] + corner, 0, len(scene.solid) - 1)
                .astype(int)
                .transpose(2, 0, 1)
            )
            blocked |= scene.solid[i, j]
        last = np.where(blocked.any(1), blocked.argmax(1) - 1, len(arm) - 1).clip(0)
        pose = np.concatenate(
            [point[np.arange(len(pose)), last], np.degrees(pitch)[:, None], pose[:, 4:]], 1
        )
    return pose_to_c2w(torch.from_numpy(pose)).numpy().astype(np.float32).astype(np.float64)


class World:
    """The game: a player in a scene. What a tick returns was copied before anything moved.
    pose None: somewhere free, as the seed says. size: pixels of a square frame, 0 draws none."""

    def __init__(
        self,
        scene: Scene,
        view: str = "first",
        character: int = 0,
        pose: Sequence[float] | None = None,
        seed: int = 0,
        size: int = 0,
    ) -> None:
        self.scene, self.view, self.character, self.size, self.time = (
            scene,
            view,
            character,
            size,
            0,
        )
        self.grid, self.nav, rng = (
            scene.solid.tolist(),
            NavMesh(scene),
            np.random.default_rng([scene.seed, seed]),
        )
        x, z = self.nav.point(*rng.choice(self.nav.cells))
        self.pose = (
            (x, -EYE, z, 0.0, 1.5 * int(rng.integers(240)))
            if pose is None
            else tuple(map(float, pose))
        )
        i, j = math.floor(self.pose[0]), math.floor(self.pose[2])
        if (
            view not in ("first", "third")
            or not (0 <= min(i, j) <= max(i, j) < len(self.grid))
            or self.grid[i][j]
        ):
            raise ValueError(
                f"view must be first or third, got {view!r}; x, z must be a free cell, got {self.pose[::2]}"
            )

    def move(self, keyboard: Sequence[float], mouse: Sequence[float]) -> bool:
        """step_pose, then push the body out of the walls it entered, so that it slides. True: it touched one."""
        x, y, z, pitch, yaw = step_pose(self.pose, keyboard, mouse, MAX_PITCH)
        touched = False
        for _ in range(3):  # a corner pushes twice
            for i in range(int(x - RADIUS), int(x + RADIUS) + 1):
                for j in range(int(z - RADIUS), int(z + RADIUS) + 1):
                    dx, dz = (
                        x - min(max(x, i), i + 1),
                        z - min(max(z, j), j + 1),
                    )  # from the nearest point of the cell
                    gap = math.hypot(dx, dz)
                    if self.grid[i][j] and 0 < gap < RADIUS - 1e-9:
                        x, z, touched = (
                            x + dx / gap * (RADIUS - gap),
                            z + dz / gap * (RADIUS - gap),
                            True,
                        )
            if not touched:
                break
        self.pose, self.time = (x, y, z, pitch, yaw), self.time + 1
        return touched

    def tick(self, keyboard: Sequence[float], mouse: Sequence[float]) -> dict:
        """Frame t and the action that leaves it; then the game is at t + 1."""
        player = np.array([self.pose], np.float32).astype(np.float64)
        record = {
            "time": self.time,
            "player": player[0],
            "c2w": cameras(self.scene, player, self.view)[0],
            "keyboard": np.array(keyboard, np.uint8),
            "mouse": np.array(mouse, np.float32),
        }
        if self.size:
            K, figure = (
                intrinsics(self.size, self.size).numpy(),
                (player, self.character) if self.view == "third" else None,
            )
            frame, depth = render(self.scene, record["c2w"][None], K, self.size, self.size, figure)
            record |= {"frame": frame[0], "depth": depth[0]}
        record["contact"] = self.move(record["keyboard"].tolist(), record["mouse"].tolist())
        return record


def stop_at_walls(
    scene: Scene, pose: Sequence[float], keyboard: ndarray, mouse: ndarray
) -> ndarray:  # (n, 6), (n, 2) -> (n, 6)
    """The same keys without the steps that would touch a wall: who imagines a known world stays in its rooms.

    No training clip was ever taken inside or behind a wall. A walk that begins there goes on as it likes.
    """
    start = tuple(float(value) for value in pose)
    player = World(scene, pose=start, size=0)
    still = [0.0] * 6
    if player.move(still, [0.0, 0.0]):
        return keyboard
    player.pose = start
    kept = keyboard.copy()
    for t, (keys, turn) in enumerate(zip(keyboard.tolist(), mouse.tolist(), strict=True)):
        here = player.pose
        if player.move(keys, turn):
            kept[t, :4] = 0
            player.pose = step_pose(here, still, turn, MAX_PITCH)
    return kept


# ---- behaviour -------------------------------------------------------------------------------------------------------


NONE, W, S, A, D, WA, WD = (
    (*map(int, keys), 0, 0) for keys in ("0000", "1000", "0100", "0010", "0001", "1010", "1001")
)
STILL = (0.0, 0.0)
FACING = {
    0: W,
    45: WA,
    -45: WD,
    90: A,
    -90: D,
    180: S,
}  # looking so many degrees to the right of the way: which keys
MIXTURE = {"rl": 0.3, "walk": 0.15, "loop": 0.3, "palindrome": 0.15, "random": 0.1}


def undo(actions: Actions) -> Actions:  # reversed, W and S, A and D exchanged, mouse negated
    return [((k[1], k[0], k[3], k[2], *k[4:]), (-m[0], -m[1])) for k, m in reversed(actions)]


def _figure(world: World, rng: Generator) -> Actions:
    """A short figure that ends where it began; where it would leave the navmesh, it turns back."""
    speed = float(rng.choice((-0.4, -0.3, -0.2, 0.2, 0.3, 0.4)))
    once, hold, k = (
        round(360 / DEGREES / abs(speed)),
        [(NONE, STILL)] * int(rng.integers(2, 12)),
        int(rng.integers(10, 34)),
    )
    away, tilt = (
        [(NONE, (0.0, speed))] * k,
        [(NONE, (math.copysign(0.2, speed), 0.0))] * int(rng.integers(2, 7)),
    )
    step = [((A, D, S)[int(rng.integers(3))], STILL)] * (k // 2)
    actions = [
        [*away, *hold, *undo(away)],  # look away and back
        [(NONE, (0.0, speed))] * once,  # once around on the spot
        [*tilt, *hold, *undo(tilt)],  # look up or down and back
        [(W, (0.0, speed))] * once,  # walk a circle
        [(A if speed > 0 else D, (0.0, speed))] * once,  # walk around a point, looking at it
        [*step, *hold, *undo(step)],  # side step and back
    ][rng.choice(6, p=(0.32, 0.14, 0.16, 0.12, 0.13, 0.13))]
    pose = world.pose
    for k, (keys, mouse) in enumerate(actions):
        pose = step_pose(pose, keys, mouse)
        if not world.nav.holds(pose[0], pose[2]):
            return actions[:k] + undo(actions[:k])
    return actions


def _go(world: World, rng: Generator, goal: tuple[float, float]) -> Iterator:
    """Follow the navmesh; turn by multiples of 1.5 degrees; sometimes look sideways or walk backwards."""
    facing, fastest = (
        int(rng.choice(list(FACING), p=(0.7, 0.07, 0.07, 0.06, 0.06, 0.04))),
        int(rng.integers(2, 5)),
    )
    for x, z in world.nav.path((world.pose[0], world.pose[2]), goal):
        for _ in range(400):
            dx, dz = x - world.pose[0], z - world.pose[2]
            if math.hypot(dx, dz) < 0.3:
                break
            error = (math.degrees(math.atan2(dx, dz)) + facing - world.pose[4] + 180) % 360 - 180
            units = max(-fastest, min(fastest, round(error / 1.5)))
            yield (
                FACING[facing] if abs(error) < (30 if math.hypot(dx, dz) > 1 else 12) else NONE,
                (0.0, units / 10),
            )


def _tour(world: World, rng: Generator, weights: ndarray, again: bool = False) -> Iterator:
    """Go where the explorer says, look around, go on; or visit a few places near the start again and again."""
    seen, nav, (x, _, z, _, _) = world.scene.solid.copy(), world.nav, world.pose
    near = nav.cells[np.abs(np.hypot(*(nav.cells * nav.cell - (x, z)).T) - rng.uniform(2, 4)) < 1.5]
    stops = [
        (x, z),
        *(nav.point(*cell) for cell in rng.permutation(near)[: int(rng.integers(1, 4))]),
    ]
    while True:
        if rng.random() < 0.55:
            yield from _figure(world, rng)
        here, yaw = (int(world.pose[0]), int(world.pose[2])), math.radians(world.pose[4])
        stops += (
            [stops.pop(0)]
            if again
            else [tuple(k + 0.5 for k in choose(world.scene, seen, here, yaw, weights, rng)[0][-1])]
        )
        yield from _go(world, rng, stops[-1])


def _palindrome(
    walk: Iterator, half: int
) -> Iterator:  # then undo every action: frame 2·half − t repeats frame t
    way = []
    for _, action in zip(range(half), walk, strict=False):
        way.append(action)
        yield action
    yield from undo(way)
    yield from walk


def _random(rng: Generator) -> Iterator:  # keys and turns held for twelve ticks, walls or not
    while True:
        keys = (NONE, W, W, W, S, A, D, WA, WD)[int(rng.integers(9))]
        yield from [(keys, (0.0, float(rng.choice((0, 0, 0.1, 0.2, 0.3, -0.1, -0.2, -0.3)))))] * 12


def simulate(
    scene: Scene, seed: int, frames: int = 241, behaviour: str | None = None, view: str = "first"
) -> dict:
    """A whole walk, to be rendered later; behaviour: one of MIXTURE, None draws one. -> c2w (T, 4, 4) and player (T, 5) f64
    exact in float32, keyboard (T, 6) u8, mouse (T, 2) f32, contact (T,), behaviour. Action t leads to frame t + 1."""
    rng = np.random.default_rng([scene.seed, seed, 7])
    behaviour = behaviour or str(rng.choice(list(MIXTURE), p=list(MIXTURE.values())))
    if behaviour not in MIXTURE:
        raise ValueError(
            f"behaviour must be one of {', '.join(MIXTURE)} or None, got {behaviour!r}"
        )
    world = World(scene, view, seed=seed)
    plan = (
        _tour(world, rng, POLICY * (behaviour != "walk"), behaviour == "loop")
        if behaviour != "random"
        else _random(rng)
    )
    plan = _palindrome(plan, (frames - 1) // 2) if behaviour == "palindrome" else plan
    poses, contact = [world.pose], np.zeros(frames, bool)
    keyboard, mouse = np.zeros((frames, 6), np.uint8), np.zeros((frames, 2), np.float32)
    for t in range(frames - 1):
        keyboard[t], mouse[t] = next(plan)
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


scene_of = functools.lru_cache(maxsize=64)(make_scene)


def eyes(
    meta: dict, player: np.ndarray
) -> np.ndarray:  # (T, 5) → (T, 4, 4): the camera of a player there
    return cameras(scene_of(**meta["scene"]), player, meta.get("view", "first"))


def true_views(
    meta: dict, c2w: np.ndarray | None, H: int, W: int, player: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What any camera (B, 4, 4) sees in the world an episode was recorded in: frames (B, H, W, 3) uint8, depth (B, H, W) metres.
    In third person the figure is drawn where `player` (B, 5) stands, and left out without it. c2w None: the player's own camera."""
    if "scene" not in meta:
        raise ValueError(
            f"only episodes of the embedded world can be rendered again; this one comes from {meta.get('source')}"
        )
    players = (
        (player, meta["character"]) if player is not None and meta.get("view") == "third" else None
    )
    return render(
        scene_of(**meta["scene"]),
        eyes(meta, player) if c2w is None else c2w,
        intrinsics(H, W).numpy(),
        H,
        W,
        players,
    )


def true_frames(
    meta: dict, c2w: np.ndarray | None, H: int, W: int, player: np.ndarray | None = None
) -> np.ndarray:  # (B, H, W, 3) uint8
    return true_views(meta, c2w, H, W, player)[0]


if __name__ == "__main__":
    place, start = make_scene(SPLITS["test"][2]), (0.0, -EYE, 0.0, 0.0, 0.0)
    walk = simulate(place, seed=0, frames=129, behaviour="palindrome")
    for side, view in ((64, "first"), (64, "third"), (128, "first"), (128, "third")):
        camera, figure = (
            cameras(place, walk["player"], view),
            (walk["player"], 0) if view == "third" else None,
        )
        K, _, began = intrinsics(side, side).numpy(), bake(place), time.process_time()
        render(place, camera, K, side, side, figure, supersample=1)
        print(
            f"{side}x{side}, {view} person: {len(camera) / (time.process_time() - began):.0f} frames/s"
        )
    print(
        f"there and back in 128 steps: {math.dist(walk['player'][0], walk['player'][-1]):.1e} m from home"
    )
    circle = reduce(lambda pose, _: step_pose(pose, W, (0.0, 0.1)), range(240), start)
    print(f"a circle of 240 steps closes to {math.dist(circle[:3], start[:3]):.1e} m")
    for name, weights in (
        ("random walk", None),
        ("random waypoints", np.zeros(4)),
        ("learned explorer", POLICY),
    ):
        share = [
            explore(make_scene(seed), weights, np.random.default_rng(seed))[0]
            for seed in SPLITS["test"][:16]
        ]
        print(f"{name}: covers {np.mean(share):.2f} of 16 unseen places in 120 steps")
