// The microphone: one recording in pieces of a second, each sent until the server has it on its disk.
// A released key pauses the recorder, so that all that is said over a film is one file.

const PIECE_MS = 1000;
const TYPES = ["audio/webm;codecs=opus", "audio/mp4", "audio/ogg;codecs=opus"];

/** Sends pieces in their order, again and again until each is acknowledged. */
class Outbox {
  constructor(send, changed) {
    this.send = send; // (number, key, blob) -> Promise; rejects with {retry: false} where trying again is no use
    this.changed = changed;
    this.waiting = [];
    this.number = 0;
    this.failure = null;
    this.running = null;
    this.isDropped = false;
  }

  /** Sends nothing more; resolves when what is on its way has been answered. */
  drop() {
    this.isDropped = true;
    return this.running;
  }

  add(blob) {
    const number = this.number++;
    this.waiting.push({ number, key: `p${number}-${crypto.randomUUID()}`, blob });
    this.changed();
    if (!this.running) this.running = this.run().finally(() => { this.running = null; });
  }

  async run() {
    let pause = 250;
    while (this.waiting.length && !this.failure && !this.isDropped) {
      const piece = this.waiting[0];
      try {
        await this.send(piece.number, piece.key, piece.blob);
        this.waiting.shift();
        pause = 250;
      } catch (error) {
        if (error.retry === false) { this.failure = error; break; }
        // The server may be starting again: the same piece, under the same key, a little later.
        await new Promise((done) => setTimeout(done, pause));
        pause = Math.min(pause * 2, 5000);
      }
      this.changed();
    }
  }

  /** Resolves with the number of pieces when all are acknowledged. */
  async drained() {
    while (this.running) await this.running;
    if (this.failure) throw this.failure;
    return this.number;
  }
}

/** The microphone with its level, and the recorder behind it. */
export class Microphone {
  constructor({ send, changed, level }) {
    this.outbox = new Outbox(send, changed);
    this.level = level;
    this.recorder = null;
    this.mime = null;
    this.isDone = false; // nothing more is sent
    this.opening = null;
    this.isClosed = false;
  }

  get isTalking() { return this.recorder !== null && this.recorder.state === "recording"; }
  get waiting() { return this.outbox.waiting.length; }

  /** Asks for the microphone once, however often it is wanted; rejects where there is none, or the reader says no. */
  open() {
    this.opening ||= this.begin().catch((error) => { this.opening = null; throw error; });
    return this.opening;
  }

  async begin() {
    // Off loopback a browser hands out no microphone without TLS, and says so by having none.
    if (!navigator.mediaDevices || !window.MediaRecorder) throw new Error("this browser offers no microphone here");
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    // Closed while the reader was asked: no microphone stays open for a thought that is gone.
    if (this.isClosed) {
      for (const track of stream.getTracks()) track.stop();
      return;
    }
    const type = TYPES.find((name) => MediaRecorder.isTypeSupported(name));
    this.recorder = new MediaRecorder(stream, type ? { mimeType: type } : {});
    this.mime = (type || this.recorder.mimeType).split(";")[0];
    this.recorder.addEventListener("dataavailable", (event) => {
      if (event.data.size && !this.isDone) this.outbox.add(event.data);
      if (this.flushed) { this.flushed(); this.flushed = null; }
    });
    this.watch(stream);
  }

  watch(stream) {
    const context = new AudioContext();
    const analyser = context.createAnalyser();
    analyser.fftSize = 1024;
    context.createMediaStreamSource(stream).connect(analyser);
    const samples = new Float32Array(analyser.fftSize);
    const show = () => {
      analyser.getFloatTimeDomainData(samples);
      let power = 0;
      for (const sample of samples) power += sample * sample;
      // Loudness is heard by its logarithm: -60 dB is nothing, 0 dB all.
      const db = 10 * Math.log10(power / samples.length + 1e-12);
      this.level(Math.max(0, Math.min(1, 1 + db / 60)));
      requestAnimationFrame(show);
    };
    show();
  }

  async talk() {
    await this.open();
    if (this.isClosed) throw new Error("another thought has begun");
    if (this.recorder.state === "inactive") this.recorder.start(PIECE_MS);
    else if (this.recorder.state === "paused") this.recorder.resume();
  }

  /** Ends what is being said; resolves with the number of pieces once all of them are on the server's disk. */
  async rest() {
    if (this.isTalking) {
      // A piece that is on its way already is not the last one: that is asked for once the recorder has paused.
      const { recorder } = this;
      const paused = new Promise((done) => { recorder.addEventListener("pause", done, { once: true }); });
      recorder.pause();
      await paused;
      // Closed meanwhile, it has handed out all that it will.
      if (recorder.state !== "inactive") {
        const flushed = new Promise((done) => { this.flushed = done; });
        recorder.requestData();
        await flushed;
      }
    }
    return this.outbox.drained();
  }

  /** Lets go of a recording that is to be erased; resolves when nothing of it is on its way any more. */
  drop() {
    this.close({ isDone: true });
    return this.outbox.drop();
  }

  /**
   * Lets go of the microphone; the next thought is another recording. Stopping, a recorder hands out what its encoder
   * still held: of a recording that was heard, saved or erased nobody waits for that, and the server would refuse it.
   */
  close({ isDone = !this.isTalking } = {}) {
    this.isClosed = true;
    if (!this.recorder) return;
    this.isDone = isDone;
    for (const track of this.recorder.stream.getTracks()) track.stop();
    if (this.recorder.state !== "inactive") this.recorder.stop();
    this.recorder = null;
  }
}

/** Says when somebody talks: while the button is pressed, with space or Enter held on it, or R anywhere. */
export function holdToTalk(button, { hold, release }) {
  button.addEventListener("pointerdown", (event) => { button.setPointerCapture(event.pointerId); hold(); });
  button.addEventListener("pointerup", release);
  button.addEventListener("pointercancel", release);
  const isTalkKey = (event) => {
    if (event.target === button) return event.key === " " || event.key === "Enter" || event.code === "KeyR";
    const isTyping = event.target.closest?.("textarea, input, select");
    return event.code === "KeyR" && !event.ctrlKey && !event.metaKey && (!isTyping || event.altKey);
  };
  document.addEventListener("keydown", (event) => {
    if (!isTalkKey(event)) return;
    event.preventDefault();
    if (!event.repeat) hold();
  });
  document.addEventListener("keyup", (event) => {
    // Alt may be let go first: then the key alone ends it.
    if (event.code === "KeyR" || event.target === button) release();
  });
  window.addEventListener("blur", release);
}
