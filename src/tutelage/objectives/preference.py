"""Learning from pairs of replies without a reward model, held to a reference model.

How a batch holds pairs and their labels: `tutelage.objectives.pairs`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch.nn import functional as F

from tutelage.engines.batch import Batch, Loss
from tutelage.errors import RecipeError, TrainingError
from tutelage.objectives.pairs import Pairs, check_option, expected, read, smoothed

__all__ = ["Aot", "Dpo", "ExoPair", "Ipo", "IpoPerToken", "RobustDpo", "Xpo"]


def _logistic(label_N: torch.Tensor, margin_N: torch.Tensor) -> torch.Tensor:
    return -expected(label_N, F.logsigmoid(margin_N), F.logsigmoid(-margin_N))


@dataclasses.dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation on pairs, each with a label between 0 and 1.

    Objective: L = - 1/N sum_i [ p_i log s(b d_i) + (1 - p_i) log s(-b d_i) ], with s the logistic
    function, d = [log pi(y1|x) - log pi_ref(y1|x)] - [log pi(y2|x) - log pi_ref(y2|x)] summed over
    tokens, and p the probability that y1 is the better reply. p = 1 is the paper's loss. With `mode`
    "improve" it is - 1/N sum_i log s(b (2 p_i - 1) d_i), and `smoothing` e first makes (1 - e) p + e (1 - p)
    of p. `sft` a adds a/N sum_i of the better reply's negative log-likelihood, a mean over its tokens.
    Difference: policy gradient needs rewards of the policy's own samples; this needs only pairs, from
    anywhere. "match" has its optimum at b d = log p/(1 - p), so the policy reproduces how the votes
    split; "improve" has none at a finite distance for any p but 1/2, where it has no gradient: the
    votes say only how hard to push.
    Assumption: preferences follow Bradley-Terry, and the reference has seen such replies. With p of 0
    or 1 the margin grows as long as one trains, and often both replies get less likely, the worse one
    faster; `smoothing` bounds the margin, `sft` holds the better reply.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; smoothing: Mitchell 2023, "A note on DPO
    with noisy preferences and relationship to IPO"; "improve": Furuta et al. 2024 (arXiv 2409.06691);
    `sft`: Pang et al. 2024 (arXiv 2404.19733), equation 1.
    """

    beta: float = 0.1
    mode: Literal["match", "improve"] = "match"
    smoothing: float = 0.0
    sft: float = 0.0
    name: str = "dpo"

    def __post_init__(self) -> None:
        if self.mode not in ("match", "improve"):
            raise RecipeError(f"mode of {self.name} is {self.mode!r}", expected='"match" or "improve"')
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)
        check_option(self.name, "smoothing", self.smoothing, least=0.0, most=0.5)
        check_option(self.name, "sft", self.sft, least=0.0, most=math.inf)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        pairs = read(batch)
        margin_N = _margin(pairs, self.beta)
        label_N = smoothed(pairs.label_N, self.smoothing)
        if self.mode == "match":
            loss_N = _logistic(label_N, margin_N)
        else:
            loss_N = -F.logsigmoid((2.0 * label_N - 1.0) * margin_N)
        if self.sft:
            loss_N = loss_N + self.sft * pairs.nll_N(pairs.label_N)
        return pairs.loss(loss_N, margin_N)


def _margin(pairs: Pairs, beta: float) -> torch.Tensor:
    return beta * (pairs.gain_B[0::2] - pairs.gain_B[1::2])


@dataclasses.dataclass(frozen=True)
class RobustDpo:
    """DPO on labels of which a known share is the wrong way round, unbiased.

    Objective: L = 1/N sum_i [ p_i R(h_i) + (1 - p_i) R(-h_i) ], h = b d as in DPO, with
    R(h) = [ (1 - e) l(h') - e l(-h') ] / (1 - 2 e), l(h) = - log s(h), h' = min(h, cap), and e the
    probability `flip` that a label is the wrong way round.
    Difference: DPO with `smoothing` e bounds the margin and so underfits clean labels; this is, on
    average over the flips, DPO on the clean labels: (1 - e) R(h) + e R(-h) = l(h) while |h| <= cap.
    Assumption: flips are independent of the replies, and `flip` is what it is said to be. R falls by
    e / (1 - 2 e) for each unit of h without end, so that a few sure pairs would pay for all others; beyond
    the cap R is flat, its least value is - e cap / (1 - 2 e) + l(cap), and a pair learns no more.
    Source: Chowdhury et al. 2024 (arXiv 2403.00409), section 3; the cap is ours.
    """

    beta: float = 0.1
    flip: float = 0.1
    cap: float = 10.0
    name: str = "robust-dpo"

    def __post_init__(self) -> None:
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)
        check_option(self.name, "flip", self.flip, least=0.0, most=0.49)
        check_option(self.name, "cap", self.cap, least=0.0, most=math.inf, open_=True)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        pairs = read(batch)
        margin_N = _margin(pairs, self.beta)
        loss_N = expected(pairs.label_N, self._unflipped(margin_N), self._unflipped(-margin_N))
        return pairs.loss(loss_N, margin_N)

    def _unflipped(self, margin_N: torch.Tensor) -> torch.Tensor:
        capped_N = margin_N.clamp_max(self.cap)
        kept_N, turned_N = -F.logsigmoid(capped_N), -F.logsigmoid(-capped_N)
        return ((1.0 - self.flip) * kept_N - self.flip * turned_N) / (1.0 - 2.0 * self.flip)


def _squared(label_N: torch.Tensor, gap_N: torch.Tensor, beta: float) -> torch.Tensor:
    target = 1.0 / (2.0 * beta)
    return expected(label_N, (gap_N - target) ** 2, (gap_N + target) ** 2)


@dataclasses.dataclass(frozen=True)
class Ipo:
    """Identity preference optimisation as the paper has it: log-ratios summed over tokens.

    Objective: L = 1/N sum_i [ p_i (d_i - 1/(2 b))^2 + (1 - p_i) (d_i + 1/(2 b))^2 ], d as in DPO.
    Difference: DPO has no optimum at a finite distance for p of 0 or 1; here it is d = (2 p - 1)/(2 b).
    `IpoPerToken` takes means over tokens in d, so that its target is a distance for each token.
    Assumption: replies are of similar length. The target does not know the length, so a long reply must
    move less at each of its tokens than a short one, and the squared loss of long replies, whose sums
    vary more, outweighs the others.
    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17.
    """

    beta: float = 0.1
    name: str = "ipo"

    def __post_init__(self) -> None:
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        pairs = read(batch)
        gap_N = pairs.gain_B[0::2] - pairs.gain_B[1::2]
        return pairs.loss(_squared(pairs.label_N, gap_N, self.beta), self.beta * gap_N)


@dataclasses.dataclass(frozen=True)
class IpoPerToken:
    """Identity preference optimisation on means over tokens, which TRL's trainer calls IPO.

    Objective: as `Ipo`, with d = gain(y1)/|y1| - gain(y2)/|y2|, gain the reply's log-ratio to the
    reference summed over its |y| tokens.
    Difference: `Ipo` sums over tokens. At the same beta this one drives replies of T tokens T times as
    far from the reference: the two want betas that differ by about the length of a reply.
    Assumption: a token is the unit in which closeness to the reference should be measured. A pair with
    a reply of no tokens has no mean and teaches nothing.
    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17, with the mean that TRL's code says its
    authors confirmed.
    """

    beta: float = 0.1
    name: str = "ipo-per-token"

    def __post_init__(self) -> None:
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        pairs = read(batch)
        mean_B = pairs.gain_B / pairs.length_B
        gap_N = (mean_B[0::2] - mean_B[1::2]) * pairs.whole_N
        return pairs.loss(_squared(pairs.label_N, gap_N, self.beta) * pairs.whole_N, self.beta * gap_N)


@dataclasses.dataclass(frozen=True)
class ExoPair:
    """Exact optimisation on pairs: the reverse divergence from the model's odds to the label's.

    Objective: L = 1/N sum_i KL(q_i || p'_i) over the two replies, with q = s(b d), d as in DPO, and
    p' = (1 - e) p + e (1 - p), e being `smoothing`.
    Difference: DPO is the forward divergence KL(p' || q), up to a constant; both have their optimum at
    q = p'. Far on the wrong side this one's gradient fades, q (1 - q) being small there, where DPO's is
    largest: it gives up a pair that it cannot turn.
    Assumption: e > 0, or the divergence from a hard label is infinite everywhere. The smaller e, the
    more a pair weighs.
    Source: Ji et al. 2024 (arXiv 2402.00856), equation 16.
    """

    beta: float = 0.1
    smoothing: float = 0.001
    name: str = "exo-pair"

    def __post_init__(self) -> None:
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)
        check_option(self.name, "smoothing", self.smoothing, least=0.0, most=0.5, open_=True)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        pairs = read(batch)
        margin_N = _margin(pairs, self.beta)
        label_N = smoothed(pairs.label_N, self.smoothing)
        first_N = F.logsigmoid(margin_N) - label_N.log()
        second_N = F.logsigmoid(-margin_N) - torch.log1p(-label_N)
        return pairs.loss(expected(torch.sigmoid(margin_N), first_N, second_N), margin_N)


@dataclasses.dataclass(frozen=True)
class Xpo:
    """Exploratory preference optimisation: DPO on fresh pairs, with a bonus for what the reference would not say.

    Objective: L = 1/N sum_i [ DPO_i + a log pi(y2_i|x) ], where y1 was drawn from the policy as it stands
    and y2 from the reference.
    Difference: DPO explores only by chance. The bonus takes mass off the reference's own samples (the loss
    falls as they get less likely), so the policy spreads to replies that its data do not cover yet.
    Assumption: the second row of each pair is a sample of the reference, whichever of the two won; with
    rows in another order the bonus unlearns good replies. `alpha` is small: the bonus has no floor.
    Source: Xie et al. 2024 (arXiv 2405.21046), algorithm 1.
    """

    beta: float = 0.1
    alpha: float = 1e-5
    name: str = "xpo"

    def __post_init__(self) -> None:
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)
        check_option(self.name, "alpha", self.alpha, least=0.0, most=math.inf)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        pairs = read(batch)
        margin_N = _margin(pairs, self.beta)
        return pairs.loss(_logistic(pairs.label_N, margin_N) + self.alpha * pairs.logp_B[1::2], margin_N)


@dataclasses.dataclass(frozen=True)
class Aot:
    """Alignment via optimal transport: the margins as a distribution, not pair by pair.

    Objective: L = - 1/N sum_i log s(b [u_(i) - v_(i)]), where u_(i) and v_(i) are the i-th smallest of
    log pi(better|x) - log pi(worse|x) under the policy and under the reference.
    Difference: DPO compares each pair's margin with its own reference margin; sorting both asks only that
    the policy's margins are larger quantile by quantile (stochastic dominance).
    Assumption: a step's pairs are a fair sample of all pairs, and labels say which is better and no more:
    p = 0.9 and p = 0.6 are the same, and p = 1/2 is left out. Sorting is over the whole step, so the step
    must fit into one part.
    Source: Melnyk et al. 2024 (arXiv 2406.05882), algorithm 1, the paired variant.
    """

    beta: float = 0.1
    name: str = "aot"

    def __post_init__(self) -> None:
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of the step, which must be one part.

        Raises:
            TrainingError: The step was cut into parts.
        """
        if len(batch.logp_BT) != batch.rows_in_step:
            raise TrainingError(
                f"{self.name} got {len(batch.logp_BT)} of a step's {batch.rows_in_step} rows",
                expected="the whole step in one part, since it sorts over pairs",
                fix="raise update.token_budget, or lower update.batch",
            )
        pairs = read(batch)
        side_N = torch.sign(pairs.label_N - 0.5)
        sided_N = side_N != 0
        now_N = (pairs.logp_B[0::2] - pairs.logp_B[1::2]) * side_N
        gap_N = (pairs.gain_B[0::2] - pairs.gain_B[1::2]) * side_N
        policy_N, reference_N = now_N[sided_N].sort().values, (now_N - gap_N).detach()[sided_N].sort().values
        loss_N = -F.logsigmoid(self.beta * (policy_N - reference_N))
        return pairs.loss(loss_N, self.beta * gap_N * side_N)
