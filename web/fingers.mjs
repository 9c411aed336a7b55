// Two fingers on a stage move and zoom what lies on it.

export class Fingers {
  #places = new Map();
  #before = null;

  /** How many fingers, or other pointers, are down. */
  get count() {
    return this.#places.size;
  }

  /** From a second finger on until the last one is gone. */
  get pinching() {
    return this.#before !== null;
  }

  down(id, at) {
    this.#places.set(id, at);
    if (this.count > 1) this.#before = this.#measure();
  }

  /** What moving one of two fingers does: {dx, dy, factor, middle}; null for anything else. */
  move(id, at) {
    if (!this.#places.has(id)) return null;
    this.#places.set(id, at);
    if (!this.pinching || this.count < 2) return null;
    const before = this.#before;
    const { middle, apart } = (this.#before = this.#measure());
    return {
      dx: middle.x - before.middle.x,
      dy: middle.y - before.middle.y,
      factor: apart / before.apart,
      middle,
    };
  }

  /** Whether the pointer was down. */
  up(id) {
    const known = this.#places.delete(id);
    if (!this.count) this.#before = null;
    else if (this.count > 1) this.#before = this.#measure();
    return known;
  }

  #measure() {
    const [a, b] = [...this.#places.values()];
    return {
      middle: { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 },
      apart: Math.max(1, Math.hypot(a.x - b.x, a.y - b.y)),
    };
  }
}
