// The reader study's page: the server says what comes next, the page shows it, times it and saves it.

import { byId, make, plain, replace } from "./dom.js";
import { OFFLINE, fetchBytes, openSession, request } from "./server.js";
import { Clock } from "./study_clock.js";
import { Form } from "./study_form.js";
import { Viewer } from "./viewer.js";

const viewer = new Viewer(byId("film"), byId("overlay"));
byId("film").viewer = viewer;
const NAMES = {
  "": "Without AI",
  labels: "Labels of the AI",
  "labels draft": "Labels and draft of the AI",
  "labels sentences draft": "Labels, reasoning and draft of the AI",
};
let task = null; // {id, path, binding, clock, form}

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
  await next();
}

async function next() {
  task = null;
  byId("reading").hidden = true;
  let following;
  try {
    following = await request("GET", "/study/next");
  } catch (error) {
    return card(error.status === 423 ? "Not yet" : "Stopped", plain(error.message, 300), null);
  }
  byId("stamp").hidden = !following.simulated;
  if (following.kind === "done") return card("Done", "You have read everything. Thank you.", null);
  if (following.kind === "ratings") return rate(following.task, following.items);
  if (following.kind === "questionnaire") return questionnaire(following);
  byId("place").textContent = `Session ${following.session} of ${following.sessions}, film ${following.position} of ${following.of}`;
  const open = () => openTask(following).catch(say);
  if (!following.card) return open();
  const practice = following.practice ? " The next films are practice." : "";
  card(NAMES[following.shows.join(" ")] ?? following.shows.join(", "), `The form stays the same.${practice} Errors occur.`, open);
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
  task = { id: following.task, path, page, clock, form, shown: opened.shown_sha256, version: opened.version, timer: null };
  byId("remark").textContent = "";
  // Two frames: the first is asked for, after the second it has been painted.
  requestAnimationFrame(() => requestAnimationFrame(() => clock.tell(opened.resumed ? "task_resumed" : "task_shown")));
  byId("viewport").focus();
}

function filmOf({ rows, columns }) {
  const whole = { name: "full range", center: 32768, width: 65536, function: "LINEAR" };
  return { rows, columns, aspect: 1, slope: 1, offset: 0, inverted: false, padding: null, levels_range: [0, 65535], windows: [whole] };
}

// ---- Saving ----------------------------------------------------------------------------------------

const binding = () => ({ page: task.page, shown_sha256: task.shown });

function saveSoon() {
  task.clock.tellOnce("first_edit");
  clearTimeout(task.timer);
  task.timer = setTimeout(() => save().catch(say), 400);
}

/** Save what the form holds; the same request is sent until it is answered. */
async function save() {
  const mine = task;
  clearTimeout(mine.timer);
  if (mine.saving) await mine.saving.catch(() => {});
  const body = { ...binding(), idem_key: newName(), version: mine.version, answer: mine.form.answer() };
  mine.saving = insist("POST", `${mine.path}/answer`, body);
  const saved = await mine.saving;
  mine.version = saved.version;
  byId("saved").textContent = `saved ${new Date().toLocaleTimeString()}`;
}

async function insist(method, path, body) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      return await request(method, path, body);
    } catch (error) {
      if (error.status !== OFFLINE) throw error;
      byId("saved").textContent = "offline, kept here";
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

function sendEvents(path, page, events) {
  return insist("POST", `${path}/events`, { page, idem_key: newName(), events });
}

async function sign() {
  if (!task) return;
  const missing = task.form.missing();
  if (missing) return void (byId("remark").textContent = missing);
  task.clock.tell("sign");
  await save();
  await task.clock.flush();
  const confidence = task.form.confidence;
  const body = { ...binding(), idem_key: newName(), version: task.version, confidence };
  const signed = await insist("POST", `${task.path}/sign`, body);
  task.clock.stop();
  if (signed.items.length) return rate(task.id, signed.items);
  await next();
}

async function skip() {
  const reason = prompt("Why can this film not be judged?");
  if (!reason || !task) return;
  task.clock.stop();
  await insist("POST", `${task.path}/skip`, { ...binding(), idem_key: newName(), reason });
  await next();
}

// ---- Cards -----------------------------------------------------------------------------------------

function card(title, text, go) {
  byId("reading").hidden = true;
  byId("card").hidden = false;
  const button = go && make("button", { className: "main-action", text: "Go on", type: "button", on: { click: go } });
  replace(byId("card"), make("h1", { text: title }), make("p", { text }), button);
  button?.focus();
}

function scale(name, question, points, chosen) {
  const buttons = points.map((text, number) =>
    make("button", { type: "button", text: `${number + 1}  ${text}`, "aria-pressed": "false", on: { click: () => {
      chosen[name] = number + 1;
      buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === number)));
    } } }));
  return make("div", {}, make("h2", { text: question }), make("div", { className: "points" }, ...buttons));
}

function rate(id, items) {
  byId("reading").hidden = true;
  byId("card").hidden = false;
  const ratings = {};
  const done = async () => {
    if (Object.keys(ratings).length < items.length) return;
    await insist("POST", `/study/tasks/${id}/ratings`, { ratings, idem_key: newName() });
    await next();
  };
  const button = make("button", { className: "main-action", type: "button", text: "Next film", on: { click: () => done().catch(say) } });
  replace(byId("card"), ...items.map((item) => scale(item.name, item.question, item.points, ratings)), button);
}

function questionnaire({ session, tlx, sus }) {
  byId("card").hidden = false;
  const given = {};
  const agree = ["strongly disagree", "disagree", "neither", "agree", "strongly agree"];
  const loads = ["none", "10", "20", "30", "40", "50", "60", "70", "80", "90", "the most"];
  const rows = [...tlx.map((name) => scale(`t ${name}`, name, loads, given)), ...sus.map((text, n) => scale(`s ${n}`, text, agree, given))];
  const done = async () => {
    if (Object.keys(given).length < rows.length) return;
    const answers = { tlx: tlx.map((name) => 10 * (given[`t ${name}`] - 1)), sus: sus.map((_, n) => given[`s ${n}`]) };
    await insist("POST", "/study/questionnaire", { session, answers });
    await next();
  };
  const button = make("button", { className: "main-action", type: "button", text: "Done", on: { click: () => done().catch(say) } });
  replace(byId("card"), make("h1", { text: `End of session ${session}` }), ...rows, button);
}

function say(error) {
  byId("remark").textContent = plain(error.message, 300);
  // Another tab has the task, or it is done: only the server knows what comes now.
  if (error.status === 409) card("Stopped", plain(error.message, 300), () => next().catch(say));
}

// ---- Keys and mouse --------------------------------------------------------------------------------

function pause() {
  if (!task) return;
  const isPaused = document.body.classList.toggle("paused");
  byId("paused").hidden = !isPaused;
  task.clock.tell(isPaused ? "pause" : "resume");
}

document.addEventListener("keydown", (event) => {
  if (!task) return;
  task.clock.input();
  if (event.ctrlKey && event.key === "Enter") return void sign().catch(say);
  if (event.altKey && event.key.toLowerCase() === "a") return void (event.preventDefault(), task.form.restAbsent());
  if (/TEXTAREA|INPUT|SELECT/.test(event.target.tagName) || event.ctrlKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "b") pause();
  if (key === "i") viewer.invert();
  if (key === " " && event.target.tagName !== "BUTTON") viewer.show(viewer.film, viewer.stored.levels);
});

let drag = null;
byId("viewport").addEventListener("pointerdown", (event) => {
  if (!task) return;
  drag = { x: event.clientX, y: event.clientY };
  byId("viewport").setPointerCapture(event.pointerId);
});
byId("viewport").addEventListener("pointermove", (event) => {
  task?.clock.input();
  if (!drag || !viewer.film) return;
  viewer.dragWindow(event.clientX - drag.x, event.clientY - drag.y);
  drag = { x: event.clientX, y: event.clientY };
});
byId("viewport").addEventListener("pointerup", () => {
  if (drag && task) task.clock.tell("window");
  drag = null;
});
document.addEventListener("visibilitychange", () => task?.clock.tell(document.hidden ? "hidden" : "visible"));
for (const [id, call] of [["sign", sign], ["skip", skip], ["pause", pause]]) byId(id).addEventListener("click", () => Promise.resolve(call()).catch(say));
byId("invert").addEventListener("click", () => viewer.film && viewer.invert());
byId("reset").addEventListener("click", () => viewer.film && viewer.show(viewer.film, viewer.stored.levels));
byId("rest-absent").addEventListener("click", () => task?.form.restAbsent());

start();
