"""`python -m tegula` is `tegula`."""

from __future__ import annotations

from tegula.cli import main

if __name__ == "__main__":
    main()
