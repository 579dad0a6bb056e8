// Other systems: find a study in an archive of the operator's file, pull a film of it, send a signed report there.

import { byId, make, plain, replace } from "./dom.js";
import { request } from "./server.js";

const FILTERS = ["PatientID", "StudyDate", "AccessionNumber", "ModalitiesInStudy"];
// What a film may be stored as; reports, marks and the like are named and not offered.
const FILMS = new Set(["CR", "DX", "RG", "OT"]);
const KINDS = { "sr.dcm": "DICOM SR", "text.dcm": "DICOM SR, text", "sc.dcm": "Secondary capture" };

export class Archives {
  /** pull: takes a function that fetches a film; report: the report that may be sent. */
  constructor({ report, pull, say }) {
    Object.assign(this, { report, pull, say });
    this.dialog = byId("archives");
    this.servers = [];
    this.asked = 0; // counts questions: an answer that comes late is of an older one
    const kinds = Object.entries(KINDS).map(([kind, words]) => {
      const box = make("input", { type: "checkbox", name: "kind", value: kind });
      box.checked = kind !== "text.dcm";
      return make("label", { className: "inline" }, box, ` ${words}`);
    });
    replace(byId("archive-kinds"), ...kinds);
    byId("archive-server").addEventListener("change", () => this.begin());
    byId("archive-search").addEventListener("submit", (event) => {
      event.preventDefault();
      this.attempt(this.search());
    });
    byId("archive-send").addEventListener("submit", (event) => {
      event.preventDefault();
      this.attempt(this.send());
    });
    byId("archive-close").addEventListener("click", () => this.dialog.close());
    // What an archive has told of patients goes with the dialog.
    this.dialog.addEventListener("close", () => {
      this.asked += 1;
      replace(byId("archive-studies"));
      byId("archive-search").reset();
    });
  }

  async open() {
    ({ servers: this.servers } = await request("GET", "/room/pacs"));
    if (!this.servers.length) return this.say("The operator has named no archive (pacs.toml).");
    const options = this.servers.map(({ name }) => make("option", { value: name, text: plain(name, 40) }));
    const select = byId("archive-server");
    const chosen = select.value;
    replace(select, ...options);
    if (this.servers.some(({ name }) => name === chosen)) select.value = chosen;
    this.begin();
    this.dialog.showModal();
    byId("archive-PatientID").focus();
  }

  get server() {
    return this.servers.find(({ name }) => name === byId("archive-server").value);
  }

  begin() {
    this.asked += 1;
    replace(byId("archive-studies"));
    this.tell("");
    this.describeSending();
  }

  attempt(promise) {
    promise.catch((error) => this.tell(error.message, true));
  }

  tell(words, isBad = false) {
    const line = byId("archive-remark");
    line.textContent = plain(words, 300);
    line.classList.toggle("bad", isBad);
  }

  /** Ask, unless another question has been asked since; null then. */
  async ask(path) {
    const turn = ++this.asked;
    this.tell("Asking ..");
    try {
      const answer = await request("GET", `/room/pacs/${encodeURIComponent(this.server.name)}/${path}`);
      return turn === this.asked ? answer : null;
    } catch (error) {
      if (turn === this.asked) throw error;
      return null;
    }
  }

  // ---- Finding ----

  async search() {
    const filters = new URLSearchParams();
    for (const name of FILTERS) {
      const value = byId(`archive-${name}`).value.trim();
      if (value) filters.set(name, value);
    }
    if (![...filters].length) return this.tell("Say at least one thing that the study has.", true);
    replace(byId("archive-studies"));
    const answer = await this.ask(`studies?${filters}`);
    if (!answer) return;
    const items = answer.studies.map((study) => this.makeStudy(study));
    replace(byId("archive-studies"), ...items);
    this.tell(items.length ? `${count(items.length, "study", "studies")} found. Choose one to see its films.` : "Nothing was found.");
    byId("archive-studies").querySelector("button")?.focus();
  }

  makeStudy(study) {
    const words = [dateOf(study.StudyDate), study.StudyDescription, study.PatientID, (study.ModalitiesInStudy ?? []).join(" ")];
    const button = make("button", {
      type: "button",
      text: words.filter(Boolean).map((word) => plain(word, 80)).join(" \u00b7 "),
      "aria-expanded": "false",
      on: { click: () => this.attempt(this.unfold(study.StudyInstanceUID, item, button)) },
    });
    const item = make("li", {}, button);
    return item;
  }

  async unfold(study, item, button) {
    const answer = await this.ask(`studies/${encodeURIComponent(study)}`);
    if (!answer) return;
    item.querySelector(":scope ul")?.remove();
    const films = answer.instances.filter(({ Modality }) => FILMS.has(Modality));
    const others = answer.instances.length - films.length;
    const items = films.map((instance, index) => {
      const open = make("button", {
        type: "button",
        className: "main-action",
        text: `Open film ${index + 1} (${plain(instance.Modality, 16)})`,
        on: { click: () => this.attempt(this.fetchFilm(study, instance)) },
      });
      return make("li", {}, open);
    });
    item.append(make("ul", {}, ...items));
    button.setAttribute("aria-expanded", "true");
    this.tell(`${count(films.length, "film", "films")}${others ? `, and ${others} of other kinds` : ""}.`);
    item.querySelector(":scope ul button")?.focus();
  }

  async fetchFilm(study, instance) {
    const { name } = this.server;
    const wanted = { study, series: instance.SeriesInstanceUID, instance: instance.SOPInstanceUID };
    const turn = ++this.asked;
    this.tell("Fetching the film ..");
    const isShown = await this.pull(() => request("POST", `/room/pacs/${encodeURIComponent(name)}/pull`, wanted));
    if (turn !== this.asked) return;
    this.tell(isShown ? "" : "The film that is shown stays: see the bottom line.", !isShown);
    if (isShown) this.dialog.close();
  }

  // ---- Sending ----

  describeSending() {
    const { report } = this;
    const why = !report.isSigned
      ? "Only a signed report is sent."
      : report.reading === null
        ? "A report without a reading has a text alone: it is no DICOM."
        : !this.server?.may_store
          ? "The operator's file lets nothing be sent to this archive."
          : "";
    byId("archive-why-not").textContent = why;
    byId("archive-send-now").disabled = Boolean(why);
    byId("archive-kinds").hidden = Boolean(why);
  }

  async send() {
    const kinds = new FormData(byId("archive-send")).getAll("kind");
    if (!kinds.length) return this.tell("Mark what is to be sent.", true);
    const { name } = this.server;
    const button = byId("archive-send-now");
    button.disabled = true;
    this.tell(`Sending to ${name} ..`);
    try {
      const answer = await request("POST", `/room/pacs/${encodeURIComponent(name)}/push`, { report: this.report.id, kinds });
      const { length: left } = answer.refused;
      const refused = left ? ` It did not take ${left}: they are not there.` : "";
      this.tell(`${name} has ${answer.stored.length} of ${kinds.length}.${refused}`, Boolean(left));
    } finally {
      this.describeSending();
    }
  }
}

function count(number, one, more) {
  return `${number} ${number === 1 ? one : more}`;
}

// 20261130 as 2026-11-30; anything else as it came.
function dateOf(text) {
  return /^\d{8}$/.test(text ?? "") ? `${text.slice(0, 4)}-${text.slice(4, 6)}-${text.slice(6)}` : text;
}
