"""Teachers of a distillation: any number in host memory, one at a time on the device."""

from collections.abc import Mapping

import jax

from ..data.tokenizer import Tokenizer
from . import checkpoint
from .compute import Compute
from .hosted import Hosted


class Teachers(Hosted):
    """The teachers by domain.

    Raises ValueError for a teacher whose tokenizer is not the student's: token distributions over different
    vocabularies cannot be compared.
    """

    def __init__(self, paths: Mapping[str, str], student: Tokenizer, compute: Compute, mesh: jax.sharding.Mesh) -> None:
        for path in dict.fromkeys(paths.values()):
            _same_tokenizer(path, checkpoint.open_tokenizer(path), student)
        super().__init__(paths, compute, mesh)


def _same_tokenizer(path: str, teacher: Tokenizer, student: Tokenizer) -> None:
    if teacher.fingerprint != student.fingerprint:
        raise ValueError(
            f"teacher {path} has another tokenizer ({teacher.fingerprint[:12]}) than the student "
            f"({student.fingerprint[:12]}): distil it from its generated text instead, by SFT"
        )
