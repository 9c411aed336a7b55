// A player for layers given as sprite sheets; knows nothing of the page it is shown in.

import { CSS, icon } from "./layer_player_look.mjs";

/** Bottom to top. The blended scene covers the recomposed one, so that the two can be compared. */
export const ORDER = ["background", "foreground", "blended", "alpha"];
const RECOMPOSED = ["background", "foreground"];
const BACKDROPS = { checker: "Checkerboard", black: "Black", white: "White" };
const HINT = "Run the workflow to see its layers here.";
const GONE = "The preview is no longer there; run the workflow again.";

/**
 * Layers from a node's output, checked; what cannot be shown is left out.
 *
 * Each entry: {name, frames, fps, width, height, columns, per_sheet, sheets}; `address` turns an
 * entry of `sheets` into a URL.
 */
export function readLayers(entries, address) {
  if (!Array.isArray(entries)) return [];
  const counts = ["frames", "width", "height", "columns", "per_sheet"];
  return entries
    .filter(
      (entry) =>
        ORDER.includes(entry?.name) &&
        entry.fps > 0 &&
        counts.every((key) => Number.isInteger(entry[key]) && entry[key] > 0) &&
        Array.isArray(entry.sheets) &&
        entry.sheets.length * entry.per_sheet >= entry.frames,
    )
    .map((entry) => ({ ...entry, urls: entry.sheets.map(address) }));
}

/** Where a frame lies: number of its sheet, and the corner in that sheet in pixels. */
export function framePlace(layer, frame) {
  const cell = frame % layer.per_sheet;
  return {
    sheet: Math.floor(frame / layer.per_sheet),
    x: (cell % layer.columns) * layer.width,
    y: Math.floor(cell / layer.columns) * layer.height,
  };
}

/** Frame `step` further, round and round. */
export function stepped(frame, step, frames) {
  return (((frame + step) % frames) + frames) % frames;
}

/** What is visible at first: the recomposed scene, or whatever there is of it. */
export function firstVisible(names) {
  const parts = RECOMPOSED.filter((name) => names.includes(name));
  if (parts.length) return parts;
  return names.includes("blended") ? ["blended"] : names.slice(0, 1);
}

/** The pictures side by side, each a list of layer names from bottom to top. */
export function panes({ names, visible, solo, side }) {
  const shown = solo ? [solo] : ORDER.filter((name) => visible.includes(name));
  const complete = RECOMPOSED.every((name) => names.includes(name));
  if (!side || !complete) return [shown];
  const same = shown.join() === RECOMPOSED.join();
  return [same && names.includes("blended") ? ["blended"] : shown, [...RECOMPOSED]];
}

/** What a picture is called. */
export function paneTitle(shown) {
  if (!shown.length) return "Nothing";
  if (shown.join() === RECOMPOSED.join()) return "Recomposed";
  return shown.map(titled).join(" + ");
}

/** Largest rectangle of an aspect ratio in the middle of another. */
export function fitted(width, height, box) {
  const scale = Math.min(box.width / width, box.height / height);
  const size = { width: width * scale, height: height * scale };
  return {
    x: box.x + (box.width - size.width) / 2,
    y: box.y + (box.height - size.height) / 2,
    ...size,
  };
}

function titled(name) {
  return name[0].toUpperCase() + name.slice(1);
}

function make(tag, properties = {}, ...children) {
  const { className, ...rest } = properties;
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [key, value] of Object.entries(rest)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Plays layers; put `element` into the page, call `load`, and `destroy` in the end. */
export class LayerPlayer {
  #layers = [];
  #pictures = new Map();
  #state = { frame: 0, playing: false, visible: [], solo: null, side: false, backdrop: "checker" };
  #color = "#3a7bd5";
  #loading = 0;
  #request = 0;
  #started = 0;
  #onScreen = true;
  #listeners = new AbortController();
  #observers = [];

  constructor() {
    this.#build();
    const resize = new ResizeObserver(() => this.#draw());
    resize.observe(this.stage);
    const sight = new IntersectionObserver(([entry]) => {
      this.#onScreen = entry.isIntersecting;
      this.#keepPlaying();
    });
    sight.observe(this.element);
    this.#observers = [resize, sight];
    this.#say(HINT);
    this.#refresh();
  }

  get frame() {
    return this.#state.frame;
  }

  get frames() {
    return this.#layers.length ? Math.min(...this.#layers.map((layer) => layer.frames)) : 0;
  }

  get playing() {
    return this.#state.playing;
  }

  /** Show other layers (from `readLayers`); what is switched on stays on. */
  async load(layers) {
    if (this.#listeners.signal.aborted) return;
    const turn = ++this.#loading;
    const pictures = new Map();
    try {
      await Promise.all(
        layers.map(async (layer) => {
          pictures.set(layer.name, await Promise.all(layer.urls.map(fetchPicture)));
        }),
      );
    } catch {
      if (turn === this.#loading) this.#say(GONE);
      return;
    }
    if (turn !== this.#loading || this.#listeners.signal.aborted) return;
    const names = layers.map((layer) => layer.name);
    const before = this.#layers.map((layer) => layer.name);
    this.#layers = layers;
    this.#pictures = pictures;
    if (names.join() !== before.join()) {
      this.#state.visible = firstVisible(names);
      this.#state.solo = null;
    }
    this.#state.frame = Math.min(this.#state.frame, this.frames - 1);
    this.#say("");
    this.#buildLayers();
    this.#refresh();
    this.#keepPlaying();
  }

  play() {
    this.#state.playing = this.frames > 1;
    this.#refresh();
    this.#keepPlaying();
  }

  pause() {
    this.#state.playing = false;
    this.#refresh();
  }

  /** Pause at a frame, counted from 0. */
  seek(frame) {
    if (!this.#layers.length) return;
    this.#state.playing = false;
    this.#state.frame = Math.max(0, Math.min(this.frames - 1, Math.round(frame)));
    this.#refresh();
  }

  /** Switch a layer on or off. */
  toggle(name) {
    const { visible } = this.#state;
    this.#state.solo = null;
    this.#state.visible = visible.includes(name)
      ? visible.filter((other) => other !== name)
      : [...visible, name];
    this.#refresh();
  }

  /** Show one layer alone; once more brings the others back. */
  solo(name) {
    this.#state.solo = this.#state.solo === name ? null : name;
    this.#refresh();
  }

  /** "checker", "black", "white" or a CSS colour. */
  backdrop(value) {
    this.#state.backdrop = value;
    this.#refresh();
  }

  sideBySide(on) {
    this.#state.side = on;
    this.#refresh();
  }

  /** Let go of everything; the player cannot be used afterwards. */
  destroy() {
    this.#loading++;
    this.#state.playing = false;
    cancelAnimationFrame(this.#request);
    this.#listeners.abort();
    for (const observer of this.#observers) observer.disconnect();
    this.#pictures.clear();
    this.#layers = [];
    this.element.remove();
  }

  #build() {
    const signal = this.#listeners.signal;
    const on = (element, type, handler) => {
      element.addEventListener(type, handler, { signal });
      return element;
    };
    this.canvas = make("canvas", { role: "img" });
    this.hint = make("div", { className: "layerloom-hint", role: "status" });
    this.stage = make("div", { className: "layerloom-stage" }, this.canvas, this.hint);
    this.playButton = on(
      make("button", { type: "button", className: "layerloom-button layerloom-play" }),
      "click",
      () => (this.playing ? this.pause() : this.play()),
    );
    this.slider = on(
      make("input", { type: "range", min: 0, step: 1, value: 0, "aria-label": "Frame" }),
      "input",
      () => this.seek(Number(this.slider.value)),
    );
    this.counter = make("span", { className: "layerloom-counter" });
    this.layerRow = make("div", {
      className: "layerloom-layers",
      role: "group",
      "aria-label": "Layers",
    });
    this.backdrops = Object.entries(BACKDROPS).map(([value, title]) =>
      on(
        make("button", {
          type: "button",
          className: `layerloom-swatch layerloom-${value}`,
          title: `${title} behind`,
          "aria-label": `${title} behind`,
          "data-backdrop": value,
        }),
        "click",
        () => this.backdrop(value),
      ),
    );
    this.color = on(
      make("input", {
        type: "color",
        className: "layerloom-swatch",
        value: this.#color,
        title: "Any colour behind",
        "aria-label": "Any colour behind",
      }),
      "input",
      () => this.backdrop(this.color.value),
    );
    on(this.color, "click", () => this.backdrop(this.color.value));
    this.sideButton = on(
      make("button", { type: "button", className: "layerloom-button" }, "Side by side"),
      "click",
      () => this.sideBySide(!this.#state.side),
    );
    this.sideButton.title = "Next to foreground over background, recomposed here";
    const behind = make(
      "div",
      { className: "layerloom-group", role: "group", "aria-label": "Behind the layers" },
      ...this.backdrops,
      this.color,
    );
    this.element = make(
      "div",
      { className: "layerloom-player", tabindex: 0, role: "group", "aria-label": "Layer viewer" },
      make("style", {}, CSS),
      this.stage,
      make("div", { className: "layerloom-bar" }, this.playButton, this.slider, this.counter),
      make("div", { className: "layerloom-bar" }, this.layerRow),
      make("div", { className: "layerloom-bar" }, behind, this.sideButton),
    );
    on(this.element, "keydown", (event) => this.#key(event));
    // The graph below must not be dragged by what happens in here.
    on(this.element, "pointerdown", (event) => event.stopPropagation());
  }

  #buildLayers() {
    this.layerRow.replaceChildren(
      ...this.#layers.map(({ name }) => {
        const title = titled(name);
        const show = make("button", { type: "button", className: "layerloom-show" }, title);
        show.title = `${title}: show or hide`;
        show.dataset.layer = name;
        show.addEventListener("click", () => this.toggle(name));
        const solo = make("button", { type: "button", className: "layerloom-solo" }, "S");
        solo.title = `${title} alone (solo)`;
        solo.setAttribute("aria-label", solo.title);
        solo.dataset.layer = name;
        solo.addEventListener("click", () => this.solo(name));
        return make("span", { className: "layerloom-layer" }, show, solo);
      }),
    );
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const pressesButton = event.target.closest("button, input[type=color]");
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key === " " && !pressesButton) {
      if (this.playing) this.pause();
      else this.play();
    } else if (event.key in moves && this.frames) {
      this.seek(stepped(this.frame, moves[event.key], this.frames));
    } else if (event.key === "Home") this.seek(0);
    else if (event.key === "End") this.seek(this.frames - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #say(text) {
    this.hint.textContent = text;
    this.hint.hidden = !text;
  }

  #keepPlaying() {
    cancelAnimationFrame(this.#request);
    this.#request = 0;
    if (!this.playing || !this.#onScreen || !this.frames) return;
    const { fps } = this.#layers[0];
    this.#started = performance.now() - (this.frame * 1000) / fps;
    const tick = (now) => {
      if (!this.playing || !this.#onScreen) return;
      // The half millisecond keeps rounded clocks from falling just short of a frame.
      const frame = Math.floor(((now - this.#started + 0.5) / 1000) * fps);
      const next = stepped(Math.max(frame, 0), 0, this.frames);
      if (next !== this.frame) {
        this.#state.frame = next;
        this.#refresh();
      }
      this.#request = requestAnimationFrame(tick);
    };
    this.#request = requestAnimationFrame(tick);
  }

  #refresh() {
    const { frames, playing } = this;
    const { visible, solo, side, backdrop, frame } = this.#state;
    const names = this.#layers.map((layer) => layer.name);
    const press = (element, pressed) => element.setAttribute("aria-pressed", String(pressed));
    if (this.playButton.dataset.playing !== String(playing)) {
      this.playButton.dataset.playing = String(playing);
      this.playButton.replaceChildren(icon(playing ? "pause" : "play"));
      this.playButton.title = playing ? "Pause (space)" : "Play (space)";
      this.playButton.setAttribute("aria-label", playing ? "Pause" : "Play");
    }
    this.playButton.disabled = frames < 2;
    this.slider.disabled = frames < 2;
    this.slider.max = String(Math.max(frames - 1, 0));
    this.slider.value = String(frame);
    this.slider.setAttribute("aria-valuetext", `Frame ${frame + 1} of ${frames}`);
    this.counter.textContent = frames ? `${frame + 1} / ${frames}` : "";
    for (const button of this.layerRow.querySelectorAll("button")) {
      const { layer } = button.dataset;
      const isSolo = button.classList.contains("layerloom-solo");
      press(button, isSolo ? solo === layer : solo ? solo === layer : visible.includes(layer));
    }
    for (const button of this.backdrops) press(button, button.dataset.backdrop === backdrop);
    this.color.classList.toggle("layerloom-chosen", !(backdrop in BACKDROPS));
    press(this.sideButton, side);
    this.sideButton.disabled = !RECOMPOSED.every((name) => names.includes(name));
    this.#draw();
  }

  #draw() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.stage.clientWidth * ratio);
    const height = Math.round(this.stage.clientHeight * ratio);
    if (!width || !height) return;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!this.#layers.length) return;
    const shown = panes({ ...this.#state, names: this.#layers.map((layer) => layer.name) });
    const gap = 4 * ratio;
    const caption = shown.length > 1 ? 16 * ratio : 0;
    const share = (width - gap * (shown.length - 1)) / shown.length;
    const { width: w, height: h } = this.#layers[0];
    shown.forEach((names, index) => {
      const left = index * (share + gap);
      const box = fitted(w, h, { x: left, y: 0, width: share, height: height - caption });
      this.#fillBackdrop(context, box, ratio);
      context.imageSmoothingQuality = "high";
      context.drawImage(this.#composed(names), box.x, box.y, box.width, box.height);
      if (caption) {
        context.fillStyle = getComputedStyle(this.counter).color;
        context.font = `${11 * ratio}px sans-serif`;
        context.textAlign = "center";
        context.fillText(paneTitle(names), left + share / 2, box.y + box.height + 13 * ratio);
      }
    });
    const titles = shown.map(paneTitle).join(" next to ");
    this.canvas.setAttribute("aria-label", `${titles}, frame ${this.frame + 1} of ${this.frames}`);
  }

  /** One frame of some layers at its own size: scaled only afterwards, so that cells stay apart. */
  #composed(names) {
    this.scratch ??= document.createElement("canvas");
    const { width, height } = this.#layers[0];
    if (this.scratch.width !== width || this.scratch.height !== height) {
      this.scratch.width = width;
      this.scratch.height = height;
    }
    const context = this.scratch.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, width, height);
    for (const name of names) {
      const layer = this.#layers.find((other) => other.name === name);
      if (!layer) continue;
      const { sheet, x, y } = framePlace(layer, this.frame);
      // Alpha among others darkens what it makes transparent.
      const masks = name === "alpha" && names.length > 1;
      context.globalCompositeOperation = masks ? "multiply" : "source-over";
      const picture = this.#pictures.get(name)[sheet];
      context.drawImage(picture, x, y, layer.width, layer.height, 0, 0, width, height);
    }
    return this.scratch;
  }

  #fillBackdrop(context, { x, y, width, height }, ratio) {
    const { backdrop } = this.#state;
    context.fillStyle = backdrop === "checker" ? "#f5f5f5" : backdrop;
    context.fillRect(x, y, width, height);
    if (backdrop !== "checker") return;
    context.save();
    context.beginPath();
    context.rect(x, y, width, height);
    context.clip();
    context.fillStyle = "#cccccc";
    const square = 8 * ratio;
    for (let row = 0; row * square < height; row++) {
      for (let column = row % 2; column * square < width; column += 2) {
        context.fillRect(x + column * square, y + row * square, square, square);
      }
    }
    context.restore();
  }
}

async function fetchPicture(url) {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  return picture;
}
