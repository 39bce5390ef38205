// Keyboard, mouse, touch and gamepad: whatever is used, it ends as the eight keys w a s d i j k l.
// A walk is then a list of chords, which a link can hold and anybody can play again.

import { chordOf, LATENT } from "./walk.js";

const CODES = {
  ...{ KeyW: "w", KeyA: "a", KeyS: "s", KeyD: "d", KeyI: "i", KeyJ: "j", KeyK: "k", KeyL: "l" },
  ...{ ArrowUp: "i", ArrowLeft: "j", ArrowDown: "k", ArrowRight: "l" },
};
const DEGREES_PER_FRAME = 1.5; // of a look key
const DEGREES_PER_WIDTH = 120; // dragged across the whole picture
const DEAD = 0.35; // of a stick: smaller deflections are rest

/** What is held, tapped and dragged since the last decision: nothing can queue up. */
export class Controls {
  held = new Map(); // source -> Set of keys; sources are independent of each other
  taps = new Set(); // went down since the last decision, and may be up again
  drag = [0, 0]; // degrees to the right and up that are still to be turned
  pressed = new Map(); // key -> when it went down, until a picture shows it
  shown = new Set(); // keys that the picture on screen was made with
  onCommand = () => {};
  onChange = () => {};

  set(source, keys) {
    const before = this.keys();
    this.held.set(source, new Set(keys));
    const after = this.keys();
    for (const key of after) {
      if (before.has(key)) continue;
      this.taps.add(key);
      // of a key whose doing is still on screen, nobody could tell when it shows again
      const clear = !this.shown.has(key) && !this.pressed.has(key);
      if (clear) this.pressed.set(key, performance.now());
    }
    this.onChange(after);
  }

  keys() {
    return new Set([...this.held.values()].flatMap((keys) => [...keys]));
  }

  release() {
    this.held.clear();
    this.forget();
    this.onChange(this.keys());
  }

  /** What was tapped and dragged while nobody decided asks for nothing. */
  forget() {
    this.taps.clear();
    this.drag = [0, 0];
    this.pressed.clear();
  }

  /** The next n chords: held keys act throughout, taps for a latent, a drag evenly or shorter. */
  decide(n) {
    this.readGamepad();
    const held = [...this.keys()];
    const turns = [this.turn(0, "l", "j", n), this.turn(1, "i", "k", n)];
    const chords = Array.from({ length: n }, (_, frame) => {
      const taps = frame < LATENT ? this.taps : [];
      const looks = turns.filter(({ frames }) => frame < frames).map(({ key }) => key);
      return chordOf(new Set([...held, ...taps, ...looks]));
    });
    this.taps = new Set();
    return chords;
  }

  /** What was dragged along one axis as a look key and for how many of n frames. */
  turn(axis, positive, negative, n) {
    const key = this.drag[axis] > 0 ? positive : negative;
    const keyFrames = Math.abs(this.drag[axis]) / DEGREES_PER_FRAME; // at the pace of a held key
    const frames = Math.min(n, LATENT * Math.round(keyFrames / LATENT));
    if (frames) this.drag[axis] = 0; // less than a latent's worth waits for more of its kind
    const times = Math.max(1, Math.round((10 * keyFrames) / n) / 10);
    return { frames, key: times > 1 ? key + times : key };
  }

  readGamepad() {
    const [pad] = (navigator.getGamepads?.() ?? []).filter(Boolean);
    const [x, y, lookX = 0, lookY = 0] = pad?.axes ?? [0, 0]; // one that was unplugged holds nothing
    const keys = [...stickKeys(x, y, "wasd"), ...stickKeys(lookX, lookY, "ijkl")];
    this.set("gamepad", keys);
  }
}

/** A stick's deflection, y down, as keys: `names` are up, left, down, right. */
export function stickKeys(x, y, [up, left, down, right]) {
  const keys = [];
  if (y < -DEAD) keys.push(up);
  if (y > DEAD) keys.push(down);
  if (x < -DEAD) keys.push(left);
  if (x > DEAD) keys.push(right);
  return keys;
}

// ---- devices ------------------------------------------------------------------------------------

export function listen(controls, { screen, thumb, keys }) {
  listenKeyboard(controls);
  listenDrag(controls, screen);
  listenThumb(controls, thumb);
  for (const key of keys) listenButton(controls, key);
  addEventListener("blur", () => controls.release());
  document.addEventListener("visibilitychange", () => document.hidden && controls.release());
}

function listenKeyboard(controls) {
  const down = new Set();
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = CODES[event.code];
    // a focused button keeps the keys that press it
    const presses = ["Space", "Enter"].includes(event.code);
    if (presses && event.target.tagName === "BUTTON") return;
    if (key) {
      event.preventDefault();
      down.add(key);
      controls.set("keyboard", down);
    } else if (!event.repeat) {
      controls.onCommand(event.code, event);
    }
  });
  addEventListener("keyup", (event) => {
    if (down.delete(CODES[event.code])) controls.set("keyboard", down);
  });
  addEventListener("blur", () => down.clear());
}

/** Drag on the picture to look: mouse or finger. */
function listenDrag(controls, screen) {
  let last = null;
  screen.addEventListener("pointerdown", (event) => {
    last = event;
    screen.setPointerCapture(event.pointerId);
  });
  screen.addEventListener("pointermove", (event) => {
    if (event.pointerId !== last?.pointerId) return;
    const scale = DEGREES_PER_WIDTH / screen.clientWidth;
    controls.drag[0] += scale * (event.clientX - last.clientX);
    controls.drag[1] -= scale * (event.clientY - last.clientY);
    last = event;
  });
  for (const end of ["pointerup", "pointercancel"]) {
    screen.addEventListener(end, (event) => {
      if (event.pointerId === last?.pointerId) last = null;
    });
  }
}

/** A pad under the left thumb: its direction is a chord of w a s d. */
function listenThumb(controls, thumb) {
  const knob = thumb.firstElementChild;
  const move = (event) => {
    const box = thumb.getBoundingClientRect();
    const x = (2 * (event.clientX - box.left)) / box.width - 1;
    const y = (2 * (event.clientY - box.top)) / box.height - 1;
    const far = Math.max(1, Math.hypot(x, y));
    knob.style.translate = `${(40 * x) / far}px ${(40 * y) / far}px`;
    controls.set("thumb", stickKeys(x, y, "wasd"));
  };
  thumb.addEventListener("pointerdown", (event) => {
    thumb.setPointerCapture(event.pointerId);
    move(event);
  });
  thumb.addEventListener("pointermove", (event) => {
    if (thumb.hasPointerCapture(event.pointerId)) move(event);
  });
  thumb.addEventListener("lostpointercapture", () => {
    knob.style.translate = "";
    controls.set("thumb", []);
  });
}

function listenButton(controls, element) {
  const { key } = element.dataset;
  element.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    controls.set(element, [key]);
  });
  for (const end of ["pointerup", "pointerleave", "pointercancel"]) {
    element.addEventListener(end, () => controls.set(element, []));
  }
}
