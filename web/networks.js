// The networks that export.py wrote, as functions of typed arrays. The only file that knows ONNX.

export const FORMAT = 2; // of model/facts.json; export.py writes the same number
export const EXPORT = "python export.py --web web";
const FILES = ["network.onnx.gz", "decoder_first.onnx.gz", "decoder_next.onnx.gz"];
const INSTALL = "npm ci --prefix web";
// a program with one function that uses a vector of 128 bits
const SIMD = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98,
  11,
];

/** What went wrong in one sentence, and what to type; shown as it is. */
export class Trouble extends Error {}

// ---- files --------------------------------------------------------------------------------------

function lost() {
  throw new Trouble("The connection was lost. Reload the page to try again.");
}

/** A reply. The host is asked whether the file is still the same: of two exports half would not run. */
function ask(url) {
  return fetch(url, { cache: "no-cache" }).catch(lost);
}

/**
 * A reply's bytes, and how many come at a time. A visitor can do nothing but try again, whoever made the
 * page can make the file.
 */
export async function download(url, command, come = () => {}) {
  const reply = await ask(url);
  if (!reply.ok) throw new Trouble(`${url.pathname} is missing. Make it with: ${command}`);
  const count = (part, out) => {
    come(part.byteLength);
    out.enqueue(part);
  };
  const counted = reply.body.pipeThrough(new TransformStream({ transform: count }));
  return new Response(counted).arrayBuffer().catch(lost);
}

/** The bytes of a file that was packed with gzip; some hosts say so, and the browser has unpacked it. */
async function unzip(url, command, come) {
  const bytes = await download(url, command, come);
  const [one, two] = new Uint8Array(bytes, 0, Math.min(2, bytes.byteLength));
  if (one !== 0x1f || two !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer().catch(() => {
    throw damaged(url, command);
  });
}

function damaged(url, command) {
  return new Trouble(`${url.pathname} is damaged. Make it again with: ${command}`);
}

/** What the exported model is: sizes, lengths of segments, start pictures. */
export async function readFacts(folder) {
  const reply = await ask(new URL("facts.json", folder));
  if (!reply.ok) throw new Trouble(`There is no model here yet. Make one with: ${EXPORT}`);
  const text = await reply.text().catch(lost);
  let facts = {};
  try {
    facts = JSON.parse(text);
  } catch {
    // no JSON is no format
  }
  if (facts.format !== FORMAT) {
    throw new Trouble(
      `These model files have format ${facts.format ?? "unknown"}, this page reads ${FORMAT}. ` +
        `Make them again with: ${EXPORT}`,
    );
  }
  return facts;
}

// ---- runtime ------------------------------------------------------------------------------------

/**
 * onnxruntime-web, from beside this page and from nowhere else. One processor core, otherwise idle,
 * made 46 frames per second where 16 are shown. WebGPU opens the networks, but its pictures have not
 * been compared on a graphics card yet, so it is for those who ask: ?backend=webgpu
 */
async function openRuntime(base, backend, come) {
  if (typeof WebAssembly !== "object") {
    throw new Trouble("This browser has no WebAssembly, which the world model needs to run in it.");
  }
  if (!WebAssembly.validate(Uint8Array.from(SIMD))) {
    throw new Trouble("This browser's WebAssembly has no SIMD, which the world model needs.");
  }
  const variant = backend === "webgpu" ? ".asyncify" : "";
  const binary = `ort-wasm-simd-threaded${variant}.wasm.gz`;
  const script = new URL(`runtime/ort.${backend}.bundle.min.mjs`, base);
  const there = await ask(script);
  if (!there.ok) throw new Trouble(`${script.pathname} is missing. Fetch it with: ${INSTALL}`);
  const runtime = await import(script).catch(lost);
  runtime.env.wasm.wasmBinary = await unzip(new URL(`runtime/${binary}`, base), INSTALL, come);
  // several threads need a page that is isolated by its headers, which few static hosts send
  const cores = globalThis.navigator?.hardwareConcurrency ?? 1;
  runtime.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, cores) : 1;
  return { runtime, backend };
}

/** A function of named tensors out of one file. */
async function openNetwork({ runtime, backend }, url, come) {
  const bytes = await unzip(url, EXPORT, come);
  const options = {
    executionProviders: backend === "webgpu" ? ["webgpu", "wasm"] : ["wasm"],
    logSeverityLevel: 3, // errors alone
  };
  const network = await runtime.InferenceSession.create(bytes, options).catch((error) => {
    if (/protobuf|parsing/i.test(error.message)) throw damaged(url, EXPORT);
    const memory = /memory|allocat/i.test(error.message);
    const reason = memory ? "this device has too little memory for it" : error.message;
    throw new Trouble(`The world model did not start: ${reason}`);
  });
  return (inputs) => network.run(inputs);
}

/** One after the other: a graphics card opens one at a time. */
async function openAll(place, folder, come) {
  const opened = [];
  for (const name of FILES) opened.push(await openNetwork(place, new URL(name, folder), come));
  return opened;
}

// ---- the three functions of session.js ----------------------------------------------------------

export async function openNetworks(base, facts, wanted, progress) {
  const folder = new URL("model/", base);
  let bytes = 0;
  const come = (more) => {
    const before = Math.floor(bytes / 1e6);
    bytes += more;
    const now = Math.floor(bytes / 1e6);
    if (now > before) progress(`loading the world model: ${now} MB`);
  };
  let place = await openRuntime(base, wanted === "webgpu" ? "webgpu" : "wasm", come);
  const opened = await openAll(place, folder, come).catch(async (error) => {
    if (place.backend === "wasm") throw error;
    // what this graphics card cannot run, the processor can
    place = await openRuntime(base, "wasm", come);
    return openAll(place, folder, come);
  });
  const [network, first, next] = opened;

  const [C, h, w] = facts.latent;
  const { Tensor } = place.runtime;
  const floats = (data, shape) => new Tensor("float32", data, shape);
  const integers = (data) => new Tensor("int32", data, [data.length]);
  const latents = (data, n) => floats(data, [n, C, h, w]);
  const split = ({ frames, ...state }) => ({ frames: frames.data, state: renamed(state) });

  return {
    backend: place.backend,
    /** What the network says at (x, σ): the velocity of the new latents, (n, C, h, w). */
    async velocity(x, sigma, context, fresh) {
      const T = context.times.length;
      const inputs = {
        noisy: latents(x, fresh),
        sigma: floats(Float32Array.of(sigma), [1]),
        clean: latents(context.clean, T - fresh),
        rays: floats(context.rays, [1, context.rays.length / (T * h * w), T, h, w]),
        mouse: floats(context.mouse, [1, T, 12, 2]),
        keyboard: floats(context.keyboard, [1, T, 12, 6]),
        times: integers(context.times),
        clock: integers(context.clock),
      };
      return (await network(inputs)).velocity.data;
    },
    /** A latent -> one frame of a new video, RGBA, and what the decoder remembers. */
    decodeFirst: async (latent) => split(await first({ latents: latents(latent, 1) })),
    /** The next n latents of the video -> four frames each. */
    decodeNext: async (z, n, state) => split(await next({ latents: latents(z, n), ...state })),
  };
}

/** What one call returns as `next_3` is what the next one takes as `past_3`. */
function renamed(state) {
  const pairs = Object.entries(state);
  return Object.fromEntries(pairs.map(([name, x]) => [name.replace("next", "past"), x]));
}
