// The map: where the walk went, what the camera sees, and which old views are remembered.
//
// Poses are [x, y, z, pitch, yaw] in metres and degrees, y points down, and yaw 0 looks along z,
// which is upwards on the map; larger yaw turns to the right.
"use strict";

const SMALLEST = 5; // metres that the map is wide at least
const ROOM = 1.5; // times the path: so much is shown

function drawMap(header) {
  const canvas = $("map");
  const ratio = devicePixelRatio || 1; // pixels of the screen per pixel of the page
  const width = Math.round(canvas.clientWidth * ratio);
  const height = Math.round(canvas.clientHeight * ratio);
  if (width && (canvas.width !== width || canvas.height !== height)) {
    canvas.width = width;
    canvas.height = height;
  }
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const style = getComputedStyle(document.body);
  const color = (name) => style.getPropertyValue(name).trim();
  const { place, scale } = mapping(play.path, canvas.width, canvas.height);

  // what the memory looks at
  if (header.policy !== "none") {
    pen.fillStyle = pen.strokeStyle = color("--good");
    pen.lineWidth = ratio;
    for (const { pose } of play.memory) {
      if (!pose) continue;
      traceView(pen, place(pose), pose, 46 * ratio);
      pen.globalAlpha = 0.16;
      pen.fill();
      pen.globalAlpha = 0.7;
      pen.stroke();
    }
  }

  // what the camera sees
  pen.fillStyle = color("--hot");
  pen.globalAlpha = 0.5;
  traceView(pen, place(header.pose), header.pose, 58 * ratio);
  pen.fill();
  pen.globalAlpha = 1;

  // the way, a ring where it began, a dot where it has come to
  pen.strokeStyle = color("--ink");
  pen.lineWidth = 1.5 * ratio;
  pen.beginPath();
  for (const pose of play.path) pen.lineTo(...place(pose));
  pen.stroke();
  traceDot(pen, place(play.path[0]), 3.5 * ratio);
  pen.stroke();
  traceDot(pen, place(header.pose), 4 * ratio);
  pen.fill();

  // how long a metre is, or five
  const metres = canvas.width / scale > 20 ? 5 : 1;
  pen.fillStyle = color("--dim");
  pen.fillRect(10 * ratio, canvas.height - 12 * ratio, metres * scale, 2 * ratio);
  pen.font = `${11 * ratio}px system-ui`;
  pen.fillText(`${metres} m`, 10 * ratio, canvas.height - 17 * ratio);
}

/** place(pose) is [x, y] on the canvas; scale is pixels per metre, so that the whole path fits. */
function mapping(path, width, height) {
  const xs = path.map((pose) => pose[0]);
  const zs = path.map((pose) => pose[2]);
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const [low, high] = [Math.min(...zs), Math.max(...zs)];
  const longer = Math.max(right - left, ((high - low) * width) / height);
  const metres = Math.max(SMALLEST, ROOM * longer); // that the canvas is wide
  const middle = { x: (left + right) / 2, z: (low + high) / 2 };
  const place = (pose) => [
    width / 2 + ((pose[0] - middle.x) / metres) * width,
    height / 2 - ((pose[2] - middle.z) / metres) * width,
  ];
  return { place, scale: width / metres };
}

/** A quarter of a disc: a view is 90 degrees wide. */
function traceView(pen, [x, y], pose, radius) {
  const ahead = ((pose[4] - 90) * Math.PI) / 180; // a canvas counts from the right, clockwise
  pen.beginPath();
  pen.moveTo(x, y);
  pen.arc(x, y, radius, ahead - Math.PI / 4, ahead + Math.PI / 4);
  pen.closePath();
}

function traceDot(pen, [x, y], radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
}

addEventListener("resize", () => {
  if (play.frame) drawMap(play.frame);
});
