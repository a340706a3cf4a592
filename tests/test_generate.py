"""Generation: every answer once, whatever kills it and however many share it; filtered, paired, learned from."""

import dataclasses
import hashlib
import json
import resource
import signal
import weakref
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from chat_server import completion, serving
from rows import make_row
from toy import Likes

from posttrain.data import chat, conversations, journal, mixture, shards, source, tokenizer
from posttrain.data.characters import Characters
from posttrain.data.conversations import Rows
from posttrain.data.endpoint import Endpoint, EndpointError
from posttrain.data.filters import duplicates, funnel, outcome
from posttrain.data.filters.funnel import RowFilter
from posttrain.data.row import thought
from posttrain.data.verify import tool_calls
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import answers, checkpoint, curate, sft
from posttrain.train.answers import Local
from posttrain.train.compute import Compute
from posttrain.train.curate import Curate, Pair
from posttrain.train.generate import Generate
from posttrain.train.reward import open_scoring
from posttrain.train.rewards import RewardModels, ScoreRows
from posttrain.train.rollout import Rollout
from posttrain.train.stop import Interrupted

SETTINGS = {
    "prompts": (Characters(operation="reverse", letters=3), Characters(operation="copy", letters=3)),
    "sampling": Sampling(max_tokens=4),
    "samples": 2,
    "rounds": 3,
    "limit": 5,
    "block": 4,
    "compute": Compute(slots=16),
    "seed": 1,
}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Tasks written down."""

    tasks: tuple
    domain: str = "x"

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int):
        return self.tasks[index]


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


def remote(server, **changes) -> Generate:
    endpoint = Endpoint(url=server.url, model="big", concurrency=4, pause=0.01, attempts=2, licence="MIT")
    return Generate(**{**SETTINGS, "teachers": {"*": endpoint}, **changes})


def data(out: Path) -> dict[str, bytes]:
    """The files of a data set, byte by byte."""
    return {file.name: file.read_bytes() for file in (out / "rows").iterdir()}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture
def asked(server):
    """The requests of this test alone."""
    server.requests.clear()
    return server.requests


@pytest.fixture(scope="module")
def generated(server, tmp_path_factory) -> Path:
    """A data set by an endpoint that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "generated"
    remote(server).train(out, one_device())
    return out


def test_every_prompt_is_asked_until_enough_of_its_answers_pass(server, asked, tmp_path):
    remote(server).train(tmp_path, one_device())
    rows = shards.read_rows(tmp_path)
    assert set(server.asked().values()) == {1} and len(rows) == len(asked)
    assert 1 < server.most_under_way <= 4
    sizes = set()
    for prompt in {row.prompt_id for row in rows}:
        mine = [row for row in rows if row.prompt_id == prompt]
        scores = [row.score or 0.0 for row in mine]  # rows are in order of their ids, which end in the sample
        assert {row.pass_rate for row in mine} == {sum(scores) / len(scores)}
        rounds = [scores[i : i + 2] for i in range(0, len(scores), 2)]
        assert not any(1.0 in earlier for earlier in rounds[:-1])
        assert 1.0 in rounds[-1] or len(rounds) == 3
        sizes.add(len(scores))
    assert {2, 6} <= sizes


def test_a_row_says_where_it_comes_from(generated):
    row = next(row for row in shards.read_rows(generated) if row.domain == "reverse")
    assert row.provenance.teacher == "big" and row.provenance.teacher_fingerprint.endswith(" fp1")
    assert json.loads(row.provenance.prompt_source)["operation"] == "reverse"
    assert row.provenance.sampling == {"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 1}
    assert list(row.provenance.verifiers) == ["SameText"] and row.licences == ("MIT",)
    usage = json.loads((generated / "usage.json").read_text())["*"]
    rows = shards.read_rows(generated)
    assert (usage["answers"], usage["tokens"]) == (len(rows), sum(row.num_tokens for row in rows))
    assert not (generated / "answers").exists()


def test_a_run_that_fails_again_and_again_asks_for_no_answer_twice_and_makes_the_same_bytes(
    server, asked, generated, tmp_path, monkeypatch
):
    out = tmp_path / generated.name
    failing, answered = iter([0, 3, 4, 9, 15, 22]), []
    limit = [next(failing)]

    def fault(number, request):
        if number >= limit[0]:
            return 400, b"no more"
        answered.append(f"{request['messages'][-1]['content']} {request['seed']}")
        return None

    monkeypatch.setattr(server, "fault", fault)
    for nth in failing:
        with pytest.raises(EndpointError, match=r"answers 400: no more \(asked for task \w+ of \w+\)"):
            remote(server).train(out, one_device())
        limit[0] = len(asked) + nth
        for file in (out / "answers").glob("*[0-9].jsonl"):
            file.write_bytes(file.read_bytes() + b'{"task": "to')  # as a kill may leave it
    limit[0] = 1000
    remote(server).train(out, one_device())
    assert len(answered) == len(set(answered)) == len(shards.read_rows(generated))
    assert data(out) == data(generated)


def test_parts_that_share_the_work_make_what_one_process_makes(server, asked, generated, tmp_path):
    out = tmp_path / generated.name
    for part in (1, 2, 0):
        assert not (out / "rows").exists()
        remote(server).train(out, one_device(), part=part, parts=3)
    assert set(server.asked().values()) == {1}
    assert data(out) == data(generated)
    with pytest.raises(ValueError, match="part 3 of 3: parts are numbered from 0 to 2"):
        remote(server).train(out, one_device(), part=3, parts=3)


def test_a_full_disk_is_said_with_its_file_and_loses_nothing_that_was_written(server, asked, generated, tmp_path):
    out = tmp_path / generated.name
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as raised:
            remote(server).train(out, one_device())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(raised.value.filename).endswith("answers/000000.jsonl")
    written = {
        (line["task"], line["sample"]) for line in journal.read(Path(raised.value.filename)) if "message" in line
    }
    first = len(asked)
    remote(server).train(out, one_device())
    assert data(out) == data(generated)
    seeds = {answers.request_seed(1, *key) for key in written}
    assert written and not seeds & {request["seed"] for request in asked[first:]}


def test_a_stop_keeps_what_was_answered(server, asked, tmp_path, monkeypatch):
    def stop():
        if len(asked) > 3:
            raise Interrupted

    monkeypatch.setattr(answers, "check_stop", stop)
    with pytest.raises(Interrupted):
        remote(server).train(tmp_path, one_device())
    kept = (tmp_path / "answers" / "000000.jsonl").read_text().splitlines()
    assert 0 < len(kept) <= len(asked) < 15


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "generated"
    on_mesh().train(out, one_device())
    return out


def on_mesh(**changes) -> Generate:
    prompts = (Likes(domain="north", size=5), Likes(domain="south", size=5))
    teachers = {"south": Local(model="tiny"), "*": Local(model="tiny", licence="MIT")}
    return Generate(**{**SETTINGS, "prompts": prompts, "teachers": teachers, "passing": 0.3, "rounds": 2, **changes})


def test_a_checkpoint_answers_the_same_after_every_kill_in_any_parts(local, tmp_path):
    """A kill leaves some whole lines and perhaps a torn one."""
    for part in (1, 0):
        on_mesh().train(tmp_path / local.name, one_device(), part=part, parts=2)
    assert data(tmp_path / local.name) == data(local)
    on_mesh(prompts=on_mesh().prompts[:1]).train(tmp_path / "cut", one_device(), part=1, parts=2)
    [done] = (tmp_path / "cut" / "answers").iterdir()
    text = done.read_bytes()
    done.rename(done.with_name("000001.jsonl")).write_bytes(text[: len(text) // 2])
    on_mesh(prompts=on_mesh().prompts[:1]).train(tmp_path / "cut", one_device(), part=1, parts=2)
    assert done.read_bytes() == text


def test_each_domain_has_its_teacher_and_a_fingerprint_says_whether_two_are_one(local):
    rows = shards.read_rows(local)
    assert {(row.domain, row.licences) for row in rows} == {("north", ("MIT",)), ("south", ())}
    assert len({row.provenance.teacher_fingerprint for row in rows}) == 1
    model = checkpoint.open_model("tiny", one_device())
    sharded = checkpoint.open_model("tiny", meshes.make_mesh(fsdp=4, tensor=2))
    assert answers.identity(model) == answers.identity(sharded) == rows[0].provenance.teacher_fingerprint
    for change in (lambda x: x.at[0].add(1e-6), lambda x: x[::-1]):
        changed = jax.tree.map(change, model.params)
        assert answers.identity(model._replace(params=changed)) != answers.identity(model)


def test_what_cannot_be_generated_is_said_before_anything_is_asked(server, asked, tmp_path):
    blank = dataclasses.replace(Likes(domain="x")[0], messages=({"role": "user", "content": " "},))
    cases = [
        ({"prompts": (Fixed((blank,)),)}, r"task \w+ of x has an empty prompt"),
        ({"teachers": {"copy": Local(model="tiny")}}, "is of domain 'reverse' and teachers are for"),
        ({"samples": 0}, "give at least 1 of each"),
        ({"prompts": ()}, "0 prompt sources"),
    ]
    for changes, why in cases:
        with pytest.raises(ValueError, match=why):
            remote(server, **changes).train(tmp_path, one_device())
    assert not asked


@dataclasses.dataclass(frozen=True)
class Taste:
    """A scorer with a taste that has no reason."""

    def open(self, mesh):
        return lambda rows: [float(self.of(row)) for row in rows]

    def of(self, row) -> int:
        return hashlib.sha256(row.id.encode()).digest()[0]


def test_curation_keeps_the_best_of_all_rounds_and_every_dropped_row_with_its_reason(server, generated, tmp_path):
    again = tmp_path / "again"
    remote(server, seed=2, format="array_record").train(again, one_device())
    folders = (str(generated), str(again))
    stage = Curate(rows=folders, filters=(outcome.Verified(),), scorer=Taste(), best=(outcome.BestByReward(count=1),))
    stage.train(tmp_path / "kept", one_device())
    every, kept = [row for one in folders for row in shards.read_rows(one)], shards.read_rows(tmp_path / "kept")
    passing = {row.prompt_id for row in every if row.score == 1.0}
    assert sorted(row.prompt_id for row in kept) == sorted(passing)
    assert {row.provenance.sampling["seed"] for row in kept} == {1, 2}
    best = max((row for row in every if row.score == 1.0 and row.prompt_id == kept[0].prompt_id), key=Taste().of)
    assert kept[0].id == best.id
    assert all(row.reward == Taste().of(row) and row.score == 1.0 for row in kept)
    dropped = shards.read_rows(tmp_path / "kept", "dropped")
    assert {row.id for row in kept} | {row.id for row in dropped} == {row.id for row in every}
    manifest = json.loads((tmp_path / "kept" / "rows" / "manifest.json").read_text())
    assert [step["filter"] for step in manifest["steps"]] == ["Verified", "Verified", "BestByReward", "BestByReward"]
    assert sum(step["dropped"] for step in manifest["steps"]) == len(dropped)


@dataclasses.dataclass(frozen=True)
class Crowd(RowFilter):
    """Drops every third row, and counts how many of the rows that it saw are in memory together."""

    alive: ClassVar[set[str]] = set()
    most: ClassVar[list[int]] = []

    def reason(self, row):
        self.alive.add(row.id)
        weakref.finalize(row, self.alive.discard, row.id)
        self.most.append(len(self.alive))
        return "third" if row.id.endswith("-0") else None


def test_curation_holds_no_more_rows_than_go_into_a_few_shards_and_writes_what_one_that_holds_all_does(tmp_path):
    every = [make_row(f"{i} {j}", f"{i:03}?", id=f"{i:03}-{j}", reward=float(j)) for i in range(200) for j in range(3)]
    for name in ("a", "b"):  # the prompts' answers lie in both folders
        half = [row for row in every if (row.id[-1] == "1") == (name == "b")]
        shards.write_rows(tmp_path / name, funnel.funnel(half, ()), (), title=name)
    filters = (Crowd(), duplicates.NearDuplicatePrompts(), outcome.BestByReward(count=1))
    Curate(rows=(str(tmp_path / "a"), str(tmp_path / "b")), filters=filters, rows_per_shard=30).train(tmp_path / "kept")
    assert len(Crowd.most) == 600 and max(Crowd.most) <= 3 * 30
    shards.write_rows(tmp_path / "at-once", funnel.funnel(every, filters), filters, title="kept", rows_per_shard=30)
    once = {file.name: file.read_bytes() for file in (tmp_path / "at-once").iterdir()}
    assert data(tmp_path / "kept") == once and len(once) > 8


def test_where_nothing_is_kept_a_sentence_says_which_filter_it_was(generated, tmp_path):
    stage = Curate(rows=(str(generated),), filters=(outcome.Length(min_tokens=90, max_tokens=99),))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of \d+ rows was kept; Length dropped the most, \d+ of"):
            stage.train(tmp_path, one_device())
    assert len(shards.read_rows(tmp_path / "nothing-kept", "dropped")) == len(shards.read_rows(generated))


def test_pairs_are_made_of_the_same_generations(server, generated, tmp_path):
    Pair(rows=(str(generated),), pairing=curate.BestAndWorst()).train(tmp_path / "best")
    files = shards.paths(tmp_path / "best" / "pairs", "pairs")
    pairs = source.read(*files, parse=source.preference)
    for i in range(len(pairs)):
        task = pairs[i].prompt[0]["content"].split()[1]
        assert pairs[i].chosen[0]["content"] == task[::-1] != pairs[i].rejected[0]["content"]
    weak = Generate(**{**vars(remote(server)), "teachers": {"*": Endpoint(url=server.url, model="small")}})
    weak.train(tmp_path / "weak", one_device())
    delta = Pair(rows=(str(generated), str(tmp_path / "weak")), pairing=curate.Delta())
    with pytest.raises(ValueError, match="make no pair"):
        delta.train(tmp_path / "delta")  # the server answers the same whatever the model's name


def test_kept_rows_are_learned_from_with_their_tools(server, generated, tmp_path):
    plain = Rows(folders=(str(generated),)).open()[0]
    assert plain == (*(first := shards.read_rows(generated)[0]).prompt, *first.response)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    task = dataclasses.replace(Likes(domain="x")[0], metadata={"tools": (tool,)})
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}

    def reply(request):
        assert request["tools"] == [tool]
        made = completion(request)
        made["choices"][0]["message"] = {"content": "ok", "tool_calls": [call]}
        return made

    said = answers.judged_text({"role": "assistant", "reasoning_content": "so", "content": "ok", "tool_calls": [call]})
    assert tool_calls.calls(said) == [("add", {"x": 2})] and thought({"role": "assistant", "content": said}).thinking
    with serving(reply=reply) as with_tools:
        remote(with_tools, prompts=(Fixed((task,)),), rounds=1).train(tmp_path, one_device())
    [first, *_] = shards.read_rows(tmp_path)
    assert first.tools == (tool,) and first.response[0]["tool_calls"] == [call]
    found = Rows(folders=(str(tmp_path),)).open()[0]
    assert isinstance(found, chat.WithTools)
    template = "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}" + tokenizer.CHATML
    knowing = dataclasses.replace(tokenizer.tiny(), chat_template=template)
    batch = sft.batch(knowing, [found], length=64)
    assert knowing.decode(batch["tokens"][0].tolist()).startswith("add <|im_start|>")


def test_mixed_conversations_keep_to_their_cap(generated):
    rows = Rows(folders=(str(generated),))
    copies = conversations.Demonstrations(tasks=Characters(operation="copy", letters=5))
    mixed = conversations.Mixed(
        parts={"rows": rows, "copies": copies}, weights={"rows": 9, "copies": 1}, size=120, max_epochs=1
    ).open()
    assert isinstance(mixed, mixture.Bounded) and len(mixed) == 120
    assert mixed.epochs["rows"] == 1.0
    assert mixed.epochs["copies"] == (120 - len(rows.open())) / 125
    with pytest.raises(ValueError, match="180 items are wanted, and 1 epochs of .* take fewer"):
        dataclasses.replace(conversations.Mixed(parts={"c": copies}, weights={"c": 1}, size=180, max_epochs=1)).open()


def test_a_reward_model_chooses_among_rows_as_it_scores_rollouts(generated, tmp_path):
    mesh = one_device()
    checkpoint.save_model(tmp_path / "judge" / "model", open_scoring("tiny", mesh))
    source = RewardModels(models=(str(tmp_path / "judge"),))
    compute = Compute(row_tokens=64, micro_rows=8)
    scorer = ScoreRows(models=source.models, compute=compute)
    Curate(
        rows=(str(generated),), filters=(), scorer=scorer, best=(outcome.BestByReward(count=1),)
    ).train(tmp_path / "kept", mesh)  # fmt: skip
    rows, tok = shards.read_rows(tmp_path / "kept"), tokenizer.tiny()
    dropped = {row.id: row.reward or 0.0 for row in shards.read_rows(tmp_path / "kept", "dropped")}
    assert len(rows) == len({row.prompt_id for row in rows}) and dropped
    first = next(row for row in rows if any(row.prompt_id in id for id in dropped))
    assert first.reward is not None
    others = [value for id, value in dropped.items() if value is not None and first.prompt_id in id]
    assert first.reward == max([first.reward, *others])
    tokens = np.asarray([*tok.encode(str(first.response[0]["content"])), tok.eos_ids[0]])
    task = Characters(operation="reverse", letters=3)[0]
    prompt = chat.render(tok, first.prompt, add_generation_prompt=True)
    shared = {"task": task, "prompt": prompt, "reward": 0.0, "reason": "", "finish": "stop", "version": 0}
    alone = Rollout(tokens=tokens, logp=np.zeros(len(tokens), np.float32), **shared)
    score = source.open(tok, compute, mesh)
    np.testing.assert_allclose(score(checkpoint.open_model("tiny", mesh), [[alone]]), [first.reward], rtol=1e-4)
