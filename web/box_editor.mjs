// An editor for boxes that move over a picture; knows nothing of the page around it.

import { colorOf, draw } from "./box_drawing.mjs";
import { icon } from "./box_editor_look.mjs";
import { BoxFields } from "./box_fields.mjs";
import { BoxModel } from "./box_model.mjs";
import { buildParts, wordsOf } from "./box_parts.mjs";
import { Pictures } from "./box_pictures.mjs";
import { Player } from "./box_player.mjs";
import { drawTimeline, frameOf, heightOf, partAt } from "./box_timeline.mjs";
import { nothing, readBoxes, writeBoxes } from "./boxes.mjs";
import { ARROWS, placeIn } from "./elements.mjs";
import { Fingers } from "./fingers.mjs";

const FOREIGN = "The boxes are not in a form that this editor reads; Clear starts anew.";
const ZOOM_STEP = 1.25;

/**
 * Put `element` into the page, tell it the clip, the boxes and the picture, and `destroy` it in the
 * end.
 *
 * onChange(text): the boxes were changed by hand.
 * clipboard: {copy}, an object that several editors may share.
 */
export class BoxEditor {
  #text = "";
  #foreign = false;
  #given = null;
  #trail = true;
  #pointer = null;
  #fingers = new Fingers();
  #frame = 0;
  #listeners = new AbortController();

  constructor({ onChange, clipboard = { copy: null } }) {
    this.model = new BoxModel({
      onEdit: () => this.#schedule(),
      onCommit: () => this.#changed(writeBoxes(this.model.paths)),
    });
    this.onChange = onChange;
    this.clipboard = clipboard;
    this.pictures = new Pictures(() => this.#refresh());
    this.player = new Player((frame) => {
      this.model.seek(frame);
      this.#refresh();
    });
    this.#build();
    this.resize = new ResizeObserver(() => {
      const { clientWidth: width, clientHeight: height } = this.stage;
      if (!width || !height) return;
      this.model.stage = { width, height };
      this.#schedule();
    });
    this.resize.observe(this.stage);
    this.#refresh();
  }

  get #gone() {
    return this.#listeners.signal.aborted;
  }

  /** The clip's length and the picture's size in pixels. Paths keep their shape. */
  setClip({ frames, width, height }) {
    const { model } = this;
    if (width !== model.picture.width || height !== model.picture.height) model.fit();
    model.picture = { width, height };
    if (frames !== model.frames) {
      this.player.pause();
      const share = model.frames > 1 ? model.frame / (model.frames - 1) : 0;
      this.#read(frames);
      model.seek(share * (frames - 1));
    }
    this.#refresh();
  }

  /** Take over boxes that were not made here; ignored where they are what is shown already. */
  setText(text) {
    if (text === this.#text && !this.#foreign) return;
    this.#text = text;
    this.#read(this.model.frames);
    this.#refresh();
  }

  /** Paths from elsewhere that are added to those made here: shown, and there to be taken. */
  setGiven(text) {
    const given = text ? readBoxes(text, this.model.frames) : null;
    this.#given = given?.tracks.length ? given : null;
    this.#refresh();
  }

  /** Show the picture at an address; "" for none. Resolves to its size, or null. */
  showPicture(address) {
    return this.pictures.show(address);
  }

  /** Show a clip's frames after the first, see `Pictures`; null for none. */
  showClip(clip) {
    return this.pictures.showClip(clip);
  }

  /** Let go of everything; the editor cannot be used afterwards. */
  destroy() {
    this.player.pause();
    this.#listeners.abort();
    this.resize.disconnect();
    cancelAnimationFrame(this.#frame);
    this.pictures.destroy();
    this.#given = null;
    this.element.remove();
  }

  #read(frames) {
    const paths = readBoxes(this.#text, frames);
    this.#foreign = paths === null;
    this.model.reset(paths ?? nothing(frames));
  }

  // --- building -------------------------------------------------------------------------------

  #build() {
    const signal = this.#listeners.signal;
    const on = (element, type, handler) =>
      element.addEventListener(type, handler, { signal, passive: false });
    this.fields = new BoxFields(this.model, on, () => this.#refresh());
    Object.assign(this, buildParts(this.fields.element));
    for (const [name, button] of Object.entries(this.buttons)) {
      on(button, "click", () => {
        this.#act(name);
        this.#refresh();
      });
    }
    for (const [part, hands] of [
      [this.stage, this.#stageHands()],
      [this.timeline, this.#timelineHands()],
    ]) {
      on(part, "pointerdown", (event) => this.#down(event, part, hands));
      on(part, "pointermove", (event) => this.#move(event, part, hands));
      on(part, "pointerup", (event) => this.#up(event));
      on(part, "pointercancel", (event) => this.#up(event, true));
    }
    on(this.element, "wheel", (event) => this.#wheel(event));
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

  #stageHands() {
    const { model } = this;
    return {
      buttons: [0, 1],
      press: (at, event) => {
        const ctrl = event.ctrlKey || event.metaKey;
        model.press(at, { button: event.button, ctrl, kind: event.pointerType });
      },
      drag: (at, event) => model.drag(at, { free: event.altKey }),
      hover: (at) => {
        this.stage.dataset.over = model.over(at);
      },
    };
  }

  #timelineHands() {
    const { model } = this;
    const width = () => this.timeline.clientWidth;
    return {
      buttons: [0],
      press: (at, event) => {
        const { tracks } = model.paths;
        const part = partAt(tracks, model.frames, at, width(), event.pointerType);
        if (part.key) {
          model.grasp(part.row, part.frame);
          return;
        }
        if (part.row >= 0) model.choose(part.row);
        model.seek(part.frame);
      },
      drag: (at) => {
        const frame = frameOf(at.x, width(), model.frames);
        if (model.doing === "key") model.slide(frame);
        else model.seek(frame);
      },
      hover: () => {},
    };
  }

  #down(event, part, hands) {
    this.keys.focus({ preventScroll: true });
    event.preventDefault();
    const at = placeIn(part, event);
    part.setPointerCapture(event.pointerId);
    if (part === this.stage) this.#fingers.down(event.pointerId, at);
    // A second finger takes back what the first began; on the stage both move and zoom it.
    if (this.#pointer !== null) {
      this.model.cancel();
      this.#pointer = null;
    } else if (hands.buttons.includes(event.button) && !this.#fingers.pinching) {
      this.#pointer = event.pointerId;
      this.player.pause();
      hands.press(at, event);
    }
    this.#refresh();
  }

  #move(event, part, hands) {
    const at = placeIn(part, event);
    const pinch = part === this.stage ? this.#fingers.move(event.pointerId, at) : null;
    if (pinch) {
      this.model.pan(pinch.dx, pinch.dy);
      this.model.zoom(pinch.factor, pinch.middle);
      this.#refresh();
    } else if (event.pointerId === this.#pointer) {
      hands.drag(at, event);
      this.#refresh();
    } else if (this.#pointer === null && event.pointerType !== "touch") hands.hover(at);
  }

  #up(event, cancelled = false) {
    this.#fingers.up(event.pointerId);
    if (event.pointerId !== this.#pointer) return;
    this.#pointer = null;
    if (cancelled) this.model.cancel();
    else this.model.release();
    this.#refresh();
  }

  #wheel(event) {
    // Only in the editor one works in; elsewhere the wheel is the graph's.
    if (!this.element.contains(document.activeElement) || this.time.contains(event.target)) return;
    event.preventDefault();
    event.stopPropagation();
    if ((event.ctrlKey || event.metaKey) && this.stage.contains(event.target)) {
      const lines = event.deltaMode === 1 ? 16 : 1;
      this.model.zoom(ZOOM_STEP ** ((-event.deltaY * lines) / 100), placeIn(this.stage, event));
    } else this.model.seek(this.model.frame + Math.sign(event.deltaY));
    this.#refresh();
  }

  #key(event) {
    event.stopPropagation();
    if (this.fields.element.contains(event.target)) return;
    if (event.target.tagName === "BUTTON" && ["Enter", " "].includes(event.key)) return;
    if (!this.#keyDoes(event)) return;
    event.preventDefault();
    this.#refresh();
  }

  #keyDoes(event) {
    const { model } = this;
    const letter = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (letter === "z" && !event.shiftKey) model.undo();
      else if (letter === "y" || letter === "z") model.redo();
      else if (letter === "c") this.#act("copy");
      else if (letter === "v") this.#act("paste");
      else return false;
    } else if (event.key in ARROWS) {
      const [x, y] = ARROWS[event.key].map((way) => way * (event.shiftKey ? 10 : 1));
      model.nudge(x, y, event.altKey ? "11" : "move");
    } else if (event.altKey) return false;
    else if (event.key === "Enter") model.addInMiddle();
    else if (letter === "k") model.addKey();
    else if (letter === "e") model.nextEase();
    else if (letter === "s") model.snap = !model.snap;
    else if (event.key === "Delete" || event.key === "Backspace") {
      if (event.shiftKey) model.deleteTrack();
      else model.deleteKey();
    } else if (event.key === ",") model.seek(model.frame - 1);
    else if (event.key === ".") model.seek(model.frame + 1);
    else if (event.key === "[") model.toKey(-1);
    else if (event.key === "]") model.toKey(1);
    else if (event.key === "Home") model.seek(0);
    else if (event.key === "End") model.seek(model.frames - 1);
    else if (event.key === "PageDown") model.chooseNext(1);
    else if (event.key === "PageUp") model.chooseNext(-1);
    else if (event.key === " ") this.#act("play");
    else if (event.key === "+" || event.key === "=") model.zoom(ZOOM_STEP);
    else if (event.key === "-") model.zoom(1 / ZOOM_STEP);
    else if (event.key === "0") model.fit();
    else if (event.key === "Escape") model.cancel();
    else return false;
    return true;
  }

  #act(name) {
    const { model } = this;
    if (name === "box" || name === "path") model.tool = name;
    else if (name === "snap") model.snap = !model.snap;
    else if (name === "trail") this.#trail = !this.#trail;
    else if (name === "fit") model.fit();
    else if (name === "undo") model.undo();
    else if (name === "redo") model.redo();
    else if (name === "copy") this.clipboard.copy = model.copied() ?? this.clipboard.copy;
    else if (name === "paste") model.paste(this.clipboard.copy);
    else if (name === "take") model.take(this.#given);
    else if (name === "remove") model.deleteTrack();
    else if (name === "clear") this.#clear();
    else if (name === "before") model.toKey(-1);
    else if (name === "after") model.toKey(1);
    else if (name === "key") model.addKey();
    else if (name === "unkey") model.deleteKey();
    else if (this.player.playing) this.player.pause();
    else this.player.play(model.frame, model.frames);
  }

  // --- showing --------------------------------------------------------------------------------

  #clear() {
    if (this.model.paths.tracks.length) this.model.clear();
    else this.#changed("");
  }

  /** The boxes were changed by hand. */
  #changed(text) {
    this.#foreign = false;
    this.#text = text;
    this.onChange(text);
  }

  #refresh() {
    const { model, buttons } = this;
    const { tracks } = model.paths;
    const pressed = {
      box: model.tool === "box",
      path: model.tool === "path",
      snap: model.snap,
      trail: this.#trail,
      play: this.player.playing,
    };
    for (const [name, on] of Object.entries(pressed)) {
      buttons[name].setAttribute("aria-pressed", String(on));
    }
    const usable = {
      path: model.track !== null && model.frame < model.frames - 1,
      fit: model.view.zoom > 1,
      undo: model.canUndo,
      redo: model.canRedo,
      copy: model.track !== null,
      paste: this.clipboard.copy !== null,
      take: this.#given !== null,
      remove: model.track !== null,
      clear: tracks.length > 0 || this.#foreign,
      before: model.track?.keys.some((key) => key.frame < model.frame),
      after: model.track?.keys.some((key) => key.frame > model.frame),
      key: model.track !== null && !model.onKey,
      unkey: model.onKey,
      play: model.frames > 1,
    };
    for (const [name, on] of Object.entries(usable)) buttons[name].disabled = !on;
    buttons.take.hidden = this.#given === null;
    if (model.doing === "pan") this.stage.dataset.over = "pan";
    const { playing } = this.player;
    if (buttons.play.dataset.shown !== String(playing)) {
      buttons.play.dataset.shown = String(playing);
      buttons.play.replaceChildren(icon(playing ? "pause" : "play"));
    }
    this.count.textContent = `${model.frame} / ${model.frames - 1}`;
    this.hint.hidden = tracks.length > 0 || this.#foreign;
    this.fields.refresh();
    const problem = this.#foreign ? FOREIGN : this.pictures.problem;
    this.status.textContent = problem || wordsOf(model, this.#given);
    this.status.dataset.bad = String(problem !== "");
    const keys = tracks.reduce((sum, track) => sum + track.keys.length, 0);
    const title = `${tracks.length} subjects with ${keys} key frames`;
    this.canvas.setAttribute("aria-label", `Picture with ${title}, frame ${model.frame}`);
    this.timeline.setAttribute("aria-label", `Timeline of ${title}`);
    this.#schedule();
  }

  #schedule() {
    if (this.#frame || this.#gone) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const { model } = this;
    const { stage, rect, paths, frame, chosen, boxes, draft, line, lines, frames } = model;
    const picture = this.pictures.at(frame);
    const [given, trail] = [this.#given, this.#trail];
    const shown = { picture, paths, given, frame, chosen, boxes, draft, line, lines, trail };
    draw(this.canvas, { stage, rect, ...shown });
    const { tracks } = paths;
    this.timeline.style.height = `${heightOf(tracks.length)}px`;
    const width = this.timeline.clientWidth;
    if (!width) return;
    const text = getComputedStyle(this.time).color;
    drawTimeline(this.timeline, { width, tracks, frames, frame, chosen, colors: colorOf, text });
  }
}
