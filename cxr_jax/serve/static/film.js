// The film's side of the room: opening films, corners and edges, presets, drags and the wheel.

import { byId, make, plain, replace } from "./dom.js";
import { fetchBytes, request } from "./server.js";
import { Viewer } from "./viewer.js";

const TOOLS = { window: "Window", zoom: "Zoom", pan: "Pan" };
const EDGES = ["top", "right", "bottom", "left"]; // clockwise, as turns go

export class FilmSide {
  constructor({ say, opened, mayLeave }) {
    this.say = say;
    this.mayLeave = mayLeave; // whether the film that is shown may go
    this.choice = 0; // counts what was asked for: the last film that was chosen is the one that is shown
    this.opened = opened;
    this.tool = "window";
    this.viewport = byId("viewport");
    this.viewer = new Viewer(byId("film"), byId("overlay"));
    // For tests and for the curious: what is drawn can be asked for.
    byId("film").viewer = this.viewer;
    this.viewer.addEventListener("changed", () => this.describe());
    this.listen();
    this.describe();
  }

  get film() {
    return this.viewer.film;
  }

  // ---- Opening ----

  async upload(file) {
    this.say(`Opening a file of ${(file.size / 2 ** 20).toFixed(1)} MiB ..`);
    const form = new FormData();
    // The name stays here: it may be a patient's.
    form.append("file", file, "film");
    await this.fetch(() => request("POST", "/room/images", form));
  }

  /** Show the film that a request brings, unless another was chosen meanwhile. */
  async fetch(ask) {
    const choice = ++this.choice;
    const film = await ask();
    if (choice === this.choice) await this.load(film);
  }

  async load(film) {
    const choice = ++this.choice;
    const answer = await fetchBytes(`/room/images/${film.sha256}/pixels`);
    const bytes = await answer.arrayBuffer();
    // What was typed while it came is saved under the film that it was typed for; an older choice comes too late.
    if (choice !== this.choice || !(await this.mayLeave()) || choice !== this.choice) return;
    if (bytes.byteLength !== 2 * film.rows * film.columns) throw new Error("the film came incomplete");
    this.viewer.show(film, new Uint16Array(bytes));
    this.showPresets();
    this.describe();
    byId("no-film").hidden = true;
    byId("tools").hidden = false;
    this.opened(film);
  }

  // ---- Windows ----

  showPresets() {
    const buttons = this.film.windows.map((window, index) =>
      make("button", {
        type: "button",
        className: "preset",
        text: index < 5 ? `${index + 1} ${plain(window.name, 40)}` : plain(window.name, 40),
        title: window.source === "file" ? "a window of the file" : "computed from the film's values",
        on: { click: () => this.viewer.choose(index) },
      }),
    );
    replace(byId("presets"), ...buttons);
  }

  setTool(name) {
    this.tool = name;
    this.describe();
  }

  // ---- The model's view ----

  async toggleModelView() {
    const { viewer, film } = this;
    if (!film) return;
    if (viewer.split !== null) {
      viewer.split = null;
    } else {
      if (viewer.quarters) return this.say("The model never sees a turned film: turn it back first.");
      if (!viewer.modelView) {
        const answer = await fetchBytes(`/room/images/${film.sha256}/model_view.png`);
        const box = (answer.headers.get("X-Film-Box") ?? "0,0,1,1").split(",").map(Number);
        const bitmap = await createImageBitmap(await answer.blob());
        // Half of one patient's film beside half of another's.
        if (this.film !== film) return;
        viewer.modelView = { bitmap, box };
      }
      viewer.split = 0.5;
    }
    viewer.draw();
    this.describe();
  }

  moveSplit(share) {
    if (this.viewer.split === null) return;
    this.viewer.split = Math.min(1, Math.max(0, share));
    this.viewer.draw();
    this.describe();
  }

  // ---- Magnifier, pause ----

  holdLens(isHeld) {
    const { viewer } = this;
    if (!this.film || isHeld === Boolean(viewer.lens)) return;
    const box = this.viewport.getBoundingClientRect();
    viewer.lens = isHeld ? (this.pointer ?? { x: box.width / 2, y: box.height / 2 }) : null;
    viewer.draw();
    this.describe();
  }

  blank(isBlank) {
    this.viewer.isBlank = isBlank;
    this.viewer.draw();
  }

  // ---- Keys, by the tool in hand ----

  arrow(across, down) {
    const { viewer } = this;
    if (!this.film) return;
    if (viewer.lens) {
      this.pointer = { x: viewer.lens.x + 20 * across, y: viewer.lens.y + 20 * down };
      viewer.lens = this.pointer;
      viewer.draw();
    } else if (viewer.split !== null && across) {
      this.moveSplit(viewer.split + 0.02 * across);
    } else if (this.tool === "window") {
      viewer.dragWindow(16 * across, 16 * down);
    } else if (this.tool === "zoom") {
      viewer.zoomBy(1.1 ** (across - down));
    } else {
      viewer.pan(-40 * across, -40 * down);
    }
  }

  turn(quarters) {
    if (!this.film) return;
    this.viewer.turn(quarters);
    byId("turn").value = String(quarters);
    this.describe();
  }

  // ---- What stands around the film ----

  describe() {
    const { viewer, film } = this;
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.setAttribute("aria-pressed", String(button.dataset.tool === this.tool));
    }
    if (!film) return;
    this.describeEdges();
    byId("corner-view").textContent = `${film.view === "unknown" ? "view not in the header" : film.view}`;
    byId("corner-size").textContent = `${film.columns} \u00d7 ${film.rows}, ${film.bits} bit, ${film.kind}`;
    byId("corner-window").textContent = this.windowWords();
    const percent = Math.round(100 * viewer.scale);
    byId("corner-zoom").textContent = `${viewer.isFitted ? "fitted, " : ""}${percent} %`;
    const isTurned = viewer.quarters !== 0;
    this.viewport.classList.toggle("turned", isTurned);
    byId("turned-words").hidden = !isTurned;
    byId("turned-words").textContent = `Turned by ${viewer.quarters * 90}\u00b0: not as stored`;
    byId("turn").value = String(viewer.quarters);
    byId("invert").setAttribute("aria-pressed", String(viewer.isInverted));
    byId("magnify").setAttribute("aria-pressed", String(Boolean(viewer.lens)));
    this.describeSplit();
    [...byId("presets").children].forEach((button, index) => {
      button.setAttribute("aria-pressed", String(index === viewer.chosenIndex));
    });
  }

  describeSplit() {
    const { split, modelView } = this.viewer;
    const isShown = split !== null && modelView !== null;
    byId("model-view").setAttribute("aria-pressed", String(isShown));
    byId("split-row").hidden = !isShown;
    byId("split-words").hidden = !isShown;
    if (!isShown) return;
    byId("split").value = String(Math.round(100 * split));
    const { bitmap } = modelView;
    byId("split-words").textContent = `as the model saw it: ${bitmap.width} \u00d7 ${bitmap.height} pixels, 8 bit`;
  }

  windowWords() {
    const { chosen, isInverted } = this.viewer;
    const name = chosen.name ? plain(chosen.name, 40) : "by hand";
    const inverse = isInverted ? ", inverted" : "";
    if (chosen.lut) return `${name} (table of ${chosen.lut.values.length})${inverse}`;
    const shape = chosen.function === "SIGMOID" ? ", sigmoid" : "";
    return `W ${short(chosen.width)} C ${short(chosen.center)} ${name}${shape}${inverse}`;
  }

  // The patient's sides, at the edges where they are now.
  describeEdges() {
    const { marker } = this.film;
    const letters = { left: marker.left, right: marker.right };
    EDGES.forEach((edge, index) => {
      const from = EDGES[(index - this.viewer.quarters + 4) % 4];
      byId(`edge-${edge}`).textContent = letters[from] ?? "";
    });
    byId("marker-source").textContent = marker.left
      ? `sides: ${marker.source}`
      : "side not in the header: trust the marker on the film alone";
  }

  // ---- Mouse ----

  listen() {
    const { viewport, viewer } = this;
    let drag = null;
    viewport.addEventListener("contextmenu", (event) => event.preventDefault());
    viewport.addEventListener("pointerdown", (event) => {
      if (!this.film || event.target.closest("button, input, select")) return;
      const tools = { 0: event.shiftKey ? "pan" : this.tool, 1: "pan", 2: "zoom" };
      drag = { tool: tools[event.button], x: event.clientX, y: event.clientY };
      drag.startX = this.onCanvas(event).x;
      drag.startY = this.onCanvas(event).y;
      viewport.setPointerCapture(event.pointerId);
      viewport.focus({ preventScroll: true });
      event.preventDefault();
    });
    viewport.addEventListener("pointermove", (event) => {
      const box = viewport.getBoundingClientRect();
      this.pointer = { x: event.clientX - box.left, y: event.clientY - box.top };
      if (viewer.lens) {
        viewer.lens = this.pointer;
        viewer.draw();
      }
      if (!drag) return;
      this.drag(drag, event.clientX - drag.x, event.clientY - drag.y);
      drag.x = event.clientX;
      drag.y = event.clientY;
    });
    const end = () => (drag = null);
    viewport.addEventListener("pointerup", end);
    viewport.addEventListener("pointercancel", end);
    viewport.addEventListener(
      "wheel",
      (event) => {
        if (!this.film) return;
        event.preventDefault();
        const { x, y } = this.onCanvas(event);
        viewer.zoomBy(1.0015 ** -event.deltaY, x, y);
      },
      { passive: false },
    );
  }

  drag(drag, across, down) {
    const ratio = window.devicePixelRatio || 1;
    if (drag.tool === "window") this.viewer.dragWindow(across, down);
    else if (drag.tool === "zoom") this.viewer.zoomBy(1.01 ** -down, drag.startX, drag.startY);
    else this.viewer.pan(across * ratio, down * ratio);
  }

  onCanvas(event) {
    const box = this.viewport.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    return { x: (event.clientX - box.left) * ratio, y: (event.clientY - box.top) * ratio };
  }
}

export { TOOLS };

function short(number) {
  return Math.abs(number) >= 100 ? String(Math.round(number)) : String(Number(number.toPrecision(3)));
}
