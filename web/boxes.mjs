// Paths of boxes: the JSON contract with Python, and the edits of them, which change nothing in
// place.

import { along, boxAt, boxOf } from "./box_path.mjs";

/** How a key frame's box becomes the next one's. */
export const EASES = {
  linear: "Even",
  ease_in: "Slow start",
  ease_out: "Slow end",
  ease_in_out: "Slow start and end",
  smooth: "Smooth through keys",
  hold: "Hold, then jump",
};
/** Python refuses more. */
export const MOST_TRACKS = 16;
export const MOST_FRAMES = 4096;
const LONGEST_NAME = 64;
const VERSION = 1;
// A side shorter than this share of the picture is a slip of the hand; so much stays inside.
export const THINNEST = 0.01;
const WIDEST = 2;
const FARTHEST = 4;
const SIDES = ["x", "y", "w", "h"];

/** No paths through a clip of so many frames. */
export function nothing(frames) {
  return { frames, tracks: [] };
}

/**
 * Paths {frames, tracks: [{id, keys: [{frame, x, y, w, h, ease}]}]} from a widget's text, fitted to
 * a clip of so many frames; null where the text is not what Python would take.
 */
export function readBoxes(text, frames) {
  if (!text?.trim()) return nothing(frames);
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    return null;
  }
  if (data === null || typeof data !== "object" || Array.isArray(data)) return null;
  const { version = VERSION, tracks = [], frames: own = frames, ...rest } = data;
  if (version !== VERSION || Object.keys(rest).length || !Array.isArray(tracks)) return null;
  if (!isFrames(own) || tracks.length > MOST_TRACKS) return null;
  const read = tracks.map((track) => readTrack(track, own));
  const names = new Set(read.map((track) => track?.id));
  if (read.includes(null) || names.size < read.length) return null;
  return retimed({ frames: own, tracks: read }, frames);
}

/** The text for the widget; empty where there is no box. */
export function writeBoxes({ frames, tracks }) {
  if (!tracks.length) return "";
  return JSON.stringify({
    version: VERSION,
    frames,
    tracks: tracks.map(({ id, keys }) => ({
      id,
      keyframes: keys.map(({ frame, x, y, w, h, ease }) => {
        const [left, top, wide, high] = [x, y, w, h].map(rounded);
        return { frame, x: left, y: top, w: wide, h: high, ease };
      }),
    })),
  });
}

/** The same paths through a clip of another length; of keys that fall together one stays. */
export function retimed(paths, frames) {
  if (frames === paths.frames) return paths;
  const scale = paths.frames > 1 ? (frames - 1) / (paths.frames - 1) : 0;
  const tracks = paths.tracks.map((track) => {
    const best = new Map();
    for (const key of track.keys) {
      const place = key.frame * scale;
      const frame = Math.floor(place + 0.5);
      const moved = Math.abs(place - frame);
      if (!best.has(frame) || moved < best.get(frame).moved) {
        best.set(frame, { moved, key: { ...key, frame } });
      }
    }
    return { ...track, keys: inOrder([...best.values()].map(({ key }) => key)) };
  });
  return { frames, tracks };
}

/** A box that some of the picture lies in, not too thin and not too large. */
export function kept({ x, y, w, h }) {
  const side = (length) => Math.min(WIDEST, Math.max(THINNEST, length));
  const [width, height] = [side(w), side(h)];
  const place = (at, length) => Math.min(1 - THINNEST, Math.max(THINNEST - length, at));
  return { x: place(x, width), y: place(y, height), w: width, h: height };
}

/** A new subject whose box stays where it is drawn; as it was where there are too many. */
export function addTrack(paths, box, frame) {
  if (paths.tracks.length >= MOST_TRACKS) return paths;
  const track = { id: freeName(paths, ""), keys: [{ frame, ...kept(box), ease: "linear" }] };
  return { ...paths, tracks: [...paths.tracks, track] };
}

/** One more subject on a copied path, `by` further right and down. */
export function addCopy(paths, { id, keys, frames }, by = 0) {
  if (paths.tracks.length >= MOST_TRACKS) return paths;
  const moved = keys.map((key) => ({ ...key, ...kept({ ...key, x: key.x + by, y: key.y + by }) }));
  const copy = { id: freeName(paths, id), keys: moved };
  const { tracks } = retimed({ frames, tracks: [copy] }, paths.frames);
  return { ...paths, tracks: [...paths.tracks, ...tracks] };
}

export function removeTrack(paths, index) {
  return { ...paths, tracks: paths.tracks.filter((_, at) => at !== index) };
}

/** Another name; as it was where it is empty or another subject's. */
export function renamed(paths, index, name) {
  const id = name.trim().slice(0, LONGEST_NAME);
  if (!id || paths.tracks.some((track) => track.id === id)) return paths;
  return changed(paths, index, (track) => ({ ...track, id }));
}

/** The key frame at a frame, or undefined. */
export function keyAt(track, frame) {
  return track.keys.find((key) => key.frame === frame);
}

/** The key frame whose ease a frame follows: at it or before it, else the first one. */
export function keyBefore(track, frame) {
  return track.keys.findLast((key) => key.frame <= frame) ?? track.keys[0];
}

/** A key frame with a box; a new one eases as the one before it. */
export function setKey(paths, index, frame, box) {
  return changed(paths, index, (track) => {
    const { ease } = keyBefore(track, frame);
    const others = track.keys.filter((key) => key.frame !== frame);
    return { ...track, keys: inOrder([...others, { frame, ...kept(box), ease }]) };
  });
}

/** A key frame with the box that is there already. */
export function holdKey(paths, index, frame) {
  const track = paths.tracks[index];
  return !track || keyAt(track, frame) ? paths : setKey(paths, index, frame, boxAt(track, frame));
}

/** Without a key frame; without the subject where it was the only one. */
export function removeKey(paths, index, frame) {
  const track = paths.tracks[index];
  if (!track || !keyAt(track, frame)) return paths;
  if (track.keys.length === 1) return removeTrack(paths, index);
  const keys = track.keys.filter((key) => key.frame !== frame);
  return changed(paths, index, () => ({ ...track, keys }));
}

/** A key frame at another frame; what is there gives way. */
export function moveKey(paths, index, from, to) {
  const key = paths.tracks[index] && keyAt(paths.tracks[index], from);
  const frame = Math.min(paths.frames - 1, Math.max(0, to));
  if (!key || frame === from) return paths;
  return changed(paths, index, (track) => {
    const others = track.keys.filter((one) => one.frame !== from && one.frame !== frame);
    return { ...track, keys: inOrder([...others, { ...key, frame }]) };
  });
}

/** The stretch that a frame lies in eases in another way. */
export function setEase(paths, index, frame, ease) {
  if (!(ease in EASES) || !paths.tracks[index]) return paths;
  const held = keyBefore(paths.tracks[index], frame);
  if (held.ease === ease) return paths;
  return changed(paths, index, (track) => ({
    ...track,
    keys: track.keys.map((key) => (key === held ? { ...key, ease } : key)),
  }));
}

/** From a frame on along a drawn line to the clip's end; as it was where the line has no length. */
export function follow(paths, index, frame, line) {
  const track = paths.tracks[index];
  if (!track) return paths;
  const added = along(boxAt(track, frame), line, frame, paths.frames - 1);
  if (!added) return paths;
  const before = track.keys.filter((key) => key.frame < frame);
  const keys = [...before, ...added.map((key) => ({ ...key, ...kept(key) }))];
  return changed(paths, index, () => ({ ...track, keys }));
}

/**
 * A box with a hand on it: `part` is "move" or a corner ("00" upper left, "11" lower right), moved
 * by {x, y} in shares. The opposite corner stays; the box does not turn inside out.
 */
export function dragged(box, part, by) {
  if (part === "move") return kept({ ...box, x: box.x + by.x, y: box.y + by.y });
  const next = boxOf(box);
  for (const [at, place, length] of [
    [0, "x", "w"],
    [1, "y", "h"],
  ]) {
    if (part[at] === "1") next[length] = Math.max(THINNEST, box[length] + by[place]);
    else {
      const change = Math.min(by[place], box[length] - THINNEST);
      next[place] = box[place] + change;
      next[length] = box[length] - change;
    }
  }
  return kept(next);
}

/** The box between two corners in any order, or null where they are too close. */
export function between(a, b) {
  const box = {
    x: Math.min(a.x, b.x),
    y: Math.min(a.y, b.y),
    w: Math.abs(a.x - b.x),
    h: Math.abs(a.y - b.y),
  };
  return box.w < THINNEST || box.h < THINNEST ? null : kept(box);
}

function readTrack(track, frames) {
  const { id, keyframes, ...rest } = track ?? {};
  if (Object.keys(rest).length || typeof id !== "string" || !id || id.length > LONGEST_NAME) {
    return null;
  }
  if (!Array.isArray(keyframes) || !keyframes.length || keyframes.length > frames) return null;
  const keys = inOrder(keyframes.map((key) => ({ ease: "linear", ...key })));
  const good = keys.every((key, at) => isKey(key, frames) && key.frame !== keys[at - 1]?.frame);
  return good ? { id, keys } : null;
}

function isKey({ frame, ease, x, y, w, h, ...rest }, frames) {
  const inside = x < 1 && y < 1 && x + w > 0 && y + h > 0 && w > 0 && h > 0;
  return (
    !Object.keys(rest).length &&
    Number.isInteger(frame) &&
    frame >= 0 &&
    frame < frames &&
    Object.hasOwn(EASES, ease) &&
    [x, y, w, h].every(Number.isFinite) &&
    inside &&
    Math.max(...[x, y, x + w, y + h].map(Math.abs)) <= FARTHEST
  );
}

function isFrames(frames) {
  return Number.isInteger(frames) && frames >= 1 && frames <= MOST_FRAMES;
}

function inOrder(keys) {
  return keys.sort((a, b) => a.frame - b.frame);
}

function changed(paths, index, change) {
  const old = paths.tracks[index];
  if (!old) return paths;
  const track = change(old);
  return { ...paths, tracks: paths.tracks.map((one) => (one === old ? track : one)) };
}

/** The first letter that no subject has, or the name with a number. */
function freeName({ tracks }, name) {
  const taken = new Set(tracks.map((track) => track.id));
  if (!name) name = [..."abcdefghijklmnopqrstuvwxyz"].find((letter) => !taken.has(letter));
  let free = name;
  for (let number = 2; taken.has(free); number++) {
    const ending = ` ${number}`;
    free = name.slice(0, LONGEST_NAME - ending.length) + ending;
  }
  return free;
}

function rounded(value) {
  return Math.round(value * 1e5) / 1e5;
}

/** Whether two boxes are the same to the text's precision. */
export function sameBox(a, b) {
  return SIDES.every((side) => rounded(a[side]) === rounded(b[side]));
}
