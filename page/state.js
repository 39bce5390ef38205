// What the page knows, and the tools that all of its scripts use.
//
// The scripts share their names with each other, in the order in which index.html lists them:
//
//     state      this file
//     talk       keys and commands go out, records of pictures and notes come in
//     plan       the turn pace: keys are written into slots, and played when Enter is pressed
//     controls   keyboard, mouse, fingers and buttons
//     walks      how a walk begins: start pictures, links, and the game
//     map        the path seen from above
//     panels     what every record changes on the page; and the start of it all
"use strict";

const play = {
  // who we are
  id: null, // our name at the server, a new one with every connection
  server: null, // name of the one that we talk to: after a restart it is another one
  role: "play", // or "watch": another tab plays
  followed: false, // the link of the address, if there is one
  truth: null, // whether the true world of this walk is known, so that Tab can show it

  // what is on its way to the server
  held: new Set(), // keys that are down on the keyboard
  touch: new Set(), // keys of the page that a finger or the mouse presses
  dx: 0, // pixels that the mouse has moved since the last post, to the right
  dy: 0, // and downwards
  shown: 0, // number of the newest picture that was drawn
  unsaid: 0, // pictures drawn since the server was told

  // the turn pace
  pace: null, // "live", or "turn": see plan.js
  slots: 10, // latents of the next chunk, one slot each
  plan: [], // a Set of keys per slot; slots that nobody touched are missing
  slot: 0, // the one that keys fill

  // what the server told
  frame: null, // header of the newest picture
  facts: { n: 0 }, // how things stand after the last command, which newer pictures will say too
  path: [], // [x, y, z, pitch, yaw, number of the frame] of the frames of this walk
  memory: [], // the old frames that the last chunk was made with
  memoryIsNew: false, // they are not drawn yet
  scores: {}, // policy of the memory -> [sum of decibels, number of pictures]: see panels.js

  // what is measured here
  pressed: {}, // key -> when it went down, until a picture shows it
  latency: [], // milliseconds from such a key to its picture
  drawn: [], // when pictures were drawn, in the last two seconds
  painted: 0, // when the panels were drawn last
  frames: 0, // pictures drawn since the page was opened
};
window.play = play; // tests, and the curious with a console, look at it

// ---- tools --------------------------------------------------------------------------------------

function $(id) {
  return document.getElementById(id);
}

/** A new element: make("b", { className: "bad" }, "clipped") */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/**
 * What a click on this button does. After a click of the mouse the button gives the focus back, so
 * that Space and Tab go to the game again; Enter on a focused button (detail 0) keeps it.
 */
function onClick(button, action) {
  button.onclick = (event) => {
    if (event.detail) button.blur();
    action();
  };
}

let clearing = 0;

/** A line over the picture; with `ms` it goes away by itself. Who watches reads that in between. */
function say(text, ms) {
  const otherwise = play.role === "watch" ? "Watching. Another tab plays." : "";
  $("banner").textContent = text || otherwise;
  clearTimeout(clearing);
  if (ms) clearing = setTimeout(() => say("", 0), ms);
}
