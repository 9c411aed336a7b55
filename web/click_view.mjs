// Where a picture lies on the stage of an editor, zoomed and moved, and what lies under a finger.

/** The whole picture. `x` and `y`: what of the picture is in the middle of the stage. */
export const WHOLE = Object.freeze({ zoom: 1, x: 0.5, y: 0.5 });
export const CLOSEST = 32;

/** The picture's rectangle on a stage, in the stage's pixels. */
export function rectangle(view, stage, picture) {
  const scale = fittingScale(stage, picture) * view.zoom;
  const [width, height] = [picture.width * scale, picture.height * scale];
  return {
    x: stage.width / 2 - view.x * width,
    y: stage.height / 2 - view.y * height,
    width,
    height,
  };
}

/** A place on the stage as shares of the picture; beyond 0 to 1 outside of it. */
export function toPicture(rect, { x, y }) {
  return { x: (x - rect.x) / rect.width, y: (y - rect.y) / rect.height };
}

export function toStage(rect, { x, y }) {
  return { x: rect.x + x * rect.width, y: rect.y + y * rect.height };
}

export function contains({ x, y }) {
  return x >= 0 && x <= 1 && y >= 0 && y <= 1;
}

/** Closer by a factor; what lies at a place of the stage stays there. */
export function zoomed(view, factor, at, stage, picture) {
  const held = toPicture(rectangle(view, stage, picture), at);
  const zoom = Math.min(CLOSEST, Math.max(1, view.zoom * factor));
  const scale = fittingScale(stage, picture) * zoom;
  return within(
    {
      zoom,
      x: held.x - (at.x - stage.width / 2) / (picture.width * scale),
      y: held.y - (at.y - stage.height / 2) / (picture.height * scale),
    },
    stage,
    picture,
  );
}

/** Moved by pixels of the stage. */
export function panned(view, dx, dy, stage, picture) {
  const rect = rectangle(view, stage, picture);
  const next = { ...view, x: view.x - dx / rect.width, y: view.y - dy / rect.height };
  return within(next, stage, picture);
}

/**
 * What lies at a place of the stage, or null: {kind: "point", index} or {kind: "box", index, part},
 * part being "edge" or a corner ("00" upper left, "11" lower right). Later ones lie on top.
 */
export function hit(clicks, rect, at, reach) {
  const near = (place) => {
    const { x, y } = toStage(rect, place);
    return Math.hypot(x - at.x, y - at.y) <= reach;
  };
  const index = clicks.points.findLastIndex(near);
  if (index >= 0) return { kind: "point", index };
  for (let box = clicks.boxes.length - 1; box >= 0; box--) {
    const [x0, y0, x1, y1] = clicks.boxes[box];
    for (const [part, x, y] of corners(clicks.boxes[box])) {
      if (near({ x, y })) return { kind: "box", index: box, part };
    }
    const low = toStage(rect, { x: x0, y: y0 });
    const high = toStage(rect, { x: x1, y: y1 });
    const out = Math.max(low.x - at.x, at.x - high.x, low.y - at.y, at.y - high.y);
    // Distance to the outline, from either side.
    if (Math.abs(out) <= reach / 2) return { kind: "box", index: box, part: "edge" };
  }
  return null;
}

/** Corners of a box: [part, x, y]. */
export function corners([x0, y0, x1, y1]) {
  return [
    ["00", x0, y0],
    ["10", x1, y0],
    ["01", x0, y1],
    ["11", x1, y1],
  ];
}

function fittingScale(stage, picture) {
  return Math.min(stage.width / picture.width, stage.height / picture.height);
}

/** No empty space beside the picture where it is larger than the stage. */
function within(view, stage, picture) {
  const scale = fittingScale(stage, picture) * view.zoom;
  const held = (value, size, room) => {
    const half = room / (size * scale) / 2;
    return half >= 0.5 ? 0.5 : Math.min(1 - half, Math.max(half, value));
  };
  return {
    zoom: view.zoom,
    x: held(view.x, picture.width, stage.width),
    y: held(view.y, picture.height, stage.height),
  };
}
