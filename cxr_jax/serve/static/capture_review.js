// What must be looked at, and the 14 labels: both drawn from what the server says of the text. Text enters the page by
// textContent alone.

const SHAPES = { present: "\u25A0", uncertain: "\u25E7", absent: "\u25A1", not_mentioned: "\u00B7" };
const STATES = { present: "present", uncertain: "uncertain", absent: "absent", not_mentioned: "not mentioned" };
const SIDES = ["", "right", "left", "bilateral"];
// Labels that have no side.
const SIDELESS = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly"];

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const wordsOf = (text) => text.match(/\S+/g) || [];

/** Which words have been looked at: numbers of words, carried along when the text around them changes. */
export class Looked {
  constructor() { this.words = []; this.numbers = new Set(); }

  follow(text) {
    const words = wordsOf(text);
    const shorter = Math.min(words.length, this.words.length);
    let first = 0;
    while (first < shorter && words[first] === this.words[first]) first++;
    let last = 0;
    while (last < shorter - first && words[words.length - 1 - last] === this.words[this.words.length - 1 - last]) last++;
    const shift = words.length - this.words.length;
    const kept = new Set();
    for (const number of this.numbers) {
      if (number < first) kept.add(number);
      // Behind the change a word is the same one, at another number.
      else if (number >= this.words.length - last) kept.add(number + shift);
    }
    this.words = words;
    this.numbers = kept;
  }

  toggle(number) {
    if (this.numbers.has(number)) this.numbers.delete(number);
    else this.numbers.add(number);
  }
}

/** Draws the text with its marks as buttons; returns how many have not been looked at. */
export function drawReview(place, text, checked, looked, { onLook, onPropose }) {
  const focused = document.activeElement?.dataset?.word;
  place.replaceChildren();
  const proposals = new Map();
  for (const proposal of checked.proposals) {
    if (!proposals.has(proposal.first)) proposals.set(proposal.first, []);
    proposals.get(proposal.first).push(proposal);
  }
  const marks = new Map(checked.marks.map((mark) => [mark.word, mark]));
  const pattern = /\S+/g;
  let number = 0;
  let end = 0;
  for (let found = pattern.exec(text); found; found = pattern.exec(text), number++) {
    place.append(text.slice(end, found.index));
    end = found.index + found[0].length;
    const mark = marks.get(number);
    if (mark) place.append(markButton(mark, looked, onLook));
    else place.append(found[0]);
    for (const proposal of proposals.get(number) || []) place.append(proposalButton(proposal, text, onPropose));
  }
  place.append(text.slice(end));
  if (focused !== undefined) place.querySelector(`[data-word="${CSS.escape(focused)}"]`)?.focus();
  return checked.marks.filter((mark) => !looked.numbers.has(mark.word)).length;
}

function markButton(mark, looked, onLook) {
  const button = element("button", mark.text, "mark");
  button.type = "button";
  button.dataset.word = mark.word;
  const isLooked = looked.numbers.has(mark.word);
  button.classList.toggle("looked", isLooked);
  button.setAttribute("aria-pressed", String(isLooked));
  button.append(" ", element("span", mark.reasons.join(", "), "why"));
  button.addEventListener("click", () => onLook(mark.word));
  return button;
}

function proposalButton(proposal, text, onPropose) {
  const places = [...text.matchAll(/\S+/g)];
  const first = places[proposal.first].index;
  const last = places[proposal.last].index + places[proposal.last][0].length;
  const button = element("button", `\u2192 ${proposal.text}?`, "proposal");
  button.type = "button";
  button.title = `for "${text.slice(first, last)}"`;
  button.addEventListener("click", () => onPropose(first, last, proposal.text));
  return button;
}

/** The labels: what the text says, and what the reader has set instead. */
export class Chips {
  constructor(place, changed) {
    this.place = place;
    this.changed = changed;
    this.set = new Map(); // label -> {state, side}, of the reader
    this.read = new Map(); // label -> {state, side}, of the text
    this.rows = new Map();
  }

  /** Labels to send: null where the reader has set none, and all are the text's. */
  get labels() {
    if (!this.set.size) return null;
    return Object.fromEntries([...this.read.keys()].map((label) => [label, this.chip(label)]));
  }

  /** What holds for a label: what the reader has set, else what the text says. */
  chip(label) {
    if (this.set.has(label)) return this.set.get(label);
    const isSick = ([name, chip]) => chip.state === "present" && !["No Finding", "Support Devices"].includes(name);
    // The text may sum up as normal what the reader does not.
    if (label === "No Finding" && [...this.set].some(isSick)) return { state: "not_mentioned", side: null };
    return this.read.get(label);
  }

  get present() {
    return [...this.read.keys()]
      .map((label) => [label, this.chip(label)])
      .filter(([, chip]) => chip.state === "present")
      .map(([label, chip]) => (chip.side ? `${label} (${chip.side})` : label));
  }

  /** Takes the labels of a saved version: what differs from the text by then was set by the reader. */
  load(labels) {
    this.set.clear();
    this.saved = labels;
  }

  draw(findings, contradictions) {
    const differs = new Set(contradictions.map((difference) => difference.label));
    for (const finding of this.saved ? findings : []) {
      const chip = this.saved[finding.label];
      if (chip && (chip.state !== finding.state || chip.side !== finding.side)) this.set.set(finding.label, chip);
    }
    this.saved = null;
    for (const finding of findings) {
      this.read.set(finding.label, { state: finding.state, side: finding.side });
      if (!this.rows.has(finding.label)) this.rows.set(finding.label, this.makeRow(finding.label));
      this.fill(finding.label, differs.has(finding.label));
    }
  }

  makeRow(label) {
    const row = element("div", undefined, "chip");
    const shape = element("span", "", "shape");
    shape.setAttribute("aria-hidden", "true");
    const state = element("select");
    state.setAttribute("aria-label", `${label}: state`);
    for (const [value, word] of Object.entries(STATES)) state.append(new Option(word, value));
    const side = element("select");
    side.setAttribute("aria-label", `${label}: side`);
    for (const value of SIDES) side.append(new Option(value || "no side", value));
    side.classList.toggle("none", SIDELESS.includes(label));
    const reset = element("button", "as text");
    reset.type = "button";
    reset.setAttribute("aria-label", `${label}: as the text says`);
    const choose = () => {
      this.set.set(label, { state: state.value, side: side.value || null });
      this.changed();
    };
    state.addEventListener("change", choose);
    side.addEventListener("change", choose);
    reset.addEventListener("click", () => { this.set.delete(label); this.changed(); });
    row.append(shape, element("span", label, "name"), state, side, reset);
    this.place.append(row);
    return { row, shape, state, side, reset };
  }

  fill(label, differs) {
    const chip = this.chip(label);
    const parts = this.rows.get(label);
    parts.shape.textContent = SHAPES[chip.state];
    parts.state.value = chip.state;
    parts.side.value = chip.side || "";
    parts.side.disabled = !["present", "uncertain"].includes(chip.state);
    parts.row.classList.toggle("set", this.set.has(label));
    parts.row.classList.toggle("differs", differs);
    parts.reset.disabled = !this.set.has(label);
  }
}

/** Lists where labels and text differ. */
export function drawContradictions(place, contradictions, problems) {
  place.replaceChildren();
  for (const difference of contradictions) {
    const [gold, said] = [difference.gold, difference.text].map((word) => STATES[word] || word);
    place.append(element("p", `${difference.label}: you set ${gold}, the text says ${said}`));
  }
  for (const problem of problems) place.append(element("p", problem));
}

/** The reader's thoughts of before, each with a button that opens it. */
export function drawEarlier(place, captures, onOpen) {
  place.replaceChildren();
  for (const { id, created, state } of captures) {
    const open = element("button", "open");
    open.type = "button";
    open.addEventListener("click", () => onOpen(id));
    const item = element("li", `${created.slice(0, 16).replace("T", " ")} ${state} `);
    item.append(open);
    place.append(item);
  }
}

export { element };
