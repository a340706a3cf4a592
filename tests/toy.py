"""Tasks that a model with random weights can be rewarded for: the verifier likes some bytes more than others."""

from dataclasses import dataclass

from posttrain.data.task import Task, Verdict
from posttrain.data.tasks import build_task, check_index


@dataclass(frozen=True)
class Lowercase:
    """The share of characters that are lowercase letters."""

    def __call__(self, task: Task, response: str) -> Verdict:
        found = sum("a" <= character <= "z" for character in response)
        return Verdict(found / max(len(response), 1), f"{found} lowercase")


@dataclass(frozen=True, kw_only=True)
class Likes:
    """`size` prompts of one domain, all judged alike."""

    domain: str
    size: int = 16

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        text = f"{self.domain} {check_index(index, self.size)}"
        return build_task(self.domain, ({"role": "user", "content": text},), Lowercase(), answer=text[::-1])
