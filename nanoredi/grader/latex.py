r"""LaTeX to the grader's plain string: layout, fonts, units and currencies are dropped, every operator and bracket gets
one spelling (\leq and <= become ≤, \{ becomes ⦃), and short forms are written out (\frac12, 0.1\overline{6}, 2\frac12).

Every rule is one regular expression on a string of bounded length. A rule may be wrong for an answer that it was not
written for; where it often would be (is 12,345 one number or two? is 5 km a product?), readings tries both.
"""

import re
import unicodedata
from collections.abc import Iterator

from nanoredi.grader.numbers import FUNCTIONS

_MACROS = {
    macro: new
    for macros, new in [
        (", ; : > space quad qquad enspace thinspace", " "),
        ("! $ % ( ) [ ] left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr", ""),
        ("displaystyle textstyle limits bf rm it cal mathopen mathclose ensuremath boxed fbox underline", ""),
        ("vec overrightarrow boldsymbol pmb widehat overset strut protect normalfont pounds euro textdollar", ""),
        ("dfrac tfrac cfrac", "\\frac"),
        ("dbinom tbinom", "\\binom"),
        ("cdot times ast", "*"),
        ("div", "/"),
        ("colon ratio", ":"),
        ("pm", "±"),
        ("mp", "∓"),
        ("cup bigcup", "∪"),
        ("cap", "∩"),
        ("setminus backslash smallsetminus", "∖"),
        ("in", "∈"),
        ("infty infin", "∞"),
        ("emptyset varnothing", "∅"),
        ("pi", "π"),
        ("circ degree textdegree", "°"),
        ("prime", "'"),
        ("lvert rvert vert mid", "|"),
        ("lfloor", "⌊"),
        ("rfloor", "⌋"),
        ("lceil", "⌈"),
        ("rceil", "⌉"),
        ("{ lbrace", "⦃"),
        ("} rbrace", "⦄"),
        ("langle", "("),
        ("rangle", ")"),
        ("lt", "<"),
        ("gt", ">"),
        ("leq le leqslant leqq", "≤"),
        ("geq ge geqslant geqq", "≥"),
        ("neq ne", "≠"),
        ("approx simeq", "≈"),
        ("lor vee", " , "),
        ("ldots dots cdots", "…"),
    ]
    for macro in macros.split()
} | {" ": " ", "\n": " "}
_CHARACTERS = str.maketrans(
    {
        "~": " ",
        "×": "*",
        "·": "*",
        "⋅": "*",
        "∙": "*",
        "÷": "/",
        "∕": "/",
        "⁄": "/",
        "−": "-",
        "–": "-",
        "—": "-",
        "√": "\\sqrt",
        "∛": "\\cbrt",
        "′": "'",
        "’": "'",
        "″": "''",
        "∣": "|",
        "〈": "(",
        "〉": ")",
        "⟨": "(",
        "⟩": ")",
        "∨": ",",
        "，": ",",
        "£": "",
        "€": "",
        "¥": "",
        "$": "",
        "%": "",
        "\u200b": "",
        "\u2062": "",
        "\xa0": " ",
    }
)
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
_FONT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox|math(?:rm|bf|it|sf|bb|cal)|bm)\s*"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
# A \text or the like that begins with no digit. 2\mathrm{i}, 3\text{ p.m.} and 2\text{ if }x>0 have no unit.
_NO_UNIT = r"(?!\s*(?:[,;:]|(?:[ie]|[AaPp]\.?\s*[Mm]\.?)\s*\}|(?:to|if|for|when|where|mod|base|in base|choose)\b))"
_UNIT = _FONT + r"\{" + _NO_UNIT + r"[^{}0-9](?:[^{}]|\{[^{}]*\})*\}" + _POWER
_MANY_UNITS = rf"(?:\\mu\s*)?(?:{_UNIT}|\\frac\s*\{{\s*{_UNIT}\s*\}}\s*\{{\s*{_UNIT}\s*\}})"
_DERIVATIVE = (
    r"\\frac\s*\{\s*d\s*(?:\^\s*\{?\s*([0-9])\s*\}?)?\s*([^{}]*(?:_\{\w+\})?)\s*\}"
    r"\s*\{\s*d\s*([A-Za-z]|\\[A-Za-z]+)\s*(?:\^\s*\{?\s*[0-9]\s*\}?)?\s*\}"
)
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"<=", "≤"),
        (r">=", "≥"),
        (r"!=", "≠"),
        (r"\*\*", "^"),
        (r"\\(?:phantom|hphantom|vphantom|hspace|label|tag|color)\s*\*?\{[^{}]*\}", ""),
        (r"\\textcolor\s*\{[^{}]*\}", ""),
        (r"\^\s*(?:('+)|\{\s*((?:'\s*)+)\})", r"\1\2"),
        (r"(?:\^\s*)?(?:°|\{\s*°\s*\})(?:\s*[CFK]\b|\s*" + _FONT + r"\{\s*[CFK]\s*\})?", "°"),
        (r"\s*\\[pb]?mod\b\s*(?:\{([^{}]*)\}|(\w+))", r" (mod \1\2)"),
        (r"\\(?:mathbb|Bbb)\s*(?:\{\s*R\s*\}|R)", "ℝ"),
        (_FONT + r"\{\s*(?:base|in base)?\s*([0-9]+)\s*\}", r"\1"),
        (r"_\s*([0-9]+|\w|\\[A-Za-z]+)", r"_{\1}"),
        (r"\\(dot|ddot|bar|hat|tilde)\s*(?:\{(\w)\}|\s(\w))_\{(\w+)\}", r"\\\1{\2\3_{\4}}"),
        (r"\\operatorname\*?\s*\{(\w+)\}", r"\\\1 "),
        (_FONT + r"\{\s*(" + "|".join(FUNCTIONS) + r")\s*\}", r"\\\1 "),
        (r"\s(?:or|and)\s|" + _FONT + r"\{\s*,?\s*(?:or|and)\s*\}", " , "),
        (r"(?<=[0-9)}π°'])\s*(?:" + _MANY_UNITS + r"[\s/*]*)+", " "),
        (_FONT + r"\{([^{}]*)\}", r" \1 "),
        (_FONT + r"\{([^{}]*)\}", r" \1 "),  # twice, for a font in a font
        (_FONT + r"(?=[A-Za-z0-9\\])", " "),
        (r"\\frac\s*([0-9])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"\\binom\s*([0-9])\s*([0-9])", r"\\binom{\1}{\2}"),
        (r"(\\sqrt\s*(?:\[[0-9]\])?)\s*([0-9]+)", r"\1{\2}"),
        (r"(?<=[0-9])'\s*'?(?!['\w])", ""),  # minutes and seconds of arc
        (r"(?:^|(?<=∪))\s*\]", "("),  # ]1,2[ is the open interval
        (r"\[\s*(?=$|∪)", ")"),
        (_DERIVATIVE, r"ð_{\3\1}\2"),  # one letter, so that its d is not cancelled
        (r"\\begin\s*\{(\w+)\*?\}(?:\s*\{[lcr|]+\})?", r"⟦\1¦"),  # brackets like others
        (r"\\end\s*\{\w+\*?\}", "⟧"),
    ]
]
# A mixed number is a sum.
_MIXED = [
    r"(?<![0-9./^_])([0-9]+)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}",
    r"(?<![0-9./^_])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)",
]
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,50})\}|([0-9]))")

# Bare units, by what may stand around them. One letter is a unit only over another: 3 m/s, but not 3 m.
_SHORT_UNITS = (
    "cm|mm|km|nm|kg|mg|lbs?|oz|ft|in|yd|mi|hrs?|min|secs?|ms|k?Hz|MHz|GHz|[kMG]?eV|kJ|kW|MW|mV|kV|k?Pa|atm|mol|mL|ml|"
    "rad|deg|mph|kph|k?cal|yrs?|USD|units?"
)
_SMALL_UNITS = (
    r"(?:cm|mm|km|m|g|kg|mi|ft|N|J|W|C|V|A|L)" + _POWER + r"\s*/\s*(?:s|h|hr|min|m|cm|kg|L|mol|K|C|day)\b" + _POWER
)
_WORD = rf"(?:[A-Za-z]{{4,}}|\\Omega|Å|[μµ]m|per|of|{_SHORT_UNITS})\b{_POWER}"
_BARE_UNITS = re.compile(
    rf"(?<=[0-9}}π°])(?:\s+(?:{_SMALL_UNITS}|{_WORD}(?:[\s/*]+{_WORD}){{0,4}})|(?:cm|mm|km|kg|mL|k?Hz|MHz|mph){_POWER})"
    r"\.?\s*(?=$|,)"
)
_GROUPED = re.compile(r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])")
_CHOICE = re.compile(r"\s*\(?([A-J])\s*[):.]\s+(\S.*)", re.DOTALL)


def clean(text: str) -> str:
    """The plain string of an answer."""
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = re.sub(f"[{_SUBSCRIPTS}]+", lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda found: f" {unicodedata.normalize('NFKC', found[0])} ", text)
    text = re.sub(r"(?:\{,\}|,\s*\\!)\s*(?=[0-9]{3})", "", text)  # these commas group digits, wherever they stand
    text = re.sub(r"(?<=[0-9])\{,\}(?=[0-9])", ".", text)  # elsewhere it is a decimal comma
    text = _REPEATING.sub(_repeating, text)
    text = re.sub(r"\\([A-Za-z]+|[^A-Za-z])", _macro, text).translate(_CHARACTERS)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    for pattern in _MIXED:
        text = re.sub(pattern, r"(\1+\2/\3)", text)
    word = text.strip(" .").lower()
    return str(_NUMBERS.index(word)) if word in _NUMBERS else text.rstrip(" \\")


def readings(text: str) -> Iterator[str]:
    """What an answer may mean: a bare 12,345 one number or two, 12 345 one number, 5 km a number with its unit or a
    product, (C) 12 the letter of a choice or the choice."""
    text = clean(text)
    choice = _CHOICE.fullmatch(text)
    texts = [text, *(choice.groups() if choice else ())]
    texts += [_BARE_UNITS.sub("", one) for one in texts]
    if not re.search(r"[(\[⦃]", text):
        texts += [_GROUPED.sub(lambda number: re.sub("[ ,]", "", number[0]), one) for one in texts]
    # A space counts only between two letters or digits: 1 1/3 is not 11/3.
    texts = [re.sub(r"\s+", " ", one.strip()) for one in texts]
    yield from dict.fromkeys(re.sub(r"\s+(?=\W)|(?<=\W)\s+", "", one) for one in texts)


def _macro(found: re.Match) -> str:
    return _MACROS.get(found[1], found[0])


def _repeating(found: re.Match) -> str:
    """0.1\\overline{6} as the fraction that it is: (16 - 1) / 90."""
    whole, fixed, period = found[1], found[2], found[3] or found[4]
    numerator = int(whole + fixed + period) - int("0" + whole + fixed)
    return f"({numerator}/{'9' * len(period)}{'0' * len(fixed)})"
