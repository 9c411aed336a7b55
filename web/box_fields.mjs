// The box editor's fields: a subject's name, its box in pixels and the ease, by keyboard.

import { EASES } from "./boxes.mjs";
import { make } from "./elements.mjs";

const NUMBERS = {
  x: "Left, in pixels",
  y: "Top, in pixels",
  w: "Width, in pixels",
  h: "Height, in pixels",
};

/** Put `element` into an editor and `refresh` it; it changes the model it is given. */
export class BoxFields {
  #model;

  /** on(element, type, handler): how the editor listens. changed(): it may look different now. */
  constructor(model, on, changed) {
    this.#model = model;
    this.name = make("input", {
      type: "text",
      maxlength: 64,
      title: "The subject's name",
      "aria-label": "The subject's name",
    });
    on(this.name, "change", () => {
      model.rename(this.name.value);
      changed();
    });
    this.numbers = Object.entries(NUMBERS).map(([side, title]) => {
      const field = make("input", { type: "number", step: 1, title, "aria-label": title });
      field.dataset.side = side;
      on(field, "change", () => {
        this.#setSide(side, field.valueAsNumber);
        changed();
      });
      return field;
    });
    const title = "How this key frame becomes the next (E)";
    this.ease = make("select", { title, "aria-label": title });
    for (const [value, text] of Object.entries(EASES)) {
      this.ease.append(make("option", { value }, text));
    }
    on(this.ease, "change", () => {
      model.setEase(this.ease.value);
      changed();
    });
    this.element = make(
      "div",
      { class: "layerloom-box-fields" },
      this.name,
      ...this.numbers.map((field) =>
        make("label", {}, field.dataset.side.toUpperCase(), field),
      ),
      this.ease,
    );
  }

  refresh() {
    const { track, box, ease, picture } = this.#model;
    const show = (field, value) => {
      field.disabled = !track;
      // What is being typed is not taken away.
      if (field.matches(":focus") && field.value !== "") return;
      if (field.value !== value) field.value = value;
    };
    show(this.name, track?.id ?? "");
    for (const field of this.numbers) {
      const { side } = field.dataset;
      show(field, track ? String(Math.round(box[side] * lengthOf(side, picture))) : "");
    }
    this.ease.disabled = !track;
    this.ease.value = track ? ease : "linear";
  }

  #setSide(side, pixels) {
    const { box, picture } = this.#model;
    if (!box || !Number.isFinite(pixels)) return;
    this.#model.setBox({ ...box, [side]: pixels / lengthOf(side, picture) });
  }
}

function lengthOf(side, { width, height }) {
  return side === "x" || side === "w" ? width : height;
}
