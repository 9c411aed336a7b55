// Puts the click editor into Click Mask: its picture, its clicks, and their mask from the host.

import { ClickEditor } from "./click_editor.mjs";
import {
  hiddenText,
  mountElement,
  onGraphChange,
  outputOf,
  postJson,
  registerNode,
  rootGraph,
  viewUrl,
} from "./host.mjs";
import { pictureOf, valueBehind } from "./upstream.mjs";

const SETTINGS = ["candidate", "dilate", "feather"];
const states = new WeakMap();

/** One node's editor and what it stands on. */
class ClickMask {
  #node;
  #text;
  #ran = null;
  #picture = null;
  #asked = "";

  constructor(node) {
    this.#node = node;
    this.editor = new ClickEditor({
      onChange: (text) => this.#text.set(text),
      segment: (clicks, signal) => this.#segment(clicks, signal),
    });
    this.#text = hiddenText(node, "clicks", (text) => this.editor.setText(text));
    const stop = onGraphChange(() => this.refresh());
    mountElement(node, "layerloom_clicks", this.editor.element, {
      width: 380,
      height: 330,
      removed: () => {
        stop();
        this.editor.destroy();
      },
    });
    this.editor.setText(this.#text.get());
    // A graph that is being loaded has no links yet.
    queueMicrotask(() => this.refresh());
  }

  /** The picture that a run was given. */
  ran(picture) {
    this.#ran = picture;
    this.refresh();
  }

  refresh() {
    const linked = this.#node.inputs?.some((input) => input.name === "image" && input.link != null);
    const known = pictureOf(this.#node, "image", rootGraph(), outputOf);
    if (!linked) this.#ran = null;
    this.#picture = known ?? this.#ran;
    this.editor.showPicture(this.#picture ? viewUrl(this.#picture) : "");
    this.editor.setText(this.#text.get());
    const asked = JSON.stringify(this.#settings());
    if (asked === this.#asked) return;
    this.#asked = asked;
    this.editor.refreshMask();
  }

  #settings() {
    const value = (name) => this.#node.widgets.find((widget) => widget.name === name)?.value;
    return {
      segmenter: valueBehind(this.#node, "segmenter", "checkpoint", rootGraph()),
      ...Object.fromEntries(SETTINGS.map((name) => [name, value(name)])),
    };
  }

  async #segment(clicks, signal) {
    const settings = this.#settings();
    if (!settings.segmenter) return { problem: "Connect Load Segmenter to see the mask." };
    return postJson(
      "/layerloom/segment",
      { picture: this.#picture, clicks: { version: 1, ...clicks }, ...settings },
      signal,
    );
  }
}

registerNode("LayerLoomClickMask", {
  created(node) {
    states.set(node, new ClickMask(node));
  },
  output(node, output) {
    const [picture] = output.layerloom_picture ?? [];
    if (picture) states.get(node)?.ran(picture);
  },
});
