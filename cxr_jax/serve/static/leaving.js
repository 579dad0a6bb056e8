// The end of a session: a page whose reader has gone is emptied, so that whoever comes next finds nothing to read.

import { request } from "./server.js";
import { clearBrowser } from "./unsaved.js";

const LOOK_EVERY = 5000; // ms
const TELL_EVERY = 10000; // ms between two words to the other pages
const LOGOUT_WITHIN = 2000; // ms; a server that is away is not waited for
const ACTIVITIES = ["pointerdown", "pointermove", "keydown", "wheel"];

export class IdleWatch {
  /**
   * idle: seconds without a sign of the reader after which `leave` is called; null where nobody logs in.
   * ping: asks the server for anything, so that a reader who only looks is not logged out.
   */
  constructor({ idle, ping, leave }) {
    if (!idle) return;
    Object.assign(this, { idle: 1000 * idle, ping, leave });
    this.seen = this.told = this.pinged = Date.now();
    this.channel = new BroadcastChannel("cxr_jax.activity");
    // Another page of this reader is at work: this one need not go.
    this.channel.addEventListener("message", () => (this.seen = Date.now()));
    for (const kind of ACTIVITIES) document.addEventListener(kind, () => this.active(), { capture: true, passive: true });
    // By the clock and not by one long timer: timers stand still while a laptop sleeps.
    this.timer = setInterval(() => this.look(), LOOK_EVERY);
    for (const kind of ["focus", "pageshow"]) window.addEventListener(kind, () => this.look());
  }

  active() {
    const now = Date.now();
    if (now - this.seen >= this.idle) return this.look();
    this.seen = now;
    if (now - this.told > TELL_EVERY) {
      this.told = now;
      this.channel.postMessage("active");
    }
    if (now - this.pinged > this.idle / 6) {
      this.pinged = now;
      this.ping();
    }
  }

  look() {
    if (Date.now() - this.seen < this.idle) return;
    clearInterval(this.timer);
    this.leave();
  }
}

/** Empty the page (whose own parts have been stopped by then), end the session where it has not ended, and go to the login. */
export async function leavePage({ isEnded = false } = {}) {
  document.body.replaceChildren();
  document.title = "Reading room";
  clearBrowser();
  if (!isEnded) {
    const late = new Promise((done) => setTimeout(done, LOGOUT_WITHIN));
    await Promise.race([request("POST", "/logout").catch(() => {}), late]);
  }
  // In the place of this page: "back" leads to nothing.
  location.replace("/login");
}
