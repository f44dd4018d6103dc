"""``python -m pdserve``: the same as the ``pdserve`` command."""

from pdserve.cli.app import main

if __name__ == "__main__":
    main()
