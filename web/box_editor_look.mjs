// How the box editor looks: its styles, all under `layerloom-box`, and its icons.

import { iconOf } from "./elements.mjs";

export const CSS = `
.layerloom-boxes {
  display: flex; flex-direction: column; gap: 6px; box-sizing: border-box;
  width: 100%; height: 100%; min-height: 340px; padding: 6px; border-radius: 8px; overflow: hidden;
  background: var(--comfy-menu-bg, #1d2026); color: var(--fg-color, #e6e8ec);
  font: 12px/1.3 system-ui, sans-serif; user-select: none; -webkit-user-select: none;
}
.layerloom-boxes:has(.layerloom-box-keys:focus-visible) {
  outline: 2px solid var(--p-primary-color, #5b9dff); outline-offset: -2px;
}
.layerloom-box-stage {
  position: relative; flex: 1 1 0; min-height: 120px; overflow: hidden; border-radius: 5px;
  background: #0009; touch-action: none; cursor: crosshair;
}
.layerloom-box-stage[data-over="move"] { cursor: move; }
.layerloom-box-stage[data-over="00"], .layerloom-box-stage[data-over="11"] { cursor: nwse-resize; }
.layerloom-box-stage[data-over="10"], .layerloom-box-stage[data-over="01"] { cursor: nesw-resize; }
.layerloom-box-stage[data-over="path"] { cursor: cell; }
.layerloom-box-stage[data-over="pan"] { cursor: grabbing; }
.layerloom-box-stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.layerloom-box-keys {
  position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; padding: 0; border: 0;
  opacity: 0; pointer-events: none;
}
.layerloom-box-hint {
  position: absolute; inset: auto 0 4px; padding: 0 12px; text-align: center;
  color: #e6e8ec; text-shadow: 0 0 3px #000, 0 0 3px #000; pointer-events: none;
}
.layerloom-box-hint[hidden] { display: none; }
.layerloom-box-time {
  flex: none; max-height: 92px; overflow-x: hidden; overflow-y: auto; border-radius: 5px;
  background: var(--comfy-input-bg, #2a2e36); color: inherit;
}
.layerloom-box-time canvas { display: block; width: 100%; touch-action: none; cursor: pointer; }
.layerloom-box-bar, .layerloom-box-fields {
  display: flex; align-items: center; gap: 4px; flex-wrap: wrap; min-width: 0;
}
.layerloom-box-space { flex: 1 1 0; }
.layerloom-box-count { min-width: 4.5em; text-align: center; font-variant-numeric: tabular-nums; }
.layerloom-boxes button {
  display: inline-flex; align-items: center; justify-content: center; box-sizing: border-box;
  width: 28px; height: 24px; margin: 0; padding: 0; cursor: pointer;
  border: 1px solid var(--border-color, #454b57); border-radius: 5px;
  background: var(--comfy-input-bg, #2a2e36); color: inherit; font: inherit;
}
.layerloom-boxes button[hidden] { display: none; }
.layerloom-boxes button:disabled { opacity: 0.4; cursor: default; }
.layerloom-boxes :is(button, input, select):focus-visible {
  outline: 2px solid var(--p-primary-color, #5b9dff); outline-offset: 1px;
}
.layerloom-boxes button[aria-pressed="true"] {
  background: var(--p-primary-color, #5b9dff); border-color: transparent; color: #0b1020;
}
.layerloom-boxes svg {
  width: 14px; height: 14px; fill: none; stroke: currentColor; stroke-width: 1.7;
  stroke-linecap: round; stroke-linejoin: round;
}
.layerloom-box-fields label { display: inline-flex; align-items: center; gap: 3px; }
.layerloom-box-fields :is(input, select) {
  box-sizing: border-box; height: 24px; min-width: 0; margin: 0; padding: 0 4px;
  border: 1px solid var(--border-color, #454b57); border-radius: 5px;
  background: var(--comfy-input-bg, #2a2e36); color: inherit; font: inherit;
}
.layerloom-box-fields input[type="text"] { flex: 1 1 48px; width: 48px; user-select: text; }
.layerloom-box-fields input[type="number"] {
  width: 52px; user-select: text; appearance: textfield;
}
.layerloom-box-fields select { flex: 1 1 90px; }
.layerloom-box-status {
  min-height: 1.3em; color: var(--descrip-text, #9aa1ad); overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums;
}
.layerloom-box-status[data-bad="true"] { color: var(--error-text, #ff7a7a); }
@media (pointer: coarse) {
  .layerloom-boxes button { width: 40px; height: 36px; }
}
`;

// 16 x 16, drawn in lines.
const SHAPES = {
  box: "M2.5 3.5 H13.5 V12.5 H2.5 Z",
  path: "M2.5 12.5 C5 3 9 14 13.5 3.5 M13.5 3.5 L10.5 4 M13.5 3.5 L13.8 6.5",
  snap: "M4 2.5 V8 A4 4 0 0 0 12 8 V2.5 M4 5.5 H2.5 M12 5.5 H13.5",
  trail: "M2.5 8 H5 M7 8 H8 M10 8 H11 M11 5.5 L13.5 8 L11 10.5",
  fit: "M2.5 6 V2.5 H6 M10 2.5 H13.5 V6 M13.5 10 V13.5 H10 M6 13.5 H2.5 V10",
  undo: "M6 3 L2.5 6.5 L6 10 M2.5 6.5 H10 A3.5 3.5 0 0 1 10 13.5 H6",
  redo: "M10 3 L13.5 6.5 L10 10 M13.5 6.5 H6 A3.5 3.5 0 0 0 6 13.5 H10",
  copy: "M5.5 5.5 H13.5 V13.5 H5.5 Z M10.5 5.5 V2.5 H2.5 V10.5 H5.5",
  paste: "M3.5 3.5 H12.5 V13.5 H3.5 Z M6 3.5 V2 H10 V3.5 M8 6.5 V10.5 M6 8.5 H10",
  take: "M8 2.5 V9.5 M5 7 L8 10 L11 7 M2.5 12.5 H13.5",
  remove: "M2.5 4.5 H13.5 M6 4.5 V2.5 H10 V4.5 M4 4.5 L4.8 13.5 H11.2 L12 4.5",
  clear: "M4 4 L12 12 M12 4 L4 12",
  before: "M11 3 L6 8 L11 13 M4 3 V13",
  after: "M5 3 L10 8 L5 13 M12 3 V13",
  key: "M8 2.5 L13 8 L8 13.5 L3 8 Z M8 5.8 V10.2 M5.8 8 H10.2",
  unkey: "M8 2.5 L13 8 L8 13.5 L3 8 Z M5.8 8 H10.2",
  play: "M4.5 2.5 L13 8 L4.5 13.5 Z",
  pause: "M5 3 V13 M11 3 V13",
};

/** A picture for a button, by the names above. */
export function icon(name) {
  return iconOf(SHAPES[name]);
}
