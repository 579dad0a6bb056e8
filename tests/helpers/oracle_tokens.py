"""The words and tokens of a report, written from docs/report_parser.md alone: for oracle_reports.py."""

import re

# Section 1. A text is cut at its newlines, and a line into pieces: words (with a `.` that only separates behind an
# abbreviation), and signs by what they are. None of them holds a newline, and none looks beyond one.
NEWLINE = re.compile(r"\n|\r(?!\n)")
BREAK = "\n"
FOREIGN = "é"  # a foreign letter: no phrase can be written with it
STROKE = "–"
DASH, NOTHING = "dash", "nothing"
OPENED = "\u2e2e"  # a `?` that opens a word, by a character that no byte is
PLAIN = re.compile(r"[a-z0-9]+(?:(?<=[0-9])\.(?=[0-9])[a-z0-9]+)*")
WORD = PLAIN.pattern.replace("a-z", "A-Za-z")
INNER = r"\.(?=[,;:)])"
DOT = r"\.(?:(?=[ \t][a-z0-9])|(?<=[a-z]\.)(?=[ \t][A-Z][A-Z \t]))"
OPENS = re.compile(
    r"\A\?(?=[ \t]?[A-Za-z])|(?<![A-Za-z0-9)\]*?])\?(?:(?=[A-Za-z])|(?<=[ \t]\?)(?=[ \t][a-z]))"
)


def latin(text):
    """The UTF-8 bytes of a text (`str` or `bytes`), a character each."""
    if isinstance(text, str):
        # A lone surrogate has no UTF-8; as three bytes above 127 it is read as they are.
        text = text.encode("utf-8", "surrogatepass")
    return text.decode("latin-1")


SIGNS = {sign: sign for sign in ".?!;:,/|"} | dict.fromkeys(("=", ">", latin("→")), ":")
SIGNS |= {OPENED: "¿", "\t": "|", latin("…"): ".", "<": BREAK} | {
    latin(sign): BREAK for sign in "•●◦▪"
}
SIGNS |= {latin(sign): DASH for sign in "-–(["} | {latin(sign): NOTHING for sign in "*+·"}
SIGNS |= {latin(sign): STROKE for sign in ("—", "- ", "-\t", "– ", "–\t")}
SIGNS |= {latin(mark): "+" for mark in "(+) [+] (x) [x] (X) [X] ✓ ✔ ☑ ☒".split()}
SIGNS |= {latin(mark): "-" for mark in "(-) [-] () [] ✗ ✘ ☐".split()} | {"( )": "-", "[ ]": "-"}
SIGNS |= {chr(byte): FOREIGN for byte in (*range(0xC3, 0xE2), *range(0xE3, 0xEE))}
BULLETS = {latin(sign) for sign in ("-", "–", "—", "→", "*", "+", "·", "- ", "-\t", "– ", "–\t")}
NUMBER = r"(?<![A-Za-z0-9])(?:\([0-9]\)|\[[0-9]\])(?=[ \t])"
PIECES = re.compile(
    f"{WORD}(?:{DOT}|{INNER})?|{NUMBER}"
    r"|\([-+xX ]?\)|\[[-+xX ]?\]|--+|(?<=[ \t])(?:-|\xe2\x80\x93)[ \t]|[.?!;:,/|=*+\u2e2e-]"
    r"|[(\[](?![A-Za-z]*[)\]])|(?<=[-=])>"
    r"|<(?=[A-Za-z/])(?!/?(?:[BIUbiu]>|(?i:em|ma|sp|st|su)))|(?<=[A-Za-z]{3})\t(?=[A-Za-z])|\xc2\xb7"
    r"|\xc3(?![\x97\xb7])|[\xc4-\xe1\xe3-\xed]|"
    + "|".join(sign for sign in SIGNS if sign[0] == "\xe2" and sign[-1] not in " \t")
)
# A line with none of these has only words and the tokens that are a sign of their own.
SPECIAL, DOTS = re.compile(r"[()\[\]*=<>+\t\x80-\xff-]"), re.compile(f"{DOT}|{INNER}")
SIMPLE = re.compile(PLAIN.pattern + r"|[.?!;:,/|¿]")
LEADING = {"+": "^", "-": "~"}
SKIPPED = "[ \\t*#_\"'>]{0,7}"
FIELD_STARTS = re.compile(SKIPPED + r"[A-Za-z][A-Za-z0-9 \t/*()_-]{0,30}[:=](?![0-9])")
LINE_STARTS = re.compile(
    SKIPPED + r"(?:[0-9](?:\)|\.(?![0-9]))|[A-Za-z]\)|[A-Z](?:[a-z]|[ \t][a-z]))"
)
CAPITAL_STARTS = re.compile(SKIPPED + r"[A-Z]")
SHORT = 32  # bytes: a line of fewer ends before any capital letter
BEFORE_VALUES = frozenset((":", "|", "?", STROKE))


def tokens(text, hanging=(), abbreviated=()):
    """The words and tokens of a text (`str` or UTF-8 `bytes`): a break as a newline, a dashed word as `-small`.

    The last one is the break at the end of the text.
    """
    lines, out = NEWLINE.split(latin(text)), []
    following, dashed = iter(lines[1:]), False
    for line in lines:
        if dashed or SPECIAL.search(line) or DOTS.search(line):
            started, leads, dashed = _cut(line, out, abbreviated, dashed)
        else:  # as `_cut` does it, at once
            plain = OPENS.sub("¿", line) if "?" in line else line
            found = SIMPLE.findall(plain.lower())
            started, leads = bool(found), False
            out += found
        after = next(following, None)
        if after is None or not started or leads or _ends(line, after, out, hanging):
            out.append(BREAK)
            dashed = False
    return out


def _cut(line, out, abbreviated, dashed):
    """Appends a line's tokens but for its end. Whether there is a word or a token on it, whether its marks lead, and
    whether there is a dash before the next word: at the start of the line (if no break is there), and at its end.
    """
    started = leads = False
    source = OPENS.sub(OPENED, line) if "?" in line else line
    for found in PIECES.finditer(source):
        piece = found.group()
        token = SIGNS.get(piece)
        if token is BREAK or not started and (piece in BULLETS or piece[:2] == "--"):
            out.append(BREAK)
            dashed = False
            continue
        if token is DASH or token is NOTHING:
            dashed = dashed or token is DASH
            continue
        if (
            token is None and piece[0] in "(["
        ):  # of a number: its bracket is a dash, and the other one a break
            out += "-" + piece[1], BREAK
        elif token is None and piece[0] == "-":  # a dash, and strokes
            out += [STROKE] * (len(piece) - 1)
        elif token is None:
            word = piece.lower().rstrip(".")
            out.append("-" + word if dashed else word)
            is_inner = source[found.end() : found.end() + 1] in (",", ";", ":", ")")
            if piece[-1] == "." and word not in abbreviated and not is_inner:
                out.append(".")
        else:
            if token in LEADING and not started:
                leads = True
                if piece[1:2] in ("-", "+"):  # what is in a mark is a bullet like any other
                    out.append(BREAK)
            out.append(LEADING.get(token, token) if leads else token)
        started, dashed = True, False
    return started, leads, dashed


def _ends(line, following, out, hanging):
    """Whether the newline between two lines ends the first, by what follows it, if these are the tokens up to it."""
    last, value = out[-1], len(out) > 1 and out[-2] in BEFORE_VALUES
    if not value and (
        last in ",/:" or last.lstrip("-") in hanging
    ):  # no word is as short as to be in `,/:`
        return False
    short = len(line) < SHORT and CAPITAL_STARTS.match(following)
    return bool(short or FIELD_STARTS.match(following) or LINE_STARTS.match(following))


# Section 6. Two to five capitals that are a word, and what has to stand on one of its sides.
CAPITALS = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]{1,4}(?![A-Za-z0-9])")
BEFORE, BEHIND = re.compile(r"[a-z][ \t]"), re.compile(r"[ \t][a-z]")


def abbreviations(text):
    """The words of a text that are written as abbreviations are, in lower case: [words] may know them."""
    chars, out = latin(text), []
    for found in CAPITALS.finditer(chars):
        start, end = found.span()
        if BEHIND.match(chars, end) or start > 1 and BEFORE.match(chars, start - 2):
            out.append(found.group().lower())
    return out
