// The page: one world in a Worker, one canvas, and whoever walks. It decides as late as possible:
// the next chunk is asked for when what is left to show just covers the making of it.

import { Controls, listen } from "./controls.js";
import { Game } from "./game.js";
import { Screen, drawMap, drawStrip, figure } from "./view.js";
import { LATENT, formatHash, parseHash } from "./walk.js";
import { World } from "./world.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 16; // frames per second: the rate of the films that the model was trained with
const FIRST = 14; // new latents of the first segment
const MARGIN = 1.25; // how much faster than it is shown a segment must be made

const state = {
  facts: null,
  seed: 42,
  start: 0,
  fresh: null, // new latents per segment; null until the first segment says how fast this device is
  remember: true, // is the memory on?
  paused: false,
  homeward: false, // lead me home, from the next decision on
  script: [], // chords of a link or of the way home, before the player's own
  chords: [], // all that was walked
  path: [], // poses, frame by frame
  chunks: [], // {first, memory, remember} of what was made, newest last
  world: 0, // counts restarts: an answer to an older question is thrown away
  speed: SHOWN, // frames per second that are made
  latency: [], // ms from key to picture
  frames: 0,
};
const controls = new Controls();
const screen = new Screen($("screen"));
const game = new Game(describeGame, (index) => compareWithout(index).catch(fail));
const world = new World(say, (text) => trouble(`The model's thread did not start: ${text}`));
Object.assign(window, { page: { state, screen, controls, game, world, begin, ready: false } });

// ---- words --------------------------------------------------------------------------------------

let quiet = 0;
function say(text, ms = 0) {
  if ($("banner").className === "trouble") return;
  clearTimeout(quiet);
  $("banner").textContent = text;
  if (ms) quiet = setTimeout(() => ($("banner").textContent = ""), ms);
}

/** Nothing goes on from here: the sentence stays until a walk begins anew. */
function trouble(text) {
  say(text);
  $("banner").className = "trouble";
  state.paused = true;
}

function fail(error) {
  trouble(error.message);
}

// ---- a walk -------------------------------------------------------------------------------------

/** A new walk from a start picture; `chords` are played before the player's own. */
async function begin({ seed = state.seed, start = state.start, fresh = null, chords = [] } = {}) {
  const mine = ++state.world;
  Object.assign(state, { seed, start, chords: [], path: [], chunks: [], fresh });
  state.script = [...chords];
  state.homeward = false;
  if ($("banner").className === "trouble") {
    $("banner").className = "";
    say("");
  }
  setPaused(false);
  controls.release();
  screen.clear(); // before waiting: what is left of the old walk belongs to no chunk any more
  const chunk = await world.ask("reset", { start, seed });
  if (mine !== state.world) return;
  show(chunk);
  for (const [number, button] of [...$("gallery").children].entries()) {
    button.setAttribute("aria-pressed", number === start);
  }
}

/** Forever: wait until it is time, decide, have it imagined, show it. */
async function play() {
  for (;;) {
    await until(() => !state.paused && state.path.length && screen.left() <= lead());
    const mine = state.world;
    const chords = decide(framesNeeded());
    const { remember } = state;
    const began = performance.now();
    const chunk = await world.ask("step", { chords, remember }).catch((error) => {
      if (mine === state.world) fail(error);
    });
    if (!chunk || mine !== state.world) continue;
    measure(chunk.chords.length, performance.now() - began);
    state.chords.push(...chunk.chords);
    game.walked(chunk.chords);
    show({ ...chunk, remember });
  }
}

function framesNeeded() {
  return LATENT * (state.chords.length ? state.fresh : FIRST);
}

/** How long before the last frame the next chunk must be begun, ms. */
function lead() {
  return (MARGIN * 1000 * framesNeeded()) / state.speed + 10;
}

function decide(n) {
  // only now is everything that was walked known
  if (state.homeward) state.script = game.wayHome();
  state.homeward = false;
  const given = state.script.splice(0, n);
  if (given.length < n) return [...given, ...controls.decide(n).slice(given.length)];
  controls.forget(); // keys that were tapped meanwhile asked for nothing
  return given;
}

/** The fewest new latents that this device makes fast enough; known after the first segment. */
function measure(frames, ms) {
  const made = (1000 * frames) / ms;
  state.speed = state.chords.length ? 0.7 * state.speed + 0.3 * made : made;
  if (state.fresh) return;
  const { lengths } = state.facts;
  const longest = Math.max(...lengths);
  // a segment costs what its latents cost: the new ones, four of the past, five of memory
  const perLatent = ms / (FIRST + 1);
  const fits = (n) => (LATENT * n * 1000) / (perLatent * (n + 9)) >= MARGIN * SHOWN;
  state.fresh = Math.min(longest, ...lengths.filter(fits));
}

function show(chunk) {
  state.chunks.push({ first: chunk.first, memory: chunk.memory, remember: chunk.remember });
  screen.put(chunk, 1000 / Math.min(SHOWN, Math.max(4, state.speed)));
}

async function until(condition) {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 4));
}

// ---- every frame --------------------------------------------------------------------------------

let painted = 0;
screen.onFrame = (frame, now) => {
  state.path[frame.index] = frame.pose;
  state.frames = frame.index;
  controls.shown = new Set(frame.chord.split("+").map((key) => key[0]));
  for (const key of controls.shown) {
    if (!controls.pressed.has(key)) continue;
    state.latency = [...state.latency.slice(-8), now - controls.pressed.get(key)];
    controls.pressed.delete(key);
  }
  game.see(frame);
  if (now - painted < 120 && frame.index) return;
  painted = now;
  paint(frame);
};

function paint(frame) {
  const chunk = state.chunks.findLast(({ first }) => first <= frame.index);
  if (!chunk) return;
  const path = state.path.filter((pose, index) => pose && index % LATENT === 0);
  if (!path.length) return;
  drawMap($("map"), path, chunk.memory, frame.pose);
  if (chunk !== paint.chunk) drawStrip($("strip"), chunk.memory, screen.kept);
  paint.chunk = chunk;

  // of this picture, which may have been made before the last command
  const on = frame.remember !== false;
  $("stage").dataset.memory = on ? "on" : "off";
  $("chip").textContent = `memory ${on ? "on" : "off"}`;
  drawNumbers();
}

function drawNumbers() {
  const sorted = [...state.latency].sort((one, other) => one - other);
  const middle = sorted[sorted.length >> 1];
  const numbers = {
    made: `${state.speed.toFixed(1)} fps`,
    shown: `${screen.framesPerSecond().toFixed(1)} fps`,
    "key to picture": middle ? `${(middle / 1000).toFixed(2)} s` : "–",
    "runs on": state.backend,
    frame: state.frames,
    seed: state.seed,
  };
  const cells = Object.entries(numbers).map(([name, value]) => {
    const cell = document.createElement("div");
    const [term, number] = ["dt", "dd"].map((tag) => document.createElement(tag));
    [term.textContent, number.textContent] = [name, value];
    cell.append(term, number);
    return cell;
  });
  $("numbers").replaceChildren(...cells);
}

// ---- commands -----------------------------------------------------------------------------------

function setMemory(on) {
  state.remember = on;
  document.body.dataset.memory = on ? "on" : "off";
  $("memory").firstElementChild.textContent = `Memory is ${on ? "ON" : "OFF"}`;
  $("memory").lastElementChild.textContent = `M switches it ${on ? "off" : "on"}`;
  $("strip-title").textContent = on
    ? "Old frames it looks back at"
    : "It sees its last frames only";
}

function toggleMemory() {
  const playing = game.phase === "out" || game.phase === "home";
  if (playing) say("The game walks without memory by itself, at the end.", 4000);
  else if (!state.facts.memory) say("This model was trained without a memory.", 4000);
  else setMemory(!state.remember);
}

let pausedAt = 0;
function setPaused(paused) {
  if (paused === state.paused) return;
  const ended = game.phase === "over" || $("banner").className === "trouble";
  if (!paused && ended) return restart();
  if (paused) pausedAt = performance.now();
  else screen.delay(performance.now() - pausedAt);
  controls.forget();
  state.paused = paused;
  screen.frozen = paused && pausedAt;
  $("pause").setAttribute("aria-pressed", paused);
}

/** In the replay nobody walks, and the model's thread is elsewhere: there is nothing to go on from. */
function togglePause() {
  if (game.phase !== "replay") setPaused(!state.paused);
}

/** Nobody looks: nothing is imagined. */
let away = false;
document.addEventListener("visibilitychange", () => {
  if (document.hidden === away || (document.hidden && state.paused)) return;
  away = document.hidden;
  setPaused(away);
});

async function share() {
  const hash = formatHash(state, state.facts);
  history.replaceState(null, "", hash);
  const copied = await navigator.clipboard?.writeText(location.href).then(
    () => true,
    () => false,
  );
  const where = copied ? "copied" : "in the address bar";
  say(`The link to this walk is ${where}.`, 4000);
}

function restart(changes = {}) {
  game.stop(); // before begin: the end of a game pauses the page
  return begin(changes).catch(fail);
}

const COMMANDS = {
  KeyM: toggleMemory,
  KeyP: togglePause,
  Space: togglePause,
  KeyR: () => restart(),
  KeyN: () => restart({ seed: Math.floor(Math.random() * 2 ** 31) }),
  KeyC: () => share().catch((error) => say(error.message, 4000)),
};
controls.onCommand = (code, event) => {
  if (!(code in COMMANDS) || !state.facts) return;
  event.preventDefault();
  COMMANDS[code]();
};
controls.onChange = (keys) => {
  for (const element of document.querySelectorAll(".key")) {
    element.classList.toggle("down", keys.has(element.dataset.key));
  }
};

/** After a click of the mouse a button gives the focus back: Space belongs to the game again. */
function onClick(button, action) {
  button.addEventListener("click", (event) => {
    if (event.detail) button.blur();
    action();
  });
}

const BUTTONS = { memory: "KeyM", pause: "KeyP", restart: "KeyR", reseed: "KeyN", share: "KeyC" };
for (const [id, code] of Object.entries(BUTTONS)) {
  onClick($(id), () => state.facts && COMMANDS[code]());
}

// ---- the game -----------------------------------------------------------------------------------

async function startGame() {
  game.stop();
  setMemory(state.facts.memory);
  await begin();
  await until(() => state.path.length);
  game.begin(screen.kept.get(0), state.path[0]);
}

onClick($("game-start"), () => state.facts && startGame().catch(fail));
onClick($("game-home"), () => {
  if (!state.script.length) state.homeward = true; // led already: no way back from the way back
});
onClick($("game-stop"), () => {
  if (game.phase === "replay") return restart();
  state.script = [];
  state.homeward = false;
  game.stop();
});

function describeGame(phase, { frames, least, scores, best, first, without }, away) {
  const seconds = Math.floor(frames / SHOWN);
  const texts = {
    off:
      "Walk out for half a minute, then return to where you began. How much of the first " +
      "picture is still there, with memory and without?",
    out: `Walk out, as far and crooked as you like: ${seconds} s of ${Math.round(least / SHOWN)}.`,
    home: away
      ? `Now return to the ring on the map, and look as at first: ${away.metres.toFixed(1)} m ` +
        `and ${Math.round(away.degrees)}° away.`
      : "Now return to the ring on the map, and look as you looked at first.",
    replay: "Home. The same steps are imagined once more, without memory…",
    over:
      scores &&
      `With memory the picture on return is ${scores.on.toFixed(1)} dB like the ` +
        `first one, without ${scores.off.toFixed(1)} dB (${best.metres?.toFixed(2)} m and ` +
        `${Math.round(best.degrees)}° off). Higher is closer.`,
  };
  const ready = phase === "out" && frames >= least;
  $("game-text").textContent = ready ? "Far enough. Return whenever you like." : texts[phase];
  $("game-start").hidden = phase !== "off" && phase !== "over";
  $("game-stop").hidden = phase === "off" || phase === "over";
  $("game-home").hidden = !ready && phase !== "home";
  $("result").hidden = phase !== "over";
  if (phase !== "over") return;
  $("result").replaceChildren(
    figure(first.pixels, [bold("first"), "picture"]),
    figure(best.pixels, [bold(`${scores.on.toFixed(1)} dB`), "with memory"]),
    figure(without, [bold(`${scores.off.toFixed(1)} dB`), "without"]),
  );
}

function bold(text) {
  const element = document.createElement("b");
  element.textContent = text;
  return element;
}

/** The same steps without memory, up to frame `index`; nobody walks meanwhile. */
async function compareWithout(index) {
  const { seed, start, fresh } = state;
  const walked = [...state.chords];
  setPaused(true);
  const mine = ++state.world; // the walk ends here
  await world.ask("reset", { start, seed });
  for (let at = 0; at < walked.length && mine === state.world;) {
    const n = LATENT * (at ? fresh : FIRST);
    const question = { chords: walked.slice(at, at + n), remember: false };
    const { frames, first } = await world.ask("step", question);
    if (index < first + n && mine === state.world) game.finish(cut(frames, index - first));
    if (index < first + n) return;
    at += n;
    say(`without memory: ${Math.round((100 * at) / index)} %`, 1000);
  }
}

function cut(frames, k) {
  const { width, height } = $("screen");
  const size = 4 * width * height;
  return new ImageData(
    new Uint8ClampedArray(frames.slice(k * size, (k + 1) * size)),
    width,
    height,
  );
}

// ---- opening ------------------------------------------------------------------------------------

function fillGallery({ starts }) {
  const buttons = starts.map((name, number) => {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    picture.src = `model/start-${number}.png`;
    picture.alt = `start picture ${number}: ${name}`;
    button.append(picture);
    onClick(button, () => restart({ start: number }));
    return button;
  });
  $("gallery").replaceChildren(...buttons);
}

/** The walk that the address asks for; or none, and a note. */
function fromAddress() {
  const { starts, lengths } = state.facts;
  try {
    return parseHash(location.hash, { starts: starts.length, lengths });
  } catch (error) {
    say(`The walk in this link is ignored: ${error.message}.`, 9000);
    return null;
  }
}

async function open() {
  const wanted = new URLSearchParams(location.search).get("backend");
  const { facts, backend } = await world.ask("open", { backend: wanted });
  Object.assign(state, { facts, backend });
  [$("screen").height, $("screen").width] = facts.frame;
  if (!facts.memory) setMemory(false);
  say("");
  fillGallery(facts);
  play().catch(fail); // first: where the first walk does not begin, the next one may
  await begin(fromAddress() ?? {});
  window.page.ready = true;
}

listen(controls, {
  screen: $("screen"),
  thumb: $("thumb"),
  keys: document.querySelectorAll(".key"),
});
function useTouch(touch) {
  document.body.dataset.touch = touch;
  $("hint").textContent = touch
    ? "The thumb pad walks. Drag on the picture to look around."
    : "W A S D walk, arrows or I J K L look, or drag on the picture. A gamepad works too.";
}
useTouch(matchMedia("(pointer: coarse)").matches);
addEventListener("pointerdown", (event) => event.pointerType === "touch" && useTouch(true), true);
addEventListener("hashchange", () => {
  const walk = state.facts && fromAddress();
  if (walk) restart(walk);
});
drawStrip($("strip"), [], screen.kept);
if (typeof WebAssembly !== "object" || typeof DecompressionStream !== "function") {
  trouble("This browser is too old: the world model needs WebAssembly and DecompressionStream.");
} else {
  open().catch(fail);
}
