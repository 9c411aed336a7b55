// Which picture and which settings lie behind an input, through reroutes, bypasses and subgraphs.

import assert from "node:assert/strict";
import { test } from "node:test";

import { loadedPicture, pictureOf, sourceOf, valueBehind } from "../web/upstream.mjs";

/** A graph of nodes {id, type, inputs: {name: [from, slot]}, ...}. */
function graph(id, nodes, subgraphs = new Map()) {
  const links = new Map();
  const made = { id, subgraphs, getLink: (at) => links.get(at) };
  made.nodes = nodes.map(({ inputs = {}, types = {}, outputs = ["IMAGE"], ...rest }) => ({
    mode: 0,
    ...rest,
    graph: made,
    outputs: outputs.map((type) => ({ type })),
    inputs: Object.entries(inputs).map(([name, from]) => {
      let link = null;
      if (from) {
        link = links.size + 1;
        links.set(link, { origin_id: from[0], origin_slot: from[1] });
      }
      return { name, type: types[name] ?? "IMAGE", link };
    }),
  }));
  made.getNodeById = (at) => made.nodes.find((node) => String(node.id) === String(at)) ?? null;
  made.link = (from) => {
    const at = links.size + 1;
    links.set(at, { origin_id: from[0], origin_slot: from[1] });
    return at;
  };
  return made;
}

const loader = {
  id: 1,
  type: "LoadImage",
  outputs: ["IMAGE", "MASK"],
  widgets: [{ name: "image", value: "cat.png" }],
};
const CAT = { filename: "cat.png", subfolder: "", type: "input" };
const none = () => null;

function pictureBehind(nodes, outputs = none) {
  const root = graph("root", nodes);
  return pictureOf(root.nodes.at(-1), "image", root, outputs);
}

test("names in a loader's widget say where the file is", () => {
  const read = (value, type = "LoadImage") =>
    loadedPicture({ type, widgets: [{ name: "image", value }] });
  assert.deepEqual(read("a b.png"), { filename: "a b.png", subfolder: "", type: "input" });
  assert.deepEqual(read("x/y/a.png [output]"), {
    filename: "a.png",
    subfolder: "x/y",
    type: "output",
  });
  assert.deepEqual(read("a [1].png"), { filename: "a [1].png", subfolder: "", type: "input" });
  assert.equal(read("a.png", "LoadImageOutput").type, "output");
  assert.equal(read(undefined), null);
});

test("the connected loader's picture is known at once", () => {
  const node = { id: 2, type: "LayerLoomClickMask", inputs: { image: [1, 0] } };
  assert.deepEqual(pictureBehind([loader, node]), CAT);
  assert.equal(pictureBehind([loader, { ...node, inputs: { image: null } }]), null);
  assert.equal(pictureBehind([loader, { ...node, inputs: { image: [1, 1] } }]), null);
});

test("resizing shows the same picture, cropping waits for a run", () => {
  const scale = (crop) => ({
    id: 2,
    type: "ImageScale",
    inputs: { image: [1, 0] },
    widgets: [{ name: "crop", value: crop }],
  });
  const node = { id: 3, type: "LayerLoomClickMask", inputs: { image: [2, 0] } };
  assert.deepEqual(pictureBehind([loader, scale("disabled"), node]), CAT);
  assert.equal(pictureBehind([loader, scale("center"), node]), null);
});

test("what another node has shown is taken where it is the one picture it makes", () => {
  const crop = { id: 2, type: "ImageCropV2", inputs: { image: [1, 0] } };
  const node = { id: 3, type: "LayerLoomClickMask", inputs: { image: [2, 0] } };
  const shown = { filename: "t.png", subfolder: "", type: "temp" };
  assert.deepEqual(pictureBehind([loader, crop, node], () => ({ images: [shown] })), shown);
  assert.equal(pictureBehind([loader, crop, node], () => ({ images: [shown, shown] })), null);
  assert.equal(pictureBehind([loader, crop, node], () => ({ images: [{ url: "x" }] })), null);
});

test("reroutes and bypassed nodes are seen through, muted ones are not", () => {
  const reroute = { id: 2, type: "Reroute", inputs: { "": [1, 0] } };
  const other = { id: 3, type: "Filter", mode: 4, inputs: { a: [9, 0], picture: [2, 0] }, types: { a: "MASK" } };
  const node = { id: 4, type: "LayerLoomClickMask", inputs: { image: [3, 0] } };
  assert.deepEqual(pictureBehind([loader, reroute, other, node]), CAT);
  assert.equal(pictureBehind([loader, reroute, { ...other, mode: 2 }, node]), null);
});

test("loops end", () => {
  const a = { id: 1, type: "Reroute", inputs: { "": [2, 0] } };
  const b = { id: 2, type: "ImageScaleBy", inputs: { image: [1, 0] } };
  const node = { id: 3, type: "LayerLoomClickMask", inputs: { image: [2, 0] } };
  assert.equal(pictureBehind([a, b, node]), null);
});

test("subgraphs are followed in both directions", () => {
  const inner = graph("inner", [{ id: 5, type: "LayerLoomClickMask", inputs: { image: [-10, 0] } }]);
  const holder = { id: 2, type: "inner", subgraph: inner, inputs: { picture: [1, 0] } };
  const root = graph("root", [loader, holder], new Map([["inner", inner]]));
  assert.deepEqual(pictureOf(inner.nodes[0], "image", root, none), CAT);

  const source = graph("source", [loader]);
  source.outputs = [{ linkIds: [source.link([1, 0])] }];
  const outer = graph("root", [
    { id: 3, type: "source", subgraph: source, inputs: {} },
    { id: 4, type: "LayerLoomClickMask", inputs: { image: [3, 0] } },
  ]);
  assert.deepEqual(pictureOf(outer.nodes[1], "image", outer, none), CAT);
});

test("the segmenter's file is read off the loader", () => {
  const root = graph("root", [
    { id: 1, type: "LayerLoomLoadSegmenter", widgets: [{ name: "checkpoint", value: "b.pth" }] },
    { id: 2, type: "LayerLoomClickMask", inputs: { segmenter: [1, 0] } },
  ]);
  assert.equal(valueBehind(root.nodes[1], "segmenter", "checkpoint", root), "b.pth");
  assert.equal(valueBehind(root.nodes[1], "nothing", "checkpoint", root), null);
  assert.equal(sourceOf(root.nodes[1], "segmenter", root).node.id, 1);
});
