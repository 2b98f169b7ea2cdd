"""`python -m segheads` is the command `segheads`."""

from segheads.cli import main

if __name__ == "__main__":
    main()
