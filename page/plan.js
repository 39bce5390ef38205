// The turn pace, for slow machines: plan a chunk, let it be made, look at it, plan the next.
//
// A chunk is `play.slots` latents of four frames. Each has a slot on the picture: keys switch on
// and off in the marked slot, a click marks another one, Enter has the plan made into pictures.
"use strict";

/** A key in the marked slot: on, or off again. */
function fillSlot(key) {
  const keys = play.plan[play.slot] ?? new Set();
  play.plan[play.slot] = keys;
  if (!keys.delete(key)) keys.add(key);
  drawPlan();
}

/** Have the plan made. A slot that nobody touched repeats the one before it. */
function runPlan() {
  const plan = [];
  for (let slot = 0; slot < play.slots; slot++) {
    const keys = play.plan[slot];
    plan.push(keys ? [...keys] : (plan[slot - 1] ?? []));
  }
  play.plan = [];
  play.slot = 0;
  drawPlan();
  command({ cmd: "run", plan });
}

function drawPlan() {
  const slots = Array.from({ length: play.slots }, (_, slot) => drawSlot(slot));
  const how = "Keys fill the marked slot (4 frames), empty slots repeat the last. Enter runs.";
  const go = make("button", { textContent: "Run ⏎", onclick: runPlan });
  $("plan").hidden = play.pace !== "turn";
  $("plan").replaceChildren(make("p", {}, how), ...slots, go);
}

function drawSlot(slot) {
  const keys = [...(play.plan[slot] ?? [])];
  const button = make("button", {
    textContent: keys.join("+") || "·",
    className: slot === play.slot ? "now" : "",
    onclick: () => {
      play.slot = slot;
      drawPlan();
    },
  });
  button.setAttribute("aria-label", `slot ${slot + 1}`);
  return button;
}
