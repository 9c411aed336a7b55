// How the click editor looks: its styles, all under `layerloom-click`, and its icons.

import { iconOf } from "./elements.mjs";

export const CSS = `
.layerloom-clicks {
  display: flex; flex-direction: column; gap: 6px; box-sizing: border-box;
  width: 100%; height: 100%; min-height: 260px; padding: 6px; border-radius: 8px; overflow: hidden;
  background: var(--comfy-menu-bg, #1d2026); color: var(--fg-color, #e6e8ec);
  font: 12px/1.3 system-ui, sans-serif; user-select: none; -webkit-user-select: none;
}
.layerloom-clicks:has(.layerloom-click-keys:focus-visible) {
  outline: 2px solid var(--p-primary-color, #5b9dff); outline-offset: -2px;
}
.layerloom-click-stage {
  position: relative; flex: 1 1 0; min-height: 120px; overflow: hidden; border-radius: 5px;
  background: #0009; touch-action: none; cursor: crosshair;
}
.layerloom-click-stage[data-over="point"], .layerloom-click-stage[data-over="edge"] { cursor: move; }
.layerloom-click-stage[data-over="00"], .layerloom-click-stage[data-over="11"] { cursor: nwse-resize; }
.layerloom-click-stage[data-over="10"], .layerloom-click-stage[data-over="01"] { cursor: nesw-resize; }
.layerloom-click-stage[data-over="pan"] { cursor: grabbing; }
.layerloom-click-stage[data-over="outside"] { cursor: default; }
.layerloom-click-stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.layerloom-click-keys {
  position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; padding: 0; border: 0;
  opacity: 0; pointer-events: none; resize: none;
}
.layerloom-click-hint {
  position: absolute; inset: 0; display: flex; align-items: center; justify-content: center;
  padding: 12px; text-align: center; color: var(--descrip-text, #9aa1ad); pointer-events: none;
}
.layerloom-click-hint[hidden] { display: none; }
.layerloom-click-bar { display: flex; align-items: center; gap: 4px; flex-wrap: wrap; min-width: 0; }
.layerloom-click-tools { display: inline-flex; }
.layerloom-click-space { flex: 1 1 0; }
.layerloom-clicks button {
  display: inline-flex; align-items: center; justify-content: center; box-sizing: border-box;
  width: 28px; height: 24px; margin: 0; padding: 0; cursor: pointer;
  border: 1px solid var(--border-color, #454b57); border-radius: 5px;
  background: var(--comfy-input-bg, #2a2e36); color: inherit; font: inherit;
}
.layerloom-click-tools button { border-radius: 0; margin-left: -1px; }
.layerloom-click-tools button:first-child { border-radius: 5px 0 0 5px; margin-left: 0; }
.layerloom-click-tools button:last-child { border-radius: 0 5px 5px 0; }
.layerloom-clicks button:disabled { opacity: 0.4; cursor: default; }
.layerloom-clicks button:focus-visible {
  outline: 2px solid var(--p-primary-color, #5b9dff); outline-offset: 1px; z-index: 1;
}
.layerloom-clicks button[aria-pressed="true"] {
  background: var(--p-primary-color, #5b9dff); border-color: transparent; color: #0b1020;
}
.layerloom-clicks svg {
  width: 14px; height: 14px; fill: none; stroke: currentColor; stroke-width: 1.7;
  stroke-linecap: round; stroke-linejoin: round;
}
.layerloom-click-status {
  min-height: 1.3em; color: var(--descrip-text, #9aa1ad); overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums;
}
.layerloom-click-status[data-bad="true"] { color: var(--error-text, #ff7a7a); }
@media (pointer: coarse) {
  .layerloom-clicks button { width: 40px; height: 36px; }
}
`;

// 16 x 16, drawn in lines.
const SHAPES = {
  positive: "M8 3 V13 M3 8 H13",
  negative: "M3 8 H13",
  box: "M2.5 3.5 H13.5 V12.5 H2.5 Z",
  undo: "M6 3 L2.5 6.5 L6 10 M2.5 6.5 H10 A3.5 3.5 0 0 1 10 13.5 H6",
  redo: "M10 3 L13.5 6.5 L10 10 M13.5 6.5 H6 A3.5 3.5 0 0 0 6 13.5 H10",
  delete: "M4 4 L12 12 M12 4 L4 12",
  clear: "M2.5 4.5 H13.5 M6 4.5 V2.5 H10 V4.5 M4 4.5 L4.8 13.5 H11.2 L12 4.5",
  fit: "M2.5 6 V2.5 H6 M10 2.5 H13.5 V6 M13.5 10 V13.5 H10 M6 13.5 H2.5 V10",
};

/** A picture for a button, by the names above. */
export function icon(name) {
  return iconOf(SHAPES[name]);
}
