r"""Normalization of an answer's text: it unifies characters and removes markup, typesetting and filler words.

The result is LaTeX or plain text, not yet parsed. Text that may have a meaning is kept.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾", "0123456789+-ni()")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢₓ", "0123456789+-nix")
_SYMBOLS = {
    **dict.fromkeys("–—−‐‑‒―﹣－", "-"),
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("⋅·∙•", r"\cdot "),
    **dict.fromkeys("°∘º", r"\degree "),
    **dict.fromkeys("“”„«»″", '"'),
    **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("∖", r"\setminus "),
    "÷": "/", "∕": "/", "⁄": "/", "∗": "*", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∛": r"\sqrt[3] ",
    "∞": r"\infty ",
    "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∠": r"\angle ",
    "△": r"\triangle ",
    "∨": r"\vee ", "∧": r"\wedge ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
    "→": r"\to ", "。": ".", "、": ",",
    "…": r"\ldots ", "ℝ": r"\mathbb{R}", "ℚ": r"\mathbb{Q}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}",
    "∣": "|", "￥": "¥",
}  # fmt: skip
_GREEK = {
    unicodedata.lookup(f"GREEK {case} LETTER {name}"): f"\\{name.lower() if case == 'SMALL' else name.title()} "
    for name in (
        "ALPHA BETA GAMMA DELTA EPSILON ZETA ETA THETA IOTA KAPPA NU XI PI RHO SIGMA TAU UPSILON PHI CHI PSI OMEGA MU"
    ).split()
    for case in ("SMALL", "CAPITAL")
} | {"λ": r"\lambda ", "Λ": r"\Lambda ", "ϕ": r"\phi ", "ϵ": r"\epsilon ", "µ": r"\mu "}

_NAMES = frozenset(command.strip(" \\") for command in _GREEK.values())

TEXT_COMMANDS = (
    r"text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|mathsf|mathtt|operatorname\*?|emph"
)
_FONT_COMMANDS = r"mathbf|boldsymbol|bm|mathit|mathnormal|pmb|underline|displaystyle|textstyle"
_TEXT = rf"\\(?:{TEXT_COMMANDS})\s*\{{\s*([A-Za-z]+)\s*\}}"
_REWRITES = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (
            r"\\left\s*\\\{\s*\\begin\s*\{(array|aligned)\}(?:(?<=array\})\s*\{[^{}]*\})?"
            r"((?:(?!\\(?:begin|end)(?![A-Za-z])).)*)\\end\s*\{\1\}\s*\\right\s*\.",
            r"\\begin{cases}\2\\end{cases}",
        ),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*", ""),
        (
            r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|normalsize|small|large|Large)(?![A-Za-z])",
            " ",
        ),
        (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:hspace|vspace|phantom)\*?\{[^{}]*\}", " "),
        (r"(?<=\d)\{,\}(?=\d)(?:(?!\d{3}(?!\d))|(?<=(?<!\d)0\{,\}))", "."),  # 3{,}14  0{,}125
        (r"(\\mathbb\s*\{[A-Z]\}|\bR)\s*\\\s*\{([^{}\\]+)\}", r"\1\\setminus \\{\2\\}"),  # ℝ\{0}
        (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\;|\\:|\\!|\\ |~)\s*(?=\d{3}(?:\D|$))", ","),  # 1{,}234  1\,234
        (r"(?<![\w.,])\d{1,3}(['_])\d{3}(?:\1\d{3})+(?![\w'])", lambda m: m[0].replace(m[1], "")),  # 1_234_567
        (r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d/])", lambda m: m[1] + m[2].replace(" ", "")),
        (r"(?<!\\)\\(?:[,;:!> ]|(?:quad|qquad|thinspace|enspace|nobreakspace)(?![A-Za-z]))|~", " "),
        (r"\\[_#&]|\\\\(?=[%$])", lambda m: m[0][1]),
        (r"\\(?:textcolor|color)\s*\{[^{}]*\}", ""),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\not\s*=", r"\\ne "),
        (r"\\textdollar(?![A-Za-z])", r"\\$"),
        (r"\\mathrm\s*\{d\}\s*", "d"),
        (rf"(?<=\d)\s*\\frac\s*\{{\s*{_TEXT}\s*\}}\s*\{{\s*{_TEXT}\s*\}}", r" \1/\2"),  # 5 \frac{\text{m}}{\text{s}}
        (r"(?<![\w)\]}])\*\*([^*\s][^*]*)\*\*(?!\w)", r"\1"),
        (r"_\s*\{\s*(?:\\text\s*\{)?\s*base\s*\}?\s*(\w+)\s*\}", r"_{\1}"),
        (r"^\s*(\w+)\s+\(?\s*(?:in\s+)?base[ -]?(\w+)\s*\)?\s*$", r"\1_{\2}"),
        (r"\b(?:Decimal|Fraction|mpf)\('([^']*)'\)", r"\1"),
        (r"\bset\(\)|\b(?:S\.)?EmptySet\b", r"\\emptyset "),
        (r"\b(?:S\.)?Reals\b", r"\\mathbb{R}"),
        (r"\bInterval\.(open|Lopen|Ropen)\b", r"Interval\1"),
        (r"'(\w+)'(?=\s*:)", r"\1"),
        (r"\bUS\s*(?=\\?\$)", ""),
        (r"\bRs\b\.?", "₹"),
        (r"\b([A-Za-z]) (?:is|equals|is equal to) (?=\$?[-+]?[\d\\(√π])", r"\1 = "),
        (r"\b(sq|ft|in|hr|min|sec|lb|lbs|oz|mi|yd|cm|mm|km|kg)\.(?!\w)", r"\1"),
        (r"\b([a-z])\s+in\s+(?=[(\[{\\])", r"\1 \\in "),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\(?:lVert|rVert|Vert)(?![A-Za-z])", r"\\|"),
        (r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda m: r"\{" if "l" in m[0] else r"\}"),
        (r"\\(?:lbrack|rbrack)(?![A-Za-z])", lambda m: "[" if "l" in m[0] else "]"),
        (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\}|\{?\s*\\degree\s*\}?)|\\textdegree", r"\\degree "),
        (r"\\(?:ldots|cdots|dots|dotsc|dotsb)(?![A-Za-z])|\.{3,}", r"\\ldots "),
        (r"(?<![A-Za-z\\])(?:np|numpy)\.(?:float|u?int|longdouble)\d*\(([^()]*)\)", r"\1"),
        (r"(?<![A-Za-z\\])(?:math|np|numpy|sympy|sp|cmath)\.(?=[A-Za-z])", ""),
        (r"\(\s*([0-9A-Z]+)\s*\)\s*_", r"\1_"),  # (101)_2
    )
)
# These follow the removal of commands of text, of wrappers and of introductory words.
_LAST_REWRITES = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\\degree\s*\{?([CF])(?![A-Za-z])\}?", lambda m: " celsius" if m[1] == "C" else " fahrenheit"),
        (r"(?<=[\d}])\s*\(\s*([a-z]{2,}[^()]*)\)$", r" \1"),  # 5 (cm)
        (r"^(\d+)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?$", r"\1"),
        (r"(?<![A-Z\s])\s*\(\s*([kmn]\s*\\in(?![A-Za-z])[^()]*)\)$", r", \1"),  # kπ (k ∈ ℤ)
        (r"^\[\s*(-?\d+\.\d*(?:\s+-?\d+\.\d*)+)\s*\]$", lambda m: f"array([{', '.join(m[1].split())}])"),  # numpy
    )
)
_WRAPPERS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(.*)\$\$", r"\$([^$]*)\$", r"\\\((.*)\\\)", r"\\\[(.*)\\\]", r"\*\*(.*)\*\*", r"\*([^*]+)\*",
        r"__(.*)__", r"_([^_]+)_", r"`+([^`]*)`+", r"\"([^\"]*)\"", r"'([^']*)'", r"\\(?:boxed|fbox)\s*\{(.*)\}",
        r"\{([^,;|:]+|\s*\d(?:[^,;|:]|:(?!(?<!\s:)\s))*)\}",  # not the dictionary {1: 2}
    )
)  # fmt: skip
_ESCAPED_TWICE = re.compile(r"\\\\[A-Za-z]{2}")  # \\frac as in source code, or the end of a line before a word
_ESCAPED_ONCE = re.compile(r"(?<!\\)\\(?:\\\\)*(?!\\)")  # an odd number of backslashes
_BOUNDS = tuple(
    (re.compile(rf"\b{words}\b\s*", re.IGNORECASE), symbol)
    for words, symbol in (
        (r"(?:is )?(?:(?:less|fewer|smaller) than or equal to|at most|not? (?:more|greater) than)", r"\\le "),
        (r"(?:is )?(?:(?:more|greater|larger) than or equal to|at least|not? (?:less|fewer) than)", r"\\ge "),
        (r"(?:is )?not equal to", r"\\ne "),
        (r"(?:is )?(?:less|fewer|smaller) than", "<"),
        (r"(?:is )?(?:more|greater|larger|bigger) than", ">"),
        (r"(?:is )?(?:approximately|about|roughly|around)(?= *[-\d.$\\])", r"\\approx "),
    )
)  # fmt: skip
# "The value is 7": introductory words up to a verb. They are removed unless one of them negates, bounds or changes it.
_LEAD = re.compile(
    r"((?:[A-Za-z']+[ ,]+)*?)(?:(?:is|are|equals|be)(?:\s*[:=]\s*|\s+)"
    r"|(?:answer|result|solution|option|choice|value)(?:\s*[:=]\s*|\s+(?!of |for |is )))(?=\S)",
    re.IGNORECASE,
)
_CONNECTIVE = re.compile(
    r"(?:(?:thus|hence|therefore|so|then|finally|exactly|only|just|we (?:get|have|find|obtain))\b[,:]?\s+)+(?=\S)",
    re.IGNORECASE,
)
_TAIL = re.compile(r"\s+is (?:the (?:final |correct )?(?:answer|option|choice)|correct)$", re.IGNORECASE)
_NO_SOLUTION = re.compile(r"(?:there (?:is|are) )?no solutions?(?: exists?)?", re.IGNORECASE)
_ALL_REALS = re.compile(r"all (?:the )?reals?(?: numbers?)?", re.IGNORECASE)
_LABEL = re.compile(r"([A-Za-z']{3,}(?: [A-Za-z']+)*)\s*[:=]\s*(?==?[^=])")  # area = 5
_SHORT_NEUTRAL = frozenset("ans the so we get our has of in for sum its it and thus a".split())
_NEGATIONS = re.compile(
    r"\b(?:not?|never|none|nor|neither|cannot|\w+n't|except|without|unless|if|when|least|most|than|false|wrong|"
    r"incorrect|twice|half|(?:double|(?:square|cube|root|negative|opposite|reciprocal|inverse) of)"
    r"(?: the)? (?:answer|result|value|it))\b",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """Return the normalized text of an answer. Linear in its length, except for nested wrappers."""
    text = _unicode(text).strip()
    if _ESCAPED_TWICE.search(text) and not _ESCAPED_ONCE.search(text):
        text = text.replace("\\\\", "\\")
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    text = unwrapped(text, _FONT_COMMANDS)
    text = unwrapped(text, TEXT_COMMANDS, " ")
    previous = None
    while text != previous:
        previous = text
        text = _bare(text)
    text = re.sub(r"(?<=\d)\s*([AaPp])\.?\s?[Mm]\.?(?![A-Za-z])", lambda m: f" {m[1].lower()}m", text)
    if connective := _CONNECTIVE.match(text):
        text = text[connective.end() :]
    text = _TAIL.sub("", text)
    while (lead := _LEAD.match(text) or _LABEL.match(text)) and _is_neutral(lead[1]):
        text = text[lead.end() :]
    if r"\begin" not in text:
        text = re.sub(r"\s&\s", " and ", text)
    for pattern, symbol in _BOUNDS:
        text = pattern.sub(symbol, text)
    while text != previous:
        previous = text
        text = _bare(text)
    for pattern, to in _LAST_REWRITES:
        text = pattern.sub(to, text)
    text = re.sub(r"\s+", " ", text)
    if _ALL_REALS.fullmatch(text):
        return r"\mathbb{R}"
    return r"\emptyset" if _NO_SOLUTION.fullmatch(text) else text


def canonical(cleaned: str) -> str:
    """Return a common form of equivalent spellings of a text, for answers that the parser rejects.

    It has no optional spaces, and its words are in lower case.
    """
    text = re.sub(r"\{(\w)\}", r"\1", cleaned)
    words = re.sub(r"(?<![\\A-Za-z])[A-Za-z]{2,}", lambda m: m[0].lower(), text)
    for one, other in ((r"\leq", r"\le"), (r"\geq", r"\ge"), (r"\neq", r"\ne"), ("<=", r"\le"), (">=", r"\ge")):
        words = words.replace(one, other)
    return unspaced(words)


def unspaced(text: str) -> str:
    """Return the text without its spaces, except those between two letters or digits."""
    return re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", text)


def _unicode(text: str) -> str:
    text = re.sub("[\u2061\u2062]", " ", text)  # the invisible marks of a function and of a product
    text = "".join(" " if unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc") else c for c in text)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cs"))
    text = re.sub(r"(?<![\w)\]}])([²³⁴⁵⁶⁷⁸⁹])√", lambda m: rf"\sqrt[{m[1].translate(_SUPERSCRIPTS)}] ", text)  # ³√8
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢₓ]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    made = []
    for char in text:
        if char in _SYMBOLS or char in _GREEK:
            made.append(_SYMBOLS.get(char) or _GREEK[char])
        elif unicodedata.decomposition(char).startswith("<fraction>"):
            over, _, under = unicodedata.normalize("NFKC", char).partition("⁄")
            made.append(rf"\frac{{{over}}}{{{under or 1}}}")
        elif unicodedata.decomposition(char).startswith("<circle>") and len(text) > 1:
            made.append(char)  # ①③ are two options, not thirteen
        else:
            made.append("".join(_SYMBOLS.get(c) or _GREEK.get(c, c) for c in unicodedata.normalize("NFKC", char)))
    return "".join(made)


def unwrapped(text: str, commands: str, around: str = "") -> str:
    r"""Replace each \command{content} by its content, with `around` before and after it. Linear in the text's length.

    `commands` is a regular expression of names. Braces are matched; a command without its closing brace stays.
    """
    opened: list[re.Match[str] | None] = []  # one entry for each open brace: its command, or None
    removed: list[tuple[int, int]] = []
    for match in re.finditer(rf"(\\(?:{commands})\s*\{{)|\\.|[{{}}]", text, re.DOTALL):
        if match[1]:
            opened.append(match)
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened and (command := opened.pop()) is not None:
            removed += [command.span(), match.span()]
    kept, at = [], 0
    for start, end in sorted(removed):
        kept.append(text[at:start])
        at = end
    return around.join([*kept, text[at:]])


def _bare(text: str) -> str:
    text = text.strip()
    for wrapper in _WRAPPERS:
        if (match := wrapper.fullmatch(text)) and _balanced(match[1]):
            text = match[1].strip()
    text = re.sub(r"\*\*$|^\*\*", "", text)
    if text.count("$") - text.count(r"\$") > 1:  # formulas in a sentence; a single dollar is a currency sign
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\](?!\d)", " ", text)
    text = re.sub(r"^(?:=(?!=)|\\(?:Rightarrow|implies|therefore)(?![A-Za-z])|[⇒∴])\s*", "", text.strip())
    if not text.endswith(r"\ldots"):
        text = re.sub(r"(?<!\\)[\s.,;:?]+$", "", text)
    return text


def _is_neutral(words: str) -> bool:
    return not _NEGATIONS.search(words) and all(
        len(word) == 1 or (len(word) > 3 and word not in _NAMES) or word.lower() in _SHORT_NEUTRAL
        for word in re.findall(r"[A-Za-z']+", words)
    )


def _balanced(text: str) -> bool:
    depth = 0
    for token in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0:
            return False
    return depth == 0
