"""`python -m tutelage.cli`, for machines where scripts are not on the path."""

from __future__ import annotations

from tutelage.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
