// The signature: what it means, the password where there is one, and Enter twice, so that one slip signs nothing.

import { byId, make, plain, replace } from "./dom.js";
import { Unsaved } from "./unsaved.js";

const CONFIDENCES = ["not at all", "slightly", "somewhat", "moderately", "fairly", "very", "completely"];
const EXPORTS = { json: "JSON", txt: "Text", "sr.dcm": "DICOM SR", "text.dcm": "DICOM SR, text", "sc.dcm": "Secondary capture", "fhir.json": "FHIR" };

export class Signing {
  constructor({ report, reading, film, needsPassword, sealing, say, signed }) {
    Object.assign(this, { report, reading, film, needsPassword, say, signed });
    this.unsaved = new Unsaved(sealing, "addenda");
    this.dialog = byId("sign-dialog");
    const choices = CONFIDENCES.map((words, index) =>
      make(
        "label",
        { className: "inline" },
        make("input", { type: "radio", name: "confidence", value: String(index + 1) }),
        ` ${index + 1} ${words}`,
      ),
    );
    replace(byId("confidences"), ...choices);
    byId("sign-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    byId("sign-form").addEventListener("input", () => this.disarm());
    byId("sign-cancel").addEventListener("click", () => this.dialog.close());
    // What is on its way cannot be called back: a dialog that closes would say that it was.
    const hold = (event) => this.isBusy && event.preventDefault();
    this.dialog.addEventListener("cancel", hold);
    this.dialog.addEventListener("keydown", (event) => event.key === "Escape" && hold(event));
    byId("addendum").addEventListener("submit", (event) => {
      event.preventDefault();
      this.addAddendum();
    });
    byId("addendum").addEventListener("input", () => this.keepAddendum());
  }

  open() {
    const { report, reading } = this;
    if (report.state !== "draft") return this.say(report.isSigned ? "Signed already: add an addendum." : "There is no report yet.");
    if (reading.isStreaming) return this.say("The model is still reading: stop it or wait.");
    byId("sign-form").reset();
    byId("password-row").hidden = !this.needsPassword;
    byId("password").required = this.needsPassword;
    byId("sign-remark").textContent = "";
    byId("sign-summary").textContent = this.summary();
    this.disarm();
    this.dialog.showModal();
    byId("sign-form").querySelector("input[name=meaning]").focus();
  }

  summary() {
    const { report, reading } = this;
    const { fields } = report;
    const empty = Object.values(fields).filter((text) => !text.trim()).length;
    const changed = Object.entries(fields).filter(([key, text]) => text !== (report.draft[key] ?? "")).length;
    const flags = [...reading.flags.values()].reduce((sum, kinds) => sum + kinds.size, 0);
    const open = reading.contradictions.length;
    return `Fields edited: ${changed}, empty: ${empty}. Flags: ${flags}. Contradictions of the model: ${open}. After the signature only addenda can be made.`;
  }

  disarm() {
    this.isArmed = false;
    byId("sign-now").textContent = "Sign: Enter twice";
    byId("sign-now").classList.remove("armed");
  }

  async submit() {
    if (this.isBusy) return;
    if (!this.isArmed) {
      this.isArmed = true;
      byId("sign-now").textContent = "Press Enter again to sign";
      byId("sign-now").classList.add("armed");
      return;
    }
    const form = new FormData(byId("sign-form"));
    const body = { meaning: form.get("meaning") };
    if (this.needsPassword) body.password = byId("password").value;
    if (form.get("confidence")) body.confidence = Number(form.get("confidence"));
    this.isBusy = byId("sign-cancel").disabled = true;
    try {
      await this.report.sign(body);
      this.dialog.close();
      this.signed();
    } catch (error) {
      byId("sign-remark").textContent = plain(error.message, 300);
      this.disarm();
    } finally {
      this.isBusy = byId("sign-cancel").disabled = false;
      byId("password").value = "";
    }
  }

  async addAddendum() {
    const box = byId("addendum-text");
    if (!this.hasAddendum || box.readOnly) return;
    // Until the answer has come, nothing is typed that would be emptied with what was sent.
    box.readOnly = true;
    try {
      await this.report.addAddendum(box.value);
      box.value = "";
      this.keepAddendum();
      this.signed();
    } catch (error) {
      this.say(error.message);
    } finally {
      box.readOnly = false;
    }
  }

  /** Whether an addendum is typed that the server does not have. */
  get hasAddendum() {
    return Boolean(byId("addendum-text").value.trim());
  }

  keepAddendum() {
    const { value } = byId("addendum-text");
    this.unsaved.keep(this.report.id, { fields: value.trim() ? { text: value } : {}, address: location.hash });
  }

  /** An addendum to the report that is shown, typed on a page that is gone: it is in its box again, and not added. */
  async putBackAddendum() {
    const { id, addenda } = this.report;
    const left = this.report.isSigned ? await this.unsaved.find(id) : [];
    if (this.report.id !== id || this.hasAddendum) return;
    // One whose answer was lost was added all the same.
    const isAdded = ({ fields }) => addenda.some(({ text }) => text.trim() === fields.text.trim());
    this.unsaved.drop(left.filter(isAdded));
    const last = left.findLast((record) => !isAdded(record));
    if (!last) return;
    byId("addendum-text").value = last.fields.text;
    this.keepAddendum();
    this.unsaved.drop([last]);
    this.say("An addendum that was not added is in its box again.");
  }

  describe() {
    const { report } = this;
    byId("sign").disabled = report.state !== "draft";
    byId("sign").hidden = report.isSigned;
    byId("addendum").hidden = !report.isSigned;
    const { signed } = report;
    byId("signature-state").textContent = report.isSigned
      ? `signed by ${plain(signed?.by ?? "you", 64)}${signed?.at ? ` at ${timeOf(signed.at)}` : ""}, as ${plain(signed?.meaning ?? "", 200)}`
      : "not signed";
    byId("signature-state").classList.toggle("good", report.isSigned);
    const addenda = (report.addenda ?? []).map(({ by, at, text }) =>
      make("li", {}, make("span", { className: "quiet", text: `${plain(by ?? "", 64)} ${timeOf(at)}: ` }), plain(text, 20000)),
    );
    replace(byId("addenda"), ...addenda);
    this.describeExports();
  }

  describeExports() {
    const { report } = this;
    const row = byId("exports");
    row.hidden = !report.id;
    if (!report.id || row.dataset.of === report.id) return;
    row.dataset.of = report.id;
    // Without a model's reading there is no document, and a report has its text alone.
    // A picture names no patient and no study that DICOM outputs could belong to.
    const isDicom = this.film()?.kind === "DICOM";
    const offered = Object.entries(EXPORTS).filter(
      ([suffix]) => suffix === "txt" || (report.reading !== null && (isDicom || !suffix.endsWith("dcm"))),
    );
    const links = offered.map(([suffix, name]) =>
      make("a", { href: `/room/reports/${encodeURIComponent(report.id)}.${suffix}`, download: `report.${suffix}`, text: name }),
    );
    replace(row, row.firstElementChild, ...links);
  }
}

// 2026-11-30T18:13:47.840491Z as people write it; the same words wherever it is read.
function timeOf(at) {
  return plain(at, 40).replace(/^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d+)?Z$/, "$1 $2 UTC");
}
