// The reading: asked of the server, streamed sentence by sentence, stopped, asked on, flagged.

import { findingsOf, showChips } from "./chips.js";
import { byId, make, plain, replace } from "./dom.js";
import { request } from "./server.js";

const KINDS = { w: "wrong", s: "side", m: "missing", o: "overconfident" };
const MOST_SENTENCES = 400;
const SURROGATE = /[\ud800-\udfff]/;

export class Reading {
  constructor({ say, changed, finished }) {
    this.say = say;
    this.changed = changed; // something on the page depends on the state
    this.finished = finished; // with the document
    this.reset();
  }

  reset() {
    this.turn = (this.turn ?? 0) + 1; // what was asked for before is of another reading
    this.source?.close();
    this.source = null;
    this.id = null;
    this.film = null;
    this.state = "none"; // none, refused, streaming, done, stopped, failed
    this.sentences = [];
    this.items = new Map(); // number -> element
    this.current = 0;
    this.answer = null;
    this.probabilities = {};
    this.contradictions = [];
    this.flags = new Map(); // number -> Set of kinds
    this.rejected = new Set();
    this.document = null;
    this.hold = false;
    replace(byId("sentences"));
    replace(byId("contradictions"));
    replace(byId("follow-ups"));
    replace(byId("reading-warnings"));
    this.showChips();
    this.describe();
  }

  get isStreaming() {
    return this.state === "streaming";
  }

  // ---- Asking ----

  async start(film, isReadAnyway = false) {
    this.reset();
    this.film = film;
    if (film.gate.state === "refused" && !isReadAnyway) {
      this.state = "refused";
      return this.describe();
    }
    this.state = "streaming";
    this.describe();
    const { turn } = this;
    const body = { image: film.sha256 };
    if (isReadAnyway) body.read_anyway = true;
    try {
      const { id } = await request("POST", "/room/readings", body);
      // Another film may have been opened meanwhile, or the reading stopped: its page shows nothing of this one.
      if (this.turn !== turn || !this.isStreaming) return request("DELETE", `/room/readings/${id}`).catch(() => {});
      this.follow(id);
    } catch (error) {
      if (this.turn === turn) this.fail(error.message);
    }
  }

  /** Show a reading that the server has, from its first sentence. */
  follow(id) {
    this.id = id;
    this.state = "streaming";
    this.describe();
    const source = new EventSource(`/room/readings/${id}/events`);
    this.source = source;
    const on = (name, take) =>
      source.addEventListener(name, (event) => {
        // A late event of an old stream is of another film.
        if (this.source !== source || event.data === undefined) return;
        let body;
        try {
          body = JSON.parse(event.data);
        } catch {
          return this.fail("the server's stream is damaged");
        }
        take(body);
      });
    on("gate", (body) => this.takeGate(body));
    on("sentence", (body) => this.takeSentence(body));
    on("answer", (body) => this.takeAnswer(body.labels ?? []));
    on("contradictions", (body) => this.takeContradictions(Array.isArray(body) ? body : (body.contradictions ?? [])));
    on("probabilities", (body) => this.takeProbabilities(body.by_label ?? body.probabilities ?? body));
    on("done", () => this.end());
    on("error", (body) => this.fail(body.message ?? "the reading failed"));
    source.onerror = () => {
      // The browser connects again by itself, and the server goes on after the last event that came.
      if (this.source === source && source.readyState === EventSource.CLOSED) this.fail("the stream was refused");
    };
  }

  async stop() {
    if (!this.isStreaming) return;
    const { id } = this;
    this.source?.close();
    this.source = null;
    this.state = "stopped";
    this.describe();
    if (id) await request("DELETE", `/room/readings/${id}`).catch((error) => this.say(error.message));
  }

  fail(message) {
    this.source?.close();
    this.source = null;
    this.state = message.includes("cancelled") ? "stopped" : "failed";
    this.failure = plain(message, 300);
    this.describe();
  }

  async end() {
    this.source?.close();
    this.source = null;
    this.state = "done";
    this.describe();
    try {
      const { id } = this;
      const body = await request("GET", `/room/readings/${id}`);
      if (this.id !== id) return;
      const document = body.document ?? body;
      if (this.isOfAnotherFilm(document.image?.sha256)) return;
      this.document = document;
      this.takeDocument();
      this.finished(this.document);
    } catch (error) {
      this.say(`The document of the reading did not come: ${error.message}`);
    }
  }

  /** Take away a reading that turns out to be of another film than the one that is shown; gives whether it was. */
  isOfAnotherFilm(sha256) {
    const { film } = this;
    if (!sha256 || sha256 === film?.sha256) return false;
    this.reset();
    this.film = film;
    this.fail("it is of another film, so it is not shown");
    return true;
  }

  async ask(text) {
    const item = make("li", {}, make("p", { className: "question", text: plain(text) }));
    byId("follow-ups").append(item);
    try {
      const body = await request("POST", `/room/readings/${this.id}/ask`, { text });
      item.append(make("p", { className: "model-text", text: plain(body.text ?? body.answer ?? "") }));
    } catch (error) {
      item.append(make("p", { className: "remark", text: plain(error.message) }));
    }
  }

  // ---- What comes ----

  takeGate(gate) {
    if (this.isOfAnotherFilm(gate.image)) return;
    const words = byId("gate-reasons");
    const isBad = gate.state === "refused";
    words.hidden = gate.state === "ok";
    words.classList.toggle("bad", isBad);
    const reasons = (gate.reasons ?? []).map((reason) => plain(reason, 300)).join("; ");
    words.textContent = isBad ? `Read although refused: ${reasons}` : `Read with a doubt: ${reasons}`;
  }

  takeSentence(sentence) {
    // Resumed streams may say again what was said.
    if (this.items.has(sentence.n) || this.sentences.length >= MOST_SENTENCES) return;
    this.sentences.push(sentence);
    const item = this.makeSentence(sentence);
    this.items.set(sentence.n, item);
    byId("sentences").append(item);
    if (!this.current) this.select(sentence.n, false);
    this.showChips();
    this.describe();
  }

  makeSentence(sentence) {
    const number = make("span", { className: "number", text: String(sentence.n) });
    const text = make("p", { className: "model-text", dir: "ltr" }, ...sentenceParts(sentence));
    const claims = (sentence.claims ?? []).map(({ label, state, side }) =>
      make("span", {
        className: `claim ${state}`,
        text: `${plain(label, 60)}: ${plain(state, 20).replace("_", " ")}${side ? `, ${plain(side, 12)}` : ""}`,
      }),
    );
    const read = make("p", { className: "claims" }, make("span", { className: "read-as", text: "read as" }), ...claims);
    if (!claims.length) read.append(make("span", { className: "claim none", text: "nothing of the 14" }));
    const notes = make("p", { className: "notes", hidden: true });
    return make(
      "li",
      { tabindex: "-1", id: `sentence-${sentence.n}`, on: { click: () => this.select(sentence.n) } },
      number,
      make("div", { className: "body" }, text, read, notes),
    );
  }

  takeAnswer(labels) {
    this.answer = labels;
    this.showChips();
    this.describe();
  }

  takeProbabilities(byLabel) {
    this.probabilities = byLabel ?? {};
    this.showChips();
  }

  takeContradictions(list) {
    this.contradictions = list;
    const items = list.map(({ text, label, sentences }) => {
      const numbers = (sentences ?? []).map((n) => `sentence ${n}`).join(", ");
      const words = `${plain(text ?? label, 300)}${numbers ? ` (${numbers})` : ""}`;
      const first = sentences?.[0];
      return make("li", {}, make("button", { type: "button", text: words, on: { click: () => first && this.select(first) } }));
    });
    replace(byId("contradictions"), ...items);
    this.markSentences();
    this.describe();
  }

  takeDocument() {
    this.takeContradictions(this.document.contradictions ?? []);
    for (const sentence of this.document.trace ?? []) this.takeSentence(sentence);
    this.answer = this.document.answer ?? this.answer;
    const warnings = (this.document.warnings ?? []).map((warning) => make("li", { text: plain(warning, 300) }));
    replace(byId("reading-warnings"), ...warnings);
    this.showChips();
  }

  showChips() {
    const findings = this.document?.findings ?? findingsOf(this.sentences, this.answer ?? [], this.probabilities);
    // The document's numbers are those of the reading; before it is there they stream.
    const withNumbers = findings.map((finding) => ({
      ...finding,
      probability: finding.probability ?? this.probabilities[finding.label] ?? null,
    }));
    showChips(withNumbers, this.answer !== null, (n) => this.select(n));
  }

  // ---- Sentences: the current one, its flags ----

  select(n, isScrolled = true) {
    if (!this.items.has(n)) return;
    this.items.get(this.current)?.removeAttribute("aria-current");
    this.current = n;
    const item = this.items.get(n);
    item.setAttribute("aria-current", "true");
    if (isScrolled) item.scrollIntoView({ block: "nearest" });
    this.changed();
  }

  step(by) {
    const numbers = [...this.items.keys()];
    const at = numbers.indexOf(this.current);
    const next = numbers[Math.min(numbers.length - 1, Math.max(0, at + by))];
    if (next !== undefined) this.select(next);
  }

  get sentence() {
    return this.sentences.find(({ n }) => n === this.current) ?? null;
  }

  noteFlag(n, kind) {
    if (!this.flags.has(n)) this.flags.set(n, new Set());
    this.flags.get(n).add(kind);
    this.markSentences();
  }

  reject(n) {
    this.rejected.add(n);
    this.noteFlag(n, "wrong");
  }

  markSentences() {
    for (const [n, item] of this.items) {
      const against = this.contradictions.filter(({ sentences }) => sentences?.includes(n));
      const kinds = [...(this.flags.get(n) ?? [])];
      item.classList.toggle("contradicts", against.length > 0);
      item.classList.toggle("flagged", kinds.length > 0);
      item.classList.toggle("rejected", this.rejected.has(n));
      const notes = item.querySelector(".notes");
      const words = [
        ...against.map(({ text, label }) => `\u26a0 ${plain(text ?? label, 300)}`),
        kinds.length ? `\u2691 flagged: ${kinds.join(", ")}` : "",
      ].filter(Boolean);
      notes.hidden = !words.length;
      notes.textContent = words.join("  ");
    }
  }

  // ---- What stands around it ----

  describe() {
    const words = {
      none: "Not read yet.",
      refused: "Not read.",
      streaming: `Reading .. ${this.sentences.length || ""}`,
      done: `${this.sentences.length} sentences`,
      stopped: `Stopped after ${this.sentences.length} sentences: incomplete.`,
      failed: `Failed: ${this.failure ?? ""}`,
    };
    byId("reading-state").textContent = words[this.state];
    const isRefused = this.state === "refused";
    // Of what was not read nothing is "not mentioned".
    const isRead = this.sentences.length > 0 || this.state === "done";
    byId("chips").hidden = !isRead;
    byId("no-conclusion").hidden = isRead;
    byId("no-conclusion").textContent = this.isStreaming ? "The first sentence is awaited." : "None: the model has not read a film.";
    byId("refusal").hidden = !isRefused;
    if (isRefused) {
      replace(byId("refusal-reasons"), ...this.film.gate.reasons.map((reason) => make("li", { text: plain(reason, 300) })));
    }
    if (this.state === "none") byId("gate-reasons").hidden = true;
    byId("stop").hidden = !this.isStreaming;
    byId("contradictions").hidden = !this.contradictions.length;
    byId("no-contradictions").hidden = this.state !== "done" || this.contradictions.length > 0;
    this.changed();
  }
}

/** The parts of a sentence: its text, hedges underlined, words of side coloured and boxed. */
function sentenceParts({ text, hedged, sides }) {
  const most = 4000;
  // The server counts characters as Python does; a browser's strings count some of them twice.
  const letters = SURROGATE.test(text.slice(0, most)) ? Array.from(text.slice(0, most)) : null;
  const cut = letters ?? text;
  const spans = [
    ...(Array.isArray(hedged) ? hedged : []).map(([start, end]) => ({ start, end, className: "hedge" })),
    ...(Array.isArray(sides) ? sides : []).map(([start, end, side]) => ({ start, end, className: `side ${sideClass(side)}` })),
  ]
    .filter(({ start, end }) => Number.isInteger(start) && end > start && end <= most)
    .sort((one, other) => one.start - other.start);
  const slice = (start, end) => {
    const piece = cut.slice(start, end);
    return plain(letters ? piece.join("") : piece, Infinity);
  };
  const parts = [];
  let at = 0;
  for (const { start, end, className } of spans) {
    if (start < at) continue;
    parts.push(slice(at, start), make("span", { className, text: slice(start, end) }));
    at = end;
  }
  const rest = text.length - most;
  parts.push(slice(at, most) + (rest > 0 ? ` \u2026 (${rest.toLocaleString("en")} more characters)` : ""));
  return parts;
}

function sideClass(side) {
  return ["right", "left", "bilateral"].includes(side) ? side : "";
}

export { KINDS };
