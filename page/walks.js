// How a walk begins: from a start picture, from a link, or as a game.
//
// The server knows the rules of the game (page/wayback.py) and what a link says (page/link.py).
"use strict";

const LARGEST = 12e6; // bytes of a picture that is dropped on the page

// ---- start pictures -----------------------------------------------------------------------------

/** Begin at a picture, given as base64. */
function beginAt(data) {
  $("help").hidden = true;
  command({ cmd: "image", data });
}

function showGallery(pictures) {
  const buttons = pictures.map((data, number) => {
    const alt = `start picture ${number + 1}`;
    const image = make("img", { src: `data:image/png;base64,${data}`, alt });
    const button = make("button", {}, image);
    onClick(button, () => beginAt(data));
    return button;
  });
  $("gallery").replaceChildren(...buttons);
}

/** base64, a piece at a time: a function takes only so many arguments. */
function encode(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) {
    text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  }
  return btoa(text);
}

addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", async (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (!file) return;
  if (file.size > LARGEST) return say("Pictures up to 12 MB, please.", 5000);
  beginAt(encode(new Uint8Array(await file.arrayBuffer())));
});

$("prompt").addEventListener("change", () => {
  command({ cmd: "prompt", text: $("prompt").value });
});

// ---- links: the part of the address behind # is a walk ------------------------------------------

function followLink() {
  if (location.hash.length < 2) return;
  $("help").hidden = true;
  command({ cmd: "walk", link: location.hash });
}
addEventListener("hashchange", followLink);

/** The link goes to the clipboard without our token, which is for nobody else. */
async function copyLink(hash) {
  history.replaceState(null, "", location.search + hash);
  const written = navigator.clipboard?.writeText(`${location.origin}/${hash}`);
  const copied = await written?.then(
    () => true,
    () => false,
  );
  say(`The link to this walk is ${copied ? "copied" : "in the address bar"}.`, 4000);
}

// ---- the game: walk out, find the way back ------------------------------------------------------

for (const button of document.querySelectorAll("[data-game]")) {
  onClick(button, () => {
    $("help").hidden = true;
    command({ cmd: "game", do: button.dataset.game });
  });
}

/** phase: off, out, home, replay or over; lead: may one ask to be led home? */
function showGame({ phase, text, lead, pictures }) {
  const busy = ["out", "home", "replay"].includes(phase);
  const allowed = { begin: !busy, home: lead, stop: busy };
  for (const button of document.querySelectorAll("[data-game]")) {
    button.hidden = !allowed[button.dataset.game];
  }
  $("gametext").textContent = text;
  const figures = pictures.map(({ jpeg, title, under }) => {
    const image = make("img", { src: `data:image/jpeg;base64,${jpeg}`, alt: `${title} ${under}` });
    const bold = make("b", { textContent: title });
    return make("figure", {}, image, make("figcaption", {}, bold, under));
  });
  $("result").replaceChildren(...figures);
}
