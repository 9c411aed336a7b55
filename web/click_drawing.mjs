// Draws a picture with its mask, points and boxes on the click editor's canvas.

import { NEGATIVE } from "./clicks.mjs";
import { corners, rectangle, toStage } from "./click_view.mjs";
import { freshContext } from "./elements.mjs";

const MASK = "#3d8bff";
const MASK_STRENGTH = 0.5;
const COLORS = { 1: "#1fbf63", 0: "#e5484d" };
const BOX = "#ffd33d";
/** Radius of a point, in the stage's pixels. */
export const RADIUS = 7;
// Pictures enlarged beyond this show their pixels.
const PIXELS_FROM = 4;

/**
 * Draw everything anew.
 *
 * scene: {stage: {width, height}, picture (an image) or null, view, mask (from `tinted`) or null,
 * clicks, selected (a target or null), draft ([a, b], corners of a box being drawn) or null}.
 */
export function draw(canvas, scene) {
  const { stage, picture, view } = scene;
  const context = freshContext(canvas, stage);
  if (!picture) return;
  const size = { width: picture.naturalWidth, height: picture.naturalHeight };
  const rect = rectangle(view, stage, size);
  context.imageSmoothingEnabled = rect.width / size.width < PIXELS_FROM;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, rect.x, rect.y, rect.width, rect.height);
  if (scene.mask) context.drawImage(scene.mask, rect.x, rect.y, rect.width, rect.height);
  drawBoxes(context, rect, scene);
  scene.clicks.points.forEach((point, index) => {
    const selected = scene.selected?.kind === "point" && scene.selected.index === index;
    drawPoint(context, toStage(rect, point), point.label, selected);
  });
}

/** A mask (an image whose transparency is the mask) in the overlay's colour, with an outline. */
export function tinted(image) {
  const canvas = document.createElement("canvas");
  const { naturalWidth: width, naturalHeight: height } = image;
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  // The outline: the mask moved about, less the mask itself.
  const step = Math.max(1, Math.round(Math.max(width, height) / 400));
  for (const [x, y] of [
    [-step, 0],
    [step, 0],
    [0, -step],
    [0, step],
  ]) {
    context.drawImage(image, x, y);
  }
  fill(context, "source-in", "#ffffff");
  context.globalCompositeOperation = "destination-out";
  context.drawImage(image, 0, 0);

  const inner = document.createElement("canvas");
  [inner.width, inner.height] = [width, height];
  const ink = inner.getContext("2d");
  ink.drawImage(image, 0, 0);
  fill(ink, "source-in", MASK);
  context.globalCompositeOperation = "source-over";
  context.globalAlpha = MASK_STRENGTH;
  context.drawImage(inner, 0, 0);
  return canvas;
}

function fill(context, operation, color) {
  context.globalCompositeOperation = operation;
  context.fillStyle = color;
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
}

function drawBoxes(context, rect, { clicks, selected, draft }) {
  const boxes = clicks.boxes.map((box, index) => ({
    box,
    chosen: selected?.kind === "box" && selected.index === index,
  }));
  if (draft) {
    const [a, b] = draft;
    boxes.push({ box: [a.x, a.y, b.x, b.y], chosen: false });
  }
  for (const { box, chosen } of boxes) {
    const a = toStage(rect, { x: box[0], y: box[1] });
    const b = toStage(rect, { x: box[2], y: box[3] });
    // Dark below light: visible on any picture.
    for (const [color, wide] of [
      ["#000000a0", chosen ? 5 : 4],
      [BOX, chosen ? 2.5 : 1.5],
    ]) {
      context.strokeStyle = color;
      context.lineWidth = wide;
      context.strokeRect(a.x, a.y, b.x - a.x, b.y - a.y);
    }
    if (!chosen) continue;
    for (const [, x, y] of corners(box)) {
      const at = toStage(rect, { x, y });
      context.fillStyle = BOX;
      context.fillRect(at.x - 4, at.y - 4, 8, 8);
    }
  }
}

function drawPoint(context, { x, y }, label, selected) {
  context.beginPath();
  context.arc(x, y, RADIUS + (selected ? 3 : 0), 0, 2 * Math.PI);
  context.fillStyle = selected ? "#ffffff" : "#000000a0";
  context.fill();
  context.beginPath();
  context.arc(x, y, RADIUS - 1, 0, 2 * Math.PI);
  context.fillStyle = COLORS[label];
  context.fill();
  context.strokeStyle = "#ffffff";
  context.lineWidth = 2;
  context.lineCap = "butt";
  context.beginPath();
  context.moveTo(x - 3.5, y);
  context.lineTo(x + 3.5, y);
  if (label !== NEGATIVE) {
    context.moveTo(x, y - 3.5);
    context.lineTo(x, y + 3.5);
  }
  context.stroke();
}
