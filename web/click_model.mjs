// What the click editor does without a page: hands and keys become clicks, a selection and a view.

import { RADIUS } from "./click_drawing.mjs";
import { contains, hit, panned, rectangle, toPicture, WHOLE, zoomed } from "./click_view.mjs";
import {
  addBox,
  addPoint,
  flipped,
  has,
  History,
  moved,
  NEGATIVE,
  NOTHING,
  POSITIVE,
  removed,
} from "./clicks.mjs";

// How near a point counts as on it, in pixels of the stage; fingers are wider.
const REACH = { mouse: RADIUS + 3, pen: RADIUS + 6, touch: 20 };
const TAP_SLIP = 10;

/**
 * Clicks under the hand. Places `at` are pixels of the stage.
 *
 * onEdit(): the clicks look different, perhaps only until the hand is let go.
 * onCommit(): a step of the history was made, undone or redone.
 */
export class ClickModel {
  #history = new History(NOTHING);
  #live = null;
  #gesture = null;

  constructor({ onEdit, onCommit }) {
    this.onEdit = onEdit;
    this.onCommit = onCommit;
    this.selected = null;
    this.tool = "positive";
    this.view = WHOLE;
    this.stage = { width: 1, height: 1 };
    this.picture = null;
  }

  /** What is clicked, an edit under way included. */
  get clicks() {
    return this.#live ?? this.#history.value;
  }

  get canUndo() {
    return this.#history.canUndo;
  }

  get canRedo() {
    return this.#history.canRedo;
  }

  get hasSelected() {
    return has(this.clicks, this.selected);
  }

  /** What the hand is doing: "", "move", "draw", "pan" or "tap". */
  get doing() {
    return this.#gesture?.kind ?? "";
  }

  /** Corners of the box that is being drawn, or null. */
  get draft() {
    return this.doing === "draw" ? [this.#gesture.spot, this.#gesture.to] : null;
  }

  get rect() {
    return rectangle(this.view, this.stage, this.picture);
  }

  /** Begin anew with clicks that were not made here. */
  reset(clicks) {
    this.#history = new History(clicks);
    this.#live = this.#gesture = this.selected = null;
  }

  // --- hands ----------------------------------------------------------------------------------

  /** What lies at a place: "point", a part of a box ("edge", "00", ...), "outside" or "". */
  over(at) {
    const target = hit(this.clicks, this.rect, at, REACH.mouse);
    if (target) return target.part ?? "point";
    return contains(toPicture(this.rect, at)) ? "" : "outside";
  }

  /** The hand comes down. `button` as events count: 0 left, 1 middle, 2 right. */
  press(at, { button = 0, alt = false, ctrl = false, kind = "mouse" } = {}) {
    this.cancel();
    const spot = toPicture(this.rect, at);
    const before = this.clicks;
    const target = ctrl ? null : hit(before, this.rect, at, REACH[kind] ?? REACH.mouse);
    this.selected = target;
    if (button === 1) this.#gesture = { kind: "pan", at };
    else if (button === 2 && target) {
      if (target.kind === "point") this.#commit(flipped(before, target.index));
    } else if (target) this.#gesture = { kind: "move", target, spot, start: before };
    else if (!contains(spot)) return;
    else if (ctrl || (this.tool === "box" && button === 0 && !alt)) {
      this.#gesture = { kind: "draw", spot, to: spot };
    } else {
      const unwanted = button === 2 || alt || this.tool === "negative";
      const label = unwanted ? NEGATIVE : POSITIVE;
      if (kind === "touch") this.#gesture = { kind: "tap", at, spot, label };
      else this.#place(spot, label);
    }
  }

  drag(at) {
    const gesture = this.#gesture;
    if (!gesture) return;
    const spot = toPicture(this.rect, at);
    if (gesture.kind === "move") {
      this.#edit(moved(gesture.start, gesture.target, gesture.spot, spot));
    } else if (gesture.kind === "draw") gesture.to = spot;
    else if (gesture.kind === "pan") {
      this.pan(at.x - gesture.at.x, at.y - gesture.at.y);
      gesture.at = at;
    } else if (Math.hypot(at.x - gesture.at.x, at.y - gesture.at.y) >= TAP_SLIP) {
      // A finger that slides moves the picture.
      this.#gesture = { kind: "pan", at: gesture.at };
      this.drag(at);
    }
  }

  /** A finger that stays down long enough leaves a negative point. */
  hold() {
    if (this.doing === "tap") this.#place(this.#gesture.spot, NEGATIVE);
  }

  release() {
    const gesture = this.#gesture;
    this.#gesture = null;
    if (gesture?.kind === "move") this.#commit(this.clicks);
    else if (gesture?.kind === "tap") this.add(gesture.spot, gesture.label);
    else if (gesture?.kind === "draw") {
      const clicks = addBox(this.clicks, gesture.spot, gesture.to);
      if (clicks === this.clicks) return;
      this.selected = { kind: "box", index: clicks.boxes.length - 1, part: "edge" };
      this.#commit(clicks);
    }
  }

  /** As if the hand had done nothing since it came down. */
  cancel() {
    const edited = this.#live !== null;
    this.#gesture = this.#live = null;
    if (!this.hasSelected) this.selected = null;
    if (edited) this.onEdit();
  }

  // --- keys and buttons -----------------------------------------------------------------------

  add(spot, label) {
    const clicks = addPoint(this.clicks, spot, label);
    if (clicks !== this.clicks) this.selected = { kind: "point", index: clicks.points.length - 1 };
    this.#commit(clicks);
  }

  addInMiddle() {
    this.add(this.view, this.tool === "negative" ? NEGATIVE : POSITIVE);
  }

  /** Move what is selected by pixels of the picture. */
  nudge(x, y) {
    if (!this.hasSelected) return;
    const to = { x: x / this.picture.width, y: y / this.picture.height };
    const target = { ...this.selected, part: "edge" };
    this.#commit(moved(this.clicks, target, { x: 0, y: 0 }, to));
  }

  flipSelected() {
    if (this.selected?.kind === "point") {
      this.#commit(flipped(this.clicks, this.selected.index));
    }
  }

  deleteSelected() {
    if (!this.hasSelected) return;
    const clicks = removed(this.clicks, this.selected);
    this.selected = null;
    this.#commit(clicks);
  }

  /** Go through points, then boxes. */
  selectNext(step) {
    const { points, boxes } = this.clicks;
    const all = [
      ...points.map((_, index) => ({ kind: "point", index })),
      ...boxes.map((_, index) => ({ kind: "box", index, part: "edge" })),
    ];
    if (!all.length) return;
    const same = ({ kind, index }) =>
      kind === this.selected?.kind && index === this.selected.index;
    const now = all.findIndex(same);
    const next = now < 0 && step < 0 ? -1 : now + step;
    this.selected = all[(next + all.length) % all.length];
  }

  clear() {
    this.selected = null;
    this.#commit(NOTHING);
  }

  undo() {
    this.#restore(() => this.#history.undo());
  }

  redo() {
    this.#restore(() => this.#history.redo());
  }

  // --- view -----------------------------------------------------------------------------------

  pan(dx, dy) {
    this.view = panned(this.view, dx, dy, this.stage, this.picture);
  }

  /** Closer by a factor, around a place of the stage or its middle. */
  zoom(factor, at = { x: this.stage.width / 2, y: this.stage.height / 2 }) {
    this.view = zoomed(this.view, factor, at, this.stage, this.picture);
  }

  fit() {
    this.view = WHOLE;
  }

  /** A new point, which follows the hand until it is let go. */
  #place(spot, label) {
    const start = addPoint(this.clicks, spot, label);
    if (start === this.clicks) return;
    this.selected = { kind: "point", index: start.points.length - 1 };
    this.#gesture = { kind: "move", target: this.selected, spot, start };
    this.#edit(start);
  }

  #edit(clicks) {
    this.#live = clicks;
    this.onEdit();
  }

  #commit(clicks) {
    this.#live = null;
    if (clicks === this.#history.value) return;
    this.#history.push(clicks);
    this.onCommit();
  }

  #restore(step) {
    this.cancel();
    const before = this.#history.value;
    if (step() === before) return;
    if (!this.hasSelected) this.selected = null;
    this.onCommit();
  }
}
