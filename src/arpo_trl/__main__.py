"""`python -m arpo_trl`, the same as the command `arpo-trl`."""

from arpo_trl.cli import main

if __name__ == "__main__":
    main()
