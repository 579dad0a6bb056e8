// What an edit changed, word by word: the longest common subsequence of two short texts.

const MOST_WORDS = 600; // beyond, the whole is shown as replaced: a table of the two would be large

/** Pieces [{kind: "same" | "removed" | "added", text}] that lead from one text to the other. */
export function wordDiff(before, after) {
  const old = words(before);
  const now = words(after);
  if (old.length > MOST_WORDS || now.length > MOST_WORDS) {
    return [piece("removed", before), piece("added", after)].filter(({ text }) => text);
  }
  const lengths = commonLengths(old, now);
  const pieces = [];
  let i = 0;
  let j = 0;
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && isSame(old[i], now[j])) {
      add(pieces, "same", now[j]);
      i += 1;
      j += 1;
    } else if (j >= now.length || (i < old.length && lengths[i + 1][j] >= lengths[i][j + 1])) {
      add(pieces, "removed", old[i]);
      i += 1;
    } else {
      add(pieces, "added", now[j]);
      j += 1;
    }
  }
  return pieces;
}

// A word with the space behind it: what is removed and what is added stand apart.
function words(text) {
  return text.match(/\S+\s*|\s+/g) ?? [];
}

function isSame(one, other) {
  return one.trimEnd() === other.trimEnd();
}

function commonLengths(old, now) {
  const lengths = Array.from({ length: old.length + 1 }, () => new Uint16Array(now.length + 1));
  for (let i = old.length - 1; i >= 0; i -= 1) {
    for (let j = now.length - 1; j >= 0; j -= 1) {
      lengths[i][j] =
        isSame(old[i], now[j]) ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  return lengths;
}

function piece(kind, text) {
  return { kind, text };
}

function add(pieces, kind, text) {
  const last = pieces.at(-1);
  if (last?.kind === kind) last.text += text;
  else {
    if (last && !/\s$/.test(last.text)) last.text += " ";
    pieces.push(piece(kind, text));
  }
}
