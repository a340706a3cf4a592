"""What a recipe that compares models returns: which models, where their scores are, who taught what."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Entry(NamedTuple):
    """A model in a comparison.

    `evaluation` is the folder of its Evaluate stage, `stages` the folders of the stages that made it from the start.
    """

    name: str
    evaluation: str
    stages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models to compare. The first entry is the start; `teachers` names, per domain, the entry that taught it.

    Recovery of an entry in a domain = (its score - start) / (teacher - start); of an entry, the mean over domains.
    """

    title: str
    entries: tuple[Entry, ...]
    teachers: Mapping[str, str]
