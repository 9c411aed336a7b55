// What all editors build their parts from: elements, icons, pictures.

/** Which way the arrow keys go, by their names. */
export const ARROWS = Object.freeze({
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
  ArrowUp: [0, -1],
  ArrowDown: [0, 1],
});

/** An element with attributes and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A picture of 16 x 16 for a button, from a path's text. */
export function iconOf(shape) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", shape);
  svg.append(path);
  return svg;
}

/** A promise of the decoded picture at an address. */
export async function fetchPicture(url) {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  return picture;
}

/** An event's place in an element's own pixels: a zoomed graph scales the whole editor. */
export function placeIn(element, event) {
  const box = element.getBoundingClientRect();
  const scale = box.width / element.clientWidth || 1;
  return { x: (event.clientX - box.left) / scale, y: (event.clientY - box.top) / scale };
}

/** A canvas' context, its pixels fitted to a size on the page and wiped. */
export function freshContext(canvas, { width, height }) {
  const ratio = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) {
    [canvas.width, canvas.height] = [across, down];
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
