"""Rows for the tests of filters, shards and pairs."""

from typing import Any

from posttrain.data.row import Provenance, Row

PROVENANCE = Provenance(
    prompt_source="sums v1",
    teacher="teacher-a",
    teacher_fingerprint="0123abcd",
    sampling={"temperature": 0.6, "top_p": 0.95, "seed": 7},
    verifiers={"FinalNumber": "1"},
)


def make_row(text: str | None = "The answer is 4.", question: str = "What is 2 + 2?", **changes: Any) -> Row:
    """A finished, correct answer; by default the prompt's id is its question."""
    settings: dict[str, Any] = {
        "id": "a",
        "prompt_id": question,
        "domain": "maths",
        "prompt": ({"role": "user", "content": question},),
        "response": ({"role": "assistant", "content": text},),
        "finish": "stop",
        "num_tokens": 5,
        "score": 1.0,
        "licences": ("MIT",),
        "provenance": PROVENANCE,
    }
    return Row(**{**settings, **changes})
