// Keyboard, mouse, fingers and buttons. Whatever is used, it ends as a set of the eight keys
// w a s d i j k l, as pixels of the mouse, or as a command.
"use strict";

const MOVES = {
  ...{ KeyW: "w", KeyA: "a", KeyS: "s", KeyD: "d" },
  ...{ KeyI: "i", KeyJ: "j", KeyK: "k", KeyL: "l" },
  ...{ ArrowUp: "i", ArrowLeft: "j", ArrowDown: "k", ArrowRight: "l" },
};
const SAME = { Space: "KeyP", KeyU: "KeyZ" };

// [code of the key, how it is called, label of the button or none, command, what the key map says]
const COMMANDS = [
  ["KeyM", "M", "", "memory", "memory on or off: the point of all this"],
  ["Tab", "Tab", "Truth", "view", "model or true renderer, same pose"],
  ["KeyP", "P", "Pause", "pause", "pause (also Space)"],
  ["Period", ".", "Step", "step", "one chunk while paused"],
  ["KeyZ", "Z", "Undo", "undo", "undo the last second (also U)"],
  ["KeyR", "R", "Restart", "restart", "start over from the picture"],
  ["KeyN", "N", "New seed", "seed", "same start, new seed"],
  ["KeyC", "C", "Copy link", "share", "a link that plays this walk again"],
  ["KeyV", "V", "Record", "record", "recording on or off; on again it keeps the last minute"],
  ["KeyT", "T", "Turn pace", "pace", "live, or plan a chunk: keys fill a slot, Enter runs it"],
  ["KeyH", "H", "", "hud", "numbers on or off"],
  ["KeyO", "O", "", "map", "map and memory strip on or off"],
  ["Slash", "?", "Keys", "help", "this list"],
];

/** Three commands concern the page alone; the server obeys the others. */
function obey(name) {
  if (name === "help") {
    $("help").hidden = !$("help").hidden;
  } else if (name === "hud") {
    $("hud").hidden = !$("hud").hidden;
  } else if (name === "map") {
    $("mapcard").hidden = !$("mapcard").hidden;
    $("memory").hidden = $("mapcard").hidden;
  } else {
    command({ cmd: name });
  }
}

// ---- keyboard -----------------------------------------------------------------------------------

/** A key that moves or looks has gone down. */
function press(key, when) {
  if (play.pace === "turn") return fillSlot(key);
  // of a key whose doing is on screen already, nobody could tell when it shows again
  if (!play.frame?.keys.includes(key)) play.pressed[key] = when;
  play.held.add(key);
  sendInput();
}

/** Whoever looks away holds nothing. */
function releaseAll() {
  if (!play.held.size && !play.touch.size) return;
  play.held.clear();
  play.touch.clear();
  sendInput();
}

addEventListener("keydown", (event) => {
  if (event.target === $("prompt") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.code in MOVES) {
    event.preventDefault();
    $("help").hidden = true;
    if (!event.repeat) press(MOVES[event.code], event.timeStamp);
    return;
  }

  // a focused button keeps the keys that press and leave it
  const ofButtons = ["Space", "Enter", "Tab"].includes(event.code);
  if (event.target.tagName === "BUTTON" && ofButtons) return;
  if (event.code === "Enter" && play.pace === "turn") {
    event.preventDefault();
    return runPlan();
  }
  if (event.code === "Escape") $("help").hidden = true;

  // Tab leads around the page, as everywhere, where there is no true world to show
  const leads = event.code === "Tab" && (event.shiftKey || !play.truth);
  const found = COMMANDS.find(([code]) => code === (SAME[event.code] ?? event.code));
  if (!found || event.repeat || leads) return;
  event.preventDefault();
  const [, , , name] = found;
  obey(name);
});

addEventListener("keyup", (event) => {
  if (!(event.code in MOVES)) return;
  play.held.delete(MOVES[event.code]);
  sendInput();
});

addEventListener("blur", releaseAll);

/** While nobody looks nothing is held, and nothing is imagined. */
document.addEventListener("visibilitychange", () => {
  if (document.hidden) releaseAll();
  tellHidden();
});

function tellHidden() {
  if (play.role === "play") command({ cmd: "hidden", on: document.hidden });
}

// ---- mouse and fingers --------------------------------------------------------------------------

// the key map lies on the picture: a click or a finger puts it away
$("help").addEventListener("click", () => {
  $("help").hidden = true;
});

// a click into the picture catches the mouse, which then looks around; Escape lets it go
$("screen").addEventListener("click", () => {
  $("help").hidden = true;
  if (play.pace === "turn" || !$("screen").requestPointerLock) return; // a plan is clicked together
  Promise.resolve($("screen").requestPointerLock()).catch(() => {});
});
document.addEventListener("pointerlockchange", () => {
  if (!document.pointerLockElement) releaseAll();
});
addEventListener("mousemove", (event) => {
  if (!document.pointerLockElement) return;
  play.dx += event.movementX;
  play.dy += event.movementY;
  sendInput();
});

/** The keys that are drawn below the picture. */
function listenTo(element) {
  const { key } = element.dataset;
  element.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    $("help").hidden = true;
    if (play.pace === "turn") return fillSlot(key);
    play.touch.add(key);
    sendInput();
  });
  for (const end of ["pointerup", "pointerleave", "pointercancel"]) {
    element.addEventListener(end, () => {
      if (play.touch.delete(key)) sendInput();
    });
  }
}
document.querySelectorAll(".key[data-key]").forEach(listenTo);

// ---- the buttons and the key map ----------------------------------------------------------------

function addButton([, key, label, name, text]) {
  const hint = make("small", { textContent: ` ${key}` });
  const button = make("button", { title: text }, label, hint);
  button.dataset.cmd = name;
  onClick(button, () => obey(name));
  $("buttons").append(button);
}

/** A row of the key map: keys, and what they do. */
function explainKeys(keys, text) {
  const row = $("keymap").insertRow();
  row.insertCell().innerHTML = keys.map((key) => `<kbd>${key}</kbd>`).join(" ");
  row.insertCell().textContent = text;
}

explainKeys(["W A S D"], "move");
explainKeys(["I J K L", "← →"], "look (or click the picture: mouse)");
for (const row of COMMANDS) {
  const [, key, label, , text] = row;
  explainKeys([key], text);
  if (label) addButton(row);
}
onClick($("toggle"), () => obey("memory"));
