// What a key does to a camera, and where its rays run: camera.py, as far as a page needs it.
//
// A camera is a 4x4 matrix c2w, 16 numbers row by row, OpenCV axes (x right, y DOWN, z forward),
// metres. A pose is [x, y, z, pitch°, yaw°]; yaw > 0 turns right, pitch > 0 looks up. Action t
// leads from frame t to frame t + 1. The derivations stand in camera.py, and so do the numbers of
// its formulas, (1) .. (4).

export const STEP = 0.1235; // metres per frame; a diagonal moves 1/√2 of it on each axis
export const DEGREES = 15; // degrees per mouse unit, both axes
export const DEAD_ZONE = 0.02; // smaller mouse values count as 0
export const MAX_PITCH = 85; // degrees
export const START_POSE = [0, -1.6, 0, 0, 0];
export const KEYS = ["w", "s", "a", "d", "jump", "attack"]; // order of the six keyboard entries
export const LOOK = { i: [0.1, 0], k: [-0.1, 0], j: [0, -0.1], l: [0, 0.1] }; // pitch, yaw

const ANCHORED_SCALE = 2; // metres per unit of a ray's origin: a segment is 7 m long
const RAY_CHANNELS = 15; // origin, direction, moment, six harmonics of the azimuth

const radians = (degrees) => (degrees * Math.PI) / 180;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// ---- keys -> actions -> poses -------------------------------------------------------------------

/**
 * "w+l" -> the action of one frame; "l2.5" turns 2.5 times as far. Numbers are rounded to float32:
 * the network sees those.
 */
export function actionOf(chord) {
  const held = new Map(chord.split("+").map((key) => [key[0], Number(key.slice(1) || 1)]));
  const mouse = [0, 0];
  for (const [key, turn] of Object.entries(LOOK)) {
    const times = held.get(key) ?? 0;
    turn.forEach((value, axis) => (mouse[axis] += times * value));
  }
  return {
    keyboard: KEYS.map((key) => Number(held.has(key))),
    mouse: mouse.map(Math.fround),
  };
}

/** Degrees that a chord looks up. */
export function pitchOf(chord) {
  return DEGREES * actionOf(chord).mouse[0];
}

/** The same keys, but none that look up or down. */
export function withoutPitch(chord) {
  const left = chord.split("+").filter((key) => !"ik".includes(key[0]));
  return left.join("+") || "_";
}

/** One frame of walking. */
export function stepPose([x, y, z, pitch, yaw], { keyboard, mouse }, limit = MAX_PITCH) {
  const [dPitch, dYaw] = mouse.map((unit) => (Math.abs(unit) < DEAD_ZONE ? 0 : DEGREES * unit));
  const forward = keyboard[0] - keyboard[1];
  const right = keyboard[3] - keyboard[2];
  const step = forward && right ? STEP * Math.SQRT1_2 : STEP;
  const heading = radians(yaw + 0.5 * dYaw); // (4): the mean heading of the frame
  const sin = Math.sin(heading);
  const cos = Math.cos(heading);
  return [
    x + step * (forward * sin + right * cos),
    y,
    z + step * (forward * cos - right * sin),
    clamp(pitch + dPitch, -limit, limit),
    yaw + dYaw,
  ];
}

/** The chords that walk these chords back: reversed in time, every key its opposite. */
export function invert(chords) {
  const opposite = { w: "s", s: "w", a: "d", d: "a", i: "k", k: "i", j: "l", l: "j", _: "_" };
  const flip = (chord) =>
    chord
      .split("+")
      .map((key) => opposite[key[0]] + key.slice(1))
      .join("+");
  return chords.map(flip).reverse();
}

// ---- poses -> cameras ---------------------------------------------------------------------------

/** [Ry(yaw) Rx(pitch) | t] */
export function poseToC2w([x, y, z, pitch, yaw]) {
  const sp = Math.sin(radians(pitch));
  const cp = Math.cos(radians(pitch));
  const sa = Math.sin(radians(yaw));
  const ca = Math.cos(radians(yaw));
  return [
    ...[ca, sa * sp, sa * cp, x],
    ...[0, cp, -sp, y],
    ...[-sa, ca * sp, ca * cp, z],
    ...[0, 0, 0, 1],
  ];
}

/** base⁻¹ · other of two rigid matrices: the transpose of the rotation is its inverse. */
export function relative(base, other) {
  const g = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
  for (let row = 0; row < 3; row++) {
    for (let column = 0; column < 4; column++) {
      let sum = 0;
      for (let k = 0; k < 3; k++) {
        const shifted = other[4 * k + column] - (column === 3 ? base[4 * k + 3] : 0);
        sum += base[4 * k + row] * shifted; // (2)
      }
      g[4 * row + column] = sum;
    }
  }
  return g;
}

// ---- cameras -> rays ----------------------------------------------------------------------------

/** Unit vectors through the centres of h x w cells, 90° across, in camera axes: [x, y, z] each. */
export function directions(h, w) {
  const focal = w / 2;
  const cells = [];
  for (let row = 0; row < h; row++) {
    for (let column = 0; column < w; column++) {
      const x = (column + 0.5 - w / 2) / focal;
      const y = (row + 0.5 - h / 2) / focal;
      const length = Math.hypot(x, y, 1);
      cells.push([x / length, y / length, 1 / length]);
    }
  }
  return cells;
}

/** The 15 channels of one ray that leaves `origin` in direction (x, y, z). */
function rayChannels([ox, oy, oz], [x, y, z]) {
  const moment = [oy * z - oz * y, oz * x - ox * z, ox * y - oy * x]; // (1)

  // doubling the azimuth three times gives k = 2, 4, 8
  const radius = Math.max(Math.hypot(x, z), 1e-6);
  let cos = z / radius;
  let sin = x / radius;
  const harmonics = [];
  for (let k = 0; k < 3; k++) {
    [cos, sin] = [cos * cos - sin * sin, 2 * cos * sin];
    harmonics.push(cos, sin); // (3)
  }
  return [ox, oy, oz, x, y, z, ...moment, ...harmonics];
}

/**
 * L latents of four cameras each -> Float32Array (60, L, h, w): what every cell of every latent
 * looks along at the latent's four frames, told relative to the anchor.
 */
export function anchoredRays(cameras, anchor, h, w) {
  const L = cameras.length;
  const rays = new Float32Array(4 * RAY_CHANNELS * L * h * w);
  const cells = directions(h, w);
  cameras.forEach((four, latent) => {
    four.forEach((c2w, frame) => {
      const g = relative(anchor, c2w);
      const origin = [g[3], g[7], g[11]].map((metres) => metres / ANCHORED_SCALE);
      cells.forEach(([x, y, z], cell) => {
        const turned = [0, 4, 8].map((row) => g[row] * x + g[row + 1] * y + g[row + 2] * z);
        rayChannels(origin, turned).forEach((value, channel) => {
          const plane = (frame * RAY_CHANNELS + channel) * L + latent;
          rays[plane * h * w + cell] = value;
        });
      });
    });
  });
  return rays;
}
