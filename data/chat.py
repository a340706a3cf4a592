"""Conversations to tokens: render a chat, and say which tokens the assistant chose."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import template
from .task import Message
from .tokenizer import Tokenizer


class WithTools(NamedTuple):
    """A conversation whose assistant was offered tools, given as JSON schemas."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]


Conversation = Sequence[Message] | WithTools


def messages_of(conversation: Conversation) -> tuple[Message, ...]:
    """The messages of a conversation, without the tools."""
    return conversation.messages if isinstance(conversation, WithTools) else tuple(conversation)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Tokens of a conversation; with `add_generation_prompt` they end where the assistant's answer begins.

    The names of control tokens inside messages stay plain text: a user cannot close their turn and open another's.
    """
    _require(tokenizer, messages)
    (safe, tools), mark = _defused(tokenizer, (messages, tools))
    text = _text(tokenizer, safe, tools, add_generation_prompt).text
    return tokenizer.encode_marked(text, mark)


def render_with_mask(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and 1 for those that the assistant chose (its end of turn included), 0 for the others.

    The text is cut where an answer begins, so that no token straddles prompt and answer: a sampler's prompt ends there
    too. Templates with `{% generation %}` say themselves what the assistant chose; for others the beginnings of the
    conversation are rendered, and the template must not rewrite earlier turns. Raises ValueError if it does, or if
    nothing is chosen.
    """
    _require(tokenizer, messages)
    (safe, tools), mark = _defused(tokenizer, (messages, tools))
    full = _text(tokenizer, safe, tools, False)
    spans = full.generated or _answers(tokenizer, safe, tools, full.text)
    tokens: list[int] = []
    mask: list[int] = []
    end = 0
    for index, (start, stop) in enumerate(spans):
        if start < end:
            raise ValueError(f"the chat template marks overlapping answers at character {start}; repair the template")
        prompt = tokenizer.encode_marked(full.text[end:start], mark)
        end = spans[index + 1][0] if index + 1 < len(spans) else len(full.text)
        answer = tokenizer.encode_marked(full.text[start:stop], mark)
        after = tokenizer.encode_marked(full.text[stop:end], mark)
        tokens += prompt
        mask += [0] * len(prompt)
        chosen = _chosen(tokenizer, answer, after)
        tokens += answer + after
        mask += [1] * chosen + [0] * (len(answer) + len(after) - chosen)
    if not any(mask):
        roles = [message.get("role") for message in messages]
        raise ValueError(f"no token of this conversation is the assistant's (roles: {roles}); add an assistant's turn")
    return tokens, mask


def _chosen(tokenizer: Tokenizer, answer: Sequence[int], after: Sequence[int]) -> int:
    """How many tokens from the answer's first are the assistant's: up to its end of turn."""
    ends = [index for index, token in enumerate(answer) if token in tokenizer.eos_ids]
    if ends:
        return ends[-1] + 1
    if after and after[0] in tokenizer.eos_ids:
        return len(answer) + 1
    names = [tokenizer.backend.id_to_token(token) for token in tokenizer.eos_ids]
    raise ValueError(
        f"the chat template ends an answer with none of the stop tokens {names}, so that stopping would never be "
        "trained; use a template that writes one, or add its end of turn to eos_token_id in generation_config.json"
    )


def _answers(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, full: str
) -> tuple[tuple[int, int], ...]:
    """Character spans of the assistant's turns, from the renderings of the conversation's beginnings."""
    spans = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _text(tokenizer, messages[:index], tools, True).text
        through = _text(tokenizer, messages[: index + 1], tools, False).text
        if not through.startswith(before):
            raise ValueError(
                f"the chat template asks for an answer with {before[-40:]!r} and writes message {index} otherwise, "
                "so that a sampler's prompt is not what was trained; use a template in which the two agree"
            )
        if not full.startswith(through):
            raise ValueError(
                f"the chat template rewrites earlier turns (message {index} of {len(messages)} is rendered differently "
                "when more follow), so that no single sequence holds what the model sees at each turn; give each "
                "answer as a conversation of its own, or use a template that keeps its turns"
            )
        spans.append((len(before), len(through)))
    return tuple(spans)


def _text(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, prompt: bool
) -> template.Rendered:
    assert tokenizer.chat_template is not None
    variables = {"tools": tools, "documents": None, "add_generation_prompt": prompt}
    return template.render(tokenizer.chat_template, messages, **variables, **tokenizer.special_variables())


def _require(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template; use an instruction-tuned model's tokenizer or add one")
    if not messages:
        raise ValueError("the conversation has no messages; give at least one")
    for index, message in enumerate(messages):
        if "role" not in message:
            raise ValueError(f"message {index} has the keys {sorted(message)} and no 'role'; add one")


def _defused(tokenizer: Tokenizer, content: tuple[Any, ...]) -> tuple[list[Any], str]:
    """`content` with marks inside every control token's name, and after a name's beginning at the end of a text.

    The marks survive the template, keep the tokenizer from seeing a control token there, and are removed before the
    text is tokenized. (Two texts could still form a name together if a template cut a piece out of either.)
    """
    mark = template.unused_characters(json.dumps(content, ensure_ascii=False, default=str), 1)
    names = sorted((name for name in tokenizer.special_tokens if len(name) > 1), key=len, reverse=True)
    whole = re.compile("|".join(re.escape(name) for name in names) if names else r"(?!)")
    starts = tuple({name[:length] for name in names for length in range(1, len(name))})

    def defuse(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: defuse(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [defuse(item) for item in value]
        if not isinstance(value, str):
            return value
        marked = whole.sub(lambda match: mark.join(match[0]) + mark, value)
        body = marked.rstrip()
        return body + mark + marked[len(body) :] if body.endswith(starts) else marked

    return defuse(content), mark
