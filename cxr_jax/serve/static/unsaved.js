// What has not reached the server yet, and nothing else, kept in the browser until it has.

const PREFIX = "cxr_jax.unsaved.";

export class Unsaved {
  find(id) {
    try {
      return JSON.parse(localStorage.getItem(PREFIX + id));
    } catch {
      return null;
    }
  }

  keep(id, fields) {
    if (!id) return;
    if (!Object.keys(fields).length) return this.forget(id);
    try {
      localStorage.setItem(PREFIX + id, JSON.stringify(fields));
    } catch {
      // Full or forbidden: the edits live in the page alone, and the saved line says that they are not saved.
    }
  }

  forget(id) {
    localStorage.removeItem(PREFIX + id);
  }
}

/** At logout: whatever this program has left, preferences included. */
export function clearBrowser() {
  for (const key of Object.keys(localStorage)) {
    if (key.startsWith("cxr_jax.")) localStorage.removeItem(key);
  }
  sessionStorage.clear();
}
