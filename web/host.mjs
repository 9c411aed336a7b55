// The one adapter to ComfyUI's frontend: everything the pack asks of it goes through here.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

/**
 * Call back for the pack's own nodes of one id.
 *
 * created(node): a node was made, loaded or pasted.
 * output(node, output): the host sent a node's `ui` output, after a run or when a workflow with
 * known outputs is opened again.
 */
export function registerNode(nodeId, { created, output }) {
  app.registerExtension({
    name: `LayerLoom.${nodeId}`,
    nodeCreated(node) {
      if (node.constructor.comfyClass !== nodeId) return;
      created(node);
      const earlier = node.onExecuted;
      node.onExecuted = function (result) {
        earlier?.call(this, result);
        output(this, result ?? {});
      };
    },
    onNodeOutputsUpdated(outputs) {
      for (const [place, result] of Object.entries(outputs ?? {})) {
        const node = nodeAt(place);
        if (node?.constructor.comfyClass === nodeId) output(node, result ?? {});
      }
    },
  });
}

/**
 * Show an element in a node, in the classic canvas and in Nodes 2.0 alike.
 *
 * Nothing of it is saved in the workflow or sent with the prompt. `removed` is called when the
 * node goes. The node starts at least `width` pixels wide, and tall enough for `height`.
 */
export function mountElement(node, name, element, { width, height, removed }) {
  const widget = node.addDOMWidget(name, "layerloom", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
  });
  widget.serialize = false;
  const earlier = widget.onRemove;
  widget.onRemove = function () {
    earlier?.call(this);
    removed();
  };
  const needed = node.computeSize?.() ?? node.size;
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], needed[1])]);
  return widget;
}

/** Address of a file that the host reported ({filename, subfolder, type}). */
export function viewUrl({ filename, subfolder = "", type = "output" }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/** Node by the frontend's locator: its id, or "subgraph uuid:id" inside a subgraph. */
function nodeAt(place) {
  const parts = String(place).split(":");
  const id = parts.pop();
  const root = app.rootGraph ?? app.graph;
  const home = parts.length ? root?.subgraphs?.get(parts.join(":")) : root;
  return home?.getNodeById(id) ?? null;
}
