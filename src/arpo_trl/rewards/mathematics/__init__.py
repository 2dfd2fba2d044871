"""Final answers to mathematical questions: read whole, or not at all, and compared as what they mean.

    text.clean ─▶ reading.readings (parser.Parser) ─▶ equality.equal

Imports sympy, and nothing of the rest of this package. What is read is hostile text: nothing is evaluated as Python,
and what would grow beyond `tokens.MAX_DIGITS` is refused. Time is bounded by the caller (`rewards.math_worker`).
"""
