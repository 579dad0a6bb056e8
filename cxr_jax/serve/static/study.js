// The reader study's page: the server says what comes next, the page shows it, times it and saves it.

import { byId, make, plain, replace } from "./dom.js";
import { IdleWatch, leavePage } from "./leaving.js";
import { fetchBytes, openSession, request } from "./server.js";
import { Clock } from "./study_clock.js";
import { Form } from "./study_form.js";
import { Viewer } from "./viewer.js";

const viewer = new Viewer(byId("film"), byId("overlay"));
byId("film").viewer = viewer;
const NAMES = {
  "": "The next films: without AI",
  labels: "The next films: with the AI's findings",
  "labels draft": "The next films: with the AI's findings and draft report",
  "labels sentences draft": "The next films: with the AI's findings, reasoning and draft report",
};
const FLAG_OF_KEY = { w: "wrong", s: "side", m: "missing", o: "overconfident" };
const LEAVE_WITHIN = 2000; // ms; a server that is away is not waited for
let task = null; // {id, path, binding, clock, form}

let steps = 0;
/** Count what has been put before the reader, for programs that drive the page. */
const stepDone = () => (document.body.dataset.step = String((steps += 1)));
const newName = () => crypto.randomUUID().replaceAll("-", "");

async function start() {
  let session = null;
  try {
    session = await openSession();
  } catch (error) {
    if (error.status === 401) return location.assign("/login");
    return say(error);
  }
  byId("user").textContent = session.user;
  const ping = () => request("GET", "/session").catch(() => {});
  new IdleWatch({ idle: session.idle_s, ping, leave: empty });
  await next();
}

/** The reader has gone: what is filled in is saved and the time told, if the server is there; then nothing is left to see. */
async function empty() {
  const mine = task;
  viewer.watch.disconnect();
  byId("reading").hidden = true;
  if (mine) {
    const told = Promise.all([save(), mine.clock.leave()]).catch(() => {});
    await Promise.race([told, new Promise((done) => setTimeout(done, LEAVE_WITHIN))]);
    mine.isOver = true;
  }
  await leavePage();
}

async function next() {
  task = null;
  byId("reading").hidden = true;
  let following;
  try {
    following = await request("GET", "/study/next");
  } catch (error) {
    return stopped(error);
  }
  byId("stamp").hidden = !following.simulated;
  if (following.kind === "done") return card("Done", "You have read everything. Thank you.", null);
  byId("place").textContent = "";
  if (following.kind === "ratings") return rate(following.task, following.items);
  if (following.kind === "questionnaire") return questionnaire(following);
  const kind = following.practice ? " (practice)" : "";
  byId("place").textContent = `Session ${following.session} of ${following.sessions}, film ${following.position} of ${following.of}${kind}`;
  const open = () => openTask(following);
  if (!following.card) return open().catch(stopped);
  const practice = following.practice ? " The first of them is practice and counts for nothing." : "";
  const errors = following.shows.length ? " The AI makes mistakes: hold what it says against the film." : "";
  card(NAMES[following.shows.join(" ")] ?? following.shows.join(", "), `The form is the same for all films.${practice}${errors} Time counts until you sign; B pauses it.`, open);
}

async function openTask(following) {
  const path = `/study/tasks/${following.task}`;
  const page = newName();
  const opened = await request("POST", `${path}/open`, { page });
  const answer = await fetchBytes(`${path}/pixels`);
  const levels = new Uint16Array(await answer.arrayBuffer());
  byId("card").hidden = true;
  byId("reading").hidden = false;
  viewer.resize();
  viewer.show(filmOf(opened.film), levels);
  const clock = new Clock((events) => sendEvents(path, page, events), opened.form.idle_after_s);
  const form = new Form(opened, () => saveSoon());
  task = { id: following.task, path, page, clock, form, shown: opened.shown_sha256, version: opened.version, timer: null, edits: 0, saved: 0 };
  byId("remark").textContent = "";
  byId("saved").textContent = "";
  // Two frames: the first is asked for, after the second it has been painted.
  requestAnimationFrame(() => requestAnimationFrame(() => {
    clock.tell(opened.resumed ? "task_resumed" : "task_shown");
    if (Object.keys(opened.shown).length) clock.tell("ai_shown");
  }));
  byId("form-side").scrollTop = 0;
  byId("viewport").focus();
  stepDone();
}

function filmOf({ rows, columns }) {
  const whole = { name: "full range", center: 32768, width: 65536, function: "LINEAR" };
  return { rows, columns, aspect: 1, slope: 1, offset: 0, inverted: false, padding: null, levels_range: [0, 65535], windows: [whole] };
}

// ---- Saving ----------------------------------------------------------------------------------------

// Of the task that a request was made for: by the time it is sent another may be shown.
const binding = ({ page, shown }) => ({ page, shown_sha256: shown });

function saveSoon() {
  if (!task) return;
  task.clock.tellOnce("first_edit");
  clearTimeout(task.timer);
  task.edits += 1;
  task.timer = setTimeout(() => save().catch(say), 400);
}

/** Save what the form holds; the same request is sent until it is answered. */
async function save() {
  const mine = task;
  if (!mine || mine.isOver) return;
  clearTimeout(mine.timer);
  // One after the other, however many wait: each is made from the version that the one before it has become.
  mine.saving = (mine.saving ?? Promise.resolve()).catch(() => {}).then(() => put(mine));
  await mine.saving;
}

async function put(mine) {
  if (mine.isOver) return;
  const body = { ...binding(mine), idem_key: newName(), version: mine.version, answer: mine.form.answer() };
  const { edits } = mine;
  const saved = await insist("POST", `${mine.path}/answer`, body);
  mine.version = saved.version;
  mine.saved = edits;
  byId("saved").textContent = `saved ${new Date().toLocaleTimeString()}`;
}

/** Whether a server has refused a request. One that failed, was too busy or not reached may be sent the same again. */
const isRefusal = ({ status }) => status >= 400 && status < 500 && status !== 429;

async function insist(method, path, body) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      return await request(method, path, body);
    } catch (error) {
      if (isRefusal(error)) throw error;
      byId("saved").textContent = "offline, kept here";
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

function sendEvents(path, page, events) {
  return insist("POST", `${path}/events`, { page, idem_key: newName(), events });
}

/**
 * Sign or skip the film that is shown, once: keys repeat, buttons are pressed twice, and the next film comes quickly.
 * `ask` gives what is sent beside the answer, or null as long as something is missing; `send` sends it.
 */
async function end(ask, send) {
  const mine = task;
  if (!mine || mine.isEnding || document.body.classList.contains("paused")) return;
  const more = ask(mine);
  if (!more) return;
  // What is being signed does not change any more, however long the connection takes.
  mine.isEnding = byId("reading").inert = true;
  try {
    await save();
    await send(mine, more);
  } finally {
    mine.isEnding = false;
    if (task === mine) byId("reading").inert = false;
  }
}

function signature(mine) {
  const missing = mine.form.missing();
  byId("remark").textContent = missing && `Not signed yet: ${missing}.`;
  if (missing) return null;
  mine.clock.tell("sign");
  return mine.form.signature();
}

const sign = () => end(signature, async (mine, more) => {
  await mine.clock.flush();
  const body = { ...binding(mine), idem_key: newName(), version: mine.version, ...more };
  const signed = await insist("POST", `${mine.path}/sign`, body);
  leave(mine);
  if (signed.items.length) return rate(mine.id, signed.items);
  await next();
});

const skip = () => end(() => prompt("Why can this film not be judged?"), async (mine, reason) => {
  await mine.clock.flush();
  await insist("POST", `${mine.path}/skip`, { ...binding(mine), idem_key: newName(), reason });
  leave(mine);
  await next();
});

/** Let a task go: nothing of it is saved or timed any more. */
function leave(mine) {
  mine.isOver = true;
  clearTimeout(mine.timer);
  mine.clock.stop();
  byId("reading").inert = false;
  task = null;
}

// ---- Cards -----------------------------------------------------------------------------------------

function card(title, text, go) {
  byId("reading").hidden = true;
  byId("card").hidden = false;
  const remark = make("p", { role: "alert" });
  const press = () => {
    // Once: a second click would open the film in a second tab of this page.
    button.disabled = true;
    go().catch((error) => {
      button.disabled = false;
      remark.textContent = plain(error.message, 300);
    });
  };
  const button = go && make("button", { className: "main-action", text: "Go on", type: "button", on: { click: press } });
  replace(byId("card"), make("h1", { text: title }), make("p", { text }), button, remark);
  button?.focus();
  stepDone();
}

/** Say what has stopped the reader, and offer to ask again where that may help. */
function stopped(error) {
  if (error.status === 401) return location.assign("/login");
  const mayHelp = error.status === 409 || !isRefusal(error);
  card(error.status === 423 ? "Not yet" : "Stopped", plain(error.message, 300), mayHelp ? next : null);
}

/** Questions with a button that sends them once all are answered, and once only. */
function questions(parts, rows, given, label, send) {
  byId("reading").hidden = true;
  byId("card").hidden = false;
  byId("card").scrollTop = 0;
  const remark = make("p", { role: "alert" });
  const done = async () => {
    const left = rows.length - Object.keys(given).length;
    remark.textContent = left ? `${left} of ${rows.length} questions are not answered yet.` : "";
    if (left) return;
    button.disabled = true;
    await send();
    await next();
  };
  const fail = (error) => {
    remark.textContent = plain(error.message, 300);
    button.disabled = false;
    say(error);
  };
  const button = make("button", { className: "main-action", type: "button", text: label, on: { click: () => done().catch(fail) } });
  replace(byId("card"), ...parts, ...rows, button, remark);
  stepDone();
}

function scale(name, question, points, chosen) {
  const buttons = points.map((text, number) =>
    make("button", { type: "button", text: points.length > 7 ? text : `${number + 1}  ${text}`, "aria-pressed": "false", on: { click: () => {
      chosen[name] = number + 1;
      buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === number)));
    } } }));
  // Numbers stand in a line, sentences one under the other.
  const className = points.length > 7 ? "points short" : "points";
  return make("div", {}, make("h2", { text: question }), make("div", { className }, ...buttons));
}

function rate(id, items) {
  const ratings = {};
  const parts = [make("h1", { text: "The film that you have signed" }), make("p", { text: "These questions are not timed." })];
  const rows = items.map((item) => scale(item.name, item.question, item.points, ratings));
  const send = () => insist("POST", `/study/tasks/${id}/ratings`, { ratings, idem_key: newName() });
  questions(parts, rows, ratings, "Next film", send);
}

function questionnaire({ session, tlx, sus }) {
  const given = {};
  const agree = ["strongly disagree", "disagree", "neither", "agree", "strongly agree"];
  const loads = ["none", "10", "20", "30", "40", "50", "60", "70", "80", "90", "the most"];
  const rows = [...tlx.map((name) => scale(`t ${name}`, name, loads, given)), ...sus.map((text, n) => scale(`s ${n}`, text, agree, given))];
  const send = () => {
    const answers = { tlx: tlx.map((name) => 10 * (given[`t ${name}`] - 1)), sus: sus.map((_, n) => given[`s ${n}`]) };
    return insist("POST", "/study/questionnaire", { session, answers });
  };
  questions([make("h1", { text: `End of session ${session}` })], rows, given, "Done", send);
}

function say(error) {
  byId("remark").textContent = plain(error.message, 300);
  // Another tab has the task, or it is done: only the server knows what comes now.
  if (error.status === 409) stopped(error);
}

// ---- Keys and mouse --------------------------------------------------------------------------------

function pause() {
  if (!task) return;
  const isPaused = document.body.classList.toggle("paused");
  byId("paused").hidden = !isPaused;
  task.clock.tell(isPaused ? "pause" : "resume");
}

let isFlagging = false;
let zoomTimer = null;
document.addEventListener("keydown", (event) => {
  // A key that is held, or that signs, presses no button of the card that comes next.
  if (event.key === "Enter" && (event.repeat || event.ctrlKey) && event.target.tagName === "BUTTON") event.preventDefault();
  if (!task || task.isEnding) return;
  task.clock.input();
  if (event.ctrlKey && event.key === "Enter") return void sign().catch(say);
  if (event.altKey && event.key.toLowerCase() === "a") return void (event.preventDefault(), task.form.restAbsent());
  if (event.key === "Escape") byId("viewport").focus();
  if (/TEXTAREA|INPUT|SELECT/.test(event.target.tagName) || event.ctrlKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "b") pause();
  // A pause covers everything: no key works behind it.
  if (document.body.classList.contains("paused")) return;
  const flag = isFlagging && FLAG_OF_KEY[key];
  isFlagging = key === "f";
  if (flag) return task.form.flag(flag);
  if (key === "i") viewer.invert();
  if (key === " " && event.target.tagName !== "BUTTON") viewer.reset();
  if (key === "j" || key === "k") task.form.step(key === "j" ? 1 : -1);
  if (/^[1-7]$/.test(key)) task.form.setConfidence(Number(key));
  if (key === "+" || key === "-") zoom(key === "+" ? 1.25 : 0.8);
  if (key === "=") viewer.fit();
});

function zoom(factor, x, y) {
  viewer.zoomBy(factor, x, y);
  // A turn of the wheel is one event and not fifty.
  clearTimeout(zoomTimer);
  zoomTimer = setTimeout(() => task?.clock.tell("zoom"), 300);
}

byId("viewport").addEventListener("wheel", (event) => {
  if (!task || !viewer.film) return;
  event.preventDefault();
  const box = byId("viewport").getBoundingClientRect();
  zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1, (event.clientX - box.x) * devicePixelRatio, (event.clientY - box.y) * devicePixelRatio);
}, { passive: false });

let drag = null;
byId("viewport").addEventListener("pointerdown", (event) => {
  if (!task) return;
  drag = { x: event.clientX, y: event.clientY };
  byId("viewport").setPointerCapture(event.pointerId);
});
byId("viewport").addEventListener("pointermove", (event) => {
  if (!drag || !viewer.film) return;
  viewer.dragWindow(event.clientX - drag.x, event.clientY - drag.y);
  drag = { x: event.clientX, y: event.clientY };
});
byId("viewport").addEventListener("pointerup", () => {
  if (drag && task) task.clock.tell("window");
  drag = null;
});
// Whoever works in the form is as busy as who looks at the film; on the way down, so that nothing can keep it back.
for (const kind of ["pointermove", "pointerdown", "wheel", "input"]) {
  document.addEventListener(kind, () => task?.clock.input(), { capture: true, passive: true });
}
// The page alone has what the server has not answered: whoever reloads it is asked before that is lost.
window.addEventListener("beforeunload", (event) => {
  if (task && !task.isOver && task.edits !== task.saved) event.preventDefault();
});
document.addEventListener("visibilitychange", () => task?.clock.tell(document.hidden ? "hidden" : "visible"));
for (const [id, call] of [["sign", sign], ["skip", skip], ["pause", pause]]) byId(id).addEventListener("click", () => Promise.resolve(call()).catch(say));
byId("invert").addEventListener("click", () => viewer.film && viewer.invert());
byId("reset").addEventListener("click", () => viewer.film && viewer.reset());
byId("rest-absent").addEventListener("click", () => task?.form.restAbsent());

start();
