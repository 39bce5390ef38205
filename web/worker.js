// The thread that owns the model: questions come in, answers go out, one after the other.

import { EXPORT, Trouble, download, openNetworks, readFacts } from "./networks.js";
import { Session } from "./session.js";

const base = new URL("./", import.meta.url);
let session = null;

const answers = {
  /** Facts of the model, and on what it runs. */
  async open({ backend }) {
    const folder = new URL("model/", base);
    const facts = await readFacts(folder);
    const progress = (stage) => postMessage({ stage });
    const networks = await openNetworks(base, facts, backend, progress);
    session = new Session(facts, networks);
    session.starts = await download(new URL("starts.bin", folder), EXPORT);
    return { facts, backend: networks.backend };
  },
  reset({ start, seed }) {
    const bytes = 4 * session.cells;
    const latent = new Float32Array(session.starts.slice(start * bytes, (start + 1) * bytes));
    return session.reset(latent, seed);
  },
  step: ({ chords, remember }) => session.step(chords, remember),
};

// a queue: the session is in the middle of a step while the next question arrives
let queue = Promise.resolve();
onmessage = ({ data: { id, name, question } }) => {
  queue = queue.then(async () => {
    try {
      const answer = await answers[name](question);
      const moved = answer.frames ? [answer.frames.buffer] : [];
      postMessage({ id, answer }, moved);
    } catch (error) {
      const text = error instanceof Trouble ? error.message : `The world stopped: ${error.message}`;
      postMessage({ id, error: text });
    }
  });
};
