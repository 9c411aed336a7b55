// Puts the layer viewer into Save Layers and feeds it what the node has saved.

import { mountElement, registerNode, viewUrl } from "./host.mjs";
import { LayerPlayer, readLayers } from "./layer_player.mjs";

const players = new WeakMap();

registerNode("LayerLoomSaveLayers", {
  created(node) {
    const player = new LayerPlayer();
    players.set(node, player);
    mountElement(node, "layerloom_viewer", player.element, {
      width: 360,
      height: 330,
      removed: () => player.destroy(),
    });
  },
  output(node, output) {
    const layers = readLayers(output.layerloom_layers, viewUrl);
    if (layers.length) players.get(node)?.load(layers);
  },
});
