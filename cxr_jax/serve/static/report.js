// The report: one form for every origin, saved as it is typed, with what was changed shown word by word.

import { Conflict } from "./conflict.js";
import { wordDiff } from "./diff.js";
import { byId, countHidden, make, plain, replace } from "./dom.js";
import { OFFLINE, request } from "./server.js";
import { Unsaved } from "./unsaved.js";

// Which key leads to which field (after G).
export const FIELD_KEYS = {
  t: "technique",
  d: "devices",
  a: "airways",
  l: "lungs_right",
  k: "lungs_left",
  p: "pleura",
  m: "mediastinum",
  h: "heart",
  b: "abdomen",
  o: "bones",
  i: "impression",
};
const OF_LABEL = {
  Cardiomegaly: "heart",
  "Enlarged Cardiomediastinum": "mediastinum",
  Pneumothorax: "pleura",
  "Pleural Effusion": "pleura",
  "Pleural Other": "pleura",
  Fracture: "bones",
  "Support Devices": "devices",
  "No Finding": "impression",
};
const SAVE_AFTER = 600; // ms without a key
const RETRY_AFTER = 3000; // ms
const ONE_EDIT = 800; // ms between keys that are undone together

export class Report {
  constructor({ about, sealing, say, changed, failed, shown }) {
    Object.assign(this, { about, say, changed, failed });
    this.shown = shown; // what the page shows now: {image, reading}
    this.boxes = new Map();
    this.unsaved = new Unsaved(sealing);
    this.conflict = new Conflict(about.fields);
    this.makeForm();
    this.reset();
  }

  reset() {
    this.turn = (this.turn ?? 0) + 1; // answers to what was asked before are of another report
    clearTimeout(this.timer);
    this.id = null;
    this.version = null;
    this.reading = null;
    this.flags = [];
    this.state = "none"; // none, draft, signed, addendum
    this.saved = {};
    this.draft = {};
    this.undoable = [];
    this.redoable = [];
    this.lastField = null;
    this.savedAt = null;
    this.isOffline = false;
    this.isStale = false;
    this.isSigning = false; // a signature is on its way
    this.beginning = null;
    for (const { box } of this.boxes.values()) box.value = "";
    this.refresh();
  }

  get isSigned() {
    return this.state === "signed" || this.state === "addendum";
  }

  /** What is being signed stands as still as what is signed: an edit between would be shown as signed, and is not. */
  get isFixed() {
    return this.isSigned || this.isSigning;
  }

  // ---- The form ----

  makeForm() {
    const letters = Object.fromEntries(Object.entries(FIELD_KEYS).map(([letter, key]) => [key, letter]));
    const rows = Object.entries(this.about.fields).map(([key, name]) => {
      const box = make("textarea", {
        id: `field-${key}`,
        rows: "1",
        spellcheck: "false",
        autocomplete: "off",
        maxlength: "20000",
        on: {
          input: () => this.typed(key),
          focus: () => (this.lastField = key),
        },
      });
      const diff = make("p", { className: "diff", hidden: true });
      const remark = make("p", { className: "remark", hidden: true });
      const normal = make("button", {
        type: "button",
        className: "normal",
        text: "normal",
        title: `Alt+N: ${this.about.normal[key] ?? ""}`,
        on: { click: () => this.setNormal(key) },
      });
      this.boxes.set(key, { box, diff, remark, normal });
      const letter = letters[key] ? make("kbd", { text: `G ${letters[key].toUpperCase()}` }) : null;
      const label = make("label", { for: box.id }, name, letter);
      return make("div", { className: "field" }, label, make("div", { className: "entry" }, box, diff, remark), normal);
    });
    replace(byId("fields"), ...rows);
  }

  get fields() {
    return Object.fromEntries([...this.boxes].map(([key, { box }]) => [key, box.value]));
  }

  // ---- Opening ----

  /** Begin a report of a film, from a reading if there is one. */
  async begin(image, reading, isReadAnyway = false) {
    const body = reading ? { image, reading } : { image };
    if (isReadAnyway) body.read_anyway = true;
    const { turn } = this;
    // Asked for twice it is begun once: a second one would be put over what is typed into the first.
    this.beginning ??= request("POST", "/room/reports", body)
      // Another film may be shown by now, and this text must not stand under it.
      .then((report) => void (this.turn === turn && this.take(report)))
      .finally(() => void (this.turn === turn && (this.beginning = null)));
    return this.beginning;
  }

  async open(id) {
    const { turn } = this;
    const report = await request("GET", `/room/reports/${encodeURIComponent(id)}`);
    const left = await this.unsaved.find(report.id);
    if (this.turn !== turn) return;
    // An address may name any film and any report.
    if (report.image !== this.shown().image) throw new Error("The report is of another film: it is not shown.");
    this.take(report);
    if (left.length) this.putBack(report, left).catch((error) => this.failed(error));
  }

  take(report) {
    this.id = report.id;
    this.version = report.version;
    this.reading = report.reading ?? null;
    this.flags = report.flags ?? [];
    this.state = report.state ?? "draft";
    this.signed = report.signed ?? null;
    this.addenda = report.addenda ?? [];
    this.saved = { ...report.fields };
    this.savedAt = report.saved_at ? new Date(report.saved_at) : null;
    // What the model gave, which every edit stands against.
    this.draft = { ...(report.draft ?? report.fields) };
    this.undoable = [];
    this.redoable = [];
    for (const [key, { box }] of this.boxes) box.value = this.saved[key] ?? "";
    this.refresh();
  }

  /** What a lost connection or a closed page has left: put back as an edit, or shown where a newer version is there. */
  async putBack(report, left) {
    const mine = Object.assign({}, ...left.map((record) => record.fields));
    // Made on this very version, nothing of anybody else's is under them.
    if (!this.isSigned && left.every((record) => record.version === this.version)) {
      for (const [key, text] of Object.entries(mine)) this.set(key, text);
      this.unsaved.drop(left);
      this.say("Edits that had not reached the server were put back.");
      return this.save();
    }
    const base = Object.assign({}, ...left.map((record) => record.base).reverse());
    if (await this.merge(report, mine, base, left[0].version)) this.unsaved.drop(left);
  }

  /** Go on from the server's version, with those edits that the reader marks; gives whether the reader has chosen. */
  async merge(theirs, mine, base, madeOn) {
    const { turn } = this;
    const differing = Object.entries(mine).filter(([key, text]) => text !== (theirs.fields[key] ?? ""));
    let marked = [];
    if (differing.length) {
      this.describe();
      marked = await this.conflict.ask({ theirs, mine: Object.fromEntries(differing), base, madeOn });
      if (this.turn !== turn || marked === null) return false;
    }
    this.unsaved.forget(theirs.id);
    this.isStale = false;
    this.take(theirs);
    for (const key of marked) this.set(key, mine[key]);
    return true;
  }

  // ---- Editing ----

  typed(key) {
    const { box } = this.boxes.get(key);
    this.note(key, box.lastText ?? "", box.value);
    this.afterEdit();
  }

  set(key, text, isNoted = true) {
    const { box } = this.boxes.get(key);
    if (this.isFixed || box.value === text) return;
    if (isNoted) this.note(key, box.value, text, true);
    box.value = text;
    this.afterEdit();
  }

  setNormal(key) {
    if (key) this.set(key, this.about.normal[key] ?? "");
  }

  /** Put a sentence of the model into the report; gives the field, or null. */
  insert(sentence) {
    if (!this.id || this.isFixed) return null;
    const { key, text } = this.place(sentence);
    const { box } = this.boxes.get(key);
    const isThere = box.value.toLowerCase().includes(text.toLowerCase());
    if (!isThere) this.set(key, box.value.trim() ? `${box.value.trimEnd()} ${text}` : text);
    return key;
  }

  // Where a sentence belongs, by the heading it brings or the label it claims, and its text there.
  place(sentence) {
    const text = plain(sentence.text, 4000).trim();
    const heading = /^([A-Za-z ]{3,30}):\s*(?=\S)/.exec(text);
    const word = heading?.[1].trim().toLowerCase();
    const named = Object.entries(this.about.fields).find(([, name]) => name.toLowerCase() === word)?.[0];
    const key = named ?? (word === "quality" ? "technique" : null);
    if (!key) return { key: fieldOf(sentence), text };
    const rest = text.slice(heading[0].length);
    return { key, text: rest[0].toUpperCase() + rest.slice(1) };
  }

  /** Take a rejected sentence out of the report, where it stands there word for word. */
  remove(sentence) {
    const whole = plain(sentence.text, 4000).trim();
    // As it stands by itself, and as it stands under its heading.
    for (const text of [whole, this.place(sentence).text].filter(Boolean)) {
      for (const [key, { box }] of this.boxes) {
        if (box.value.includes(text)) this.set(key, box.value.replace(text, () => "").replace(/ {2,}/g, " ").trim());
      }
    }
  }

  note(key, before, after, isWhole = false) {
    const now = performance.now();
    const last = this.undoable.at(-1);
    if (!isWhole && last?.key === key && !last.isWhole && now - last.at < ONE_EDIT) {
      last.after = after;
      last.at = now;
    } else {
      this.undoable.push({ key, before, after, at: now, isWhole });
    }
    this.redoable = [];
  }

  undo() {
    this.move(this.undoable, this.redoable, "before");
  }

  redo() {
    this.move(this.redoable, this.undoable, "after");
  }

  move(from, to, which) {
    if (this.isFixed) return;
    const step = from.pop();
    if (!step) return this.say(which === "before" ? "Nothing to undo." : "Nothing to redo.");
    to.push({ ...step, isWhole: true });
    this.boxes.get(step.key).box.value = step[which];
    this.afterEdit();
  }

  focus(key) {
    const { box } = this.boxes.get(key);
    box.focus();
    box.scrollIntoView({ block: "nearest" });
  }

  afterEdit() {
    this.refresh();
    this.keepUnsaved();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), SAVE_AFTER);
  }

  // ---- Saving ----

  keepUnsaved() {
    const fields = this.unsavedFields();
    const base = Object.fromEntries(Object.keys(fields).map((key) => [key, this.saved[key] ?? ""]));
    this.unsaved.keep(this.id, { version: this.version, base, fields, address: location.hash });
  }

  unsavedFields() {
    const changed = Object.entries(this.fields).filter(([key, text]) => text !== (this.saved[key] ?? ""));
    return Object.fromEntries(changed);
  }

  /** Save what is not saved; gives whether all of it is. One request at a time. */
  async save() {
    clearTimeout(this.timer);
    if (!this.id || this.isSigned || this.isStale) return false;
    if (this.saving) {
      await this.saving;
      return this.save();
    }
    if (!Object.keys(this.unsavedFields()).length) return true;
    this.saving = this.put().finally(() => (this.saving = null));
    const isSaved = await this.saving;
    if (isSaved && Object.keys(this.unsavedFields()).length) return this.save();
    return isSaved;
  }

  async put() {
    const { id, fields } = this;
    this.describe("saving ..");
    // The same content that is sent again has the same name, so that it becomes one version.
    const content = JSON.stringify([this.version, fields]);
    if (this.attempt?.content !== content) this.attempt = { content, key: newKey() };
    const headers = { ...this.matching(), "Idempotency-Key": this.attempt.key };
    try {
      const answer = await request("PUT", `/room/reports/${id}`, this.bound({ fields }), headers);
      if (this.id !== id) return false;
      this.version = answer.version;
      this.saved = fields;
      this.savedAt = new Date();
      this.isOffline = false;
      this.keepUnsaved();
      this.refresh();
      return true;
    } catch (error) {
      if (this.id !== id) return false;
      if (error.status === OFFLINE || error.status >= 500) {
        this.isOffline = true;
        this.timer = setTimeout(() => this.save(), RETRY_AFTER);
      } else if (error.status === 409 && error.param !== "shown") {
        this.isStale = true;
        this.failed(error);
      } else {
        this.failed(error);
      }
      this.describe();
      return false;
    }
  }

  /** After another page has saved: show both versions, and go on from the newer one with what the reader marks. */
  async settle() {
    const { turn } = this;
    const theirs = await request("GET", `/room/reports/${encodeURIComponent(this.id)}`);
    if (this.turn === turn) await this.merge(theirs, this.unsavedFields(), this.saved, this.version);
  }

  // ---- Signing ----

  async sign(body) {
    const { turn } = this;
    this.isSigning = true;
    this.refresh();
    try {
      const isSaved = await this.save();
      if (!isSaved || this.turn !== turn) throw new Error("The report is not saved yet: it can be signed when it is.");
      const headers = this.named("sign", { meaning: body.meaning, confidence: body.confidence });
      const answer = await request("POST", `/room/reports/${this.id}/sign`, this.bound(body), headers);
      if (this.turn === turn) this.takeSignature(answer);
    } finally {
      if (this.turn === turn) this.isSigning = false;
      this.refresh();
    }
  }

  async addAddendum(text) {
    const { turn } = this;
    const headers = this.named("addendum", text);
    const answer = await request("POST", `/room/reports/${this.id}/addendum`, this.bound({ text }), headers);
    if (this.turn === turn) this.takeSignature(answer);
  }

  takeSignature(answer) {
    this.state = answer.state ?? answer.status ?? "signed";
    this.version = answer.version ?? this.version;
    this.signed = answer.signed ?? this.signed;
    this.addenda = answer.addenda ?? this.addenda;
    this.unsaved.forget(this.id);
    this.refresh();
  }

  flag(sentence, kind, note) {
    const body = note ? { sentence, kind, note } : { sentence, kind };
    return request("POST", `/room/reports/${this.id}/flags`, this.bound(body));
  }

  // Every change says what the page shows: a report of another film or reading is not changed.
  bound(body) {
    const { image, reading } = this.shown();
    return { ...body, shown: { image, reading: this.reading === null ? null : reading } };
  }

  // Sent again after an answer was lost it has the same name, and is answered as it was the first time.
  named(kind, body) {
    const content = JSON.stringify([kind, this.id, this.version, body]);
    if (this.request?.content !== content) this.request = { content, key: newKey() };
    return { ...this.matching(), "Idempotency-Key": this.request.key };
  }

  matching() {
    return { "If-Match": String(this.version) };
  }

  // ---- What is shown ----

  refresh() {
    byId("fields").hidden = !this.id;
    for (const [key, { box, diff, remark, normal }] of this.boxes) {
      box.lastText = box.value;
      box.readOnly = this.isFixed || !this.id;
      // An empty field of a signed report says that it is empty.
      box.placeholder = this.isSigned ? "nothing written" : "";
      normal.disabled = box.readOnly;
      normal.hidden = this.isSigned;
      fitHeight(box);
      const before = this.draft[key] ?? "";
      const isChanged = Boolean(this.id) && before !== box.value;
      diff.hidden = !isChanged;
      if (isChanged) replace(diff, ...wordDiff(before, box.value).map(diffPart));
      const hidden = countHidden(box.value);
      remark.hidden = !hidden;
      remark.textContent = `holds ${hidden} characters that are not seen`;
    }
    this.describe();
    this.changed();
  }

  describe(words) {
    const left = Object.keys(this.unsavedFields()).length;
    const line = byId("saved");
    let text = words ?? "";
    if (!text && this.id) {
      const time = this.savedAt?.toTimeString().slice(0, 8);
      if (this.isStale) text = `saved elsewhere, ${left} of yours not in it`;
      else if (this.isOffline) text = `offline, ${left} kept`;
      else if (left) text = "not saved yet";
      else text = time ? `saved ${time}` : "saved";
    }
    line.textContent = text;
    line.classList.toggle("bad", this.isOffline || this.isStale);
    byId("compare").hidden = !this.isStale;
  }
}

function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function diffPart({ kind, text }) {
  const tags = { same: "span", removed: "del", added: "ins" };
  return make(tags[kind], { text: plain(text, 20000) });
}

/** The field where a sentence of the model belongs, by the first label that it claims. */
export function fieldOf({ claims, sides }) {
  const claim = claims?.[0];
  const side = claim?.side ?? sides?.[0]?.[2];
  if (!claim) return "impression";
  // A lung's field gives its side to what has none: what is on no side, or on both, goes where no heading does.
  const ofSide = { left: "lungs_left", right: "lungs_right" }[side] ?? "impression";
  return OF_LABEL[claim.label] ?? ofSide;
}

function fitHeight(box) {
  box.style.height = "auto";
  box.style.height = `${Math.min(220, box.scrollHeight + 2)}px`;
}
