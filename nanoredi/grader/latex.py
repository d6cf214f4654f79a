r"""LaTeX to the grader's plain string: layout, fonts, units and currencies are dropped, every operator and bracket gets
one spelling (\leq and <= become ≤, \{ becomes ⦃), and short forms are written out (\frac12, 0.1\overline{6}, 2\frac12).

Every rule is one regular expression on a bounded string; where a rule may be wrong, `readings` tries both meanings.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator

from nanoredi.grader.numbers import FUNCTIONS
from nanoredi.grader.symbols import GREEK

# Each macro followed by the sign that it stands for; ⦃ and ⦄ are the grader's own brackets around a set.
_SIGNS = r"""
    cdot * times * ast * div / colon : ratio : pm ± mp ∓ cup ∪ bigcup ∪ cap ∩ bigcap ∩ setminus ∖ backslash ∖
    smallsetminus ∖ in ∈ infty ∞ infin ∞ emptyset ∅ varnothing ∅ pi π circ ° degree ° textdegree ° prime ' lvert |
    rvert | vert | mid | lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ { ⦃ lbrace ⦃ } ⦄ rbrace ⦄ langle ( rangle ) lbrack [ rbrack ]
    lt < gt > leq ≤ le ≤ leqslant ≤ leqq ≤ geq ≥ ge ≥ geqslant ≥ geqq ≥ neq ≠ ne ≠ approx ≈ simeq ≈ lor ,∨ vee ,∨
    ldots … dots … cdots … dfrac \frac tfrac \frac cfrac \frac nicefrac \frac sfrac \frac imath i jmath j
    dbinom \binom tbinom \binom lgroup ( rgroup ) ulcorner ⌈ urcorner ⌉ llcorner ⌊ lrcorner ⌋ overline \bar
    AA Å measuredangle \angle varepsilon \epsilon varphi \phi vartheta \theta varrho \rho land \wedge lnot \neg
    | | lVert | rVert | Vert | to → rightarrow → longrightarrow → implies ⇒ Rightarrow ⇒ iff ⇔ Leftrightarrow ⇔
""".split()
_SPACES = ", ; : > $ % space enspace thinspace".split() + [" ", "\n"]
_LAYOUT = (
    "! ( ) [ ] left right mleft mright middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr "
    "displaystyle textstyle limits bf rm it cal mathopen mathclose ensuremath boxed fbox framebox underline "
    "boldsymbol pmb widehat overset strut protect normalfont pounds euro textdollar checkmark small large Large huge"
).split()
_MACROS = dict.fromkeys(_LAYOUT, "") | dict.fromkeys(_SPACES, " ") | dict(zip(_SIGNS[::2], _SIGNS[1::2]))
# Replaced before NFKC, which would turn them into other signs (and which unites a letter's forms, φ and ϕ).
_BEFORE = str.maketrans(
    {"º": "°", "ℓ": "\\ell ", "ℏ": "\\hbar "}
    | {c: f"\\mathbb{{{n}}}" for c, n in zip("ℝℤℕℚℂ", "RZNQC")}
    | {chr(ord("①") + n): f"{n + 1}," for n in range(20)}
)
_CHARACTER_SIGNS = r"""
    × * · * ⋅ * ∙ * • * ÷ / ∕ / ⁄ / ∣ | 〈 ( ⟨ ( 〉 ) ⟩ ) ∨ ,∨ 、 , 。 . ′ ' ’ ' − - ≦ ≤ ⩽ ≤ ≧ ≥ ⩾ ≥ √ \sqrt ∛ \cbrt
    ∜ \sqrt[4] ∑ \sum ∏ \prod ∫ \int ∠ \angle ∀ \forall ≡ \equiv ∆ \Delta
""".split()
_BY_CHARACTER = dict.fromkeys("~$%", " ") | dict.fromkeys('"“”✓', "") | {"或": " or ", "和": " and ", "与": " and "}
_BY_CHARACTER |= dict(zip(_CHARACTER_SIGNS[::2], _CHARACTER_SIGNS[1::2]))
_BY_CHARACTER |= {case(sign): f"\\{case(name)}" for name, sign in GREEK.items() for case in (str.lower, str.title)}
_CHARACTERS = str.maketrans({char: f"{sign} " if "\\" in sign else sign for char, sign in _BY_CHARACTER.items()})
_FORMS = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": " %s "}
_FONT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox|math(?:rm|bf|it|sf|tt|bb|cal|frak)|bm)\s*"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
# A \text after a number is its unit unless it begins with a digit or with one of these words or signs, as in
# 2\mathrm{i}, 3\text{ p.m.}, 2\text{ if }x>0, n>2\text{ even}.
_NO_UNIT_WORD = (
    r"hal(?:f|ves)|thirds|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths|squared|cubed|factorial|odd|"
    r"even|prime|integer|negative|positive|more|less|fewer|short|under|(?:degrees )?(?:below|under) zero"
)
_NO_UNIT = (
    r"(?!\s*(?:\(?\s*[,;:)]|(?:[a-fi-kn-rt-z]|[AaPp]\.?\s*[Mm]\.?)\s*\}|\([^{}()]*\}|[^{}]*(?:\bnot?\b|[∧∨]\s*[0-9])|"
    r"(?:\( ?|is )(?:mod|base|extr|rej|disc)|(?:to|at|if|for|when|where|since|because|mod|(?:in )?base|choose|"
    rf"(?:more|less) than|(?:{_NO_UNIT_WORD})(?=\W*\}}))\b))"
)
_UNIT = rf"(?!\\math(?:bf|it|bb|cal|frak)|\\bm){_FONT}\{{{_NO_UNIT}[^{{}}0-9‰](?:[^{{}}]|\{{[^{{}}]*\}})*\}}(?!\s*_){_POWER}"
_MANY_UNITS = rf"(?:\\mu\s*)?(?:{_UNIT}(?:\\Omega)?|\\frac\s*\{{\s*{_UNIT}\s*\}}\s*\{{\s*{_UNIT}\s*\}})"
_JOINING = rf"(?<![\\A-Za-z{{])WORD(?![A-Za-z}}])|(?<=[0-9)\]}}⦄])WORD(?=[A-Za-z]\b)|{_FONT}\{{\s*,?\s*WORD\s*\}}"
_DERIVATIVE = (
    r"\\frac\s*\{\s*(?:d|\\partial)\s*(?:\^\s*\{?\s*([0-9])\s*\}?)?\s*([^{}]*(?:_\{\w+\})?)\s*\}"
    r"\s*\{\s*(?:d|\\partial)\s*([A-Za-z]|\\[A-Za-z]+)\s*(?:\^\s*\{?\s*[0-9]\s*\}?)?\s*\}"
)
_ONES = "zero one two three four five six seven eight nine ten eleven twelve".split()
_ONES += [f"{three}teen" for three in "thir four fif six seven eigh nine".split()]
_TENS = [f"{three}ty" for three in "twen thir for fif six seven eigh nine".split()]
_NUMBERS = _ONES + [f"{ten}-{one}".removesuffix("-zero") for ten in _TENS for one in _ONES[:10]]
_PARTS = dict(enumerate("half third fourth fifth sixth seventh eighth ninth tenth".split(), 2))
_IN_WORDS = dict(zip(_NUMBERS, map(str, range(100)))) | {"half": "1/2"}
_IN_WORDS |= {f"{_ONES[n]}-{part}{'s' * (n > 1)}": f"{n}/{size}" for n in range(1, 10) for size, part in _PARTS.items()}
_COUNTS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_BOUNDS = {"at least": "≥", "at most": "≤", "(?:less|fewer) than": "<", "(?:more|greater) than": ">"}
_VALUE = r"(?=[0-9.\\([⦃-]|[a-z] *[=<>≤≥])"  # how an answer begins
_MULTIPLE = re.compile(rf"(?<=[0-9])\s*({_FONT}\{{)?\s*({'|'.join(_COUNTS)})\b")
_SIZE = rf"(?:{_MANY_UNITS}|\s(?:[a-z]{{4,}}|cm|in|ft)\b)"
# A letter, macro or fraction alone in braces that are no macro's argument; of {{g}_{k}} it takes two passes.
_ALONE = (
    r"(\\[A-Za-z]+\s*\{|[_^}\]]\s*\{)|"
    r"\{\s*((?:[A-Za-z]|\\[A-Za-z]+)(?:_\{\w+\})?|\\frac\{\w+\}\{\w+\})\s*\}(?!\s*\\over)"
)
_GAP = rf"(?:{_FONT}\{{|[\s~{{}},.]|\\[ ,;:]|and\b)*"
_COMPOUND = re.compile(  # 3 hours and 20 minutes, 20 min 5 s, 6 feet 2 inches
    rf"(?<![0-9./])([0-9]+){_GAP}(?:(h(?:ou)?r?s?)|(min(?:ute)?s?)|f(?:ee)?t)\b{_GAP}([0-9]+)"
    rf"(?={_GAP}(?(2)min(?:ute)?s?|(?(3)s(?:ec(?:ond)?s?)?|in(?:ch(?:es)?)?))\b)"
)

_REWRITES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"(?:\{\s*,\s*\}|,\s*\\!)\s*(?=[0-9]{3})", ""),  # these commas group digits, wherever they are
    # 3'600 and 1.000.000, and 1,000, for no list has a member 000
    (
        r"(?<![.,0-9])[0-9]{1,3}(?:('[0-9]{3})+|(\.[0-9]{3}){2,}|(,[0-9]{3})*,0[0-9]{2}(,[0-9]{3})*)(?![.]?[0-9])",
        lambda found: re.sub("[',.]", "", found[0]),
    ),
    (r"(?<=[0-9])\{,\}(?=[0-9])", "."),  # elsewhere it is a decimal comma
    (r"(?<=[0-9.])\\?[%$](?=\.?[0-9])", "§"),  # 17%6 is not 176
    (r"(?s)^\s*([*_]{1,3}|`+)(?![*_`])(.+?)\1\s*$", r"\2"),  # Markdown
    (r"(?<!\s)(?<![a-z: ]{4}\})(?<!for\}|rrow|lies)\s*\\q?quad\s*(?=[A-Za-z](?:_\w)?\s*=)", " , "),  # not after a word
    (r"\\q?quad", " "),  # also where a letter is glued to it
    (r"\\(?:left|right)\s*\.", ""),
    # 0.\dot{1}4\dot{2}, 0.1(6) and 0.1666... become 0.1\overline{6}, and that becomes a fraction
    (r"\\dot\s*\{?([0-9])\}?([0-9]{0,48})\\dot\s*\{?([0-9])\}?", r"\\overline{\1\2\3}"),
    (r"(\.[0-9]{0,50})\(([0-9]{1,50})\)(?=[\s$\\)}]*$)", r"\1\\overline{\2}"),
    (r"(\.[0-9]{0,50}?)([0-9]{1,9}?)\2+\s*(?:…|\.{3}|\\[lcd]?dots(?![a-z]))", r"\1\\overline{\2}"),
    (r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,50})\}|([0-9]))", lambda found: _repeating(found)),
    (r"\\([A-Za-z]+|[^A-Za-z])", lambda found: _MACROS.get(found[1], found[0])),
    (r"(?s).+", lambda found: found[0].translate(_CHARACTERS)),
    # The rules above are about digits, and give every macro and character one spelling; those below know no other.
    (r"(?<=[0-9])\s*x\s*(?=10\s*\^)", "*"),
    (r"\{\s*([:=+*<>.-])\s*\}", r"\1"),
    (rf"(?<=[0-9]) ?\^ ?\{{? ?(?:{_FONT}\{{(?:st|nd|rd|th|o)\}}|o\b) ?\}}?|(?<=[0-9])(?:st|nd|rd|th)\b", ""),
    *zip((r"<=", r">=", r"!=|\\not\s*=", r"\*\*", r":\s*=|\\coloneqq(?![a-z])", r"\+/-", r"\.\.\."), "≤≥≠^=±…"),
    (r"\\(?:phantom|hphantom|vphantom|hspace|label|tag|color|textcolor)\s*\*?\{[^{}]*\}", ""),
    (r"(?<=\\\\)\s*\[-?[0-9.]+ *[a-z]+\]", ""),  # \\[1ex]
    (r"\^\s*(?:('+)|\{\s*((?:'\s*)+)\})", r"\1\2"),
    (r"(?<=[A-Za-z)}'])\s*°\s*(?=[A-Za-z(\\])(?![CFK]\b)", "∘"),  # composition
    (r"(?:\^\s*)?(?:°|\{\s*°\s*\})(?:\s*[CFK]\b|\s*" + _FONT + r"\{\s*[CFK]\s*\})?", "°"),
    (r"(\\equiv.*)\\b?mod\b", r"\1\\pmod"),
    (r"\s*(?:\(\s*\\[bp]?mod\s*(\w+)\s*\)|\\pmod\s*(?:\{([^{}]*)\}|(\w+)))", r" (mod \1\2\3)"),
    (r"\\b?mod(?![a-z])", " mod "),
    (r"\\(?:mathbb|Bbb)\s*(?:\{\s*R\s*\}|R)|(?<=∈)\s*R\b", "ℝ"),
    (r"_\s*" + _FONT + r"(\{[^{}]*\})", r"_\1"),
    (r"_\s*([0-9]+|[\w∞*+-]|\\[A-Za-z]+)", r"_{\1}"),
    (r"\\(?:angle|triangle) *[A-Z](?: [A-Z](?![A-Za-z]))+", lambda found: re.sub("(?<=[A-Z]) ", "", found[0])),
    (r"\\(bar|hat|tilde)\s*(?:\{(\w)\}|\s(\w))_\{(\w+)\}", r"\\\1{\2\3_{\4}}"),
    (r"\\bar\s*\{\s*([a-z])\s*([a-z]+)\s*\}", r"\\bar{\1_{\2}}"),  # the number with these digits is no product
    (r"\\operatorname\*?\s*\{(\w+)\}", r"\\\1 "),
    *[(_JOINING.replace("WORD", word), f" ,{sign} ") for word, sign in (("or", "∨"), ("and", "∧"))],
    (rf"^(?=[^=]*\*[^=]*$)(\s*[0-9.]+\s*)(?:{_MANY_UNITS}\s*)?\*(?=\s*[0-9.]+\s*{_SIZE})", r"\1×"),  # no product
    (rf"(?<=[0-9])\s*(?:{_FONT}\{{\s*to\s*\}}|\bto\b)\s*(?=[0-9](?:[\s0-9.{{}}:]|{_FONT}|to\b|odds)*$)", ":"),
    (r"(?<=[0-9)}π°'!])[\s/]*(?:" + _MANY_UNITS + r"[\s/*]*)+(?!\s*(?:[A-Za-z0-9π]|\\[A-Za-z]))", " "),
    *[(_FONT + r"\{([^{}]*)\}", r" \1 ")] * 2,  # for a font in a font
    (_FONT + r"(?=[A-Za-z0-9\\])", " "),
    (r"(?<=\S) *(?:\\forall|\bfor (?:all|any|every|each)( real)?) *[a-z]( *∈ *ℝ)?(?! *[^ ,]| *, ?[a-z](?![\w(=]))", ""),
    (r"^\s*(?:[a-zA-Z]|\\[a-z]+)\s*\\equiv(?=[^,=]*\(\s*mod [^()]*\)\s*$)", ""),
    (rf"(?<=_\{{)\s*(?:{'|'.join(_ONES)})\s*(?=\}})", lambda found: str(_ONES.index(found[0].strip()))),
    (r"(?i)^\s*(?:\\sim|[→⇒]|(?:\\?therefore|both|exactly|thus|hence|so|it is|there (?:is|are))\b)[\s,:]*(?=\S)", ""),
    (r"(?i)^\s*(?:either\b|all(?: integers| values of)?(?= *[a-z] *[<>≤≥]))", ""),
    (r"(?i)^\s*(?:答案?[是为:]*|(?:the )?(?:final |correct )?answer *(?:is\b *:?|:))", ""),
    (
        r"(?i)^\s*(?:all )?real(?:s| numbers?)(?: x)?,? (?:except|other than)(?: for)? +(.*)",
        lambda found: "x≠" + re.sub("[a-z] *=", "", found[1]),
    ),
    (r"(?i)^\s*(?:the )?(?:point|line|vertex)s?(?= *[(\[]| +[xy]\b)", ""),
    (r"(?i)^\s*(?:(?:option|choice)\s+(?=\W*[A-J]\b)|(?:usd?|rs\.?)(?=[ 0-9]))", ""),
    (r"(?i)\b(?:approximately|approx\.?|about|roughly)\s+(?=[0-9.\\-])", "≈"),
    (r"(?i)^\s*(?:negative|minus)\s+(?=\S+\s*$)|^(?=.*\b(?:below|under) zero[\s.]*$)", "-"),
    (r"(?i)\b(?:(?:below|under) zero|only)[\s.]*$", ""),
    (rf"(?i)^\s*(?!yes|true|false|.*[,;].*:)[a-z]{{3,}}(?: +[a-z][\w+()]*){{0,7}}?\s*(?:\bis\b|:)\s*{_VALUE}", ""),
    *[(rf"(?i)^\s*{words}\s+{_VALUE}", sign) for words, sign in _BOUNDS.items()],
    (r"(?i)(?<!\\)\b(?:infinity|inf|oo)\b", "∞"),
    (r"^\s*([f-hP-R](?:\([a-z]\))?)\s*\\equiv(?!.*mod)", r"\1="),
    *[(rf"(?:\\|\b){name}\s*\(([^()]*)\)", new) for name, new in (("ceil", r"⌈\1⌉"), ("floor", r"⌊\1⌋"))],
    (r"\\(frac|binom)\s*([0-9])", r"\\\1{\2}"),
    (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
    (r"(?<=[0-9])'\s*'?(?!['\w])", ""),  # minutes and seconds of arc
    (r"\\(?:vec|overrightarrow)\s*\{\s*([A-Z]{2})\s*\}", r"v_{\1}"),  # AB and BA are different vectors
    (r"\\(?:vec|overrightarrow)(?![A-Za-z])", ""),
    (r"\\hat\s*\{?\s*([ijk])\b\s*\}?", r" \1 "),  # unit vectors
    (r"(?<=[)\]}⦄])\s*U\s*(?=[(\[{⦃])", "∪"),
    (r"ℝ\s*-\s*(?=[⦃{])", "ℝ∖"),
    (r"(⦃[^⦃⦄:|]*[A-Za-z)ℝ]\s*):(?=[^⦃⦄]*[=<>≤≥≠∈])", r"\1|"),  # such that
    (r"\^\s*(\{[^{}]*\}|\w)\s*_\{([^{}]*)\}", r"_{\2}^\1"),
    (r"(?<![A-Za-z\\])C_\{(?![0-3]\})([^{}]+)\}\s*\^\s*\{?\s*(\w+)\s*\}?", r"\\binom{\1}{\2}"),
    (r"(?<![\w}])(?:\{\s*\}\s*)?[_^]\s*\{?\s*(\w+)\s*\}?\s*C_\{(\w+)\}", r"\\binom{\1}{\2}"),
    (r"(?<![A-Za-z\\])C\s*\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)", r"\\binom{\1}{\2}"),
    (r"(?:^|(?<=∪))\s*\]", "("),  # ]1,2[ is the open interval
    (r"\[\s*(?=$|∪)", ")"),
    (_DERIVATIVE, r"ð_{\3\1}\2"),  # one symbol, so that its d's do not cancel
    (r"\\(d?)dot\s*(?:\{([^{}]*(?:_\{\w+\})?)\}|(\w|\\[a-z]+))", r"ð_{t\1}\2\3"),
    *[(_ALONE, r"\1\2")] * 2,
    (r"\\begin\s*\{(\w+)\*?\}(?:\s*\{[lcr|]+\})?", r"⟦\1¦"),  # read as brackets
    (r"\\end\s*\{\w+\*?\}", "⟧"),
    (r"(?<![0-9./^_])([0-9]+)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"(\1+\2/\3)"),  # 1 1/2 is a sum
    (r"(?<![0-9./^_])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)", r"(\1+\2/\3)"),
    (r"⦃\s*⟦array¦([^⟦⟧]*)⟧(?!\s*⦄)", r"⟦cases¦\1⟧"),
]
_RULES = [(re.compile(pattern), new) for pattern, new in _REWRITES]

# Units without \text. A single letter is a unit only in a quotient: 3 m/s, but not 3 m.
_SHORT_UNITS = (
    "cm|mm|km|nm|kg|mg|lbs?|oz|ft|in|yd|mi|hrs?|min|secs?|ms|k?Hz|MHz|GHz|[kMG]?eV|kJ|kW|MW|mV|kV|k?Pa|atm|mol|mL|ml|"
    "rad|deg|mph|kph|k?cal|yrs?|USD|pct|sq|cu|units?|erg|AU|[kM]pc"
)
_SMALL_UNITS = (
    rf"(?:cm|mm|km|m|g|kg|mi|ft|N|J|W|C|V|A|L){_POWER}\s*/\s*(?:s|h|hr|min|m|cm|kg|L|mol|K|C|day)\b{_POWER}"
    r"|[MLR]_\{\\(?:odot|oplus|sun)\}"
)
_NO_BARE_UNIT = rf"(?!(?:{_NO_UNIT_WORD})\W*(?:$|,)|(?:more|less) than)"
_WORD = rf"(?:{_NO_BARE_UNIT}[A-Za-z]{{4,}}|\\Omega|Å|[μµ]m|per|of|{_SHORT_UNITS})\b{_POWER}"
_BARE_UNITS = re.compile(
    rf"(?<=[0-9}}π°])(?:\s+(?:{_SMALL_UNITS}|{_WORD}(?:[\s/*]+{_WORD}){{0,4}}(?: squared| cubed)?)|"
    rf"(?:cm|mm|km|kg|mL|k?Hz|MHz|mph){_POWER}|\s*(?![万亿千百十半成折分之多余点])[一-龥]{{1,4}})\.?\s*(?=$|,)"
)
_GROUPED = re.compile(r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])")
# A remark after an answer: in brackets, or from a word to the end.
_BRACKETED = re.compile(
    r"(?s)(.*?[^\s,;(])(?:\s+|(?<=[0-9)}\]]))\("
    r"\s*(≈|[a-z]{4,}\b|[a-z]{2,3}\s|\w\s+(?:is\b|[a-z]{4})|i\.e|(?=[^()]*[=<>≤≥≠∈]))((?:[^()]|\([^()]*\))*)\)\s*"
)
_TAIL = re.compile(r"(?s)(.*?[^\s,;(])[\s,;]*(\\forall|\b(?:since|because|where|for(?: all| any| every| each)?)\b)(.*)")
# kπ, k ∈ ℤ and 2^n, n ≥ 2: about a letter of the answer, not the r of \frac or the n of even
_HEAD = r"(?:\\[A-Za-z]+(?![A-Za-z])|[^\\∈<>≤≥≠])*?(?<![A-Za-z]{2})([a-z])(?!\s*=|[A-Za-z]{2})[^∈<>≤≥≠]*?"
_ABOUT = r"\2\s*∈\s*(?:[ZNQ].*|ℝ[\s.]*)|(?<=[,;])(?:[^,;<>≤≥≠]*[<≤])?\s*\2\s*[<>≤≥≠][^,;∨∧]*"
_CONDITION = re.compile(rf"(?s)({_HEAD}(?<![\s,;(+*/=^-]))[\s,;]+({_ABOUT})")
# f(x)=2x is f(n)=2n, and f(x)=5 is f(n)=5, but X_{d}=P is not X_{u}=P
_FUNCTION_OF = re.compile(
    r"(?!.*\\zeta)\\?[A-Za-z]+(?:\(|_\{)([a-z])[)}]="
    r"(?=(?:\\[A-Za-z]+(?![A-Za-z])|[^\\])*?\1|(?:\\[a-z]+|[^A-Za-z])*$)"
)
_RATE = re.compile(r"ð_\{([a-z])([2-9d]?)\}((?:\\[a-z]+|[A-Za-z])(?:_\{\w+\})?)")  # dy/dt or \dot y
# A remark with one of these changes the answer, or begins another one.
_NO_REMARK = re.compile(
    r"⟦|\b(?:exclu|except|extraneous|reject|discard|squared|cubed|negative|"
    rf"(?:for|if|when|mod|base|not|unless|without|other|otherwise|else|{'|'.join(FUNCTIONS)})\b)"
)
Details = frozenset[tuple[str, str]]  # each with its sort: a choice's letter, a condition, or one of the following
# One answer may leave these out, but two must agree: 25% increase is not 25% decrease, and 5 cm are neither 5 m nor
# 5 cm^2. Spellings joined by commas mean the same.
_DETAILS = r"""
    increase decrease profit loss gain north south east west above below left right up down late early before after ago now
    faster slower higher lower clockwise counterclockwise,anticlockwise noon midnight bc ad hundred thousand million billion
    trillion dozen cent dollar,\$,usd euro,€ pound,lb,£ week month day,d year,yr,y hour,hr,h min,minute in,inch,inche
    ft,foot,feet yard,yd mile,mi km mile/hour,mph km/hour,kph oz,ounce gallon,gal %,\%,percent,pct
    °,º,\circ,\degree,degree,deg rad,radian atm ton AU ly erg
""".split()
_METRIC = r"""
    m,meter,metre g,gram l,L,liter,litre J,joule,Nm J/s,W,watt N,newton V,volt A,amp,ampere Pa,pascal Hz,hertz
    mol,mole K,kelvin s,sec,second T,tesla eV,electronvolt cal,calorie Wh pc,parsec C,celsius,coulomb
    F,fahrenheit,farad \Omega,ohm
""".split()
for _sign, _long in zip(["", *"kcmnMG", "micro"], ["", "kilo", "centi", "milli", "nano", "mega", "giga", "micro"]):
    _DETAILS += [re.sub("[^,]+", rf"{_sign}\g<0>,{_long}\g<0>", unit) for unit in _METRIC]
_DETAIL_OF = {word: words.split(",")[0] for words in _DETAILS for word in words.split(",")} | {"unit": ""}
_OF_ANYTHING = re.compile(r"(?:way|method|case|choice|number|value|ement|tion|itie|ing)s$")  # 5 ways, 5 arrangements
_TOKEN = re.compile(  # "in" before something else is no inch
    r"((?!in\b[\s~}]*[A-Za-z0-9\\$])\\?[A-Za-z]+|\\?[%$]|[°º€£])(?:\W{0,4}\^\W{0,3}([1-9])|\s*([²³]|squared|cubed))?"
)
_PER = re.compile(r"(?:/|\bper\b(?: sq\w*| cu\w*)?|\}\s*\{)[\s~{\\]*(?:(?:text|mathrm|rm)\b)?[\s~{]*$")  # before a unit
# Where a single letter is a unit: 5\text{ s} and 5 m/s, but not x/(m+s) or \text{(C) }5.
_IN_TEXT = r"(?<=.)\\(?:text|mathrm|rm|textrm|mbox)(?![a-z]|[\s{(]*[A-J](?:[):]|\.(?!\W*$)))[\s{]*[^{}]*"
_OF_UNITS = re.compile(rf"{_IN_TEXT}|[0-9}}]\W{{0,3}}[A-Za-z]+\s*/\s*[A-Za-z]+")
_POWERS = {"sq": "2", "cu": "3", "²": "2", "³": "3"}
_LABELS = "a b c d A B C D 1 2 3 4 i ii iii iv I II III IV".split()
_LABEL = re.compile(rf"(?:^\s*|[\s,;.]+)\(({'|'.join(_LABELS)})\)\s*")  # (a) 5, (b) 6
_CHOICE = re.compile(r"(?s)\s*\(?\s*([A-J])\s*[):.]\s+([^\s,∧∨].*)")


def clean(text: str) -> str:
    """The plain string of an answer."""
    if not text.isascii():
        text = _compatible(text.translate(_BEFORE))
    for pattern, new in _RULES:
        if pattern.search(text):  # far cheaper than sub, and most rules do not apply
            text = pattern.sub(new, text)
    pieces = _LABEL.split(text)  # "", a, 5, b, 6
    places = [_LABELS.index(label) % 4 for label in pieces[1::2]]
    if len(places) > 1 and places == [*range(len(places))] and all(pieces[2::2]):
        return f"({','.join(pieces[2::2])})"
    word = text.strip(" .-").lower().replace(" ", "-").replace("quarter", "fourth")
    return text[: text.find("-", 0, 2) + 1] + _IN_WORDS[word] if word in _IN_WORDS else text.rstrip(" \\")


def readings(text: str) -> Iterator[tuple[str, Details]]:
    """The plain strings that an answer may mean, each with the details that it leaves out: 12,345 may be one number or
    two, 5 km a number or a product, (C) 12 a letter or 12, a line a member of a list, 2x for x > 0 also 2x."""
    for _ in range(2):  # hours, minutes and seconds
        text = _COMPOUND.sub(lambda one: str(int(one[1]) * (60 if one[2] or one[3] else 12) + int(one[4])), text)
    lines = text if "\\begin" in text else re.sub(r"\s*(?:\n|\\\\)\s*", " , ", text.strip())
    counted = _MULTIPLE.sub(lambda found: f"*{{{_COUNTS[found[2]]}}}{found[1] or ''}", text)
    common = re.sub(r"\\log(?![\sA-Za-z]*_)", r"\\lg", text)  # \log as the logarithm of base 10
    raw = dict.fromkeys([text, re.sub(r"(?<=[0-9])\s*[cdkm]?m[²³]", "", text), counted, lines, common])
    details = _details(text)
    texts = {clean(one): _details(one) if one == counted != text else details for one in raw}
    for one in list(texts):
        if choice := _CHOICE.fullmatch(one):
            texts |= {choice[n]: texts[one] | {("choice", choice[3 - n])} for n in (1, 2)}
        if remark := _BRACKETED.fullmatch(one) or _TAIL.fullmatch(one) or _CONDITION.fullmatch(one):
            head, word, tail = remark.groups()
            several = (word == "for" or "=" in tail) and re.search(r",(?!\s*[a-z]\s*(?:$|[,∈]))", tail)
            if not several and not _NO_REMARK.search(tail if remark.re is _TAIL else word + tail):
                harmless = re.match("≈|approx|about|since|because", word) or not re.search("[0-9=<>≤≥≠∈]", tail)
                texts.setdefault(head, texts[one] | (set() if harmless else {("condition", re.sub(r"\s", "", tail))}))
                if bound := re.match(r"\s*([a-z])\s*∈\s*[ZN]", tail):  # its name does not matter
                    tail = re.sub(r"\s|\\zeta ", "", _with_zeta(tail, bound))
                    texts.setdefault(_with_zeta(head, bound), frozenset([("condition", tail)]))
        variables = {("variable", rate[0]) for rate in _RATE.findall(one)}
        if ("ð" in one or "'" in one) and len(variables) < 2:  # also y' and y'(t)
            primed = _RATE.sub(lambda rate: rate[3] + "'" * (int(rate[2] or 1) if rate[2] != "d" else 2), one)
            texts.setdefault(re.sub(r"(?<=[\w'}])\(t\)", "", primed), texts[one] | variables)
    for change in (lambda one: _BARE_UNITS.sub("", one), _without_grouping):
        texts = {change(one): details for one, details in reversed(texts.items())} | texts
    # A space counts only between two letters or digits: 1 1/3 is not 11/3.
    for one, details in texts.items():
        one = re.sub(r" (?=[\W_])|(?<=\W) ", "", " ".join(one.split()))
        yield one, details
        if bound := _FUNCTION_OF.match(one):
            yield _with_zeta(one, bound), details


def _with_zeta(text: str, bound: re.Match) -> str:
    """The text with ζ for a letter that may have any name."""
    return re.sub(r"\\[A-Za-z]+|[A-Za-z]{4,}|[a-z]", lambda one: "\\zeta " if one[0] == bound[1] else one[0], text)


def _details(text: str) -> Details:
    """Units (of cm^2 also the power alone; km and km/h differ, $5 and $5/h do not), directions and so on, a plural that is
    the only word, as in 5 apples, and how many there are of each if there are several, as in 5 boys and 4 girls."""
    found, words, lower = set(), [], ""
    text = re.sub(r"(?:\\mu|[μµ])[\s}]*(\\(?:text|mathrm)\W*)?", r"\1micro", text)
    places = [range(*one.span()) for one in _OF_UNITS.finditer(text)]
    for match in _TOKEN.finditer(text):
        token, power, word = match.groups(default="")
        before, lower = lower, token.lower() if len(token) > 1 else token
        known = [_DETAIL_OF[one] for one in (token, lower, re.sub("(?:wards?|s)$", "", lower)) if one in _DETAIL_OF]
        if known and (len(token) > 1 or not token.isalpha() or any(match.start() in place for place in places)):
            power = power.strip("1") or _POWERS.get(word[:2] or before[:2], "")
            per = "/" in known[0] or "-" in match[0] or _PER.search(text, match.start() - 20, match.start())
            found |= {*(one + power for one in known[0].split("/")), power, "per" if per else ""}
        elif len(token) > 3 and token[0] != "\\":
            words.append(lower)
    for unit, parts in (("J", {"N", "m"}), ("J s", {"J", "s"})):
        found ^= {*parts, unit} if parts <= found else set()
    if words == [lower] and re.search(r"[0-9].*s\W*$", text) and not _OF_ANYTHING.search(lower):
        found.add(lower)
    counted = re.findall(r"([0-9]+)[\s~]*(?:\\[a-z]+\W*)?([a-z]{3,}s)\b", text)
    kinds = {("rate", str("per" in found))} if found - {""} and not found & {"dollar", "euro", "cent", "%"} else set()
    return frozenset({("detail", one) for one in found - {""}} | kinds | {*(counted if len(counted) > 1 else ())})


def _without_grouping(text: str) -> str:
    return text if re.search(r"[(\[⦃]", text) else _GROUPED.sub(lambda number: re.sub("[ ,]", "", number[0]), text)


def _compatible(text: str) -> str:
    """Full-width and mathematical letters as plain ones, x² as x^{2}, ½ apart; without invisible characters."""
    runs = itertools.groupby(text, key=lambda char: unicodedata.decomposition(char).partition(" ")[0])
    pieces = [_FORMS.get(form, "%s") % unicodedata.normalize("NFKC", "".join(chars)) for form, chars in runs]
    kinds = {"Cf": "", "Sc": "", "Pd": "-", "Zs": " "}  # format, currency, dash, space
    return "".join(kinds.get(unicodedata.category(char), char) for char in "".join(pieces))


def _repeating(found: re.Match) -> str:
    """0.1\\overline{6} as a fraction: (16 - 1) / 90."""
    whole, fixed, period = found[1], found[2], found[3] or found[4]
    numerator = int(whole + fixed + period) - int("0" + whole + fixed)
    return f"({numerator}/{'9' * len(period)}{'0' * len(fixed)})"
