"""The command `python -m tools.traffic`."""

from .table import main

if __name__ == "__main__":
    main()
