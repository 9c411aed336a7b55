// Draws a picture with its subjects' boxes and their trails on the box editor's stage.

import { boxAt } from "./box_path.mjs";
import { cornersOf } from "./box_view.mjs";
import { toStage } from "./click_view.mjs";
import { freshContext } from "./elements.mjs";

const COLORS = [
  "#ffb224",
  "#3d8bff",
  "#1fbf63",
  "#f2555a",
  "#b57bff",
  "#18b8c4",
  "#ff7ac2",
  "#9bb300",
];
const PLATE = "#3a3f49";
// Boxes of so many frames at most are drawn as a trail.
const GHOSTS = 48;

/** Of a subject by its place among them. */
export function colorOf(index) {
  return COLORS[index % COLORS.length];
}

/**
 * Draw everything anew.
 *
 * scene: {stage, rect (the picture's on it), picture ({image, part of it}, or null), paths, given
 * (paths from elsewhere, or null), frame, chosen, boxes (of all subjects now), draft (a box or null), line (points, in
 * shares), lines (that a box has snapped to), trail (whether to draw it)}.
 */
export function draw(canvas, scene) {
  const { stage, rect, picture } = scene;
  const context = freshContext(canvas, stage);
  context.fillStyle = PLATE;
  context.fillRect(rect.x, rect.y, rect.width, rect.height);
  if (picture) {
    const { x, y, width, height } = picture.part;
    const place = [rect.x, rect.y, rect.width, rect.height];
    context.imageSmoothingQuality = "high";
    context.drawImage(picture.image, x, y, width, height, ...place);
  }
  context.strokeStyle = "#ffffff50";
  context.lineWidth = 1;
  context.strokeRect(rect.x - 0.5, rect.y - 0.5, rect.width + 1, rect.height + 1);
  if (scene.given) drawGiven(context, scene);
  if (scene.trail) drawTrails(context, scene);
  drawLines(context, scene);
  // Earlier subjects lie in front.
  for (let index = scene.boxes.length - 1; index >= 0; index--) {
    if (index !== scene.chosen) drawBox(context, rect, scene.boxes[index], colorOf(index), false);
  }
  const own = scene.boxes[scene.chosen];
  if (own) drawBox(context, rect, own, colorOf(scene.chosen), true);
  scene.boxes.forEach((box, index) => {
    drawName(context, rect, box, scene.paths.tracks[index].id, colorOf(index));
  });
  if (scene.draft) {
    drawBox(context, rect, scene.draft, colorOf(scene.paths.tracks.length), false);
  }
  drawHandLine(context, scene);
}

function drawTrails(context, { rect, paths, chosen }) {
  paths.tracks.forEach((track, index) => {
    const own = index === chosen;
    context.strokeStyle = colorOf(index);
    const first = track.keys[0].frame;
    const last = track.keys.at(-1).frame;
    if (own) {
      const step = Math.max(1, Math.ceil((last - first) / GHOSTS));
      context.globalAlpha = 0.22;
      context.lineWidth = 1;
      for (let frame = first; frame <= last; frame += step) {
        outline(context, rect, boxAt(track, frame));
      }
    }
    context.globalAlpha = own ? 0.95 : 0.5;
    context.lineWidth = own ? 2 : 1.2;
    context.beginPath();
    for (let frame = first; frame <= last; frame++) {
      const { x, y } = middleOf(rect, boxAt(track, frame));
      context.lineTo(x, y);
    }
    context.stroke();
    for (let frame = first; own && frame <= last; frame++) {
      dot(context, middleOf(rect, boxAt(track, frame)), 1.8, colorOf(index));
    }
    for (const key of track.keys) dot(context, middleOf(rect, key), own ? 4 : 2.5, colorOf(index));
  });
  context.globalAlpha = 1;
}

function drawGiven(context, { rect, given, frame }) {
  context.setLineDash([4, 4]);
  context.strokeStyle = "#ffffffb0";
  context.lineWidth = 1.2;
  for (const track of given.tracks) outline(context, rect, boxAt(track, frame));
  context.setLineDash([]);
}

function drawLines(context, { rect, stage, lines }) {
  context.strokeStyle = "#ff4fd8";
  context.lineWidth = 1;
  context.beginPath();
  for (const share of lines.x) {
    const { x } = toStage(rect, { x: share, y: 0 });
    context.moveTo(x, 0);
    context.lineTo(x, stage.height);
  }
  for (const share of lines.y) {
    const { y } = toStage(rect, { x: 0, y: share });
    context.moveTo(0, y);
    context.lineTo(stage.width, y);
  }
  context.stroke();
}

function drawHandLine(context, { rect, line }) {
  if (!line.length) return;
  context.strokeStyle = "#ffffff";
  context.lineWidth = 2;
  context.beginPath();
  for (const point of line) {
    const { x, y } = toStage(rect, point);
    context.lineTo(x, y);
  }
  context.stroke();
}

function drawBox(context, rect, box, color, chosen) {
  // Dark below light: visible on any picture.
  for (const [ink, wide] of [
    ["#000000a0", chosen ? 4.5 : 3.5],
    [color, chosen ? 2.5 : 1.5],
  ]) {
    context.strokeStyle = ink;
    context.lineWidth = wide;
    outline(context, rect, box);
  }
  if (!chosen) return;
  context.globalAlpha = 0.14;
  context.fillStyle = color;
  const { x, y } = toStage(rect, box);
  context.fillRect(x, y, box.w * rect.width, box.h * rect.height);
  context.globalAlpha = 1;
  for (const [, left, top] of cornersOf(box)) {
    const at = toStage(rect, { x: left, y: top });
    context.fillStyle = "#ffffff";
    context.fillRect(at.x - 4, at.y - 4, 8, 8);
    context.fillStyle = color;
    context.fillRect(at.x - 3, at.y - 3, 6, 6);
  }
}

function drawName(context, rect, box, name, color) {
  const { x, y } = toStage(rect, box);
  context.font = "600 11px system-ui, sans-serif";
  const text = name.length > 18 ? `${name.slice(0, 17)}...` : name;
  const width = context.measureText(text).width + 8;
  const top = y >= 16 ? y - 15 : y + 2;
  context.fillStyle = color;
  context.fillRect(x, top, width, 14);
  context.fillStyle = "#10131a";
  context.textAlign = "left";
  context.fillText(text, x + 4, top + 11);
}

function outline(context, rect, box) {
  const { x, y } = toStage(rect, box);
  context.strokeRect(x, y, box.w * rect.width, box.h * rect.height);
}

function middleOf(rect, { x, y, w, h }) {
  return toStage(rect, { x: x + w / 2, y: y + h / 2 });
}

function dot(context, { x, y }, radius, color) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fillStyle = color;
  context.fill();
}
