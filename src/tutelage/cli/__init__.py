"""The command line: parse, build, call. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from tutelage.cli import constitution, critics, feedback, modules, redteam, training, values
from tutelage.cli.parameters import app
from tutelage.errors import InputError, Interrupted, TutelageError

__all__ = ["app", "constitution", "critics", "feedback", "main", "modules", "redteam", "training", "values"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        wrong = InputError(str(error), expected="words that `tutelage --help` and `tutelage COMMAND --help` list")
        _complain(wrong, as_json)
        code = wrong.exit_code
    except KeyboardInterrupt:
        again = "continue with: tutelage run --resume" if words[:1] == ["run"] else "give the same command again"
        stop = Interrupted("interrupted; what is finished is kept", fix=again)
        _complain(stop, as_json)
        code = stop.exit_code
    except TutelageError as error:
        _complain(error, as_json)
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _complain(error: TutelageError, as_json: bool) -> None:
    if as_json:
        body = {"error": type(error).__name__, "got": error.got, "expected": error.expected, "fix": error.fix}
        print(json.dumps(body, ensure_ascii=False), file=sys.stderr)
    else:
        print(f"tutelage: {error}", file=sys.stderr)
