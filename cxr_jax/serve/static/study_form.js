// One form for every arm; what an arm shows of the AI stands above it, and nothing else differs.

import { byId, make, plain, replace } from "./dom.js";

const STATES = [["present", "■ present"], ["uncertain", "◧ uncertain"], ["absent", "□ absent"]];
const SIDES = [["", "side"], ["right", "right"], ["left", "left"], ["bilateral", "both"]];

export class Form {
  constructor({ form, shown, answer }, changed) {
    this.spec = form;
    this.changed = changed;
    this.kept = structuredClone(answer ?? { fields: {}, labels: {}, suspicion: {}, flags: [], rejected: [] });
    this.confidence = null;
    this.drawLabels();
    this.drawSuspicion();
    this.drawFields();
    this.drawConfidence();
    this.drawAI(shown);
  }

  answer() {
    return structuredClone(this.kept);
  }

  /** What still has to be set before the report can be signed, in words; empty: nothing. */
  missing() {
    const labels = this.spec.labels.filter((label) => !this.kept.labels[label]);
    if (labels.length) return `${labels.length} findings are not set yet`;
    const scores = this.spec.suspicion.filter((label) => this.kept.suspicion[label] === undefined);
    if (scores.length) return `suspicion of ${scores.join(", ")} is not set yet`;
    return this.confidence ? "" : "how confident are you?";
  }

  restAbsent() {
    for (const label of this.spec.labels) this.kept.labels[label] ??= { state: "absent", side: null };
    this.drawLabels();
    this.changed();
  }

  drawLabels() {
    replace(byId("labels"), ...this.spec.labels.map((label) => this.labelRow(label)));
  }

  labelRow(label) {
    const value = this.kept.labels[label];
    const set = (more) => {
      this.kept.labels[label] = { state: "present", side: null, ...this.kept.labels[label], ...more };
      this.drawLabels();
      this.changed();
    };
    const buttons = STATES.map(([state, text]) =>
      make("button", { type: "button", text, "aria-pressed": String(value?.state === state), on: { click: () => set({ state }) } }));
    const options = SIDES.map(([side, text]) => make("option", { value: side, text, selected: (value?.side ?? "") === side }));
    const sides = make("select", { "aria-label": `side of ${label}`, on: { change: (event) => set({ side: event.target.value || null }) } }, ...options);
    const row = make("div", { className: value ? "label-row" : "label-row unset" });
    row.append(make("span", { text: label }), make("span", { className: "choices" }, ...buttons), sides);
    return row;
  }

  drawSuspicion() {
    replace(byId("suspicion"), ...this.spec.suspicion.map((label) => {
      const value = this.kept.suspicion[label];
      const told = make("span", { text: value ?? "-" });
      const row = make("div", { className: value === undefined ? "slider unset" : "slider" });
      // It stands nowhere until it is moved: a value that nobody chose is no answer.
      const input = make("input", { type: "range", min: 0, max: 100, value: value ?? 50, "aria-label": label });
      const take = () => {
        this.kept.suspicion[label] = Number(input.value);
        told.textContent = input.value;
        row.classList.remove("unset");
        this.changed();
      };
      input.addEventListener("input", take);
      input.addEventListener("pointerup", take);
      row.append(make("span", { text: label }), input, told);
      return row;
    }));
  }

  drawFields() {
    replace(byId("fields"), ...this.spec.fields.map((name) => {
      const area = make("textarea", { rows: name === "impression" ? 2 : 1, maxlength: 4000 });
      area.value = this.kept.fields[name] ?? "";
      area.addEventListener("input", () => {
        this.kept.fields[name] = area.value;
        this.changed();
      });
      return make("label", {}, make("span", { text: name.replaceAll("_", " ") }), area);
    }));
  }

  drawConfidence() {
    const { question, points } = this.spec.confidence;
    const buttons = points.map((text, index) =>
      make("button", { type: "button", text: `${index + 1} ${text}`, "aria-pressed": String(this.confidence === index + 1), on: { click: () => {
        this.confidence = index + 1;
        this.drawConfidence();
      } } }));
    replace(byId("confidence"), make("h2", { text: question }), make("div", { className: "points" }, ...buttons));
  }

  // ---- What the AI says, where the arm shows it ----

  drawAI(shown) {
    const panel = byId("ai");
    panel.hidden = !Object.keys(shown).length;
    const parts = [];
    if (shown.labels) parts.push(make("h2", { text: "The AI's findings (click to reject)" }), make("div", {}, ...shown.labels.filter(({ state }) => state !== "not_mentioned").map((chip) => this.chip(chip))));
    if (shown.sentences) parts.push(make("h2", { text: "The AI's reasoning" }), make("ol", {}, ...shown.sentences.map((sentence) => this.sentence(sentence))));
    if (shown.draft) {
      const use = () => {
        this.kept.fields.impression = shown.draft;
        this.drawFields();
        this.changed();
      };
      parts.push(make("h2", { text: "The AI's draft" }), make("p", { text: plain(shown.draft) }), make("button", { type: "button", text: "Use as impression", on: { click: use } }));
    }
    replace(panel, ...parts);
  }

  chip({ label, state, side }) {
    const mark = { present: "■", uncertain: "◧", absent: "□" }[state];
    const button = make("button", { type: "button", className: "chip", text: `${mark} ${label}, ${state}${side ? `, ${side}` : ""}` });
    const draw = () => button.classList.toggle("rejected", this.kept.rejected.includes(label));
    button.addEventListener("click", () => {
      const isOut = this.kept.rejected.includes(label);
      this.kept.rejected = isOut ? this.kept.rejected.filter((name) => name !== label) : [...this.kept.rejected, label];
      draw();
      this.changed();
    });
    draw();
    return button;
  }

  sentence({ n, text }) {
    const item = make("li", {}, make("span", { text: plain(text) }));
    const draw = () => item.classList.toggle("flagged", this.kept.flags.some((flag) => flag.sentence === n));
    for (const kind of ["wrong", "side", "missing", "overconfident"]) {
      const flip = () => {
        const isThere = this.kept.flags.some((flag) => flag.sentence === n && flag.kind === kind);
        this.kept.flags = this.kept.flags.filter((flag) => flag.sentence !== n || flag.kind !== kind);
        if (!isThere) this.kept.flags.push({ sentence: n, kind });
        draw();
        this.changed();
      };
      item.append(make("button", { type: "button", text: kind, on: { click: flip } }));
    }
    draw();
    return item;
  }
}
