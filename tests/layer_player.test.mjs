// What the layer player decides without a page: which frame lies where, and what is shown.

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  firstVisible,
  fitted,
  framePlace,
  panes,
  paneTitle,
  readLayers,
  stepped,
} from "../web/layer_player.mjs";

const ALL = ["foreground", "alpha", "background", "blended"];
const entry = {
  name: "foreground",
  frames: 5,
  fps: 8,
  width: 10,
  height: 20,
  columns: 2,
  per_sheet: 4,
  sheets: ["a", "b"],
};

test("frames are found row by row, sheet after sheet", () => {
  const places = [0, 1, 2, 3, 4].map((frame) => framePlace(entry, frame));
  assert.deepEqual(
    places.map(({ sheet, x, y }) => [sheet, x, y]),
    [
      [0, 0, 0],
      [0, 10, 0],
      [0, 0, 20],
      [0, 10, 20],
      [1, 0, 0],
    ],
  );
});

test("steps go round in both directions", () => {
  assert.equal(stepped(7, 1, 8), 0);
  assert.equal(stepped(0, -1, 8), 7);
  assert.equal(stepped(3, 16, 8), 3);
});

test("what cannot be shown is left out", () => {
  const address = (sheet) => `/view/${sheet}`;
  assert.deepEqual(readLayers([entry], address)[0].urls, ["/view/a", "/view/b"]);
  const broken = [
    null,
    { ...entry, name: "depth" },
    { ...entry, fps: 0 },
    { ...entry, columns: 0 },
    { ...entry, width: 1.5 },
    { ...entry, sheets: ["a"] },
  ];
  assert.deepEqual(readLayers(broken, address), []);
  assert.deepEqual(readLayers(undefined, address), []);
});

test("the recomposed scene is shown first, or what there is of it", () => {
  assert.deepEqual(firstVisible(ALL), ["background", "foreground"]);
  assert.deepEqual(firstVisible(["foreground", "alpha"]), ["foreground"]);
  assert.deepEqual(firstVisible(["alpha", "blended"]), ["blended"]);
  assert.deepEqual(firstVisible(["alpha"]), ["alpha"]);
});

test("layers lie on each other in one order, whatever the order of switching", () => {
  const state = { names: ALL, visible: ["alpha", "foreground", "background"], side: false };
  assert.deepEqual(panes(state), [["background", "foreground", "alpha"]]);
  assert.deepEqual(panes({ ...state, solo: "alpha" }), [["alpha"]]);
});

test("side by side never shows the same picture twice where there is a blended layer", () => {
  const scene = ["background", "foreground"];
  assert.deepEqual(panes({ names: ALL, visible: scene, side: true }), [["blended"], scene]);
  assert.deepEqual(panes({ names: ALL, visible: ["alpha"], side: true }), [["alpha"], scene]);
  const lacking = { names: ["foreground", "alpha"], visible: ["foreground"], side: true };
  assert.deepEqual(panes(lacking), [["foreground"]]);
});

test("pictures are named after what they show", () => {
  assert.equal(paneTitle(["background", "foreground"]), "Recomposed");
  assert.equal(paneTitle(["blended"]), "Blended");
  assert.equal(paneTitle(["foreground", "alpha"]), "Foreground + Alpha");
  assert.equal(paneTitle([]), "Nothing");
});

test("pictures keep their proportions", () => {
  const box = { x: 10, y: 0, width: 100, height: 100 };
  assert.deepEqual(fitted(50, 25, box), { x: 10, y: 25, width: 100, height: 50 });
});
