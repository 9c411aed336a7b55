// Where picture and boxes lie on the box editor's stage, what is under a hand, and snapping.

import { rectangle, toStage, WHOLE } from "./click_view.mjs";

// The picture's share of what is looked at: there is room around it, for boxes that come in or
// leave.
const SHARE = 0.84;

/** What is looked at: a picture's size with the room around it. */
export function roomOf({ width, height }) {
  return { width: width / SHARE, height: height / SHARE };
}

/** The picture's rectangle on a stage, in the stage's pixels; `view` is of its room. */
export function frameOf(stage, picture, view = WHOLE) {
  const room = rectangle(view, stage, roomOf(picture));
  const [width, height] = [room.width * SHARE, room.height * SHARE];
  return {
    x: room.x + (room.width - width) / 2,
    y: room.y + (room.height - height) / 2,
    width,
    height,
  };
}

/** Corners of a box: [part, x, y] in shares. */
export function cornersOf({ x, y, w, h }) {
  return [
    ["00", x, y],
    ["10", x + w, y],
    ["01", x, y + h],
    ["11", x + w, y + h],
  ];
}

/**
 * What lies at a place of the stage, or null: {index, part}, part being "move" or a corner.
 *
 * boxes: all subjects' boxes in shares. The chosen one comes first, then the earlier ones, as they
 * lie in front. Corners have hands on the chosen one alone.
 */
export function hit(boxes, chosen, rect, at, reach) {
  const near = (x, y) => {
    const place = toStage(rect, { x, y });
    return Math.hypot(place.x - at.x, place.y - at.y) <= reach;
  };
  const own = boxes[chosen];
  if (own) {
    // A box smaller than two hands has but one corner, grasped from outside, and can be moved.
    const small = Math.min(own.w * rect.width, own.h * rect.height) < 2 * reach;
    const end = toStage(rect, { x: own.x + own.w, y: own.y + own.h });
    const outside = at.x >= end.x && at.y >= end.y;
    const corner = cornersOf(own).find(
      ([part, x, y]) => near(x, y) && (!small || (part === "11" && outside)),
    );
    if (corner) return { index: chosen, part: corner[0] };
  }
  const inside = (box) => {
    const low = toStage(rect, box);
    const high = toStage(rect, { x: box.x + box.w, y: box.y + box.h });
    const slack = 2;
    return (
      at.x >= low.x - slack &&
      at.x <= high.x + slack &&
      at.y >= low.y - slack &&
      at.y <= high.y + slack
    );
  };
  const order = [...boxes.keys()].sort((a, b) => (b === chosen) - (a === chosen) || a - b);
  const index = order.find((number) => boxes[number] && inside(boxes[number]));
  return index === undefined ? null : { index, part: "move" };
}

/**
 * The move {x, y} of a box (in shares) changed so that it lines up with the picture's borders and
 * middles or with other boxes, where that is near; with the lines to show, {x: [], y: []}.
 *
 * reach: {x, y} in shares.
 */
export function snapped(box, part, by, others, reach) {
  const lines = { x: [], y: [] };
  const next = { ...by };
  for (const [at, place, length] of [
    [0, "x", "w"],
    [1, "y", "h"],
  ]) {
    const [low, high] = [box[place], box[place] + box[length]];
    const own = { 0: [low], 1: [high] }[part[at]] ?? [low, (low + high) / 2, high];
    const targets = [0, 0.5, 1];
    for (const other of others) {
      targets.push(other[place], other[place] + other[length] / 2, other[place] + other[length]);
    }
    let best = null;
    for (const from of own) {
      for (const to of targets) {
        const off = to - from - by[place];
        if (Math.abs(off) <= reach[place] && !(Math.abs(off) >= Math.abs(best?.off))) {
          best = { off, to };
        }
      }
    }
    if (!best) continue;
    next[place] = by[place] + best.off;
    lines[place].push(best.to);
  }
  return { by: next, lines };
}
