// The film on a canvas: 16-bit levels, resampled to what is seen, windowed by a table. It knows no keys and no server.

import { pyramid, resample, turned } from "./resample.js";
import { asWindow, pixelTable } from "./voi.js";

const LENS_SIDE = 280; // CSS pixels
const LENS_POWER = 2.5; // times what is seen, and at least one film pixel a screen pixel
const MOST_ZOOM = 16; // screen pixels a film pixel

export class Viewer extends EventTarget {
  constructor(base, overlay) {
    super();
    this.base = base;
    this.overlay = overlay;
    this.context = base.getContext("2d", { alpha: false, willReadFrequently: false });
    this.overlayContext = overlay.getContext("2d");
    this.film = null;
    this.isBlank = false;
    this.lens = null; // {x, y} in CSS pixels, while it is held
    this.modelView = null; // {bitmap, box}
    this.split = null; // 0..1 of the width, while the model's view is shown
    this.lastMilliseconds = 0;
    this.table = null;
    this.watch = new ResizeObserver(() => this.resize());
    this.watch.observe(base.parentElement);
    this.resize();
  }

  // ---- The film ----

  show(film, levels) {
    this.film = film;
    this.stored = { levels, width: film.columns, height: film.rows };
    this.modelView = null;
    this.split = null;
    this.isInverted = false;
    this.quarters = 0;
    this.scale = 1;
    this.choose(0);
    this.turn(0);
  }

  clear() {
    this.film = null;
    this.steps = null;
    this.modelView = null;
    this.split = null;
    this.draw();
  }

  turn(quarters) {
    this.quarters = quarters;
    const upright = turned(this.stored, quarters);
    this.width = upright.width;
    this.height = upright.height;
    // A turned film's pixels are as high as they were wide.
    this.aspect = quarters % 2 ? 1 / this.film.aspect : this.film.aspect;
    this.steps = pyramid(upright.levels, upright.width, upright.height, this.film.padding);
    if (quarters) this.split = null;
    this.fit();
  }

  // ---- The window ----

  choose(index) {
    const offered = this.film.windows[index];
    if (!offered) return;
    this.chosen = offered;
    this.chosenIndex = index;
    this.retable();
  }

  setWindow(center, width) {
    const before = asWindow(this.chosen);
    const least = before.function === "LINEAR" ? 1 : this.film.slope / 4;
    this.chosen = { ...before, center, width: Math.max(least, width), name: "" };
    this.chosenIndex = null;
    this.retable();
  }

  dragWindow(across, down) {
    const [lowest, highest] = this.film.levels_range;
    // The whole range is about a thousand screen pixels; a narrow window moves in finer steps.
    const { center, width } = asWindow(this.chosen);
    const range = Math.max(1, highest - lowest) * this.film.slope;
    const step = Math.max(range / 16384, Math.min(range, 2 * width) / 1024);
    const sign = this.film.inverted !== this.isInverted ? -1 : 1;
    this.setWindow(center + sign * down * step, width + across * step);
  }

  invert() {
    this.isInverted = !this.isInverted;
    this.retable();
  }

  retable() {
    this.table = pixelTable(this.film, this.chosen, this.isInverted, this.table ?? undefined);
    this.draw();
    this.changed();
  }

  // ---- The place ----

  // How many screen pixels a film pixel is wide; its height follows from its aspect.
  fitScale() {
    return Math.min(this.base.width / this.width, this.base.height / (this.height * this.aspect));
  }

  fit() {
    this.scale = this.fitScale();
    this.isFitted = true;
    this.centerX = this.width / 2;
    this.centerY = this.height / 2;
    this.moved();
  }

  oneToOne() {
    this.zoomTo(1, this.base.width / 2, this.base.height / 2);
  }

  reset() {
    this.isInverted = false;
    if (this.quarters) this.turn(0);
    this.choose(0);
    this.fit();
  }

  // Around a place in screen pixels, which stays where it is.
  zoomTo(scale, x, y) {
    const place = this.filmPlace(x, y);
    this.isFitted = false;
    this.scale = Math.min(MOST_ZOOM, Math.max(Math.min(1, this.fitScale()) / 2, scale));
    this.centerX = place.x - (x - this.base.width / 2) / this.scale;
    this.centerY = place.y - (y - this.base.height / 2) / (this.scale * this.aspect);
    this.moved();
  }

  zoomBy(factor, x = this.base.width / 2, y = this.base.height / 2) {
    this.zoomTo(this.scale * factor, x, y);
  }

  pan(across, down) {
    this.isFitted = false;
    this.centerX -= across / this.scale;
    this.centerY -= down / (this.scale * this.aspect);
    this.moved();
  }

  filmPlace(x, y) {
    return {
      x: this.centerX + (x - this.base.width / 2) / this.scale,
      y: this.centerY + (y - this.base.height / 2) / (this.scale * this.aspect),
    };
  }

  moved() {
    if (!this.film) return;
    // The film's centre stays on the screen: it cannot be lost.
    this.centerX = Math.min(this.width, Math.max(0, this.centerX));
    this.centerY = Math.min(this.height, Math.max(0, this.centerY));
    this.seen = null;
    this.draw();
    this.changed();
  }

  resize() {
    const box = this.base.parentElement.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(box.width * ratio));
    const height = Math.max(1, Math.round(box.height * ratio));
    if (width === this.base.width && height === this.base.height) return;
    for (const canvas of [this.base, this.overlay]) {
      canvas.width = width;
      canvas.height = height;
    }
    this.seen = null;
    if (!this.film) this.draw();
    else if (this.isFitted) this.fit();
    else this.moved();
  }

  // ---- Drawing ----

  changed() {
    this.dispatchEvent(new Event("changed"));
  }

  // Once a frame, however many events ask for it.
  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = null;
      this.drawNow();
    });
  }

  drawNow() {
    const begun = performance.now();
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, this.base.width, this.base.height);
    this.overlayContext.clearRect(0, 0, this.overlay.width, this.overlay.height);
    if (!this.film || this.isBlank) return;
    this.drawFilm();
    this.drawModelView();
    this.drawLens();
    this.lastMilliseconds = performance.now() - begun;
  }

  // Where the film lies on the screen, in screen pixels, seen or not; corners on whole pixels.
  extent() {
    const left = this.base.width / 2 - this.centerX * this.scale;
    const top = this.base.height / 2 - this.centerY * this.scale * this.aspect;
    return {
      left: Math.round(left),
      top: Math.round(top),
      width: this.width * this.scale,
      height: this.height * this.scale * this.aspect,
    };
  }

  drawFilm() {
    const { left, top, width, height } = this.extent();
    const from = { x: Math.max(0, left), y: Math.max(0, top) };
    const to = {
      x: Math.min(this.base.width, Math.round(left + width)),
      y: Math.min(this.base.height, Math.round(top + height)),
    };
    const columns = to.x - from.x;
    const rows = to.y - from.y;
    if (columns <= 0 || rows <= 0) return;
    // Only what is seen is resampled, and only when it has moved: a dragged window costs the table alone.
    if (!this.seen) {
      this.seen = this.resampled(from.x - left, from.y - top, this.scale, columns, rows, this.seenBuffer);
      this.seenBuffer = this.seen;
      if (this.image?.width !== columns || this.image?.height !== rows) {
        this.image = new ImageData(columns, rows);
        this.imagePixels = new Uint32Array(this.image.data.buffer);
      }
    }
    mapLevels(this.seen, this.table, this.imagePixels);
    this.context.putImageData(this.image, from.x, from.y);
  }

  resampled(x, y, scale, columns, rows, buffer) {
    const size = columns * rows;
    const out = buffer?.length === size ? buffer : new Uint16Array(size);
    const place = {
      left: x / scale,
      top: y / (scale * this.aspect),
      stepX: 1 / scale,
      stepY: 1 / (scale * this.aspect),
      columns,
      rows,
    };
    resample(this.steps, this.film.padding, place, out);
    return out;
  }

  drawModelView() {
    if (this.split === null || !this.modelView) return;
    const { bitmap, box } = this.modelView;
    const film = this.extent();
    // The film is the box of the model's picture; around it is the model's padding.
    const width = film.width / (box[2] - box[0]);
    const height = film.height / (box[3] - box[1]);
    const context = this.overlayContext;
    const edge = Math.round(this.split * this.overlay.width);
    context.save();
    context.beginPath();
    context.rect(edge, 0, this.overlay.width - edge, this.overlay.height);
    context.clip();
    context.fillStyle = "#000";
    context.fillRect(edge, 0, this.overlay.width - edge, this.overlay.height);
    // Its own pixels are shown, not a smooth guess at what lies between them.
    context.imageSmoothingEnabled = false;
    context.drawImage(bitmap, film.left - box[0] * width, film.top - box[1] * height, width, height);
    context.restore();
    context.fillStyle = "#f2c14e";
    context.fillRect(edge - 1, 0, 2, this.overlay.height);
  }

  drawLens() {
    if (!this.lens) return;
    const ratio = window.devicePixelRatio || 1;
    const side = Math.round(LENS_SIDE * ratio);
    const scale = Math.min(MOST_ZOOM, Math.max(1, this.scale * LENS_POWER));
    const x = Math.round(this.lens.x * ratio);
    const y = Math.round(this.lens.y * ratio);
    const place = this.filmPlace(x, y);
    const film = { x: place.x * scale - side / 2, y: place.y * scale * this.aspect - side / 2 };
    this.lensBuffer = this.resampled(film.x, film.y, scale, side, side, this.lensBuffer);
    if (this.lensImage?.width !== side) {
      this.lensImage = new ImageData(side, side);
      this.lensPixels = new Uint32Array(this.lensImage.data.buffer);
    }
    mapLevels(this.lensBuffer, this.table, this.lensPixels);
    const context = this.overlayContext;
    const left = x - (side >> 1);
    const top = y - (side >> 1);
    context.putImageData(this.lensImage, left, top);
    context.strokeStyle = "#f2c14e";
    context.lineWidth = 2;
    context.strokeRect(left + 1, top + 1, side - 2, side - 2);
  }
}

function mapLevels(levels, table, pixels) {
  for (let at = 0; at < levels.length; at += 1) pixels[at] = table[levels[at]];
}

/** Without tools: drag for the window, wheel for the zoom at its place, twice for the film as it came. */
export function followPointer(viewport, viewer) {
  viewport.addEventListener("pointerdown", (event) => { if (viewer.film) viewport.setPointerCapture(event.pointerId); });
  viewport.addEventListener("pointermove", (event) => {
    if (viewer.film && viewport.hasPointerCapture(event.pointerId)) viewer.dragWindow(event.movementX, event.movementY);
  });
  viewport.addEventListener("wheel", (event) => {
    if (!viewer.film) return;
    event.preventDefault();
    const box = viewport.getBoundingClientRect();
    const ratio = viewer.base.width / box.width;
    viewer.zoomBy(Math.exp(-event.deltaY / 500), (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
  }, { passive: false });
  viewport.addEventListener("dblclick", () => { if (viewer.film) viewer.reset(); });
}
