// One form for every arm; what an arm shows of the AI stands above it, and nothing else differs.

import { byId, make, plain, replace } from "./dom.js";

const STATES = [["present", "■ present"], ["uncertain", "◧ uncertain"], ["absent", "□ absent"]];
const FLAGS = ["wrong", "side", "missing", "overconfident"];
const SIDES = [["", "side"], ["right", "right"], ["left", "left"], ["bilateral", "both"]];

export class Form {
  constructor({ form, shown, answer }, changed) {
    this.spec = form;
    this.changed = changed;
    this.kept = structuredClone(answer ?? { fields: {}, labels: {}, suspicion: {}, flags: [], rejected: [] });
    this.confidence = null;
    this.reason = null; // why confidence cannot be said, once somebody chose that
    this.current = null; // the sentence that the keys are about
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
    if (this.reason !== null) return this.reason.trim().length < 3 ? "say why you cannot tell how confident you are" : "";
    return this.confidence ? "" : "how confident are you?";
  }

  /** What is signed beside the answer. */
  signature() {
    return this.reason === null ? { confidence: this.confidence } : { confidence: null, cannot_say: this.reason };
  }

  restAbsent() {
    for (const label of this.spec.labels) this.kept.labels[label] ??= { state: "absent", side: null };
    this.refreshLabels();
    this.changed();
  }

  drawLabels() {
    this.refreshers = [];
    replace(byId("labels"), ...this.spec.labels.map((label) => this.labelRow(label)));
    this.refreshLabels();
  }

  // In place: a button that was pressed by a key keeps the focus.
  refreshLabels() {
    for (const refresh of this.refreshers) refresh();
    const left = this.spec.labels.filter((label) => !this.kept.labels[label]).length;
    byId("unset").textContent = left ? `${left} not set` : "all set";
  }

  labelRow(label) {
    const set = (more) => {
      const value = { state: "present", side: null, ...this.kept.labels[label], ...more };
      // What is absent has no side.
      this.kept.labels[label] = value.state === "absent" ? { ...value, side: null } : value;
      this.refreshLabels();
      this.changed();
    };
    const buttons = STATES.map(([state, text]) => make("button", { type: "button", text, on: { click: () => set({ state }) } }));
    const options = SIDES.map(([side, text]) => make("option", { value: side, text }));
    const sides = make("select", { "aria-label": `side of ${label}`, on: { change: (event) => set({ side: event.target.value || null }) } }, ...options);
    const row = make("div", { role: "group", "aria-label": label });
    this.refreshers.push(() => {
      const value = this.kept.labels[label];
      row.className = `label-row ${value?.state ?? "unset"}`;
      buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(value?.state === STATES[index][0])));
      sides.value = value?.side ?? "";
      sides.disabled = value?.state === "absent";
    });
    row.append(make("span", { text: label }), make("span", { className: "choices" }, ...buttons), sides);
    return row;
  }

  drawSuspicion() {
    replace(byId("suspicion"), ...this.spec.suspicion.map((label) => {
      const value = this.kept.suspicion[label];
      const told = make("span", { text: value ?? "not set" });
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
      make("button", { type: "button", text: `${index + 1} ${text}`, on: { click: () => this.setConfidence(index + 1) } }));
    const cannot = make("button", { type: "button", text: "cannot say ..", on: { click: () => this.setConfidence(null) } });
    const why = make("input", { type: "text", maxlength: 500, placeholder: "why?", "aria-label": "why you cannot say" });
    why.addEventListener("input", () => (this.reason = why.value));
    this.setConfidence = (point) => {
      // Not a point of the scale: whoever cannot say gives a reason.
      this.confidence = point;
      this.reason = point === null ? why.value : null;
      why.hidden = point !== null;
      [...buttons, cannot].forEach((button, index) => button.setAttribute("aria-pressed", String(index + 1 === (point ?? points.length + 1))));
      if (point === null) why.focus();
    };
    why.hidden = true;
    replace(byId("confidence"), make("h2", { text: question }), make("div", { className: "points" }, ...buttons, cannot), why);
  }

  // ---- What the AI says, where the arm shows it ----

  drawAI(shown) {
    const panel = byId("ai");
    panel.hidden = !Object.keys(shown).length;
    const parts = [];
    this.sentences = [];
    // What it does not mention can be rejected, too: an error of the AI may be that it says nothing.
    if (shown.labels) parts.push(make("h2", { text: "The AI's findings (click one that is wrong to reject it)" }), make("div", { className: "chips" }, ...shown.labels.map((chip) => this.chip(chip))));
    if (shown.sentences) {
      const missing = make("p", {}, ...this.flagButtons(null, ["missing"], "A finding is missing from all sentences"));
      parts.push(make("h2", { text: "The AI's reasoning (flag what is wrong in it)" }), make("ol", {}, ...shown.sentences.map((sentence) => this.sentence(sentence))), missing);
    }
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
    const mark = { present: "■", uncertain: "◧", absent: "□", not_mentioned: "·" }[state];
    const told = `${mark} ${label}, ${state.replaceAll("_", " ")}${side ? `, ${side}` : ""}`;
    const button = make("button", { type: "button", className: `ai-chip ${state}` });
    const draw = () => {
      const isOut = this.kept.rejected.includes(label);
      button.textContent = isOut ? `✗ rejected: ${told}` : told;
      button.classList.toggle("rejected", isOut);
      button.setAttribute("aria-pressed", String(isOut));
    };
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
    const flags = make("span", { className: "flags" }, ...this.flagButtons(n, FLAGS));
    const item = make("li", {}, make("span", { text: plain(text) }), flags);
    this.sentences.push(item);
    return item;
  }

  flagButtons(n, kinds, words) {
    return kinds.map((kind) => {
      const button = make("button", { type: "button", text: words ?? kind, "data-kind": kind });
      const isThere = () => this.kept.flags.some((flag) => flag.sentence === n && flag.kind === kind);
      const draw = () => {
        button.setAttribute("aria-pressed", String(isThere()));
        const item = button.closest("li");
        item?.classList.toggle("flagged", this.kept.flags.some((flag) => flag.sentence === n));
      };
      button.addEventListener("click", () => {
        const wasThere = isThere();
        this.kept.flags = this.kept.flags.filter((flag) => flag.sentence !== n || flag.kind !== kind);
        if (!wasThere) this.kept.flags.push({ sentence: n, kind });
        draw();
        this.changed();
      });
      draw();
      // Once it hangs in its sentence, for flags that were kept.
      queueMicrotask(draw);
      return button;
    });
  }

  // ---- Keys ----

  /** Go to the next sentence or the one before it; nothing happens where the arm shows none. */
  step(by) {
    if (!this.sentences.length) return;
    const last = this.sentences.length - 1;
    this.current = this.current === null ? (by > 0 ? 0 : last) : Math.min(last, Math.max(0, this.current + by));
    this.sentences.forEach((item, index) => item.classList.toggle("current", index === this.current));
    this.sentences[this.current].scrollIntoView({ block: "nearest" });
  }

  /** Flag the sentence that the keys are about, or take the flag away. */
  flag(kind) {
    this.sentences[this.current]?.querySelector(`[data-kind="${kind}"]`).click();
  }
}
