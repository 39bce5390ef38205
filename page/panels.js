// What a record of the server changes on the page, beside the picture itself.
//
// A note tells what has happened. The header of a frame tells how that picture was made: where its
// camera stood, with which keys, whether with memory, how long each step took.
"use strict";

const PANELS = 200; // milliseconds between two drawings of the panels: one costs like a picture
const LONGEST = 6000; // frames of the path that are kept, and of latencies a third
const SLOTS = 5; // old frames that the memory gives to a chunk

// ---- notes --------------------------------------------------------------------------------------

function takeNote(note) {
  if (note.hello) greet(note);
  if (note.stage !== undefined) say(note.stage, 0);
  if (note.info) say(note.info, 6000);
  if (note.reset) {
    play.path = [];
    play.memory = [];
    play.truth = note.truth;
    drawStrip([]);
  }
  if (note.game) showGame(note.game);
  if (note.link && play.role === "play") copyLink(note.link);
  if (note.memory) {
    play.memory = note.memory;
    play.memoryIsNew = true;
  }
  if (note.facts) {
    play.facts = note.facts;
    if (play.frame) drawPanels(play.frame);
  }
  if (note.role) takeRole(note.role); // last: it has the last word over the picture
}

/** The first note of a connection: who we are, and where one may start. */
function greet(note) {
  play.id = note.id;
  play.truth = note.truth;
  showGallery(note.gallery);
  say(note.stage || "", 0);

  // another server than before counts its notes from 0, and knows nothing of our walk
  if (play.server !== note.server) {
    play.facts = { n: 0 };
    play.path = [];
    play.memory = [];
    play.memoryIsNew = false;
  }
  play.server = note.server;
  const wordless = note.preset === "fake";
  $("prompt").disabled = wordless;
  $("prompt").placeholder = wordless ? "the game needs no words" : "what the world is";
}

/** Who plays follows the link of the address, once: after a reload the old page plays at first. */
function takeRole(role) {
  const changed = role !== play.role;
  play.role = role;
  if (changed && role === "watch") say("", 0);
  else if (changed) say("You play now.", 4000);
  if (role === "watch") return;
  if (changed || !play.followed) tellHidden(); // before a reload the page said that it was hidden
  if (play.followed) return;
  play.followed = true;
  followLink();
}

// ---- frames -------------------------------------------------------------------------------------

/** The picture of this header has just been drawn. */
function takeFrame(header) {
  const now = performance.now();
  play.frame = header;
  play.frames++;
  takeRole(header.role);
  play.drawn.push(now);
  while (play.drawn[0] < now - 2000) play.drawn.shift();
  measureLatency(header.keys, now);

  // an undo goes back to an earlier frame: what was walked after it did not happen
  while (play.path.at(-1)?.[5] >= header.i) play.path.pop();
  play.path.push([...header.pose, header.i]);
  if (play.path.length > LONGEST) play.path.splice(1, LONGEST / 3);

  compareRevisit(header);
  if (now - play.painted <= PANELS) return;
  play.painted = now;
  drawPanels(header);
  drawMap(header);
  if (!play.memoryIsNew) return;
  play.memoryIsNew = false;
  drawStrip(play.memory);
}

/** From a key that went down to the first picture that was made with it. */
function measureLatency(keys, now) {
  for (const key of keys) {
    if (!(key in play.pressed)) continue;
    play.latency.push(now - play.pressed[key]);
    delete play.pressed[key];
    if (play.latency.length > LONGEST / 3) play.latency.shift();
  }
}

// ---- a place that was left and is seen again: how true is its picture? --------------------------

// by how much another pose must differ from this one to have this place out of sight, in one of the
// three at least; and by how much it may differ, in all three, to have it in sight
const OUT_OF_SIGHT = { turn: 60, metres: 4, tilt: 90 };
const IN_SIGHT = { turn: 10, metres: 0.5, tilt: 10 };

/** Do two poses differ by more than this, in any of the three? */
function differ(one, other, { turn, metres, tilt }) {
  const around = (((one[4] - other[4] + 540) % 360) + 360) % 360; // 180 where they look alike
  return (
    Math.abs(around - 180) > turn ||
    Math.hypot(one[0] - other[0], one[2] - other[2]) > metres ||
    Math.abs(one[3] - other[3]) > tilt
  );
}

/** The newest place in the path, at or before `from`, for which a condition holds; −1: none. */
function lastBefore(from, condition) {
  let at = from;
  while (at >= 0 && !condition(play.path[at])) at--;
  return at;
}

/** The frame of the path that saw this place before it was out of sight; undefined: none did. */
function seenBefore(pose) {
  const away = lastBefore(play.path.length - 1, (old) => differ(old, pose, OUT_OF_SIGHT));
  const there = lastBefore(away, (old) => !differ(old, pose, IN_SIGHT));
  return play.path[there]?.[5];
}

/** Sum up how close such pictures are to the true ones, with memory and without. */
function compareRevisit({ psnr, view, pose, policy, i, again }) {
  if (psnr === null || psnr === undefined || view === "truth" || again) return;
  const before = seenBefore(pose);
  if (before === undefined) return;
  const score = play.scores[policy] ?? [0, 0];
  play.scores[policy] = score;
  score[0] += psnr;
  score[1]++;
  const [sum, count] = score;
  const box = $(policy === "none" ? "off" : "on");
  box.querySelector("b").textContent = `${(sum / count).toFixed(1)} dB`;

  const counts = Object.entries(play.scores).map(
    ([name, [, number]]) => `${number} (${name === "none" ? "off" : "on"})`,
  );
  $("score").textContent =
    `Here you were ${i - before} frames ago. This picture: ${psnr.toFixed(1)} dB against the ` +
    `true one. Above: means over ${counts.join(" and ")} such pictures.`;
}

// ---- panels -------------------------------------------------------------------------------------

/** A picture that was made before the last command says what was set then: facts are newer. */
function drawPanels(made) {
  const now = made.n > play.facts.n ? made : { ...made, ...play.facts };
  if (now.pace === "turn" && play.pace !== "turn") {
    const slow = now.slow ? "Too slow to play live. " : "";
    say(`${slow}Plan a chunk with the keys, then press Enter. T: live again.`, 8000);
  }
  if (now.pace !== play.pace || now.slots !== play.slots) {
    play.pace = now.pace;
    play.slots = now.slots;
    drawPlan();
  }
  drawDecision(now);
  drawNumbers(now);
  drawButtons(now);
  drawMemory(now);

  // these two tell of the picture that is seen, not of what is set now
  const seen = made.seen ?? made; // a picture that is shown again says how it was made
  $("badge").hidden = seen.view !== "truth" && !now.fake;
  $("badge").textContent = now.fake ? "the game itself, no model" : "true renderer";
  $("stage").dataset.memory = seen.policy === "none" ? "off" : "on";
  $("chip").textContent = `memory ${$("stage").dataset.memory}`;
}

/** When the next chunk is decided: a number, and a ring that runs empty. */
function drawDecision({ paused, pace, left, slots }) {
  let text = `next decision ${Math.max(0, left).toFixed(1)} s`;
  if (pace === "turn") text = "plan, then Enter";
  if (paused) text = "paused";
  $("when").textContent = text;

  // of the frames of a chunk, how many are still to be seen
  const percent = (100 * left * Math.max(1, framesPerSecond())) / (4 * slots);
  $("ring").style.setProperty("--part", `${Math.min(100, percent)}%`);
}

/** Of the pictures that were drawn in the last two seconds. */
function framesPerSecond() {
  const { drawn } = play;
  if (drawn.length < 2) return 0;
  return (1000 * (drawn.length - 1)) / (drawn.at(-1) - drawn[0]);
}

/** The value below which a share of these numbers lies; undefined for none. */
function quantile(values, share) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(share * sorted.length)];
}

/** Milliseconds, to be read. */
function duration(ms = 0) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

function drawNumbers({ gen, ms = {}, vram, i, seed, recording, clipped }) {
  const gaps = play.drawn.slice(1).map((time, number) => time - play.drawn[number]);
  const numbers = [
    ["made", `${gen.toFixed(1)} fps`],
    ["shown", `${framesPerSecond().toFixed(1)} fps`],
    ["gap, p99", duration(quantile(gaps, 0.99))], // 99 of 100 pictures stood no longer
  ];
  const recent = play.latency.slice(-9);
  if (recent.length) numbers.push(["key to picture", duration(quantile(recent, 0.5))]);
  numbers.push(["chunk", duration(ms.total)]);
  for (const step of ["retrieve", "denoise", "decode", "encode"]) {
    numbers.push([step, duration(ms[step])]);
  }
  if (vram) numbers.push(["VRAM", `${vram} GB`]);
  numbers.push(["frame", i], ["seed", seed], ["recording", recording ? "yes" : "no"]);
  if (clipped) numbers.push(["mouse", make("span", { className: "bad" }, "clipped")]);

  const cells = numbers.map(([name, value]) =>
    make("span", {}, make("small", {}, name), make("b", {}, value)),
  );
  $("hud").replaceChildren(...cells);
}

function drawButtons({ view, paused, recording, pace }) {
  const pressed = {
    view: view === "truth",
    pause: paused,
    record: recording,
    pace: pace === "turn",
  };
  for (const button of $("buttons").children) {
    const on = pressed[button.dataset.cmd];
    if (on !== undefined) button.setAttribute("aria-pressed", on);
  }
}

/** The card of the memory; `policy` says which old frames it looks back at, "none" is off. */
function drawMemory({ policy }) {
  const on = policy !== "none";
  document.body.dataset.memory = on ? "on" : "off";
  $("on").className = on ? "now" : "";
  $("off").className = on ? "" : "now";
  const [state, hint] = $("toggle").children;
  $("toggle").setAttribute("aria-pressed", on);
  state.textContent = `Memory is ${on ? "ON" : "OFF"}`;
  hint.textContent = `M switches it ${on ? "off" : "on"}`;

  let title = `Old frames it looks back at (${policy})`;
  if (policy === "camera") title = "Old frames it looks back at now";
  if (!on) title = "It sees its last frames only";
  $("memtitle").textContent = title;
}

/** The old frames that the last chunk was made with, and how much of its view each had seen. */
function drawStrip(memory) {
  const figures = Array.from({ length: SLOTS }, (_, slot) => drawOld(memory[slot]));
  $("strip").replaceChildren(...figures);
}

function drawOld(old) {
  let text = "–";
  if (old) text = `f${old.frame} ${old.sink ? "sink" : old.score.toFixed(2)}`;
  let picture = make("div", { className: "none" });
  if (old?.thumb) {
    const src = `data:image/jpeg;base64,${old.thumb}`;
    picture = make("img", { src, alt: `frame ${old.frame}` });
  }
  const caption = make("figcaption", { textContent: text });
  return make("figure", { className: old?.sink ? "sink" : "" }, picture, caption);
}

// ---- the start of it all ------------------------------------------------------------------------

drawStrip([]);
$("help").hidden = false; // the key map, until a key is pressed
connect();
