// A Session is one player in one world: reset(start, seed), then step(chords, memory) -> a chunk of
// frames. realtime.py and engine/actors.py, one after the other on one thread. It knows nothing of
// pages, and nothing of ONNX: `networks` are three functions of typed arrays (see networks.js).

import { MAX_PITCH, START_POSE, actionOf, pitchOf, stepPose, withoutPitch } from "./camera.js";
import { WINDOW, camerasOf, makeContext, queryOffsets } from "./context.js";
import { gaussian, sample } from "./flow.js";
import { MemoryBank } from "./memory.js";

export class Session {
  constructor(facts, networks) {
    const [C, h, w] = facts.latent;
    this.facts = facts;
    this.networks = networks;
    this.size = { h, w };
    this.cells = C * h * w;
  }

  /** From a start picture's latent (C, h, w): frame 0 as the model sees it. */
  async reset(latent, seed) {
    this.seed = seed;
    this.segment = 0;
    this.walk = { poses: [START_POSE], actions: [] };
    this.latents = [latent];
    this.bank = new MemoryBank();
    this.bank.append(latent, camerasOf(this.walk.poses, 0), 0);
    const { frames, state } = await this.networks.decodeFirst(latent);
    this.state = state;
    return { frames, poses: [START_POSE], memory: [], first: 0 };
  }

  /** The next frames under one chord per frame; `remember` false: it sees its last frames only. */
  async step(asked, remember) {
    const fresh = asked.length / WINDOW.stride;
    const made = this.walk.actions.length; // frames behind us; the newest is frame `made`
    const chords = this.advance(asked);

    const past = this.latents.slice(-WINDOW.past);
    const first = this.count - past.length;
    const recalled = this.segment && remember ? this.recall(fresh, first) : [];
    const context = makeContext(this.walk, past, first, fresh, recalled, this.size);
    const x0 = await this.imagine(context, fresh);
    this.remember(x0, fresh);

    const { frames, state } = await this.networks.decodeNext(x0, fresh, this.state);
    this.state = state;
    return {
      frames,
      first: made + 1, // index of the chunk's first frame
      poses: this.walk.poses.slice(made + 1),
      chords,
      memory: recalled.map(({ time, score, sink }) => this.describe(time, score, sink)),
    };
  }

  /**
   * Where the player will be: actions are decided before the segment is made. Returns the chords as
   * they are walked: nobody looks further up or down than the world was drawn in training.
   */
  advance(chords) {
    const { poses, actions } = this.walk;
    const limit = this.facts.max_pitch ?? MAX_PITCH;
    this.count = actions.length / WINDOW.stride + 1; // latents so far
    return chords.map((chord) => {
      const pitch = poses.at(-1)[3] + pitchOf(chord);
      const walked = Math.abs(pitch) > limit + 0.01 ? withoutPitch(chord) : chord;
      const action = actionOf(walked);
      actions.push(action);
      poses.push(stepPose(poses.at(-1), action, limit));
      return walked;
    });
  }

  recall(fresh, before) {
    const newest = this.count + fresh - 1;
    const asking = queryOffsets(fresh).map((offset) => {
      return camerasOf(this.walk.poses, newest - offset).at(-1);
    });
    return this.bank.retrieve(asking, before, this.facts.sink);
  }

  /** From noise to the latents of a segment, (n, C, h, w). */
  imagine(context, fresh) {
    const { sigmas, method } = this.facts;
    const size = fresh * this.cells;
    const count = method === "renoise" ? sigmas.length - 1 : 1; // it adds noise at every level
    const noise = gaussian(this.seed, this.segment, count * size);
    const draws = Array.from({ length: count }, (_, k) => noise.slice(k * size, (k + 1) * size));
    const velocity = (x, sigma) => this.networks.velocity(x, sigma, context, fresh);
    return sample(velocity, draws, sigmas, method);
  }

  /** New latents join the past and the bank. */
  remember(x0, fresh) {
    for (let k = 0; k < fresh; k++) {
      const latent = x0.slice(k * this.cells, (k + 1) * this.cells);
      const time = this.count + k;
      this.latents = [...this.latents, latent].slice(-WINDOW.past);
      this.bank.append(latent, camerasOf(this.walk.poses, time), time);
    }
    this.segment += 1;
  }

  /** What a page shows of a recalled latent: its last frame, and where the camera was. */
  describe(time, score, sink) {
    const frame = WINDOW.stride * time;
    return { frame, score, sink, pose: this.walk.poses[frame] };
  }
}
