// What lies below an editor's boxes: a picture, or a clip's frames, which come on one sheet.

import { fetchPicture } from "./elements.mjs";

const GONE = "The picture is no longer there; run the workflow again.";

/**
 * Where a clip's frame is on its sheet: {x, y, width, height}.
 *
 * sheet: {columns, rows, count, frames}: so many frames of a clip, evenly taken, first and last
 * among them, row by row. size: {width, height} of the sheet in pixels. Later frames show the last.
 */
export function tileOf(frame, { columns, rows, count, frames }, size) {
  const share = frames > 1 ? Math.min(frame, frames - 1) / (frames - 1) : 0;
  const number = Math.round(share * (count - 1));
  const [width, height] = [size.width / columns, size.height / rows];
  return { x: (number % columns) * width, y: Math.floor(number / columns) * height, width, height };
}

/** Fetches pictures; the last that was asked for counts. */
export class Pictures {
  #address = "";
  #image = null;
  #clip = null;
  #sheet = null;
  #gone = false;

  /** onChange(): something else is to be seen. */
  constructor(onChange) {
    this.onChange = onChange;
    this.problem = "";
  }

  /** The picture's size in pixels, or null without one. */
  get size() {
    if (!this.#image) return null;
    return { width: this.#image.naturalWidth, height: this.#image.naturalHeight };
  }

  /** What is seen at a frame: {image, part: {x, y, width, height} of it}, or null for nothing. */
  at(frame) {
    if (frame > 0 && this.#sheet) {
      const { naturalWidth: width, naturalHeight: height } = this.#sheet;
      return { image: this.#sheet, part: tileOf(frame, this.#clip, { width, height }) };
    }
    return this.#image && { image: this.#image, part: { x: 0, y: 0, ...this.size } };
  }

  /** Show the picture at an address; "" for none. Resolves to its size, or null. */
  async show(address) {
    if (address === this.#address || this.#gone) return this.size;
    this.#address = address;
    let image = null;
    let problem = "";
    try {
      if (address) image = await fetchPicture(address);
    } catch {
      problem = GONE;
    }
    if (address !== this.#address || this.#gone) return this.size;
    this.#image = image;
    this.problem = problem;
    this.onChange();
    return this.size;
  }

  /** Show a clip's frames after the first: {address, columns, rows, count, frames}, or null. */
  async showClip(clip) {
    if (clip?.address === this.#clip?.address || this.#gone) return;
    this.#clip = clip;
    this.#sheet = null;
    try {
      const sheet = clip && (await fetchPicture(clip.address));
      if (clip === this.#clip && !this.#gone) this.#sheet = sheet;
    } catch {
      // The first frame stays.
    }
    this.onChange();
  }

  /** Let go of everything. */
  destroy() {
    this.#gone = true;
    this.#image = this.#sheet = this.#clip = null;
  }
}
