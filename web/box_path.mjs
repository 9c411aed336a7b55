// From key frames to a box a frame and to pixels: what engine/conditioning/box_paths.py computes.
//
// The same operations on the same 64-bit numbers in the same order; Python's are the truth.

const SIDES = ["x", "y", "w", "h"];

/** The box {x, y, w, h} of a track at a frame, in shares of the picture. */
export function boxAt({ keys }, frame) {
  const last = keys.length - 1;
  if (frame <= keys[0].frame) return boxOf(keys[0]);
  if (frame >= keys[last].frame) return boxOf(keys[last]);
  const at = keys.findLastIndex((key) => key.frame <= frame);
  const [before, after] = [keys[at], keys[at + 1]];
  const length = after.frame - before.frame;
  const share = (frame - before.frame) / length;
  const smooth = before.ease === "smooth";
  const eased = easedShare(before.ease, share);
  return forSides((side) => {
    const [a, b] = [before[side], after[side]];
    if (!smooth) return a + (b - a) * eased;
    const [out, into] = [slope(keys, at, side) * length, slope(keys, at + 1, side) * length];
    return hermite(a, b, out, into, share);
  });
}

/** The box in pixels, {x0, y0, x1, y1} with x1 and y1 excluded, clamped to the picture. */
export function pixelBox({ x, y, w, h }, { width, height }) {
  const [x0, x1] = borders(x, x + w, width);
  const [y0, y1] = borders(y, y + h, height);
  return { x0, y0, x1, y1 };
}

/** Key frames without those that straight lines between others put back, within a tolerance. */
export function thinned(keys, tolerance = 0.002) {
  const kept = new Set([0, keys.length - 1]);
  const open = [[0, keys.length - 1]];
  while (open.length) {
    const [first, last] = open.pop();
    const ends = { keys: [keys[first], keys[last]] };
    let [worst, at] = [tolerance, -1];
    for (let index = first + 1; index < last; index++) {
      const straight = boxAt(ends, keys[index].frame);
      const apart = Math.max(...SIDES.map((side) => Math.abs(straight[side] - keys[index][side])));
      if (apart > worst) [worst, at] = [apart, index];
    }
    if (at < 0) continue;
    kept.add(at);
    open.push([first, at], [at, last]);
  }
  return keys.filter((_, index) => kept.has(index));
}

/**
 * Key frames of a box whose middle goes along a drawn line at an even pace, its size kept; null
 * where the line has no length. The line ([{x, y}, ...] in shares) is moved to begin in the middle.
 */
export function along(box, line, first, last) {
  const reached = [0];
  for (let i = 1; i < line.length; i++) {
    reached.push(reached[i - 1] + Math.hypot(line[i].x - line[i - 1].x, line[i].y - line[i - 1].y));
  }
  const whole = reached.at(-1);
  if (!(whole > 0) || last <= first) return null;
  const keys = [];
  for (let frame = first; frame <= last; frame++) {
    const asked = (whole * (frame - first)) / (last - first);
    const at = Math.max(
      1,
      reached.findIndex((length) => length >= asked),
    );
    const step = reached[at] - reached[at - 1];
    const share = step > 0 ? (asked - reached[at - 1]) / step : 0;
    const place = (side, length) => {
      const on = line[at - 1][side] + (line[at][side] - line[at - 1][side]) * share;
      const middle = on - line[0][side] + box[side] + length / 2;
      return Math.min(1, Math.max(0, middle)) - length / 2;
    };
    keys.push({ frame, ...box, x: place("x", box.w), y: place("y", box.h), ease: "linear" });
  }
  return thinned(keys);
}

/** x, y, w and h alone. */
export function boxOf({ x, y, w, h }) {
  return { x, y, w, h };
}

function forSides(value) {
  return { x: value("x"), y: value("y"), w: value("w"), h: value("h") };
}

function easedShare(ease, share) {
  if (ease === "hold") return 0;
  if (ease === "ease_in") return share * share;
  if (ease === "ease_out") return share * (2 - share);
  if (ease === "ease_in_out") return share * share * (3 - 2 * share);
  return share;
}

/** Slope a frame of one side at a key frame of a smooth stretch. */
function slope(keys, at, side) {
  const before = at > 0 && keys[at - 1].ease === "smooth" ? secant(keys, at - 1, side) : null;
  const inner = at + 1 < keys.length && keys[at].ease === "smooth";
  const after = inner ? secant(keys, at, side) : null;
  if (before === null || after === null) return after ?? before;
  if (before * after <= 0) return 0;
  const left = keys[at].frame - keys[at - 1].frame;
  const right = keys[at + 1].frame - keys[at].frame;
  const [near, far] = [2 * right + left, right + 2 * left];
  return (near + far) / (near / before + far / after);
}

function secant(keys, at, side) {
  return (keys[at + 1][side] - keys[at][side]) / (keys[at + 1].frame - keys[at].frame);
}

function hermite(a, b, slopeA, slopeB, t) {
  const rest = 1 - t;
  return a + (b - a) * (t * t * (3 - 2 * t)) + t * rest * (rest * slopeA - t * slopeB);
}

function borders(low, high, side) {
  const first = Math.min(Math.max(Math.floor(low * side + 0.5), 0), side - 1);
  return [first, Math.max(Math.min(Math.floor(high * side + 0.5), side), first + 1)];
}
