// Elements from words. Whatever comes from a model, a film or a reader enters a page as text here, and in no other way.

// Control characters, marks that turn the direction of text, spaces without width: they are shown, not obeyed.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
const MOST_CHARACTERS = 2000;

export function byId(id) {
  return document.getElementById(id);
}

/** An element with a class, a text or children; attributes are set by name, never from markup. */
export function make(tag, options = {}, ...children) {
  const { className, text, on = {}, ...attributes } = options;
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function replace(parent, ...children) {
  parent.replaceChildren(...children.filter((child) => child !== null));
}

/** A text with what is hidden in it made visible, and cut where nobody reads on. */
export function plain(value, most = MOST_CHARACTERS) {
  const text = String(value ?? "");
  const shown = text.slice(0, most).replace(HIDDEN, (mark) => {
    const number = mark.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return `\u2039U+${number}\u203a`;
  });
  const left = text.length - most;
  return left > 0 ? `${shown} \u2026 (${left.toLocaleString("en")} more characters)` : shown;
}

export function countHidden(text) {
  return (text.match(HIDDEN) ?? []).length;
}
