"""Filters by what came of a row: its verdict, its end, its length, its prompt's difficulty, its licences, its rank."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..row import Row, assistant_messages, thought
from .funnel import PromptFilter, RowFilter


@dataclass(frozen=True, kw_only=True)
class Verified(RowFilter):
    """Keep rows whose verdict is at least `passing`, or what `by_domain` says for their domain.

    A row without a verdict is dropped, but for the domains named in `unverified`, which have no verifier (chat).
    Olmo 3 keeps an instruction-following answer only if all constraints hold, a code answer only if it passes its
    tests: https://arxiv.org/abs/2512.13961 §4.2.1.
    """

    passing: float = 1.0
    by_domain: Mapping[str, float] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()

    def reason(self, row: Row) -> str | None:
        if row.domain in self.unverified:
            return None
        least = self.by_domain.get(row.domain, self.passing)
        if row.score is None:
            return "has no verdict"
        return None if row.score >= least else f"scores {row.score:g}, less than {least:g}: {row.reason}"


@dataclass(frozen=True, kw_only=True)
class Finished(RowFilter):
    """Keep rows that stopped by themselves, with an answer after all thinking, the last word being the assistant's.

    Olmo 3 drops incomplete reasoning chains: https://arxiv.org/abs/2512.13961 §4.2.1.
    """

    def reason(self, row: Row) -> str | None:
        if row.finish != "stop":
            return f"ended by {row.finish}"
        if row.response[-1]["role"] != "assistant":
            return f"ends with a message of {row.response[-1]['role']!r}"
        for message in assistant_messages(row):
            parts = thought(message)
            if parts.fault is not None:
                return parts.fault
            if not parts.answer.strip() and not message.get("tool_calls"):
                return "has no answer after its thinking" if parts.thinking is not None else "has an empty answer"
        return "ends with a tool call" if row.response[-1].get("tool_calls") else None


@dataclass(frozen=True, kw_only=True)
class ToolCallsResolved(RowFilter):
    """Keep rows whose tool calls name an offered tool with a JSON object as arguments and each get their result.

    Results answer the calls of the assistant's message before them, by `tool_call_id` where they have one and in
    their order where they have none. Rows without tools pass.
    """

    def reason(self, row: Row) -> str | None:
        offered = {str(tool.get("function", tool).get("name")) for tool in row.tools}
        waiting: list[str | None] = []
        for message in row.response:
            if message["role"] == "tool":
                given = message.get("tool_call_id")
                place = 0 if given is None or None in waiting else waiting.index(given) if given in waiting else -1
                if not waiting or place < 0:
                    return f"has the result of a call that was not made ({given!r})"
                del waiting[place]
                continue
            if waiting:
                return f"goes on before {len(waiting)} of its tool calls have a result"
            for call in message.get("tool_calls") or ():
                fault = _call_fault(call, offered)
                if fault is not None:
                    return fault
                waiting.append(call.get("id"))
        return f"ends before {len(waiting)} of its tool calls have a result" if waiting else None


def _call_fault(call: Mapping, offered: set[str]) -> str | None:
    function = call.get("function", call)
    name, arguments = function.get("name"), function.get("arguments")
    if name not in offered:
        return f"calls {name!r}, which is not among its tools"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return f"calls {name!r} with arguments that are not JSON"
    return None if isinstance(arguments, Mapping) else f"calls {name!r} with arguments that are not an object"


@dataclass(frozen=True, kw_only=True)
class Length(RowFilter):
    """Keep rows whose response has at least `min_tokens` and at most `max_tokens` tokens."""

    min_tokens: int = 1
    max_tokens: int

    def __post_init__(self):
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"Length goes from {self.min_tokens} to {self.max_tokens} tokens; give 0 <= min_tokens <= max_tokens"
            )

    def reason(self, row: Row) -> str | None:
        if row.num_tokens < self.min_tokens:
            return f"has {row.num_tokens} tokens, fewer than {self.min_tokens}"
        return f"has {row.num_tokens} tokens, more than {self.max_tokens}" if row.num_tokens > self.max_tokens else None


@dataclass(frozen=True, kw_only=True)
class DifficultyBand(RowFilter):
    """Keep rows of prompts whose pass rate is at least `lowest` and at most `highest`.

    Olmo 3 drops prompts that pass in more than 62.5% of 8 answers (https://arxiv.org/abs/2512.13961 §4.4); DAPO those
    at 0 and 1, which give RL no gradient (https://arxiv.org/abs/2503.14476 eq. 11). A row without a pass rate is
    dropped, but for the domains in `unverified`; see `row.with_pass_rates`.
    """

    lowest: float = 0.0
    highest: float = 0.625
    unverified: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0.0 <= self.lowest <= self.highest <= 1.0:
            raise ValueError(
                f"DifficultyBand goes from {self.lowest} to {self.highest}; give 0 <= lowest <= highest <= 1"
            )

    def reason(self, row: Row) -> str | None:
        if row.domain in self.unverified:
            return None
        if row.pass_rate is None:
            return "its prompt has no pass rate"
        if row.pass_rate < self.lowest:
            return f"its prompt passes in {row.pass_rate:.1%}, less than {self.lowest:.1%}"
        too_easy = row.pass_rate > self.highest
        return f"its prompt passes in {row.pass_rate:.1%}, more than {self.highest:.1%}" if too_easy else None


@dataclass(frozen=True, kw_only=True)
class Licensed(RowFilter):
    """Keep rows all of whose licences are among `allowed` (whatever their case); no licence at all is not allowed."""

    allowed: tuple[str, ...]

    def reason(self, row: Row) -> str | None:
        allowed = {licence.casefold() for licence in self.allowed}
        refused = sorted(licence for licence in row.licences if licence.casefold() not in allowed)
        if refused:
            return f"licence {', '.join(refused)} is not allowed"
        return None if row.licences else "has no licence"


@dataclass(frozen=True, kw_only=True)
class BestByReward(PromptFilter):
    """Keep the `count` rows of each prompt with the highest reward; of equals, those whose id comes first.

    Best-of-n as in Llama 2's rejection sampling: https://arxiv.org/abs/2307.09288 §3.2.3. Raises ValueError for a row
    without a reward.
    """

    count: int = 1

    def __post_init__(self):
        _check_count(self)

    def prompt_reasons(self, rows: Sequence[Row]) -> list[str | None]:
        rewards: dict[str, float] = {}
        for row in rows:
            if row.reward is None:
                raise ValueError(
                    f"row {row.id!r} has no reward; score the rows with a reward model before BestByReward"
                )
            rewards[row.id] = row.reward
        best = sorted(rows, key=lambda row: (-rewards[row.id], row.id))[: self.count]
        return _others(rows, best, f"is not among its prompt's {self.count} best by reward")


@dataclass(frozen=True, kw_only=True)
class ShortestCorrect(PromptFilter):
    """Keep the `count` shortest rows of each prompt, in tokens, among those that score at least `passing`.

    The choice of Kimi k1.5's shortest rejection sampling: https://arxiv.org/abs/2501.12599 §2.4.
    """

    count: int = 1
    passing: float = 1.0

    def __post_init__(self):
        _check_count(self)

    def prompt_reasons(self, rows: Sequence[Row]) -> list[str | None]:
        correct = [row for row in rows if row.score is not None and row.score >= self.passing]
        best = sorted(correct, key=lambda row: (row.num_tokens, row.id))[: self.count]
        return _others(rows, best, f"is not among its prompt's {self.count} shortest correct")


def _others(rows: Sequence[Row], best: Sequence[Row], why: str) -> list[str | None]:
    chosen = {row.id for row in best}
    return [None if row.id in chosen else why for row in rows]


def _check_count(settings: BestByReward | ShortestCorrect) -> None:
    if settings.count < 1:
        raise ValueError(f"{type(settings).__name__} would keep {settings.count} rows; give a count of at least 1")
