// What the box editor does without a page: hands and keys become boxes, a choice and a frame.

import { boxAt } from "./box_path.mjs";
import { frameOf, hit, roomOf, snapped } from "./box_view.mjs";
import {
  addCopy,
  addTrack,
  between,
  dragged,
  EASES,
  follow,
  holdKey,
  keyAt,
  keyBefore,
  moveKey,
  nothing,
  removeKey,
  removeTrack,
  renamed,
  setEase,
  setKey,
} from "./boxes.mjs";
import { panned, toPicture, WHOLE, zoomed } from "./click_view.mjs";
import { History } from "./clicks.mjs";

// How near a corner counts as under the hand, in pixels of the stage; fingers are wider.
const REACH = { mouse: 8, pen: 10, touch: 22 };
const SNAP = 6;
// How far a pasted path lies from its original.
const BESIDE = 0.05;
const NO_LINES = Object.freeze({ x: [], y: [] });

/**
 * Boxes under the hand. Places `at` are pixels of the stage.
 *
 * onEdit(): something looks different, perhaps only until the hand is let go.
 * onCommit(): a step of the history was made, undone or redone.
 */
export class BoxModel {
  #history = new History(nothing(1));
  #live = null;
  #gesture = null;

  constructor({ onEdit, onCommit }) {
    this.onEdit = onEdit;
    this.onCommit = onCommit;
    this.frame = 0;
    this.chosen = -1;
    this.tool = "box";
    this.snap = true;
    this.lines = NO_LINES;
    this.view = WHOLE;
    this.stage = { width: 1, height: 1 };
    this.picture = { width: 1, height: 1 };
  }

  /** The paths, an edit under way included. */
  get paths() {
    return this.#live ?? this.#history.value;
  }

  get frames() {
    return this.paths.frames;
  }

  /** The chosen subject's track, or null. */
  get track() {
    return this.paths.tracks[this.chosen] ?? null;
  }

  /** The chosen subject's box at the frame that is shown, or null. */
  get box() {
    return this.track && boxAt(this.track, this.frame);
  }

  /** All subjects' boxes at the frame that is shown. */
  get boxes() {
    return this.paths.tracks.map((track) => boxAt(track, this.frame));
  }

  /** The ease of the stretch that the frame that is shown lies in; "" without a subject. */
  get ease() {
    return this.track ? keyBefore(this.track, this.frame).ease : "";
  }

  get onKey() {
    return Boolean(this.track && keyAt(this.track, this.frame));
  }

  get canUndo() {
    return this.#history.canUndo;
  }

  get canRedo() {
    return this.#history.canRedo;
  }

  /** What the hand is doing: "", "move", "draw", "path", "key" or "pan". */
  get doing() {
    return this.#gesture?.kind ?? "";
  }

  /** The box that is being drawn, or null. */
  get draft() {
    return this.doing === "draw" ? between(this.#gesture.spot, this.#gesture.to) : null;
  }

  /** The line that is being drawn, or none. */
  get line() {
    return this.doing === "path" ? this.#gesture.line : [];
  }

  get rect() {
    return frameOf(this.stage, this.picture, this.view);
  }

  /** Begin anew with paths that were not made here. */
  reset(paths) {
    this.#history = new History(paths);
    this.#live = this.#gesture = null;
    this.#choose(Math.min(Math.max(this.chosen, 0), paths.tracks.length - 1));
    this.seek(this.frame);
  }

  // --- the stage ------------------------------------------------------------------------------

  /** What lies at a place: "move", a corner, "path" or "". */
  over(at) {
    if (this.tool === "path" && this.track) return "path";
    return hit(this.boxes, this.chosen, this.rect, at, REACH.mouse)?.part ?? "";
  }

  /** The hand comes down. `button` as events count: 0 left, 1 middle. */
  press(at, { button = 0, ctrl = false, kind = "mouse" } = {}) {
    this.cancel();
    if (button === 1) {
      this.#gesture = { kind: "pan", at };
      return;
    }
    const spot = toPicture(this.rect, at);
    const target = ctrl
      ? null
      : hit(this.boxes, this.chosen, this.rect, at, REACH[kind] ?? REACH.mouse);
    if (this.tool === "path" && this.track && !ctrl) {
      this.#gesture = { kind: "path", line: [spot] };
    } else if (target) {
      this.#choose(target.index);
      this.#gesture = { kind: "move", part: target.part, spot, box: this.box, start: this.paths };
    } else this.#gesture = { kind: "draw", spot, to: spot };
  }

  /** The hand moves; with `free` nothing snaps. */
  drag(at, { free = false } = {}) {
    const gesture = this.#gesture;
    if (!gesture) return;
    const spot = toPicture(this.rect, at);
    if (gesture.kind === "draw") gesture.to = spot;
    else if (gesture.kind === "path") gesture.line.push(spot);
    else if (gesture.kind === "pan") {
      this.pan(at.x - gesture.at.x, at.y - gesture.at.y);
      gesture.at = at;
    } else if (gesture.kind === "move") {
      let by = { x: spot.x - gesture.spot.x, y: spot.y - gesture.spot.y };
      if (this.snap && !free) {
        const others = this.boxes.filter((_, index) => index !== this.chosen);
        const reach = { x: SNAP / this.rect.width, y: SNAP / this.rect.height };
        ({ by, lines: this.lines } = snapped(gesture.box, gesture.part, by, others, reach));
      }
      const box = dragged(gesture.box, gesture.part, by);
      this.#edit(setKey(gesture.start, this.chosen, this.frame, box));
      return;
    }
    this.onEdit();
  }

  release() {
    const { draft, line } = this;
    const gesture = this.#gesture;
    this.#gesture = null;
    this.lines = NO_LINES;
    if (gesture?.kind === "move" || gesture?.kind === "key") {
      if (this.#live) this.#commit(this.#live);
    } else if (gesture?.kind === "path") {
      this.#commit(follow(this.paths, this.chosen, this.frame, line));
      this.tool = "box";
    } else if (draft) this.#add(addTrack(this.paths, draft, this.frame));
    else if (gesture?.kind === "draw") this.#choose(-1);
  }

  /** As if the hand had done nothing since it came down. */
  cancel() {
    const edited = this.#live !== null;
    const { frame } = this.#gesture ?? {};
    this.#gesture = this.#live = null;
    this.lines = NO_LINES;
    if (frame !== undefined) this.frame = frame;
    this.#choose(this.chosen);
    if (edited) this.onEdit();
  }

  // --- the view -------------------------------------------------------------------------------

  pan(dx, dy) {
    this.view = panned(this.view, dx, dy, this.stage, roomOf(this.picture));
  }

  /** Closer by a factor, around a place of the stage or its middle. */
  zoom(factor, at = { x: this.stage.width / 2, y: this.stage.height / 2 }) {
    this.view = zoomed(this.view, factor, at, this.stage, roomOf(this.picture));
  }

  fit() {
    this.view = WHOLE;
  }

  // --- the timeline ---------------------------------------------------------------------------

  /** Show a frame; nothing is changed. */
  seek(frame) {
    this.frame = Math.min(this.frames - 1, Math.max(0, Math.round(frame)));
  }

  /** The hand takes a subject's key frame. */
  grasp(index, frame) {
    this.cancel();
    this.#choose(index);
    this.seek(frame);
    this.#gesture = { kind: "key", frame, start: this.paths };
  }

  /** The hand moves the key frame to a frame. */
  slide(frame) {
    if (this.doing !== "key") return;
    const { start, frame: from } = this.#gesture;
    this.seek(frame);
    this.#edit(moveKey(start, this.chosen, from, this.frame));
  }

  choose(index) {
    this.cancel();
    this.#choose(index);
  }

  /** The next subject, round and round. */
  chooseNext(step) {
    const count = this.paths.tracks.length;
    if (count) this.choose((Math.max(this.chosen, step < 0 ? 0 : -1) + step + count) % count);
  }

  /** To the chosen subject's next key frame, or the one before. */
  toKey(step) {
    const frames = this.track?.keys.map((key) => key.frame) ?? [];
    const found =
      step > 0
        ? frames.find((frame) => frame > this.frame)
        : frames.findLast((frame) => frame < this.frame);
    if (found !== undefined) this.seek(found);
  }

  // --- keys, buttons and fields ---------------------------------------------------------------

  addInMiddle() {
    this.#add(addTrack(this.paths, { x: 0.375, y: 0.375, w: 0.25, h: 0.25 }, this.frame));
  }

  /** A box in place of the one that is there, as a key frame. */
  setBox(box) {
    if (this.track) this.#commit(setKey(this.paths, this.chosen, this.frame, box));
  }

  /** Move the box by pixels of the picture, or its lower right corner. */
  nudge(x, y, part = "move") {
    if (!this.track) return;
    const by = { x: x / this.picture.width, y: y / this.picture.height };
    this.setBox(dragged(this.box, part, by));
  }

  addKey() {
    this.#commit(holdKey(this.paths, this.chosen, this.frame));
  }

  /** Without the key frame that is shown. */
  deleteKey() {
    this.#commit(removeKey(this.paths, this.chosen, this.frame));
  }

  deleteTrack() {
    if (this.track) this.#commit(removeTrack(this.paths, this.chosen));
  }

  setEase(ease) {
    this.#commit(setEase(this.paths, this.chosen, this.frame, ease));
  }

  nextEase() {
    const all = Object.keys(EASES);
    if (this.track) this.setEase(all[(all.indexOf(this.ease) + 1) % all.length]);
  }

  rename(name) {
    if (this.track) this.#commit(renamed(this.paths, this.chosen, name));
  }

  /** The chosen path, for `paste` here or in another editor; null without one. */
  copied() {
    return this.track && { ...this.track, frames: this.frames };
  }

  /** One more subject on a copied path. */
  paste(copy) {
    if (copy) this.#add(addCopy(this.paths, copy, BESIDE));
  }

  /** Further subjects with paths as they are. */
  take(paths) {
    let next = this.paths;
    for (const track of paths.tracks) next = addCopy(next, { ...track, frames: paths.frames });
    this.#add(next);
  }

  clear() {
    this.#commit(nothing(this.frames));
  }

  undo() {
    this.#restore(() => this.#history.undo());
  }

  redo() {
    this.#restore(() => this.#history.redo());
  }

  #add(paths) {
    const more = paths !== this.paths;
    this.#commit(paths, more ? paths.tracks.length - 1 : this.chosen);
  }

  #choose(index) {
    this.chosen = Math.min(index, this.paths.tracks.length - 1);
  }

  #edit(paths) {
    this.#live = paths;
    this.onEdit();
  }

  #commit(paths, chosen = this.chosen) {
    this.#live = null;
    if (paths === this.#history.value) return;
    this.#history.push(paths);
    this.#choose(chosen);
    this.onCommit();
  }

  #restore(step) {
    this.cancel();
    const before = this.#history.value;
    if (step() === before) return;
    this.#choose(this.chosen);
    this.onCommit();
  }
}
