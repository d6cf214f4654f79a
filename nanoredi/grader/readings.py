r"""What an answer may mean: its plain string (latex.py), and others in which a remark, a unit or a name is left out,
each with the details that it leaves out, in which two answers must not contradict each other."""

import itertools
import re
from collections.abc import Iterable, Iterator

from nanoredi.grader.latex import clean, regex
from nanoredi.grader.numbers import FUNCTIONS

MAX_READINGS = 12  # of an answer, each of which is compared with each of the other answer

_COUNTS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MULTIPLE = regex(rf"(?<=[0-9])\s*(\\[a-z]+\s*\{{)?\s*({'|'.join(_COUNTS)})\b")
_COMPOUND = regex(  # 3 hours and 20 minutes, 20 min 5 s, 6 feet 2 inches
    r"(?<![0-9./])([0-9]+)<GAP>(?:(h(?:ou)?r?s?)|(min(?:ute)?s?)|f(?:ee)?t)\b<GAP>([0-9]+)"
    r"(?=<GAP>(?(2)min(?:ute)?s?|(?(3)s(?:ec(?:ond)?s?)?|in(?:ch(?:es)?)?))\b)"
)
_CHOICE = re.compile(r"\(? ?([A-J]) ?[):.](?: ([^ ,∧∨].*))?")
# A remark after an answer: in brackets, or from a word to the end.
_BRACKETED = re.compile(
    r"(.*?[^ ,;(])(?: |(?<=[0-9)}\]]))"
    r"\( ?(≈|(?=odd|even)|[a-z]{4,}\b|[a-z]{2,3} |\w (?:is\b|[a-z]{4})|i\.e|(?=[^()]*[=<>≤≥≠∈]))((?:[^()]|\([^()]*\))*)\)"
)
_TAIL = re.compile(r"(.*?[^ ,;(])[ ,;]*(\\forall|\b(?:since|because|where|for(?: all| any| every| each)?)\b)(.*)")
# kπ, k ∈ ℤ and 2^n, n ≥ 2: about a letter of the answer, not the r of \frac or the n of even
_CONDITION = re.compile(
    r"(?!.{300})((?:\\[A-Za-z]+(?![A-Za-z])|[^\\∈<>≤≥≠])*?"  # tries every letter, which takes time
    r"(?<![A-Za-z]{2})([a-z])(?! ?=|[A-Za-z]{2})[^∈<>≤≥≠]*?(?<![ ,;(+*/=^-]))"
    r"[ ,;]+(\2 ?∈ ?(?:[ZNQ].*|ℝ[ .]*)|(?<=[,;])(?:[^,;<>≤≥≠]*[<≤])? ?\2 ?[<>≤≥≠][^,;∨∧]*)"
)
# A remark with one of these changes the answer, or begins another one.
_NO_REMARK = re.compile(
    r"⟦|.\bwhere\b|\b(?:exclu|except|extraneous|reject|discard|squared|cubed|negative|"
    rf"(?:for|if|when|mod|base|not|remainder|unless|without|other|otherwise|else|{'|'.join(FUNCTIONS)})\b)"
)
_RATE = re.compile(r"ð_\{([a-z])([2-9d]?)\}((?:\\[a-z]+|[A-Za-z])(?:_\{\w+\})?)")  # dy/dt or \dot y
# f(x)=2x is f(n)=2n, and f(x)=5 is f(n)=5, but X_{d}=P is not X_{u}=P
_FUNCTION_OF = re.compile(
    r"(?!.*\\zeta)\\?[A-Za-z]+(?:\(|_\{)([a-z])[)}][=<>≤≥]"
    r"(?=(?:\\[A-Za-z]+(?![A-Za-z])|[^\\])*?\1|(?:\\[a-z]+|[^A-Za-z])*$)"
)
_NO_CONSTANT = re.compile(r"C|_\{c|c ?\^|(?<![A-Za-z\\])[ab](?!rc)")  # c^2 is the speed of light or a radius
_BARE_UNITS = regex(r"(?<=[0-9}π°])(?: <BAREUNIT>| ?\{<BAREUNIT>\}<POWER>|<GLUEDUNIT>)\.? ?(?=$|,)")
_GROUPED = re.compile(r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])")

Details = frozenset[tuple[str, str]]  # each with its sort: a choice's letter, a condition, or one of the following
# One answer may leave these out, but two must agree: 25% increase is not 25% decrease, and 5 cm are neither 5 m nor
# 5 cm^2. Spellings joined by commas mean the same.
_DETAILS = r"""
    increase decrease profit loss gain north south east west above below left right up down late early before after ago
    now faster slower higher lower clockwise counterclockwise,anticlockwise noon midnight bc ad cent,¢ yen,yuan,¥
    rupee,₹ dollar,\$,usd euro,€ pound,lb,£ week month day,d year,yr,y hour,hr,h min,minute in,inch,inche
    ft,foot,feet yard,yd mile,mi km mile/hour,mph km/hour,kph oz,ounce gallon,gal %,\%,percent,pct
    °,º,\circ,\degree,degree,deg rad,radian \AA,Å,angstrom atm ton AU ly erg""".split()
_METRIC = r"""m,meter,metre g,gram l,L,liter,litre J,joule,Nm J/s,W,watt N,newton V,volt A,amp,ampere Pa,pascal Hz,hertz
    mol,mole K,kelvin s,sec,second T,tesla eV,electronvolt cal,calorie Wh pc,parsec C,celsius,coulomb F,fahrenheit,farad
    \Omega,ohm""".split()
for _sign, _long in zip(["", *"kcmnMG", "micro"], ["", "kilo", "centi", "milli", "nano", "mega", "giga", "micro"]):
    _DETAILS += [re.sub("[^,]+", rf"{_sign}\g<0>,{_long}\g<0>", unit) for unit in _METRIC]
_DETAIL_OF = {word: words.split(",")[0] for words in [*_DETAILS, *_COUNTS] for word in words.split(",")} | {"unit": ""}
_OF_ANYTHING = re.compile(r"(?:way|method|case|choice|number|value|ement|tion|itie|ing)s$")  # 5 ways, 5 arrangements
_TOKEN = re.compile(  # "in" before something else is no inch
    r"((?!in\b[\s~}]*[\w\\$])\\?[A-Za-z]+|\\?[%$]|[°º€£¢¥₹Å])(?:\W{0,4}\^\W{0,3}([1-9])|\s*([²³]|squared|cubed))?"
)
_PER = re.compile(r"(?:/|\bper\b(?: sq\w*| cu\w*)?|\}\s*\{)[\s~{\\]*(?:(?:text|mathrm|rm)\b)?[\s~{]*$")  # before a unit
# Where a single letter is a unit: 5\text{ s} and 5 m/s, but not x/(m+s) or \text{(C) }5.
_IN_TEXT = r"(?<=.)\\(?:text|mathrm|rm|textrm|mbox)(?![a-z]|[\s{(]*[A-J](?:[):]|\.(?!\W*$)))[\s{]*[^{}]*"
_OF_UNITS = re.compile(rf"{_IN_TEXT}|[0-9}}]\W{{0,3}}[A-Za-z]+\s*/\s*[A-Za-z]+|(?:°|\\circ\}}?)\s*[CFK]\b")
_ARC = re.compile(r"[0-9][\s^{]*(?:('+)|[°º]|\\circ|\\?deg)")  # 30' is not 30°
_POWERS = {"sq": "2", "cu": "3", "²": "2", "³": "3"}


def readings(text: str) -> Iterator[tuple[str, Details]]:
    """The plain strings, each with the details that it leaves out."""
    for _ in range(2):  # hours, minutes and seconds
        text = _COMPOUND.sub(lambda one: str(int(one[1]) * (60 if one[2] or one[3] else 12) + int(one[4])), text)
    details = _details(text)
    text = re.sub(r"(?<=[0-9])\s*[cdkm]?m[²³]", "", text)  # m^2 may be a product, m² is not
    lines = text if "\\begin" in text else re.sub(r"\s*(?:\n|\\\\)\s*", " , ", text.strip())  # members of a list
    counted = _MULTIPLE.sub(lambda found: f"*{{{_COUNTS[found[2]]}}}{found[1] or ''}", text)  # 5 million
    spellings = dict.fromkeys((text, lines, counted))
    texts = {clean(one): _details(one) if one == counted != text else details for one in spellings}
    new = list(texts.items())
    while new and len(texts) < MAX_READINGS:  # (C) 12 for x > 0
        new = [(other, left.union(more)) for one, left in new for other, more in _others(one) if other not in texts]
        texts |= reversed(new)  # of two ways to one string the first counts
    # A space counts only between two letters or digits: 1 1/3 is not 11/3.
    for one, details in itertools.islice(texts.items(), MAX_READINGS):
        one = re.sub(r" (?=[\W_])|(?<=\W) ", "", " ".join(one.split()))
        yield one, details
        if bound := _FUNCTION_OF.match(one):
            yield _renamed(one, bound[1]), details


def _others(text: str) -> Iterator[tuple[str, Iterable[tuple[str, str]]]]:
    """What else a plain string may mean, each with the details that it leaves out."""
    if choice := _CHOICE.fullmatch(text):  # (C) 12 or C)
        yield choice[1], [("choice", choice[2])] * bool(choice[2])
        yield choice[2] or "", [("choice", choice[1])]
    if remark := _BRACKETED.fullmatch(text) or _TAIL.fullmatch(text) or _CONDITION.fullmatch(text):
        head, word, tail = remark.groups()  # but not 2 for n=1, 3 for n=2
        several = (word == "for" or "=" in tail) and re.search(r",(?! ?[a-z] ?(?:$|[,∈]))", tail)
        if not several and not _NO_REMARK.search(tail if remark.re is _TAIL else word + tail):
            harmless = re.match("≈|approx|about|since|because|(?!.*(?:[0-9=<>≤≥≠∈]|odd|even|[A-Z][a-z]))", word + tail)
            yield head, [] if harmless else [("condition", tail.replace(" ", ""))]
            if bound := re.match(" ?([a-z]) ?∈ ?[ZN]", tail):  # its name does not matter
                yield _renamed(head, bound[1]), [("condition", _renamed(tail, bound[1]).replace(" ", ""))]
    variables = {("variable", rate[0]) for rate in _RATE.findall(text)}
    if ("ð" in text or "'" in text) and len(variables) < 2:  # dy/dt is also y', and so is y'(t)
        primed = _RATE.sub(lambda rate: rate[3] + "'" * (int(rate[2] or 1) if rate[2] != "d" else 2), text)
        yield re.sub(r"(?<=[\w'}])\(t\)", "", primed), variables
    yield re.sub(r"\\log(?![ A-Za-z]*_)", r"\\lg", text), []  # the natural logarithm or that of base 10
    if re.match(r"(?:\\[A-Za-z]+(?![A-Za-z])|[^\\tuxyz])*[tuxyz]", text) and not _NO_CONSTANT.search(text):
        yield _renamed(text, "c", "C"), []  # constants of integration
    yield _BARE_UNITS.sub("", text), []  # 5 km is a number or a product
    if not re.search(r"[(\[⦃]", text):  # 12,345 is one number or two
        yield _GROUPED.sub(lambda number: re.sub("[ ,]", "", number[0]), text), []


def _renamed(text: str, letter: str, new: str = "\\zeta ") -> str:
    """The text with another name, such as ζ, for a letter that may have any; the c of cos is none."""
    return re.sub(r"\\[A-Za-z]+|[A-Za-z]{4,}|c[os][cst]|[a-z]", lambda one: new if one[0] == letter else one[0], text)


def _details(text: str) -> Details:
    """Units (of cm^2 also the power alone; km and km/h differ, $5 and $5/h do not), directions and so on, and
    plurals after numbers: the only one, as in 5 apples, or all with their numbers, as in 5 boys and 4 girls."""
    found, lower = set(), ""
    text = re.sub(r"(?:\\mu|[μµ])[\s}]*(\\(?:text|mathrm)\W*)?", r"\1micro", re.sub(r"\\prime\s*|[′’]", "'", text))
    places = {place for one in _OF_UNITS.finditer(text) for place in range(*one.span())}
    for match in _TOKEN.finditer(text):
        token, power, word = match.groups(default="")
        before, lower = lower, token.lower() if len(token) > 1 else token
        known = [_DETAIL_OF[one] for one in (token, lower, re.sub("(?:wards?|s)$", "", lower)) if one in _DETAIL_OF]
        if known and (not re.fullmatch("[A-Za-z]", token) or match.start() in places):
            power = power.strip("1") or _POWERS.get(word[:2] or before[:2], "")
            per = "/" in known[0] or "-" in match[0] or _PER.search(text, match.start() - 20, match.start())
            found |= {*(one + power for one in known[0].split("/")), power, "per" if per else ""}
    for unit, parts in (("J", {"N", "m"}), ("J s", {"J", "s"})):
        found ^= {*parts, unit} if parts <= found else set()
    counted = re.findall(r"([0-9]+)(?:\\[a-z]+\b|\\\W|[^\w\\])*([a-z]{3,}s)\b(?!\W*\^)", text.lower())
    if len(counted) == 1 and counted[0][1][:-1] not in _DETAIL_OF and not _OF_ANYTHING.search(counted[0][1]):
        found.add(counted[0][1])
    details = {("detail", one) for one in found - {""}} | {("arc", mark) for mark in _ARC.findall(text)}
    if found - {""} and not found & {"dollar", "euro", "cent", "%"}:
        details.add(("rate", str("per" in found)))
    return frozenset([*details, *(counted if len(counted) > 1 else ())])
