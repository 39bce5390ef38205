"""The world: places, pictures, figures, the clock and the explorer, each with what it promises."""

import dataclasses
import math
import time

import numpy as np
import pytest
from helpers import character_id

import world
from camera import intrinsics, step_pose
from game import figure, paint, walks
from game import render as render_file
from game.explore import NavMesh
from game.render import render
from game.scene import CEILING, EYE, KINDS, RADIUS, bordered, make_scene
from world import World, cameras, simulate

START = (0.0, -EYE, 0.0, 0.0, 0.0)
NOTHING = ((0,) * 6, (0.0, 0.0))


def lens(size):
    return intrinsics(size, size).numpy()


def draw(scene, c2w, size, players=None, rays=1):
    """Pictures and depth of square views."""
    return render(scene, c2w, lens(size), size, size, players, supersample=rays)


def psnr(a, b):
    error = np.square(a.astype(np.float64) - b).mean()
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def poses_in(scene, count, seed=0, pitch=0.0):
    """Somewhere free, looking anywhere."""
    rng = np.random.default_rng(seed)
    nav = NavMesh(scene)
    cells = nav.cells[rng.integers(len(nav.cells), size=count)]
    inside = rng.random((count, 2))
    poses = np.zeros((count, 5))
    poses[:, [0, 2]] = (cells + inside) * nav.cell
    poses[:, 1] = -EYE
    poses[:, 3] = pitch
    poses[:, 4] = rng.uniform(-180, 180, count)
    return poses.astype(np.float32).astype(np.float64)


def rays(c2w, size):
    """The ways of all pixels: (4, 4) -> (size, size, 3), z-depth 1."""
    u = (np.arange(size) + 0.5) / (size / 2) - 1
    pixels = np.broadcast_arrays(u, u[:, None], 1.0)
    return np.stack(pixels, -1) @ c2w[:3, :3].T


# ---- renderer


def empty_room():
    """From 1 to 11 metres in x and z, 3 metres high."""
    cells = np.zeros((12, 12), int)
    return dataclasses.replace(
        make_scene(0, "rooms"),
        solid=bordered(12),
        region=cells,
        height=np.full((12, 12), 3, np.float32),
    )


@pytest.mark.parametrize("pitch", [0.0, 20.0, -20.0])
def test_depth_matches_the_closed_form(pitch):
    room = empty_room()
    yaws = (0.0, 33.0, 90.0, -140.0, 179.9)
    poses = np.array([(4.3, -1.6, 6.1, pitch, yaw) for yaw in yaws])
    c2w = cameras(room, poses)
    _, depth = draw(room, c2w, 64)
    low = np.array([1, -3, 1])
    high = np.array([11, 0, 11])
    for camera, seen in zip(c2w, depth, strict=True):
        d = rays(camera, 64)
        plane = np.where(d > 0, high, low)
        true = ((plane - camera[:3, 3]) / d).min(-1)  # the first of the six
        close = np.abs(seen - true) < 1e-5 * true
        # tilted: a corner may choose the wrong wall
        assert close.mean() > (0.9999 if pitch == 0 else 0.99)


def test_tilted_rays_agree_with_level_ones():
    """The level form is the exact one; the general form at no tilt must show the same picture."""
    for kind in KINDS:
        scene = make_scene(3, kind)
        level = poses_in(scene, 8)
        tilted = level + (0, 0, 0, 1e-3, 0)
        _, one = draw(scene, cameras(scene, level), 64)
        _, two = draw(scene, cameras(scene, tilted), 64)
        alike = np.abs(one / two - 1) < 1e-2
        assert alike.mean() > 0.98


def test_looking_up_shows_more_sky():
    scene = make_scene(2, "plaza")
    pose = poses_in(scene, 1)[0]
    sky = []
    for pitch in (-30, 0, 30):
        tilted = pose + (0, 0, 0, pitch, 0)
        c2w = cameras(scene, [tilted])
        _, depth = draw(scene, c2w, 64, rays=2)
        sky.append((depth > 500).mean())
    assert sky[0] < sky[1] < sky[2] - 0.1


def reprojected(c2w, depth, other):
    """Where another camera sees the points of a picture (64, 64): row, column, distance."""
    point = c2w[:3, 3] + rays(c2w, 64) * depth[..., None]
    seen = (point - other[:3, 3]) @ other[:3, :3]
    x, y, z = np.moveaxis(seen, -1, 0)
    row = np.floor(32 + 32 * y / z).astype(int)
    column = np.floor(32 + 32 * x / z).astype(int)
    return row, column, z


@pytest.mark.parametrize("kind", KINDS)
def test_reprojection_agrees_where_both_cameras_see(kind):
    scene = make_scene(5, kind)
    poses = poses_in(scene, 6, seed=4)
    c2w = cameras(scene, poses)
    other = cameras(scene, poses + (0.25, 0, 0.2, 0, 9))
    rgb, depth = draw(scene, c2w, 64)
    rgb2, depth2 = draw(scene, other, 64)
    agree = []
    errors = []
    for k in range(6):
        i, j, z = reprojected(c2w[k], depth[k], other[k])
        inside = (np.minimum(i, j) >= 0) & (np.maximum(i, j) < 64)
        both = inside & (z > 0.1) & (depth[k] < 500)
        i, j, z = (x[both] for x in (i, j, z))
        seen = depth2[k][i, j]
        ratio = seen / z
        same = np.abs(ratio - 1) < 0.08
        visible = (ratio > 0.92).sum()  # what is nearer hides it
        agree.append(same.sum() / max(1, visible))
        error = rgb[k][both].astype(float) - rgb2[k][i, j]
        errors.append(np.square(error[same]).mean())
    assert np.mean(agree) >= 0.9
    assert 10 * math.log10(255**2 / np.mean(errors)) >= 25


@dataclasses.dataclass
class Seen:
    """The pixels of many views: (40, 32, 32, ...)."""

    rgb: np.ndarray
    way: np.ndarray  # of the ray
    point: np.ndarray  # in the world
    flat: np.ndarray  # how far that is along the ground
    forward: np.ndarray  # and along the heading of the view

    def where(self, mask):
        fields = [getattr(self, field.name)[mask] for field in dataclasses.fields(self)]
        return Seen(*fields)


def seen_points(scene, pitch):
    c2w = cameras(scene, poses_in(scene, 40, seed=1, pitch=pitch))
    rgb, depth = draw(scene, c2w, 32)
    way = np.stack([rays(camera, 32) for camera in c2w])
    step = way * depth[..., None]
    per_pixel = c2w[:, None, None]
    eye = per_pixel[..., :3, 3]
    heading = per_pixel[..., :3, 2] * (1, 0, 1)
    heading /= np.linalg.norm(heading, axis=-1, keepdims=True)
    forward = (step * heading).sum(-1)
    flat = np.hypot(step[..., 0], step[..., 2])
    return Seen(rgb, way, eye + step, flat, forward)


def in_the_middle(x):
    """Of its texel, so that rounding can't fetch the next one."""
    return np.abs(x - np.floor(x) - 0.5) < 0.47


def share_shown(seen, image, fog, place, density):
    """Of the pixels whose texel, and its size, are beyond doubt: how many have its colour, dimmed.

    place: row and column of the full picture; density: texels per pixel.
    """
    agree = []
    sure = np.abs(np.log2(density) % 1 - 0.5) < 0.48
    finest = np.floor(np.log2(np.maximum(density, 1)))
    for level in range(3):
        mean = paint.shrink(image, 2**level)
        row, column = (at / 2**level for at in place)
        some = sure & (finest == level) & in_the_middle(row) & in_the_middle(column)
        i = row[some].astype(int)
        j = column[some].astype(int)
        clear = 1 / (1 + (seen.flat[some] / render_file.FOG) ** 2)
        bright = mean[:, i, j].T - fog
        expected = 255 * (bright * clear[:, None] + fog)
        error = np.abs(seen.rgb[some] - expected)
        agree.append(error.max(-1) < 1)
    counts = [len(part) for part in agree]
    assert min(counts) > 300, counts
    return np.concatenate(agree).mean()


@pytest.mark.parametrize("pitch, share", [(0.0, 0.999), (15.0, 0.98)])
def test_a_wall_shows_the_texel_that_was_painted_there(monkeypatch, pitch, share):
    """Column: the face's first, and 16 per metre along z (faces to ±x) or x (faces to ±z).

    Row: 16 per metre upwards.
    """
    scene = make_scene(0, "rooms")
    size = 3, CEILING * 16, 16 * (scene.faces.max() + 1)
    image = np.random.default_rng(0).random(size, np.float32)
    monkeypatch.setattr(paint, "paint_walls", lambda scene: image)
    everything = seen_points(scene, pitch)
    above = -everything.point[..., 1]
    between = (above > 0.01) & (above < CEILING - 0.01)
    for axis in (0, 2):
        at = everything.point[..., axis]
        off = np.abs(at - np.rint(at))
        on_line = (off < 1e-4) & (everything.way[..., axis] != 0)
        seen = everything.where(between & on_line)

        # the solid cell behind the line, and which of its faces looks at the camera
        back = seen.way[..., axis] < 0  # it looks to +x or +z
        across = np.rint(seen.point[..., axis]).astype(int) - back
        along = seen.point[..., 2 - axis]
        cell = [across, along.astype(int)]
        i, j = cell if axis == 0 else reversed(cell)
        face = scene.faces[axis + back, i, j]
        assert (face >= 0).mean() > share
        assert {*back} == {True, False}

        place = 16 * -seen.point[..., 1], 16 * (face + along % 1)
        agree = share_shown(seen, image, scene.style["fog"], place, seen.forward)
        assert agree > share, (axis, agree)


@pytest.mark.parametrize("above", [0, CEILING])
def test_floor_and_ceiling_show_the_texel_that_was_painted_there(monkeypatch, above):
    """Row: 16 per metre along x. Column: 16 per metre along z."""
    scene = make_scene(0, "rooms")
    n = 16 * len(scene.solid)
    pictures = np.random.default_rng(0).random((2, 3, n, n), np.float32)
    monkeypatch.setattr(paint, "paint_ground", lambda scene: list(pictures))
    seen = seen_points(scene, 0.0)
    seen = seen.where(np.abs(seen.point[..., 1] + above) < 1e-4)
    x, _, z = 16 * seen.point.T
    foreshortened = np.sqrt(np.maximum(seen.forward / EYE, 1))
    image = pictures[1 if above else 0]
    density = seen.forward * foreshortened
    agree = share_shown(seen, image, scene.style["fog"], (x, z), density)
    assert agree > 0.999, agree


@pytest.mark.parametrize("pitch", [0.0, 15.0])
def test_the_sky_shows_the_texel_of_its_heading_and_height(monkeypatch, pitch):
    """Row: h/(1 + h), h the tangent of the elevation. Column: the heading, clockwise from +z."""
    scene = make_scene(2, "plaza")
    sky = np.random.default_rng(0).random((3, *paint.SKY), np.float32)
    monkeypatch.setattr(paint, "paint_sky", lambda scene: sky)
    everything = seen_points(scene, pitch)
    seen = everything.where(everything.forward > 999)
    x, down, z = seen.way.T
    rise = -down / np.hypot(x, z)
    rows, columns = paint.SKY
    row = rise / (1 + rise) * rows
    column = np.arctan2(x, z) / (2 * np.pi) * columns % columns
    sure = in_the_middle(row) & in_the_middle(column)
    expected = 255 * sky[:, row[sure].astype(int), column[sure].astype(int)].T  # no fog in the sky
    agree = np.abs(seen.rgb[sure] - expected).max(-1) < 1
    assert len(agree) > 3000
    assert agree.mean() > 0.999


@pytest.mark.parametrize(
    "kind, view",
    [
        ("rooms", "first"),
        ("maze", "third"),
        ("plaza", "third"),
        ("street", "first"),
    ],
)
def test_a_frame_redrawn_from_its_stored_camera_is_identical(kind, view):
    scene = make_scene(8, kind)
    walk = simulate(scene, 1, 65, "loop", view)
    shown = (walk["player"], 77) if view == "third" else None
    rgb, depth = draw(scene, walk["c2w"], 64, shown, rays=2)

    stored = walk["c2w"].astype(np.float32)
    player = walk["player"].astype(np.float32)
    # alone, in another order, in another batch
    same = make_scene(8, kind)
    for rows in ([40], [3, 64, 17], list(range(20, 37))):
        shown = (player[rows], 77) if view == "third" else None
        again, deep = draw(same, stored[rows], 64, shown, rays=2)
        assert np.array_equal(again, rgb[rows])
        assert np.array_equal(deep, depth[rows])


def test_supersampling_is_the_mean_of_a_finer_picture():
    scene = make_scene(1)
    c2w = cameras(scene, poses_in(scene, 3))
    smooth, depth = draw(scene, c2w, 32, rays=2)
    fine, deep = draw(scene, c2w, 64)
    mean = fine.reshape(3, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(smooth - mean).max() <= 1.5
    inverse = paint.shrink(1 / deep, 2)
    assert np.allclose(1 / depth, inverse, rtol=1e-4)


def test_cameras_that_cannot_be_drawn_are_named():
    scene = make_scene(0)
    pose = poses_in(scene, 1)
    steep = cameras(scene, pose + (0, 0, 0, 50, 0))
    with pytest.raises(ValueError, match="keep .pitch. <= 35"):
        draw(scene, steep, 64)
    rolled = cameras(scene, pose)
    roll = [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]
    rolled[0, :3, :3] = rolled[0, :3, :3] @ roll
    with pytest.raises(ValueError, match="without roll"):
        draw(scene, rolled, 64)
    with pytest.raises(ValueError, match="kind must be one of rooms, maze, plaza, street"):
        make_scene(0, "forest")


def test_rendering_is_fast_enough_to_make_data():
    """Soft: 2,000 frames/s at 64x64 are the aim on one quiet core; a quarter of it must hold anywhere."""
    scene = make_scene(2)
    c2w = cameras(scene, poses_in(scene, 64))
    draw(scene, c2w[:16], 64)
    began = time.process_time()
    draw(scene, c2w, 64)
    assert 64 / (time.process_time() - began) > 500


# ---- characters


def seen_from_behind(scene):
    """A player, (1, 5), whose camera has room for a long arm."""
    for pose in poses_in(scene, 50):
        c2w = cameras(scene, [pose], "third")
        if math.dist(c2w[0, :3, 3], pose[:3]) > 2.7:
            return pose[None], c2w
    raise AssertionError("no such place")


@pytest.mark.long
def test_every_character_slot_changes_pixels():
    scene = make_scene(2, "plaza")
    player, c2w = seen_from_behind(scene)
    plain = dict.fromkeys(figure.SLOTS, 0)
    for slot, size in figure.SLOTS.items():
        printed = {"pattern": 1} if slot == "torso" else {}  # the trim shows in a print
        looks = set()
        for k in range(size):
            number = character_id(plain | printed | {slot: k})
            rgb, _ = draw(scene, c2w, 256, (player, number))
            looks.add(rgb.tobytes())
        assert len(looks) == size, f"{slot} has values that look alike"


def test_the_player_is_seen_in_third_person_only():
    scene = make_scene(6)
    shown = []
    for view in ("first", "third"):
        game = World(scene, view, character=123_456_789, seed=3, size=64)
        record = game.tick(*NOTHING)
        empty, _ = draw(scene, record["c2w"][None], 64, rays=2)
        changed = (record["frame"] != empty[0]).any(-1)
        shown.append(changed.mean())
    assert shown[0] == 0
    assert shown[1] > 0.005


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_the_camera_is_never_inside_a_wall(kind, seed):
    scene = make_scene(seed, kind)
    player = poses_in(scene, 50, seed, pitch=10.0 - 5 * seed)
    c2w = cameras(scene, player, "third")
    eye = c2w[:, :3, 3]
    x, y, z = eye.T
    for gap in (-0.1, 0.1):
        i = (x + gap).astype(int)
        assert not scene.solid[i, z.astype(int)].any()
        j = (z + gap).astype(int)
        assert not scene.solid[x.astype(int), j].any()
    assert (y < 0).all()
    assert scene.outdoor or (y > -CEILING).all()

    # it is not the eye of the player, and it looks at the player
    away = np.linalg.norm(eye - player[:, :3], axis=1)
    assert (away > 0.1).all()
    body = player[:, :3] + (0, 0.6, 0) - eye
    right, down, ahead = np.einsum("nji,nj->in", c2w[:, :3, :3], body)
    far = away > 1.5
    sideways = np.abs(right / ahead)
    upwards = np.abs(down / ahead)
    assert (sideways[far] < 1).all()
    assert (upwards[far] < 1).all()


# ---- clock


def test_a_tick_records_frame_camera_player_and_action_of_one_moment():
    scene = make_scene(4)
    game = World(scene, seed=1, size=64)
    keys = (1, 0, 0, 0, 0, 0)
    turn = (0.0, 0.2)
    for t in range(5):
        before = game.pose
        record = game.tick(keys, turn)
        assert record["time"] == t
        assert np.allclose(record["player"], before, atol=1e-6)
        assert game.pose != before
        frame, _ = draw(scene, cameras(scene, [before]), 64, rays=2)
        assert np.array_equal(record["frame"], frame[0])
        assert record["keyboard"].tolist() == list(keys)
        assert np.allclose(record["mouse"], turn)


def errors_of_step(walk, shift):
    """How far every free step ends from where it should: metres, metres, tens of degrees."""
    keyboard = walk["keyboard"].tolist()
    mouse = walk["mouse"].tolist()
    player = walk["player"]
    errors = []
    for t in range(2, 238):
        if not walk["contact"][t]:
            pose = step_pose(player[t], keyboard[t + shift], mouse[t + shift])
            errors.append(pose - player[t + 1])
    x_z_yaw = np.abs(errors)[:, (0, 2, 4)]
    return x_z_yaw / (1, 1, 10)


def test_the_stored_action_explains_the_next_pose():
    for kind in KINDS:
        walk = simulate(make_scene(9, kind), 5, 241)
        assert errors_of_step(walk, 0).max() < 1e-5
        for shift in (-1, 1):  # one tick early or late must show
            assert (errors_of_step(walk, shift).max(1) > 1e-3).mean() > 0.05


def test_steps_into_a_wall_are_not_taken_and_all_others_are():
    scene = make_scene(3, "rooms")
    start = tuple(poses_in(scene, 1)[0])
    keyboard = np.zeros((400, 6), np.float32)
    mouse = np.zeros((400, 2), np.float32)
    keyboard[:, 0] = 1
    mouse[200:, 1] = 0.1  # straight into a wall, then along it, turning
    kept = world.stop_at_walls(scene, start, keyboard, mouse)
    assert 0 < kept[:, 0].sum() < 400
    assert keyboard.all(0)[0]  # what was given is as it was

    player = World(scene, pose=start, size=0)
    rows = list(zip(kept.tolist(), mouse.tolist(), strict=True))
    assert not any(player.move(keys, turn) for keys, turn in rows)
    pose = start
    for keys, turn in rows:
        pose = step_pose(pose, keys, turn, render_file.MAX_PITCH)
    assert math.dist(pose, player.pose) < 1e-9  # what the model integrates is where the game is

    free = world.stop_at_walls(scene, start, 0 * keyboard, mouse)
    assert not free.any()


def test_a_walk_that_begins_in_a_wall_is_left_alone():
    scene = make_scene(3, "rooms")
    inner = scene.solid[1:-1, 1:-1]
    i, j = np.argwhere(inner)[0] + 1
    keyboard = np.ones((8, 6), np.float32)
    mouse = np.zeros((8, 2), np.float32)
    touching = (i + 0.5, -EYE, j + 1.1, 0.0, 0.0)
    player = World(scene, pose=touching, size=0)
    assert player.move([0.0] * 6, [0.0, 0.0])
    kept = world.stop_at_walls(scene, touching, keyboard, mouse)
    assert np.array_equal(kept, keyboard)


def test_actions_then_inverses_return_home():
    rng = np.random.default_rng(0)
    pose = START
    done = []
    for _ in range(50):
        keys = tuple(rng.integers(0, 2, 6).tolist())
        turn = tuple(rng.uniform(-0.4, 0.4, 2).tolist())
        done += [(keys, turn)] * 12
    for keys, turn in done + walks.undo(done):
        pose = step_pose(pose, keys, turn)
    assert math.dist(pose, START) < 1e-9


def test_a_circle_closes_across_the_yaw_seam():
    pose = start = (0.0, -EYE, 0.0, 0.0, 170.0)
    for _ in range(240):
        pose = step_pose(pose, walks.W, (0.0, 0.1))
    assert math.dist(pose[:3], start[:3]) < 1e-9  # the released formula: 0.247 m
    assert abs(pose[4] - 530) < 1e-9


def test_the_room_looks_the_same_on_return():
    for seed, kind in enumerate(KINDS):
        scene = make_scene(seed, kind)
        walk = simulate(scene, 0, 121, "palindrome")
        assert not walk["contact"].any()
        rgb, _ = draw(scene, walk["c2w"], 64, rays=2)
        for k in range(61):
            assert psnr(rgb[60 - k], rgb[60 + k]) > 50


def test_a_player_slides_along_a_wall_and_is_flagged():
    scene = make_scene(0, "rooms")
    game = World(scene, pose=(1.5, -1.6, 1.5, 0.0, -60.0))
    touched = []
    for _ in range(20):
        record = game.tick(walks.W, (0.0, 0.0))
        touched.append(record["contact"])
    x, _, z, _, _ = game.pose
    assert touched[-1]
    assert abs(x - 1 - RADIUS) < 1e-6
    assert z > 2
    with pytest.raises(ValueError, match="must be a free cell"):
        World(scene, pose=START)
    with pytest.raises(ValueError, match="view must be first or third"):
        World(scene, "second")


# ---- navmesh, explorer, behaviour


def test_walks_explore_without_touching_and_come_back():
    contact = []
    revisits = []
    behaviours = ("rl", "walk", "loop", "palindrome")
    for seed in range(8):
        walk = simulate(make_scene(seed), 2, 241, behaviours[seed // 2])
        contact.append(walk["contact"].mean())
        place = walk["player"][:, (0, 2)]
        yaw = walk["player"][:, 4]
        near = np.linalg.norm(place[:, None] - place, axis=-1) < 1.5
        turn = (yaw[:, None] - yaw + 180) % 360 - 180
        again = np.tril(near & (np.abs(turn) < 30), -57)  # at least 57 frames later
        revisits.append(again.any(1)[57:].mean())
        assert np.abs(walk["mouse"]).max() <= 0.41
        assert np.abs(walk["player"][:, 3]).max() <= 20
    assert np.mean(contact) < 0.01
    assert np.mean(revisits) > 0.3


def test_simulation_is_repeatable_and_quick():
    scene = make_scene(3)
    one = simulate(scene, 9)
    two = simulate(make_scene(3), 9)
    assert all(np.array_equal(one[key], two[key]) for key in one)
    assert not np.array_equal(one["player"], simulate(scene, 10)["player"])
    assert not one["keyboard"][-1].any()
    stored = one["c2w"].astype(np.float32)
    assert stored.astype(np.float64).tobytes() == one["c2w"].tobytes()
    began = time.process_time()
    for seed in range(5):
        simulate(scene, seed, 241)
    assert 5 * 241 / (time.process_time() - began) > 2000
    with pytest.raises(
        ValueError, match="behaviour must be one of rl, walk, loop, palindrome, random"
    ):
        simulate(scene, 0, behaviour="dance")
