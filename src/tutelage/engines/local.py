"""The in-process engine: shared prefixes once, preallocated memory, continuous refill.

The prompt is computed once for all its samples, and what all prompts share once for all prompts.
Rows of the decoding batch that finish are given to the next sample at once.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tutelage.engines.allocator import release_pages
from tutelage.engines.llama import LlamaStep
from tutelage.engines.load import LanguageModel
from tutelage.engines.packing import Group, Pack, pack
from tutelage.engines.sampling import Steering, draw, draw_rows
from tutelage.engines.voices import Blend, Layers, Voice
from tutelage.errors import InputError, ModelError
from tutelage.records import Generation, Prompt, SamplerSettings, content_hash

__all__ = ["LocalCompleter", "reply_of"]


@dataclasses.dataclass
class _Job:
    """One sample to be drawn; `prefix` names the prompt whose keys and values it starts from.

    Under a steering, `dice` decides its choices, which are kept in `actions` with the states they were made on.
    """

    prompt: int
    sample: int
    uniforms: np.ndarray
    settings: SamplerSettings
    tokens: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    finished: bool = False
    dice: np.ndarray | None = None
    actions: list[int] = dataclasses.field(default_factory=list)
    states: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Prefix:
    """A computed prompt: what each voice keeps of it, the first one's last state, the next logits."""

    length: int
    layers_K: list[Layers]
    state_D: torch.Tensor
    logits_V: torch.Tensor


class LocalCompleter:
    """Answers prompts with a `LanguageModel` in this process.

    Args:
        lm: The model.
        rows: Decoding batch size.
        prefill_budget: Tokens a prefill pass may hold.
        int8: Decode with weights rounded to 8 bits (Llama family): faster where the processor
            multiplies bytes, and drawn from a slightly other model. Recorded log-probs are that model's.
        blend: Other models that have a say in every token. Recorded log-probs are the blend's, and a
            steering sees the states of `lm`.

    Raises:
        ModelError: int8 is wished for, and the model is of another family; or vocabularies differ.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        rows: int = 64,
        prefill_budget: int = 512,
        int8: bool = False,
        blend: Blend | None = None,
    ) -> None:
        if int8 and not LlamaStep.serves(lm):
            raise ModelError(
                f"{lm.name} cannot be sampled in int8",
                expected="a model of the Llama family (Llama, Mistral, Qwen2, SmolLM)",
                fix="set sampling.int8=false",
            )
        if blend is not None:
            blend.check(lm)
        self.lm = lm
        self.rows = rows
        self.prefill_budget = prefill_budget
        self.int8 = int8
        self.blend = blend

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        settings: SamplerSettings,
        seed: int,
        version: str,
        opening: Sequence[str] | None = None,
        greedy_first: bool = False,
        steering: Steering | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[list[Generation]]:
        """Draw `samples` replies to each prompt.

        Args:
            prompts: P conversations.
            samples: G, replies a prompt.
            settings: How tokens are drawn.
            seed: Decides the draws, together with prompt id and sample number.
            version: Name of the policy's weights, kept in each record.
            opening: Optional text each reply must begin with, one a prompt; it is part of the
                returned text, not of `tokens`.
            greedy_first: The first reply of each prompt takes the most likely tokens; the prompt is
                still computed once for all its replies.
            steering: Chooses how tokens are drawn, a reply or a token at a time, and is told each reply
                with its choices; `settings` then says the longest reply and nothing else.
            progress: Called with the number of newly finished replies.

        Returns:
            P lists of G generations, in order.

        Raises:
            InputError: A prompt does not fit into the context, no token may be drawn, or both the
                caller and a steering say how.
        """
        if settings.max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {settings.max_new_tokens}", expected="at least 1")
        if steering is not None and (
            greedy_first or settings != SamplerSettings(max_new_tokens=settings.max_new_tokens)
        ):
            raise InputError("settings and a steering both say how tokens are drawn", expected="plain settings")
        openings = list(opening) if opening is not None else [""] * len(prompts)
        leads = [self._opening(o) for o in openings]
        encoded = [
            self.lm.encode(p, room=settings.max_new_tokens + len(lead)) + lead
            for p, lead in zip(prompts, leads, strict=True)
        ]
        greedy = dataclasses.replace(settings, temperature=0.0, top_k=0, top_p=1.0)
        limit = settings.max_new_tokens
        jobs = [
            _Job(
                p,
                g,
                _uniforms(seed, prompt.id, g, limit),
                greedy if greedy_first and g == 0 else settings,
                dice=None if steering is None else _uniforms(seed, prompt.id, f"{g} choices", limit),
            )
            for p, prompt in enumerate(prompts)
            for g in range(samples)
        ]
        if jobs:
            release_pages()  # of what was learned or read before; and below, of packed weights and memory
            self._run(jobs, encoded, settings, progress, steering)
            release_pages()
        table: list[list[Generation]] = [[] for _ in prompts]
        for job in jobs:
            reply = self._reply(job, prompts[job.prompt], openings[job.prompt], seed, version)
            table[job.prompt].append(reply)
            if steering is not None:
                steering.record(reply, torch.tensor(job.actions), torch.stack(job.states))
        return table

    def _reply(self, job: _Job, prompt: Prompt, lead: str, seed: int, version: str) -> Generation:
        return reply_of(
            self.lm,
            prompt,
            job.sample,
            job.tokens,
            job.logps,
            finished=job.finished,
            settings=job.settings,
            seed=seed,
            version=version,
            lead=lead,
            choices=job.actions,
        )

    def _opening(self, text: str) -> tuple[int, ...]:
        return tuple(self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    def _run(
        self,
        jobs: list[_Job],
        encoded: list[tuple[int, ...]],
        settings: SamplerSettings,
        progress: Callable[[int], None],
        steering: Steering | None,
    ) -> None:
        # Longest prompts first: rows that run together then have similar lengths.
        order = sorted(range(len(encoded)), key=lambda p: (-len(encoded[p]), p))
        groups = [Group(encoded[p], (), ()) for p in order]
        packs = collections.deque(pack(groups, budget=self.prefill_budget))
        capacity = max(len(e) for e in encoded) + settings.max_new_tokens
        rows = min(self.rows, len(jobs))
        models = (self.lm, *(self.blend.others if self.blend else ()))
        size = {"rows": rows, "capacity": -(-capacity // 32) * 32}
        depth = 1.0 if steering is None else steering.depth
        voices = [Voice(lm, **size, int8=self.int8, depth=depth) for lm in models]
        by_prompt: dict[int, list[_Job]] = collections.defaultdict(list)
        for job in jobs:
            by_prompt[job.prompt].append(job)
        queue: collections.deque[tuple[_Job, _Prefix]] = collections.deque()
        taken = 0
        batch = _Batch(voices, self.blend, settings, steering)
        while queue or packs or batch.jobs:
            while len(batch.jobs) < rows and (queue or packs):
                if not queue:
                    fresh = packs.popleft()
                    for prefix in batch.prefill(fresh):
                        queue.extend((job, prefix) for job in by_prompt[order[taken]])
                        taken += 1
                    if steering is not None and not steering.per_token:
                        _choose(steering, [(job, prefix.state_D) for job, prefix in queue])
                batch.admit(*queue.popleft())
            progress(batch.step())


def reply_of(
    lm: LanguageModel,
    prompt: Prompt,
    sample: int,
    tokens: Sequence[int],
    logps: Sequence[float],
    *,
    finished: bool,
    settings: SamplerSettings,
    seed: int,
    version: str,
    lead: str = "",
    choices: Sequence[int] = (),
) -> Generation:
    """The record of a reply that was drawn; its id says what decided it."""
    text = lm.decode(list(tokens))
    decided: list[object] = [version, seed, prompt.id, prompt.hash, lead, sample, dataclasses.astuple(settings)]
    if choices:
        decided.append(list(choices))
    return Generation(
        id=content_hash(decided),
        prompt_id=prompt.id,
        sample=sample,
        text=f"{lead} {text}".strip() if lead else text,
        tokens=tuple(tokens),
        logps=tuple(logps),
        finished=finished,
        settings=settings,
        policy_version=version,
        seed=seed,
    )


def _choose(steering: Steering, rows: Sequence[tuple[_Job, torch.Tensor]]) -> torch.Tensor:
    """The lines of the menu that the next tokens of these rows are drawn by; kept in the jobs."""
    states_BD = torch.stack([state for _, state in rows])
    dice = [float(job.dice[len(job.actions)]) for job, _ in rows if job.dice is not None]
    uniform_B = torch.tensor(dice, device=states_BD.device)
    action_B = steering.choose(states_BD, uniform_B, [job.sample for job, _ in rows])
    for (job, state), action in zip(rows, action_B.tolist(), strict=True):
        job.actions.append(action)
        job.states.append(state)
        if not steering.per_token:
            job.settings = steering.menu.settings(action, job.settings.max_new_tokens)
    return action_B


def _uniforms(seed: int, prompt_id: str, sample: int | str, count: int) -> np.ndarray:
    """The numbers that decide one sample, whatever shares its batch."""
    digest = int(content_hash([seed, prompt_id, sample]), 16)
    return np.random.Generator(np.random.Philox(digest)).random(count, dtype=np.float32)


class _Batch:
    """Rows that decode together. Row i of the key-value memory belongs to `jobs[i]`."""

    def __init__(
        self, voices: Sequence[Voice], blend: Blend | None, settings: SamplerSettings, steering: Steering | None
    ) -> None:
        self.voices, self.blend, self.settings, self.steering = voices, blend, settings, steering
        self.lm = voices[0].lm
        self.jobs: list[_Job] = []
        self.lengths: list[int] = []  # tokens already in memory, a row
        self._fresh: list[_Prefix] = []  # of the last rows, whose next logits are known

    def prefill(self, fresh: Pack) -> list[_Prefix]:
        """Compute prompts, by every voice."""
        layers_KP, states_KPD, logits_KPV = zip(*(voice.prefill(fresh) for voice in self.voices), strict=True)
        logits_PV = self._one(logits_KPV)
        lengths = [fresh.root + end - start for start, end in fresh.prompt_spans]
        return [
            _Prefix(length, [layers[p] for layers in layers_KP], states_KPD[0][p].clone(), logits_PV[p])
            for p, length in enumerate(lengths)
        ]

    def _one(self, logits_KBV: Sequence[torch.Tensor]) -> torch.Tensor:
        """The logits that are drawn from."""
        return self.blend.combine(logits_KBV) if self.blend else logits_KBV[0]

    def admit(self, job: _Job, prefix: _Prefix) -> None:
        """Give a free row to `job`, starting from its prompt's keys and values."""
        for voice, layers in zip(self.voices, prefix.layers_K, strict=True):
            voice.admit(len(self.jobs), layers)
        self.jobs.append(job)
        self.lengths.append(prefix.length)
        self._fresh.append(prefix)

    def step(self) -> int:
        """Draw one token in every row; free finished rows. Returns how many finished."""
        old = len(self.jobs) - len(self._fresh)
        logits = torch.stack([f.logits_V for f in self._fresh]) if self._fresh else None
        states = [f.state_D for f in self._fresh]
        if old:
            hidden, stepped = self._forward(old)
            logits = stepped if logits is None else torch.cat([stepped, logits])
            if self.steering is not None:
                states = [*hidden, *states]
        assert logits is not None
        self._fresh = []
        uniform = torch.tensor([job.uniforms[len(job.tokens)] for job in self.jobs], device=logits.device)
        tokens, logps = self._draw(logits, uniform, states)
        for job, token, logp in zip(self.jobs, tokens.tolist(), logps.tolist(), strict=True):
            job.tokens.append(token)
            job.logps.append(logp)
            job.finished = token in self.lm.stop_tokens
        return self._retire()

    def _draw(
        self, logits: torch.Tensor, uniform: torch.Tensor, states: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token a row, each by its own job's settings, or as it is steered."""
        if self.steering is not None:
            if self.steering.per_token:
                chosen = _choose(self.steering, list(zip(self.jobs, states, strict=True)))
            else:
                chosen = torch.tensor([job.actions[0] for job in self.jobs], device=logits.device)
            due = self.steering.menu.due(chosen.tolist(), [len(job.tokens) for job in self.jobs])
            return draw_rows(logits, uniform, self.steering.menu, chosen, due)
        tokens = torch.empty(len(self.jobs), dtype=torch.long, device=logits.device)
        logps = torch.empty(len(self.jobs), device=logits.device)
        for how in dict.fromkeys(job.settings for job in self.jobs):
            rows = [i for i, job in enumerate(self.jobs) if job.settings == how]
            if len(rows) == len(self.jobs):
                return draw(logits, uniform, how)
            tokens[rows], logps[rows] = draw(logits[rows], uniform[rows], how)
        return tokens, logps

    def _forward(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Last states and logits of the first `count` rows after the token each of them drew last."""
        device = self.lm.device
        lengths = torch.tensor(self.lengths[:count], device=device)
        last = torch.tensor([job.tokens[-1] for job in self.jobs[:count]], device=device)
        for row in range(count):
            self.lengths[row] += 1
        states_KBD, logits_KBV = zip(*(voice.forward(last, lengths) for voice in self.voices), strict=True)
        return states_KBD[0], self._one(logits_KBV)

    def _retire(self) -> int:
        limit = self.settings.max_new_tokens
        done = [i for i, job in enumerate(self.jobs) if job.finished or len(job.tokens) >= limit]
        for row in reversed(done):
            tail = len(self.jobs) - 1
            if row != tail:  # the last row moves into the hole, so rows stay contiguous
                for voice in self.voices:
                    voice.memory.move(tail, row, self.lengths[tail])
                self.jobs[row], self.lengths[row] = self.jobs[tail], self.lengths[tail]
            self.jobs.pop()
            self.lengths.pop()
        return len(done)
