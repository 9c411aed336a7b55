// An editor for clicks on a picture, with the mask they make; knows nothing of the page around it.

import { draw, tinted } from "./click_drawing.mjs";
import { CSS, icon } from "./click_editor_look.mjs";
import { ClickModel } from "./click_model.mjs";
import { Latest, NEGATIVE, NOTHING, readClicks, selects, writeClicks } from "./clicks.mjs";
import { ARROWS, fetchPicture, make, placeIn } from "./elements.mjs";
import { Fingers } from "./fingers.mjs";

const HINT = "Connect a picture: Load Image shows here at once, others after a run.";
const GONE = "The picture is no longer there; run the workflow again.";
const FOREIGN = "The clicks are not in a form that this editor reads; Clear starts anew.";
const TOOLS = {
  positive: "Click what is wanted",
  negative: "Click what is not wanted (also right or Alt + click)",
  box: "Draw a box (also Ctrl + drag)",
};
const ACTIONS = {
  undo: "Undo (Ctrl + Z)",
  redo: "Redo (Ctrl + Y)",
  delete: "Delete the selected point or box (Delete)",
  clear: "Clear all",
  fit: "Show the whole picture (0)",
};
const LONG_PRESS = 500;
const ZOOM_STEP = 1.25;

/**
 * Put `element` into the page, tell it the clicks and the picture, and `destroy` it in the end.
 *
 * onChange(text): the clicks were changed by hand.
 * segment(clicks, signal): promise of {mask: address of an image whose transparency is the mask,
 * share: of the picture, score}, or of {problem} where no mask can be made yet.
 */
export class ClickEditor {
  #text = "";
  #foreign = false;
  #picture = null;
  #address = "";
  #mask = null;
  #fingers = new Fingers();
  #timer = 0;
  #frame = 0;
  #listeners = new AbortController();

  constructor({ onChange, segment }) {
    this.model = new ClickModel({
      onEdit: () => this.refreshMask(),
      onCommit: () => this.#changed(writeClicks(this.model.clicks)),
    });
    this.onChange = onChange;
    this.feed = new Latest(
      async (clicks, signal) => {
        const answer = await segment(clicks, signal);
        return answer.mask ? { ...answer, mask: tinted(await fetchPicture(answer.mask)) } : answer;
      },
      (answer) => this.#showMask(answer),
      (error) => this.#showMask({ problem: error.message, bad: true }),
    );
    this.#build();
    this.resize = new ResizeObserver(() => {
      const { clientWidth: width, clientHeight: height } = this.stage;
      if (!width || !height) return;
      this.model.stage = { width, height };
      this.#schedule();
    });
    this.resize.observe(this.stage);
    this.#say(HINT);
    this.#refresh();
  }

  get #gone() {
    return this.#listeners.signal.aborted;
  }

  /** Take over clicks that were not made here; ignored where they are what is shown already. */
  setText(text) {
    if (text === this.#text && !this.#foreign) return;
    this.#text = text;
    const clicks = readClicks(text, this.model.picture);
    this.#foreign = clicks === null;
    this.model.reset(clicks ?? NOTHING);
    this.refreshMask();
    this.#refresh();
  }

  /** Show the picture at an address; "" for none. */
  async showPicture(address) {
    if (address === this.#address || this.#gone) return;
    this.#address = address;
    let picture = null;
    let hint = HINT;
    try {
      if (address) picture = await fetchPicture(address);
    } catch {
      hint = GONE;
    }
    if (address !== this.#address || this.#gone) return;
    const before = this.model.picture;
    const now = picture && { width: picture.naturalWidth, height: picture.naturalHeight };
    if (before?.width !== now?.width || before?.height !== now?.height) this.model.fit();
    this.#picture = picture;
    this.#mask = null;
    this.model.picture = now;
    this.#say(picture ? "" : hint);
    // Points in pixels had to wait for the picture's size.
    if (this.#foreign) this.setText(this.#text);
    else this.refreshMask();
    this.#refresh();
  }

  /** Ask for the mask anew: the clicks, the segmenter or its settings are others. */
  refreshMask() {
    const { clicks } = this.model;
    if (this.#picture && selects(clicks)) {
      if (!this.#mask) this.#status("Looking at the picture ...");
      this.feed.ask(clicks);
      return;
    }
    this.feed.stop();
    this.#mask = null;
    this.#status(this.#idleStatus());
    this.#schedule();
  }

  /** Let go of everything; the editor cannot be used afterwards. */
  destroy() {
    this.#listeners.abort();
    this.feed.stop();
    this.resize.disconnect();
    cancelAnimationFrame(this.#frame);
    clearTimeout(this.#timer);
    this.#picture = this.#mask = null;
    this.element.remove();
  }

  // --- building -------------------------------------------------------------------------------

  #build() {
    const signal = this.#listeners.signal;
    const on = (element, type, handler) =>
      element.addEventListener(type, handler, { signal, passive: false });
    const button = (name, title, handler) => {
      const made = make("button", { type: "button", title, "aria-label": title }, icon(name));
      made.dataset.name = name;
      on(made, "click", handler);
      return made;
    };
    this.canvas = make("canvas", { role: "img" });
    this.hint = make("div", { class: "layerloom-click-hint", role: "status" });
    // An input field, so that no key pressed here means anything to the graph around.
    this.keys = make("input", {
      class: "layerloom-click-keys",
      readonly: "",
      inputmode: "none",
      "aria-label":
        "Clicks on the picture. Enter adds a point, arrows move it, X makes it negative, Page Up " +
        "and Page Down select, Delete removes.",
    });
    this.stage = make(
      "div",
      { class: "layerloom-click-stage" },
      this.keys,
      this.canvas,
      this.hint,
    );
    this.tools = Object.entries(TOOLS).map(([name, title]) =>
      button(name, title, () => {
        this.model.tool = name;
        this.#refresh();
      }),
    );
    const act = {
      undo: () => this.model.undo(),
      redo: () => this.model.redo(),
      delete: () => this.model.deleteSelected(),
      clear: () => this.#clear(),
      fit: () => this.model.fit(),
    };
    this.actions = Object.entries(ACTIONS).map(([name, title]) =>
      button(name, title, () => {
        act[name]();
        this.#refresh();
      }),
    );
    this.status = make("div", { class: "layerloom-click-status", role: "status" });
    this.element = make(
      "div",
      { class: "layerloom-clicks", role: "group", "aria-label": "Click editor" },
      make("style", {}, CSS),
      this.stage,
      make(
        "div",
        { class: "layerloom-click-bar" },
        make(
          "div",
          { class: "layerloom-click-tools", role: "group", "aria-label": "What a click adds" },
          ...this.tools,
        ),
        make("span", { class: "layerloom-click-space" }),
        ...this.actions,
      ),
      this.status,
    );
    on(this.stage, "pointerdown", (event) => this.#down(event));
    on(this.stage, "pointermove", (event) => this.#move(event));
    on(this.stage, "pointerup", (event) => this.#up(event));
    on(this.stage, "pointercancel", (event) => this.#up(event, true));
    on(this.stage, "wheel", (event) => this.#wheel(event));
    on(this.element, "keydown", (event) => this.#key(event));
    // The graph below must not be dragged, nor show its menu, by what happens in here.
    for (const type of ["pointerdown", "contextmenu", "dblclick"]) {
      on(this.element, type, (event) => {
        event.stopPropagation();
        if (type === "contextmenu") event.preventDefault();
      });
    }
  }

  // --- hands ----------------------------------------------------------------------------------

  #down(event) {
    this.keys.focus({ preventScroll: true });
    event.preventDefault();
    if (!this.#picture) return;
    const at = this.#at(event);
    this.#fingers.down(event.pointerId, at);
    this.stage.setPointerCapture(event.pointerId);
    clearTimeout(this.#timer);
    if (this.#fingers.pinching) this.model.cancel();
    else {
      this.model.press(at, {
        button: event.button,
        alt: event.altKey,
        ctrl: event.ctrlKey || event.metaKey,
        kind: event.pointerType,
      });
      const hold = () => {
        this.model.hold();
        this.#refresh();
      };
      if (this.model.doing === "tap") this.#timer = setTimeout(hold, LONG_PRESS);
    }
    this.#refresh();
  }

  #move(event) {
    if (!this.#picture) return;
    const at = this.#at(event);
    const pinch = this.#fingers.move(event.pointerId, at);
    if (pinch) {
      this.model.pan(pinch.dx, pinch.dy);
      this.model.zoom(pinch.factor, pinch.middle);
    } else if (this.model.doing) {
      this.model.drag(at);
    } else {
      if (event.pointerType !== "touch") this.stage.dataset.over = this.model.over(at);
      return;
    }
    this.#refresh();
  }

  #up(event, cancelled = false) {
    const { pinching } = this.#fingers;
    if (!this.#fingers.up(event.pointerId)) return;
    clearTimeout(this.#timer);
    if (pinching || cancelled) this.model.cancel();
    else this.model.release();
    this.#refresh();
  }

  #wheel(event) {
    // Only in the editor one works in; elsewhere the wheel is the graph's.
    if (!this.#picture || !this.element.contains(document.activeElement)) return;
    event.preventDefault();
    event.stopPropagation();
    const lines = event.deltaMode === 1 ? 16 : 1;
    this.model.zoom(ZOOM_STEP ** ((-event.deltaY * lines) / 100), this.#at(event));
    this.#refresh();
  }

  #key(event) {
    event.stopPropagation();
    if (this.#picture && !event.altKey && this.#keyDoes(event)) {
      event.preventDefault();
      this.#refresh();
    }
  }

  #keyDoes(event) {
    const { model } = this;
    const letter = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (letter === "z" && !event.shiftKey) model.undo();
      else if (letter === "y" || letter === "z") model.redo();
      else return false;
    } else if (event.key in ARROWS) {
      const [x, y] = ARROWS[event.key].map((way) => way * (event.shiftKey ? 10 : 1));
      model.nudge(x, y);
    } else if (event.key === "Enter" && event.target === this.keys) model.addInMiddle();
    else if (letter === "x") model.flipSelected();
    else if (event.key === "Delete" || event.key === "Backspace") model.deleteSelected();
    else if (event.key === "PageDown") model.selectNext(1);
    else if (event.key === "PageUp") model.selectNext(-1);
    else if (event.key === "+" || event.key === "=") model.zoom(ZOOM_STEP);
    else if (event.key === "-") model.zoom(1 / ZOOM_STEP);
    else if (event.key === "0") model.fit();
    else if (event.key === "Escape") {
      model.cancel();
      model.selected = null;
    } else return false;
    return true;
  }

  #at(event) {
    return placeIn(this.stage, event);
  }

  // --- showing --------------------------------------------------------------------------------

  #clear() {
    if (this.model.clicks !== NOTHING) this.model.clear();
    else this.#changed("");
  }

  /** The clicks were changed by hand. */
  #changed(text) {
    this.#foreign = false;
    this.#text = text;
    this.refreshMask();
    this.onChange(text);
  }

  #showMask({ mask = null, share, score, problem = "", bad = false }) {
    if (this.#gone) return;
    this.#mask = mask;
    const made = () => `${(share * 100).toFixed(1)} % of the picture, score ${score.toFixed(2)}`;
    this.#status(problem || made(), bad);
    this.#schedule();
  }

  #idleStatus() {
    if (this.#foreign) return FOREIGN;
    if (!this.#picture) return "";
    return this.model.clicks.points.length
      ? "Click what is wanted; there are only negative points."
      : "Click what is wanted.";
  }

  #say(text) {
    this.hint.textContent = text;
    this.hint.hidden = !text;
  }

  #status(text, bad = false) {
    this.status.textContent = text;
    this.status.dataset.bad = String(bad);
  }

  #refresh() {
    const { model } = this;
    const { points, boxes } = model.clicks;
    for (const button of this.tools) {
      button.setAttribute("aria-pressed", String(button.dataset.name === model.tool));
    }
    const usable = {
      undo: model.canUndo,
      redo: model.canRedo,
      delete: model.hasSelected,
      clear: points.length + boxes.length > 0 || this.#foreign,
      fit: model.view.zoom > 1,
    };
    for (const button of this.actions) button.disabled = !usable[button.dataset.name];
    if (model.doing === "pan") this.stage.dataset.over = "pan";
    const negative = points.filter((point) => point.label === NEGATIVE).length;
    this.canvas.setAttribute(
      "aria-label",
      `Picture with ${points.length - negative} positive and ${negative} negative points and ` +
        `${boxes.length} boxes`,
    );
    this.#schedule();
  }

  #schedule() {
    if (this.#frame || this.#gone) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      const { stage, view, clicks, selected, draft } = this.model;
      draw(this.canvas, {
        stage,
        picture: this.#picture,
        mask: this.#mask,
        view,
        clicks,
        selected,
        draft,
      });
    });
  }
}
