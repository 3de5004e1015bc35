"""`python -m tutelage.cli`, for machines where scripts are not on the path."""

from __future__ import annotations

from tutelage.cli import main

main()
