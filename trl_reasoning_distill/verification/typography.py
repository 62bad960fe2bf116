r"""One writing for what is typed in many: fullwidth forms, Unicode mathematics, LaTeX spacing and font macros.

`normalize` changes how an answer is typed, never what it is made of: nothing that could carry meaning is dropped, so that whatever the reader
does not understand is still there to be reported. What stood in `\text{…}` is put between double quotes, as words and not as variables.
"""

from __future__ import annotations

import re
import unicodedata

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ", "∙": "\\cdot ", "÷": "\\div ", "∕": "/", "⁄": "/",
    "√": " sqrt ", "∛": "\\sqrt[3]", "∞": "\\infty ", "π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "μ": "\\mu ", "µ": "\\mu ", "ω": "\\omega ",
    "φ": "\\phi ", "σ": "\\sigma ", "δ": "\\delta ", "ε": "\\epsilon ", "Ω": "\\Omega ", "Δ": "\\Delta ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ", "≦": "\\le ", "≧": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≡": "\\equiv ", "∈": "\\in ", "∉": "\\notin ", "∪": "\\cup ", "∩": "\\cap ",
    "∖": "\\setminus ", "∅": "\\emptyset ", "⌀": "\\emptyset ", "±": "\\pm ", "∓": "\\mp ", "°": "^\\circ ", "º": "^\\circ ", "℃": "^\\circ C", "℉": "^\\circ F", "∠": "\\angle ", "△": "\\triangle ",
    "…": "\\ldots ", "⋯": "\\ldots ", "〜": "~", "∧": "\\land ", "∨": "\\lor ", "→": "\\to ", "⇒": "\\Rightarrow ", "¬": "\\neg ",
    "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "「": '"', "」": '"', "『": '"', "』": '"', "‘": "'", "’": "'", "′": "'", "″": "''", "、": ",", "。": ".", "｡": ".", "．": ".",
    "【": "[", "】": "]", "〔": "[", "〕": "]", "⟨": "\\langle ", "⟩": "\\rangle ", "〈": "\\langle ", "〉": "\\rangle ", "￥": "¥", "％": "%", "‰": "\\permil ", "∶": ":", "：": ":",
}  # fmt: skip
_SUPERSCRIPTS = {
    "⁰": "0",
    "¹": "1",
    "²": "2",
    "³": "3",
    "⁴": "4",
    "⁵": "5",
    "⁶": "6",
    "⁷": "7",
    "⁸": "8",
    "⁹": "9",
    "⁻": "-",
    "⁺": "+",
    "ⁿ": "n",
}
_SUBSCRIPTS = {chr(0x2080 + digit): str(digit) for digit in range(10)}
_INVISIBLE = frozenset("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u00ad\u2061\u2062\u2063")
_VULGAR = re.compile(r"(\d*)([¼-¾⅐-⅞])")
_RUN_UP = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_RUN_DOWN = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")

_MACROS = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\leq": "\\le", "\\leqslant": "\\le", "\\geq": "\\ge", "\\geqslant": "\\ge", "\\neq": "\\ne", "\\lt": "<", "\\gt": ">",
    "\\varnothing": "\\emptyset", "\\simeq": "\\approx", "\\doteq": "\\approx", "\\dots": "\\ldots", "\\cdots": "\\ldots", "\\dotsc": "\\ldots", "\\dotsb": "\\ldots", "\\dbinom": "\\binom", "\\tbinom": "\\binom",
    "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\mid": "|", "\\colon": ":", "\\degree": "^\\circ", "\\backslash": "\\setminus",
    "\\bmod": "\\mod", "\\textdegree": "^\\circ", "\\euro": "€", "\\pounds": "£", "\\yen": "¥", "\\textdollar": "$", "\\arctg": "\\arctan", "\\tg": "\\tan", "\\ctg": "\\cot", "\\varphi": "\\phi", "\\varepsilon": "\\epsilon",
    "\\vartheta": "\\theta", "\\asin": "\\arcsin", "\\acos": "\\arccos", "\\atan": "\\arctan", "\\wedge": "\\land", "\\vee": "\\lor", "\\smallsetminus": "\\setminus", "\\iff": "\\Leftrightarrow", "\\ast": "\\cdot",
    "\\overline": "\\bar", "\\textbackslash": "\\setminus", "\\textpercent": "\\%", "\\lnot": "\\neg", "\\N": "\\mathbb{N}", "\\Z": "\\mathbb{Z}", "\\R": "\\mathbb{R}", "\\Q": "\\mathbb{Q}", "\\C": "\\mathbb{C}",
}  # fmt: skip
_SPACING = re.compile(
    r"\\(?:text)?color\{[A-Za-z]*\}|\\(?:left|right)\.|\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|left|right|middle|[bB]igg?[lrm]?|hfill|thinspace)(?![A-Za-z])|\\q?quad|\\[,;:>! \n]|\\hspace\*?\{[^{}]*\}|\\(?:v|h)?phantom\{[^{}]*\}|\\(?:no)?indent\b"
)
_FONTS = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|mathtt|mathcal|mathscr|boldsymbol|bm|rm|bf|it|operatorname\*?)(?![A-Za-z]) ?"
)
_FONT_WORD = re.compile(_FONTS.pattern + r"\{([^{}\\]*[A-Za-z]{2,}[^{}\\]*)\}")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|textup|emph|mbox|hbox)(?![A-Za-z]) ?\{([^{}]*)\}"
)
_ORDINAL = re.compile(r'(\d) ?\^ ?\{? ?"?(st|nd|rd|th)"? ?\}?')
_COMMAND = re.compile(r"\\[A-Za-z]+")
_MATH_MARKS = re.compile(r"\\[()\[\]](?![A-Za-z])|(?<!\\)\${2}|\\\\(?=[()\[\]])")
_MATH_DOLLARS = re.compile(r"(?<!\\)\$((?:\\.|[^$\\])*)\$")
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_THIN_GROUP = re.compile(r"(?<=\d)(?:,? ?(?:\\, ?)?\\! ?|\\,| ?\{ ?, ?\} ?|\{ \})(?=\d{3}(?!\d))")
_GLUED = re.compile(r"(?<=[\d)}$])(or|and)(?=[A-Z(\\\d$-])")
_EMPHASIS = re.compile(r"\*\*(?=\S)(.*?\S)\*\*|__(?=\S)(.*?\S)__")


def unicode_to_ascii(text: str) -> str:
    """Fullwidth forms, Unicode digits and mathematical symbols as ASCII or LaTeX; letters of other scripts stay."""
    if text.isascii():
        return text
    text = _VULGAR.sub(
        lambda match: f"{match[1]} " * bool(match[1]) + unicodedata.normalize("NFKC", match[2]).replace("⁄", "/"), text
    )
    text = _RUN_UP.sub(lambda match: "^{" + "".join(_SUPERSCRIPTS[c] for c in match[0]) + "}", text)
    text = _RUN_DOWN.sub(lambda match: "_{" + "".join(_SUBSCRIPTS[c] for c in match[0]) + "}", text)
    return "".join(map(_ascii, text))


def _ascii(character: str) -> str:
    if character.isascii() or character in _INVISIBLE:
        return "" if character in _INVISIBLE else character
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    code = ord(character)
    if 0xFF01 <= code <= 0xFF5E:  # fullwidth
        return chr(code - 0xFEE0)
    if character.isspace():
        return " "
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if 0x2460 <= code <= 0x2473:  # circled
        return str(code - 0x245F)
    if 0x1D400 <= code <= 0x1D7FF:  # mathematical letters
        return unicodedata.normalize("NFKC", character)
    return character


def normalize(text: str) -> str:
    r"""An answer in one writing: ASCII where it can be, plain LaTeX, words between double quotes, single spaces.

    A separator that only LaTeX sets (`10,\!080`, `1{,}234`, `1\,234`) joins its digits: it can part nothing.
    """
    text = _GLUED.sub(r" \1 ", unicode_to_ascii(text))
    if "\\" not in text and "$" not in text and "*" not in text and "{" not in text:
        return " ".join(text.split())
    if "\\begin" in text:
        text = _ROW_END.sub(r" \\newline ", text)
    text = _THIN_GROUP.sub("", text)
    text = re.sub(r"\\{2}(?=[A-Za-z{}])", r"\\", text) if "\\begin" not in text else text  # escaped twice, in JSON
    text = _MATH_MARKS.sub(" ", text)
    text = _MATH_DOLLARS.sub(r" \1 ", text)
    text = _EMPHASIS.sub(r"\1\2", text)
    text = _FONTS.sub("", _FONT_WORD.sub(r' "\1" ', text))
    while (replaced := _TEXT.sub(r' "\1" ', text)) != text:
        text = replaced
    text = _ORDINAL.sub(r'\1 "\2"', text)
    text = _SPACING.sub(" ", text.replace("~", " "))
    text = _COMMAND.sub(lambda match: _MACROS.get(match[0], match[0]), text)
    text = (
        text.replace("\\$", "$")
        .replace("\\%", "%")
        .replace("\\#", "#")
        .replace("\\&", "&" if "\\begin" not in text else "\\&")
        .replace("\\_", "_")
    )
    return " ".join(text.split())
