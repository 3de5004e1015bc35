"""Replies drawn by a vLLM server, which takes over each version of the adapter while it runs.

The server holds the start model; a version is a checkpoint's adapter, loaded under a name that says
what is in it. Prompts go out as token ids and replies come back as token ids with the server's
log-probabilities, so no text is tokenised twice. The server computes a little otherwise than the
learner, so these replies need an importance-weighted objective, as int8 ones do.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tutelage.engines.load import LanguageModel
from tutelage.engines.local import reply_of
from tutelage.errors import ModelError
from tutelage.records import Generation, Prompt, SamplerSettings

__all__ = ["KEY_VARIABLE", "VllmCompleter"]

Answer = TypeVar("Answer")

KEY_VARIABLE = "TUTELAGE_SERVER_KEY"
_START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank RANK"


class VllmCompleter:
    """Draws replies through the completions route of a vLLM server.

    Args:
        lm: The model as it is here; its tokenizer encodes prompts and decodes replies.
        url: Where the server listens, for example http://127.0.0.1:8000. A key, if it wants one, is
            taken from the environment (TUTELAGE_SERVER_KEY) and sent nowhere else.
        adapter: Folder of a version's adapter in PEFT's format, readable by the server; None for the
            start model.
        parallel: Requests under way at once; the server batches them.
        retries: How often a request that failed on the way, or found the server busy, is repeated.

    Raises:
        ModelError: The `http` extra is missing, nobody answers, or the server serves no model.
    """

    def __init__(
        self,
        lm: LanguageModel,
        url: str,
        *,
        adapter: Callable[[str], Path | None] = lambda _: None,
        parallel: int = 64,
        retries: int = 3,
        timeout: float = 600.0,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ModelError(
                "sampling.server needs the openai client, which is not installed",
                expected="the extra 'http'",
                fix="pip install 'tutelage[http]'",
            ) from error
        self._openai = openai
        self.lm, self.url, self.adapter, self.parallel = lm, url.rstrip("/"), adapter, parallel
        key = os.environ.get(KEY_VARIABLE) or "none"
        self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=timeout)
        self._loaded = ""
        self.model = self._base()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        settings: SamplerSettings,
        seed: int,
        version: str,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[list[Generation]]:
        """Draw `samples` replies to each prompt; the arguments are those of `LocalCompleter`.

        The server draws by its own dice; `seed` is only written into the records.

        Raises:
            InputError: A prompt does not fit into the context.
            ModelError: The server is gone, or refuses, or gives no token ids. No reply is kept then.
        """
        name = self._take_over(version)
        encoded = [self.lm.encode(p, room=settings.max_new_tokens) for p in prompts]

        def one(job: tuple[int, int]) -> Generation:
            p, g = job
            prompt = prompts[p]
            found = self._ask(name, encoded[p], settings)
            tokens, logps = _reply(found, self.url)
            finished = tokens[-1] in self.lm.stop_tokens
            return reply_of(
                self.lm, prompt, g, tokens, logps, finished=finished, settings=settings, seed=seed, version=version
            )

        # All samples of a prompt follow one another: the server then computes the prompt once.
        jobs = [(p, g) for p in range(len(prompts)) for g in range(samples)]
        table: list[list[Generation]] = [[] for _ in prompts]
        with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
            waiting = [pool.submit(one, job) for job in jobs]
            try:
                for (p, _), future in zip(jobs, waiting, strict=True):
                    table[p].append(future.result())
                    progress(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return table

    def _ask(self, model: str, tokens: tuple[int, ...], settings: SamplerSettings) -> dict[str, Any]:
        # No seed a request: the same one need not draw the same in other company, and vLLM's CPU build
        # (0.32) dies of it when a seeded prompt is prefilled in parts.
        extra: dict[str, Any] = {"return_token_ids": True, "stop_token_ids": sorted(self.lm.stop_tokens)}
        if settings.top_k:
            extra["top_k"] = settings.top_k
        return self._call(
            lambda: self._client.completions.create(
                model=model,
                prompt=list(tokens),
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                logprobs=0,
                extra_body=extra,
            ).model_dump()
        )

    def _base(self) -> str:
        listed = self._call(lambda: self._client.models.list().model_dump())["data"]
        base = next((m["id"] for m in listed if not m.get("parent")), None)
        if base is None:
            raise ModelError(f"the server at {self.url} serves no model", fix=f"start it with one: {_START}")
        return str(base)

    def _take_over(self, version: str) -> str:
        """Name under which the server knows a version; its adapter is loaded if it is new."""
        folder = self.adapter(version)
        if folder is None:
            return self.model
        weights = (folder / "adapter_model.safetensors").read_bytes()
        name = f"tutelage-{hashlib.sha256(weights).hexdigest()[:16]}"
        if name != self._loaded:
            self._post("/load_lora_adapter", lora_name=name, lora_path=str(folder.resolve()), load_inplace=True)
            if self._loaded:  # one version at a time is drawn from
                self._post("/unload_lora_adapter", lora_name=self._loaded)
            self._loaded = name
        return name

    def _post(self, route: str, **body: Any) -> None:
        self._call(lambda: self._client.post(route, cast_to=str, body=body))

    def _call(self, ask: Callable[[], Answer]) -> Answer:
        try:
            return ask()
        except self._openai.APIConnectionError as error:
            raise ModelError(
                f"no server answers at {self.url}", expected="a vLLM server", fix=f"start one: {_START}"
            ) from error
        except self._openai.APIStatusError as error:
            said = str(error.message)[:300]
            raise ModelError(
                f"the server at {self.url} refused ({error.status_code}): {said}",
                expected="a vLLM server that loads adapters while it runs",
                fix=f"start it with: {_START}; a key goes into {KEY_VARIABLE}",
            ) from error
        except (self._openai.APIError, ValueError) as error:
            raise ModelError(
                f"what answers at {self.url} does not speak the protocol: {error}", expected="a vLLM server"
            ) from error


def _reply(found: dict[str, Any], url: str) -> tuple[list[int], list[float]]:
    """Token ids of a reply, and the log-probability each was drawn with."""
    try:
        choice = found["choices"][0]
        tokens = [int(t) for t in choice["token_ids"]]
        logps = [float(x) for x in choice["logprobs"]["token_logprobs"]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(
            f"the server at {url} gives no token ids with log-probabilities",
            expected="a vLLM server that knows return_token_ids (0.32 does)",
            fix="replies from other servers can be judged, not learned from",
        ) from error
    if len(tokens) != len(logps) or not tokens:
        raise ModelError(f"the server at {url} gave {len(tokens)} tokens and {len(logps)} log-probabilities")
    return tokens, logps
