// What has not reached the server yet, and nothing else, kept in the browser until it has: sealed with a key that the
// server tells to its reader alone and that no storage holds, so that whoever comes next finds nothing to read.

const PREFIX = "cxr_jax.sealed.";
const LEAVING_MS = 500; // how long a page that is being left may still hold its lock

export class Unsaved {
  /**
   * sealing: {tag, key} of the session; without it, or where the browser cannot seal, nothing is kept.
   * kind: "" for reports, or a name for what is no report.
   */
  constructor(sealing, kind = "") {
    this.prefix = `${PREFIX}${kind && `${kind}.`}${sealing?.tag ?? ""}.`;
    // Each page has a record of its own: what one has saved says nothing of another's edits.
    this.page = hexOf(crypto.getRandomValues(new Uint8Array(8)));
    // Browsers seal on loopback and under TLS alone.
    this.key = sealing?.key && crypto.subtle ? importKey(sealing.key) : null;
    // Held as long as the page lives: what is still being typed in it has not been left.
    if (this.key) navigator.locks.request(`${PREFIX}${this.page}`, () => new Promise(() => {}));
    // One after another, or an older record could overtake a newer one.
    this.last = Promise.resolve();
  }

  /** What pages that are gone have left of a report, or of any, oldest first: what was kept, and {id, at}. */
  async find(id = "") {
    if (!this.key) return [];
    const start = id ? `${this.prefix}${id}.` : this.prefix;
    const names = Object.keys(localStorage).filter((name) => name.startsWith(start) && !name.endsWith(`.${this.page}`));
    const records = await Promise.all(names.map(async (name) => (await isLeft(name)) && this.open(name)));
    return records.filter(Boolean).sort((one, other) => one.at - other.at);
  }

  /** Keep edits: {fields, ..}, whatever else is needed to put them back; without fields there is nothing left to keep. */
  keep(id, record) {
    if (!id || !this.key) return;
    if (!Object.keys(record.fields).length) return this.forget(id);
    const text = JSON.stringify({ ...record, id, at: Date.now() });
    this.last = this.last.then(async () => localStorage.setItem(this.nameOf(id), await seal(await this.key, text)));
    // Full or forbidden: the edits live in the page alone, and the saved line says that they are not saved.
    this.last = this.last.catch(() => {});
  }

  forget(id) {
    this.last = this.last.then(() => localStorage.removeItem(this.nameOf(id)));
  }

  /** Records that other pages have left, once this page has taken them over, and its own is written, or dropped them. */
  drop(records) {
    this.last = this.last.then(() => records.forEach(({ name }) => localStorage.removeItem(name)));
  }

  nameOf(id) {
    return `${this.prefix}${id}.${this.page}`;
  }

  async open(name) {
    try {
      return { ...JSON.parse(await unseal(await this.key, localStorage.getItem(name))), name };
    } catch {
      localStorage.removeItem(name); // damaged, or of a key that is gone
      return null;
    }
  }
}

/** Whether the page of a record is gone, and not open in another tab. */
async function isLeft(name) {
  const lock = `${PREFIX}${name.split(".").at(-1)}`;
  const { held } = await navigator.locks.query();
  if (!held.some((one) => one.name === lock)) return true;
  try {
    return await navigator.locks.request(lock, { signal: AbortSignal.timeout(LEAVING_MS) }, () => true);
  } catch {
    return false;
  }
}

/** At the end of a session: all that this program has left; of unsaved edits what is sealed stays, for their reader. */
export function clearBrowser() {
  for (const key of Object.keys(localStorage)) {
    if (key.startsWith("cxr_jax.") && !key.startsWith(PREFIX)) localStorage.removeItem(key);
  }
  sessionStorage.clear();
}

// ---- Sealing: AES-GCM, a new nonce each time ----

function importKey(hex) {
  const bytes = Uint8Array.from(hex.match(/../g), (pair) => parseInt(pair, 16));
  return crypto.subtle.importKey("raw", bytes, "AES-GCM", false, ["encrypt", "decrypt"]);
}

async function seal(key, text) {
  const iv = crypto.getRandomValues(new Uint8Array(12));
  const sealed = await crypto.subtle.encrypt({ name: "AES-GCM", iv }, key, new TextEncoder().encode(text));
  return `${hexOf(iv)}.${hexOf(new Uint8Array(sealed))}`;
}

async function unseal(key, stored) {
  const [iv, sealed] = stored.split(".").map((hex) => Uint8Array.from(hex.match(/../g), (pair) => parseInt(pair, 16)));
  return new TextDecoder().decode(await crypto.subtle.decrypt({ name: "AES-GCM", iv }, key, sealed));
}

function hexOf(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
