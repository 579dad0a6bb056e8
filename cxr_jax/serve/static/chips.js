// The conclusion: 14 findings in four groups that never change place, each with its state as a word and as a shape.

import { byId, make, replace } from "./dom.js";

const GROUPS = {
  "Heart and mediastinum": ["Enlarged Cardiomediastinum", "Cardiomegaly"],
  Lungs: ["Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"],
  Pleura: ["Pneumothorax", "Pleural Effusion", "Pleural Other"],
  "Bones, devices, none": ["Fracture", "Support Devices", "No Finding"],
};
const SHAPES = { present: "\u25a0", uncertain: "\u25e7", absent: "\u25a1", not_mentioned: "\u00b7" };
const WORDS = { present: "present", uncertain: "uncertain", absent: "absent", not_mentioned: "not mentioned" };
// As the parser reads a whole text: what is affirmed once is not taken back by what is denied elsewhere.
const RANK = { not_mentioned: 0, absent: 1, uncertain: 2, present: 3 };

/** What sentences say so far, a finding a label; the document's own findings replace it at the end. */
export function findingsOf(sentences, named = [], probabilities = {}) {
  const found = new Map();
  for (const label of Object.values(GROUPS).flat()) {
    const named_in_answer = named.includes(label);
    const probability = probabilities[label] ?? null;
    found.set(label, { label, state: "not_mentioned", side: null, named_in_answer, probability, sentences: [] });
  }
  for (const { n, claims } of sentences) {
    for (const { label, state, side } of claims ?? []) {
      const finding = found.get(label);
      if (!finding || !(state in RANK)) continue;
      finding.sentences.push(n);
      if (RANK[state] > RANK[finding.state]) finding.state = state;
      if (side && state !== "absent") finding.side = joined(finding.side, side);
    }
  }
  return [...found.values()];
}

function joined(before, side) {
  return before && before !== side ? "bilateral" : side;
}

export function showChips(findings, isDone, onChoose) {
  const byLabel = new Map(findings.map((finding) => [finding.label, finding]));
  const groups = Object.entries(GROUPS).map(([name, labels]) =>
    make(
      "section",
      { className: "chip-group", "aria-label": name },
      make("h3", { text: name }),
      ...labels.map((label) => chip(byLabel.get(label) ?? { label, state: "not_mentioned" }, onChoose)),
    ),
  );
  const hasNumbers = findings.some((finding) => finding.probability !== null && finding.probability !== undefined);
  replace(byId("chips"), ...groups);
  byId("probability-words").hidden = !hasNumbers;
  byId("answer-words").hidden = !isDone;
}

function chip({ label, state, side, probability, named_in_answer: isNamed, sentences }, onChoose) {
  const known = state in SHAPES ? state : "not_mentioned";
  const hasNumber = typeof probability === "number";
  const first = sentences?.[0];
  return make(
    "button",
    {
      type: "button",
      className: `chip ${known}${isNamed ? " named" : ""}`,
      title: first ? `go to sentence ${first}` : "no sentence mentions it",
      on: { click: () => first && onChoose(first) },
    },
    make("span", { className: "shape", text: SHAPES[known], "aria-hidden": "true" }),
    make("span", { className: "label", text: label }),
    side ? make("span", { className: `side ${side}`, text: side }) : null,
    make("span", { className: "state", text: WORDS[known] }, isNamed ? make("span", { className: "unseen", text: ", in answer" }) : null),
    hasNumber ? bar(probability) : null,
  );
}

function bar(probability) {
  const share = Math.min(1, Math.max(0, probability));
  const fill = make("span", { className: "fill" });
  // Through the object model: a style in markup is what the policy forbids.
  fill.style.width = `${Math.round(100 * share)}%`;
  return make(
    "span",
    { className: "probability" },
    make("span", { className: "bar", "aria-hidden": "true" }, fill),
    make("span", { className: "number", text: share.toFixed(2) }),
  );
}
