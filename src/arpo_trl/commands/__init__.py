"""The commands of `arpo-trl` that start, prepare or inspect a run: one file each, with `main(words) -> exit status`.

`arpo_trl.cli` imports such a file by its name when its command is called.
"""
