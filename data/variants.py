"""The same answer with and without its thinking, so that one set of generations teaches both ways of answering."""

from collections.abc import Callable
from dataclasses import replace

from .row import Row, assistant_messages, text_of, thought
from .task import Message

EMPTY_THINKING = "<think>\n\n</think>\n\n"


def without_thinking(row: Row, *, count_tokens: Callable[[str], int]) -> Row:
    """The row with the assistant's answers alone, as `<id>/answer`.

    `count_tokens` counts the tokens of a text, for `num_tokens`. Raises ValueError for thinking that is not closed:
    use `outcome.Finished` first.
    """
    return _variant(row, "answer", lambda message: {**_bare(message), "content": _answer(row, message)}, count_tokens)


def with_empty_thinking(row: Row, *, count_tokens: Callable[[str], int], instruction: str = "/no_think") -> Row:
    """The row as Qwen3 is taught not to think, as `<id>/no_think`: https://arxiv.org/abs/2505.09388 §4.3, Table 9.

    `instruction` is added to the prompt's last user message, and the answers come after an empty thinking.
    """
    asked = [place for place, message in enumerate(row.prompt) if message["role"] == "user"]
    if not asked:
        raise ValueError(f"row {row.id!r} has no user message to add {instruction!r} to; leave it out of this variant")
    place = asked[-1]
    last = {**row.prompt[place], "content": f"{text_of(row.prompt[place])} {instruction}"}
    asked_so = replace(row, prompt=(*row.prompt[:place], last, *row.prompt[place + 1 :]))
    return _variant(
        asked_so,
        "no_think",
        lambda message: {**_bare(message), "content": EMPTY_THINKING + _answer(row, message)},
        count_tokens,
    )


def _variant(row: Row, name: str, change: Callable[[Message], Message], count_tokens: Callable[[str], int]) -> Row:
    response = tuple(change(message) if message["role"] == "assistant" else message for message in row.response)
    changed = replace(row, id=f"{row.id}/{name}", response=response)
    num_tokens = sum(count_tokens(text_of(message)) for message in assistant_messages(changed))
    return replace(changed, num_tokens=num_tokens)


def _bare(message: Message) -> dict:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def _answer(row: Row, message: Message) -> str:
    parts = thought(message)
    if parts.fault is not None:
        raise ValueError(f"row {row.id!r} cannot lose its thinking, {parts.fault}; filter by Finished first")
    return parts.answer.lstrip()
