// Find the way back: walk out, return, and see how much of the first picture is still there.
//
//     out ── 30 s, or 60 s at most ──► home ── at the start again ──► replay ──► the score
//
// The walk home is the player's own, or the way out backwards ("lead me home"), which ends exactly
// where it began. Then the same steps are imagined once more without memory. Score: how close, in
// decibels, the picture on return is to the first one; ten more mean a tenth of the squared error.

import { invert } from "./camera.js";
import { LATENT } from "./walk.js";

const NEAR = 0.6; // metres and
const TURNED = 12; // degrees from the first pose: home
const SETTLE = 16; // frames after that in which a still closer one counts

/** Decibels between two pictures, RGBA bytes. */
export function likeness(one, other) {
  let sum = 0;
  for (let i = 0; i < one.length; i++) sum += (one[i] - other[i]) ** 2;
  const mean = sum / ((3 * one.length) / 4); // alpha never differs
  return 10 * Math.log10(255 ** 2 / Math.max(mean, 0.01));
}

/** Metres to the first pose, and degrees to its view. */
export function distance(pose, first) {
  const metres = Math.hypot(pose[0] - first[0], pose[2] - first[2]);
  const turn = Math.abs(((((pose[4] - first[4] + 180) % 360) + 360) % 360) - 180);
  return { metres, degrees: Math.max(turn, Math.abs(pose[3] - first[3])) };
}

export class Game {
  phase = "off"; // off, out, home, replay, over
  least = 30 * 16; // frames of the way out, and at most
  most = 60 * 16;

  /** What a page shows: text(phase, details) and the end with its pictures. */
  constructor(onText, onArrival) {
    this.onText = onText;
    this.onArrival = onArrival;
  }

  begin(firstPixels, pose) {
    this.first = { pixels: firstPixels, pose };
    this.best = null;
    this.chords = [];
    this.frames = 0;
    this.go("out");
  }

  go(phase) {
    this.phase = phase;
    this.onText(phase, this);
  }

  stop() {
    this.go("off");
  }

  /** The chords that lead home, exactly: all that was walked, backwards. */
  wayHome() {
    const back = invert(this.chords);
    this.go("home");
    return back;
  }

  /** What was decided, whether or not it has been seen. */
  walked(chords) {
    if (this.phase === "out" || this.phase === "home") this.chords.push(...chords);
  }

  /** Every frame as it is drawn. */
  see({ pixels, pose, index }) {
    if (this.phase !== "out" && this.phase !== "home") return;
    this.frames = index;
    const { metres, degrees } = distance(pose, this.first.pose);
    if (this.phase === "out") {
      if (index >= this.most) this.go("home");
      else if (index % LATENT === 0) this.onText("out", this);
      return;
    }

    // home is the closest frame of those that are close
    const off = metres / NEAR + degrees / TURNED;
    const close = metres < NEAR && degrees < TURNED;
    if (close && !(this.best?.off <= off)) this.best = { off, index, pixels, metres, degrees };
    const settled = this.best && index >= this.best.index + SETTLE;
    if (this.best?.off < 0.01 || settled || (this.best && !close)) this.arrive();
    else if (index % LATENT === 0) this.onText("home", this, { metres, degrees });
  }

  arrive() {
    this.go("replay");
    this.onArrival(this.best.index);
  }

  /** The same frame without memory: the end. */
  finish(pixelsWithout) {
    this.scores = {
      on: likeness(this.best.pixels.data, this.first.pixels.data),
      off: likeness(pixelsWithout.data, this.first.pixels.data),
    };
    this.without = pixelsWithout;
    this.go("over");
  }
}
