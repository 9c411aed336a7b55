// How the layer player looks: its styles, all under `layerloom-`, and its icons.

export const CSS = `
.layerloom-player {
  display: flex; flex-direction: column; gap: 6px; box-sizing: border-box;
  width: 100%; height: 100%; min-height: 300px; padding: 6px; border-radius: 8px; overflow: hidden;
  background: var(--comfy-menu-bg, #1d2026); color: var(--fg-color, #e6e8ec);
  font: 12px/1.3 system-ui, sans-serif;
}
.layerloom-player:focus-visible { outline: 2px solid var(--p-primary-color, #5b9dff); outline-offset: -2px; }
.layerloom-stage { position: relative; flex: 1 1 0; min-height: 96px; }
.layerloom-stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.layerloom-hint {
  position: absolute; inset: 0; display: flex; align-items: center; justify-content: center;
  padding: 12px; text-align: center; color: var(--descrip-text, #9aa1ad);
}
.layerloom-hint[hidden] { display: none; }
.layerloom-bar { display: flex; align-items: center; gap: 6px; flex-wrap: wrap; min-width: 0; }
.layerloom-bar input[type="range"] { flex: 1 1 80px; min-width: 60px; margin: 0; accent-color: var(--p-primary-color, #5b9dff); }
.layerloom-counter { min-width: 4.5em; text-align: right; font-variant-numeric: tabular-nums; }
.layerloom-layers, .layerloom-group { display: flex; flex-wrap: wrap; gap: 4px; }
.layerloom-group { margin-right: auto; }
.layerloom-layer { display: inline-flex; }
.layerloom-player button {
  box-sizing: border-box; min-width: 24px; height: 24px; margin: 0; padding: 0 8px; cursor: pointer;
  border: 1px solid var(--border-color, #454b57); border-radius: 5px;
  background: var(--comfy-input-bg, #2a2e36); color: inherit; font: inherit;
}
.layerloom-player button:disabled { opacity: 0.45; cursor: default; }
.layerloom-player button:focus-visible, .layerloom-player input:focus-visible {
  outline: 2px solid var(--p-primary-color, #5b9dff); outline-offset: 1px;
}
.layerloom-player button[aria-pressed="true"] {
  background: var(--p-primary-color, #5b9dff); border-color: transparent; color: #0b1020;
}
.layerloom-player .layerloom-play { display: inline-flex; align-items: center; justify-content: center; padding: 0; }
.layerloom-player .layerloom-show { border-radius: 5px 0 0 5px; }
.layerloom-player .layerloom-solo { padding: 0 5px; border-left: 0; border-radius: 0 5px 5px 0; font-weight: 600; }
.layerloom-player .layerloom-swatch {
  box-sizing: border-box; width: 24px; height: 24px; min-width: 24px; padding: 0; cursor: pointer;
  border: 1px solid var(--border-color, #454b57); border-radius: 5px;
}
.layerloom-player .layerloom-swatch[aria-pressed="true"], .layerloom-player .layerloom-chosen {
  box-shadow: 0 0 0 2px var(--p-primary-color, #5b9dff);
}
.layerloom-player .layerloom-checker, .layerloom-player .layerloom-checker[aria-pressed="true"] {
  background: conic-gradient(#ccc 25%, #f5f5f5 0 50%, #ccc 0 75%, #f5f5f5 0) 0 0 / 12px 12px;
}
.layerloom-player .layerloom-black, .layerloom-player .layerloom-black[aria-pressed="true"] { background: #000; }
.layerloom-player .layerloom-white, .layerloom-player .layerloom-white[aria-pressed="true"] { background: #fff; }
.layerloom-player input[type="color"]::-webkit-color-swatch-wrapper { padding: 2px; }
.layerloom-player input[type="color"]::-webkit-color-swatch { border: 0; border-radius: 3px; }
.layerloom-player input[type="color"] { background: none; }
.layerloom-player svg { width: 12px; height: 12px; fill: currentColor; }
`;

const SHAPES = { play: "M2 1 L11 6 L2 11 Z", pause: "M2 1 H5 V11 H2 Z M7 1 H10 V11 H7 Z" };

/** A picture for a button: "play" or "pause". */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 12 12");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}
