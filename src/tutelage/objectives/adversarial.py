"""Adversarial rewards: a discriminator tells an expert's texts from the policy's, and its log-odds pay.

A text here is a row of features (of the attribute that is to be learned) and its length. Where a feature
is missing, so is the reward: NaN, never zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from tutelage.errors import InputError, RecipeError, StoreError

__all__ = ["Discriminator", "DiscriminatorSettings", "Fit", "LengthFree", "airl_reward", "gail_reward"]

_FORMAT = "tutelage-discriminator-1"


def airl_reward(logit_N: torch.Tensor, *, clip: float) -> torch.Tensor:
    """The logit of D, which is f = log D - log(1 - D), within +-clip.

    At the optimal D it is log(p_expert / p_policy), so its mean under the policy is -KL(policy || expert):
    zero once the policy has arrived, and negative wherever the policy says what the expert does not.

    Source: Fu et al. 2018, AIRL (arXiv 1710.11248), the policy's reward in algorithm 1.
    """
    return logit_N.clamp(-clip, clip)


def gail_reward(logit_N: torch.Tensor, *, clip: float) -> torch.Tensor:
    """-log(1 - D), at most clip: never negative, so what the expert never says is unpaid, not punished.

    Source: Ho & Ermon 2016, GAIL (arXiv 1606.03476), algorithm 1, with the sign for a reward.
    """
    return (-F.logsigmoid(-logit_N)).clamp_max(clip)


@dataclasses.dataclass(frozen=True)
class DiscriminatorSettings:
    """How the discriminator learns.

    Args:
        hidden: Width of one tanh layer; 0 is logistic regression.
        learning_rate: Of Adam.
        steps: Most steps an update takes.
        rows: Of each class in a step, drawn with replacement; 0 takes all of them.
        smoothing: Both labels lie this far within 0 and 1. On one side only, the reward of a policy that
            has reached the expert would not be zero.
        noise: Deviation of noise added in training, in deviations of each feature.
        low: Accuracy below which the discriminator is reported as knowing too little.
        high: Accuracy from which on it does not train. 1 trains always.
        replay: Rows of past policies that are kept.
        replay_share: Share of the policy's rows of a step that is drawn from them; 0 uses none.
        penalty: Weight of half the squared weights.
        clip: Bound on the reward.
        reward: `airl` or `gail`.
        seed: Of everything that is drawn.
    """

    hidden: int = 0
    learning_rate: float = 0.05
    steps: int = 100
    rows: int = 64
    smoothing: float = 0.1
    noise: float = 0.1
    low: float = 0.6
    high: float = 0.8
    replay: int = 2048
    replay_share: float = 0.5
    penalty: float = 1e-3
    clip: float = 5.0
    reward: str = "airl"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not learn.

        Raises:
            RecipeError: A number is outside its range.
        """
        ranges = {
            "hidden": (0, math.inf), "learning_rate": (1e-12, math.inf), "steps": (1, math.inf), "rows": (0, math.inf),
            "smoothing": (0, 0.499), "noise": (0, math.inf), "low": (0.5, self.high), "high": (0.5, 1),
            "replay": (0, math.inf), "replay_share": (0, 0.999), "penalty": (0, math.inf), "clip": (1e-12, math.inf),
        }  # fmt: skip
        for key, (least, most) in ranges.items():
            if not least <= getattr(self, key) <= most:
                raise RecipeError(
                    f"{key} is {getattr(self, key)}", expected=f"from {least} to {most}", fix=f"change {key}"
                )
        if self.reward not in ("airl", "gail"):
            raise RecipeError(f"reward is {self.reward!r}", expected="airl or gail", fix="take airl")


@dataclasses.dataclass(frozen=True)
class Fit:
    """What an update did.

    `before` and `after` are balanced accuracies on the rows that came in: the first on rows not yet seen,
    the second on rows it may have just learned from. `state` says where `before` lies: `blind` below the
    band, `good` within, `saturated` above (then it did not train). `skipped` rows had a missing feature.
    """

    before: float
    after: float
    steps: int
    state: str
    skipped: int


class LengthFree:
    """Takes out of each feature what length explains of it, linearly in the length and in its logarithm.

    The slopes come from differences within each class alone: an attribute of the expert stays, even where
    the expert also writes longer; only what goes with length among texts of one author goes.
    `Discriminator` learns them at its first update and then never again: were they to follow the data, the
    logits of the same text would shift from update to update, by its length.
    """

    def __init__(self, width: int) -> None:
        self.square_LL = torch.zeros(2, 2, dtype=torch.float64)
        self.cross_LF = torch.zeros(2, width, dtype=torch.float64)

    def learn(self, features_NF: torch.Tensor, length_N: torch.Tensor) -> None:
        """Take in rows of one class."""
        x = self._terms(length_N)
        x, y = x - x.mean(0), features_NF.double() - features_NF.double().mean(0)
        self.square_LL += x.T @ x
        self.cross_LF += x.T @ y

    def take_out(self, features_NF: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
        """Features without what length explains; a constant is left to the discriminator's bias."""
        slope_LF = torch.linalg.pinv(self.square_LL, atol=1e-9, rtol=1e-9, hermitian=True) @ self.cross_LF
        free_NF: torch.Tensor = (features_NF.double() - self._terms(length_N) @ slope_LF).float()
        return free_NF

    @staticmethod
    def _terms(length_N: torch.Tensor) -> torch.Tensor:
        length = length_N.double()
        return torch.stack([length / 100.0, torch.log1p(length)], -1)


class Discriminator:
    """Logistic regression or a small network between an expert's features and the policy's.

    Objective: max over f of E_expert log s(f) + E_policy log s(-f), whose optimum is log(p_expert / p_policy).
    Difference: SPIN plays the same game with the policy's own log-ratio for f and needs no discriminator,
    but sees whole texts; here only the features count, so only the attribute is learned.
    Assumption: the features carry the attribute and little else. Where any of them gives the policy away,
    f saturates within a few updates and pays noise; hence smoothing, noise, replay, and no training
    above `high`.
    Source: Ho & Ermon 2016 (arXiv 1606.03476), algorithm 1; label smoothing after Salimans et al. 2016
    (arXiv 1606.03498), who smooth one side, and replay after Shrivastava et al. 2017 (arXiv 1612.07828).
    """

    def __init__(self, width: int, settings: DiscriminatorSettings | None = None) -> None:
        self.width, self.settings = width, settings or DiscriminatorSettings()
        self._random = torch.Generator().manual_seed(self.settings.seed)
        self.length_free = LengthFree(width)
        self.middle_F, self.scale_F = torch.zeros(width), torch.zeros(width)
        hidden = self.settings.hidden
        shapes = [(width, hidden), (hidden,), (hidden, 1), (1,)] if hidden else [(width, 1), (1,)]
        self._weights = [self._start(*shape).requires_grad_(True) for shape in shapes]
        self._adam = torch.optim.Adam(self._weights, lr=self.settings.learning_rate)
        self.past_MF, self.past_length_M = torch.zeros(0, width), torch.zeros(0)

    def _start(self, *shape: int) -> torch.Tensor:
        # Only the network's matrices need noise: logistic regression has one optimum, from anywhere.
        if not self.settings.hidden or len(shape) == 1:
            return torch.zeros(*shape)
        return torch.randn(*shape, generator=self._random) / math.sqrt(shape[0])

    def update(
        self,
        expert_NF: torch.Tensor,
        expert_length_N: torch.Tensor,
        policy_MF: torch.Tensor,
        policy_length_M: torch.Tensor,
    ) -> Fit:
        """Look at new texts of both, and learn from them unless they are told apart well enough already.

        Args:
            expert_NF: Features of the expert's texts.
            expert_length_N: Their lengths.
            policy_MF: Features of what the policy wrote just now; it goes into the replay buffer.
            policy_length_M: Their lengths.

        Raises:
            InputError: Shapes do not fit, or a class has no whole row.
        """
        (expert, expert_length), (policy, policy_length) = (
            self._whole(x, n, who)
            for x, n, who in ((expert_NF, expert_length_N, "expert"), (policy_MF, policy_length_M, "policy"))
        )
        skipped = len(expert_NF) + len(policy_MF) - len(expert) - len(policy)
        first = not bool(self.scale_F.any())
        if first:
            self.length_free.learn(expert, expert_length)
            self.length_free.learn(policy, policy_length)
        free_expert, free_policy = (
            self.length_free.take_out(expert, expert_length),
            self.length_free.take_out(policy, policy_length),
        )
        if first:
            # Fixed once: were the scale to follow the data, the reward of the same text would drift.
            both = torch.cat([free_expert, free_policy])
            spread = both.std(0, correction=0)
            self.middle_F, self.scale_F = both.mean(0), torch.where(spread > 1e-6, spread, 1.0)
        past = self._standard(self.length_free.take_out(self.past_MF, self.past_length_M))
        good, new = self._standard(free_expert), self._standard(free_policy)
        before, steps = self._accuracy(good, new), 0
        always = self.settings.high >= 1.0
        while steps < self.settings.steps and (always or self._accuracy(good, new) < self.settings.high):
            self._step(good, new, past)
            steps += 1
        latest = slice(max(0, len(self.past_MF) + len(policy) - self.settings.replay), None)
        self.past_MF = torch.cat([self.past_MF, policy])[latest]
        self.past_length_M = torch.cat([self.past_length_M, policy_length])[latest]
        state = "blind" if before < self.settings.low else "good" if before < self.settings.high else "saturated"
        return Fit(before, self._accuracy(good, new), steps, state, skipped)

    def _whole(self, features_NF: torch.Tensor, length_N: torch.Tensor, who: str) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(features_NF, length_N)
        whole_N = torch.isfinite(features_NF).all(-1) & torch.isfinite(length_N)
        if not bool(whole_N.any()):
            raise InputError(
                f"{len(features_NF)} rows of the {who}, none of them whole",
                expected="at least one row without a missing feature",
                fix="see why the features could not be computed",
            )
        return features_NF[whole_N].float(), length_N[whole_N].float()

    def _check(self, features_NF: torch.Tensor, length_N: torch.Tensor) -> None:
        if features_NF.ndim != 2 or features_NF.shape[1] != self.width or length_N.shape != features_NF.shape[:1]:
            raise InputError(
                f"features of shape {tuple(features_NF.shape)} with lengths of shape {tuple(length_N.shape)}",
                expected=f"(rows, {self.width}) and (rows,)",
                fix="compute features with the extractor that the discriminator was made for",
            )

    def _step(self, good: torch.Tensor, new: torch.Tensor, past: torch.Tensor) -> None:
        s = self.settings
        share = s.replay_share if len(past) else 0.0
        if s.rows:
            old = round(share * s.rows)
            good, new, past = (self._some(x, n) for x, n in ((good, s.rows), (new, s.rows - old), (past, old)))
            share = old / s.rows
        # Each class weighs one, however many rows it has: the optimum is then the plain log-ratio.
        loss = self._cross_entropy(good, 1.0 - s.smoothing)
        for part, weight in ((new, 1.0 - share), (past, share)):
            if weight > 0.0:
                loss = loss + weight * self._cross_entropy(part, s.smoothing)
        for matrix in self._weights[0::2]:
            loss = loss + s.penalty / 2 * (matrix**2).sum()
        for weights, slope in zip(self._weights, torch.autograd.grad(loss, self._weights), strict=True):
            weights.grad = slope
        self._adam.step()

    def _some(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        return rows[torch.randint(len(rows), (count,), generator=self._random)] if count else rows[:0]

    def _cross_entropy(self, rows: torch.Tensor, target: float) -> torch.Tensor:
        noise = torch.randn(rows.shape, generator=self._random) if self.settings.noise else 0.0
        logit = self._forward(rows + self.settings.noise * noise)
        return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target))

    def _forward(self, rows: torch.Tensor) -> torch.Tensor:
        *inner, matrix, bias = self._weights
        if inner:
            rows = torch.tanh(rows @ inner[0] + inner[1])
        return (rows @ matrix + bias)[:, 0]

    def _standard(self, free: torch.Tensor) -> torch.Tensor:
        return (free - self.middle_F) / torch.where(self.scale_F > 0, self.scale_F, 1.0)

    def _accuracy(self, good: torch.Tensor, new: torch.Tensor) -> float:
        with torch.no_grad():
            sides = [(self._forward(good) > 0).float() + 0.5 * (self._forward(good) == 0).float()]
            sides.append((self._forward(new) < 0).float() + 0.5 * (self._forward(new) == 0).float())
        return sum(float(side.mean()) for side in sides) / 2

    def logits(self, features_NF: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
        """The log-odds f that the expert wrote each text; NaN where a feature is missing.

        Raises:
            InputError: Shapes do not fit.
        """
        self._check(features_NF, length_N)
        whole_N = torch.isfinite(features_NF).all(-1) & torch.isfinite(length_N)
        with torch.no_grad():
            found_N = self._forward(self._standard(self.length_free.take_out(features_NF.float(), length_N.float())))
        return torch.where(whole_N, found_N, math.nan)

    def reward(self, features_NF: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
        """What each text earns, by the chosen formula and clipped; NaN where a feature is missing."""
        pay = airl_reward if self.settings.reward == "airl" else gail_reward
        return pay(self.logits(features_NF, length_N), clip=self.settings.clip)

    def accuracy(
        self,
        expert_NF: torch.Tensor,
        expert_length_N: torch.Tensor,
        policy_MF: torch.Tensor,
        policy_length_M: torch.Tensor,
    ) -> float:
        """Share told rightly, each class weighing a half and a logit of zero counting half; nothing is learned.

        Raises:
            InputError: Shapes do not fit, or a class has no whole row.
        """
        sides = []
        for rows, lengths, who in ((expert_NF, expert_length_N, "expert"), (policy_MF, policy_length_M, "policy")):
            features, length = self._whole(rows, lengths, who)
            sides.append(self._standard(self.length_free.take_out(features, length)))
        return self._accuracy(*sides)

    def digest(self) -> str:
        """Hash of all that decides what a text earns."""
        free = (self.length_free.square_LL, self.length_free.cross_LF)
        told = hashlib.sha256(json.dumps(dataclasses.asdict(self.settings)).encode())
        for tensor in (*self._weights, self.middle_F, self.scale_F, *free):
            told.update(tensor.detach().numpy().tobytes())
        return told.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write everything that the next update depends on into one safetensors file.

        Raises:
            StoreError: It cannot be written.
        """
        tensors = {f"weight.{i}": w.detach() for i, w in enumerate(self._weights)}
        for i, kept in self._adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{key}": value for key, value in kept.items()}
        tensors |= {"square": self.length_free.square_LL, "cross": self.length_free.cross_LF}
        tensors |= {"middle": self.middle_F, "scale": self.scale_F, "random": self._random.get_state()}
        tensors |= {"past": self.past_MF, "past_length": self.past_length_M}
        settings = json.dumps(dataclasses.asdict(self.settings))
        header = {"format": _FORMAT, "width": str(self.width), "settings": settings}
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, path, header)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be written: {error}", fix="check the folder and the disk") from error

    @classmethod
    def load(cls, path: Path) -> Discriminator:
        """Read what `save` wrote; it goes on as if it had never stopped.

        Raises:
            StoreError: The file is missing, damaged, or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be read: {error}", fix="take another checkpoint") from error
        if header.get("format") != _FORMAT:
            raise StoreError(f"{path} is no discriminator", expected=_FORMAT, fix="take the file that `save` wrote")
        found = cls(int(header["width"]), DiscriminatorSettings(**json.loads(header["settings"])))
        with torch.no_grad():
            for i, weight in enumerate(found._weights):
                weight.copy_(tensors[f"weight.{i}"])
        adam = found._adam.state_dict()
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, number, field = key.split(".")
                adam["state"].setdefault(int(number), {})[field] = value
        found._adam.load_state_dict(adam)
        found.length_free.square_LL, found.length_free.cross_LF = tensors["square"], tensors["cross"]
        found.middle_F, found.scale_F = tensors["middle"], tensors["scale"]
        found.past_MF, found.past_length_M = tensors["past"], tensors["past_length"]
        found._random.set_state(tensors["random"])
        return found
