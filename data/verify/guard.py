"""What no verifier accepts: an empty answer, and the prompt handed back."""

from ..task import Task, Verdict

EMPTY = Verdict(0.0, "empty response")
ECHO = Verdict(0.0, "repeats the prompt")


def refusal(task: Task, response: str) -> Verdict | None:
    """The verdict on a response that is blank or only repeats one of the task's messages; None for any other."""
    text = response.strip()
    if not text:
        return EMPTY
    if any(text == str(message["content"]).strip() for message in task.messages if message["role"] != "assistant"):
        return ECHO
    return None


def gold(task: Task) -> str:
    """The task's reference answer; a ValueError where it has none."""
    if task.answer is None or not task.answer.strip():
        raise ValueError(f"task {task.id} has no answer to compare with: give the task an `answer`")
    return task.answer
