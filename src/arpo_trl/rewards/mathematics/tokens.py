"""The tokens of an answer, and a cursor over them."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_DIGITS = 12_000
"""The maximum number of decimal digits of a computed number."""

_TOKEN = re.compile(
    r"""(?P<space>\s+|")
    | (?P<based>(?<![_^])(?:0[xX][0-9A-Fa-f]+|0b[01]+)(?![0-9A-Za-z])
        | (?<![_^])(?:[0-9][0-9A-F]*|[A-F]+[0-9][0-9A-F]*|[A-F]{2,}(?=\s*_\s*\{?\s*16))\s*_\s*
          (?:[0-9]+|\{\s*\(?\s*(?:[0-9]+|[a-z]+)\s*\)?\s*\}))
    | (?P<number>(?:\d+\.?\d*|\.\d+))
    | (?P<command>\\[A-Za-z]+|\\\\(?:\s*\[[^\]]*\])?|\\[{}|%$])
    | (?P<word>[A-Za-z]+)
    | (?P<foreign>[或和十百万亿](?!分)|千(?![克米瓦焦卡帕伏赫])  # words of Chinese that change the meaning
        | (?:(?![或和])[\u3040-\u30ff\u3400-\u9fff])+ | [^\W\d_\u3040-\u30ff\u3400-\u9fff]+)
    | (?P<op>\*\*|<=|>=|!=|==|<>|!!|[-+*/^_=<>!'(){}\[\]|,;:&%$£€¥₹₽₩¢])""",
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?")
_EXPONENT = re.compile(r"[eE]([+-]?\d+)(?![\d.])")


class Unreadable(Exception):
    """The grammar does not accept the text, or a number in it is too large."""


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    spaced: bool  # space before it


def tokenize(text: str, scientific: bool = True) -> list[Token]:
    """Return the tokens of a text. `scientific`: whether 2e-1 is one number.

    Raises:
        Unreadable: A character starts no token, or an exponent is too large to compute.
    """
    tokens: list[Token] = []
    at, depth, spaced = 0, 0, False
    while at < len(text):
        match = _THOUSANDS.match(text, at) if depth == 0 else None
        kind = "number"
        if match is None:
            match = _TOKEN.match(text, at)
            if match is None:
                raise Unreadable(f"the character {text[at]!r}")
            kind = str(match.lastgroup)
        found, at = match[0], match.end()
        if kind == "space":
            spaced = True
            continue
        if kind == "number":
            found = found.replace(",", "")
            exponent = _EXPONENT.match(text, at) if scientific else None
            if exponent is not None:
                if abs(int(exponent[1][:9])) > MAX_DIGITS:
                    raise Unreadable("too large an exponent")
                found, at = found + exponent[0], exponent.end()
        depth += {"(": 1, "[": 1, r"\{": 1, ")": -1, "]": -1, r"\}": -1}.get(found, 0)
        tokens.append(Token(kind, found, spaced))
        spaced = False
    return tokens


class Cursor:
    """A position in a list of tokens."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.pos = 0

    def peek(self, ahead: int = 0) -> str:
        at = self.pos + ahead
        return self.tokens[at].text if at < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        at = self.pos + ahead
        return self.tokens[at].kind if at < len(self.tokens) else ""

    def spaced(self, ahead: int = 0) -> bool:
        at = self.pos + ahead
        return at < len(self.tokens) and self.tokens[at].spaced

    def next(self) -> Token:
        if self.pos >= len(self.tokens):
            raise Unreadable("the end")
        self.pos += 1
        return self.tokens[self.pos - 1]

    def take(self, *texts: str) -> bool:
        if self.peek() in texts and self.peek():
            self.pos += 1
            return True
        return False

    def expect(self, *texts: str) -> None:
        if not self.take(*texts):
            raise Unreadable(f"{self.peek()!r} instead of {texts}")

    def split(self, first: int) -> None:
        """Split the next token in two after its first `first` characters."""
        token = self.tokens[self.pos]
        self.tokens[self.pos : self.pos + 1] = [
            Token(token.kind, token.text[:first], token.spaced),
            Token(token.kind, token.text[first:], False),
        ]

    def closing(self, opened: str, closed: str) -> int:
        """Return the position of the bracket that closes the one just read."""
        depth = 1
        for at in range(self.pos, len(self.tokens)):
            depth += {opened: 1, closed: -1}.get(self.tokens[at].text, 0)
            if depth == 0:
                return at
        raise Unreadable("a bracket that does not close")

    def raw_group(self) -> str:
        """Read a braced group or a single token and return its text."""
        if self.take("{"):
            end = self.closing("{", "}")
            text = "".join(token.text for token in self.tokens[self.pos : end])
            self.pos = end + 1
            return text
        return self.next().text
