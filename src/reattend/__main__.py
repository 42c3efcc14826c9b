"""python -m reattend, as torchrun starts it."""

from reattend.cli import main

if __name__ == "__main__":
    main()
