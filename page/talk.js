// Talking to page/server.py: keys and commands go out, records of pictures and notes come in.
//
//     POST /input    the keys that are held now, how far the mouse moved, which picture was drawn
//     POST /cmd      {cmd: "pause"} and the like; page/commands.py has a function for every one
//     GET  /frames   records without end, each of two parts, each part with its length in front:
//                    a header in JSON, then a picture as JPEG; without a picture it is a note
"use strict";

// play.py --host asks for a token, which then stands in the address of the page
const token = new URLSearchParams(location.search).get("token");

function address(path) {
  return path + (token ? `?token=${encodeURIComponent(token)}` : "");
}

const ACKNOWLEDGE = 2; // pictures; fewer than the server lets be on their way (WINDOW in screen.py)

// ---- out ----------------------------------------------------------------------------------------

/** The server's reply, or null where there is none. */
function post(path, body) {
  return fetch(address(path), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ id: play.id, ...body }),
  }).catch(() => null);
}

let posting = false;
let changedMeanwhile = false;

/**
 * Tell what is held now. It is the set of keys, not a queue of events, so nothing can pile up:
 * while a post is on its way, all that changes waits for one more.
 */
async function sendInput() {
  if (posting) {
    changedMeanwhile = true;
    return;
  }
  posting = true;
  const keys = [...new Set([...play.held, ...play.touch])];
  for (const key of document.querySelectorAll(".key[data-key]")) {
    key.classList.toggle("down", keys.includes(key.dataset.key));
  }
  const { dx, dy, shown } = play;
  play.dx = 0;
  play.dy = 0;
  play.unsaid = 0;
  await post("/input", { keys, dx, dy, shown });
  posting = false;
  if (changedMeanwhile) {
    changedMeanwhile = false;
    sendInput();
  }
}

/** The server sends on when it knows what was drawn; every second time is often enough. */
function acknowledge() {
  play.unsaid++;
  if (play.unsaid >= ACKNOWLEDGE) sendInput();
}

/** command({cmd: "pause"}): what is refused is told over the picture. */
async function command(body) {
  const reply = await post("/cmd", body);
  const nobody = { error: "the server does not answer" };
  const answer = reply ? await reply.json().catch(() => ({})) : nobody;
  if (answer.error) say(answer.error, 6000);
}

// ---- in -----------------------------------------------------------------------------------------

/** The body of a reply, cut into its parts: bytes arrive in pieces of any size. */
class Parts {
  constructor(body) {
    this.reader = body.getReader();
    this.bytes = new Uint8Array(0); // that came, and are not taken yet
  }

  async take(count) {
    while (this.bytes.length < count) {
      const { done, value } = await this.reader.read();
      if (done) throw new Error("stream ended");
      const longer = new Uint8Array(this.bytes.length + value.length);
      longer.set(this.bytes);
      longer.set(value, this.bytes.length);
      this.bytes = longer;
    }
    const taken = this.bytes.slice(0, count);
    this.bytes = this.bytes.slice(count);
    return taken;
  }

  /** Four bytes say how many follow. */
  async next() {
    const length = await this.take(4);
    return this.take(new DataView(length.buffer).getUint32(0));
  }
}

/** Every record as it comes, until the connection breaks. */
async function readRecords() {
  const reply = await fetch(address("/frames"));
  if (!reply.ok) {
    say((await reply.json()).error); // no seat is free, or the token is missing: not a lost line
    return;
  }
  const parts = new Parts(reply.body);
  for (;;) {
    const header = JSON.parse(new TextDecoder().decode(await parts.next()));
    const jpeg = await parts.next();
    if (jpeg.length) {
      await drawPicture(jpeg);
      play.shown = header.n;
      acknowledge();
      takeFrame(header);
    } else {
      takeNote(header);
    }
  }
}

async function drawPicture(jpeg) {
  const picture = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
  const screen = $("screen");
  if (screen.width !== picture.width || screen.height !== picture.height) {
    screen.width = picture.width;
    screen.height = picture.height;
  }
  screen.getContext("2d").drawImage(picture, 0, 0);
  picture.close();
}

/** Read records for as long as the page is open. */
async function connect() {
  for (;;) {
    try {
      await readRecords();
    } catch {
      say("Connection lost, trying again…");
    }
    play.id = null;
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}
