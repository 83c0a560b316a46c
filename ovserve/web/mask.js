// The mask: a list of operations, drawn on a canvas as a picture that is white where to repaint and black elsewhere.
//
// Undo takes the last operation back and draws the others again. Above MAX_OPERATIONS the oldest become part of a base picture.

const MAX_OPERATIONS = 200;

export class Mask {
  constructor() {
    this.canvas = document.createElement("canvas");
    this.context = this.canvas.getContext("2d", {willReadFrequently: true});  // isPainted reads it
    this.base = null;
    this.operations = [];
    this.undone = [];
    this.offset = [0, 0];
  }

  // Start with an empty mask.
  reset() {
    this.base = null;
    this.operations = [];
    this.undone = [];
    this.draw();
  }

  // Set the size of the frame, and where in it the picture's left upper corner is. Points of strokes are the picture's pixels.
  resize(width, height, left, top) {
    const [oldLeft, oldTop] = this.offset;
    if (this.base) this.base = moved(this.base, width, height, left - oldLeft, top - oldTop);
    this.canvas.width = width;
    this.canvas.height = height;
    this.offset = [left, top];
    this.draw();
  }

  // Add an operation: {kind: "stroke", points, size, hardness, erase}, {kind: "fill" | "clear" | "invert"}, {kind: "picture", picture}.
  add(operation) {
    this.undone = [];
    this.operations.push(operation);
    this.apply(operation);
    if (this.operations.length > MAX_OPERATIONS) this.flatten();
  }

  // Add a point to the last stroke.
  extend(point) {
    const stroke = this.operations[this.operations.length - 1];
    const last = stroke.points[stroke.points.length - 1];
    stroke.points.push(point);
    this.applyStroke({...stroke, points: [last, point]});
  }

  undo() {
    if (!this.operations.length) return;
    this.undone.push(this.operations.pop());
    this.draw();
  }

  redo() {
    if (!this.undone.length) return;
    const operation = this.undone.pop();
    this.operations.push(operation);
    this.apply(operation);
  }

  // Whether any pixel is to be repainted.
  isPainted() {
    if (!this.base && !this.operations.length) return false;
    const {data} = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    for (let k = 0; k < data.length; k += 4) if (data[k] > 0) return true;
    return false;
  }

  flatten() {
    const half = this.operations.splice(0, MAX_OPERATIONS / 2);
    const rest = this.operations;
    this.operations = half;
    this.draw();
    this.base = moved(this.canvas, this.canvas.width, this.canvas.height, 0, 0);
    this.operations = rest;
    this.draw();
  }

  draw() {
    const {canvas, context} = this;
    context.globalCompositeOperation = "source-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (this.base) context.drawImage(this.base, 0, 0);
    for (const operation of this.operations) this.apply(operation);
  }

  apply(operation) {
    const {canvas, context} = this;
    if (operation.kind === "stroke") return this.applyStroke(operation);
    context.globalCompositeOperation = operation.kind === "invert" ? "difference" : "source-over";
    if (operation.kind === "picture") {
      context.drawImage(operation.picture, ...this.offset);
    } else {
      context.fillStyle = operation.kind === "clear" ? "#000" : "#fff";
      context.fillRect(0, 0, canvas.width, canvas.height);
    }
    context.globalCompositeOperation = "source-over";
  }

  // Stamps overlap: "lighten" and "darken" keep the extreme of all stamps, so that a soft edge stays soft.
  applyStroke({points, size, hardness, erase}) {
    const {context} = this, radius = Math.max(size / 2, 0.5), [left, top] = this.offset;
    const stamp = stampOf(radius, hardness, erase);
    context.globalCompositeOperation = erase ? "darken" : "lighten";
    for (const [x, y] of pointsAlong(points, Math.max(radius / 4, 0.5))) {
      context.drawImage(stamp, x + left - stamp.width / 2, y + top - stamp.height / 2);
    }
    context.globalCompositeOperation = "source-over";
  }
}

function moved(source, width, height, x, y) {
  const copy = document.createElement("canvas");
  copy.width = width;
  copy.height = height;
  const context = copy.getContext("2d");
  context.fillRect(0, 0, width, height);
  context.drawImage(source, x, y);
  return copy;
}

let lastStamp = {key: ""};

function stampOf(radius, hardness, erase) {
  const key = `${radius} ${hardness} ${erase}`;
  if (lastStamp.key === key) return lastStamp.canvas;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.ceil(radius * 2) + 2;
  const context = canvas.getContext("2d"), middle = canvas.width / 2;
  const [inner, outer] = erase ? ["#000", "#fff"] : ["#fff", "#000"];
  const gradient = context.createRadialGradient(middle, middle, 0, middle, middle, radius);
  gradient.addColorStop(0, inner);
  gradient.addColorStop(Math.max(0, hardness * (radius - 1) / radius), inner);  // at least one pixel of soft edge
  gradient.addColorStop(1, outer);
  context.fillStyle = gradient;
  context.fillRect(0, 0, canvas.width, canvas.height);
  lastStamp = {key, canvas};
  return canvas;
}

function* pointsAlong(points, step) {
  yield points[0];
  for (let k = 1; k < points.length; k += 1) {
    const [x0, y0] = points[k - 1], [x1, y1] = points[k];
    const count = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0) / step));
    for (let j = 1; j <= count; j += 1) yield [x0 + (x1 - x0) * j / count, y0 + (y1 - y0) * j / count];
  }
}

// Turn a picture into a mask of the given size: white where its alpha is below 128, if there is such a pixel, else its brightness.
export function maskFromPicture(picture, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  const image = context.getImageData(0, 0, width, height), {data} = image;
  let usesAlpha = false;
  for (let k = 3; k < data.length && !usesAlpha; k += 4) usesAlpha = data[k] < 128;
  for (let k = 0; k < data.length; k += 4) {
    const value = usesAlpha ? 255 - data[k + 3] : 0.299 * data[k] + 0.587 * data[k + 1] + 0.114 * data[k + 2];
    data[k] = data[k + 1] = data[k + 2] = value;
    data[k + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
