// Levels to gray: the windows of DICOM PS3.3 C.11.2.1, as `cxr_jax.data.dicom.pixels` computes them on the server.

const LEVELS = 65536;
const BLACK = 0xff000000; // opaque, as a little-endian RGBA pixel

/** Gray in 0..1 of one value, by a window with a center, a width and a function. */
export function windowed(value, { center, width, function: shape }) {
  if (shape === "SIGMOID") {
    // Clamped where exp would overflow.
    const exponent = Math.min(60, Math.max(-60, (-4 * (value - center)) / width));
    return 1 / (1 + Math.exp(exponent));
  }
  if (shape === "LINEAR_EXACT") return clamp((value - center) / width + 0.5);
  if (width <= 1) return value > center - 0.5 ? 1 : 0;
  return clamp((value - (center - 0.5)) / (width - 1) + 0.5);
}

/** Gray in 0..1 of one value, by a lookup table; beyond its ends it goes on as its ends are. */
export function lookedUp(value, { first, values, white }) {
  const index = Math.min(values.length - 1, Math.max(0, Math.round(value) - first));
  return clamp(values[index] / white);
}

/**
 * The pixel of every level, as Uint32 [65536]. Only levels that the film has are computed.
 * `film` is the server's description, `chosen` one of its windows or one that was dragged.
 */
export function pixelTable(film, chosen, inverted, table = new Uint32Array(LEVELS)) {
  const [lowest, highest] = film.levels_range;
  const gray = chosen.lut ? lookedUp : windowed;
  const shape = chosen.lut ?? chosen;
  const isInverse = film.inverted !== inverted;
  for (let level = lowest; level <= highest; level += 1) {
    let bright = gray(film.slope * level + film.offset, shape);
    if (isInverse) bright = 1 - bright;
    const shade = Math.round(255 * bright);
    table[level] = (BLACK | (shade << 16) | (shade << 8) | shade) >>> 0;
  }
  // What is no pixel is black, whatever is inverted.
  if (film.padding !== null) table[film.padding] = BLACK;
  return table;
}

/** The linear window that a drag starts from: of a table, the range of its entries. */
export function asWindow(chosen) {
  if (!chosen.lut) return { ...chosen };
  const { first, values } = chosen.lut;
  const width = Math.max(1, values.length - 1);
  return { name: "", center: first + width / 2, width, function: "LINEAR_EXACT" };
}

function clamp(share) {
  return share < 0 ? 0 : share > 1 ? 1 : share;
}
