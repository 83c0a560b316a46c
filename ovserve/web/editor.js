// The editor: shows the picture with its mask, paints, zooms, and extends the frame. Emits "change" when something to send changed.

import {Mask, maskFromPicture} from "./mask.js";

const MAX_MARGIN = 4096;  // pixels; the server's largest result is 4096 by default
const MARGIN_NAMES = ["left", "top", "right", "bottom"];
const MASK_OPACITY = 0.6;
const EDGE_PX = 14;  // how near to an edge of the frame a pointer takes hold of it

export class Editor extends EventTarget {
  constructor(canvas) {
    super();
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.scratch = document.createElement("canvas");
    this.mask = new Mask();
    this.picture = null;
    this.file = null;
    this.tool = "brush";
    this.size = 24;  // of the brush, percent of the longer side / 2
    this.hardness = 0.8;
    this.margins = {left: 0, top: 0, right: 0, bottom: 0};
    this.view = {scale: 1, x: 0, y: 0};  // canvas pixel = frame pixel * scale + (x, y)
    this.cursor = null;  // in pixels of the picture
    this.drag = null;
    this.pointers = new Map();
    this.spaceHeld = false;
    new ResizeObserver(() => { this.fit(); }).observe(canvas);
    canvas.addEventListener("pointerdown", event => this.pointerDown(event));
    canvas.addEventListener("pointermove", event => this.pointerMove(event));
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, event => this.pointerUp(event));
    canvas.addEventListener("pointerleave", () => { if (document.activeElement !== canvas) { this.cursor = null; this.render(); } });
    canvas.addEventListener("wheel", event => this.wheel(event), {passive: false});
    canvas.addEventListener("keydown", event => this.keyDown(event));
    canvas.addEventListener("keyup", event => { if (event.key === " ") this.spaceHeld = false; });
    canvas.addEventListener("blur", () => { this.spaceHeld = false; this.cursor = null; this.render(); });
  }

  get width() { return this.picture.width + this.margins.left + this.margins.right; }
  get height() { return this.picture.height + this.margins.top + this.margins.bottom; }
  get brushPx() { return Math.max(1, this.size / 200 * Math.max(this.picture.width, this.picture.height)); }
  get hasMargins() { return MARGIN_NAMES.some(name => this.margins[name] > 0); }

  // Show another picture: an ImageBitmap, and the file that it was read from.
  load(picture, file) {
    this.picture = picture;
    this.file = file;
    this.margins = {left: 0, top: 0, right: 0, bottom: 0};
    this.mask.operations = [];
    this.mask.reset();
    this.mask.base = null;
    this.mask.resize(picture.width, picture.height, 0, 0);
    this.fit();
    this.changed();
  }

  unload() {
    this.picture = this.file = null;
    this.mask.reset();
    this.changed();
  }

  changed() {
    this.render();
    this.dispatchEvent(new Event("change"));
  }

  setTool(tool) {
    this.tool = tool;
    this.canvas.style.cursor = {pan: "grab", frame: "move"}[tool] || "crosshair";
    this.render();
    this.dispatchEvent(new Event("tool"));
  }

  setMargins(margins) {
    for (const name of MARGIN_NAMES) {
      const value = Math.round(Number(margins[name] ?? this.margins[name]) || 0);
      this.margins[name] = Math.min(Math.max(value, 0), MAX_MARGIN);
    }
    this.mask.resize(this.width, this.height, this.margins.left, this.margins.top);
    this.changed();
  }

  edit(operation) {
    this.mask.add(operation);
    this.changed();
  }

  loadMask(picture) {
    this.edit({kind: "picture", picture: maskFromPicture(picture, this.picture.width, this.picture.height)});
  }

  undo() { this.mask.undo(); this.changed(); }
  redo() { this.mask.redo(); this.changed(); }

  // --- what is sent ---------------------------------------------------------------------------------------------------

  // Return {image, name, mask}: the file itself, or the picture in its larger frame; mask is null if nothing is painted.
  async input() {
    const isPainted = this.mask.isPainted();
    if (!this.hasMargins) return {image: this.file, name: this.file.name, mask: isPainted ? await blobOf(this.mask.canvas) : null};
    const frame = canvasOf(this.width, this.height), context = frame.getContext("2d");
    this.drawBackdrop(context);
    context.drawImage(this.picture, this.margins.left, this.margins.top);
    const mask = canvasOf(this.width, this.height), pen = mask.getContext("2d");
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, mask.width, mask.height);
    pen.drawImage(this.mask.canvas, this.margins.left, this.margins.top, this.picture.width, this.picture.height,
      this.margins.left, this.margins.top, this.picture.width, this.picture.height);
    return {image: await blobOf(frame), name: "extended.png", mask: await blobOf(mask)};
  }

  // Continue the picture's edges into the margins: a model that starts from the picture starts from its colours there.
  drawBackdrop(context) {
    const {left, top} = this.margins, {width, height} = this.picture;
    const right = this.width - left - width, bottom = this.height - top - height;
    context.imageSmoothingEnabled = true;
    const parts = [
      [0, 0, 1, height, 0, top, left, height], [width - 1, 0, 1, height, left + width, top, right, height],
      [0, 0, width, 1, left, 0, width, top], [0, height - 1, width, 1, left, top + height, width, bottom],
      [0, 0, 1, 1, 0, 0, left, top], [width - 1, 0, 1, 1, left + width, 0, right, top],
      [0, height - 1, 1, 1, 0, top + height, left, bottom],
      [width - 1, height - 1, 1, 1, left + width, top + height, right, bottom],
    ];
    for (const part of parts) if (part[6] > 0 && part[7] > 0) context.drawImage(this.picture, ...part);
  }

  // --- view -------------------------------------------------------------------------------------------------------------

  fit() {
    const {canvas} = this, ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (!this.picture) return;
    const scale = Math.min(canvas.width / this.width, canvas.height / this.height) * (this.tool === "frame" ? 0.8 : 0.96);
    this.view = {scale, x: (canvas.width - this.width * scale) / 2, y: (canvas.height - this.height * scale) / 2};
    this.render();
  }

  zoom(factor, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    const scale = Math.min(Math.max(this.view.scale * factor, 0.02), 64), ratio = scale / this.view.scale;
    this.view = {scale, x: x - (x - this.view.x) * ratio, y: y - (y - this.view.y) * ratio};
    this.render();
  }

  pan(x, y) {
    this.view.x += x;
    this.view.y += y;
    this.render();
  }

  render() {
    const {canvas, context, view, picture} = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!picture) return;
    context.save();
    context.setTransform(view.scale, 0, 0, view.scale, view.x, view.y);
    context.beginPath();
    context.rect(0, 0, this.width, this.height);
    context.clip();
    context.fillStyle = "#888";
    context.fillRect(0, 0, this.width, this.height);
    if (this.hasMargins) this.drawBackdrop(context);
    context.imageSmoothingEnabled = view.scale < 4;
    context.drawImage(picture, this.margins.left, this.margins.top);
    context.setTransform(1, 0, 0, 1, 0, 0);
    this.renderMask();
    context.restore();
    if (this.hasMargins || this.tool === "frame") this.renderFrame();
    if (this.cursor && (this.tool === "brush" || this.tool === "eraser")) this.renderCursor();
  }

  // Cover what will be repainted with stripes, which show on pictures of every colour:
  // picture * (1 - a * mask) + stripes * a * mask, in two passes.
  renderMask() {
    const {canvas, context, scratch, view} = this;
    if (!this.mask.operations.length && !this.mask.base) return;
    if (scratch.width !== canvas.width || scratch.height !== canvas.height) { scratch.width = canvas.width; scratch.height = canvas.height; }
    const pen = scratch.getContext("2d");
    const place = [view.x, view.y, this.width * view.scale, this.height * view.scale];
    pen.globalCompositeOperation = "source-over";
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, scratch.width, scratch.height);
    pen.globalCompositeOperation = "difference";
    pen.globalAlpha = MASK_OPACITY;
    pen.drawImage(this.mask.canvas, ...place);
    pen.globalAlpha = 1;
    context.globalCompositeOperation = "multiply";
    context.drawImage(scratch, 0, 0);
    pen.globalCompositeOperation = "source-over";
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, scratch.width, scratch.height);
    pen.drawImage(this.mask.canvas, ...place);
    pen.globalCompositeOperation = "multiply";
    pen.fillStyle = this.stripes ||= pen.createPattern(stripesOf(MASK_OPACITY), "repeat");
    pen.fillRect(0, 0, scratch.width, scratch.height);
    context.globalCompositeOperation = "lighter";
    context.drawImage(scratch, 0, 0);
    context.globalCompositeOperation = "source-over";
  }

  renderFrame() {
    const {context, view} = this;
    context.strokeStyle = "#2457d6";
    context.lineWidth = 3;
    context.setLineDash([10, 6]);
    context.strokeRect(view.x, view.y, this.width * view.scale, this.height * view.scale);
    context.setLineDash([]);
    if (this.tool !== "frame") return;
    context.fillStyle = "#2457d6";
    const [x0, y0, x1, y1] = [view.x, view.y, view.x + this.width * view.scale, view.y + this.height * view.scale];
    for (const [x, y] of [[x0, (y0 + y1) / 2], [x1, (y0 + y1) / 2], [(x0 + x1) / 2, y0], [(x0 + x1) / 2, y1]]) {
      context.fillRect(x - 9, y - 9, 18, 18);
    }
  }

  renderCursor() {
    const {context, view} = this, [x, y] = this.cursor;
    const centre = [(x + this.margins.left) * view.scale + view.x, (y + this.margins.top) * view.scale + view.y];
    for (const [colour, width] of [["#000", 3], ["#fff", 1.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.beginPath();
      context.arc(...centre, Math.max(this.brushPx / 2 * view.scale, 2), 0, Math.PI * 2);
      context.stroke();
    }
  }

  // --- input --------------------------------------------------------------------------------------------------------------

  onCanvas(event) {
    const box = this.canvas.getBoundingClientRect(), ratio = this.canvas.width / box.width;
    return [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
  }

  onPicture([x, y]) {
    return [(x - this.view.x) / this.view.scale - this.margins.left, (y - this.view.y) / this.view.scale - this.margins.top];
  }

  edgesNear([x, y]) {
    const {view} = this, reach = EDGE_PX * (window.devicePixelRatio || 1);
    const x1 = view.x + this.width * view.scale, y1 = view.y + this.height * view.scale;
    if (x < view.x - reach || x > x1 + reach || y < view.y - reach || y > y1 + reach) return [];
    const near = [];
    if (Math.abs(x - view.x) < reach) near.push("left");
    if (Math.abs(x - x1) < reach) near.push("right");
    if (Math.abs(y - view.y) < reach) near.push("top");
    if (Math.abs(y - y1) < reach) near.push("bottom");
    return near;
  }

  pointerDown(event) {
    if (!this.picture || (event.pointerType === "mouse" && event.button > 1)) return;
    this.canvas.setPointerCapture(event.pointerId);
    const point = this.onCanvas(event);
    this.pointers.set(event.pointerId, point);
    if (this.pointers.size === 2) return this.startPinch();
    if (this.tool === "pan" || this.spaceHeld || event.button === 1) { this.drag = {kind: "pan", point}; return; }
    if (this.tool === "frame") {
      const edges = this.edgesNear(point);
      this.drag = edges.length ? {kind: "frame", edges, point, margins: {...this.margins}} : {kind: "pan", point};
      return;
    }
    this.cursor = this.onPicture(point);
    this.drag = {kind: "stroke"};
    this.startStroke(this.cursor);
  }

  startStroke(point) {
    this.mask.add({kind: "stroke", points: [point], size: this.brushPx, hardness: this.hardness, erase: this.tool === "eraser"});
    this.changed();
  }

  startPinch() {
    if (this.drag?.kind === "stroke") this.mask.undo();  // the first finger of a pinch paints a dot
    this.drag = {kind: "pinch"};
    this.changed();
  }

  pointerMove(event) {
    if (!this.picture) return;
    const point = this.onCanvas(event), before = this.pointers.get(event.pointerId);
    this.cursor = this.onPicture(point);
    if (!before || !this.drag) return this.render();
    this.pointers.set(event.pointerId, point);
    if (this.drag.kind === "pinch") return this.pinch(event.pointerId, before, point);
    if (this.drag.kind === "pan") return this.pan(point[0] - before[0], point[1] - before[1]);
    if (this.drag.kind === "frame") return this.dragFrame(point);
    for (const each of event.getCoalescedEvents?.() ?? [event]) this.mask.extend(this.onPicture(this.onCanvas(each)));
    this.render();
  }

  pinch(id, before, now) {
    const other = [...this.pointers].find(([key]) => key !== id)?.[1];
    if (!other) return;
    const span = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
    this.pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
    this.zoom(span(now, other) / Math.max(span(before, other), 1), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  }

  dragFrame(point) {
    const {edges, margins} = this.drag, wanted = {};
    for (const edge of edges) {
      const axis = edge === "left" || edge === "right" ? 0 : 1, sign = edge === "left" || edge === "top" ? -1 : 1;
      wanted[edge] = margins[edge] + sign * (point[axis] - this.drag.point[axis]) / this.view.scale;
    }
    const {left, top} = this.margins;
    this.setMargins(wanted);
    // The picture stays where it is on the screen.
    this.pan((left - this.margins.left) * this.view.scale, (top - this.margins.top) * this.view.scale);
  }

  pointerUp(event) {
    this.pointers.delete(event.pointerId);
    if (this.drag && this.drag.kind !== "pinch") { this.drag = null; this.changed(); }
    if (!this.pointers.size) this.drag = null;
  }

  wheel(event) {
    if (!this.picture || !(event.ctrlKey || event.metaKey || document.activeElement === this.canvas)) return;  // the page scrolls
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY / 300), ...this.onCanvas(event));
  }

  keyDown(event) {
    if (!this.picture || event.altKey) return;
    const key = event.key.toLowerCase(), isCommand = event.ctrlKey || event.metaKey;
    if (isCommand && (key === "z" || key === "y")) {
      event.preventDefault();
      return key === "y" || event.shiftKey ? this.redo() : this.undo();
    }
    if (isCommand) return;
    const arrows = {arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1]};
    const tools = {b: "brush", e: "eraser", h: "pan", f: "frame"};
    if (key in arrows) this.moveCursor(arrows[key], event.shiftKey);
    else if (key in tools) this.setTool(tools[key]);
    else if (key === "enter") this.paintAtCursor();
    else if (key === " ") this.spaceHeld = true;
    else if (key === "[" || key === "]") this.resizeBrush(key === "]" ? 1 : -1);
    else if (key === "+" || key === "=") this.zoom(1.25);
    else if (key === "-") this.zoom(0.8);
    else if (key === "0") this.fit();
    else return;
    event.preventDefault();
  }

  moveCursor([x, y], isFast) {
    if (this.tool === "pan") return this.pan(-40 * x, -40 * y);
    const step = Math.max(1, this.brushPx / (isFast ? 1 : 4));
    const [left, top] = this.cursor || [this.picture.width / 2, this.picture.height / 2];
    this.cursor = [left + x * step, top + y * step];
    this.render();
  }

  paintAtCursor() {
    if (this.tool !== "brush" && this.tool !== "eraser") return;
    this.cursor ||= [this.picture.width / 2, this.picture.height / 2];
    this.startStroke(this.cursor);
  }

  resizeBrush(direction) {
    this.size = Math.min(100, Math.max(1, Math.round(this.size * (direction > 0 ? 1.25 : 0.8)) + direction));
    this.render();
    this.dispatchEvent(new Event("tool"));
  }
}

// A tile of diagonal stripes, multiplied by the opacity: the caller adds it to the picture.
function stripesOf(opacity) {
  const canvas = canvasOf(16, 16), context = canvas.getContext("2d");
  for (let x = 0; x < 16; x += 1) {
    for (let y = 0; y < 16; y += 1) {
      const colour = (x + y) % 16 < 8 ? [255, 0, 160] : [255, 255, 255];
      context.fillStyle = `rgb(${colour.map(value => Math.round(value * opacity)).join(", ")})`;
      context.fillRect(x, y, 1, 1);
    }
  }
  return canvas;
}

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

function blobOf(canvas) {
  return new Promise((resolve, reject) => {
    canvas.toBlob(blob => (blob ? resolve(blob) : reject(new Error("The picture is too large for this browser."))), "image/png");
  });
}
