"""A teacher that is somewhere else: an OpenAI-compatible server that says how likely given tokens are."""

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.tokenizer import Tokenizer
from .rollout import Rollout

PROBE = "Two words, 3 numbers (12; 4.5) and naïve Ω: do we read the same tokens?"
"""A text that tokenizers cut differently: an endpoint must spell our tokens of it back."""
RETRIED = (408, 409, 429, 500, 502, 503, 504)
"""HTTP states that may be over a little later."""


class EndpointError(RuntimeError):
    """An endpoint did not answer, or not as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind `url`/completions, which takes token ids and echoes their log-probabilities (vLLM and SGLang do).

    `model` is its name there. `key_file` holds the key that is sent, if one is: settings are written to disk, keys are
    not. At most `concurrency` requests are under way; each is tried `tries` times and given `timeout` seconds.
    """

    url: str
    model: str
    key_file: str | None = None
    concurrency: int = 16
    timeout: float = 120.0
    tries: int = 4

    def scores(self, rollouts: Sequence[Rollout]) -> Callable[[Rollout], np.ndarray]:
        """Log-probabilities of the answers' tokens under this model, at temperature 1, as a function of the rollout."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            found = list(pool.map(lambda one: self.logp(one.prompt, one.tokens.tolist()), rollouts))
        by_rollout = {id(one): values for one, values in zip(rollouts, found, strict=True)}
        return lambda one: by_rollout[id(one)]

    def logp(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Log-probability of each token of an answer to a prompt, float32 [N].

        Raises:
            EndpointError: if the server cannot be reached, refuses, or gives other than one number a token.
        """
        tokens = [*map(int, prompt), *map(int, answer)]
        found = self._complete(tokens).get("logprobs") or {}
        given = (found.get("token_logprobs") or [])[: len(tokens)]
        values = given[len(prompt) :]
        if len(given) != len(tokens) or any(not isinstance(value, int | float) for value in values):
            raise EndpointError(
                f"{self.url} gave {len(given)} log-probabilities for {len(tokens)} tokens: it must support echo with "
                "logprobs on token ids, as vLLM does"
            )
        return np.asarray(values, np.float32)

    def check_tokenizer(self, student: Tokenizer) -> None:
        """Raise ValueError unless the server reads the student's tokens as the student does."""
        text = self._complete(student.encode(PROBE)).get("text", "")
        if not text.lstrip().startswith(PROBE):
            raise ValueError(
                f"teacher {self.model} at {self.url} has another tokenizer than the student: it reads {PROBE!r} as "
                f"{text[:80]!r}; their tokens cannot be compared: learn its answers as text instead, by SFT on what it "
                "generated"
            )

    def _complete(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The first choice of a completion that echoes the tokens; one token more is asked for, as servers want."""
        body = {
            "model": self.model, "prompt": list(tokens), "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 1,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if self.key_file:
            headers["Authorization"] = f"Bearer {Path(self.key_file).read_text().strip()}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/completions", json.dumps(body).encode(), headers)
        reply = self._tried(request)
        if not isinstance(reply, dict) or not reply.get("choices"):
            raise EndpointError(f"{self.url} answered without choices: {str(reply)[:200]}")
        return reply["choices"][0]

    def _tried(self, request: urllib.request.Request) -> Any:
        for attempt in range(self.tries):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = f"state {error.code}, {error.read(200).decode(errors='replace')!r}"
                if error.code not in RETRIED:
                    raise EndpointError(f"{self.url} refused {self.model}: {reason}") from error
            except (urllib.error.URLError, TimeoutError, ConnectionError, json.JSONDecodeError) as error:
                reason = str(error)
            if attempt + 1 < self.tries:
                time.sleep(0.5 * 2**attempt * (1 + random.random()))
        raise EndpointError(
            f"{self.url} did not answer in {self.tries} tries ({reason}): start the server, or raise timeout and tries"  # pyright: ignore[reportPossiblyUnboundVariable]
        )
