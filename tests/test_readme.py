"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_example_runs(example, capsys):
    exec(compile(example, "README.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 20


def test_there_is_an_example_of_a_train_step():
    assert any("train_step" in example for example in EXAMPLES)


def test_the_files_that_it_links_to_exist():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links
    assert [link for link in links if not (Path(__file__).parent.parent / link).exists()] == []
