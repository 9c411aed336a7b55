// What the click editor decides without a page: the contract, the view, and hands into clicks.

import assert from "node:assert/strict";
import { test } from "node:test";

import { ClickModel } from "../web/click_model.mjs";
import { hit, panned, rectangle, toPicture, toStage, WHOLE, zoomed } from "../web/click_view.mjs";
import {
  addBox,
  addPoint,
  History,
  Latest,
  moved,
  MOST,
  NOTHING,
  readClicks,
  selects,
  writeClicks,
} from "../web/clicks.mjs";

const STAGE = { width: 200, height: 100 };
const PICTURE = { width: 400, height: 400 };

function model() {
  const seen = { edits: 0, commits: [] };
  const made = new ClickModel({
    onEdit: () => seen.edits++,
    onCommit: () => seen.commits.push(writeClicks(made.clicks)),
  });
  made.stage = STAGE;
  made.picture = PICTURE;
  return { made, seen };
}

/** A place of the stage by shares of the picture, which lies at 50..150 x 0..100. */
const at = (x, y) => ({ x: 50 + 100 * x, y: 100 * y });

function close(actual, expected) {
  assert.equal(actual.length, expected.length);
  actual.forEach((value, i) => assert.ok(Math.abs(value - expected[i]) < 1e-9, `${actual}`));
}

test("the text is the contract, and reads back as it was", () => {
  const clicks = addBox(addPoint(NOTHING, { x: 0.123456789, y: 1 }, 0), { x: 0.9, y: 0.8 }, { x: 0.1, y: 0.2 });
  const text = writeClicks(clicks);
  assert.equal(
    text,
    '{"version":1,"points":[{"x":0.12346,"y":1,"label":0}],"boxes":[[0.1,0.2,0.9,0.8]]}',
  );
  assert.equal(writeClicks(readClicks(text)), text);
  assert.equal(writeClicks(NOTHING), "");
  assert.equal(readClicks(""), NOTHING);
});

test("points in pixels wait for the picture's size", () => {
  const text = '[{"x": 99.5, "y": 199.5}, {"x": 400, "y": 0}]';
  assert.equal(readClicks(text), null);
  const { points } = readClicks(text, PICTURE);
  assert.deepEqual(points[0], { x: 0.25, y: 0.5, label: 1 });
  assert.equal(points[1].x, 1);
  assert.equal(readClicks('[{"x": 401, "y": 0}]', PICTURE), null);
});

test("what is not the contract is not read", () => {
  for (const text of [
    "{",
    "7",
    '{"points": 3}',
    '{"points": [{"x": 2, "y": 0}]}',
    '{"points": [{"x": null, "y": 0}]}',
    '{"points": [{"x": 0.5, "y": 0.5, "label": 2}]}',
    '{"boxes": [[0, 0, 1]]}',
    '{"boxes": ["0011"]}',
    JSON.stringify({ points: Array(MOST + 1).fill({ x: 0, y: 0 }) }),
  ]) {
    assert.equal(readClicks(text), null, text);
  }
});

test("a negative point alone selects nothing", () => {
  assert.equal(selects(NOTHING), false);
  assert.equal(selects(addPoint(NOTHING, { x: 0, y: 0 }, 0)), false);
  assert.equal(selects(addPoint(NOTHING, { x: 0, y: 0 }, 1)), true);
  assert.equal(selects(addBox(NOTHING, { x: 0, y: 0 }, { x: 1, y: 1 })), true);
});

test("boxes stay inside, in order, and as large as they were when moved", () => {
  const clicks = addBox(NOTHING, { x: 0.6, y: 0.5 }, { x: 0.2, y: 1.7 });
  close(clicks.boxes[0], [0.2, 0.5, 0.6, 1]);
  const edge = { kind: "box", index: 0, part: "edge" };
  close(moved(clicks, edge, { x: 0, y: 0 }, { x: 0.9, y: -0.1 }).boxes[0], [0.6, 0.4, 1, 0.9]);
  const corner = { kind: "box", index: 0, part: "10" };
  close(moved(clicks, corner, { x: 0.6, y: 0.5 }, { x: 0.4, y: 0.1 }).boxes[0], [0.2, 0.1, 0.4, 1]);
  const turned = moved(clicks, corner, { x: 0.6, y: 0.5 }, { x: 0, y: 2 }).boxes[0];
  assert.ok(turned[0] < turned[2] && turned[1] < turned[3]);
  assert.equal(addBox(clicks, { x: 0.5, y: 0.5 }, { x: 0.5, y: 0.9 }), clicks);
});

test("history goes back and forth, and forgets what was undone when it goes on", () => {
  const history = new History(1);
  history.push(2);
  history.push(2);
  history.push(3);
  assert.equal(history.undo(), 2);
  assert.equal(history.undo(), 1);
  assert.equal(history.undo(), 1);
  assert.equal(history.redo(), 2);
  history.push(9);
  assert.equal(history.canRedo, false);
  assert.equal(history.undo(), 2);
});

test("only the last wish waits, one job runs at a time", async () => {
  const [started, shown, failed] = [[], [], []];
  const release = new Map();
  const latest = new Latest(
    (wish, signal) => {
      started.push(wish);
      return new Promise((resolve, reject) => release.set(wish, { resolve, reject, signal }));
    },
    (result, wish) => shown.push([result, wish]),
    (error) => failed.push(error.message),
  );
  const settled = () => new Promise((resolve) => setTimeout(resolve));
  for (const wish of ["a", "b", "c"]) latest.ask(wish);
  assert.deepEqual(started, ["a"]);
  release.get("a").resolve(1);
  await settled();
  assert.deepEqual([started, shown], [["a", "c"], [[1, "a"]]]);
  release.get("c").reject(new Error("no"));
  await settled();
  assert.deepEqual(failed, ["no"]);
  latest.ask("d");
  latest.stop();
  assert.equal(release.get("d").signal.aborted, true);
  latest.ask("e");
  release.get("d").resolve(4);
  release.get("e").resolve(5);
  await settled();
  assert.deepEqual(shown.at(-1), [5, "e"]);
  assert.equal(shown.length, 2);
  assert.equal(latest.busy, false);
});

test("the picture is fitted, and places go there and back", () => {
  const rect = rectangle(WHOLE, STAGE, PICTURE);
  assert.deepEqual(rect, { x: 50, y: 0, width: 100, height: 100 });
  assert.deepEqual(toPicture(rect, { x: 75, y: 50 }), { x: 0.25, y: 0.5 });
  assert.deepEqual(toStage(rect, { x: 0.25, y: 0.5 }), { x: 75, y: 50 });
});

test("what lies under the hand stays there when zooming, and no gap opens", () => {
  const hand = at(0.3, 0.6);
  const view = zoomed(WHOLE, 8, hand, STAGE, PICTURE);
  const held = toPicture(rectangle(view, STAGE, PICTURE), hand);
  close([held.x, held.y], [0.3, 0.6]);
  const far = rectangle(panned(view, 1e5, -1e5, STAGE, PICTURE), STAGE, PICTURE);
  close([far.x, far.y + far.height], [0, STAGE.height]);
  assert.deepEqual(zoomed(view, 1e-3, hand, STAGE, PICTURE), WHOLE);
  assert.equal(zoomed(view, 1e9, hand, STAGE, PICTURE).zoom, 32);
});

test("points lie above boxes, corners above edges, and inside of a box is free", () => {
  const clicks = addPoint(addBox(NOTHING, { x: 0.2, y: 0.2 }, { x: 0.8, y: 0.8 }), { x: 0.2, y: 0.2 }, 1);
  const rect = rectangle(WHOLE, STAGE, PICTURE);
  assert.deepEqual(hit(clicks, rect, at(0.2, 0.2), 8), { kind: "point", index: 0 });
  assert.deepEqual(hit(clicks, rect, at(0.8, 0.8), 8), { kind: "box", index: 0, part: "11" });
  assert.deepEqual(hit(clicks, rect, at(0.8, 0.5), 8), { kind: "box", index: 0, part: "edge" });
  assert.equal(hit(clicks, rect, at(0.5, 0.5), 8), null);
  assert.equal(hit(clicks, rect, at(0.95, 0.5), 8), null);
});

test("left adds, right and alt add what is not wanted, a drag moves, one step each", () => {
  const { made, seen } = model();
  made.press(at(0.5, 0.5));
  made.drag(at(0.6, 0.5));
  assert.equal(seen.commits.length, 0);
  made.release();
  assert.equal(seen.commits.length, 1);
  made.press(at(0.2, 0.2), { button: 2 });
  made.release();
  made.press(at(0.9, 0.9), { alt: true });
  made.release();
  assert.deepEqual(
    made.clicks.points.map((point) => point.label),
    [1, 0, 0],
  );
  made.press(at(0.6, 0.5));
  made.drag(at(0.7, 0.1));
  made.release();
  close([made.clicks.points[0].x, made.clicks.points[0].y], [0.7, 0.1]);
  made.press(at(0.7, 0.1), { button: 2 });
  made.release();
  assert.equal(made.clicks.points[0].label, 0);
  assert.equal(seen.commits.length, 5);
  for (let i = 0; i < 5; i++) made.undo();
  assert.equal(made.clicks, NOTHING);
  made.redo();
  assert.equal(made.clicks.points.length, 1);
});

test("a point is grasped where it is, not where the hand is", () => {
  const { made } = model();
  made.press(at(0.5, 0.5));
  made.release();
  made.press(at(0.54, 0.5));
  made.drag(at(0.64, 0.5));
  made.release();
  close([made.clicks.points[0].x], [0.6]);
});

test("ctrl draws a box, the tool does too, and escape takes a drag back", () => {
  const { made, seen } = model();
  made.press(at(0.1, 0.1), { ctrl: true });
  made.drag(at(0.6, 0.7));
  assert.equal(made.draft.length, 2);
  made.release();
  close(made.clicks.boxes[0], [0.1, 0.1, 0.6, 0.7]);
  made.tool = "box";
  made.press(at(0.8, 0.8));
  made.release();
  assert.equal(made.clicks.boxes.length, 1);
  made.tool = "positive";
  made.press(at(0.9, 0.9));
  made.drag(at(0.2, 0.2));
  made.cancel();
  assert.equal(made.clicks.points.length, 0);
  assert.equal(seen.commits.length, 1);
});

test("outside the picture nothing is added", () => {
  const { made } = model();
  made.press({ x: 10, y: 50 });
  made.release();
  assert.equal(made.clicks, NOTHING);
  assert.equal(made.over({ x: 10, y: 50 }), "outside");
});

test("a finger taps, stays for a negative point, and moves a zoomed picture", () => {
  const { made } = model();
  const touch = { kind: "touch" };
  made.press(at(0.5, 0.5), touch);
  assert.equal(made.clicks, NOTHING);
  made.release();
  assert.equal(made.clicks.points[0].label, 1);
  made.press(at(0.1, 0.1), touch);
  made.hold();
  made.drag(at(0.2, 0.1));
  made.release();
  assert.equal(made.clicks.points[1].label, 0);
  made.zoom(4);
  const before = made.view.x;
  made.press(at(0.8, 0.8), touch);
  made.drag(at(0.4, 0.8));
  made.release();
  assert.ok(made.view.x > before);
  assert.equal(made.clicks.points.length, 2);
});

test("all of it works with keys", () => {
  const { made, seen } = model();
  made.addInMiddle();
  made.nudge(4, -8);
  close([made.clicks.points[0].x, made.clicks.points[0].y], [0.51, 0.48]);
  made.flipSelected();
  made.addInMiddle();
  made.selectNext(1);
  assert.equal(made.selected.index, 0);
  made.selectNext(-1);
  assert.equal(made.selected.index, 1);
  made.deleteSelected();
  assert.equal(made.hasSelected, false);
  made.deleteSelected();
  made.nudge(1, 1);
  assert.equal(made.clicks.points[0].label, 0);
  assert.equal(seen.commits.length, 5);
  made.clear();
  assert.equal(seen.commits.at(-1), "");
});

test("clicks from elsewhere have no history", () => {
  const { made } = model();
  made.addInMiddle();
  made.reset(readClicks('{"points": [{"x": 0.1, "y": 0.2}]}'));
  assert.equal(made.canUndo, false);
  assert.equal(made.hasSelected, false);
});
