"""Reward from demonstrations: a discriminator that learns, round by round, to tell them from the policy's replies.

It reads a reply alone, without its prompt: demonstrations answer other prompts than the round's, and by what a
prompt leaves in hidden states the two would be told apart whatever the policy says.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tutelage.config import Judge, data_file
from tutelage.engines.load import LanguageModel
from tutelage.errors import InputError
from tutelage.feedback.asking import Opinion
from tutelage.feedback.critic_data import Passage, read_passages
from tutelage.feedback.model_judge import Pair
from tutelage.objectives.adversarial import Discriminator, DiscriminatorSettings
from tutelage.records import Cost, Demonstration, Generation, Progress, Prompt, Verdict, content_hash
from tutelage.store.demonstrations import read_demonstrations
from tutelage.store.ledger import Unit

__all__ = ["ImitationJudge", "Lens", "demonstrations_for", "meet"]

_FEWEST = 8  # demonstrations; by fewer the rows themselves are learned, not what they share
_HELD_BACK = 5  # every so many demonstrations one is only measured on, where there are twice as many
_DIRECTIONS = 24  # that features are read along; not tuned
_RATE = 0.01  # of the discriminator: a tenth of a logit a step, so that it can stop within its band


def demonstrations_for(spec: Judge) -> list[Demonstration]:
    """What a discriminator is shown.

    Raises:
        InputError: The file is missing or broken, or shows too little.
    """
    found = read_demonstrations(data_file(spec.demonstrations, suffix="demonstrations/*.jsonl"))
    if len(found) < _FEWEST:
        raise InputError(
            f"{spec.demonstrations} holds {len(found)} demonstrations",
            expected=f"at least {_FEWEST} for judge '{spec.name}'",
            fix="write more of them",
        )
    return found


@dataclasses.dataclass
class Lens:
    """A few directions of many features, fixed once: along more, any few texts can be told apart.

    The principal axes of both classes together, each class weighing one and each feature first brought to unit
    deviation.

    Args:
        middle_F: What is subtracted from features.
        scale_F: What they are divided by.
        axis_FK: The directions, orthonormal.
    """

    middle_F: torch.Tensor
    scale_F: torch.Tensor
    axis_FK: torch.Tensor

    @classmethod
    def fit(cls, one_NF: torch.Tensor, other_MF: torch.Tensor, *, most: int = _DIRECTIONS) -> Lens:
        """From rows of both classes, at least one of each."""
        rows = torch.cat([one_NF, other_MF]).double()
        sides = (torch.full((len(x), 1), 0.5 / len(x), dtype=torch.float64) for x in (one_NF, other_MF))
        weight_N1 = torch.cat(list(sides))
        middle_F = (weight_N1 * rows).sum(0)
        spread_F = (weight_N1 * (rows - middle_F) ** 2).sum(0).sqrt()
        scale_F = torch.where(spread_F > 1e-9, spread_F, 1.0)
        _, size_K, axis_KF = torch.linalg.svd(weight_N1.sqrt() * (rows - middle_F) / scale_F, full_matrices=False)
        count = min(most, max(1, int((size_K > 1e-6 * size_K[0]).sum())))
        return cls(middle_F, scale_F, axis_KF[:count].T.contiguous())

    def look(self, rows_NF: torch.Tensor) -> torch.Tensor:
        """(N, K) float32 coordinates."""
        found_NK: torch.Tensor = ((rows_NF.double() - self.middle_F) / self.scale_F @ self.axis_FK).float()
        return found_NK


class ImitationJudge:
    """A discriminator as a judge: the log-odds that a demonstrator wrote the reply, and not the policy.

    It abstains before it has met replies of the policy, and while it cannot tell them from demonstrations.

    Args:
        spec: The judge of the recipe.
        lm: The model that learns; its start is read.
        off: Switches off what was learned.
        fingerprint: Of the start model.
        longest: Tokens of the policy's longest reply. Demonstrations are cut to as many: their end must not give
            them away.
        seed: Of what the discriminator draws.

    Raises:
        InputError: The demonstrations cannot be used.
    """

    # What a check of judges on pairs would have to say.
    unchecked = "not checked: a discriminator is only defined against the policy that it meets in training"

    def __init__(
        self,
        spec: Judge,
        lm: LanguageModel,
        off: Callable[[], AbstractContextManager[object]],
        *,
        fingerprint: str,
        longest: int,
        seed: int,
    ) -> None:
        self.name, self.spec = spec.name, spec
        self._lm, self._off = lm, off
        tokens = [lm.encode_reply(one.reply) for one in demonstrations_for(spec)]
        self._shown = [lm.decode(t[:longest]) for t in tokens]
        self._length_D = torch.tensor([float(min(len(t), longest)) for t in tokens])
        self._settings = DiscriminatorSettings(
            learning_rate=_RATE, low=spec.accuracy_low, high=spec.accuracy_high, replay=spec.replay, reward=spec.form,
            seed=seed,
        )  # fmt: skip
        self._made_of = content_hash([dataclasses.asdict(self._settings), self._shown, fingerprint])
        self._shown_DF: torch.Tensor | None = None
        self.version = ""
        self.clear()

    def clear(self) -> None:
        """Forget every policy it has met."""
        self._lens: Lens | None = None
        self._critic: Discriminator | None = None
        self._tells = math.nan
        self._met: dict[str, torch.Tensor] = {}
        self._renew()

    def _renew(self) -> None:
        """A version names all that decides what is said: it is another one after each round that taught something."""
        self.version = content_hash([self._made_of, self._critic.digest() if self._critic else ""])

    def meet(self, replies_PG: Sequence[Sequence[Generation]]) -> dict[str, float]:
        """Learn to tell a round's replies from the demonstrations, unless it can.

        Returns:
            `accuracy` on the replies before it learned from them and `accuracy_after`, each class weighing a half;
            `accuracy_heldout` before, on demonstrations that it never learns from (from the second round on, where
            there are ten demonstrations or more); `learned` 1 or 0, `steps`, `replay` rows kept.
        """
        replies = [reply for group in replies_PG for reply in group]
        shown_DF, new_NF = self._demonstrations(), self._read([reply.text for reply in replies])
        length_N = torch.tensor([float(len(reply.tokens)) for reply in replies])
        kept_D = torch.ones(len(shown_DF), dtype=torch.bool)
        if len(shown_DF) >= 2 * _HELD_BACK:
            kept_D[_HELD_BACK - 1 :: _HELD_BACK] = False
        figures = {}
        if self._lens is None or self._critic is None:
            self._lens = Lens.fit(shown_DF[kept_D], new_NF)
            self._critic = Discriminator(self._lens.axis_FK.shape[1], self._settings)
        elif not bool(kept_D.all()):
            held = (self._lens.look(shown_DF[~kept_D]), self._length_D[~kept_D])
            figures["accuracy_heldout"] = self._critic.accuracy(*held, self._lens.look(new_NF), length_N)
        seen_NK = self._lens.look(new_NF)
        fit = self._critic.update(self._lens.look(shown_DF[kept_D]), self._length_D[kept_D], seen_NK, length_N)
        self._tells = fit.after
        self._renew()
        self._met = {reply.id: row for reply, row in zip(replies, seen_NK, strict=True)}
        return figures | {
            "accuracy": fit.before,
            "accuracy_after": fit.after,
            "learned": float(fit.steps > 0),
            "steps": float(fit.steps),
            "replay": float(len(self._critic.past_MF)),
        }

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation: the reward of the chosen form, clipped."""
        started = time.perf_counter()
        flat = [reply for group in generations_PG for reply in group]
        why = self._silent()
        if self._lens is None or self._critic is None or why or not flat:
            return [
                [Verdict(self.name, self.version, g.id, p.hash, None, why) for g in group]
                for p, group in zip(prompts, generations_PG, strict=True)
            ]
        strange = [reply for reply in flat if reply.id not in self._met]
        rows = dict(self._met)
        if strange:
            looked = self._lens.look(self._read([reply.text for reply in strange]))
            rows |= {reply.id: row for reply, row in zip(strange, looked, strict=True)}
        seen_NK = torch.stack([rows[reply.id] for reply in flat])
        length_N = torch.tensor([float(len(reply.tokens)) for reply in flat])
        pay_N = self._critic.reward(seen_NK, length_N).tolist()
        logit_N = self._critic.logits(seen_NK, length_N).tolist()
        cost = Cost((time.perf_counter() - started) / len(flat))
        told = iter(zip(pay_N, logit_N, length_N.tolist(), strict=True))
        return [
            [self._verdict(p, g, cost, *next(told)) for g in group]
            for p, group in zip(prompts, generations_PG, strict=True)
        ]

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """No opinion on any pair: neither of its texts is the policy's."""
        return [Opinion(None, f"abstains: {self.unchecked.removeprefix('not checked: ')}") for _ in pairs]

    def _silent(self) -> str:
        if self._critic is None:
            return "abstains: it has met no reply of a policy in training yet"
        if not self._tells >= self.spec.accuracy_low:
            return (
                f"abstains: it tells {self._tells:.0%} of demonstrations and replies rightly, "
                f"below accuracy_low = {self.spec.accuracy_low:g}"
            )
        return ""

    def _verdict(
        self, prompt: Prompt, reply: Generation, cost: Cost, pay: float, logit: float, length: float
    ) -> Verdict:
        if not math.isfinite(pay):
            return Verdict(
                self.name, self.version, reply.id, prompt.hash, None, "abstains: the reply could not be read"
            )
        side = "the demonstrations" if logit > 0 else "the policy's replies"
        reason = f"closer to {side}: log-odds {logit:+.2f} that a demonstrator wrote it"
        # Rounded: the last bits depend on which texts are read together.
        evidence = {"logit": round(logit, 4), "tokens": int(length), "accuracy": round(self._tells, 4)}
        return Verdict(self.name, self.version, reply.id, prompt.hash, round(pay, 4), reason, evidence, cost)

    def _demonstrations(self) -> torch.Tensor:
        """Their features, read once: the start model does not change."""
        if self._shown_DF is None:
            self._shown_DF = self._read(self._shown)
        return self._shown_DF

    def _read(self, texts: Sequence[str]) -> torch.Tensor:
        with self._off():
            return torch.from_numpy(read_passages(self._lm, [Passage(text) for text in texts]))

    def save(self, folder: Path) -> None:
        """Write what the next round depends on beside a checkpoint's other files; nothing before the first."""
        if self._lens is None or self._critic is None:
            return
        self._critic.save(folder / f"discriminator-{self.name}.safetensors")
        tables = dataclasses.asdict(self._lens) | {"tells": torch.tensor(self._tells, dtype=torch.float64)}
        save_file(tables, str(folder / f"lens-{self.name}.safetensors"))

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote; a checkpoint without it is older than the first round.

        Raises:
            StoreError: The discriminator's file is damaged.
        """
        self.clear()
        file = folder / f"discriminator-{self.name}.safetensors"
        if not file.is_file():
            return
        tables = load_file(str(folder / f"lens-{self.name}.safetensors"))
        self._tells = float(tables.pop("tells"))
        self._lens, self._critic = Lens(**tables), Discriminator.load(file)
        self._renew()


def meet(
    judges: Sequence[object],
    replies_PG: Sequence[Sequence[Generation]],
    unit: Unit,
    number: int,
    progress: Progress,
) -> None:
    """Let each discriminator among a round's judges learn from its replies, before it judges them."""
    for one in judges:
        if not isinstance(one, ImitationJudge):
            continue
        progress.stage(f"{unit.name}: {one.name} learns", 1, "update")
        figures = one.meet(replies_PG)
        unit.metrics(number, "discriminator", {f"{key}_{one.name}": value for key, value in figures.items()})
        progress.advance()
