// The room: one film, one reading, one report at a time, and the keys that lead through them.

import { Archives } from "./archives.js";
import { byId, make, plain, replace } from "./dom.js";
import { FilmSide } from "./film.js";
import { FIELD_KEYS, Report } from "./report.js";
import { Keys } from "./keys.js";
import { KINDS, Reading } from "./reading.js";
import { Signing } from "./signing.js";
import { openSession, request } from "./server.js";
import { IdleWatch, leavePage } from "./leaving.js";

const GATE_WORDS = { ok: "film accepted", warned: "accepted with a doubt", refused: "refused" };

class Room {
  constructor(session, about) {
    this.about = about;
    const say = (words) => this.say(words);
    this.filmSide = new FilmSide({ say, opened: (film) => this.filmOpened(film), mayLeave: () => this.mayLeave() });
    this.reading = new Reading({ say, changed: () => this.describe(), finished: (document) => this.attempt(this.readingDone(document)) });
    this.report = new Report({
      about,
      sealing: session.sealing,
      say,
      changed: () => this.describe(),
      failed: (error) => this.saveFailed(error),
      shown: () => ({ image: this.filmSide.film?.sha256 ?? null, reading: this.reading.id }),
    });
    this.signing = new Signing({
      report: this.report,
      reading: this.reading,
      film: () => this.filmSide.film,
      needsPassword: userName(session) !== "local",
      sealing: session.sealing,
      say,
      signed: () => {
        this.describe();
        byId("signing").scrollIntoView({ block: "end" });
      },
    });
    this.archives = new Archives({
      report: this.report,
      pull: (fetchIt) => this.pull(fetchIt),
      say,
    });
    this.keys = new Keys((action, ...rest) => this.run(action, ...rest));
    byId("user").textContent = `${plain(userName(session), 64)} (${plain(session.role ?? "", 20)})`;
    byId("logout").hidden = userName(session) === "local";
    byId("archives-button").hidden = !about.archives;
    byId("model-name").textContent = `model: ${plain(about.model, 60)}`;
    this.listen();
    this.describe();
    this.isReady = true;
    new IdleWatch({
      idle: session.idle_s,
      ping: () => this.attempt(request("GET", "/session")),
      leave: () => this.leave(),
    });
  }

  leave(options) {
    if (this.isLeaving) return;
    this.isLeaving = true;
    // What is on its way comes to nothing: there will be no page that it could stand on.
    this.filmSide.choice += 1;
    this.filmSide.viewer.watch.disconnect();
    this.report.reset();
    this.reading.reset();
    return leavePage(options);
  }

  say(words) {
    if (this.isLeaving) return;
    const line = byId("message");
    line.textContent = plain(words, 300);
    clearTimeout(this.forgetting);
    this.forgetting = setTimeout(() => (line.textContent = ""), 12000);
  }

  // Every promise of a key or a button ends here: nothing fails unseen.
  attempt(promise) {
    Promise.resolve(promise).catch((error) => this.failed(error));
  }

  failed(error) {
    // The login has ended: what is not saved is kept sealed, and is there for its reader alone.
    if (error.status === 401) return this.leave({ isEnded: true });
    this.say(error.message);
  }

  // ---- From film to signature ----

  async openFile(file) {
    if (!file) return;
    if (file.size > this.about.most_bytes) return this.say(`A film may have ${this.about.most_bytes / 2 ** 20} MiB at most.`);
    if (!(await this.mayLeave())) return;
    await this.filmSide.upload(file);
  }

  /** Show a film that `fetchIt` brings; gives whether it is shown. */
  async pull(fetchIt) {
    if (!(await this.mayLeave())) return false;
    await this.filmSide.fetch(fetchIt);
    return true;
  }

  // What is not saved is saved first; another film must not take its page away.
  async mayLeave() {
    // Of one report, it would stand ready to be added to the next.
    if (this.signing?.hasAddendum) {
      this.say("The addendum is not added yet: add it, or empty its box.");
      return false;
    }
    if (!this.report || this.report.state !== "draft") return true;
    if (Object.keys(this.report.unsavedFields()).length === 0 || (await this.report.save())) return true;
    this.say("The report is not saved yet. It stays open until it is.");
    return false;
  }

  filmOpened(film) {
    this.reading.stop();
    this.reading.reset();
    this.report.reset();
    this.reading.film = film;
    const gate = byId("gate");
    gate.hidden = false;
    gate.className = `gate ${film.gate.state}`;
    const reasons = film.gate.reasons.map((reason) => plain(reason, 200)).join("; ");
    gate.textContent = `${GATE_WORDS[film.gate.state]}${reasons ? `: ${reasons}` : ""}`;
    gate.title = gate.textContent;
    byId("film-name").textContent = `film ${film.sha256.slice(0, 8)}`;
    this.say("");
    if (film.gate.state === "refused") this.attempt(this.reading.start(film));
    this.remember();
    byId("viewport").focus();
    this.describe();
  }

  async read(isReadAnyway = false) {
    const { film } = this.filmSide;
    if (!film) return this.say("Open a film first.");
    if (this.reading.isStreaming) return this.say("The model is reading.");
    if (this.reading.state === "done") return this.askOn();
    await this.reading.start(film, isReadAnyway);
  }

  askOn() {
    if (!this.about.chat) return this.say(byId("no-chat").textContent);
    byId("question").focus();
  }

  async readingDone(document) {
    const { film } = this.filmSide;
    if (document.image?.sha256 && document.image.sha256 !== film.sha256) {
      throw new Error("The reading is of another film: it is not shown.");
    }
    if (!this.report.id) await this.report.begin(film.sha256, this.reading.id);
    if (this.filmSide.film !== film) return;
    for (const { sentence, kind } of this.report.flags) if (sentence) this.reading.noteFlag(sentence, kind);
    this.remember();
  }

  async beginReport() {
    const { film } = this.filmSide;
    if (!film) return this.say("Open a film first.");
    if (!this.report.id) {
      if (this.reading.isStreaming) return this.say("The model is still reading: stop it or wait.");
      const reading = this.reading.state === "done" ? this.reading.id : null;
      await this.report.begin(film.sha256, reading, film.gate.state === "refused");
      this.remember();
    }
    this.report.focus(this.report.lastField ?? Object.keys(this.about.fields)[0]);
  }

  saveFailed(error) {
    if (this.report.isStale) return this.attempt(this.report.settle());
    this.failed(error);
  }

  // ---- Sentences ----

  async flag(letter) {
    byId("flagging").hidden = true;
    const kind = KINDS[letter];
    const { sentence } = this.reading;
    if (!kind) return this.say("Not flagged.");
    await this.flagAs(sentence, kind);
    this.say(`Sentence ${sentence.n} flagged: ${kind}.`);
  }

  async flagAs(sentence, kind, note) {
    if (!this.report.id) throw new Error("There is no report yet that the flag would belong to.");
    if (this.report.reading === null) throw new Error("The report was begun without this reading: its flags go nowhere.");
    const { id } = this.report;
    await this.report.flag(sentence.n, kind, note);
    if (this.report.id !== id) throw new Error("The flag was kept; another report is open now.");
    this.reading.noteFlag(sentence.n, kind);
  }

  beginFlag() {
    const { sentence } = this.reading;
    if (!sentence) return this.say("There is no sentence to flag.");
    byId("flag-words").textContent = `Flag sentence ${sentence.n}:`;
    byId("flagging").hidden = false;
    this.keys.follow = (key) => this.attempt(this.flag(key));
  }

  insert() {
    const { sentence } = this.reading;
    if (!sentence) return this.say("There is no sentence to insert.");
    const key = this.report.insert(sentence);
    this.say(key ? `Sentence ${sentence.n} stands under ${this.about.fields[key]}.` : "There is no report to insert it into.");
  }

  async reject() {
    const { sentence } = this.reading;
    if (!sentence) return this.say("There is no sentence to reject.");
    await this.flagAs(sentence, "wrong", "rejected");
    this.reading.reject(sentence.n);
    if (this.report.id) this.report.remove(sentence);
    this.say(`Sentence ${sentence.n} rejected and taken out of the report.`);
  }

  unfold(isOpen = byId("sentences").classList.contains("folded")) {
    byId("sentences").classList.toggle("folded", !isOpen);
    const button = byId("unfold");
    button.setAttribute("aria-expanded", String(isOpen));
    button.firstChild.textContent = isOpen ? "Fold " : "Unfold ";
  }

  blank() {
    this.isBlank = !this.isBlank;
    document.body.classList.toggle("blank", this.isBlank);
    byId("paused").hidden = !this.isBlank;
    byId("reading-side").inert = this.isBlank;
    this.filmSide.blank(this.isBlank);
  }

  goToField() {
    if (!this.report.id) return this.say("There is no report yet.");
    this.say("Go to: " + Object.entries(FIELD_KEYS).map(([letter, key]) => `${letter.toUpperCase()} ${this.about.fields[key]}`).join(", "));
    this.keys.follow = (key) => {
      this.say(FIELD_KEYS[key] ? "" : "No field has that key.");
      if (FIELD_KEYS[key]) this.report.focus(FIELD_KEYS[key]);
    };
  }

  // ---- Keys and buttons ----

  run(action, ...rest) {
    const { viewer } = this.filmSide;
    // While it is paused nothing is done that cannot be seen.
    if (this.isBlank && !["blank", "help"].includes(action)) return;
    const ofFilm = {
      window: () => this.filmSide.setTool("window"),
      zoom: () => this.filmSide.setTool("zoom"),
      pan: () => this.filmSide.setTool("pan"),
      in: () => viewer.zoomBy(1.25),
      out: () => viewer.zoomBy(0.8),
      fit: () => viewer.fit(),
      one: () => viewer.oneToOne(),
      invert: () => viewer.invert(),
      reset: () => viewer.reset(),
      lens: (isHeld) => this.filmSide.holdLens(isHeld),
      arrow: (across, down) => this.filmSide.arrow(across, down),
      modelView: () => this.filmSide.toggleModelView(),
    };
    const preset = /^preset([1-5])$/.exec(action);
    if (ofFilm[action] || preset) {
      if (!this.filmSide.film) return;
      return this.attempt(preset ? viewer.choose(Number(preset[1]) - 1) : ofFilm[action](...rest));
    }
    const ofReading = {
      open: () => byId("file").click(),
      read: () => this.read(),
      stop: () => this.stop(),
      blank: () => this.blank(),
      next: () => this.reading.step(1),
      previous: () => this.reading.step(-1),
      flag: () => this.beginFlag(),
      insert: () => this.insert(),
      reject: () => this.reject(),
      unfold: () => this.unfold(),
      go: () => this.goToField(),
      report: () => this.beginReport(),
      normal: () => this.report.setNormal(this.report.lastField),
      undo: () => this.report.undo(),
      redo: () => this.report.redo(),
      sign: () => this.signing.open(),
      exports: () => byId("exports").querySelector("a")?.focus(),
      archives: () => this.openArchives(),
      help: () => this.keys.showHelp(),
    };
    this.attempt(ofReading[action]?.());
  }

  openArchives() {
    if (!this.about.archives) return this.say("The operator has named no archive (pacs.toml in the store's folder).");
    return this.archives.open();
  }

  async stop() {
    byId("flagging").hidden = true;
    await this.reading.stop();
  }

  listen() {
    const click = (id, take) => byId(id).addEventListener("click", () => this.attempt(take()));
    for (const id of ["open-first", "open-another"]) click(id, () => this.run("open"));
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.addEventListener("click", () => this.run(button.dataset.tool));
    }
    for (const button of document.querySelectorAll("[data-flag]")) {
      button.addEventListener("click", () => {
        this.keys.follow = null;
        this.attempt(this.flag(button.dataset.flag));
      });
    }
    const buttons = {
      fit: "fit", "one-to-one": "one", invert: "invert", reset: "reset", "model-view": "modelView",
      "help-button": "help", stop: "stop", unfold: "unfold", "begin-report": "report", sign: "sign", read: "read",
      "archives-button": "archives",
    };
    for (const [id, action] of Object.entries(buttons)) click(id, () => this.run(action));
    click("magnify", () => this.filmSide.holdLens(!this.filmSide.viewer.lens));
    click("read-anyway", () => this.read(true));
    click("logout", () => this.logout());
    click("forget-keys", () => {
      this.keys.forget();
      byId("help").close();
      this.keys.showHelp();
    });
    byId("turn").addEventListener("change", (event) => this.filmSide.turn(Number(event.target.value)));
    byId("split").addEventListener("input", (event) => this.filmSide.moveSplit(event.target.value / 100));
    byId("file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      // The same file can be chosen again.
      this.attempt(this.openFile(file).finally(() => (event.target.value = "")));
    });
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      const box = byId("question");
      const text = box.value.trim();
      box.value = "";
      if (text) this.attempt(this.reading.ask(text));
    });
    click("compare", () => this.report.settle());
    this.listenForDrops();
  }

  listenForDrops() {
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      this.attempt(this.openFile(event.dataTransfer.files[0]));
    });
    window.addEventListener("beforeunload", (event) => {
      if (this.isLeaving) return;
      if (Object.keys(this.report.unsavedFields()).length || this.signing.hasAddendum) event.preventDefault();
    });
  }

  async logout() {
    if (await this.mayLeave()) await this.leave();
  }

  // ---- Coming back ----

  // The address names film, reading and report, so that a reload goes on; these are hashes and numbers, no data.
  remember() {
    const parts = new URLSearchParams();
    if (this.filmSide.film) parts.set("image", this.filmSide.film.sha256);
    if (this.reading.id) parts.set("reading", this.reading.id);
    if (this.report.id) parts.set("report", this.report.id);
    history.replaceState(null, "", `#${parts}`);
  }

  async comeBack() {
    // Where nothing is named, the last report that something was left of.
    const left = location.hash ? [] : [...(await this.report.unsaved.find()), ...(await this.signing.unsaved.find())];
    left.sort((one, other) => one.at - other.at);
    const parts = new URLSearchParams((left.at(-1)?.address ?? location.hash).slice(1));
    const [image, reading, report] = ["image", "reading", "report"].map((name) => parts.get(name));
    if (!image) return;
    await this.filmSide.load(await request("GET", `/room/images/${encodeURIComponent(image)}/info`));
    // The film alone is named by now; what is put back is kept once more under the whole address.
    history.replaceState(null, "", `#${parts}`);
    if (report) await this.report.open(report);
    await this.signing.putBackAddendum();
    this.reading.film = this.filmSide.film;
    if (reading) this.reading.follow(encodeURIComponent(reading));
    this.remember();
  }

  /** Before a film is open: the reader's own reports, by their time and state; of a film its hash is all there is. */
  async listReports() {
    if (!this.about.keeps || this.filmSide.film) return;
    const { reports } = await request("GET", "/room/reports");
    const items = reports.slice(0, 6).map(({ id, image, reading, state, version, created }) => {
      const at = new Date(created).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
      const words = `${at} \u00b7 ${state === "draft" ? "draft, not signed" : state === "signed" ? "signed" : "signed, with an addendum"} \u00b7 version ${version} \u00b7 film ${image.slice(0, 8)}`;
      const open = () => {
        const parts = new URLSearchParams({ image, report: id });
        if (reading) parts.set("reading", reading);
        history.replaceState(null, "", `#${parts}`);
        this.attempt(this.comeBack());
      };
      return make("li", {}, make("button", { type: "button", text: plain(words, 200), on: { click: open } }));
    });
    byId("my-reports").hidden = !items.length;
    replace(byId("my-reports").querySelector("ul"), ...items);
  }

  // ---- What depends on several of them ----

  describe() {
    if (this.isLeaving) return;
    // Parts are made one after another: the first of them ask for this before the last is there.
    if (!this.reading || !this.report) return;
    const { reading, report } = this;
    const hasFilm = Boolean(this.filmSide.film);
    byId("read").hidden = !["none", "stopped", "failed"].includes(reading.state);
    byId("read").disabled = !hasFilm;
    byId("unfold").hidden = !reading.sentences.length;
    byId("begin-report").hidden = !hasFilm || Boolean(report.id) || reading.isStreaming;
    byId("report-state").textContent = report.id
      ? `version ${report.version}, ${plain(report.state, 20)}${report.reading ? ", derived from the reasoning" : ""}`
      : "none yet";
    const canAsk = reading.state === "done";
    byId("ask").hidden = !canAsk || !this.about.chat;
    byId("no-chat").hidden = !canAsk || this.about.chat;
    byId("no-chat").textContent = `No further questions: ${plain(this.about.why_no_chat ?? "this model was not trained to answer them", 300)}.`;
    this.signing?.describe();
  }
}

function userName(session) {
  return session.user ?? "";
}

async function enter() {
  try {
    const session = await openSession();
    const room = new Room(session, await request("GET", "/room/about"));
    const fields = Object.entries(FIELD_KEYS).map(([letter, key]) => `${letter.toUpperCase()} ${room.about.fields[key]}`);
    byId("field-keys").textContent = `After G: ${fields.join(", ")}.`;
    await room.comeBack().catch((error) => room.failed(error));
    await room.listReports().catch((error) => room.failed(error));
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    if (error.status === 401) location.assign("/login");
    else byId("message").textContent = plain(error.message, 300);
  }
}

enter();
