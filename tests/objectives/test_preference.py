"""Objectives on pairs worked by hand: value, gradient, symmetry, and what each option changes.

The pair that most sums are about: log pi(y1) = -1 - 2 and log pi_ref(y1) = -2 - 2, log pi(y2) = -3 and
log pi_ref(y2) = -2. So y1 gained 1 and y2 lost 1: d = 2. A mean over tokens gives 1/2 and -1: 1.5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.pair_batches import F64, pair_batch, rows_batch

from tutelage.engines.batch import Batch, Loss
from tutelage.errors import RecipeError, TrainingError
from tutelage.objectives.pairs import read
from tutelage.objectives.preference import Aot, Dpo, ExoPair, Ipo, IpoPerToken, RobustDpo, Xpo
from tutelage.objectives.reference_free import Orpo, SimPo

FLOATS = st.floats(-3.0, 3.0)
LOWER = st.floats(-6.0, -0.01)
PAIR = [[-1.0, -2.0], [-3.0, math.nan]], [[-2.0, -2.0], [-2.0, math.nan]]
Objective = Callable[[Batch], Loss]


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def case(p: float = 1.0) -> Batch:
    return pair_batch(*PAIR, [p])


def value(objective: Objective, b: Batch) -> float:
    return float(objective(b).value.detach())


def gradient(objective: Objective, b: Batch) -> torch.Tensor:
    (grad,) = torch.autograd.grad(objective(b).value, b.logp_BT)
    return grad


def pushes(first: float, second: float) -> torch.Tensor:
    """The same gradient at both tokens of y1, and one at the token of y2."""
    return torch.tensor([[first, first], [second, 0.0]], dtype=F64)


# -- DPO ------------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    """With beta 0.5 the margin is 1 and the loss log(1 + e^-1)."""
    loss = Dpo(beta=0.5)(case())
    assert float(loss.value.detach()) == pytest.approx(math.log(1 + math.exp(-1.0)))
    assert loss.sums["accuracy"] == 1.0 and loss.sums["margin"] == pytest.approx(1.0)
    assert loss.sums["chosen_gain"] == pytest.approx(1.0) and loss.sums["rejected_gain"] == pytest.approx(-1.0)
    push = 0.5 * s(-1.0)  # beta * s(-margin), towards y1 and away from y2, at every token alike
    assert torch.allclose(gradient(Dpo(beta=0.5), case()), pushes(-push, push))


def test_dpo_at_the_start_is_log_two_whatever_the_pair() -> None:
    b = pair_batch([[-1.0], [-5.0], [-2.0], [-0.1]], [[-1.0], [-5.0], [-2.0], [-0.1]], [1.0, 0.0])
    assert value(Dpo(), b) == pytest.approx(math.log(2))


def test_dpo_has_its_optimum_at_the_labels_own_odds() -> None:
    """With p = 0.8 the gradient vanishes where s(beta d) = 0.8."""
    b = pair_batch([[math.log(4.0) / 0.1], [0.0]], [[0.0], [0.0]], [0.8])
    assert gradient(Dpo(beta=0.1), b).abs().max() < 1e-12


def test_dpo_smoothing_by_hand() -> None:
    """cDPO: 0.9 l(1) + 0.1 l(-1), and the optimum of a hard label is at log 9."""
    expected = 0.9 * math.log(1 + math.exp(-1.0)) + 0.1 * math.log(1 + math.e)
    assert value(Dpo(beta=0.5, smoothing=0.1), case()) == pytest.approx(expected)
    b = pair_batch([[math.log(9.0)], [0.0]], [[0.0], [0.0]], [1.0])
    assert gradient(Dpo(beta=1.0, smoothing=0.1), b).abs().max() < 1e-12


def test_dpo_improve_by_hand() -> None:
    """p = 0.75 halves the margin: log(1 + e^-0.5), and y1 is pushed by beta (2 p - 1) s(-0.5)."""
    improve = Dpo(beta=0.5, mode="improve")
    assert value(improve, case(0.75)) == pytest.approx(math.log(1 + math.exp(-0.5)))
    push = 0.5 * 0.5 * s(-0.5)
    assert torch.allclose(gradient(improve, case(0.75)), pushes(-push, push))


def test_dpo_improve_is_dpo_for_a_hard_label_and_nothing_for_an_even_one() -> None:
    improve = Dpo(beta=0.5, mode="improve")
    for p in (0.0, 1.0):
        assert value(improve, case(p)) == pytest.approx(value(Dpo(beta=0.5), case(p)))
    assert gradient(improve, case(0.5)).abs().max() == 0.0
    assert gradient(Dpo(beta=0.5), case(0.5)).abs().max() > 0.1  # match pulls the margin back to 0


def test_dpo_with_sft_by_hand() -> None:
    """0.2 times the mean of 1 and 2 is added; each of y1's two tokens is pushed by 0.1 more."""
    plain, held = Dpo(beta=0.5), Dpo(beta=0.5, sft=0.2)
    assert value(held, case()) - value(plain, case()) == pytest.approx(0.3)
    assert torch.allclose(gradient(held, case()) - gradient(plain, case()), pushes(-0.1, 0.0))


# -- robust DPO -----------------------------------------------------------------------------------


def test_robust_by_hand() -> None:
    """flip 1/4 at h = 1: (3/4 l(1) - 1/4 l(-1))/(1/2) = l(1) - 1/2, since l(-1) = 1 + l(1)."""
    robust = RobustDpo(beta=0.5, flip=0.25)
    assert value(robust, case()) == pytest.approx(math.log(1 + math.exp(-1.0)) - 0.5)
    push = 0.5 * (0.75 * s(-1.0) + 0.25 * s(1.0)) / 0.5
    assert torch.allclose(gradient(robust, case()), pushes(-push, push))


def test_robust_stops_at_the_cap_and_its_loss_has_a_floor() -> None:
    robust = RobustDpo(beta=0.5, flip=0.25, cap=0.5)
    assert value(robust, case()) == pytest.approx(math.log(1 + math.exp(-0.5)) - 0.25)  # l(cap) - e cap/(1 - 2e)
    assert gradient(robust, case()).abs().max() == 0.0
    far = pair_batch([[1e6], [0.0]], [[0.0], [0.0]], [1.0])
    assert value(RobustDpo(flip=0.25), far) == pytest.approx(-5.0, abs=1e-4)
    assert gradient(robust, case(0.0)).abs().max() > 0.3  # on the wrong side nothing is capped


@given(FLOATS, st.floats(0.0, 0.45), st.floats(0.0, 1.0))
def test_robust_is_dpo_on_clean_labels_on_average_over_flips(gap: float, flip: float, p: float) -> None:
    robust = RobustDpo(beta=1.0, flip=flip)
    rows = [[gap], [0.0]], [[0.0], [0.0]]
    kept, turned = value(robust, pair_batch(*rows, [p])), value(robust, pair_batch(*rows, [1.0 - p]))
    clean = value(Dpo(beta=1.0), pair_batch(*rows, [p]))
    assert abs((1 - flip) * kept + flip * turned - clean) < 1e-9


# -- IPO, EXO, XPO, AOT ---------------------------------------------------------------------------


def test_ipo_by_hand() -> None:
    """beta 0.5 asks for d = 1 and got 2; three votes of four ask for 1 or -1: 0.75 + 0.25 * 9 = 3."""
    assert value(Ipo(beta=0.5), case()) == pytest.approx(1.0)
    assert torch.allclose(gradient(Ipo(beta=0.5), case()), pushes(2.0, -2.0))
    assert value(Ipo(beta=0.5), case(0.75)) == pytest.approx(3.0)
    assert value(Ipo(beta=0.25), case()) == pytest.approx(0.0)
    assert gradient(Ipo(beta=0.25), case()).abs().max() == 0.0  # d = 2 is the optimum for beta 1/4


def test_ipo_per_token_by_hand() -> None:
    """d = 1/2 + 1 = 1.5, so the loss is (1.5 - 1)^2; y1 shares its push between two tokens."""
    assert value(IpoPerToken(beta=0.5), case()) == pytest.approx(0.25)
    assert torch.allclose(gradient(IpoPerToken(beta=0.5), case()), pushes(0.5, -1.0))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_ipo_has_its_optimum_at_a_finite_distance(p: float) -> None:
    b = pair_batch([[(2 * p - 1) / 0.4], [0.0]], [[0.0], [0.0]], [p])
    assert gradient(Ipo(beta=0.2), b).abs().max() < 1e-12


def test_exo_by_hand() -> None:
    """KL((q, 1 - q) || (0.9, 0.1)) with q = s(1); its gradient is beta q (1 - q) (1 - log 9)."""
    q, exo = s(1.0), ExoPair(beta=0.5, smoothing=0.1)
    assert value(exo, case()) == pytest.approx(q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1))
    push = 0.5 * q * (1 - q) * (1 - math.log(9))
    assert torch.allclose(gradient(exo, case()), pushes(push, -push))


def test_exo_gives_up_a_hopeless_pair_and_dpo_does_not() -> None:
    far = pair_batch([[-100.0], [0.0]], [[0.0], [0.0]], [1.0])
    assert gradient(ExoPair(beta=0.5), far).abs().max() < 1e-15
    assert gradient(Dpo(beta=0.5), far).abs().max() == pytest.approx(0.5)


def test_xpo_takes_mass_off_the_references_sample() -> None:
    plain, spread = Dpo(beta=0.5), Xpo(beta=0.5, alpha=0.1)
    assert value(spread, case()) - value(plain, case()) == pytest.approx(0.1 * -3.0)
    # Descending raises y1 as DPO does, and lowers y2 by alpha more, even where y2 won.
    for p in (1.0, 0.0):
        assert torch.allclose(gradient(spread, case(p)) - gradient(plain, case(p)), pushes(0.0, 0.1))


def crossed(labels: list[float]) -> Batch:
    """Log-ratios of the replies: policy 0 and -1, reference -2 and 4."""
    logp = [[-1.0, -2.0], [-3.0, math.nan], [-3.0, math.nan], [-2.0, math.nan]]
    ref = [[-2.0, -2.0], [-2.0, math.nan], [-1.0, math.nan], [-5.0, math.nan]]
    return pair_batch(logp, ref, labels)


def test_aot_by_hand() -> None:
    """Sorted: -1 against -2 and 0 against 4; DPO compares 0 with -2 and -1 with 4."""
    assert value(Aot(beta=0.5), crossed([1.0, 1.0])) == pytest.approx((-math.log(s(0.5)) - math.log(s(-2.0))) / 2)
    assert value(Dpo(beta=0.5), crossed([1.0, 1.0])) == pytest.approx((-math.log(s(1.0)) - math.log(s(-2.5))) / 2)
    # The larger margin, pair 1's, is compared with the reference's larger one.
    push = 0.5 * s(2.0) / 2
    assert torch.allclose(gradient(Aot(beta=0.5), crossed([1.0, 1.0]))[:2], pushes(-push, push))


def test_aot_reads_of_a_label_only_which_is_better() -> None:
    assert value(Aot(), crossed([1.0, 0.9])) == value(Aot(), crossed([0.6, 1.0]))
    assert value(Aot(beta=0.5), crossed([1.0, 0.5])) == pytest.approx(-math.log(s(1.0)) / 2)  # the tie is left out


def test_aot_refuses_a_part_of_a_step() -> None:
    with pytest.raises(TrainingError, match="2 of a step's 4 rows") as error:
        Aot()(pair_batch(*PAIR, [1.0], pairs=2))
    assert "token_budget" in error.value.fix


# -- without a reference --------------------------------------------------------------------------


def test_simpo_by_hand() -> None:
    """Means are -1.5 and -3; beta 2 makes the margin 3, gamma 1 leaves 2."""
    simpo = SimPo(beta=2.0, gamma=1.0)
    assert value(simpo, case()) == pytest.approx(math.log(1 + math.exp(-2.0)))
    push = 2.0 * s(-2.0)
    assert torch.allclose(gradient(simpo, case()), pushes(-push / 2, push))
    assert value(simpo, case(0.0)) == pytest.approx(math.log(1 + math.exp(4.0)))  # turned round: -3 - 1


def test_orpo_by_hand() -> None:
    one, two = math.exp(-1.5), math.exp(-3.0)
    lead = math.log(one / (1 - one)) - math.log(two / (1 - two))
    orpo = Orpo(weight=0.5)
    assert value(orpo, case()) == pytest.approx(1.5 + 0.5 * math.log(1 + math.exp(-lead)))
    push = 0.5 * s(-lead)
    assert torch.allclose(gradient(orpo, case()), pushes((-1.0 - push / (1 - one)) / 2, push / (1 - two)))


def test_orpo_of_a_certain_reply_is_finite() -> None:
    b = pair_batch([[0.0], [-2.0]], [[0.0], [0.0]], [1.0])
    assert math.isfinite(value(Orpo(), b)) and bool(gradient(Orpo(), b).isfinite().all())


@pytest.mark.parametrize("objective", [SimPo(), Orpo()])
def test_the_reference_is_not_read(objective: Objective) -> None:
    other = dataclasses.replace(case(), ref_logp_BT=torch.full((2, 2), -7.0, dtype=F64))
    assert value(objective, case()) == value(objective, other)


# -- what all share -------------------------------------------------------------------------------

MIXING = [Dpo(), Dpo(smoothing=0.2, sft=0.5), RobustDpo(), Ipo(), IpoPerToken(), SimPo(), Orpo()]
SUMMING = [*MIXING, Dpo(mode="improve", sft=0.1), ExoPair(), Xpo(alpha=0.1)]
SYMMETRIC = [*MIXING, Dpo(mode="improve", sft=0.1), ExoPair(smoothing=0.1), Aot()]


def known(objective: object) -> str:
    return repr(objective).replace(", name=", " ").split("(")[0]


@pytest.mark.parametrize("objective", MIXING, ids=known)
def test_a_soft_label_is_the_mixture_of_both_directions(objective: Objective) -> None:
    first, second = value(objective, case(1.0)), value(objective, case(0.0))
    assert first != pytest.approx(second)
    assert value(objective, case(0.3)) == pytest.approx(0.3 * first + 0.7 * second)


@pytest.mark.parametrize("objective", SYMMETRIC, ids=known)
@given(
    st.lists(
        st.tuples(st.lists(LOWER, min_size=2, max_size=2), LOWER, LOWER, LOWER, st.floats(0.0, 1.0)),
        min_size=1,
        max_size=4,
    )
)
def test_swapping_the_replies_and_their_label_changes_nothing(
    objective: Objective, pairs: list[tuple[list[float], float, float, float, float]]
) -> None:
    now, then, back, back_then = [], [], [], []
    for long, short, ref_long, ref_short, _ in pairs:
        rows = [long, [short, math.nan]], [[ref_long, -1.0], [ref_short, math.nan]]
        now, then = now + rows[0], then + rows[1]
        back, back_then = back + rows[0][::-1], back_then + rows[1][::-1]
    labels = [p for *_, p in pairs]
    one, other = (
        objective(pair_batch(now, then, labels)),
        objective(pair_batch(back, back_then, [1 - p for p in labels])),
    )
    assert float(one.value.detach()) == pytest.approx(float(other.value.detach()), rel=1e-9, abs=1e-9)
    for key in ("chosen_gain", "rejected_gain", "accuracy"):
        # 1 - (1 - p) may round a label onto the even one, which has no side.
        if all(abs(p - 0.5) > 1e-9 for p in labels):
            assert one.sums[key] == pytest.approx(other.sums[key]), key


@pytest.mark.parametrize("objective", SUMMING, ids=known)
def test_parts_of_a_step_add_up_to_the_step(objective: Objective) -> None:
    logp, ref, labels = [[-1.0], [-2.0], [-0.5], [-3.0]], [[-1.2], [-1.0], [-1.0], [-2.0]], [1.0, 0.25]
    whole = objective(pair_batch(logp, ref, labels))
    parts = [objective(pair_batch(logp[i : i + 2], ref[i : i + 2], [labels[i // 2]], pairs=2)) for i in (0, 2)]
    assert float(whole.value.detach()) == pytest.approx(sum(float(p.value.detach()) for p in parts))
    for key in whole.sums:
        assert whole.sums[key] == pytest.approx(sum(p.sums[key] for p in parts))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Dpo(), Dpo(beta=0.2)),
        (Dpo(), Dpo(mode="improve")),
        (Dpo(), Dpo(smoothing=0.1)),
        (Dpo(mode="improve"), Dpo(mode="improve", smoothing=0.1)),
        (Dpo(), Dpo(sft=0.1)),
        (RobustDpo(), RobustDpo(beta=0.2)),
        (RobustDpo(), RobustDpo(flip=0.2)),
        (RobustDpo(), RobustDpo(cap=0.1)),
        (Ipo(), Ipo(beta=0.2)),
        (Ipo(), IpoPerToken()),
        (IpoPerToken(), IpoPerToken(beta=0.2)),
        (ExoPair(), ExoPair(beta=0.2)),
        (ExoPair(), ExoPair(smoothing=0.1)),
        (Xpo(alpha=0.1), Xpo(alpha=0.1, beta=0.2)),
        (Xpo(alpha=0.1), Xpo(alpha=0.2)),
        (Aot(), Aot(beta=0.2)),
        (SimPo(), SimPo(beta=2.0)),
        (SimPo(), SimPo(gamma=0.5)),
        (Orpo(), Orpo(weight=0.2)),
    ],
    ids=lambda o: repr(o).split(", name")[0],
)
def test_every_option_changes_something(one: Objective, other: Objective) -> None:
    assert not torch.allclose(gradient(one, case(0.9)), gradient(other, case(0.9)), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("objective", [*SYMMETRIC, Xpo(alpha=0.1)], ids=known)
def test_the_gradient_is_that_of_the_value(objective: Objective) -> None:
    b = crossed([0.9, 0.4])

    def at(logp: torch.Tensor) -> torch.Tensor:
        return objective(dataclasses.replace(b, logp_BT=logp)).value

    assert torch.autograd.gradcheck(at, (b.logp_BT,))


def test_a_reply_without_tokens_takes_its_label_from_its_partner() -> None:
    """y1 is empty, and y2 says 0.3: y1 is the better one with 0.7. Its gain is 0, so d = 0.5."""
    b = pair_batch([[math.nan], [-1.0]], [[math.nan], [-0.5]], [0.7])
    assert float(read(b).label_N) == pytest.approx(0.7)
    expected = -0.7 * math.log(s(0.5)) - 0.3 * math.log(s(-0.5))
    assert value(Dpo(beta=1.0), b) == pytest.approx(expected)
    for objective in (IpoPerToken(), SimPo(), Orpo()):
        assert value(objective, b) == 0.0 and gradient(objective, b).abs().max() == 0.0


def test_labels_that_do_not_add_up_are_met_halfway() -> None:
    b = dataclasses.replace(case(), advantage_BT=torch.tensor([[0.9, 0.9], [0.3, 0.0]], dtype=F64))
    assert float(read(b).label_N) == pytest.approx(0.8)


def test_an_odd_row_is_no_pair() -> None:
    with pytest.raises(TrainingError, match="3 rows"):
        Dpo()(rows_batch([[-1.0]] * 3, [[-1.0]] * 3, [1.0, 0.0, 1.0]))


def test_an_even_label_counts_half_in_the_accuracy() -> None:
    assert Dpo()(case(0.5)).sums["accuracy"] == 0.5
    assert Dpo()(case(0.0)).sums["accuracy"] == 0.0


@pytest.mark.parametrize(
    "build",
    [
        lambda: Dpo(mode="best"),
        lambda: Dpo(beta=0.0),
        lambda: Dpo(smoothing=0.6),
        lambda: Dpo(sft=-1.0),
        lambda: Dpo(beta=math.nan),
        lambda: RobustDpo(flip=0.5),
        lambda: RobustDpo(cap=0.0),
        lambda: Ipo(beta=-1.0),
        lambda: IpoPerToken(beta=0.0),
        lambda: ExoPair(smoothing=0.0),
        lambda: Xpo(alpha=-0.1),
        lambda: Aot(beta=0.0),
        lambda: SimPo(gamma=-1.0),
        lambda: Orpo(weight=-0.1),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(build: Callable[[], object]) -> None:
    with pytest.raises(RecipeError) as error:
        build()
    assert error.value.expected
