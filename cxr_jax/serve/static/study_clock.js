// What a tab tells of its time, by its own clock, which no change of the wall clock moves.

const HEARTBEAT = 10000; // milliseconds

export class Clock {
  constructor(send, idleAfter) {
    this.send = send;
    this.idleAfter = idleAfter;
    this.events = [];
    this.told = new Set();
    this.lastInput = performance.now();
    this.sending = Promise.resolve();
    this.timer = setInterval(() => {
      this.tell("heartbeat");
      this.flush();
    }, HEARTBEAT);
  }

  tell(kind, more = {}) {
    this.events.push({ kind, t: performance.now() / 1000, ...more });
    if (kind === "hidden" || kind === "sign") this.flush();
  }

  tellOnce(kind) {
    if (!this.told.has(kind)) this.tell(kind);
    this.told.add(kind);
  }

  input() {
    const seconds = (performance.now() - this.lastInput) / 1000;
    if (seconds > this.idleAfter) this.tell("idle", { seconds });
    this.lastInput = performance.now();
    this.tellOnce("first_input");
  }

  /** Send what is there; batches go one after the other, and this waits for the last. */
  flush() {
    const batch = this.events.splice(0);
    if (batch.length) this.sending = this.sending.then(() => this.send(batch)).catch(() => {});
    return this.sending;
  }

  stop() {
    clearInterval(this.timer);
  }

  /** Nobody is here any more: say since when, and tell nothing further. */
  leave() {
    const seconds = (performance.now() - this.lastInput) / 1000;
    if (seconds > this.idleAfter) this.tell("idle", { seconds });
    this.stop();
    return this.flush();
  }
}
