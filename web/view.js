// What is drawn: the picture with its clock, the map, and the frames that are remembered.

import { LATENT } from "./walk.js";

const KEPT = 4096; // thumbnails, as many as fill the memory's bank: 64 MB

/** Frames wait here for their time; the newest one that is due is on the canvas. */
export class Screen {
  waiting = [];
  due = 0; // when the last frame that waits has had its time, ms
  kept = new Map(); // frame index -> pixels, one per latent: thumbnails of what is recalled
  frozen = false; // while the page is paused
  drawn = []; // when frames were drawn, last two seconds
  onFrame = () => {};

  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    const tick = () => {
      requestAnimationFrame(tick); // first: one frame that cannot be drawn must not be the last
      this.tick(performance.now());
    };
    requestAnimationFrame(tick);
  }

  clear() {
    this.waiting = [];
    this.kept.clear();
    this.due = 0;
  }

  /** A chunk of frames, each of which is seen for `period` ms. */
  put({ frames, first, poses, chords = [], remember }, period) {
    const { width, height } = this.canvas;
    const size = 4 * width * height;
    this.due = Math.max(this.due, this.frozen || performance.now()); // delay() adds the pause
    poses.forEach((pose, k) => {
      const bytes = frames.subarray(k * size, (k + 1) * size);
      const pixels = new ImageData(new Uint8ClampedArray(bytes), width, height);
      const index = first + k;
      if (index % LATENT === 0) this.keep(index, pixels);
      this.waiting.push({ pixels, index, pose, chord: chords[k] ?? "_", remember, due: this.due });
      this.due += period;
    });
  }

  /** A thumbnail more; of too many the oldest goes, but those of the first two latents. */
  keep(index, pixels) {
    this.kept.set(index, pixels);
    if (this.kept.size <= KEPT) return;
    const oldest = [...this.kept.keys()].find((frame) => frame > LATENT);
    this.kept.delete(oldest);
  }

  /** How long the frames that wait will last, ms. */
  left() {
    return Math.max(0, this.due - performance.now());
  }

  /** Everything that waits is late by as much as the page was paused. */
  delay(ms) {
    this.due += ms;
    for (const frame of this.waiting) frame.due += ms;
  }

  tick(now) {
    if (this.frozen) return;
    let frame = null;
    while (this.waiting.length && this.waiting[0].due <= now) {
      frame = this.waiting.shift();
      this.onFrame(frame, now);
    }
    if (frame) {
      this.context.putImageData(frame.pixels, 0, 0);
      this.drawn.push(now);
    }
    this.drawn = this.drawn.filter((time) => time > now - 2000);
  }

  framesPerSecond() {
    const [first, last] = [this.drawn[0], this.drawn.at(-1)];
    return last > first ? (1000 * (this.drawn.length - 1)) / (last - first) : 0;
  }
}

/** A small picture with a caption. */
export function figure(pixels, caption, marked = false) {
  const box = document.createElement("figure");
  const text = document.createElement("figcaption");
  if (marked) box.className = "sink";
  let picture = document.createElement("div");
  picture.className = "none";
  if (pixels) {
    picture = document.createElement("canvas");
    picture.width = pixels.width;
    picture.height = pixels.height;
    picture.getContext("2d").putImageData(pixels, 0, 0);
  }
  text.append(...[caption].flat());
  box.append(picture, text);
  return box;
}

/** The five frames that the picture now on screen was made with. */
export function drawStrip(strip, memory, kept) {
  const slots = Array.from({ length: 5 }, (_, slot) => {
    const found = memory[slot];
    if (!found) return figure(null, "–");
    const note = found.sink ? "first" : found.score.toFixed(2);
    return figure(kept.get(found.frame), `f${found.frame} ${note}`, found.sink);
  });
  strip.replaceChildren(...slots);
}

// ---- the map ------------------------------------------------------------------------------------

/** Path, the cones of what is remembered, and the player's own. Poses are [x, y, z, pitch, yaw]. */
export function drawMap(canvas, path, memory, here) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.body);
  const color = (name) => style.getPropertyValue(name).trim();
  const place = mapping(path, canvas.width, canvas.height, ratio);

  for (const { pose } of memory) {
    drawCone(pen, place(pose), pose, 46 * ratio, color("--good"), 0.18);
  }
  drawCone(pen, place(here), here, 58 * ratio, color("--hot"), 0.5);
  drawPath(pen, path.map(place), ratio, color("--ink"));
  drawDot(pen, place(path[0]), 5 * ratio, color("--ink"), true);
  drawDot(pen, place(here), 4 * ratio, color("--hot"));
  drawScale(pen, place, canvas.height, ratio, color("--dim"));
}

/** pose -> [x, y] on the canvas: everything fits with its cone, north is up, 8 metres at least. */
function mapping(path, width, height, ratio) {
  const [left, right] = range(path.map((pose) => pose[0]));
  const [low, high] = range(path.map((pose) => pose[2]));
  const margin = 2 * 62 * ratio;
  const scale = Math.min(
    width / 8,
    (width - margin) / (right - left),
    (height - margin) / (high - low),
  ); // pixels per metre
  const place = (pose) => [
    width / 2 + scale * (pose[0] - (left + right) / 2),
    height / 2 - scale * (pose[2] - (low + high) / 2),
  ];
  return Object.assign(place, { scale });
}

function range(values) {
  return values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [1e9, -1e9]);
}

/** A view is 90° wide. */
function drawCone(pen, [x, y], pose, radius, color, opacity) {
  const middle = ((pose[4] - 90) * Math.PI) / 180;
  pen.beginPath();
  pen.moveTo(x, y);
  pen.arc(x, y, radius, middle - Math.PI / 4, middle + Math.PI / 4);
  pen.closePath();
  pen.fillStyle = pen.strokeStyle = color;
  pen.globalAlpha = opacity;
  pen.fill();
  pen.globalAlpha = Math.min(1, 4 * opacity);
  pen.lineWidth = 1;
  pen.stroke();
  pen.globalAlpha = 1;
}

function drawPath(pen, points, ratio, color) {
  pen.beginPath();
  points.forEach(([x, y], k) => (k ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.strokeStyle = color;
  pen.lineWidth = 1.5 * ratio;
  pen.stroke();
}

function drawDot(pen, [x, y], radius, color, hollow = false) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fillStyle = pen.strokeStyle = color;
  if (hollow) pen.stroke();
  else pen.fill();
}

function drawScale(pen, { scale }, height, ratio, color) {
  const metres = scale < 15 * ratio ? 5 : 1;
  pen.fillStyle = color;
  pen.fillRect(8 * ratio, height - 10 * ratio, metres * scale, 2 * ratio);
  pen.font = `${11 * ratio}px system-ui`;
  pen.fillText(`${metres} m`, 8 * ratio, height - 15 * ratio);
}
