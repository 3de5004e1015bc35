"""Who did it, when several worked together: exact Shapley values of a game on few players."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from tutelage.errors import InputError

__all__ = ["Game", "alone", "leave_one_out", "shapley"]


class Game:
    """What every subset of the players reaches, each subset evaluated once.

    Args:
        players: Their names, all different.
        value: What a subset reaches. It must answer the same whenever it is asked the same: fix its seed.
        most: How many players are allowed; exact values take 2^players evaluations.

    Raises:
        InputError: No players, too many, or two of one name.
    """

    def __init__(self, players: Sequence[str], value: Callable[[frozenset[str]], float], *, most: int = 10) -> None:
        if not 0 < len(players) <= most:
            raise InputError(
                f"{len(players)} players",
                expected=f"1 to {most}: exact values take 2^players evaluations",
                fix="put several into one group",
            )
        if len(set(players)) < len(players):
            raise InputError(f"players {', '.join(players)}", expected="different names", fix="rename one")
        self.players = tuple(players)
        self._value = value
        self._known: dict[frozenset[str], float] = {}

    @property
    def evaluations(self) -> int:
        """Subsets that were evaluated so far."""
        return len(self._known)

    def __call__(self, subset: Iterable[str]) -> float:
        """Value of a subset.

        Raises:
            InputError: It is not a finite number.
        """
        key = frozenset(subset)
        if key not in self._known:
            found = float(self._value(key))
            if not math.isfinite(found):
                raise InputError(
                    f"the value of {{{', '.join(sorted(key))}}} is {found}",
                    expected="a finite number for every subset",
                    fix="mend the value function; a part of the game cannot be left out",
                )
            self._known[key] = found
        return self._known[key]


def shapley(game: Game) -> dict[str, float]:
    """A player's mean contribution over all orders in which the players could come.

    Objective: phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)). The values sum
        to v(all) - v(none).
    Difference: leave-one-out asks only about the last to come; two players that can stand in for each
        other then both get nothing.
    Assumption: every subset makes sense by itself. A subset that nobody would ever use counts as much as
        the others.
    Source: Shapley 1953, A Value for n-Person Games.
    """
    n = len(game.players)
    orders = math.factorial(n)
    found = {}
    for player in game.players:
        others = [p for p in game.players if p != player]
        found[player] = math.fsum(
            math.factorial(size) * math.factorial(n - size - 1) / orders * (game({*some, player}) - game(some))
            for size in range(n)
            for some in itertools.combinations(others, size)
        )
    return found


def leave_one_out(game: Game) -> dict[str, float]:
    """What is lost when one player leaves all the others: v(all) - v(all but i)."""
    everyone = frozenset(game.players)
    return {p: game(everyone) - game(everyone - {p}) for p in game.players}


def alone(game: Game) -> dict[str, float]:
    """What a player brings by itself: v(i) - v(none)."""
    return {p: game({p}) - game(()) for p in game.players}
