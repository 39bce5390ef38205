"""The page that needs no server: its JavaScript against the chapters that it mirrors, then real browsers."""

import base64
import functools
import http.server
import json
import math
import queue
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import camera
import export
import flow
import memory
import realtime
import released
from context import Window, query_offsets
from dataset.chords import latents_of
from engine import cli
from engine.actors import Plan
from engine.exported import HashedDenoiser, gaussian
from engine.parts import Options

ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT / "web"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node, which runs the page's JavaScript")
CELLS = 16 * 8 * 8  # numbers of one latent
FRESH = 10


def javascript(program: str, given: object = None) -> object:
    """What a module's body returns, run by node beside the page's files; `given` comes in as JSON."""
    frame = """
        import { readFileSync } from "node:fs";
        const given = JSON.parse(readFileSync(0, "utf8"));
        const answer = await (async () => { %s })();
        process.stdout.write(JSON.stringify(answer));
    """
    imports = "".join(
        f'import * as {name} from "./{name}.js";'
        for name in ("camera", "context", "flow", "game", "memory", "session", "walk")
    )
    done = subprocess.run(
        [NODE, "--input-type=module", "-e", imports + frame % program],
        cwd=WEB,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def random_walk(frames: int, seed: int = 0) -> list[str]:
    """Chords that last for eight frames each; some of them stand still."""
    chords = ["w", "w+l", "a+j", "s", "d+i", "w+k", "l", "_", "w+d+j"]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(chords), (frames // 8 + 1,), generator=generator)
    return [chords[pick] for pick in picks for _ in range(8)][:frames]


def poses_of(chords: list[str]) -> torch.Tensor:
    keyboard, mouse = camera.actions_from_keys(chords)
    return camera.integrate((0, -1.6, 0, 0, 0), keyboard, mouse, Options.max_pitch)


# ---- camera.js ---------------------------------------------------------------------------------------------

WALK = """
    const poses = [camera.START_POSE];
    for (const chord of given) poses.push(camera.stepPose(poses.at(-1), camera.actionOf(chord)));
    return poses;
"""


@needs_node
def test_keys_lead_where_they_lead_in_python() -> None:
    chords = random_walk(2000) + ["i"] * 100  # against the limit of looking up
    got = torch.tensor(javascript(WALK, chords), dtype=torch.float64)
    torch.testing.assert_close(got, poses_of(chords), atol=1e-9, rtol=0)


@needs_node
def test_the_released_walk_is_walked_as_released() -> None:
    golden = load_file(ROOT / "tests/golden/camera.safetensors")
    actions = [
        {"keyboard": keys, "mouse": turn}
        for keys, turn in zip(golden["keyboard"].tolist(), golden["mouse"].tolist(), strict=True)
    ]
    program = """
        const poses = [[0, 0, 0, 0, 0]];
        for (const action of given) poses.push(camera.stepPose(poses.at(-1), action, Infinity));
        return poses.map(camera.poseToC2w);
    """
    cameras = torch.tensor(javascript(program, actions[:-1]), dtype=torch.float64).view(-1, 4, 4)
    theirs = released.from_released(golden["extrinsics"].double())
    assert (cameras[:, :3, :3] - theirs[:, :3, :3]).abs().max() < 1e-4, "its angles are float32"
    far = (cameras[:, :3, 3] - theirs[:, :3, 3]).abs().max()
    assert far < 3e-3, "its diagonal step is rounded to 8.73 cm"


@needs_node
def test_rays_are_the_same_to_float32() -> None:
    poses = poses_of(random_walk(40))
    cameras = camera.pose_to_c2w(poses[1:]).view(1, 10, 4, 4, 4)
    anchor = cameras[:, 3, -1]
    K = camera.intrinsics(8, 8)
    expected = camera.anchored_rays(cameras, anchor, K, 8, 8)
    program = """
        const cameras = given.cameras.map((four) => four.map((c2w) => c2w.flat()));
        return [...camera.anchoredRays(cameras, given.anchor.flat(), 8, 8)];
    """
    got = javascript(program, {"cameras": cameras[0].tolist(), "anchor": anchor[0].tolist()})
    torch.testing.assert_close(torch.tensor(got).view(expected.shape), expected, atol=2e-6, rtol=0)


@needs_node
def test_the_way_home_ends_where_it_began() -> None:
    program = "return [given, camera.invert(given)].flat();"
    there_and_back = javascript(program, random_walk(200))
    end = poses_of(there_and_back)[-1]
    assert (end - poses_of([])[0]).abs().max() < 1e-6


# ---- memory.js ---------------------------------------------------------------------------------------------


@needs_node
def test_points_of_a_view_and_overlaps() -> None:
    points = torch.tensor(javascript("return memory.frustumPoints();")).T
    expected = memory.uniform_points(256)
    torch.testing.assert_close(points, expected, atol=4e-6, rtol=0)

    cameras = camera.pose_to_c2w(poses_of(random_walk(1600, 1))[::80]).float()
    expected = memory.overlap(cameras, cameras)
    program = """
        const cameras = given.map((c2w) => c2w.flat());
        return cameras.map((query) => cameras.map((old) => memory.overlap(query, old)));
    """
    got = torch.tensor(javascript(program, cameras.tolist()))
    assert (got - expected).abs().max() <= 1 / 256, "one point on the edge of a view may fall aside"
    assert ((got - expected).abs() > 0).float().mean() < 0.02


@needs_node
@pytest.mark.parametrize("sink", [True, False])
def test_the_same_frames_are_remembered(sink: bool) -> None:
    poses = poses_of(random_walk(1600, 2))
    four = camera.pose_to_c2w(poses[1:]).view(-1, 4, 4, 4).float()
    bank = memory.MemoryBank()
    bank.append(torch.randn(16, len(four), 1, 1), four, torch.arange(1, len(four) + 1))
    program = """
        const bank = new memory.MemoryBank();
        given.cameras.forEach((four, k) => bank.append(null, four.map((c2w) => c2w.flat()), k + 1));
        return given.ends.map((end) => {
          const asking = context.queryOffsets(10).map((back) => given.cameras[end - back][3].flat());
          return bank.retrieve(asking, end - 13, given.sink).map((row) => [row.time, row.score]);
        });
    """
    ends = list(range(60, 400, 17))
    given = {"cameras": four.tolist(), "ends": ends, "sink": sink}
    answers = javascript(program, given)
    for end, answer in zip(ends, answers, strict=True):
        asking = four[[end - back for back in query_offsets(10, 5)], -1]
        slots, scores = bank.retrieve(asking, end - 13, sink=sink)
        times, overlaps = zip(*answer, strict=True)
        assert np.abs(scores.numpy() - overlaps).max() <= 2 / 256
        if [*times] != bank.read(slots).times[0].tolist():
            # a tie that one point decides: what is chosen instead is as good
            assert np.abs(np.array(overlaps) - scores.numpy()).sum() <= 2 / 256


@needs_node
def test_of_many_old_frames_only_the_promising_ones_are_scored() -> None:
    """The answers are as good as those of a bank that scores every one."""
    poses = poses_of(random_walk(4 * 900, 3))
    four = camera.pose_to_c2w(poses[1:]).view(-1, 4, 4, 4).float()
    program = """
        const bank = new memory.MemoryBank();
        given.cameras.forEach((four, k) => bank.append(null, four.map((c2w) => c2w.flat()), k + 1));
        return given.ends.map((end) => {
          const asking = context.queryOffsets(10).map((back) => given.cameras[end - back][3].flat());
          return bank.retrieve(asking, end - 13).map((row) => row.score);
        });
    """
    ends = [700, 800, 890]
    answers = javascript(program, {"cameras": four.tolist(), "ends": ends})
    for end, scores in zip(ends, answers, strict=True):
        asking = four[[end - back for back in query_offsets(10, 5)], -1]
        every = memory.overlap(asking, four[: end - 14, -1])
        index = torch.arange(end - 14).expand(5, -1)
        rows = memory.pick(every, index, 0, memory.TAKEN)
        best = every.gather(1, rows[:, None])[:, 0]
        assert np.abs(best.numpy() - scores).max() <= 2 / 256


@needs_node
def test_nobody_looks_up_further_than_the_world_was_drawn() -> None:
    """So that the way back, every key its opposite, ends where it began."""
    program = """
        const made = new session.Session({ latent: [1, 1, 1], max_pitch: 35 }, {});
        made.walk = { poses: [camera.START_POSE], actions: [] };
        const chords = made.advance([...Array(80).fill("w+i"), ...Array(40).fill("l")]);
        const top = Math.max(...made.walk.poses.map((pose) => pose[3]));
        made.advance(camera.invert(chords));
        return [top, ...made.walk.poses.at(-1).map((value, k) => value - camera.START_POSE[k])];
    """
    top, *off = javascript(program)
    assert 33 < top <= 35
    assert np.abs(off).max() < 1e-6


# ---- flow.js ----------------------------------------------------------------------------------------------


@needs_node
@pytest.mark.parametrize("seed, segment", [(0, 0), (42, 7), (2**31 - 1, 5000)])
def test_noise_is_the_same_to_the_last_bit_or_so(seed: int, segment: int) -> None:
    program = "return [...flow.gaussian(given.seed, given.segment, 30000)];"
    got = np.array(javascript(program, {"seed": seed, "segment": segment}), np.float32)
    expected = gaussian(seed, segment, 30000)
    np.testing.assert_array_max_ulp(got, expected, 2)


@needs_node
@pytest.mark.parametrize("method, steps", [("renoise", 3), ("unipc", 3), ("unipc", 10)])
def test_samplers_walk_as_in_python(method: str, steps: int) -> None:
    sigmas = flow.sigma_grid(steps)
    draws = torch.randn(steps, 50, generator=torch.Generator().manual_seed(0))
    later = iter(draws[1:])
    walked = flow.METHODS[method](bend, draws[0], sigmas, lambda shape: next(later))
    expected = flow.last_of(walked)
    program = """
        const velocity = async (x, sigma) => x.map((value) => Math.sin(3 * value + sigma));
        const draws = given.draws.map((draw) => Float32Array.from(draw));
        return [...await flow.sample(velocity, draws, given.sigmas, given.method)];
    """
    given = {"draws": draws.tolist(), "sigmas": sigmas.tolist(), "method": method}
    same(javascript(program, given), expected, 2e-5)


def bend(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A velocity that no sampler walks exactly."""
    return (3 * x + sigma).sin()


# ---- context.js and session.js -----------------------------------------------------------------------------


class Echo(HashedDenoiser):
    """Imagines nothing: its latents are the noise of one step. What it was told is kept."""

    def imagine(self, plan: Plan) -> torch.Tensor:
        self.told = [*getattr(self, "told", []), plan.context]
        return self.draws(plan)[0].transpose(0, 1)[None]


SESSION = """
    const told = [];
    const networks = {
      velocity: async (x, sigma, context) => {
        told.push(Object.fromEntries(Object.entries(context).map(([k, y]) => [k, [...y]])));
        return x.map(() => 0);
      },
      decodeFirst: async () => ({ frames: [], state: {} }),
      decodeNext: async () => ({ frames: [], state: {} }),
    };
    const facts = { latent: [16, 8, 8], sigmas: [1, 0], method: "renoise", sink: true };
    const player = new session.Session(facts, networks);
    await player.reset(Float32Array.from(given.latent), given.seed);
    let at = 0;
    for (const [fresh, remember] of given.segments) {
      await player.step(given.chords.slice(at, at + 4 * fresh), remember);
      at += 4 * fresh;
    }
    return told;
"""


@needs_node
def test_every_segment_is_told_the_same() -> None:
    lengths = [14, 10, 2, 2, 5, 10, 10, 2, 10, 10]
    policies = ["camera"] * 3 + ["none"] + ["camera"] * 6
    chords = random_walk(4 * sum(lengths), 3)
    latent = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    given = {
        "latent": latent.flatten().tolist(),
        "seed": 7,
        "chords": chords,
        "segments": [(n, policy == "camera") for n, policy in zip(lengths, policies, strict=True)],
    }
    told = javascript(SESSION, given)

    options = Options("tiny", "random", steps=1, device="cpu", dtype="float32")
    meta = {"encoding": "anchored", "method": "renoise", "sink": True}
    python = Echo(None, meta, options)
    python.reset(latent, torch.zeros(16, 64), 7, (0, -1.6, 0, 0, 0))
    at = 0
    for n, policy in zip(lengths, policies, strict=True):
        rows = chords[at : at + Window.stride * n]
        python.run(*camera.actions_from_keys(rows), policy)
        at += Window.stride * n

    for mine, other in zip(python.told, told, strict=True):
        clean = torch.cat([mine.memory, mine.past], 2)[0].transpose(0, 1)
        assert other["times"] == mine.times[0].tolist()
        same(other["clean"], clean, 1e-6)
        same(other["rays"], mine.rays, 4e-6)
        same(other["mouse"], mine.mouse, 0)
        same(other["keyboard"], mine.keyboard, 0)
        M = mine.memory.shape[2]
        assert other["clock"] == [*range(M), *range(len(other["times"]) - M)]


def same(got: list[float], expected: torch.Tensor, atol: float) -> None:
    numbers = torch.tensor(got, dtype=torch.float32).flatten()
    torch.testing.assert_close(numbers, expected.float().flatten(), atol=atol, rtol=0)


# ---- walk.js and game.js -----------------------------------------------------------------------------------


@needs_node
def test_a_link_is_the_walk_and_the_language_is_that_of_play() -> None:
    text = "w:40,w+l:20,_:8,s+k:12"
    chords = javascript("return walk.parseActions(given);", text)
    assert chords == [actions_set(chord) for chord in play_chords(text)]
    assert javascript("return walk.formatActions(walk.parseActions(given));", text) == text

    program = """
        const facts = { starts: 10, lengths: [10, 5, 2] };
        const found = walk.parseHash(given, facts);
        return { ...found, again: walk.formatHash(found, facts) };
    """
    found = javascript(program, "#seed=7&start=3&new=2&do=w:40,l:60")
    assert (found["seed"], found["start"], found["fresh"]) == (7, 3, 2)
    assert found["chords"] == ["w"] * 40 + ["l"] * 60
    assert found["again"] == "#seed=7&start=3&new=2&do=w:40,l:60"
    assert javascript(program, "")["seed"] == 42


def play_chords(text: str) -> list[str]:
    return latents_of(text)[0]


def actions_set(chord: str) -> str:
    """The page names keys in the order of its own list."""
    return "+".join(key for key in "wasdijkl" if key in chord.split("+")) or "_"


@needs_node
@pytest.mark.parametrize(
    "text, says",
    [
        ("#seed=x", "seed is a whole number"),
        ("#start=10", "start is a whole number from 0 to 9"),
        ("#do=q:40", "“q” is no key"),
        ("#do=w40", "is not keys:count"),
        ("#do=w:99999", "longer than"),
        ("#new=3", "new is one of 10, 5, 2"),
        ("#walk=w:40", "is none of seed, start, new, do"),
        ("#do=%E0%A4%A", "URI malformed"),
    ],
)
def test_a_link_that_says_nothing_is_explained(text: str, says: str) -> None:
    program = """
        try { return walk.parseHash(given, { starts: 10, lengths: [10, 5, 2] }); }
        catch (error) { return error.message; }
    """
    assert says in javascript(program, text)


@needs_node
def test_a_look_key_says_how_far() -> None:
    program = "return walk.parseActions(given).map(camera.actionOf);"
    text = "w+l2.5:8,i4:4,j1.5+k:4"
    actions = javascript(program, text)
    keyboard, mouse = camera.actions_from_keys(play_chords(text))
    assert [action["keyboard"] for action in actions] == keyboard.tolist()
    same([action["mouse"] for action in actions], mouse, 0)


@needs_node
def test_opposite_keys_cancel() -> None:
    assert javascript("return walk.chordOf(given);", ["w", "s", "l"]) == "l"
    assert javascript("return walk.chordOf(given);", ["j", "l"]) == "_"


@needs_node
def test_the_score_is_psnr_and_home_is_where_the_first_picture_was_taken() -> None:
    one = np.random.default_rng(0).integers(0, 256, (64, 64, 4))
    other = np.random.default_rng(1).integers(0, 256, (64, 64, 4))
    one[..., 3] = other[..., 3] = 255
    mse = ((one - other)[..., :3] ** 2).mean()
    program = "return game.likeness(given[0], given[1]);"
    got = javascript(program, [one.flatten().tolist(), other.flatten().tolist()])
    assert got == pytest.approx(10 * math.log10(255**2 / mse), abs=1e-9)
    far = javascript("return game.distance([3, 0, 4, 0, 355], [0, 0, 0, 0, 5]);")
    assert far == {"metres": 5, "degrees": 10}


# ---- real browsers -----------------------------------------------------------------------------------------

COMMANDS = {  # no driver: the page itself reports to the server that it came from
    "chromium": ["--headless=new", "--no-sandbox", "--disable-gpu", "--user-data-dir={}"],
    "firefox": ["--headless", "--no-remote", "--profile", "{}"],
}
PATIENT = 400  # seconds a browser may need on a machine that is busy with other things
TELL = """
    const until = async (condition) => {
      while (!condition()) await new Promise((resolve) => setTimeout(resolve, 20));
    };
    const tell = (report) => fetch("/report", { method: "POST", body: JSON.stringify(report) });
"""
WALK_TWICE = """
    const bytes = [];
    const { put } = page.screen;
    page.screen.put = function (chunk, period) {
      for (const byte of chunk.frames) bytes.push(byte);
      return put.call(this, chunk, 1);  // as fast as they are made
    };
    const all = () => bytes.length >= 4 * 64 * 64 * FRAMES;
    const trouble = () => banner.className === "trouble" && banner.textContent;
    const packed = () => {
      let text = "";
      const size = 4 * 64 * 64 * FRAMES;
      for (let at = 0; at < size; at += 16384) {
        text += String.fromCharCode(...bytes.slice(at, at + 16384));
      }
      return btoa(text);
    };
    await until(() => all() || trouble());
    if (trouble()) return { trouble: trouble() };
    const report = { on: packed(), speed: page.state.speed, backend: page.state.backend };
    const { script, chords, ...walk } = page.state;
    memory.click();
    bytes.length = 0;
    await page.begin({ ...walk, chords: [...chords, ...script].slice(0, 136) });
    await until(() => all() || trouble());
    return { ...report, off: packed(), trouble: trouble(), agent: navigator.userAgent };
"""
SAY = """
    await until(() => banner.className === "trouble" || page.ready);
    return { text: banner.textContent, ready: page.ready };
"""


class Reporting(http.server.SimpleHTTPRequestHandler):
    """The page's files, a program that is added to the page, and what that program reports."""

    def do_GET(self) -> None:
        if self.path.split("?")[0] != "/":
            return super().do_GET()
        told = f"tell(await (async () => {{ {self.server.program} }})());"
        extra = f'<script type="module">{TELL}{told}</script>'
        text = (WEB / "index.html").read_text()
        head, rest = text.split("<script", 1)
        page = f"{head}{self.server.before}<script{rest}".replace("</head>", f"{extra}</head>")
        self.answer(page.encode(), "text/html")

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.reports.put(json.loads(self.rfile.read(length)))
        self.answer(b"", "text/plain")

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *about: object) -> None:
        pass


def visit(
    browser: str, folder: Path, program: str, place: str, tmp_path: Path, before: str = ""
) -> dict:
    """What a program reports from the page in a real browser."""
    path = shutil.which(browser) or shutil.which(f"{browser}-esr")
    if path is None:
        pytest.skip(f"needs {browser}")
    handler = functools.partial(Reporting, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.program = program
        server.before = before
        server.reports = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        profile = tmp_path / "profile"
        profile.mkdir()
        words = [word.format(profile) for word in COMMANDS[browser]]
        url = f"http://127.0.0.1:{server.server_port}/{place}"
        process = subprocess.Popen(
            [path, *words, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return server.reports.get(timeout=PATIENT)
        finally:
            process.kill()
            process.wait()
            server.shutdown()


def needs_export() -> None:
    if not (WEB / "model/facts.json").is_file() or not list(WEB.glob("runtime/*.gz")):
        pytest.skip("needs npm ci --prefix web && python export.py --web web")


def frames_of(packed: str) -> np.ndarray:
    rgba = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(-1, 64, 64, 4)
    return rgba[..., :3].astype(int)


def session_frames(chords: list[str], policy: str) -> np.ndarray:
    """The same walk in realtime.Session, with noise that a browser can draw."""
    options = Options("tiny", decoder="light75", policy=policy, device="cpu", dtype="float32")
    session = realtime.Session(options)
    session.denoiser = HashedDenoiser(session.nets["dit"], session.denoiser.meta, session.options)
    picture = export.read_picture(cli.start_pictures()[3])
    frames = [session.reset(picture, seed=42).frames]
    while chords:
        n = session.frames_needed
        rows = (chords + ["_"] * n)[:n]
        frames.append(session.step(*camera.actions_from_keys(rows)).frames)
        chords = chords[n:]
    return torch.cat(frames).numpy().astype(int)


@pytest.mark.browser
@pytest.mark.parametrize("browser", COMMANDS)
def test_a_walk_is_the_walk_of_a_session(browser: str, tmp_path: Path) -> None:
    needs_export()
    walked = "w:24,l:60,j:60"  # out, away, back: 144 frames
    chords = play_chords(walked)[:136]
    program = WALK_TWICE.replace("FRAMES", "121")
    report = visit(browser, WEB, program, f"#seed=42&start=3&do={walked}", tmp_path)
    assert not report["trouble"], report["trouble"]

    differences = {}
    for name, policy in (("on", "camera"), ("off", "none")):
        got = frames_of(report[name])
        assert got.shape == (121, 64, 64, 3)
        expected = session_frames(chords, policy)[:121]
        differences[name] = np.abs(got - expected).mean()
    forgotten = np.abs(frames_of(report["on"]) - frames_of(report["off"]))[97:].mean()
    print(
        f"{browser}, {report['backend']}: {report['speed']:.1f} frames/s made; mean difference from "
        f"realtime.Session {differences['on']:.3f} of 256 grey levels with memory, "
        f"{differences['off']:.3f} without; memory on against off: {forgotten:.1f}"
    )
    assert max(differences.values()) <= 1
    assert forgotten > 2, "without memory another world is seen"


@pytest.mark.browser
@pytest.mark.parametrize(
    "case, says",
    [
        ("no model", "There is no model here yet. Make one with: python export.py --web web"),
        ("another version", "format 99, this page reads 2. Make them again with: python export"),
        ("no runtime", "is missing. Fetch it with: npm ci --prefix web"),
        ("damaged", "is damaged. Make it again with: python export.py --web web"),
        ("no WebAssembly", "needs WebAssembly"),
        ("foreign link", "The walk in this link is ignored: seed is a whole number from 0 to"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(case: str, says: str, tmp_path: Path) -> None:
    needs_export()
    folder = tmp_path / "web"
    leave_out = shutil.ignore_patterns("node_modules")
    shutil.copytree(WEB, folder, ignore=leave_out)
    if case == "no model":
        shutil.rmtree(folder / "model")
    elif case == "another version":
        (folder / "model/facts.json").write_text('{"format": 99}')
    elif case == "no runtime":
        shutil.rmtree(folder / "runtime")
    elif case == "damaged":
        (folder / "model/network.onnx.gz").write_bytes(b"cut short")
    before = "<script>delete window.WebAssembly</script>" if case == "no WebAssembly" else ""
    place = "#seed=x" if case == "foreign link" else ""
    report = visit("chromium", folder, SAY, place, tmp_path, before)
    assert says in report["text"]
    assert report["ready"] == (case == "foreign link")
