// Two versions of a report: what was edited here stands beside what has been saved since, and the reader says what goes in.

import { wordDiff } from "./diff.js";
import { byId, make, plain, replace } from "./dom.js";

const TAGS = { same: "span", removed: "del", added: "ins" };

export class Conflict {
  constructor(names) {
    this.names = names; // of the fields, as the form has them
    this.dialog = byId("stale");
    this.dialog.addEventListener("close", () => this.answer());
  }

  /**
   * Ask which edits are put over the newer version. Gives the fields that are marked, or null for "later".
   * theirs: the report as the server has it; mine, base: edited fields, and what they were edited from.
   */
  ask({ theirs, mine, base, madeOn }) {
    const isSigned = theirs.state !== "draft";
    byId("stale-words").textContent = isSigned
      ? `The report is signed by now (version ${theirs.version}). Your edits, made on version ${madeOn}, are not in it: what is to be kept goes into an addendum.`
      : `The server has version ${theirs.version}; your edits were made on version ${madeOn}. Only what is marked is put in; nothing is lost until you choose.`;
    byId("stale-take").textContent = isSigned ? "Drop my edits" : "Put in what is marked, drop the rest";
    const rows = Object.entries(mine).map(([key, text]) => {
      const newer = theirs.fields[key] ?? "";
      const isUntouched = newer === (base[key] ?? "");
      const box = make("input", { type: "checkbox", name: key, disabled: isSigned });
      // What nobody else has changed is marked already; where both have changed it the reader chooses.
      box.checked = isUntouched && !isSigned;
      const remark = isUntouched ? "changed here alone" : "changed in both";
      return make(
        "div",
        { className: "stale-field" },
        make("label", { className: "inline" }, box, ` ${this.names[key] ?? key}`, make("span", { className: "quiet", text: remark })),
        make("p", { className: "diff" }, ...wordDiff(newer, text).map((part) => make(TAGS[part.kind], { text: plain(part.text, 20000) }))),
      );
    });
    replace(byId("stale-fields"), ...rows);
    this.dialog.returnValue = "";
    if (!this.dialog.open) this.dialog.showModal();
    (byId("stale-fields").querySelector("input:not(:disabled)") ?? byId("stale-take")).focus();
    return new Promise((resolve) => (this.resolve = resolve));
  }

  answer() {
    const marked = [...byId("stale-fields").querySelectorAll("input:checked")].map((box) => box.name);
    const resolve = this.resolve;
    this.resolve = null;
    // Escape chooses nothing, and then everything stays as it is.
    resolve?.(this.dialog.returnValue === "take" ? marked : null);
    replace(byId("stale-fields"));
  }
}
