r"""The stricter reading of an answer, DeepScaleR's, which the paper's evaluation used.

The published scores come from rules about strings, backed by a computer algebra system. To make scores comparable, this
file follows the same rules, with expression.py for the algebra. An answer is right if it is, after small repairs of its
LaTeX, the gold string, or if both, converted to plain text and split at the commas of one pair of brackets, agree part
by part:

    an integer only with an integer         2^{10} is not 1024 where the gold answer is 1024
    a fraction only with the same fraction  3/12 is not 1/4
    everything else by value                but only without ^{ and with at most two letters

So there is no credit for a list in another order, other brackets, another form of an equation or a matrix written
another way. Three faults of the original are not copied: it ignores a root's index (the cube root of 2 equals its
square root), reads 8180_9 as Python's number 81809, and cuts an answer at "\text{ ".
"""

import math
import re

from nanoredi.grader.compare import agree
from nanoredi.grader.expression import MAX_DEPTH, MAX_LENGTH, NO_VALUE, Budget, Expression
from nanoredi.grader.symbols import GREEK

_UNITS = "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard liter".split()
# The sign that each macro stands for; macros for layout vanish, and any other leaves its name.
_SIGNS = """
    cdot * times * cap ∩ le ≤ leq ≤ ge ≥ geq ≥ neq ≠ pm ± circ ∘ in ∈ lt < gt > % % setminus ∖ approx ≈ lfloor ⌊
    rfloor ⌋ lceil ⌈ rceil ⌉ infty inf cup U emptyset ∅ varnothing ∅ pmod mod bmod mod epsilon ϵ varepsilon ε
    phi ϕ varphi φ""".split()
_LAYOUT = """
    left right big Big bigg Bigg displaystyle mathrm mathbf mathit mathcal boldsymbol bf rm it limits boxed phantom
    underline ! ( ) [ ] { } $""".split()
_MACROS = GREEK | dict(zip(_SIGNS[::2], _SIGNS[1::2])) | dict.fromkeys([*",;: ", "quad"], " ") | {"\\": "\n"}
_MACROS |= dict.fromkeys(_LAYOUT, "")
_LETTERS = {*"abcdefghijklmnopqrstuvwxyzοπ", *GREEK.values()}


def equal(answer: str, gold: str) -> bool:
    """Is the answer right by DeepScaleR's rules? Not symmetric; an answer of over MAX_LENGTH characters is wrong."""
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    return _repaired(answer) == _repaired(gold) or _same_parts(_plain(answer), _plain(gold))


def _repaired(text: str) -> str:
    r"""The first reading: one spelling of \frac12, \dfrac, \sqrt3, degrees, percent, x = 5 and a leading zero."""
    text = re.sub(r"^\s*\\text\{(.+?)\}\s*$", r"\1", text).strip()
    text = re.sub(r"\n|\\!|\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$|\\?%", "", text.replace("\\\\", "\\"))
    if text.count("\\text{ ") == 1:
        text = re.sub(r"(?<=[0-9}])\s*\\text\{ (?!or |and )[^{}]*\}.*", "", text)  # a unit
    text = re.sub(r"[td]frac", "frac", text)
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    text = re.sub("^[^=]{0,2}=(?=[^=]*$)", "", text)
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([^{])", r"\1{\2}", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}", text)


def _plain(text: str) -> str:
    """The second reading: plain text in lower case, without units, spaces and LaTeX."""
    text = re.sub(r"(?s)^\s*\\text\{(.+?)\}\s*$", r"\1", text).strip()
    text = re.sub(r"\\?[%$]", "", text)
    text = re.sub(" (?:or|and) ", " , ", text)
    for word, power in (("million", 6), ("billion", 9), ("trillion", 12)):
        text = text.replace(word, f"*10^{power}")
    text = re.sub(rf"(?:{'|'.join(_UNITS)})(?:es)?s? *(?:\^[0-9]+)?", "", text)
    text = re.sub(r"\^ *\\circ|,\\! *", "", text)
    text = re.sub(r"(?s)^\{(.*)\}\Z", r"\1", text)
    text = _as_integer(text)
    if "\\" in text:
        text = _without_latex(text)
    text = re.sub("- *", "-", text)
    text = re.sub("([0-9]) +([0-9])", r"\1+\2", text)  # a mixed number
    text = re.sub("[ {}\n]", "", text).lower()
    return _as_integer(text)


def _as_integer(text: str) -> str:
    """142.0 and 14,200 as integers."""
    number = _grouped(text)
    if re.fullmatch(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,2})?\s*", number):
        value = float(number)
        if math.isfinite(value) and abs(value - round(value)) <= 1e-7:
            return str(round(value))
    return text


def _grouped(text: str) -> str:
    """12,345 without its comma; of three or more commas one remains, as in the original."""
    while (shorter := re.sub(r"([0-9]),([0-9]{3})($|[^0-9])", r"\1\2\3", text)) != text:
        text = shorter
    return text


def _without_latex(text: str) -> str:
    r"""\frac{a}{b} as a/b and a matrix as [a b;c d], without braces and with unknown macros' names."""
    text = re.sub(r"\\[td]?frac", r" \\frac", text).replace("~", "\xa0")  # no space for the rules below
    text = re.sub(r"\\mbox\s*\{[^{}]*\}", "", text)
    text = re.sub(r"\\mathbf\s*\{(?=[^{}]*[A-Za-z])", "{𝐁", text)  # a bold letter is another letter
    matrix = r"(?s)\\begin\{[pb]?matrix\}(.*?)\\end\{[pb]?matrix\}"
    text = re.sub(matrix, lambda found: f"[{found[1]}]".replace("&", " ").replace("\\\\", ";"), text)
    text = re.sub(r"\\(?:text\w*|mathrm|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*([0-9])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}", text)
    for _ in range(MAX_DEPTH):
        before = text
        text = re.sub(r"\\frac\s*\{([^{}\\]*)\}\s*\{([^{}\\]*)\}", r"\1/\2", text)
        text = re.sub(r"\\sqrt\s*\[([0-9]+)\]\s*\{([^{}]*)\}", r"(\2)^(1/\1)", text)
        text = re.sub(r"\\sqrt\s*(?:\{([^{}]*)\}|([0-9]))", r"sqrt(\1\2)", text)
        text = re.sub(r"\\([A-Za-z]+|.)", lambda m: m[0] if m[1] in ("frac", "sqrt") else _MACROS.get(m[1], m[1]), text)
        text = re.sub(r"(?<![}\w\]])\{([^{}]*)\}", r"\1", text) if text == before else text
        if text == before:
            break
    return text.strip()


def _same_parts(answer: str, gold: str) -> bool:
    if answer == gold or not answer or not gold:
        return answer == gold
    golds, answers = _parts(gold), _parts(answer)
    if len(golds) > 1 and (gold[0] != answer[0] or gold[-1] != answer[-1]) or len(golds) != len(answers):
        return False
    return all(map(_same_part, answers, golds))


def _parts(text: str) -> list[str]:
    text = _grouped(text)
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not re.search(r"[()\[\]]", text[1:-1]):
        return [part.strip() for part in text[1:-1].split(",")]
    return [text]


def _same_part(answer: str, gold: str) -> bool:
    fraction = r"-?[0-9]+.?/0*[1-9][0-9]*.?"
    if re.fullmatch(fraction, answer) and re.fullmatch(fraction, gold):
        return answer == gold
    if bool(re.fullmatch("[+-]?[0-9]+", answer)) != bool(re.fullmatch("[+-]?[0-9]+", gold)):
        return False
    if "=" in answer + gold or len(set(re.sub("sqrt|frac", "", f"{answer}{gold}")) & _LETTERS) > 2:
        return False
    if re.search(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]|l[ng](?!\()|[a-z)]!|[⌊⌈|]", f"{answer} {gold}"):
        return False
    # In its reading e and i are ordinary letters.
    answer, gold = (one.replace("pi", "π").translate(str.maketrans("eiI", "EJJ")) for one in (answer, gold))
    budget = Budget()
    try:
        return agree(Expression(answer, budget), Expression(gold, budget))
    except NO_VALUE:
        return False
