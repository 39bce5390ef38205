// Find the old frames that saw what we are about to see: memory.py, rule "uniform".
//
//     s(q, c) ≈ (1/n)·Σ_i [p_i in V_c],   p_i evenly spread in the view V_q                   (1)
//
// The share of the new view q that the old view c has seen is the share of sample points of q that
// lie in c's frustum as well. Five questions, each takes the best of what no other has taken; the
// last slot is the sink: the oldest latent, where everything began.

import { relative } from "./camera.js";

const NEAR = 0.1; // metres: the part of a view that counts as seen
const FAR = 30;
const POINTS = 256;
const REPEAT = 10; // what it costs to answer twice
const GATE = 0.85; // when the bank is full, what is seen already up to this share stays out,
const FREE = 4096; // so many latents fill it
const BRUTE_FORCE = 512; // so many candidates are scored one by one; of more,
const SURVIVORS = 160; // these: the nearest by frustumKey

/** [x, y, z] of n points, evenly spread in the volume of a view, in camera axes. */
export function frustumPoints(n = POINTS) {
  const points = [];
  for (let i = 0; i < n; i++) {
    // the R3 sequence fills a cube evenly for any n; rounded where Python has float32
    const u = [1, 2, 3].map((k) => {
      const stride = Math.fround(Math.fround(1.2207440846057596) ** -k);
      return Math.fround(((i + 0.5) * stride + 0.5) % 1); // (4)
    });
    const z = Math.fround(FAR * Math.fround(Math.cbrt(u[2]))); // (2)
    const x = Math.fround(Math.fround(2 * u[0] - 1) * z);
    const y = Math.fround(Math.fround(2 * u[1] - 1) * z);
    points.push([x, y, z]);
  }
  return points;
}

const SAMPLE = frustumPoints();

/** The share of what `query` sees that `candidate` has seen, two cameras. */
export function overlap(query, candidate) {
  const g = relative(candidate, query).map(Math.fround); // from the query's axes to the candidate's
  let seen = 0;
  for (const [px, py, pz] of SAMPLE) {
    const z = g[8] * px + g[9] * py + g[10] * pz + g[11];
    if (z <= NEAR || z >= FAR) continue;
    const x = g[0] * px + g[1] * py + g[2] * pz + g[3];
    const y = g[4] * px + g[5] * py + g[6] * pz + g[7];
    if (Math.max(Math.abs(x), Math.abs(y)) <= z) seen += 1;
  }
  return seen / SAMPLE.length;
}

/** Six numbers in metres that are close together if two views overlap: centroid, and direction. */
export function frustumKey(c2w) {
  const ahead = [c2w[2], c2w[6], c2w[10]];
  const centroid = [3, 7, 11].map((at, axis) => c2w[at] + 0.75 * FAR * ahead[axis]);
  return [...centroid, ...ahead.map((value) => 4 * value)];
}

/** Of many rows those that are near a camera by key, in their old order. */
function promising(rows, c2w) {
  if (rows.length <= BRUTE_FORCE) return rows;
  const key = frustumKey(c2w);
  const apart = (row) => row.key.reduce((sum, value, k) => sum + (value - key[k]) ** 2, 0);
  const distances = rows.map(apart);
  const farthest = Float64Array.from(distances).sort()[SURVIVORS - 1];
  return rows.filter((_, number) => distances[number] <= farthest);
}

/** Row by row of scores, the best column that is not taken yet; the last row is the sink's. */
export function pick(scores, sink) {
  const taken = [];
  for (const row of sink === null ? scores : scores.slice(0, -1)) {
    let best = -1;
    let bestValue = -Infinity;
    row.forEach((score, column) => {
      const used = column === sink || taken.includes(column);
      const value = score - (used ? REPEAT : 0);
      if (value > bestValue) [best, bestValue] = [column, value];
    });
    taken.push(best);
  }
  return sink === null ? taken : [...taken, sink];
}

/** Every latent a session has made, with its four cameras and its time, oldest first. */
export class MemoryBank {
  rows = []; // {latent, cameras, time}

  /** A full bank lets in views that nothing overlaps, and every eighth: it grows with the area. */
  append(latent, cameras, time) {
    const rounded = cameras.map((c2w) => Float32Array.from(c2w));
    if (this.rows.length >= FREE && time % 8) {
      const near = promising(this.rows, rounded[3]);
      if (near.some((row) => overlap(rounded[3], row.cameras[3]) >= GATE)) return;
    }
    this.rows.push({ latent, cameras: rounded, time, key: frustumKey(rounded[3]) });
  }

  /** Cameras that ask, newest first -> as many rows with their score, all of before `before`. */
  retrieve(asking, before, useSink = true) {
    const old = this.rows.filter((row) => row.time < before);
    // latent 0 is one frame alone: it answers only where there is nothing else
    const candidates = old.length > 1 ? old.filter((row) => row.time > 0) : old;
    const scores = asking.map((c2w) => {
      const query = Float32Array.from(c2w);
      const near = new Set(promising(candidates, query));
      return candidates.map((row) => (near.has(row) ? overlap(query, row.cameras[3]) : -1));
    });
    const sink = useSink ? 0 : null;
    return pick(scores, sink).map((column, slot) => ({
      ...candidates[column],
      score: overlap(Float32Array.from(asking[slot]), candidates[column].cameras[3]),
      sink: useSink && candidates[column].time <= 1,
    }));
  }
}
