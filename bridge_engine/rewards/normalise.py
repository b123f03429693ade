r"""One way of writing for many: the normal form of an answer, as text. Pure, in linear time.

What LaTeX and Unicode offer as choices without meaning becomes one choice: `\dfrac`, `\tfrac 12`
and `½` become `\frac{1}{2}`; `\left(`, `\big[` lose their size; `10,\!080` its separators; `−`,
`×`, `≤` become `-`, `\times`, `\le`. Meaning is neither added nor taken away: whatever two answers
share here, they share in any reading. Structure (lists, intervals, units) is the affair of
`bridge_engine.rewards.structure`.
"""

from __future__ import annotations

import re

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ",
    "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ",
    "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∞": "\\infty ", "π": "\\pi ", "±": "\\pm ",
    "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ",
    "°": "^\\circ ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ",
    "ω": "\\omega ", "ℝ": "\\mathbb{R}", "…": "\\ldots ", "√": "\\sqrt", "∛": "\\sqrt[3]",
    "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅛": "\\frac{1}{8}", "％": "%", "，": ",",
    "（": "(", "）": ")", "：": ":", "＝": "=", "＋": "+", "“": '"', "”": '"', "’": "'",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "",
    **{chr(0xFF10 + n): str(n) for n in range(10)},
}  # fmt: skip
_TRANSLATE = str.maketrans(_SYMBOLS)
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_THOUSANDS = re.compile(r"(?<=\d)(?:,\s*\\!\s*|\{,\}|\\[,; ]|\\!)(?=\d{3}(?!\d))")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?")
_SPACES = re.compile(r"\\(?:[,;:!> ]|q?quad(?![A-Za-z])|hspace\*?\{[^{}]*\}|phantom\{[^{}]*\})|~")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|mathrm|mathbf|mathit|mathsf|textnormal|bm|rm|"
    r"boldsymbol|operatorname\*?|fbox)(?![A-Za-z])\s*\{([^{}]*)\}"
)
_RENAMED = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge",
    "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "dots": "ldots", "cdots": "ldots",
    "degree": "^\\circ", "degrees": "^\\circ", "lbrace": "\\{", "rbrace": "\\}", "lvert": "|",
    "rvert": "|", "vert": "|", "mid": "|", "varnothing": "emptyset", "to": "rightarrow",
    "ast": "*", "div": "/", "infin": "infty", "lbrack": "[", "rbrack": "]", "land": "\\text{and}",
    "lor": "\\text{or}", "simeq": "approx", "dbinom": "binom", "tbinom": "binom",
    "colon": ":", "lparen": "(", "rparen": ")", "varphi": "phi",
}  # fmt: skip
_COMMAND = re.compile(r"\\(" + "|".join(sorted(_RENAMED, key=len, reverse=True)) + r")(?![A-Za-z])")
_MATRIX = re.compile(r"\\(begin|end)\s*\{(?:[bpB]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_SHORT_FRAC = re.compile(
    r"\\frac\s*(\{[^{}]*\}|\d|[A-Za-z]|\\[a-z]+)\s*(\{[^{}]*\}|\d|[A-Za-z]|\\pi)"
)
_DEEPEST_FRAC = 4
_SHORT_SQRT = re.compile(r"\\sqrt(\[[^][]*\])?\s*(?:(\d+(?:\.\d+)?)|([A-Za-z])|\(([^()]*)\))")
_SHORT_POWER = re.compile(r"([\^_])\s*(\d|[A-Za-z])(?![A-Za-z]*\{)")
_PLAIN_SQRT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_E_NOTATION = re.compile(r"(?<![\w.\\])([+-]?\d+(?:\.\d*)?)\s*[eE]([+-]?\d{1,4})(?![\w.])")
_EULER = re.compile(r"(?<![A-Za-z\\{])e(?![A-Za-z])|\{e\}")
_FONT = re.compile(r"(?<!\\)\$|\\[()\[\]]|\*\*|\\(?:boxed)(?=\s*\{)")
_SCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+|[₀₁₂₃₄₅₆₇₈₉]+")
_BLANK = re.compile(r"\s+")
_LOOSE = re.compile(r"\s*([-+*/=<>^_:(){}\[\]|&!'])\s*")
_COMMA = re.compile(r"\s*([,;])( ?)\s*")
_AFTER_COMMAND = re.compile(r"(\\[A-Za-z]+)\s+(?![A-Za-z])")


def normal(text: str, *, scientific: bool = True) -> str:
    r"""The normal form: equal for answers that differ in nothing but their writing.

    `2e-1` is scientific notation, as computers write it; not `scientific`, e is Euler's number.

    >>> normal(r"\left( 3, \dfrac{\pi}{2} \right)") == normal(r"(3,\frac \pi 2)")
    True
    """
    text = _FONT.sub("", text)
    if not text.isascii():
        text = _SCRIPTS.sub(_script, text).translate(_TRANSLATE)
    if "\\" in text or "{,}" in text:
        text = _from_latex(text)
    if "sqrt" in text:
        text = _PLAIN_SQRT.sub(r"\\sqrt{\1}", text)
    if scientific and ("e" in text or "E" in text):
        text = _E_NOTATION.sub(lambda m: f"{m[1]}\\times 10^{{{int(m[2])}}}", text)
    if "=" in text:
        text = text.replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\ne ")
    text = _SHORT_POWER.sub(r"\1{\2}", text)
    text = _BLANK.sub(" ", text).strip()
    text = _LOOSE.sub(r"\1", text)
    text = _COMMA.sub(r"\1\2", text)  # a blank behind a comma tells a list from 100,200
    text = _AFTER_COMMAND.sub(r"\1", text)
    return text


def has_euler(normal_form: str) -> bool:
    """Does Euler's number (or a variable e) stand in a normal form?"""
    return _EULER.search(normal_form) is not None


def key(text: str) -> str:
    """A normal form without any blank but those between two digits or two letters."""
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def _from_latex(text: str) -> str:
    text = _THOUSANDS.sub("", text)
    text = _SIZES.sub("", text)
    text = text.replace("\\\\", "\x01").replace("\\{", "\x02").replace("\\}", "\x03")
    text = _SPACES.sub(" ", text)
    text = _COMMAND.sub(_renamed, text)
    text = text.replace("\x01", "\\\\").replace("\x02", "\\{").replace("\x03", "\\}")
    text = _MATRIX.sub(r"\\\1{matrix}", text)
    text = _DEGREES.sub(r"^\\circ ", text)
    text = _TEXT.sub(_words, text)
    for _ in range(_DEEPEST_FRAC if "\\frac" in text else 0):
        text = _SHORT_FRAC.sub(_frac, text)
        if text.count("\\frac") == text.count("\\frac{"):
            break
    return _SHORT_SQRT.sub(_sqrt, text)


def _renamed(found: re.Match[str]) -> str:
    new = _RENAMED[found[1]]
    return f"\\{new} " if new.isalpha() else f"{new} "


def _words(found: re.Match[str]) -> str:
    """Words stay marked as words; one letter or a number is what it would be without the mark."""
    inner = _BLANK.sub(" ", found[1]).strip()
    if re.fullmatch(r"[A-Za-z]|-?\d[\d,.]*|", inner) and not found[0].startswith(
        ("\\text", "\\mbox", "\\mathrm")
    ):
        return f"{{{inner}}}" if inner else " "
    if re.fullmatch(r"[ei]|-?\d[\d,./]*", inner):
        return f" {inner} "
    if signed := re.fullmatch(r"([+-]) ?(\d[\d,./]*)?", inner):  # \text{-}5 and \text{ - 5}
        return f" {signed[1]}{signed[2] or ''}"
    return f"\\text{{{inner}}}" if inner else " "


def _frac(found: re.Match[str]) -> str:
    over, under = (part.strip("{} ") if part[0] == "{" else part for part in found.groups())
    return f"\\frac{{{over}}}{{{under}}}"


def _sqrt(found: re.Match[str]) -> str:
    return f"\\sqrt{found[1] or ''}{{{found[2] or found[3] or found[4] or ''}}}"


def _script(found: re.Match[str]) -> str:
    if found[0][0] in "₀₁₂₃₄₅₆₇₈₉":
        return f"_{{{found[0].translate(_SUB)}}}"
    return f"^{{{found[0].translate(_SUPER)}}}"
