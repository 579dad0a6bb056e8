// Thought capture: consent, then say or type what is seen, look at what is marked, set the labels, save.

import { Microphone, holdToTalk } from "./capture_recorder.js";
import { IdleWatch, leavePage } from "./leaving.js";
import { fetchBytes, openSession, request } from "./server.js";
import { Unsaved } from "./unsaved.js";
import { Viewer, followPointer } from "./viewer.js";
import { Chips, Looked, drawContradictions, drawEarlier, drawReview, element } from "./capture_review.js";

const CHECK_MS = 250; // after the last key
const POLL_MS = 400; // while a recording is being heard

const find = (id) => document.getElementById(id);
const text = find("text");

const page = {
  image: null, // sha256 of the film
  capture: null, // id of the thought
  version: 0,
  agreed: null, // sha256 of the text that was agreed to
  about: null,
  checked: { marks: [], proposals: [] },
  unseen: 0,
  heardUntil: 0, // seconds of the recording whose words are in the text
  hearing: null, // the promise of what is being heard
  kept: "", // the text as the server has it, and the labels that are set beside it
  keptLabels: null,
  keptAs: "", // under which name what is not saved is kept
  read: "", // the text that the marks are of
  isErasing: false,
  isSaving: false,
  confirming: null, // which button waits for its second press
  films: 0, // counts films that were asked for: the last one is shown
  thoughts: 0, // counts thoughts: what comes late is of an earlier one
};
const viewer = new Viewer(find("film-base"), find("film-overlay"));
let unsaved = new Unsaved(null);
const looked = new Looked();
const chips = new Chips(find("chips"), () => check());

// ---- The server ------------------------------------------------------------------------------------

async function ask(method, path, body, headers) {
  try {
    return await request(method, path, body, headers);
  } catch (error) {
    // The login has ended: nobody is there who may read on.
    if (error.status === 401) await leave({ isEnded: true });
    throw error;
  }
}

function say(id, message, isBad = false) {
  // What comes late finds no page any more.
  if (page.isLeaving) return;
  const place = find(id);
  place.textContent = message;
  place.classList.toggle("some", isBad);
}

// ---- The film --------------------------------------------------------------------------------------

/** Until a film is there nothing is typed or said: it would go with the film before, or stand under none. */
async function awaitFilm(turn, bring) {
  text.readOnly = page.isAwaitingFilm = true;
  try {
    await bring();
  } finally {
    if (turn === page.films) text.readOnly = page.isAwaitingFilm = false;
  }
}

const showFilm = (sha, bring = bringFilm, turn = ++page.films) => awaitFilm(turn, () => bring(sha, turn));

async function bringFilm(sha, turn) {
  const info = await ask("GET", `/room/images/${sha}/info`);
  const bytes = await (await fetchBytes(`/room/images/${sha}/pixels`)).arrayBuffer();
  if (bytes.byteLength !== 2 * info.rows * info.columns) throw new Error("the film came incomplete");
  if (turn !== page.films) return;
  page.image = sha;
  viewer.show(info, new Uint16Array(bytes));
  find("no-film").hidden = true;
  find("presets").replaceChildren(...info.windows.slice(0, 8).map((window_, index) => {
    const preset = element("button", window_.name.slice(0, 40));
    preset.type = "button";
    preset.addEventListener("click", () => viewer.choose(index));
    return preset;
  }));
  const gate = info.gate || { state: "ok", reasons: [] };
  say("gate", gate.state === "ok" ? "" : `${gate.state}: ${gate.reasons.join("; ")}`);
  const address = new URL(location.href);
  address.searchParams.set("image", sha);
  history.replaceState(null, "", address);
  await forgetThought();
}

/** A film, and the words that were left over it. */
async function openFilm(sha, turn) {
  await bringFilm(sha, turn);
  if (turn === page.films) await putBack();
}

followPointer(find("viewport"), viewer);

find("film-file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  const form = new FormData();
  form.append("file", file, "film");
  // A name may be a patient's: it leaves the page again, and never reaches the server.
  event.target.value = "";
  if (!mayDrop("film", "Choose the film once more")) return;
  const turn = ++page.films;
  try {
    say("gate", "reading the film ..");
    await awaitFilm(turn, async () => {
      const { sha256 } = await ask("POST", "/room/images", form);
      if (turn === page.films) await openFilm(sha256, turn);
    });
  } catch (error) {
    say("gate", error.message);
  }
});

// ---- The thought -----------------------------------------------------------------------------------

async function forgetThought() {
  microphone.close();
  page.thoughts += 1;
  microphone = makeMicrophone();
  Object.assign(page, { beginning: null, capture: null, version: 0, heardUntil: 0, confirming: null, kept: "", keptLabels: null });
  clearTimeout(timer);
  unsaved.forget(page.keptAs);
  text.value = "";
  chips.load(null);
  looked.follow("");
  say("status", "");
  say("hearing", "");
  await check();
  await listEarlier();
}

/** The thought that is being given; it begins with the first word, said or typed. */
async function thought() {
  if (page.capture) return page.capture;
  if (!page.beginning) {
    const turn = page.thoughts;
    page.beginning = ask("POST", "/capture", { image: page.image, consent_sha256: page.agreed })
      .then(async ({ id }) => {
        // Begun over the film before: what is said or typed now is not about that one.
        if (turn !== page.thoughts) {
          await ask("DELETE", `/capture/${id}`);
          throw new Error("another film is shown now");
        }
        page.capture = id;
        return id;
      })
      .finally(() => { if (turn === page.thoughts) page.beginning = null; });
  }
  return page.beginning;
}

async function openThought(id) {
  const turn = page.thoughts;
  const document_ = await ask("GET", `/capture/${id}`);
  if (turn !== page.thoughts) return;
  // Text of one film under another would be learnt as that one's.
  if (document_.image !== page.image) {
    if (!document_.image) throw new Error("this thought is about no film: open it before a film is shown");
    await showFilm(document_.image);
    if (page.image !== document_.image) return;
  }
  await forgetThought();
  Object.assign(page, { capture: id, version: document_.version, heardUntil: document_.seconds || 0 });
  page.kept = text.value = document_.text || "";
  chips.load(document_.labels);
  looked.follow(text.value);
  await check();
  page.keptLabels = chips.labels;
  // A recording that nobody has finished: the server or the page went away while somebody spoke.
  if (document_.state === "open" && document_.pieces && !document_.hearing) {
    say("hearing", "an unfinished recording is being heard ..");
    await hear(document_.pieces, "audio/webm");
  }
}

/** Whether nothing is on the page that the server does not have: words, or labels that were set beside them. */
function isSaved() {
  if (!text.value.trim()) return true;
  return text.value === page.kept && areSame(chips.labels, page.keptLabels);
}

const areSame = (ours, theirs) => JSON.stringify(ours) === JSON.stringify(theirs);

/** What is not saved stays in the browser, sealed for its reader, for a page that empties itself or is closed. */
function keepUnsaved() {
  page.keptAs = page.image ?? "no-film";
  const fields = isSaved() ? {} : { text: text.value, labels: chips.labels };
  const { image, capture, version, heardUntil } = page;
  unsaved.keep(page.keptAs, { fields, image, capture, version, heardUntil });
}

/** Words over this film that a page that is gone has left: they are the text again, of their own thought, not saved. */
async function putBack() {
  if (!page.agreed) return;
  const last = (await unsaved.find(page.image ?? "no-film")).at(-1);
  if (!last || text.value.trim()) return;
  const { text: words, labels } = last.fields;
  try {
    if (last.capture) await openThought(last.capture);
    // What was heard after they were sealed.
    const heard = last.capture ? spoken((await ask("GET", `/capture/${last.capture}`)).words, last.heardUntil) : "";
    const left = [words.trimEnd(), heard].filter(Boolean).join(" ");
    // Saved after all where they are the same: only the answer was lost.
    if (text.value !== left || !areSame(chips.labels, labels)) {
      text.value = left;
      chips.load(labels);
      await check();
      keepUnsaved(); // the labels are set again when the text is read
      const others = page.version === last.version ? "" : `; version ${page.version} has others`;
      say("status", `put back, not saved${others}`);
    }
    unsaved.drop([last]);
  } catch (error) {
    // Erased meanwhile: what was left of it goes, too.
    if (error.status === 404) unsaved.drop([last]);
    say("status", error.message);
  }
}

async function listEarlier() {
  const query = page.image ? `?image=${page.image}` : "";
  const { captures } = await ask("GET", `/capture/mine${query}`);
  const others = captures.slice(0, 20).filter(({ id }) => id !== page.capture);
  drawEarlier(find("earlier-list"), others, (id) => {
    if (!mayDrop(id, "Press open once more")) return;
    openThought(id).catch((error) => say("status", error.message));
  });
  find("earlier").hidden = !others.length;
}

// ---- Talking ---------------------------------------------------------------------------------------

function makeMicrophone() {
  const turn = page.thoughts;
  let id = null;
  return new Microphone({
    send: async (number, key, blob) => {
      // The last second comes when the microphone is closed: by then another thought may be there, and it is not its.
      if (turn === page.thoughts) id = await thought();
      if (!id) return null;
      const headers = { "Idempotency-Key": key, "Content-Type": "application/octet-stream" };
      return ask("PUT", `/capture/${id}/audio/${number}`, blob, headers);
    },
    changed: () => {
      const waiting = microphone.waiting;
      if (waiting > 1) say("hearing", `${waiting} seconds are kept here until the server has them`);
    },
    level: (value) => { find("level").value = value; },
  });
}
let microphone = makeMicrophone();

let isHeld = false;

async function hold() {
  if (isHeld || !page.about.engine || find("desk").hidden || page.isErasing) return;
  if (page.isAwaitingFilm) { say("hearing", "the film is on its way"); return; }
  // A version stands on the words that were heard: these may not change under it.
  if (page.version) { say("hearing", "the text is saved: type what is to be changed"); return; }
  isHeld = true;
  find("talk").setAttribute("aria-pressed", "true");
  try {
    await thought();
    await microphone.talk();
    say("hearing", "listening");
    // Let go while the microphone was still being asked for.
    if (!isHeld) await letGo();
  } catch (error) {
    isHeld = false;
    find("talk").setAttribute("aria-pressed", "false");
    say("hearing", `no microphone (${error.message}): please type`);
  }
}

async function release() {
  if (!isHeld) return;
  isHeld = false;
  await letGo();
}

async function letGo() {
  find("talk").setAttribute("aria-pressed", "false");
  if (!microphone.isTalking) return;
  const turn = page.thoughts;
  try {
    say("hearing", "sending ..");
    const pieces = await microphone.rest();
    if (pieces && turn === page.thoughts && !page.isErasing) await hear(pieces, microphone.mime);
  } catch (error) {
    say("hearing", error.message);
  }
}

/** Has the server hear the recording, and puts what is new in it behind the text. */
function hear(pieces, mime) {
  page.hearing = hearOnce(pieces, mime);
  return page.hearing;
}

/** What was said from a second of the recording on. */
function spoken(words, from) {
  return words.filter((word) => word.start >= from - 0.2).map((word) => word.text).join(" ");
}

async function hearOnce(pieces, mime) {
  const id = page.capture;
  await ask("POST", `/capture/${id}/finish`, { pieces, mime });
  say("hearing", "writing down ..");
  let heard = await ask("GET", `/capture/${id}`);
  while (heard.hearing) {
    await new Promise((done) => setTimeout(done, POLL_MS));
    // Another thought is there, or this one is being erased: nobody waits for its words.
    if (page.capture !== id || page.isErasing) return;
    heard = await ask("GET", `/capture/${id}`);
  }
  if (page.capture !== id || page.isErasing) return;
  if (heard.failure) { say("hearing", heard.failure); return; }
  const fresh = spoken(heard.words, page.heardUntil);
  page.heardUntil = heard.seconds || 0;
  say("hearing", fresh ? "" : "nothing was heard");
  if (!fresh) return;
  text.value = text.value.trim() ? `${text.value.trimEnd()} ${fresh}` : fresh;
  await check();
}

holdToTalk(find("talk"), { hold, release });

// ---- Looking ---------------------------------------------------------------------------------------

let checks = 0;
let timer = 0;

async function check() {
  keepUnsaved();
  looked.follow(text.value);
  page.confirming = null;
  say("confirm", "");
  if (!text.value.trim()) {
    page.checked = { marks: [], proposals: [] };
    draw();
    find("save").disabled = true;
    return;
  }
  // Its marks are not known yet.
  if (text.value !== page.read) find("save").disabled = true;
  const number = ++checks;
  const value = text.value;
  try {
    const id = await thought();
    const checked = await ask("POST", `/capture/${id}/check`, { text: value, labels: chips.labels });
    // A later key is on its way already.
    if (number !== checks || value !== text.value) return;
    page.checked = checked;
    page.read = value;
    chips.draw(checked.read.findings, checked.contradictions);
    drawContradictions(find("contradictions"), checked.contradictions, checked.problems);
    draw();
  } catch (error) {
    say("status", error.message);
  }
}

function draw() {
  page.unseen = drawReview(find("review"), text.value, page.checked, looked, {
    onLook: (word) => { looked.toggle(word); page.confirming = null; draw(); },
    onPropose: (first, last, word) => {
      const replaced = text.value.slice(first, last);
      // The sentence ends where it ended, and begins as it began: the labeler reads by sentences.
      const ending = replaced.match(/[.,;:!?]*$/)[0];
      const isCapital = /^[A-Z]/.test(replaced);
      const put = (isCapital ? word[0].toUpperCase() + word.slice(1) : word) + ending;
      text.value = text.value.slice(0, first) + put + text.value.slice(last);
      check();
    },
  });
  const isReady = text.value.trim() && text.value === page.read && !page.unseen;
  say("unseen", page.unseen ? `${page.unseen} marked words to look at` : "", page.unseen > 0);
  find("save").disabled = !isReady;
  find("save").classList.toggle("ready", Boolean(isReady));
}

text.addEventListener("input", () => {
  keepUnsaved();
  looked.follow(text.value);
  find("save").disabled = true;
  clearTimeout(timer);
  timer = setTimeout(check, CHECK_MS);
});

// ---- Keeping and erasing ---------------------------------------------------------------------------

/** Whether this press is the second one; the first says what the second will do. */
function isConfirmed(button, question) {
  if (page.confirming === button) { page.confirming = null; say("confirm", ""); return true; }
  page.confirming = button;
  say("confirm", question);
  return false;
}

/** Whether the text may go: one that is not saved goes at the second time of asking. */
function mayDrop(what, how) {
  return isSaved() || isConfirmed(what, `What is here is not saved. ${how} to drop it.`);
}

window.addEventListener("beforeunload", (event) => {
  if (!page.isLeaving && !isSaved()) event.preventDefault();
});

find("save").addEventListener("click", async () => {
  if (page.isSaving) return;
  // A speech model that has lost a "no" leaves no word to mark: so what is affirmed is read once more.
  const present = chips.present.join(", ") || "nothing";
  if (!isConfirmed("save", `Present: ${present}. Press Save again if that is what you mean.`)) return;
  const turn = page.thoughts;
  const kept = text.value;
  page.isSaving = true;
  try {
    const content = { text: kept, labels: chips.labels, looked: [...looked.numbers], image: page.image };
    const saved = await ask("PUT", `/capture/${page.capture}/text`, content, { "If-Match": String(page.version) });
    if (turn !== page.thoughts) return;
    Object.assign(page, { version: saved.version, kept, keptLabels: content.labels });
    keepUnsaved();
    const differ = saved.contradictions.length ? `; ${saved.contradictions.length} contradictions: no row yet` : "";
    say("status", `saved as version ${saved.version}, ${new Date().toLocaleTimeString()}${differ}`);
    microphone.close({ isDone: true });
    await listEarlier();
  } catch (error) {
    say("status", error.message);
    if (error.status === 409) await check();
  } finally {
    page.isSaving = false;
  }
});

find("erase").addEventListener("click", async () => {
  if (!page.capture) { await forgetThought(); return; }
  if (!isConfirmed("erase", "Erase the recording and all texts of this thought? Press Erase again.")) return;
  // What is still sent or asked of a thought that is gone would be refused; what is typed now would go with it.
  page.isErasing = text.readOnly = true;
  clearTimeout(timer);
  try {
    await Promise.allSettled([microphone.drop(), page.hearing]);
    await ask("DELETE", `/capture/${page.capture}`);
    await forgetThought();
    say("status", "erased");
  } catch (error) {
    say("status", error.message);
  } finally {
    page.isErasing = false;
    text.readOnly = Boolean(page.isAwaitingFilm);
  }
});

// ---- Beginning -------------------------------------------------------------------------------------

find("consent").addEventListener("submit", async (event) => {
  event.preventDefault();
  page.agreed = page.about.consent.sha256;
  find("consent").hidden = true;
  find("desk").hidden = false;
  find("talk").hidden = find("level").hidden = !page.about.engine;
  if (!page.about.engine) say("talk-help", "This server hears nothing: please type.");
  text.focus();
  // A film that is on its way brings them with it.
  if (!page.isAwaitingFilm) await awaitFilm(page.films, putBack);
});

async function leave(options) {
  if (page.isLeaving) return;
  page.isLeaving = true;
  clearTimeout(timer);
  microphone.close();
  viewer.watch.disconnect();
  await leavePage(options);
}

async function start() {
  const session = await openSession();
  unsaved = new Unsaved(session.sealing, "thoughts");
  new IdleWatch({ idle: session.idle_s, ping: () => ask("GET", "/session").catch(() => {}), leave });
  say("who", session.user?.handle || session.user || "");
  page.about = await ask("GET", "/capture/about");
  find("consent-text").textContent = page.about.consent.text;
  find("consent").hidden = false;
  find("agree").focus();
  const sha = new URL(location.href).searchParams.get("image");
  // Where no film is named, the last one that words were left over.
  const shown = sha ?? (await unsaved.find()).at(-1)?.image;
  if (shown && /^[0-9a-f]{64}$/.test(shown)) await showFilm(shown, openFilm);
  else await listEarlier();
}

start().then(() => { document.documentElement.dataset.ready = "yes"; }, (error) => {
  if (error.status === 401) { leave({ isEnded: true }); return; }
  // The desk is not shown yet, so the reason stands where consent would.
  find("consent-text").textContent = error.message;
  find("consent").hidden = false;
  find("agree").disabled = true;
});
