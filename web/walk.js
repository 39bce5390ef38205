// A walk as text: "w:40,w+l:20" is forty frames forward, then twenty forward and to the right. A part
// of the language of play.py --actions; a link holds it in its hash: #seed=42&start=3&do=w:40,l:60

export const LATENT = 4; // frames that one latent holds: the shortest thing an action can do
const NAMES = [..."wasdijkl"];
const LOOKS = "ijkl";
const FASTEST = 4; // times: six degrees a frame, as in training
const KEY = /^([wasd_]|[ijkl](\d(\.\d{1,4})?)?)$/;
const MOST = 40_000; // frames: 42 minutes at 16 a second

/**
 * Which keys a frame is made with, as text. Opposite ones cancel, the order is always the same; a
 * look key may say how many times as far it turns: l2.5
 */
export function chordOf(keys) {
  const times = new Map();
  for (const key of keys) {
    const more = (times.get(key[0]) ?? 0) + Number(key.slice(1) || 1);
    times.set(key[0], LOOKS.includes(key[0]) ? Math.min(more, FASTEST) : 1);
  }
  for (const [one, other] of ["ws", "ad", "ik", "jl"]) {
    if (times.has(one) && times.has(other)) [one, other].forEach((key) => times.delete(key));
  }
  const named = (key) => (times.get(key) === 1 ? key : key + times.get(key));
  return (
    NAMES.filter((key) => times.has(key))
      .map(named)
      .join("+") || "_"
  );
}

/** "w:40, w+l:20" -> one chord per frame. Throws what does not fit, in one sentence. */
export function parseActions(text) {
  const chords = [];
  for (const item of text.split(",")) {
    const [, keys, count] = /^\s*([a-z_+.\d]+)\s*:\s*(\d{1,5})\s*$/.exec(item) ?? [];
    if (!keys) throw new Error(`“${item.slice(0, 40)}” is not keys:count, as in w:40 or w+l:20`);
    const unknown = keys.split("+").find((key) => !KEY.test(key));
    if (unknown !== undefined) {
      throw new Error(`“${unknown.slice(0, 20)}” is no key; there are ${NAMES.join(" ")} and _`);
    }
    const frames = LATENT * Math.max(1, Math.round(Number(count) / LATENT));
    if (chords.length + frames > MOST) throw new Error(`the walk is longer than ${MOST} frames`);
    chords.push(...Array(frames).fill(chordOf(keys.split("+").filter((key) => key !== "_"))));
  }
  return chords;
}

/** One chord per frame -> "w:40,w+l:20" */
export function formatActions(chords) {
  const runs = [];
  for (const chord of chords) {
    if (runs.at(-1)?.chord === chord) runs.at(-1).count += 1;
    else runs.push({ chord, count: 1 });
  }
  return runs.map(({ chord, count }) => `${chord}:${count}`).join(",");
}

/** A link's hash -> {seed, start, fresh, chords}. Throws what does not fit. */
export function parseHash(hash, { starts, lengths }) {
  const walk = { seed: 42, start: 0, fresh: null, chords: [] };
  for (const part of hash.replace(/^#/, "").split("&").filter(Boolean)) {
    const [name, value = ""] = part.split(/=(.*)/s);
    const text = decodeURIComponent(value); // throws where it is no text
    if (name === "seed") walk.seed = whole(text, name, 0, 2 ** 31 - 1);
    else if (name === "start") walk.start = whole(text, name, 0, starts - 1);
    else if (name === "new") walk.fresh = one(Number(text), name, lengths);
    else if (name === "do") walk.chords = parseActions(text);
    else throw new Error(`“${name.slice(0, 20)}” is none of seed, start, new, do`);
  }
  // a walk that was made with the longest segments does not say so
  if (walk.chords.length) walk.fresh ??= Math.max(...lengths);
  return walk;
}

export function formatHash({ seed, start, fresh, chords }, { lengths }) {
  if (chords.length > MOST) throw new Error(`a link holds ${MOST} frames at most`);
  const parts = [`seed=${seed}`, `start=${start}`];
  if (fresh && fresh !== Math.max(...lengths)) parts.push(`new=${fresh}`);
  if (chords.length) parts.push(`do=${formatActions(chords)}`);
  return `#${parts.join("&")}`;
}

function whole(text, name, low, high) {
  const value = /^\d{1,10}$/.test(text) ? Number(text) : NaN;
  if (value >= low && value <= high) return value;
  throw new Error(`${name} is a whole number from ${low} to ${high}, not “${text.slice(0, 20)}”`);
}

function one(value, name, allowed) {
  if (allowed.includes(value)) return value;
  throw new Error(`${name} is one of ${allowed.join(", ")}`);
}
