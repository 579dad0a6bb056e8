// Keys: OHIF's where it has them. Off while typing, except with Alt, Control or Escape; each can be changed.

import { byId, make, replace } from "./dom.js";

const PLACE = "cxr_jax.keys";

// Name, default key, words. A key is what `keyOf` gives; what is held or typed after another has its own rows.
export const ACTIONS = [
  ["open", "o", "open a film"],
  ["read", "q", "ask the model to read it; after the reading, a further question"],
  ["stop", "Escape", "stop the reading; close what is open"],
  ["window", "w", "window tool (then arrows: width, centre)"],
  ["zoom", "z", "zoom tool (then arrows)"],
  ["pan", "p", "pan tool (then arrows)"],
  ["in", "+", "zoom in"],
  ["out", "-", "zoom out"],
  ["fit", "=", "fit"],
  ["one", "0", "one film pixel a screen pixel"],
  ["invert", "i", "invert"],
  ["reset", " ", "reset window, zoom and turn"],
  ["preset1", "1", "first window"],
  ["preset2", "2", "second window"],
  ["preset3", "3", "third window"],
  ["preset4", "4", "fourth window"],
  ["preset5", "5", "fifth window"],
  ["lens", "m", "hold: magnifier (arrows move it)"],
  ["modelView", "v", "as the model saw it (left, right move the split)"],
  ["blank", "b", "pause: blank film and text"],
  ["next", "j", "next sentence"],
  ["previous", "k", "previous sentence"],
  ["flag", "f", "flag the sentence, then W wrong, S side, M missing, O overconfident"],
  ["insert", "a", "insert the sentence into the report"],
  ["reject", "x", "reject the sentence"],
  ["unfold", "t", "open or fold the reasoning"],
  ["go", "g", "go to a field, then its letter"],
  ["report", "e", "begin the report, or go to it"],
  ["normal", "Alt+n", "write the normal text of the field"],
  ["undo", "Control+z", "undo"],
  ["redo", "Control+y", "redo"],
  ["sign", "Control+Enter", "sign"],
  ["exports", "s", "go to the exports"],
  ["archives", "d", "archives: find a film, send the report"],
  ["help", "?", "these keys"],
];

/** A key with its modifiers, such as "Alt+n"; Shift counts only in what it types. */
export function keyOf(event) {
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  // Option and a letter type another letter on some keyboards: the place of the key is what is meant.
  const letter = event.altKey && /^Key[A-Z]$/.test(event.code) ? event.code.slice(3).toLowerCase() : name;
  return `${event.ctrlKey || event.metaKey ? "Control+" : ""}${event.altKey ? "Alt+" : ""}${letter}`;
}

export function isTyping(target) {
  // The box of a dialog that is closed keeps the focus until the page is drawn again.
  if (!target.checkVisibility()) return false;
  if (target.isContentEditable || target.tagName === "TEXTAREA" || target.tagName === "SELECT") return true;
  return target.tagName === "INPUT" && !["button", "checkbox", "radio", "range", "file"].includes(target.type);
}

export class Keys {
  constructor(run) {
    this.run = run;
    this.follow = null; // after F or G: a function of the next key
    this.load();
    document.addEventListener("keydown", (event) => this.down(event));
    document.addEventListener("keyup", (event) => {
      if (keyOf(event) === this.byAction.get("lens")) run("lens", false);
    });
    window.addEventListener("blur", () => run("lens", false));
  }

  load() {
    let chosen = {};
    try {
      chosen = JSON.parse(localStorage.getItem(PLACE)) ?? {};
    } catch {
      // Damaged: the defaults hold.
    }
    this.byAction = new Map(ACTIONS.map(([action, key]) => [action, typeof chosen[action] === "string" ? chosen[action] : key]));
    this.byKey = new Map([...this.byAction].map(([action, key]) => [key, action]));
  }

  change(action, key) {
    const taken = this.byKey.get(key);
    if (taken && taken !== action) return false;
    const chosen = Object.fromEntries(this.byAction);
    chosen[action] = key;
    localStorage.setItem(PLACE, JSON.stringify(chosen));
    this.load();
    return true;
  }

  forget() {
    localStorage.removeItem(PLACE);
    this.load();
  }

  down(event) {
    if (this.listening) return this.learn(event);
    const key = keyOf(event);
    const isDialog = Boolean(document.querySelector("dialog[open]"));
    if (["Shift", "Control", "Alt", "Meta"].includes(event.key) || event.isComposing) return;
    // Dialogs keep their keys: the browser itself closes them on Escape.
    if (isDialog) return;
    if (this.follow) {
      const take = this.follow;
      this.follow = null;
      event.preventDefault();
      return take(key);
    }
    const typing = isTyping(event.target);
    if (typing && key === "Escape") return event.target.blur();
    if (typing && !key.startsWith("Alt+") && !key.startsWith("Control+")) return;
    // Other boxes than the report's have the browser's own undo.
    if (typing && !event.target.closest("#fields") && /^Control\+[zy]$/.test(key)) return;
    // A button that has the focus is pressed by the space bar and Enter.
    if (["Enter", " "].includes(key) && event.target.closest("button, a, summary, input")) return;
    if (key.startsWith("Arrow") && !event.target.closest("input")) {
      const [across, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
      event.preventDefault();
      return this.run("arrow", across, down);
    }
    const action = this.byKey.get(key) ?? (typing ? this.byKey.get(key.replace("Alt+", "")) : undefined);
    if (!action) return;
    event.preventDefault();
    if (action === "lens") return event.repeat ? undefined : this.run("lens", true);
    this.run(action);
  }

  // ---- The overlay ----

  showHelp() {
    const rows = ACTIONS.map(([action, , words]) => {
      const button = make("button", {
        type: "button",
        text: shownKey(this.byAction.get(action)),
        title: "press to choose another key",
        on: { click: () => this.learnFor(action, button) },
      });
      return make("tr", {}, make("th", { scope: "row" }, button), make("td", { text: words }));
    });
    replace(byId("key-rows"), ...rows);
    byId("help").showModal();
  }

  learnFor(action, button) {
    button.textContent = "press a key";
    this.listening = { action, button };
  }

  learn(event) {
    if (["Shift", "Control", "Alt", "Meta"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    const { action, button } = this.listening;
    this.listening = null;
    const key = keyOf(event);
    const isChanged = key !== "Escape" && key !== "Tab" && this.change(action, key);
    byId("key-remark").textContent = isChanged || key === "Escape" ? "" : `${shownKey(key)} is taken.`;
    button.textContent = shownKey(this.byAction.get(action));
  }
}

function shownKey(key) {
  const names = { " ": "space", Escape: "Esc", "Control+Enter": "Ctrl+Enter" };
  return names[key] ?? key.replace("Control", "Ctrl").replace(/(^|\+)([a-z])$/, (_, plus, letter) => plus + letter.toUpperCase());
}
