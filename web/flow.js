// Walk from noise to clean latents along the predicted velocity: the samplers of flow.py, and noise
// that a seed decides, the same in every browser and in engine/exported.py.
//
// torch's generator does not exist here. This one is a counter: number i of segment k under a seed
// is a hash of (seed, k, i): nothing has to be drawn in order, and a walk can be played again.

const GOLDEN = 0x6d2b79f5; // odd: a counter times it visits all 2³² values
const SEGMENTS = 1_000_003; // as in play: seed and segment become one number

// ---- noise --------------------------------------------------------------------------------------

/** Uniform in [0, 1): mulberry32's hash of a counter. */
function uniform(stream, i) {
  let t = (stream + Math.imul(i + 1, GOLDEN)) | 0;
  t = Math.imul(t ^ (t >>> 15), t | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
}

/** Float32Array of n numbers of N(0, 1), n even: Box and Muller make two of two. */
export function gaussian(seed, segment, n) {
  const stream = (Math.imul(seed, SEGMENTS) + segment) | 0;
  const values = new Float32Array(n);
  for (let i = 0; i < n; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform(stream, i))); // 1 − u is never 0
    const angle = 2 * Math.PI * uniform(stream, i + 1);
    values[i] = radius * Math.cos(angle);
    values[i + 1] = radius * Math.sin(angle);
  }
  return values;
}

// ---- samplers: velocity(x, σ) is the network, all noise is given --------------------------------

/** Σ weight · array */
function combine(...terms) {
  const sum = new Float32Array(terms[0][1].length);
  for (let i = 0; i < sum.length; i++) {
    let value = 0;
    for (const [weight, array] of terms) value += weight * array[i];
    sum[i] = value;
  }
  return sum;
}

/** Jump to the clean estimate, then add noise of the next level: as the student is trained. */
async function renoise(velocity, draws, sigmas) {
  let x = draws[0];
  for (let i = 0; ; i++) {
    const x0 = combine([1, x], [-sigmas[i], await velocity(x, sigmas[i])]); // (4)
    const after = sigmas[i + 1];
    if (after === 0) return x0;
    x = combine([1 - after, x0], [after, draws[i + 1]]); // (1)
  }
}

/** UniPC of order 2 on x̂0: correct the latent just reached, then predict the next. */
async function unipc(velocity, [noise], sigmas) {
  const lambda = sigmas.map((sigma) => Math.log1p(-sigma) - Math.log(sigma)); // (6)
  const steps = sigmas.length - 1;
  let x = noise;
  let start = x; // the corrected latent that the last step began at
  let order = 0;
  const clean = []; // x̂0 of every step
  for (let i = 0; i < steps; i++) {
    clean.push(combine([1, x], [-sigmas[i], await velocity(x, sigmas[i])])); // (4)
    if (i > 0) {
      x = correct(start, clean, sigmas, lambda, i, order);
    }
    start = x;
    order = Math.min(2, steps - i, i + 1);
    x = predict(start, clean, sigmas, lambda, i, order);
  }
  return x;
}

/** From level i to level i + 1, by x̂0 or by the line through the last two. */
function predict(start, clean, sigmas, lambda, i, order) {
  const after = sigmas[i + 1];
  const weight = Math.expm1(lambda[i] - lambda[i + 1]); // (8): −1 where σ' = 0
  const scale = -(1 - after) * weight;
  if (order === 1) return combine([after / sigmas[i], start], [scale, clean[i]]); // (7)
  const slope = (0.5 * (lambda[i + 1] - lambda[i])) / (lambda[i - 1] - lambda[i]);
  return combine(
    [after / sigmas[i], start],
    [scale * (1 - slope), clean[i]],
    [scale * slope, clean[i - 1]],
  );
}

/** The step from level i − 1 to level i again, now that x̂0 at level i is known. */
function correct(start, clean, sigmas, lambda, i, order) {
  const h = lambda[i] - lambda[i - 1];
  const weight = Math.expm1(-h); // (8)
  const scale = -(1 - sigmas[i]) * weight;
  const from = [sigmas[i] / sigmas[i - 1], start];
  const half = 0.5 * scale;
  if (order === 1) return combine(from, [half, clean[i - 1]], [half, clean[i]]); // (7)

  // two differences of x̂0, weighted so that the integral in (7) is exact for parabolas
  const r = (lambda[i - 2] - lambda[i - 1]) / h;
  const phi1 = -weight / h - 1;
  const phi2 = (weight / h + 1) / h - 0.5;
  const before = (phi1 / weight - (2 * phi2) / weight) / (1 - r);
  const now = phi1 / weight - before;
  return combine(
    from,
    [(scale * before) / r, clean[i - 2]],
    [scale * (1 - before / r - now), clean[i - 1]],
    [scale * now, clean[i]],
  );
}

const METHODS = { renoise, unipc };

/** Draws of N(0, 1), the first to begin with -> x0. */
export function sample(velocity, draws, sigmas, method) {
  return METHODS[method](velocity, draws, sigmas);
}
