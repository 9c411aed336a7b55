// Reads [{text, frames, size: [height, width]}] from standard input and writes what the editor
// makes of each: boxes in shares and in pixels, all tracks and frames. Run by test_box_editor.py.

import { readFileSync } from "node:fs";

import { boxAt, pixelBox } from "../web/box_path.mjs";
import { readBoxes } from "../web/boxes.mjs";

const answers = JSON.parse(readFileSync(0, "utf8")).map(({ text, frames, size }) => {
  const paths = readBoxes(text, frames);
  if (!paths) return null;
  const [height, width] = size;
  const everywhere = Array.from({ length: frames }, (_, frame) => frame);
  return paths.tracks.map((track) => {
    const boxes = everywhere.map((frame) => boxAt(track, frame));
    return {
      shares: boxes.map(({ x, y, w, h }) => [x, y, w, h]),
      pixels: boxes.map((box) => {
        const { x0, y0, x1, y1 } = pixelBox(box, { width, height });
        return [x0, y0, x1, y1];
      }),
    };
  });
});
process.stdout.write(JSON.stringify(answers));
