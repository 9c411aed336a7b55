// The box editor's parts: its buttons, stage, timeline and rows, put together.

import { CSS, icon } from "./box_editor_look.mjs";
import { make } from "./elements.mjs";

const HINT = "Drag to draw a box, go to another frame, and drag the box there.";
const KEYS =
  "Boxes on the picture. Enter adds one, arrows move it, with Alt they size it, comma and period " +
  "go through the frames, K adds a key frame, Page Up and Page Down choose a subject, plus and " +
  "minus zoom.";
const BUTTONS = {
  box: "Draw and move boxes (Ctrl + drag: draw over another box)",
  path: "Draw the chosen subject's path, from this frame to the last",
  snap: "Line up with the picture and other boxes (S; Alt while dragging: not)",
  trail: "Show where boxes come from and go",
  fit: "Show the whole picture (0)",
  undo: "Undo (Ctrl + Z)",
  redo: "Redo (Ctrl + Y)",
  copy: "Copy the chosen subject's path (Ctrl + C)",
  paste: "One more subject on the copied path (Ctrl + V)",
  take: "Take over the connected path, to change it here",
  remove: "Remove the chosen subject (Shift + Delete)",
  clear: "Clear all",
  before: "To the key frame before ([)",
  key: "Add a key frame here (K)",
  unkey: "Remove this key frame (Delete)",
  play: "Play or pause (space)",
  after: "To the next key frame (])",
};

/** By name: element, stage, canvas, keys, hint, time, timeline, count, status, buttons. */
export function buildParts(fields) {
  const buttons = {};
  for (const [name, title] of Object.entries(BUTTONS)) {
    buttons[name] = make("button", { type: "button", title, "aria-label": title }, icon(name));
  }
  const row = (...parts) => make("div", { class: "layerloom-box-bar" }, ...parts);
  const space = () => make("span", { class: "layerloom-box-space" });
  const some = (...names) => names.map((name) => buttons[name]);
  const canvas = make("canvas", { role: "img" });
  const hint = make("div", { class: "layerloom-box-hint", role: "status" }, HINT);
  // An input field, so that no key pressed here means anything to the graph around.
  const keys = make("input", {
    class: "layerloom-box-keys",
    readonly: "",
    inputmode: "none",
    "aria-label": KEYS,
  });
  const stage = make("div", { class: "layerloom-box-stage" }, keys, canvas, hint);
  const timeline = make("canvas", { role: "img" });
  const time = make("div", { class: "layerloom-box-time" }, timeline);
  const count = make("span", { class: "layerloom-box-count" });
  const status = make("div", { class: "layerloom-box-status", role: "status" });
  const element = make(
    "div",
    { class: "layerloom-boxes", role: "group", "aria-label": "Box editor" },
    make("style", {}, CSS),
    stage,
    row(
      ...some("box", "path"),
      space(),
      ...some("snap", "trail", "fit"),
      space(),
      ...some("take", "undo", "redo", "clear"),
    ),
    time,
    row(
      ...some("before", "play", "after"),
      count,
      ...some("key", "unkey"),
      space(),
      ...some("copy", "paste", "remove"),
    ),
    fields,
    status,
  );
  return { element, stage, canvas, keys, hint, time, timeline, count, status, buttons };
}

/** What the status line says of the chosen subject and of paths from elsewhere (or null). */
export function wordsOf({ track, box, picture, paths }, given) {
  const more = given ? `; ${given.tracks.length} more from the connected path` : "";
  if (!track) return `${paths.tracks.length} subjects${more}`;
  const [width, height] = [box.w * picture.width, box.h * picture.height].map(Math.round);
  const count = track.keys.length === 1 ? "1 key frame" : `${track.keys.length} key frames`;
  const whole = `${picture.width} x ${picture.height}`;
  return `${track.id}: ${count}, ${width} x ${height} pixels of ${whole}${more}`;
}
