"""The part of a response that is to be judged: a fenced block of code, or the answer after the thinking."""

import re
from collections.abc import Collection

from ..row import thought

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def answer_part(response: str) -> str:
    """What a response says after its thinking; empty where the thinking never ends."""
    return thought({"role": "assistant", "content": response}).answer


def block(response: str, languages: Collection[str]) -> str | None:
    """The last fenced block in one of the languages; without any, the last one that names no language.

    A response without a fence is taken whole; one whose fences are all in other languages has no block.
    """
    text = answer_part(response)
    found = [(match[1].lower(), match[2]) for match in _FENCE.finditer(text)]
    for wanted in (set(languages), {""}):
        matching = [content for language, content in found if language in wanted]
        if matching:
            return matching[-1]
    return None if found else text
