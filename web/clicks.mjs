// What was clicked in a picture: the JSON contract with Python, the edits, and their history.

/** Clicks on a picture, all places as shares of its width and height. */
export const NOTHING = Object.freeze({ points: [], boxes: [] });
export const POSITIVE = 1;
export const NEGATIVE = 0;
const VERSION = 1;
/** Of each kind; Python refuses more. */
export const MOST = 256;
// A box thinner than this share of the picture is a slip of the hand.
const THINNEST = 0.004;

/**
 * Clicks from a widget's text: {"version": 1, "points": [{x, y, label}], "boxes": [[x0, y0, x1,
 * y1]]}, or [{"x", "y"}, ...] in pixels of a picture of the given size.
 *
 * Null where it is neither, or in pixels of a picture whose size is not known yet.
 */
export function readClicks(text, size = null) {
  if (!text?.trim()) return NOTHING;
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    return null;
  }
  if (Array.isArray(data)) {
    if (!size) return null;
    // Whole numbers are the middles of pixels; a point on the far border stays inside.
    const share = (value, side) => (value <= side ? Math.min((value + 0.5) / side, 1) : NaN);
    data = {
      points: data.map((p) => ({ ...p, x: share(p?.x, size.width), y: share(p?.y, size.height) })),
    };
  }
  if (data === null || typeof data !== "object") return null;
  const { points = [], boxes = [] } = data;
  if (!Array.isArray(points) || !Array.isArray(boxes)) return null;
  const read = {
    points: points.map((p) => ({ x: p?.x, y: p?.y, label: p?.label ?? POSITIVE })),
    boxes: boxes.map((box) => (Array.isArray(box) ? [...box] : [])),
  };
  const good =
    Math.max(points.length, boxes.length) <= MOST &&
    read.points.every((p) => inside(p.x) && inside(p.y) && [0, 1].includes(p.label)) &&
    read.boxes.every((box) => box.length === 4 && box.every(inside));
  return good ? read : null;
}

/** The text for the widget; empty where nothing is clicked. */
export function writeClicks({ points, boxes }) {
  if (!points.length && !boxes.length) return "";
  return JSON.stringify({
    version: VERSION,
    points: points.map(({ x, y, label }) => ({ x: rounded(x), y: rounded(y), label })),
    boxes: boxes.map((box) => box.map(rounded)),
  });
}

/** Whether a mask can be made of them: a negative point alone selects nothing. */
export function selects({ points, boxes }) {
  return boxes.length > 0 || points.some((point) => point.label === POSITIVE);
}

export function addPoint(clicks, { x, y }, label) {
  if (clicks.points.length >= MOST) return clicks;
  return { ...clicks, points: [...clicks.points, { x: clamp(x), y: clamp(y), label }] };
}

/** A target is {kind: "point" | "box", index}, in a box with the `part` that was grasped. */
export function moved(clicks, target, from, to) {
  if (target.kind === "point") {
    return changed(clicks, "points", target.index, (point) => ({
      ...point,
      x: clamp(point.x + to.x - from.x),
      y: clamp(point.y + to.y - from.y),
    }));
  }
  return changed(clicks, "boxes", target.index, (box) => movedBox(box, target.part, from, to));
}

/** Positive becomes negative and the other way round. */
export function flipped(clicks, index) {
  return changed(clicks, "points", index, (point) => ({
    ...point,
    label: point.label === POSITIVE ? NEGATIVE : POSITIVE,
  }));
}

/** A box between two corners in any order; as it was where they are too close. */
export function addBox(clicks, a, b) {
  const box = sorted([a.x, a.y, b.x, b.y].map(clamp));
  const slip = box[2] - box[0] < THINNEST || box[3] - box[1] < THINNEST;
  if (slip || clicks.boxes.length >= MOST) return clicks;
  return { ...clicks, boxes: [...clicks.boxes, box] };
}

export function removed(clicks, { kind, index }) {
  const list = kind === "point" ? "points" : "boxes";
  return { ...clicks, [list]: clicks[list].filter((_, other) => other !== index) };
}

/** Whether a target is still there. */
export function has(clicks, target) {
  if (!target) return false;
  return target.index < clicks[target.kind === "point" ? "points" : "boxes"].length;
}

/** States that can be gone through backwards and forwards. */
export class History {
  #past = [];
  #future = [];

  constructor(value) {
    this.value = value;
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  /** A new state; the same one again is no step. */
  push(value) {
    if (value === this.value) return;
    this.#past.push(this.value);
    this.#future = [];
    this.value = value;
  }

  undo() {
    if (this.canUndo) {
      this.#future.push(this.value);
      this.value = this.#past.pop();
    }
    return this.value;
  }

  redo() {
    if (this.canRedo) {
      this.#past.push(this.value);
      this.value = this.#future.pop();
    }
    return this.value;
  }
}

/**
 * Runs one job at a time, and after it only the last one asked for meanwhile.
 *
 * `work(wish, signal)` gives a promise; `show(result, wish)` gets its result, `fail(error)` its
 * error, unless `stop` was called by then.
 */
export class Latest {
  #work;
  #show;
  #fail;
  #running = null;
  #next = null;

  constructor(work, show, fail) {
    this.#work = work;
    this.#show = show;
    this.#fail = fail;
  }

  get busy() {
    return this.#running !== null;
  }

  ask(wish) {
    this.#next = { wish };
    if (!this.busy) this.#run();
  }

  /** Forget what is running and what waits. */
  stop() {
    this.#next = null;
    this.#running?.abort();
    this.#running = null;
  }

  async #run() {
    const turn = (this.#running = new AbortController());
    const { wish } = this.#next;
    this.#next = null;
    let finish;
    try {
      const result = await this.#work(wish, turn.signal);
      finish = () => this.#show(result, wish);
    } catch (error) {
      finish = () => this.#fail(error);
    }
    if (turn !== this.#running) return;
    this.#running = null;
    // Also where more is waiting: the mask follows a point that is being dragged.
    finish();
    if (this.#next && !this.busy) this.#run();
  }
}

function changed(clicks, list, index, change) {
  const old = clicks[list][index];
  if (old === undefined) return clicks;
  return { ...clicks, [list]: clicks[list].map((one, at) => (at === index ? change(one) : one)) };
}

function movedBox(box, part, from, to) {
  if (part === "edge") {
    const by = (low, high, wish) => Math.min(Math.max(wish, -low), 1 - high);
    const x = by(box[0], box[2], to.x - from.x);
    const y = by(box[1], box[3], to.y - from.y);
    return [box[0] + x, box[1] + y, box[2] + x, box[3] + y];
  }
  // A corner: "00" is the upper left one, "10" the upper right one.
  const next = [...box];
  const across = part[0] === "1" ? 2 : 0;
  const down = part[1] === "1" ? 3 : 1;
  next[across] = clamp(to.x);
  next[down] = clamp(to.y);
  const [left, top] = [next[2 - across], next[4 - down]];
  // The opposite corner stays; the box does not turn inside out under the hand.
  const apart = (value, fixed, below) =>
    below ? Math.min(value, fixed - THINNEST) : Math.max(value, fixed + THINNEST);
  next[across] = apart(next[across], left, across === 0);
  next[down] = apart(next[down], top, down === 1);
  return next;
}

function sorted([x0, y0, x1, y1]) {
  return [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
}

function inside(value) {
  return Number.isFinite(value) && value >= 0 && value <= 1;
}

function clamp(value) {
  return Math.min(1, Math.max(0, value));
}

function rounded(value) {
  return Math.round(value * 1e5) / 1e5;
}
