"""The sections of a recipe: every knob once, with its vetted default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tutelage.config.objectives import ObjectiveName
from tutelage.config.section import Count, Fraction, Positive, Section

__all__ = [
    "JUDGE_KINDS",
    "Constraint",
    "Credit",
    "Demonstrations",
    "Feedback",
    "Gate",
    "Judge",
    "Limits",
    "Lora",
    "Model",
    "Prompts",
    "Rewards",
    "Sampling",
    "Section",
    "Supervised",
    "Update",
]


class Model(Section):
    """Which model learns."""

    name: str = Field("smollm2-135m-instruct", description="embedded name, directory, GGUF file or hub name")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto takes what the processor has")
    hub: bool = Field(False, description="allow a hub name; needs a network and downloads")


class Prompts(Section):
    """Where questions come from. `builtin:NAME` is a file of the package."""

    train: str = Field("builtin:honesty-train", description="JSONL, CSV or Parquet of prompts")
    gate: str = Field("builtin:honesty-gate", description="suite the gate looks at")
    heldout: str = Field("builtin:honesty-heldout", description="suite read once, at the end")
    limit: int | None = Field(None, ge=1, description="use only the first N training prompts")
    gate_limit: int | None = Field(None, ge=1, description="use only the first N gate items")
    heldout_limit: int | None = Field(None, ge=1, description="use only the first N held-out items")


class Sampling(Section):
    """How replies are drawn while learning. Evaluation is always greedy."""

    temperature: Positive = Field(1.0, description="of the policy-gradient rollouts")
    max_new_tokens: Count = Field(24, description="longest reply, in tokens")
    rows: Count = Field(64, description="decoding batch")
    int8: bool = Field(False, description="draw rollouts with weights rounded to 8 bits (Llama family)")
    server: str = Field("", description="URL of a vLLM server that draws the rollouts; empty: this process")

    @property
    def exact(self) -> bool:
        """Whether rollouts are drawn by the very model that learns."""
        return not self.int8 and not self.server


class Feedback(Section):
    """Who judges, and with what."""

    judges: tuple[Literal["consistency", "critic", "constitution", "text"], ...] = Field(
        ("consistency", "critic", "constitution", "text"), description="judges that give verdicts"
    )
    constitution: str = Field("builtin:honesty", description="TOML file of principles")
    encoder: str = Field("all-minilm-l6-v2", description="sentence encoder: embedded name or directory")
    critic_questions: str = Field("builtin:critics/honesty-questions", description="labelled questions")
    critic_replies: str = Field("builtin:critics/honesty-replies", description="labelled replies")
    same_meaning: Fraction = Field(0.8, description="cosine above which two replies mean the same")
    min_confidence: Fraction = Field(0.4, description="below this belief the critic abstains")
    anchors: str = Field("", description="pairs judged again as a run goes on, to see judges change; empty: none")
    anchor_every: Count = Field(1, description="rounds from one such look to the next")
    allow_refused: bool = Field(False, description="train although the only judge failed its check")
    consistency_weight: float = Field(0.15, ge=0.0, description="what consistency adds to the belief, log-odds")


JUDGE_KINDS = ("pairwise", "pointwise", "listwise", "sincerity", "stability", "critic", "fusion", "discriminator")


class Judge(Section):
    """A judge of the user's own, as [[judges]]: a model that is asked, code, or a critic from labelled data."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="of the judge and of its reward term")
    kind: str = Field("pairwise", description=f"{', '.join(JUDGE_KINDS)}, or package.module:name of your code")
    model: str = Field(
        "", description="embedded name, directory, GGUF file, MODEL@URL; for a critic or a fusion its file"
    )
    prompt: str = Field("", description="judge prompt: TOML file; empty takes the built-in one of the kind")
    principles: Literal["none", "whole", "each"] = Field("whole", description="how the constitution is judged by")
    thoughts: int = Field(0, ge=0, le=16, description="reasons written before the verdict, averaged")
    opponents: Count = Field(2, description="pairwise: replies of its group that each reply is compared with")
    rotations: Count = Field(2, description="listwise: orders in which a group is shown")
    paraphrases: int = Field(0, ge=0, le=16, description="stability: paraphrases by the model, beside those by rule")
    demonstrations: str = Field("", description="discriminator: JSONL of prompts with replies to be told apart from")
    form: Literal["airl", "gail"] = Field(
        "airl", description="discriminator: reward log D - log(1 - D), or -log(1 - D)"
    )
    accuracy_low: float = Field(
        0.6, ge=0.5, le=1.0, description="discriminator: it abstains while it tells fewer rightly"
    )
    accuracy_high: float = Field(0.8, ge=0.5, le=1.0, description="discriminator: from here on it does not learn")
    replay: int = Field(2048, ge=0, description="discriminator: replies of earlier rounds that it keeps to learn from")
    weight: Positive = Field(1.0, description="of its term in the reward")
    prefill: bool = Field(False, description="MODEL@URL: the server lets a question begin the model's turn")
    parallel: Count = Field(64, description="MODEL@URL: most calls under way at once")
    calls_per_minute: Positive | None = Field(None, description="MODEL@URL: rate limit")
    tokens_per_minute: Positive | None = Field(None, description="MODEL@URL: rate limit, read and written")
    max_calls: Count | None = Field(None, description="MODEL@URL: hard stop, exit code 5; goes on with --resume")
    max_tokens: Count | None = Field(None, description="MODEL@URL: hard stop")
    max_money: Positive | None = Field(None, description="MODEL@URL: hard stop, in the unit of the prices")
    price_in: float = Field(0.0, ge=0.0, description="MODEL@URL: price of a million tokens read")
    price_out: float = Field(0.0, ge=0.0, description="MODEL@URL: price of a million tokens written")

    @model_validator(mode="after")
    def _makes_sense(self) -> Judge:
        if self.name in Rewards.model_fields:
            raise ValueError(f"the name '{self.name}' is that of a built-in reward term")
        if ":" in self.kind:
            if self.model or self.prompt:
                raise ValueError("a judge in code takes neither model nor prompt")
        elif self.kind not in JUDGE_KINDS:
            raise ValueError(f"kind is '{self.kind}': {', '.join(JUDGE_KINDS)} or package.module:name")
        elif self.kind == "discriminator":
            if self.model or self.prompt:
                raise ValueError("a discriminator takes neither model nor prompt: it reads the start of what learns")
            if not self.demonstrations:
                raise ValueError(f"judge '{self.name}' names no demonstrations")
            if self.accuracy_low > self.accuracy_high:
                raise ValueError(f"judge '{self.name}' has accuracy_low above accuracy_high")
        elif not self.model:
            raise ValueError(f"judge '{self.name}' names no model")
        for key in ("demonstrations", "form", "accuracy_low", "accuracy_high", "replay"):
            if self.kind != "discriminator" and getattr(self, key) != Judge.model_fields[key].default:
                raise ValueError(f"a judge of kind '{self.kind}' does not read {key}")
        if self.paraphrases and self.kind != "stability":
            raise ValueError(f"a judge of kind '{self.kind}' has no paraphrases")
        return self


class Rewards(Section):
    """Weights of the reward's terms; each term is normalised within its group first."""

    fit: float = Field(1.0, ge=0.0, description="the reply does what the question calls for (critic)")
    principles: float = Field(0.5, ge=0.0, description="principles kept, by weight (constitution)")
    consistency: float = Field(0.2, ge=0.0, description="share of the group that says the same (self-supervision)")
    text: float = Field(0.2, ge=0.0, description="length, repetition and format")


class Constraint(Section):
    """Keep answerable questions answered: PID-controlled multiplier on over-abstention."""

    enabled: bool = Field(True, description="off is the ablation")
    limit: Fraction = Field(0.1, description="tolerated share of withheld answers where an answer is due")
    questions: int = Field(
        0,
        ge=0,
        description="cost measured on the likeliest replies to N training questions; 0: on the drawn ones",
    )
    kp: float = Field(35.0, ge=0.0, description="proportional gain")
    ki: float = Field(17.5, ge=0.0, description="integral gain")
    kd: float = Field(1.0, ge=0.0, description="derivative gain")
    maximum: Positive = Field(20.0, description="largest multiplier")


class Credit(Section):
    """How a reply's advantage is spread over its tokens."""

    method: Literal[
        "attention", "uniform", "last", "contribution", "prefix", "integrated-gradients", "gradient-input", "decomposed"
    ] = Field(
        "attention",
        description="where credit goes; contribution, prefix and gradients as a critic's head explains its reward, "
        "decomposed as a regression of this run's rewards on its tokens tells",
    )
    beta: Fraction = Field(0.8, description="share that is spread; `rest` says who takes what is left")
    discount: Fraction = Field(
        1.0, description="of what later tokens bring; 1 is reward-to-go, 0 leaves each token what it brought itself"
    )
    judge: str = Field(
        "",
        description="the critic of [[judges]] that is explained, needed where there are several; attention follows its "
        "attention, or without one the model's own",
    )
    steps: Count = Field(16, description="points on the path of integrated gradients")
    depth: Fraction = Field(0.0, description="decomposed: where tokens are read, as a share of the model's layers")
    rest: Literal["last", "spread"] = Field(
        "last", description="who takes what is not spread of the advantage: the last token, or all alike"
    )
    drop_sinks: Literal["none", "first", "all"] = Field(
        "none", description="tokens that earn no share of their own: each reply's first, or punctuation as well"
    )

    @model_validator(mode="after")
    def _reads_its_options(self) -> Credit:
        own = {
            "judge": self.explains or self.method == "attention",
            "rest": self.method != "last",
            "beta": self.method != "last",
            "steps": self.method == "integrated-gradients",
            "depth": self.method == "decomposed",
            "drop_sinks": self.signed or self.method == "attention",
        }
        for key, read in own.items():
            if not read and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"credit.{key} is not read by credit.method = {self.method}")
        if self.discount < 1.0 and self.rest == "last" and (self.signed or self.beta < 1.0):
            raise ValueError(
                "credit.discount below 1 would leave all that is not spread to the last token alone: "
                'set credit.rest = "spread"'
            )
        return self

    @property
    def explains(self) -> bool:
        """Whether a critic's head explains its reward."""
        return (self.signed and self.method != "decomposed") or (self.method == "attention" and bool(self.judge))

    @property
    def reads(self) -> Literal["trunk", "tokens"]:
        """What features the critic that is explained must stand on."""
        return "tokens" if self.method in ("attention", "contribution") else "trunk"

    @property
    def signed(self) -> bool:
        """Whether a token of a praised reply can be blamed."""
        return self.method not in ("attention", "uniform", "last")


class Lora(Section):
    """The adapter."""

    full: bool = Field(
        False, description="train whole matrices instead of factors; rank, alpha, start then say nothing"
    )
    rank: Count = Field(4, description="r")
    alpha: Positive = Field(8.0, description="scale is alpha / rank")
    from_depth: Fraction = Field(0.5, description="layers below this share of the depth are not adapted")
    start: Literal["critic", "random"] = Field("critic", description="A looks where the critic looks, or at random")
    targets: tuple[str, ...] = Field((), description="module names; empty is every linear layer")


class Supervised(Section):
    """The first stage: learning from kept and revised replies, so that the new behaviour is ever sampled."""

    enabled: bool = Field(True, description="off is the ablation")
    adapter: str = Field(
        "", description="folder of an adapter (a run's checkpoint, or PEFT's) taken instead of the stage"
    )
    samples: Count = Field(3, description="replies a prompt that are judged")
    temperature: Positive = Field(0.7, description="of those replies")
    top_k: int = Field(0, ge=0, description="of those replies; 0 is off")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="of those replies; 1 is off")
    epochs: Count = Field(1, description="passes over the targets")
    learning_rate: Positive = Field(1e-3, description="peak, after a short warm-up, then linear decay")
    batch: Count = Field(8, description="targets a step")
    anchor: float = Field(5.0, ge=0.0, description="weight of the KL to the start on kept answers; 0 imitates them")


class Demonstrations(Section):
    """Replies of your own to learn from, in a stage after the supervised one, or instead of it."""

    file: str = Field("", description="JSONL of prompts with the reply that is wanted; empty: no such stage")
    epochs: Count = Field(2, description="passes over the file")
    learning_rate: Positive = Field(3e-4, description="peak, after a short warm-up, then linear decay")
    batch: Count = Field(8, description="demonstrations a step")
    weight: float = Field(0.0, ge=0.0, description="of the inverse soft-Q penalty; 0 is maximum likelihood alone")
    gamma: Fraction = Field(1.0, description="discount of the reward that the logits imply")


class Update(Section):
    """The policy-gradient rounds."""

    objective: ObjectiveName = Field("grpo", description="which advantage and loss")
    rounds: int = Field(2, ge=0, description="rounds after the supervised stage")
    prompts: Count = Field(64, description="prompts a round")
    samples: int = Field(8, ge=2, description="G, replies a prompt")
    batch: Count = Field(16, description="prompts an optimiser step")
    learning_rate: Positive = Field(1.5e-4, description="constant")
    clip: Positive = Field(0.2, description="epsilon of the ratio clip; some objectives have their own in [objective]")
    kl: float = Field(0.05, ge=0.0, description="weight of the KL term to the start model")
    importance: Literal["token", "mask", "sequence", "geometric", "none"] = Field(
        "token", description="how tokens that a slightly other model drew are weighed, with sampling.int8 or server"
    )
    importance_cap: Positive = Field(2.0, description="largest importance weight, with sampling.int8 or server")
    importance_low: Positive = Field(0.5, description="least ratio that `mask` and `geometric` keep")
    max_grad_norm: Positive = Field(1.0, description="gradients are scaled down to this norm")
    token_budget: Count = Field(2048, description="tokens a packed micro-batch holds; bounds memory")


class Gate(Section):
    """What a candidate must show on the gate suite before it is promoted."""

    enabled: bool = Field(True, description="an absent gate rejects: off means no candidate is promoted")
    evidence: Literal["suite", "pairs"] = Field(
        "suite", description="honest replies to the suite must surely grow, or agreement with held-out pairs"
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(0.95, description="of the paired intervals")
    max_correct_loss: Fraction = Field(0.15, description="correct answers lost must be surely below this")
    max_known_abstained: Fraction = Field(0.1, description="abstaining where the start model was right, at most")


class Limits(Section):
    """Hard stops."""

    seconds: float | None = Field(None, gt=0, description="stop, resumable, with exit code 5 after this time")
    memory_gb: Positive = Field(4.0, description="validate warns when its estimate is above this")
