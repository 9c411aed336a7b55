// Follows a graph's links upwards: which node feeds an input, and which picture it stands for.

// Core nodes whose result shows the same part of the picture as what goes in.
const SAME_FRAME = new Set([
  "Reroute",
  "ImageScale",
  "ImageScaleBy",
  "ImageScaleToTotalPixels",
  "ImageScaleToMaxDimension",
  "ImageBlur",
  "ImageSharpen",
  "ImageInvert",
  "ImageQuantize",
]);
const LOADERS = new Set(["LoadImage", "LoadImageOutput"]);
const MUTED = 2;
const BYPASSED = 4;
// The node that stands for a subgraph's own inputs.
const SUBGRAPH_INPUT = -10;
// Longer chains are loops.
const LONGEST = 64;

/** Where a node's input comes from: {node, slot} of the node that makes it, or null. */
export function sourceOf(node, inputName, root) {
  const slot = node?.inputs?.findIndex((input) => input.name === inputName) ?? -1;
  return slot < 0 ? null : follow(node, slot, root, LONGEST);
}

/**
 * The picture that comes into a node's input, if its file is known without a run: {filename,
 * subfolder, type}, or null.
 *
 * outputs(node): what the host said that a node has shown, its `ui` output.
 */
export function pictureOf(node, inputName, root, outputs) {
  let source = sourceOf(node, inputName, root);
  for (let steps = 0; source && steps < LONGEST; steps++) {
    const { node: maker, slot } = source;
    const type = maker.type;
    if (LOADERS.has(type)) return slot === 0 ? loadedPicture(maker) : null;
    const crops = maker.widgets?.find((widget) => widget.name === "crop")?.value ?? "disabled";
    if (SAME_FRAME.has(type) && crops === "disabled") {
      source = sourceOf(maker, maker.inputs.find((input) => input.type === "IMAGE")?.name, root);
      continue;
    }
    const images = slot === 0 && maker.outputs?.length === 1 ? outputs(maker)?.images : null;
    return images?.length === 1 && isFile(images[0]) ? images[0] : null;
  }
  return null;
}

/** The value of a widget of the node behind an input, or null. */
export function valueBehind(node, inputName, widgetName, root) {
  const source = sourceOf(node, inputName, root);
  return source?.node.widgets?.find((widget) => widget.name === widgetName)?.value ?? null;
}

/** A file from a loader's widget: "folder/name.png [output]" or without the last part. */
export function loadedPicture(loader) {
  const value = loader.widgets?.find((widget) => widget.name === "image")?.value;
  if (typeof value !== "string" || !value) return null;
  const [, path, type = loader.type === "LoadImageOutput" ? "output" : "input"] =
    /^(.*?)(?: \[(input|output|temp)\])?$/.exec(value);
  const cut = path.lastIndexOf("/");
  return { filename: path.slice(cut + 1), subfolder: path.slice(0, Math.max(cut, 0)), type };
}

function follow(node, slot, root, left) {
  const id = node.inputs[slot]?.link;
  const link = id === null || id === undefined ? null : linkOf(node.graph, id);
  if (!link || left <= 0) return null;
  if (Number(link.origin_id) === SUBGRAPH_INPUT) {
    const outer = holderOf(node.graph, root);
    return outer ? follow(outer, link.origin_slot, root, left - 1) : null;
  }
  return made(node.graph.getNodeById(link.origin_id), link.origin_slot, root, left - 1);
}

function made(node, slot, root, left) {
  if (!node || left <= 0 || node.mode === MUTED) return null;
  if (node.mode === BYPASSED) {
    const type = node.outputs[slot]?.type;
    const at = node.inputs.findIndex((input) => input.type === type);
    return at < 0 ? null : follow(node, at, root, left - 1);
  }
  if (node.type === "Reroute") return follow(node, 0, root, left - 1);
  if (!node.subgraph) return { node, slot };
  // Into the subgraph, to whatever feeds its output.
  const output = node.subgraph.outputs[slot];
  const link = output?.linkIds?.length ? linkOf(node.subgraph, output.linkIds[0]) : null;
  if (!link || Number(link.origin_id) === SUBGRAPH_INPUT) return null;
  return made(node.subgraph.getNodeById(link.origin_id), link.origin_slot, root, left - 1);
}

/** The node that a subgraph is behind; the first one where there are several. */
function holderOf(graph, root) {
  const graphs = [root, ...(root.subgraphs?.values() ?? [])];
  for (const outer of graphs) {
    const nodes = outer.nodes ?? outer._nodes ?? [];
    const found = nodes.find((node) => node.subgraph && node.subgraph.id === graph.id);
    if (found) return found;
  }
  return null;
}

function linkOf(graph, id) {
  return graph?.getLink?.(id) ?? graph?.links?.get?.(id) ?? graph?.links?.[id] ?? null;
}

function isFile(entry) {
  return typeof entry?.filename === "string" && ["input", "output", "temp"].includes(entry.type);
}
