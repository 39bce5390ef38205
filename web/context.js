// Memory, past, new: all that the network sees besides noise. context.py, anchored encoding.
//
//     frames     0 | 1 2 3 4 | 5 6 7 8 | 9 ...      latent L >= 1 covers frames 4L − 3 .. 4L   (1)
//
// Memory slot j was asked for by the new latent that lies j·new/5 before the newest (2). Latent L
// sees the twelve actions 4L − 12 .. 4L − 1: the four that made its frames and eight before (3).

import { anchoredRays, poseToC2w } from "./camera.js";

export const WINDOW = { stride: 4, first: 15, past: 4, memory: 5 };
export const ACTIONS_SEEN = 12;
const NULL_MOUSE = 1; // "no action": what memory tokens carry
const NULL_KEY = -1;

/** Memory slot j asks this many latents before the newest. */
export function queryOffsets(fresh, slots = WINDOW.memory) {
  return Array.from({ length: slots }, (_, slot) => Math.floor((slot * fresh) / slots)); // (2)
}

/** The cameras of a latent's four frames; latent 0 has frame 0 four times. */
export function camerasOf(poses, latent) {
  const frames = [3, 2, 1, 0].map((back) => Math.max(0, WINDOW.stride * latent - back)); // (1)
  return frames.map((frame) => poseToC2w(poses[frame]));
}

/** The twelve actions that a latent sees, oldest first. */
export function actionsOf(actions, latent) {
  const first = WINDOW.stride * latent - ACTIONS_SEEN;
  const frames = Array.from({ length: ACTIONS_SEEN }, (_, k) => Math.max(0, first + k)); // (3)
  return frames.map((frame) => actions[frame]);
}

/**
 * The ONE place where a context is put together.
 *
 * walk: {poses, actions} of every frame from frame 0; the new latents' included
 * past: latents, Float32Array (C, h, w) each, the last of which is latent first + past.length − 1
 * recalled: rows of the memory bank, or none
 */
export function makeContext(walk, past, first, fresh, recalled, { h, w }) {
  const own = Array.from({ length: past.length + fresh }, (_, k) => first + k);
  const cameras = own.map((latent) => camerasOf(walk.poses, latent));
  const anchor = cameras[past.length - 1].at(-1); // the last past frame
  const all = [...recalled.map((row) => row.cameras), ...cameras];

  // memory tokens have times and cameras of their own, and no actions
  const none = recalled.length * ACTIONS_SEEN;
  const seen = own.flatMap((latent) => actionsOf(walk.actions, latent));
  const mouse = [...Array(2 * none).fill(NULL_MOUSE), ...seen.flatMap((action) => action.mouse)];
  const keys = [...Array(6 * none).fill(NULL_KEY), ...seen.flatMap((action) => action.keyboard)];

  return {
    clean: concatenate([...recalled.map((row) => row.latent), ...past]),
    rays: anchoredRays(all, anchor, h, w),
    mouse: Float32Array.from(mouse),
    keyboard: Float32Array.from(keys),
    times: Int32Array.from([...recalled.map((row) => row.time), ...own]),
    clock: Int32Array.from([...recalled.keys(), ...own.keys()]), // starts again after the memory
  };
}

export function concatenate(arrays) {
  const size = arrays.reduce((sum, array) => sum + array.length, 0);
  const all = new Float32Array(size);
  let at = 0;
  for (const array of arrays) {
    all.set(array, at);
    at += array.length;
  }
  return all;
}
