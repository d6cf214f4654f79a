r"""LaTeX to the grader's plain string: layout, fonts, units and introductions are dropped, every operator and bracket
gets one spelling (\leq and <= become ≤, \{ becomes ⦃), and short forms are written out (\frac12, 0.1\overline{6}).

Every rule is one regular expression on a bounded string; where a rule may be wrong, readings.py tries both meanings.
"""

import itertools
import math
import re
import unicodedata
from collections.abc import Callable

from nanoredi.grader.symbols import GREEK

# Each sign with the macros and characters that stand for it. ⦃ and ⦄ are the grader's own brackets around a set; of the
# fonts, three remain: upright text, in which units are written, bold letters, and ℝ's.
_SPELLINGS = r"""
    * cdot times ast × · ⋅ ∙ •; / div ÷ ∕ ⁄; : colon ratio; ± pm; ∓ mp; - −; ∪ cup bigcup; ∩ cap bigcap; < lt; > gt;
    ∖ setminus backslash smallsetminus; ∈ in; ∞ infty infin; ∅ emptyset varnothing; π pi; ° circ degree textdegree º;
    ' prime ′ ’; | lvert rvert vert mid | lVert rVert Vert ∣; ( langle lgroup 〈 ⟨; ) rangle rgroup 〉 ⟩; [ lbrack;
    ] rbrack; ⦃ { lbrace; ⦄ } rbrace; ⌊ lfloor llcorner; ⌋ rfloor lrcorner; ⌈ lceil ulcorner; ⌉ rceil urcorner;
    ≤ leq le leqslant leqq ≦ ⩽; ≥ geq ge geqslant geqq ≧ ⩾; ≠ neq ne; ≈ approx simeq; ,∨ lor vee; , 、; . 。;
    … ldots dots cdots; → to rightarrow longrightarrow; ⇒ implies Rightarrow Longrightarrow; ⇔ iff Leftrightarrow;
    \frac dfrac tfrac cfrac nicefrac sfrac; \binom dbinom tbinom; \bar overline; \vec overrightarrow; \wedge land;
    \neg lnot; \sqrt √; \cbrt ∛; \sqrt[4] ∜; \sum ∑; \prod ∏; \int ∫; \forall ∀; ≡ equiv; ∂ partial; Å AA;
    \angle measuredangle ∠; \triangle △; i imath; j jmath; \Delta ∆; \epsilon varepsilon; \phi varphi; \theta vartheta;
    \rho varrho; \ell ℓ; \hbar ℏ; \mathbf mathit mathcal mathfrak bm; \mathbb Bbb;
    \text textbf textit textrm textsf texttt textup textnormal emph mbox hbox mathrm mathsf mathtt"""
_LAYOUT = r"""
    ! , ; : > $ % ( ) [ ] space enspace thinspace left right mleft mright middle big Big bigg Bigg bigl bigr Bigl Bigr
    biggl biggr Biggl Biggr displaystyle textstyle limits bf rm it cal mathopen mathclose ensuremath boxed fbox framebox
    underline boldsymbol pmb widehat overset strut protect normalfont pounds euro textdollar checkmark small large Large
    huge""".split()
_SPELLED = {one: sign for sign, *others in map(str.split, _SPELLINGS.split(";")) for one in others}
_MACROS = dict.fromkeys([*_LAYOUT, " ", "\n"], " ") | {name: sign for name, sign in _SPELLED.items() if name.isascii()}
_SPELLED |= {case(char): f"\\{case(name)}" for name, char in GREEK.items() for case in (str.lower, str.title)}
_CHARACTERS = str.maketrans(
    {char: f"{sign} " if "\\" in sign else sign for char, sign in _SPELLED.items() if not char.isascii()}
    | {char: f"\\mathbb{{{letter}}}" for char, letter in zip("ℝℤℕℚℂ", "RZNQC")}
    | {chr(ord("①") + n): f"{n + 1}," for n in range(20)}
    | {"“": "", "”": "", "✓": "", "∨": " or ", "或": " or ", "和": " and ", "与": " and "}
)
_FORMS = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": " %s "}

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_PARTS = dict(enumerate("half third fourth fifth sixth seventh eighth ninth tenth".split(), 2))
_NUMBERS = _ONES + [f"{ten}-{one}".removesuffix("-zero") for ten in _TENS for one in _ONES[:10]]
_IN_WORDS = dict(zip(_NUMBERS, map(str, range(100)))) | {"half": "1/2"}
_IN_WORDS |= {f"{_ONES[n]}-{part}{'s' * (n > 1)}": f"{n}/{size}" for n in range(1, 10) for size, part in _PARTS.items()}
_LABELS = "a b c d A B C D 1 2 3 4 i ii iii iv I II III IV".split()
_LABEL = re.compile(rf"(?:^\s*|[\s,;.]+)\(({'|'.join(_LABELS)})\)\s*")  # (a) 5, (b) 6

# In the rules below <NAME> stands for one of these pieces.
_PIECES = {
    # 3'600 and 1.000.000, and 1,000, for no list has a member 000
    "THOUSANDS": r"('[0-9]{3})+|(\.[0-9]{3}){2,}|(,[0-9]{3})*,0[0-9]{2}(,[0-9]{3})*",
    # Spaces that mean nothing: at the ends, around indices, inside braces, before a brace.
    "LOOSE": r"^\ +|\ +$|\ *([_^])\ *|(\\[A-Za-z]+|[{}])\ +(?=\{)|(\{)\ +|\ +(?=\})|(\ )\ +",
    "FONT": r"\\(?:text|mathb[bf])\ ?",
    "LETTER": r"(?:[A-Za-z]|\\[A-Za-z]+)",
    "ORDER": r"(?:\^\{?([0-9])\}?)",
    # A \text after a number is its unit, unless it begins with one of these, as in 2\text{i}, 3\text{ p.m.} and
    # 2\text{ if }x>0, or is a word that changes the number, as in n>2\text{ even}.
    "UNITS": r"(?:\\mu\ ?)?(?:<UNIT>(?:\\Omega)?|\\frac\{<UNIT>\}\{<UNIT>\}|<INBRACKETS>)",
    "INBRACKETS": r"\( ?\\text\{[cdkm]?[mg](?:/[sh])?<POWER>\}<POWER> ?\)",  # 24(\mathrm{cm}^2)
    "UNIT": r"\\text\{(?!<NOUNIT>)(?![0-9‰])(?:[^{}]|\{[^{}]*\})+\}(?!_)<POWER>",
    "NOUNIT": r"""(?x:
        \(?\ ?[,;:)] | (?:[a-fi-kn-rt-z]|[AaPp]\.?\ ?[Mm]\.?)\} | \([^{}()]*\} | [^{}]*(?:\bnot?\b|[∧∨]\ *[0-9])
        | (?:\(\ ?|is\ )(?:mod|base|extr|rej|disc|rem) | <CHANGE>\W*\}
        | (?:to|at|if|for|when|where|since|because|mod|(?:in\ )?base|choose|(?:more|less)\ than|remainder)\b)""",
    "CHANGE": r"(?:hal(?:f|ves)|thirds|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths|squared|cubed|factorial"
    r"|odd|even|prime|integer|negative|positive|more|less|fewer|short|under|(?:degrees\ )?(?:below|under)\ zero)\b",
    "POWER": r"(?:\ ?\^\ ?(?:\{-?[0-9]\}|-?[0-9]))?",
    # Units without \text. A single letter is one only in a quotient: 3 m/s, but not 3 m.
    "BAREUNIT": r"""(?x:
        (?:cm|mm|km|m|g|kg|mi|ft|N|J|W|C|V|A|L)<POWER>\ ?/\ ?(?:s|h|hr|min|m|cm|kg|L|mol|K|C|day)\b<POWER>
        | [MLR]_\{\\(?:odot|oplus|sun)\} | <UNITWORD>(?:[ /*]+<UNITWORD>){0,4}(?:\ squared|\ cubed)?)""",
    "UNITWORD": r"""(?x:(?!<CHANGE>\W*(?:$|,) | (?:more|less)\ than)(?: [A-Za-z]{4,} | \\Omega | Å | [μµ]m | per | of
        | cm|mm|km|nm|kg|mg|lbs?|oz|ft|in|yd|mi|hrs?|min|secs?|ms|k?Hz|MHz|GHz|[kMG]?eV|kJ|kW|MW|mV|kV|k?Pa|atm|mol
        | mL|ml|rad|deg|mph|kph|k?cal|yrs?|USD|pct|sq|cu|erg|AU|[kM]pc )\b<POWER>)""",
    "GLUEDUNIT": r"(?:(?:cm|mm|km|kg|mL|k?Hz|MHz|mph)<POWER>|\ ?(?![万亿千百十半成折分之多余点])[一-龥]{1,4})",
    "GAP": r"(?:\\[a-z]+\s*\{|[\s~{},.]|\\[ ,;:]|and\b)*",  # between 3 hours and 20 minutes
    # Therefore; either; all x > 0; the point (1,2); option A; US 5; the answer is; the area of the square is 5
    "INTRODUCTION": r"""(?x:
        (?:\\sim(?=\ *(?:[0-9.-]|\\(?:frac|sqrt))) | [→⇒] | (?:\\?therefore|both|exactly|thus|hence|so|it\ is
        |there\ (?:is|are))\b)[ ,:]*(?=\S) | either\b | all(?:\ integers|\ values\ of)?(?=\ *[a-z]\ *[<>≤≥≠≡])
        | 答案?[是为:]* | (?:the\ )?(?:point|line|vertex)s?(?=\ *[(\[]|\ +[xy]\b) | (?:option|choice)\ +(?=\W*[A-J]\b)
        | (?:usd?|rs\.?)(?=[\ 0-9]) | (?:the\ )?(?:final\ |correct\ )?answer\ *(?:is\b\ *:?|:)
        | (?!yes|true|false|(?:all\ )?real|.*[,;].*:)[a-z]{3,}(?:\ +[a-z][\w+()]*){0,7}?\ *(?:\b(?:is|are)\b|:)\ *<VALUE>)""",
    "TO": r"(?<![0-9.])([0-9]+) ?(?:<FONT>\{to\}|\bto\b) ?(?=([0-9]+)(?:[ 0-9{}:]|<FONT>|to\b|odds)*$)",
    "REALSEXCEPT": r"(?:all\ )?real(?:s|\ numbers?)(?:\ x)?,?\ (?:except|other\ than)(?:\ for)?",
    "VALUE": r"(?=[0-9.\\([⦃-]|[a-z]\ *[=<>≤≥])",  # how an answer begins
}
_JOINING = r"(?<![\\A-Za-z])WORD(?![A-Za-z])|(?<=[0-9)\]}⦄])WORD(?=[A-Za-z]\b)"
_BOUNDS = {"at least": "≥", "at most": "≤", "(?:less|fewer) than": "<", "(?:more|greater) than": ">"}

_REWRITES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    # Raw LaTeX: digits in groups and repeating decimals.
    (r"(?:\{\s*,\s*\}|,\s*\\!)\s*(?=[0-9]{3})", ""),  # these commas group digits, wherever they are
    (r"(?<![.,0-9])[0-9]{1,3}(?:<THOUSANDS>)(?![.]?[0-9])", lambda found: re.sub("[',.]", "", found[0])),
    (r"(?<=[0-9])\{,\}(?=[0-9])", "."),  # elsewhere it is a decimal comma
    (r"(?<=[0-9.])\\?[%$](?=\.?[0-9])", "§"),  # 17%6 is not 176
    # 0.\dot{1}4\dot{2}, 0.1(6) and 0.1666... become 0.1\overline{6}, and that becomes a fraction
    (r"\\dot\s*\{?([0-9])\}?([0-9]{0,48})\\dot\s*\{?([0-9])\}?", r"\\overline{\1\2\3}"),
    (r"(\.[0-9]{0,50})\(([0-9]{1,50})\)(?=[\s$\\)}]*$)", r"\1\\overline{\2}"),
    (r"(\.[0-9]{0,50}?)([0-9]{1,9}?)\2+\s*(?:…|\.{3}|\\[lcd]?dots(?![a-z]))", r"\1\\overline{\2}"),
    (
        r"([0-9]*\.([0-9]*))\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,50})\}|([0-9]))",  # 0.1 + 6/90
        lambda m: f"({m[1]}0+{m[3] or m[4]}/{'9' * len(m[3] or m[4])}{'0' * len(m[2])})",
    ),
    # One spelling of every macro, character and sign, and no spaces but between two things.
    (r"(?s)^\s*([*_]{1,3}|`+)(?![*_`])(.+?)\1\s*$", r"\2"),  # Markdown
    (r"(?<!\s)(?<![a-z: ]{4}\})(?<!for\}|rrow|lies)\s*\\q?quad\s*(?=[A-Za-z](?:_\w)?\s*=)", " , "),  # not after a word
    (r"\\q?quad|\\(?:left|right)\s*\.", " "),  # also \quadx
    (r"\\([A-Za-z]+|[^A-Za-z])", lambda found: _MACROS.get(found[1], found[0])),
    (r'[~$%"\s]+', " "),
    ("<LOOSE>", r"\1\2\3\4"),
    (r"(?<=[0-9]) ?x ?(?=10\^)", "*"),
    (r"\{([:=+*<>.-])\}", r"\1"),
    *zip((r"<=", r">=", r"!=|\\not ?=", r"\*\*", r": ?=|\\coloneqq(?![a-z])", r"\+/-", r"\.\.\."), "≤≥≠^=±…"),
    (r"(?<=[0-9])\^\{?(?:<FONT>\{(?:st|nd|rd|th|o)\}|o\b)\}?|(?<=[0-9])(?:st|nd|rd|th)\b", ""),  # 3^{rd}, 45^o
    # Also the size in \\[1ex].
    (r"\\(?:[hv]?phantom|hspace|label|tag|(?:text)?color) ?\*?\{[^{}]*\}|(?<=\\\\) ?\[-?[0-9.]+ *[a-z]+\]", ""),
    (r"\^(?:('+)|\{((?:' ?)+)\})", r"\1\2"),
    (r"(?<=[A-Za-z)}']) ?°\s?(?=[A-Za-z(\\])(?![CFK]\b)", "∘"),  # composition
    (r"\^?(?:°|\{°\})(?: ?[CFK]\b| ?<FONT>\{[CFK]\})?", "°"),
    (r" ?(?:\( ?\\[bp]?mod ?(\w+) ?\)|\\pmod ?(?:\{([^{}]*)\}|(\w+)))", r" (mod \1\2\3)"),
    (r"\\b?mod(?![a-z]) ?(?:\{(\w+)\})?", r" mod \1"),
    (r"\\mathbb(?:\{R\}| ?R)|(?<=∈) ?R\b", "ℝ"),
    (r"_<FONT>(\{[^{}]*\})", r"_\1"),
    (r"_([0-9]+|[\w∞*+-]|\\[A-Za-z]+)", r"_{\1}"),
    (r"\\(?:angle|triangle) ?[A-Z](?: [A-Z](?![A-Za-z]))+", lambda found: re.sub("(?<=[A-Z]) ", "", found[0])),
    (r"\\(bar|hat|tilde)(?:\{(\w)\}| (\w))_\{(\w+)\}", r"\\\1{\2\3_{\4}}"),
    (r"\\bar\{([a-z]) ?([a-z]+)\}", r"\\bar{\1_{\2}}"),  # the number with these digits is no product
    (r"\\operatorname\*?\{(\w+)\}", r"\\\1 "),
    # And, or; units after numbers; fonts.
    *[(_JOINING.replace("WORD", word), f" ,{sign} ") for word, sign in (("or", "∨"), ("and", "∧"))],
    # 2 × 3 cm is no product, and 3 to 1 a ratio, but 5 to 10 a range
    (r"^(?=[^=]*\*[^=]*$)([0-9.]+ ?)(?:<UNITS> ?)?\*(?= ?[0-9.]+ ?(?:<UNITS>| (?:[a-z]{4,}|cm|in|ft)\b))", r"\1×"),
    ("<TO>", lambda found: f"{found[1]}:" if math.gcd(int(found[1]), int(found[2])) == 1 else found[0]),
    (r"(?<=[0-9)}π°'!])(?<!\}_\{[0-9]\})[ /]*(?:<UNITS>[ /*]*)+(?! *(?:[A-Za-z0-9π]|\\[A-Za-z]))", " "),
    *[(r"<FONT>(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(?=[A-Za-z0-9\\]))", r" \1 ")] * 2,  # twice for a font in a font
    (r"(?<=\S) *(?:\\forall|\bfor (?:all|any|every|each)( real)?) *[a-z]( *∈ *ℝ)?(?! *[^ ,]| *, ?[a-z](?![\w(=]))", ""),
    ("<LOOSE>", r"\1\2\3\4"),
    # Without fonts: introductions and remarks in words.
    ("(?i)^(?:<INTRODUCTION>\\ *)+", ""),
    (r"(?i)\b(even|odd|prime)s?(?: integers?| numbers?)?(?= [a-z]\b)", r"\1"),
    (r"^([f-hP-R](?:\([a-z]\))?) ?≡(?!.*mod)", r"\1="),
    (r"(?i)^<REALSEXCEPT>\ (.*)", lambda found: "\\zeta ≠" + re.sub("[a-z] *=", "", found[1])),
    (r"(?i)\b(?:approximately|approx\.?|about|roughly) (?=[0-9.\\-])", "≈"),
    (r"(?i)^(?:negative|minus) (?=\S+$)|^(?=.*\b(?:below|under) zero[ .]*$)", "-"),
    (r"(?i)\b(?:(?:below|under) zero|only)[ .]*$", ""),
    *[(rf"(?i)^{words} +<VALUE>", sign) for words, sign in _BOUNDS.items()],
    (r"(?i)(?<!\\)\b(?:infinity|inf|oo)\b", "∞"),
    # The notation that parse.py and expression.py read: of binomials, derivatives, environments, mixed numbers.
    *[(r"(\\(?:frac|binom)(?:\{[^{}]*\})?) ?([0-9])", r"\1{\2}")] * 2,
    (rf"(?<=_\{{)(?:{'|'.join(_ONES)})(?=\}})", lambda found: str(_ONES.index(found[0]))),  # 101_{two}
    (r"(?<![\w}.])([0-9]+)_\{(?:10|ten)\}", r"\1"),
    *[(rf"(?:\\|\b){name} ?\(([^()]*)\)", new) for name, new in (("ceil", r"⌈\1⌉"), ("floor", r"⌊\1⌋"))],
    (r"(?<=[0-9])' ?'?(?!['\w])", ""),  # minutes and seconds of arc
    (r"\\vec\{([A-Z]{2})\}", r"v_{\1}"),  # AB and BA are different vectors
    (r"\\vec(?![A-Za-z])", ""),
    (r"\\hat ?\{?([ijk])\b\}?", r" \1 "),  # unit vectors
    (r"(?<=[)\]}⦄]) ?U ?(?=[(\[{⦃])", "∪"),
    (r"ℝ ?- ?(?=[⦃{])", "ℝ∖"),
    (r"(⦃[^⦃⦄:|]*[A-Za-z)ℝ] ?):(?=[^⦃⦄]*[=<>≤≥≠∈])", r"\1|"),  # such that
    (r"\^(\{[^{}]*\}|\w)_\{([^{}]*)\}", r"_{\2}^\1"),
    (r"(?<![A-Za-z\\])C_\{(?![0-3]\})([^{}]+)\}\^\{?(\w+)\}?", r"\\binom{\1}{\2}"),
    (r"(?<![\w}])(?:\{\})?[_^]\{?(\w+)\}?C_\{(\w+)\}", r"\\binom{\1}{\2}"),
    (r"(?<![A-Za-z\\])C ?\( ?([0-9]+) ?, ?([0-9]+) ?\)", r"\\binom{\1}{\2}"),
    (r"(?:^|(?<=∪)) ?\]", "("),  # ]1,2[ is the open interval
    (r"\[ ?(?=$|∪)", ")"),
    (r"\\frac\{[d∂]<ORDER>? ?([^{}]*(?:_\{\w+\})?)\}\{[d∂] ?(<LETTER>)<ORDER>?\}", r"ð_{\3\1}\2"),
    (r"\\(d?)dot(?:\{([^{}]*(?:_\{\w+\})?)\}| ?(\w|\\[a-z]+))", r"ð_{t\1}\2\3"),  # so that the d's do not cancel
    # A letter, macro or fraction alone in braces that are no macro's argument; of {{g}_{k}} it takes two passes.
    *[(r"(\\[A-Za-z]+\{|[_^}\]]\{)|\{(<LETTER>(?:_\{\w+\})?|\\frac\{\w+\}\{\w+\})\}(?! ?\\over)", r"\1\2")] * 2,
    (r"\\begin\{(\w+)\*?\}(?:\{[lcr|]+\})?", r"⟦\1¦"),  # read as brackets
    (r"\\end\{\w+\*?\}", "⟧"),
    (r"⦃ ?⟦array¦([^⟦⟧]*)⟧(?! ?⦄)", r"⟦cases¦\1⟧"),
    (r"(?<![0-9./^_])([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}", r"(\1+\2/\3)"),  # 1 1/2 is a sum
    (r"(?<![0-9./^_])([0-9]+) ([0-9]+) ?/ ?([0-9]+)", r"(\1+\2/\3)"),
    ("<LOOSE>", r"\1\2\3\4"),
]


def regex(pattern: str) -> re.Pattern:
    """A pattern compiled with the pieces that it names."""
    while (longer := re.sub("<([A-Z]+)>", lambda piece: _PIECES[piece[1]], pattern)) != pattern:
        pattern = longer
    return re.compile(pattern)


_RULES = [(regex(pattern), new) for pattern, new in _REWRITES]


def clean(text: str) -> str:
    """The plain string of an answer."""
    if not text.isascii():
        text = _compatible(text.translate(_CHARACTERS)).translate(_CHARACTERS)
    for pattern, new in _RULES:
        if pattern.search(text):  # far cheaper than sub, and most rules do not apply
            text = pattern.sub(new, text)
    pieces = _LABEL.split(text)  # "", a, 5, b, 6
    places = [_LABELS.index(label) % 4 for label in pieces[1::2]]
    if len(places) > 1 and places == [*range(len(places))] and all(pieces[2::2]):
        return f"({','.join(pieces[2::2])})"
    word = text.strip(" .-").lower().replace(" ", "-").replace("quarter", "fourth")
    return text[: text.find("-", 0, 2) + 1] + _IN_WORDS[word] if word in _IN_WORDS else text.rstrip(" \\")


def _compatible(text: str) -> str:
    """Full-width and mathematical letters as plain ones, x² as x^{2}, ½ apart; without invisible characters."""
    runs = itertools.groupby(text, key=lambda char: unicodedata.decomposition(char).partition(" ")[0])
    pieces = [_FORMS.get(form, "%s") % unicodedata.normalize("NFKC", "".join(chars)) for form, chars in runs]
    kinds = {"Cf": "", "Sc": "", "Pd": "-", "Zs": " "}  # format, currency, dash, space
    return "".join(kinds.get(unicodedata.category(char), char) for char in "".join(pieces))
