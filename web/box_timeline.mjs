// The box editor's timeline: a ruler of frames, and a row of key frames for each subject.

import { freshContext } from "./elements.mjs";

export const RULER = 18;
export const ROW = 18;
const LEFT = 12;
const RIGHT = 12;
const REACH = { mouse: 7, pen: 8, touch: 16 };

/** Height of a timeline with so many subjects, in pixels. */
export function heightOf(tracks) {
  return RULER + ROW * Math.max(1, tracks);
}

/** Where a frame stands on a timeline of a width. */
export function placeOf(frame, width, frames) {
  const room = Math.max(1, width - LEFT - RIGHT);
  return frames > 1 ? LEFT + (room * frame) / (frames - 1) : LEFT + room / 2;
}

/** The frame nearest to a place. */
export function frameOf(x, width, frames) {
  const room = Math.max(1, width - LEFT - RIGHT);
  const frame = Math.round(((x - LEFT) / room) * (frames - 1));
  return Math.min(frames - 1, Math.max(0, frame));
}

/** What lies at a place: {row (-1 for the ruler), frame, key (whether a key frame is there)}. */
export function partAt(tracks, frames, { x, y }, width, kind = "mouse") {
  const frame = frameOf(x, width, frames);
  const row = Math.floor((y - RULER) / ROW);
  const track = tracks[row];
  if (!track) return { row: -1, frame, key: false };
  const away = ({ frame: at }) => Math.abs(placeOf(at, width, frames) - x);
  const nearest = track.keys.reduce((a, b) => (away(b) < away(a) ? b : a));
  const key = away(nearest) <= (REACH[kind] ?? REACH.mouse);
  return { row, frame: key ? nearest.frame : frame, key };
}

/** Distance between the ruler's numbers: 1, 2, 5, 10, 20 ... frames, as room allows. */
export function stepOf(width, frames) {
  const least = (34 * Math.max(1, frames - 1)) / Math.max(1, width - LEFT - RIGHT);
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= least) ?? 10 * power;
}

/**
 * Draw it anew. scene: {width, tracks, frames, frame, chosen, colors (of subjects), text (colour)}.
 */
export function drawTimeline(canvas, { width, tracks, frames, frame, chosen, colors, text }) {
  const height = heightOf(tracks.length);
  const context = freshContext(canvas, { width, height });
  context.font = "10px system-ui, sans-serif";
  context.textAlign = "center";
  context.fillStyle = context.strokeStyle = text;
  context.lineWidth = 1;
  const step = stepOf(width, frames);
  for (let at = 0; at < frames; at += step) {
    const x = Math.round(placeOf(at, width, frames)) + 0.5;
    context.globalAlpha = 0.7;
    context.fillText(String(at), x, 10);
    context.globalAlpha = 0.25;
    line(context, x, RULER - 5, x, height);
  }
  tracks.forEach((track, row) => {
    const middle = RULER + ROW * row + ROW / 2;
    if (row === chosen) {
      context.globalAlpha = 0.12;
      context.fillRect(0, middle - ROW / 2, width, ROW);
    }
    context.globalAlpha = row === chosen ? 1 : 0.6;
    const at = (key) => placeOf(key.frame, width, frames);
    context.strokeStyle = colors(row);
    track.keys.forEach((key, index) => {
      const next = track.keys[index + 1];
      if (!next) return;
      context.setLineDash(key.ease === "hold" ? [2, 4] : []);
      context.lineWidth = 2;
      line(context, at(key), middle, at(next), middle);
    });
    context.setLineDash([]);
    for (const key of track.keys) {
      diamond(context, at(key), middle, key.frame === frame, colors(row));
    }
  });
  context.globalAlpha = 1;
  context.strokeStyle = "#ff5d5d";
  context.lineWidth = 1.5;
  const now = placeOf(frame, width, frames);
  line(context, now, 12, now, height);
  context.fillStyle = "#ff5d5d";
  context.beginPath();
  context.arc(now, 14, 4, 0, 2 * Math.PI);
  context.fill();
}

function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

function diamond(context, x, y, now, color) {
  const size = 5;
  context.beginPath();
  context.moveTo(x, y - size);
  context.lineTo(x + size, y);
  context.lineTo(x, y + size);
  context.lineTo(x - size, y);
  context.closePath();
  context.fillStyle = now ? "#ffffff" : color;
  context.fill();
  context.strokeStyle = now ? color : "#000000a0";
  context.lineWidth = now ? 2 : 1;
  context.stroke();
}
