r"""The grammar of answers: it parses a whole normalized text to a `Value`, or raises `Unreadable`.

One recursive-descent grammar covers LaTeX and the notation of printed Python objects:

    items     item , item and item               item      side = side < side …
    side      ratio ∪ ratio ∖ ratio              ratio     quantity : quantity
    quantity  sum unit                           sum       term + term − term
    term      unary · unary / unary, or side by side      power     atom ! ^ ° '

Only the sympy constructors named here evaluate expressions, and no number gets more than `MAX_DIGITS` digits. The
parser of math-verify (ANTLR) is not used, because it drops unknown parts (degrees, relations, trailing text) and reads
words as products.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import sympy
from sympy import Expr, Integer, Rational, S, Symbol

from arpo_trl.rewards.mathematics.closeness import digits_of_sum
from arpo_trl.rewards.mathematics.functions import (
    CONSTANTS,
    FUNCTIONS,
    INVERSES,
    OF_LETTERS,
    SPLIT_OFF,
    TAKES_SEVERAL,
    TRIGONOMETRIC,
    binomial,
    digits,
    double_factorial,
    expr,
    factorial,
    permutations,
    power,
    quotient,
    root,
)
from arpo_trl.rewards.mathematics.numerals import Numerals, based_numeral
from arpo_trl.rewards.mathematics.tokens import MAX_DIGITS, Token, Unreadable, tokenize
from arpo_trl.rewards.mathematics.units import Units
from arpo_trl.rewards.mathematics.values import (
    Builder,
    Group,
    NumberSet,
    Quantity,
    Ratio,
    Relation,
    Residue,
    SetOperation,
    Table,
    Text,
    Value,
)
from arpo_trl.rewards.mathematics.vocabulary import (
    APPLIED,
    CURRENCIES,
    CURRENCY_CODES,
    DECORATIONS,
    GREEK,
    JOINERS,
    MODS,
    NUMBER_SETS,
    PRODUCTS,
    RELATIONS,
    SCALES,
    SET_OPS,
    WORDS,
    unit_name,
)

ENVIRONMENTS = frozenset("cases matrix pmatrix bmatrix Bmatrix vmatrix smallmatrix array aligned".split())
MAX_DEPTH = 30
MAX_SIGNS = 3
"""The maximum number of independent ± in one item. Each one doubles the number of items."""

_LETTER = rf"(?:[A-Za-z]|\\(?:{'|'.join(GREEK)}))"
_ARGUMENT = rf"(?!(?P=name) )(?:{_LETTER}|(?:- )?[\d.]+)"
_FUNCTION_VALUE = re.compile(rf"(?P<name>{_LETTER}) \( (?:{_ARGUMENT} , )*{_ARGUMENT} \) =(?: |$)")
"""The start of an equation p(3) = 7, its tokens separated by spaces. The arguments are numbers and other letters."""

DEGREE = Symbol("°", positive=True)


def symbol_of(name: str) -> Symbol:
    return Symbol(name, real=True)


_CONSTRUCTORS = frozenset(
    "Eq Matrix array FiniteSet Interval Intervalopen IntervalLopen IntervalRopen Union Intersection Complement Tuple "
    "set frozenset list tuple".split()
)


class Parser(Numerals, Units):
    """Parses one text. Each method reads tokens from `pos` and sets `pos` to the token after them."""

    def __init__(self, text: str, scientific: bool = True, points: bool = True):
        super().__init__(tokenize(text, scientific))
        self.points = points
        self.depth = 0
        self.bars = 0  # the number of open |
        self.units = True  # whether a word after a number may be its unit
        self.currency = ""
        self.named = False  # the last atom was a word, which needs an explicit multiplication sign
        self.function = ""  # the name of the function of which the current equation gives a value
        self.bound: list[str] = []  # names of sum indices, where i is not the imaginary unit
        self.signs: tuple[int, ...] = ()
        self.signs_used = 0

    # Structure -----------------------------------------------------------------------------------------------------

    def whole(self) -> Value:
        value = self._items(())
        if self.pos != len(self.tokens):
            raise Unreadable(f"left over: {self.peek()!r}")
        return value

    def _items(self, closers: tuple[str, ...], opening: str = "", expand: bool = True) -> Value:
        """Read items up to a closing bracket and the bracket. Return a `Group`, or a single item without brackets."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        items: list[Value] = []
        joiner = ""
        closing = ""
        while True:
            if closers and self.peek() in closers:
                closing = self.next().text
                break
            if not self.peek():
                if closers:
                    raise Unreadable("a bracket that does not close")
                break
            items += self._signed_items() if expand else [self._item()]
            separated = False
            while self.peek() in (",", ";", "\\\\", *JOINERS) and self.peek():
                if separated and self.peek() == "," == self.peek(-1):
                    raise Unreadable("nothing between two commas")
                separated = True
                joiner = JOINERS.get(self.next().text, joiner)
            if opening == "[" == self.peek() and not separated:  # a French interval, [0, 1[
                closers = ("[",)
            if not separated and self.peek() and self.peek() not in closers:
                raise Unreadable(f"left over: {self.peek()!r}")
        self.depth -= 1
        if not closers and len(items) == 1:
            return items[0]
        if not closers and not items:
            raise Unreadable("nothing")
        if not closers:
            items = _named_once(items)
        return Group(opening, tuple(items), closing, joiner)

    def _signed_items(self) -> list[Value]:
        """Read one item. With ±, return one item for each combination of signs."""
        start, outer = self.pos, (self.signs, self.signs_used)
        tokens = list(self.tokens)
        self.signs, self.signs_used = (), 0
        items = [self._item()]
        if used := self.signs_used:
            end = self.pos
            tied = any(token.text == r"\mp" for token in self.tokens[start:end])
            if used > MAX_SIGNS and not tied:
                raise Unreadable("too many ±")
            items = []
            for signs in itertools.product((1, -1), repeat=1 if tied else used):
                self.tokens, self.pos = list(tokens), start
                self.signs, self.signs_used = (signs * used if tied else signs), 0
                items.append(self._item())
        self.signs, self.signs_used = outer
        return items

    def _sign(self, token: str) -> int:
        sign = self.signs[self.signs_used] if self.signs_used < len(self.signs) else 1
        self.signs_used += 1
        return -sign if token == r"\mp" else sign

    def _item(self) -> Value:
        outer, self.function = self.function, self._function_of_equation() or self.function
        sides: list[Value | None] = [None if self.peek() in RELATIONS else self._side()]
        ops: list[str] = []
        while self.peek() in RELATIONS and self.peek():
            ops.append(RELATIONS[self.next().text])
            sides.append(self._side())
        self.function = outer
        if not ops:
            assert sides[0] is not None
            return sides[0]
        return Relation(tuple(sides), tuple(ops))

    def _function_of_equation(self) -> str:
        """Return p if an equation p(3) = 7 starts here, otherwise "". The product x(x + 1) = 12 is none."""
        if self.peek(1) != "(":
            return ""
        match = _FUNCTION_VALUE.match(" ".join(token.text for token in self.tokens[self.pos :]))
        return match["name"].removeprefix("\\") if match else ""

    def _side(self) -> Value:
        left = self._ratio()
        while self.peek() in SET_OPS or (
            self.peek() in ("U", "-") and isinstance(left, Group | SetOperation | NumberSet)
        ):
            token = self.next().text
            op = SET_OPS.get(token, "∖" if token == "-" else "∪")
            left = SetOperation(op, left, self._ratio())
        is_operator = self.peek() not in ("(", r"\pmod")  # 13 \bmod 5 is 3; 13 \pmod 5 is one number congruent to it
        modulus = self._modulus()
        if modulus is not None:
            if not isinstance(left, Quantity):
                raise Unreadable("a modulus of no number")
            whole = left.value.is_Integer and modulus.is_Integer and modulus.is_positive
            return Residue(left.value % modulus if is_operator and whole else left.value, modulus)
        return left

    def _modulus(self) -> Expr | None:
        if self.peek() == "(" and self.peek(1) in MODS:
            self.pos += 2
            value = expr(self._sum())
            self.expect(")")
            return value
        if self.take(*MODS):
            return expr(self._argument() if self.peek() == "{" else self._term())
        return None

    def _ratio(self) -> Value:
        first = self._quantity()
        if self.peek() != ":":
            return first
        parts = [first]
        at = self.pos
        while self.take(":"):
            parts.append(self._quantity())
        if not all(isinstance(part, Quantity) for part in parts):
            raise Unreadable("a ratio of no numbers")
        texts = [token.text for token in self.tokens[at : self.pos] if token.text != ":"]
        clock = all(len(text) == 2 and text.isdecimal() and text < "60" for text in texts[: len(parts) - 1])
        return Ratio(
            tuple(part.value for part in parts if isinstance(part, Quantity)), getattr(parts[-1], "unit", ""), clock
        )

    def _quantity(self) -> Value:
        start, outer = self.pos, (self.digits, self.currency, self.units, self.signs_used)
        tokens = list(self.tokens)
        self.digits, self.currency = 0, ""
        value = self._sum()
        if self.take(r"\over"):
            value = quotient(expr(value), expr(self._sum()))
        elif self.take(r"\choose"):
            value = binomial(expr(value), expr(self._sum()))
        unit = ""
        if isinstance(value, Expr) and self.units and (read := self.unit_at(self.pos)) is not None:
            if value.free_symbols - {DEGREE}:  # in a formula, 2x + 3 m, the m is a variable
                self.tokens, self.pos, self.units, self.digits, self.signs_used = tokens, start, False, 0, outer[3]
                value = self._sum()
            else:
                unit, self.pos = read
        digits, currency = self.digits, self.currency
        self.digits, self.currency, self.units = max(outer[0], digits), outer[1], outer[2]
        if not isinstance(value, Expr):
            return value
        if value.has(DEGREE):
            value, unit = value.subs(DEGREE, 1), unit or "degree"
        return Quantity(value, unit or currency, digits)

    # Formulas ------------------------------------------------------------------------------------------------------

    def _sum(self) -> Any:
        """Return an `Expr`, or a value of another kind if there is nothing to add."""
        outer, self.digits = self.digits, 0
        left = self._term()
        terms: list[tuple[Expr, int]] = []
        while (op := self.peek()) in ("+", "-", r"\pm", r"\mp"):
            if isinstance(left, NumberSet | SetOperation):  # ℝ − {0}
                break
            self.pos += 1
            terms = terms or [(expr(left), self.digits)]
            self.digits = 0
            right = expr(self._term())
            right = right if op == "+" else -right if op == "-" else self._sign(op) * right
            terms.append((right, self.digits))
            left = expr(left) + right
        self.digits = max(outer, digits_of_sum(terms) if terms else self.digits)
        return left

    def _term(self) -> Any:
        left = self._unary()
        while True:
            named = self.named
            if self.take("*", r"\cdot", r"\times", r"\ast"):
                left = _times(expr(left), self._unary())
            elif self.take("/", r"\div"):
                if self.kind() == "word" and self.kind(1) != "word" and self.peek(1) not in ("^", "**", "_", "("):
                    self._enclose_word()
                left = quotient(expr(left), expr(self._unary()))
            elif self._is_times_x():
                self.pos += 1
                left = expr(left) * expr(self._unary())
            elif isinstance(left, Expr) and self.is_scale(self.pos):
                left = left * SCALES[self.next().text]
            elif isinstance(left, Expr) and self._starts_factor(left):
                right = self._powered()
                if named or self.named:
                    raise Unreadable("words side by side")
                left = _times(left, right)
            else:
                return left

    def _enclose_word(self) -> None:
        """Enclose the next word in brackets, because adjacent letters are one divisor: a/bc is a/(bc)."""
        word = self.tokens[self.pos]
        if not self.is_mathematical(word.text):
            self.tokens[self.pos : self.pos + 1] = [Token("op", "(", word.spaced), word, Token("op", ")", False)]

    def _is_times_x(self) -> bool:
        before = self.tokens[self.pos - 1].kind if self.pos else ""
        return self.peek() in ("x", "X") and before == "number" and self.kind(1) == "number"

    def _starts_factor(self, left: Expr) -> bool:
        text, kind = self.peek(), self.kind()
        if not text or text in JOINERS or text in MODS or text in RELATIONS or text in SET_OPS:
            return False
        if kind == "number":
            if self.tokens[self.pos - 1].kind == "number":
                raise Unreadable("two numbers side by side")
            return True
        if kind == "word" or kind == "foreign":
            constant = self.units and not (left.free_symbols - {DEGREE})
            if text == "U" and self.peek(1) in ("(", "["):
                return False
            return not (constant and self.unit_at(self.pos) is not None)
        if text == "(":
            return self.peek(1) not in MODS
        if text == "|":
            return self.bars == 0
        if text == "{":
            return True
        return kind == "command" and text not in _NOT_FACTORS

    def _unary(self) -> Any:
        if self.take("-"):
            return -expr(self._unary())
        if self.take("+"):
            return expr(self._unary())
        if self.peek() in (r"\pm", r"\mp"):
            return self._sign(self.next().text) * expr(self._unary())
        if self.peek() in CURRENCIES:
            self.currency = CURRENCIES[self.next().text]
            return self._unary()
        if self.peek() in CURRENCY_CODES and self.kind(1) == "number":
            self.currency = unit_name(self.next().text)
            return self._unary()
        return self._powered()

    def _powered(self) -> Any:
        base = self._atom(mixed=True)
        while True:
            if self.take("!"):
                base = factorial(expr(base))
            elif self.take("!!"):
                base = double_factorial(expr(base))
            elif self.take(r"\degree"):
                base = expr(base) * DEGREE
                if self.kind() == "number" and self.peek(1) == "'":  # 34° 37'
                    base += Rational(self.next().text) / 60 * DEGREE
                    self.pos += 1
            elif self.peek() in ("'", r"\prime") or (self.peek() == "^" and self._prime_ahead()):
                if not isinstance(base, Symbol):
                    raise Unreadable("a prime")
                base = self._applied(symbol_of(f"{base.name}{self._primes()}"))
            elif self.peek() in ("^", "**"):
                if isinstance(base, NumberSet):
                    raise Unreadable("a power of a set")
                exponent = self._exponent()
                if isinstance(base, Symbol) and base.name in APPLIED and exponent == -1 and self.peek() == "(":
                    self.named = True  # the inverse function, f^{-1}(3)
                    base = self._applied(symbol_of(f"{base.name}^-1"))
                    self.named = False
                    continue
                if isinstance(base, Symbol) and self.take("_"):  # x^2_1
                    base = symbol_of(f"{base.name}_{self.raw_group()}")
                base = power(expr(base), exponent)
            else:
                return base

    def _prime_ahead(self) -> bool:
        return self.peek(1) == r"\prime" or (self.peek(1) == "{" and self.peek(2) == r"\prime")

    def _primes(self) -> str:
        if self.take("^"):
            return "'" * self.raw_group().count(r"\prime")
        self.next()
        return "'"

    def _exponent(self) -> Expr:
        python = self.next().text == "**"
        if self.take("{"):
            value = expr(self._sum())
            self.expect("}")
        elif self.peek() in ("-", "+"):
            sign = -1 if self.next().text == "-" else 1
            value = sign * expr(self._powered() if python else self._atom())
        elif python:
            return expr(self._powered())  # right-associative
        else:
            if self.kind() == "word" and len(self.peek()) > 1 and not self.is_mathematical(self.peek()):
                self.split(1)
            value = expr(self._atom())
        if self.peek() in ("^", "**"):
            value = power(value, self._exponent())
        return value

    def _argument(self) -> Any:
        """Read a braced group or, by TeX's rule, a single digit, letter or command."""
        if self.peek() == "{":
            return self._braces()
        if self.kind() in ("number", "word") and len(self.peek()) > 1:
            self.split(1)
        return self._atom()

    def _atom(self, mixed: bool = False) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        self.named = False
        kind, text = self.kind(), self.peek()
        if kind == "number":
            value: Any = self.number(mixed)
        elif kind == "based":
            value = based_numeral(self.next().text)
        elif kind == "word":
            value = self._word()
        elif kind == "command":
            value = self._command()
        elif text in ("(", "[", "]"):
            value = self._brackets()
        elif text == "{":
            value = self._braces()
        elif text == "|":
            value = self._bars()
        elif text in ("_", "^"):
            value = self._prescript()
        else:
            raise Unreadable(f"{text!r} where a value should be")
        self.depth -= 1
        return value

    def _word(self) -> Any:
        word = self.peek()
        if word in self.bound:
            self.pos += 1
            return symbol_of(word)
        if len(word) > 1:
            self._divide_word(word)
            word = self.peek()
        token = self.next()
        name = token.text
        if name in ("C", "P", "A", "binom") and (ways := self._counted(name)) is not None:
            return ways
        if self.peek() == "_" and name not in ("log",):
            self.pos += 1
            return self._applied(symbol_of(f"{name}_{self.raw_group()}"))
        if name in FUNCTIONS and (name != "re" or self.peek() == "("):
            return self._function(name)
        if name in _CONSTRUCTORS:
            return self._constructor(name)
        if name in self.constants:
            return self.constants[name]
        if name in GREEK or len(name) == 1:
            return self._applied(symbol_of(name))
        if name in ("True", "False", "None", "nan") or name in WORDS:
            raise Unreadable(f"the word {name!r}")
        if len(name) != 2 or name[0] != "d":  # dx is one symbol
            self.named = True
        return self._applied(symbol_of(name))

    def _divide_word(self, word: str) -> None:
        """Split a run of letters that is not a name: xy is x·y, sinx is sin x, kpi is k·pi."""
        if word in ("re", "im") and self.peek(1) != "(":
            return self.split(1)
        if self.is_mathematical(word) or word in _CONSTRUCTORS:
            return None
        if len(word) == 2 and word[0] == "d" and word[1] in "xyztuvrsw":
            return
        if OF_LETTERS.fullmatch(word):
            return self.split(next((len(known) for known in SPLIT_OFF if word.startswith(known)), 1))
        for known in SPLIT_OFF:
            if word.startswith(known) and 0 < len(word) - len(known) <= 2:
                return self.split(len(known))
        for known in SPLIT_OFF:
            if word[1:].startswith(known) and len(word) - len(known) <= 3:
                return self.split(1)
        for known in SPLIT_OFF:
            if word.endswith(known) and 0 < len(word) - len(known) <= 2:
                return self.split(1)
        is_word = word in WORDS and (word not in PRODUCTS or self._in_prose())
        if len(word) <= 3 and not is_word and self.peek(1) != "(":
            self.split(1)

    def _in_prose(self) -> bool:
        """Whether the next word is between other words, numbers or values: 3 by 4, x if y. In ax + by it is not."""
        if self.kind(1) in ("word", "foreign", "number"):
            return True
        if self.pos == 0:
            return self.peek(1) == ""
        if not self.spaced() or self.peek(1) in ("^", "_"):
            return False
        whole_number = self.kind(-1) == "number" and not (  # and not the end of x^2 at, \frac12 at
            self.pos > 1 and (self.kind(-2) == "number" or self.peek(-2) in ("^", "_", "}", r"\sqrt"))
        )
        if whole_number or self.kind(-1) in ("word", "foreign"):
            return True
        between = self.kind(-1) == "number" or self.peek(-1) in _AFTER_VALUES
        return between and self.spaced(1) and self._value_ahead(1)

    def _value_ahead(self, ahead: int) -> bool:
        text = self.peek(ahead)
        return text in ("(", "{", "|") or (
            self.kind(ahead) == "command" and not any(text in names for names in (_NOT_FACTORS, RELATIONS, SET_OPS))
        )

    def _counted(self, name: str) -> Expr | None:
        """Read a number of combinations or permutations, C_5^2, A_5^2, C(5, 2); None if the text is not one."""
        start = self.pos
        ways = binomial if name in ("C", "binom") else permutations
        if self.peek() == "(" and name != "A" and not (name == "P" and self.points):
            self.pos += 1
            arguments = self._items((")",), "(", expand=False)
            values = [item.value for item in getattr(arguments, "items", ()) if isinstance(item, Quantity)]
            if len(values) == 2 and (values[0].is_Integer or name == "C"):
                return ways(*values)
        else:
            found = {}
            for _ in range(2):
                if (place := self.peek()) in ("_", "^"):
                    self.pos += 1
                    found[place] = self.raw_group()
            if len(found) == 2 and all(text.isdecimal() for text in found.values()):
                low, high = Integer(found["_"]), Integer(found["^"])
                if low >= high:
                    return ways(low, high)
        self.pos = start
        return None

    def _applied(self, symbol: Symbol) -> Any:
        """Return the symbol, or if arguments follow, the unknown function or the point with that name."""
        base = symbol.name.rstrip("'").partition("_")[0]
        if base in ("E", "P") and self.take("["):
            end = self.closing("[", "]")
            inside, self.pos = self.tokens[self.pos : end], end + 1
            return symbol_of(f"{symbol.name}({''.join(token.text for token in inside)})")
        if self.peek() != "(" or self.peek(1) in MODS:
            return symbol
        defined = symbol.name == self.function
        if len(base) == 1 and base.isupper() and self._has_comma() and not defined:
            return Relation((Quantity(symbol), self._brackets()), ("=",))
        if not (base in APPLIED or symbol.name.endswith("'") or self.named or defined):
            return symbol
        self.pos += 1
        end = self.closing("(", ")")
        inside = self.tokens[self.pos : end]
        raw = "".join(token.text for token in inside)
        plain = not any(token.text in RELATIONS or token.text == "|" for token in inside)
        if plain:
            arguments = self._items((")",), "(", expand=False)
            values = [
                item.value for item in getattr(arguments, "items", ()) if isinstance(item, Quantity) and not item.unit
            ]
            if len(values) == len(getattr(arguments, "items", ())) and values:
                return sympy.Function(symbol.name, real=True)(*values)
        self.pos = end + 1
        return symbol_of(f"{symbol.name}({raw})")

    def _has_comma(self) -> bool:
        start, self.pos = self.pos, self.pos + 1
        inside = self.tokens[self.pos : self.closing("(", ")")]
        self.pos = start
        return any(token.text == "," for token in inside)

    def _function(self, name: str) -> Expr:
        function = FUNCTIONS[name]
        exponent: Expr | None = None
        base: Expr | None = None
        for _ in range(2):
            if self.peek() == "^":
                self.pos += 1
                if self.take("{"):
                    exponent = expr(self._sum())
                    self.expect("}")
                else:
                    exponent = expr(self._unary()) if self.peek() == "-" else expr(self._argument())
            elif name == "log" and self.kind() == "number" and self.peek(1) == "(" and not self.spaced():  # log2(8)
                base = Rational(self.next().text)
            elif self.peek() == "_" and name == "log":
                self.pos += 1
                base = expr(self._argument() if self.peek() == "{" else self._atom())
        if exponent == -1 and name in INVERSES:
            function, exponent = INVERSES[name], None
        if self.peek() in ("(", r"\{"):
            closer = {"(": ")", r"\{": r"\}"}[self.next().text]
            group = self._items((closer,), "(", expand=False)
            arguments = [_formula(item) for item in getattr(group, "items", ())]
        elif self.peek() == "{":
            arguments = [expr(self._braces())]
        else:
            arguments = [self._loose_argument()]
        if len(arguments) > 1 and name not in TAKES_SEVERAL:
            raise Unreadable(f"{len(arguments)} arguments of {name}")
        if name in TRIGONOMETRIC:
            arguments = [argument.subs(DEGREE, S.Pi / 180) for argument in arguments]
        if base is not None:
            arguments.append(base)
        if name in ("gcd", "lcm", "GCD", "LCM"):
            value = arguments[0]
            for argument in arguments[1:]:
                value = function(value, argument)
        else:
            value = function(*arguments)
        return value if exponent is None else power(value, exponent)

    def _loose_argument(self) -> Expr:
        r"""Read the argument of a function without brackets, \sin 2x, up to the next function or operator."""
        if self.take("-"):
            return -self._loose_argument()
        value = expr(self._powered())
        while self._starts_factor(value) and self.peek() not in ("(", "|") and not self._function_ahead():
            value = value * expr(self._powered())
        return value

    def _function_ahead(self) -> bool:
        name = self.peek().removeprefix("\\")
        return name in FUNCTIONS or any(name.startswith(known) for known in SPLIT_OFF[:-1])

    def _constructor(self, name: str) -> Value:
        self.expect("(")
        group = self._items((")",), "(", expand=False)
        assert isinstance(group, Group)
        items = group.items
        if name == "Eq" and len(items) == 2:
            return Relation(items, ("=",))
        if name.startswith("Interval") and len(items) == 2:
            kind = name.removeprefix("Interval")
            return Group("(" if kind in ("open", "Lopen") else "[", items, ")" if kind in ("open", "Ropen") else "]")
        if name in ("Union", "Intersection", "Complement") and len(items) > 1:
            op = {"Union": "∪", "Intersection": "∩", "Complement": "∖"}[name]
            return functools.reduce(lambda left, right: SetOperation(op, left, right), items)
        if name == "FiniteSet":
            return Group("{", items, "}")
        if name == "Tuple":
            return group
        if name == "array" and len(items) == 1 and isinstance(items[0], Group):
            return Group("(", items[0].items, ")")
        if len(items) == 1:
            return items[0]
        raise Unreadable(name)

    def _brackets(self) -> Any:
        opening = self.next().text
        closers = {"(": (")", "]"), "[": ("]", ")"), "]": ("[", "]")}[opening]
        bars, self.bars = self.bars, 0
        group = self._items(closers, opening, expand=False)
        self.bars = bars
        assert isinstance(group, Group)
        if opening == "]" or group.closing == "[":  # French intervals
            if len(group.items) != 2:
                raise Unreadable("a bracket that opens nothing")
            group = Group(
                "(" if opening == "]" else opening, group.items, ")" if group.closing == "[" else group.closing
            )
        if len(group.items) == 1 and (group.opening, group.closing) == ("(", ")"):
            return self._single(group.items[0])
        return group

    def _single(self, item: Value) -> Any:
        """Return the content of brackets around a single value: its formula if it is one, otherwise the value."""
        if isinstance(item, Quantity) and item.unit in ("", "degree"):
            return item.value * DEGREE if item.unit else item.value
        return item

    def _braces(self) -> Any:
        self.expect("{")
        if self.take("}"):
            if self.peek() in ("_", "^"):  # {}_5C_2
                return self._prescript()
            return NumberSet(S.EmptySet)
        if self._is_builder():
            return self._set("{", "}")
        bars, self.bars = self.bars, 0
        units, self.units = self.units, False
        first = self._item()
        self.bars, self.units = bars, units
        if self.take("}"):
            return self._single(first)
        self.expect(",", ";")
        rest = self._items(("}",), "{")
        assert isinstance(rest, Group)
        return Group("{", (first, *rest.items), "}")

    def _prescript(self) -> Expr:
        self.pos += 1
        n = self.raw_group()
        name = self.next().text
        self.expect("_")
        k = self.raw_group()
        if name not in ("C", "P") or not (n.isdecimal() and k.isdecimal()):
            raise Unreadable("a subscript of nothing")
        return (binomial if name == "C" else permutations)(Integer(n), Integer(k))

    def _is_builder(self) -> bool:
        """Whether the plain braces just opened contain {element | condition} or a Python dictionary."""
        texts = [token.text for token in self.tokens[self.pos : self.closing("{", "}")]]
        return ("|" in texts and texts.count("|") % 2 == 1) or ":" in texts

    def _set(self, opening: str, closing: str) -> Value:
        r"""Read, after \{ or {, a set, {element | condition}, or a dictionary {name: value}."""
        end = self.closing(opening, closing)
        bars = [at for at in range(self.pos, end) if self.tokens[at].text == "|"]
        colons = [at for at in range(self.pos, end) if self.tokens[at].text == ":"]
        if len(bars) % 2 == 0 and not colons:
            group = self._items((closing,), "{")
            assert isinstance(group, Group)
            return Group("{", group.items, "}")
        if len(bars) % 2 == 0 and not any(token.text in RELATIONS for token in self.tokens[self.pos : end]):
            entries = self._items((closing,), "{")
            assert isinstance(entries, Group)
            return Group("", tuple(_entry(item) for item in entries.items), "", "and")
        bar = bars[0] if len(bars) % 2 else colons[0]
        tail = self.tokens[bar + 1 : end]
        element = self._part(self.tokens[self.pos : bar])
        self.pos = end + 1
        return Builder(element, self._part(tail))

    def _part(self, tokens: list[Token]) -> Value:
        """Parse a list of tokens as a separate whole text."""
        outer = (self.tokens, self.pos)
        self.tokens, self.pos = list(tokens), 0
        value = self.whole()
        self.tokens, self.pos = outer
        return value

    def _bars(self) -> Expr:
        self.expect("|")
        self.bars += 1
        value = expr(self._sum())
        self.bars -= 1
        self.expect("|")
        return sympy.Abs(value)

    def _command(self) -> Any:
        text = self.next().text
        name = text[1:]
        if text == r"\{":
            return self._set(r"\{", r"\}")
        if text == r"\|":
            value = sympy.Function("norm")(expr(self._sum()))
            self.expect(r"\|")
            return value
        if name == "frac":
            over = expr(self._argument())
            return quotient(over, expr(self._argument()))
        if name == "sqrt":
            return self._square_root()
        if name == "binom":
            n = expr(self._argument())
            return binomial(n, expr(self._argument()))
        if name in ("infty", "pi"):
            return CONSTANTS[name]
        if name in ("emptyset", "varnothing"):
            return NumberSet(S.EmptySet)
        if name in GREEK:
            if self.take("_"):
                return symbol_of(f"{name}_{self.raw_group()}")
            return self._applied(symbol_of(name))
        if name in FUNCTIONS:
            return self._function(name)
        if name in ("lfloor", "lceil"):
            value = expr(self._sum())
            self.expect(r"\rfloor" if name == "lfloor" else r"\rceil")
            return (sympy.floor if name == "lfloor" else sympy.ceiling)(value)
        if name == "langle":
            group = self._items((r"\rangle",), "(", expand=False)
            assert isinstance(group, Group)
            return Group("(", group.items, ")")
        if text in DECORATIONS:
            return self._decorated(name)
        if name in ("sum", "prod"):
            return self._series(sympy.Sum if name == "sum" else sympy.Product)
        if name == "int":
            return self._integral()
        if name == "lim":
            return self._limit()
        if name == "begin":
            return self._environment()
        raise Unreadable(f"the command {text}")

    def _square_root(self) -> Expr:
        degree = Integer(2)
        if self.take("["):
            degree = expr(self._sum())
            self.expect("]")
        return root(expr(self._braces() if self.peek() == "{" else self._atom()), degree)

    def _decorated(self, name: str) -> Any:
        if self.take("("):  # \det(A)
            end = self.closing("(", ")")
            inside, self.pos = "".join(token.text for token in self.tokens[self.pos : end]), end + 1
        else:
            inside = self.raw_group()
        if name == "mathbb" and inside in ("E", "P"):
            return self._applied(symbol_of(inside))
        if name == "mathbb" and inside in NUMBER_SETS and self.peek() not in ("_", "^", r"\times"):
            return NumberSet(NUMBER_SETS[inside])
        if name == "mathbb" and inside == "R" and self.peek() == "^" and self.peek(1) in ("+", "-"):
            self.pos += 2
            return NumberSet(
                sympy.Interval.open(0, sympy.oo) if self.peek(-1) == "+" else sympy.Interval.open(-sympy.oo, 0)
            )
        if name in ("mathbf", "boldsymbol", "bm"):
            full = inside
        else:
            full = f"{name}({inside})"
        if self.take("_"):
            full += f"_{self.raw_group()}"
        return symbol_of(full)

    # Calculus ------------------------------------------------------------------------------------------------------

    def _limits(self) -> tuple[Any, Any]:
        """Read the lower and the upper limit of a sum or an integral, in either order, as tokens."""
        below: list[Token] = []
        above: list[Token] = []
        for _ in range(2):
            op = self.next().text
            start = self.pos
            self.raw_group()
            inside = self.tokens[start : self.pos]
            if inside and inside[0].text == "{":
                inside = inside[1:-1]
            if op == "_":
                below = inside
            elif op == "^":
                above = inside
            else:
                raise Unreadable("limits")
        return below, above

    def _series(self, kind: Any) -> Expr:
        below, above = self._limits()
        if len(below) < 3 or below[0].kind != "word" or below[1].text != "=":
            raise Unreadable("the index of a sum")
        index = below[0].text
        low, high = _formula(self._part(below[2:])), _formula(self._part(above))
        self.bound.append(index)
        body = expr(self._term())
        self.bound.pop()
        variable = symbol_of(index)
        if low.is_Integer and high.is_Integer:
            if not 0 <= high - low <= 1000:
                raise Unreadable("too long a sum")
            terms = [body.subs(variable, k) for k in range(int(low), int(high) + 1)]
            if sum(map(digits, terms)) > 10 * MAX_DIGITS:
                raise Unreadable("too large a sum")
            return sympy.Add(*terms) if kind is sympy.Sum else sympy.Mul(*terms)
        counter = Symbol(index, integer=True)
        return kind(body.subs(variable, counter), (counter, low, high)).doit()

    def _integral(self) -> Expr:
        below, above = self._limits()
        low, high = _formula(self._part(below)), _formula(self._part(above))
        for at in range(self.pos, len(self.tokens)):
            token = self.tokens[at]
            if token.kind == "word" and len(token.text) > 1 and token.text[-2] == "d":
                break
        else:
            raise Unreadable("an integral over nothing")
        variable = symbol_of(token.text[-1])
        inside = self.tokens[self.pos : at]
        rest = [Token("word", token.text[:-2], token.spaced)] if token.text[:-2] else []
        if [part.text for part in inside].count("{") > [part.text for part in inside].count("}"):  # \frac{dx}{x}
            self.tokens[at : at + 1] = [*rest, Token("number", "1", True)]
            return sympy.Integral(expr(self._term()), (variable, low, high)).doit()
        inside += rest
        self.pos = at + 1
        body = _formula(self._part(inside)) if inside else S.One
        return sympy.Integral(body, (variable, low, high)).doit()

    def _limit(self) -> Expr:
        self.expect("_")
        self.expect("{")
        end = self.closing("{", "}")
        inside = self.tokens[self.pos : end]
        self.pos = end + 1
        if len(inside) < 3 or inside[0].kind != "word" or inside[1].text not in (r"\to", r"\rightarrow"):
            raise Unreadable("a limit")
        target = inside[2:]
        direction = "+-"
        if [token.text for token in target[-2:]] in (["^", "+"], ["^", "-"]):
            direction, target = target[-1].text, target[:-2]
        return sympy.limit(expr(self._term()), symbol_of(inside[0].text), _formula(self._part(target)), direction)

    def _environment(self) -> Value:
        name = self.raw_group()
        if name not in ENVIRONMENTS:
            raise Unreadable(f"the environment {name}")
        if name == "array":
            self.raw_group()
        rows: list[list[list[Token]]] = [[[]]]
        depth = 0
        while True:
            token = self.next()
            if token.text == r"\begin":
                raise Unreadable("an environment within another")
            if token.text == r"\end":
                self.raw_group()
                break
            depth += {"{": 1, "}": -1}.get(token.text, 0)
            if token.kind == "command" and token.text.startswith("\\\\") and depth == 0:
                rows.append([[]])
            elif token.text == "&" and depth == 0:
                rows[-1].append([])
            else:
                rows[-1][-1].append(token)
        filled = [row for row in rows if any(row)]
        if name in ("cases", "aligned"):
            filled = [_aligned(row) for row in filled]
        if name in ("cases", "aligned") and any(len(row) > 1 for row in filled):
            return Table(tuple(self._case(row) for row in filled), cases=True)
        table = tuple(tuple(self._part(cell) for cell in row) for row in filled)
        if name in ("cases", "aligned"):
            return Group("", tuple(row[0] for row in table), "", "and")
        if name == "vmatrix":
            return sympy.Matrix([[_formula(cell) for cell in row] for row in table]).det()
        return Table(table)

    def _case(self, row: list[list[Token]]) -> tuple[Value, ...]:
        value, *condition = row
        rest = [token for cell in condition for token in cell if token.text not in ("if", "for", "when")]
        while value and value[-1].text == ",":
            value = value[:-1]
        while rest and rest[-1].text in (",", ";"):
            rest = rest[:-1]
        words = "".join(token.text for token in rest)
        return self._part(value), Text(words) if words.isalpha() else self._part(rest)


_AFTER_VALUES = frozenset(r") ] } \} | ! \pi \infty".split() + [f"\\{name}" for name in GREEK])
_NOT_FACTORS = frozenset(
    r"\pm \mp \cdot \times \ast \div \} \rfloor \rceil \rangle \| \% \$ \over \choose \end \to \rightarrow "
    r"\Rightarrow \ldots \degree \prime \implies \iff \cap \cup \mid \vee \wedge \lor \land".split()
) | {"\\\\"}


def _aligned(row: list[list[Token]]) -> list[list[Token]]:
    """Join the cells of a row that are parts of one relation: x &= 1."""
    cells = row[:1]
    for cell in row[1:]:
        if (cell and cell[0].text in RELATIONS) or (cells[-1] and cells[-1][-1].text in RELATIONS):
            cells[-1] = cells[-1] + cell
        else:
            cells.append(cell)
    return cells


def _entry(item: Value) -> Value:
    """Return an entry of a dictionary, x: 2, as an equation."""
    if isinstance(item, Ratio) and len(item.parts) == 2 and item.parts[0].free_symbols:
        return Relation((Quantity(item.parts[0]), Quantity(item.parts[1])), ("=",))
    raise Unreadable("an entry of no dictionary")


def _times(left: Expr, right: Any) -> Any:
    """Return the product of two expressions, or of a number and a matrix."""
    if isinstance(right, Table) and not right.cases:
        return Table(tuple(tuple(Quantity(left * _formula(cell)) for cell in row) for row in right.rows))
    return left * expr(right)


def _formula(value: Any) -> Expr:
    if isinstance(value, Quantity) and value.unit in ("", "degree"):
        return value.value * DEGREE if value.unit else value.value
    return expr(value)


def _named_once(items: list[Value]) -> list[Value]:
    """Repeat the left side of a first equation for the items after it: (a, b) = (1, 2) or (2, 1)."""
    first = items[0]
    if not (isinstance(first, Relation) and first.ops in (("=",), ("≠",))) or any(
        isinstance(item, Relation) for item in items[1:]
    ):
        return items
    return [first, *(Relation((first.sides[0], item), first.ops) for item in items[1:])]
