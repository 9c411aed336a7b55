// The box editor's parts that need no page: the contract, edits, hands, timeline, snapping.

import assert from "node:assert/strict";
import test from "node:test";

import { BoxModel } from "../web/box_model.mjs";
import { along, boxAt, thinned } from "../web/box_path.mjs";
import { tileOf } from "../web/box_pictures.mjs";
import { frameOf, partAt, placeOf, stepOf } from "../web/box_timeline.mjs";
import { hit, snapped } from "../web/box_view.mjs";
import {
  addCopy,
  addTrack,
  dragged,
  kept,
  MOST_TRACKS,
  moveKey,
  nothing,
  readBoxes,
  removeKey,
  renamed,
  setKey,
  THINNEST,
  writeBoxes,
} from "../web/boxes.mjs";
import { toPicture } from "../web/click_view.mjs";
import { Fingers } from "../web/fingers.mjs";

const BOX = { x: 0.25, y: 0.25, w: 0.5, h: 0.5 };
const RECT = { x: 0, y: 0, width: 100, height: 100 };

function close(actual, expected) {
  for (const side of Object.keys(expected)) {
    assert.ok(Math.abs(actual[side] - expected[side]) < 1e-9, JSON.stringify(actual));
  }
}

test("the text is the contract, and reads back as it was", () => {
  const paths = addTrack(nothing(9), { ...BOX, x: 0.123456789 }, 3);
  const text = writeBoxes(paths);
  assert.equal(
    text,
    '{"version":1,"frames":9,"tracks":[{"id":"a","keyframes":' +
      '[{"frame":3,"x":0.12346,"y":0.25,"w":0.5,"h":0.5,"ease":"linear"}]}]}',
  );
  assert.equal(writeBoxes(readBoxes(text, 9)), text);
  assert.equal(writeBoxes(nothing(9)), "");
  assert.deepEqual(readBoxes("", 9), nothing(9));
});

test("boxes keep some of the picture and are never turned inside out", () => {
  close(kept({ x: 3, y: -3, w: 0.2, h: 0.2 }), { x: 1 - THINNEST, y: THINNEST - 0.2 });
  close(kept({ x: 0, y: 0, w: 9, h: -1 }), { w: 2, h: THINNEST });
  close(dragged(BOX, "move", { x: 0.1, y: -0.1 }), { x: 0.35, y: 0.15, w: 0.5, h: 0.5 });
  close(dragged(BOX, "00", { x: 0.1, y: 9 }), { x: 0.35, w: 0.4, y: 0.75 - THINNEST, h: THINNEST });
  close(dragged(BOX, "11", { x: -9, y: 0.1 }), { x: 0.25, w: THINNEST, h: 0.6 });
});

test("key frames are set, moved and removed", () => {
  let paths = addTrack(nothing(9), BOX, 0);
  paths = setKey(paths, 0, 8, { ...BOX, x: 0.5 });
  paths = setKey(paths, 0, 4, BOX);
  assert.deepEqual(paths.tracks[0].keys.map((key) => key.frame), [0, 4, 8]);
  // Onto another one: it gives way.
  paths = moveKey(paths, 0, 4, 99);
  assert.deepEqual(paths.tracks[0].keys.map((key) => [key.frame, key.x]), [
    [0, 0.25],
    [8, 0.25],
  ]);
  paths = removeKey(removeKey(paths, 0, 0), 0, 8);
  assert.equal(paths.tracks.length, 0);
  assert.equal(removeKey(paths, 0, 8), paths);
});

test("subjects have names of their own, and not more than Python takes", () => {
  let paths = nothing(4);
  for (let i = 0; i < MOST_TRACKS + 3; i++) paths = addTrack(paths, BOX, 0);
  assert.equal(paths.tracks.length, MOST_TRACKS);
  assert.equal(new Set(paths.tracks.map((track) => track.id)).size, MOST_TRACKS);
  assert.equal(renamed(paths, 0, " b "), paths);
  assert.equal(renamed(paths, 0, "  "), paths);
  assert.equal(renamed(paths, 0, " dog ").tracks[0].id, "dog");
  const two = addTrack(nothing(4), BOX, 0);
  const copied = addCopy(two, { ...two.tracks[0], frames: 7 }, 0.1);
  assert.deepEqual(copied.tracks.map((track) => track.id), ["a", "a 2"]);
  close(copied.tracks[1].keys[0], { x: 0.35, y: 0.35 });
});

test("a line is followed at an even pace, with few key frames", () => {
  const line = [
    { x: 0, y: 0 },
    { x: 0.1, y: 0 },
    { x: 0.4, y: 0 },
    { x: 0.4, y: 0.4 },
  ];
  const keys = along({ x: 0, y: 0, w: 0.2, h: 0.2 }, line, 2, 10);
  assert.deepEqual(keys.map((key) => key.frame), [2, 6, 10]);
  close(boxAt({ keys }, 8), { x: 0.4, y: 0.2, w: 0.2 });
  assert.equal(along(BOX, [line[0], line[0]], 0, 8), null);
  assert.equal(along(BOX, line, 8, 8), null);
  assert.equal(thinned(keys).length, 3);
});

test("what lies in front is hit first, corners on the chosen one alone", () => {
  const boxes = [BOX, { x: 0.5, y: 0.5, w: 0.4, h: 0.4 }];
  assert.deepEqual(hit(boxes, -1, RECT, { x: 60, y: 60 }, 8), { index: 0, part: "move" });
  assert.deepEqual(hit(boxes, 1, RECT, { x: 60, y: 60 }, 8), { index: 1, part: "move" });
  assert.deepEqual(hit(boxes, 1, RECT, { x: 92, y: 93 }, 8), { index: 1, part: "11" });
  assert.equal(hit(boxes, 0, RECT, { x: 95, y: 95 }, 8), null);
  // A tiny box can still be moved.
  const tiny = [{ x: 0.5, y: 0.5, w: 0.02, h: 0.02 }];
  assert.equal(hit(tiny, 0, RECT, { x: 49, y: 49 }, 8).part, "move");
});

test("a box lines up with what is near", () => {
  const near = { x: 0.02, y: 0.02 };
  const move = (by, others = []) => snapped({ ...BOX, w: 0.3 }, "move", by, others, near);
  const left = move({ x: -0.24, y: 0.1 });
  close(left.by, { x: -0.25, y: 0.1 });
  assert.deepEqual(left.lines, { x: [0], y: [] });
  close(move({ x: 0.11, y: 0.24 }).by, { x: 0.1, y: 0.25 });
  close(move({ x: 0.3, y: 0.1 }, [{ x: 0.56, y: 0, w: 0.1, h: 0.1 }]).by, { x: 0.31, y: 0.1 });
  const corner = snapped(BOX, "11", { x: 0.26, y: -0.26 }, [], near);
  close(corner.by, { x: 0.25, y: -0.25 });
});

test("the timeline tells frames and key frames apart", () => {
  const tracks = [{ id: "a", keys: [{ frame: 0 }, { frame: 4 }] }];
  for (let frame = 0; frame < 9; frame++) {
    assert.equal(frameOf(placeOf(frame, 224, 9), 224, 9), frame);
  }
  assert.equal(frameOf(-50, 224, 9), 0);
  assert.equal(frameOf(placeOf(0, 224, 1), 224, 1), 0);
  const at = (frame, y) => partAt(tracks, 9, { x: placeOf(frame, 224, 9), y }, 224);
  assert.deepEqual(at(4, 5), { row: -1, frame: 4, key: false });
  assert.deepEqual(at(4, 25), { row: 0, frame: 4, key: true });
  assert.deepEqual(at(6, 25), { row: 0, frame: 6, key: false });
  assert.deepEqual(at(6, 80).row, -1);
  assert.equal(stepOf(400, 9), 1);
  assert.equal(stepOf(400, 100), 10);
});

test("hands make steps of the history, and cancelled ones none", () => {
  const texts = [];
  const model = new BoxModel({ onEdit() {}, onCommit: () => texts.push(writeBoxes(model.paths)) });
  model.reset(nothing(9));
  model.stage = model.picture = { width: 100, height: 100 };
  const at = (x, y) => ({ x: 8 + 84 * x, y: 8 + 84 * y });
  const drag = (from, to, options) => {
    model.press(from, options);
    model.drag(to, options);
    model.release();
  };
  drag(at(0.1, 0.1), at(0.3, 0.3));
  assert.equal(texts.length, 1);
  // A click beside it chooses nothing and adds nothing.
  drag(at(0.8, 0.8), at(0.8, 0.8));
  assert.equal(model.chosen, -1);
  assert.equal(texts.length, 1);
  model.seek(5);
  model.press(at(0.2, 0.2));
  model.drag(at(0.5, 0.5), { free: true });
  assert.equal(model.track.keys.length, 2);
  model.cancel();
  assert.equal(model.track.keys.length, 1);
  drag(at(0.2, 0.2), at(0.5, 0.5), { free: true });
  assert.deepEqual(model.track.keys.map((key) => key.frame), [0, 5]);
  model.grasp(0, 5);
  model.slide(8);
  model.release();
  assert.deepEqual(model.track.keys.map((key) => key.frame), [0, 8]);
  model.undo();
  model.undo();
  model.undo();
  assert.equal(model.paths.tracks.length, 0);
  assert.equal(model.chosen, -1);
  model.redo();
  assert.equal(model.paths.tracks.length, 1);
  assert.equal(texts.length, 7);
});

test("a closer look keeps its place, and hands do the same in it", () => {
  const commits = [];
  const model = new BoxModel({ onEdit() {}, onCommit: () => commits.push(1) });
  model.reset(nothing(9));
  model.stage = { width: 200, height: 100 };
  model.picture = { width: 400, height: 200 };
  const whole = model.rect;
  close(whole, { x: 16, y: 8, width: 168, height: 84 });
  const at = { x: 60, y: 40 };
  const before = toPicture(whole, at);
  model.zoom(3, at);
  close(toPicture(model.rect, at), before);
  close(model.rect, { width: 3 * 168 });
  // The middle button moves what is looked at, and makes no step of the history.
  model.press(at, { button: 1 });
  assert.equal(model.doing, "pan");
  model.drag({ x: 50, y: 45 });
  model.release();
  close(toPicture(model.rect, { x: 50, y: 45 }), before);
  assert.equal(commits.length, 0);
  model.press({ x: 50, y: 45 });
  model.drag({ x: 80, y: 75 });
  model.release();
  close(model.box, { x: before.x, y: before.y, w: 30 / (3 * 168), h: 30 / (3 * 84) });
  // No further away than all of it.
  model.zoom(0.01);
  close(model.rect, whole);
  model.zoom(4);
  model.fit();
  close(model.rect, whole);
});

test("two fingers move and zoom", () => {
  const fingers = new Fingers();
  fingers.down(1, { x: 10, y: 10 });
  assert.equal(fingers.move(1, { x: 12, y: 10 }), null);
  assert.ok(!fingers.pinching);
  fingers.down(2, { x: 32, y: 10 });
  assert.deepEqual(fingers.move(2, { x: 52, y: 10 }), {
    dx: 10,
    dy: 0,
    factor: 2,
    middle: { x: 32, y: 10 },
  });
  assert.equal(fingers.move(3, { x: 0, y: 0 }), null);
  assert.ok(fingers.up(1) && fingers.pinching);
  assert.equal(fingers.move(2, { x: 0, y: 0 }), null);
  assert.ok(fingers.up(2) && !fingers.pinching && !fingers.up(2));
});

test("frames lie row by row on a clip's sheet", () => {
  const sheet = { columns: 3, rows: 2, count: 5, frames: 9 };
  const size = { width: 300, height: 100 };
  const tile = { width: 100, height: 50 };
  assert.deepEqual(tileOf(0, sheet, size), { x: 0, y: 0, ...tile });
  assert.deepEqual(tileOf(2, sheet, size), { x: 100, y: 0, ...tile });
  assert.deepEqual(tileOf(6, sheet, size), { x: 0, y: 50, ...tile });
  // A clip that is shorter than the boxes stays at its end.
  assert.deepEqual(tileOf(30, sheet, size), { x: 100, y: 50, ...tile });
  assert.deepEqual(tileOf(3, { columns: 1, rows: 1, count: 1, frames: 1 }, size), {
    x: 0,
    y: 0,
    ...size,
  });
});
