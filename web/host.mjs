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

/**
 * Keep a text widget out of sight, in the classic canvas and in Nodes 2.0 alike; it is still saved
 * and sent.
 *
 * loaded(text): its value came from elsewhere, such as a workflow that was opened.
 * Returns {get(), set(text)}; what is set counts as a change that the graph's undo knows.
 */
export function hiddenText(node, name, loaded) {
  const widget = node.widgets.find((one) => one.name === name);
  widget.hidden = true;
  widget.options.hidden = true;
  const get = () => widget.value ?? "";
  const earlier = node.onConfigure;
  node.onConfigure = function (data) {
    earlier?.call(this, data);
    loaded(get());
  };
  return {
    get,
    set(text) {
      app.canvas.emitBeforeChange?.();
      widget.value = text;
      app.canvas.emitAfterChange?.();
      node.graph?.setDirtyCanvas(true, true);
    },
  };
}

/** Call back when anything in the graph has changed, or a node has shown something. */
export function onGraphChange(callback) {
  const kinds = ["graphChanged", "executed"];
  for (const kind of kinds) api.addEventListener(kind, callback);
  return () => {
    for (const kind of kinds) api.removeEventListener(kind, callback);
  };
}

/** The graph that all others lie in. */
export function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/** What a node has shown last, its `ui` output; null for nothing. */
export function outputOf(node) {
  const home = node.graph === rootGraph() ? "" : `${node.graph.id}:`;
  return app.nodeOutputs?.[`${home}${node.id}`] ?? null;
}

/**
 * Send JSON to one of the pack's own routes; a promise of what comes back.
 *
 * Rejects with the sentence that the route says.
 */
export async function postJson(route, data, signal) {
  const answer = await api.fetchApi(route, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(data),
    signal,
  });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error ?? `ComfyUI answered ${answer.status}.`);
  return told;
}

/** Address of a file that the host reported ({filename, subfolder, type}). */
export function viewUrl({ filename, subfolder = "", type = "output" }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/** Node by the frontend's locator: its id, or "subgraph uuid:id" inside a subgraph. */
function nodeAt(place) {
  const parts = String(place).split(":");
  const id = parts.pop();
  const root = rootGraph();
  const home = parts.length ? root?.subgraphs?.get(parts.join(":")) : root;
  return home?.getNodeById(id) ?? null;
}
