"""``python -m pdserve``: the same as the ``pdserve`` command."""

from pdserve.cli import main

if __name__ == "__main__":
    main()
