// Puts the box editor into Box Trajectory: its picture, its clip's length and size, its boxes.

import { BoxEditor } from "./box_editor.mjs";
import {
  hiddenText,
  mountElement,
  onGraphChange,
  outputOf,
  registerNode,
  rootGraph,
  viewUrl,
} from "./host.mjs";
import { pictureOf } from "./upstream.mjs";

// As in nodes/boxes.py, where there is no picture.
const PLAIN = { width: 448, height: 256 };
const states = new WeakMap();
// A path copied in one node can be pasted in another.
const clipboard = { copy: null };

/** One node's editor and what it stands on. */
class BoxTrajectory {
  #node;
  #text;
  #ran = null;
  #clip = null;
  #given = "";
  #size = null;

  constructor(node) {
    this.#node = node;
    this.editor = new BoxEditor({ onChange: (text) => this.#text.set(text), clipboard });
    this.#text = hiddenText(node, "boxes", () => this.refresh());
    const stop = onGraphChange(() => this.refresh());
    mountElement(node, "layerloom_boxes", this.editor.element, {
      width: 440,
      height: 440,
      removed: () => {
        stop();
        this.editor.destroy();
      },
    });
    this.#show();
    // A graph that is being loaded has no links yet.
    queueMicrotask(() => this.refresh());
  }

  /** What a run was given. */
  ran({
    layerloom_picture: [picture] = [],
    layerloom_clip: [clip] = [],
    layerloom_path: [path] = [],
  }) {
    this.#ran = picture ?? this.#ran;
    if (picture) this.#clip = clip ? { ...clip, address: viewUrl(clip) } : null;
    this.#given = path ?? this.#given;
    this.refresh();
  }

  async refresh() {
    const linked = (name) =>
      this.#node.inputs?.some((input) => input.name === name && input.link != null);
    const known = pictureOf(this.#node, "image", rootGraph(), outputOf);
    if (!linked("image")) this.#ran = this.#clip = null;
    if (!linked("path")) this.#given = "";
    const picture = known ?? this.#ran;
    this.editor.showClip(known ? null : this.#clip);
    this.#show();
    this.#size = await this.editor.showPicture(picture ? viewUrl(picture) : "");
    this.#show();
  }

  #show() {
    const value = (name) => this.#node.widgets.find((widget) => widget.name === name)?.value;
    const whole = this.#size ?? PLAIN;
    this.editor.setClip({
      frames: value("frames") || 1,
      width: value("width") || whole.width,
      height: value("height") || whole.height,
    });
    this.editor.setText(this.#text.get());
    this.editor.setGiven(this.#given);
  }
}

registerNode("LayerLoomBoxTrajectory", {
  created(node) {
    states.set(node, new BoxTrajectory(node));
  },
  output(node, output) {
    states.get(node)?.ran(output);
  },
});
