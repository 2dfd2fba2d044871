"""Comparison of final answers to mathematical questions by their meaning.

    text.clean ─▶ reading.readings (parser.Parser) ─▶ equality.equal

The parser reads a whole answer or rejects it. This package imports sympy and no other part of arpo_trl. Answers are
untrusted text: nothing is evaluated as Python, and numbers with more than `tokens.MAX_DIGITS` digits are rejected. The
caller limits the time (`rewards.math_worker`).
"""
