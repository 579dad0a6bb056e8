// Levels of the part of a film that is seen, at the size it is seen: 16 bits in, 16 bits out, before any window.

/** A film's levels, halved again and again, so that a small picture of a large film has no false patterns. */
export function pyramid(levels, width, height, padding) {
  const steps = [{ levels, width, height }];
  let last = steps[0];
  while (Math.min(last.width, last.height) >= 128) {
    last = halve(last, padding);
    steps.push(last);
  }
  return steps;
}

function halve({ levels, width, height }, padding) {
  const halfWidth = width >> 1;
  const halfHeight = height >> 1;
  const half = new Uint16Array(halfWidth * halfHeight);
  for (let row = 0, at = 0; row < halfHeight; row += 1) {
    let above = 2 * row * width;
    for (let column = 0; column < halfWidth; column += 1, at += 1, above += 2) {
      const a = levels[above];
      const b = levels[above + 1];
      const c = levels[above + width];
      const d = levels[above + width + 1];
      // Padding is no gray: a mean with it would be a false edge.
      const isMixed = padding !== null && (a === padding || b === padding || c === padding || d === padding);
      half[at] = isMixed ? a : (a + b + c + d + 2) >> 2;
    }
  }
  return { levels: half, width: halfWidth, height: halfHeight };
}

/** A film turned clockwise by quarters, as a film of its own: {levels, width, height}. */
export function turned({ levels, width, height }, quarters) {
  if (quarters === 0) return { levels, width, height };
  const result = new Uint16Array(levels.length);
  const isUpright = quarters === 2;
  const newWidth = isUpright ? width : height;
  const newHeight = isUpright ? height : width;
  for (let row = 0, at = 0; row < height; row += 1) {
    for (let column = 0; column < width; column += 1, at += 1) {
      let target = (height - 1 - row) * width + (width - 1 - column);
      if (quarters === 1) target = column * newWidth + (height - 1 - row);
      if (quarters === 3) target = (width - 1 - column) * newWidth + row;
      result[target] = levels[at];
    }
  }
  return { levels: result, width: newWidth, height: newHeight };
}

/**
 * Fill `out` (Uint16 [rows, columns]) with the film as it is seen.
 * `left`, `top`: film coordinates of the first output pixel's outer corner; `stepX`, `stepY`: film pixels an output
 * pixel. At a step of 1 on whole pixels it is a copy; else bilinear.
 */
export function resample(steps, padding, { left, top, stepX, stepY, columns, rows }, out) {
  let level = 0;
  while (level + 1 < steps.length && Math.min(stepX, stepY) >= 2 ** (level + 1)) level += 1;
  const source = steps[level];
  const shrink = 2 ** level;
  const across = taps(left / shrink, stepX / shrink, columns, source.width);
  const down = taps(top / shrink, stepY / shrink, rows, source.height);
  if (across.isWhole && down.isWhole) {
    copy(source, across, down, columns, rows, out);
  } else {
    blend(source, padding, across, down, columns, rows, out);
  }
}

// Which two pixels each output pixel lies between, and how near to the second, of 128.
function taps(start, step, count, size) {
  const first = new Int32Array(count);
  const second = new Int32Array(count);
  const weights = new Int32Array(count);
  let isWhole = true;
  for (let index = 0; index < count; index += 1) {
    const place = Math.min(size - 1, Math.max(0, start + (index + 0.5) * step - 0.5));
    const base = Math.floor(place + 1e-6);
    first[index] = base;
    second[index] = Math.min(size - 1, base + 1);
    weights[index] = Math.round((place - base) * 128);
    if (weights[index] !== 0) isWhole = false;
  }
  return { first, second, weights, isWhole };
}

function copy({ levels, width }, across, down, columns, rows, out) {
  for (let row = 0, at = 0; row < rows; row += 1) {
    const begin = down.first[row] * width;
    for (let column = 0; column < columns; column += 1, at += 1) {
      out[at] = levels[begin + across.first[column]];
    }
  }
}

function blend({ levels, width }, padding, across, down, columns, rows, out) {
  const { first, second, weights } = across;
  const hasPadding = padding !== null;
  for (let row = 0, at = 0; row < rows; row += 1) {
    const above = down.first[row] * width;
    const below = down.second[row] * width;
    const share = down.weights[row];
    for (let column = 0; column < columns; column += 1, at += 1) {
      const a = levels[above + first[column]];
      const b = levels[above + second[column]];
      const c = levels[below + first[column]];
      const d = levels[below + second[column]];
      if (hasPadding && (a === padding || b === padding || c === padding || d === padding)) {
        out[at] = a;
        continue;
      }
      const weight = weights[column];
      // 16 bits of level and twice 7 of weight stay below 2 ** 31.
      const upper = a * (128 - weight) + b * weight;
      const lower = c * (128 - weight) + d * weight;
      out[at] = (upper * (128 - share) + lower * share + 8192) >> 14;
    }
  }
}
