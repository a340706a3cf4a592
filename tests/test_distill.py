"""Distillation: nothing to learn from oneself, each answer scored by its own domain's teacher, one at a time."""

import dataclasses
import functools
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import Likes

from posttrain.data import chat
from posttrain.data import tokenizer as tokenizers
from posttrain.data.characters import Characters
from posttrain.data.conversations import Demonstrations
from posttrain.data.endpoint import Client, Endpoint, EndpointError
from posttrain.data.pack import Example, Group, pack_groups
from posttrain.data.tasks import Mixture
from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, distill, metrics, score, step
from posttrain.train.compute import Compute
from posttrain.train.distill import Distill
from posttrain.train.losses import distill as losses
from posttrain.train.losses import masked
from posttrain.train.optimizer import AdamW
from posttrain.train.rollout import Rollout, retold
from posttrain.train.sft import SFT
from posttrain.train.teachers import Teachers
from posttrain.train.teaching import FullVocabulary, MiniLLM, SampledToken, SequenceLevel, TopK

CONFIG = configs.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64, context=32,
    tie_embeddings=True, init_std=0.2,
)  # fmt: skip
OBJECTIVES = {"full": FullVocabulary(chunk=24), "sampled": SampledToken()}
OTHERS = {
    "forward": FullVocabulary(beta=0.0, chunk=24),
    "jsd": FullVocabulary(beta=0.3, chunk=24),
    "top k": TopK(k=8, chunk=24),
    "minillm": MiniLLM(chunk=24),
}
COMPUTE = Compute(row_tokens=64, micro_rows=8, slots=64, save_every=100)


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


def model(seed):
    return jax.jit(lambda key: transformer.init(CONFIG, key))(jax.random.key(seed))


@pytest.fixture(scope="module")
def student():
    return model(0)


@pytest.fixture(scope="module")
def groups():
    """Ragged answers to five prompts, several to a row."""
    rng = np.random.default_rng(0)

    def answer(size):
        fields = {"advantage": rng.normal(), "behavior_logp": 0.0}
        return Example(tokens=rng.integers(0, 64, size), mask=np.ones(size), fields=fields)

    sizes = ((5, 1), (3,), (7, 2, 4), (6,), (1, 1))
    return [Group(prompt=rng.integers(0, 64, 1 + i), answers=list(map(answer, one))) for i, one in enumerate(sizes)]


def packed(groups, student):
    batch = dict(pack_groups(groups, length=24, rows=3, fields=("advantage", "behavior_logp")).batch)
    batch["behavior_logp"] = np.asarray(score.token_logp(CONFIG, student, batch))
    return jax.device_put(batch)


@functools.cache
def compiled(objective, temperature):
    loss = objective.loss(CONFIG, temperature=temperature)

    def run(params, batch, *constants):
        return step.make_accumulate(loss)(step.zero_sums(loss, params, batch, *constants), params, batch, *constants)

    return jax.jit(run)


def accumulate(objective, student, teacher, batch, temperature=1.0):
    fields = objective.teach(CONFIG, teacher, batch, temperature=temperature)
    return compiled(objective, temperature)(student, {**batch, **fields}, *objective.constants(teacher))


def size(tree):
    return max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", [*OBJECTIVES, *OTHERS])
def test_a_teacher_equal_to_the_student_teaches_nothing(name, student, groups):
    batch, objective = packed(groups, student), {**OBJECTIVES, **OTHERS}[name]
    assert len(np.unique(np.asarray(batch["segments"])[0])) > 4
    same = accumulate(objective, student, student, batch)
    other = accumulate(objective, student, model(1), batch)
    np.testing.assert_allclose([same.weight, other.weight], 9, rtol=1e-6)
    assert abs(float(same.metrics["kl"])) < 1e-5 and abs(float(other.metrics["kl"])) > 0.3
    assert abs(float(same.loss)) < 1e-5
    assert size(same.grads) < 1e-5 * size(other.grads)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_full_vocabulary_loss_from_hidden_states_is_the_kl_of_logits(temperature, student, groups):
    teacher, batch = model(1), packed(groups, student)

    def direct(student, batch):
        inputs = {"positions": batch["positions"], "segments": batch["segments"]}
        ours, theirs = (
            transformer.logits(CONFIG, params, transformer.apply(CONFIG, params, batch["tokens"], **inputs)[0])
            / temperature
            for params in (student, teacher)
        )
        return masked.sum(losses.reverse_kl(ours, theirs), masked.per_sequence(batch["mask"], batch["segments"]))

    value, gradient = jax.jit(jax.value_and_grad(direct))(student, batch)
    sums = accumulate(OBJECTIVES["full"], student, teacher, batch, temperature)
    np.testing.assert_allclose(sums.loss, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), sums.grads, gradient)


def test_the_sampled_token_loss_is_the_formula_on_every_token(student, groups):
    teacher, batch = model(1), packed(groups, student)
    logp, expert = (np.asarray(score.token_logp(CONFIG, params, batch)) for params in (student, teacher))
    objective = SampledToken(limit=2.0, outcome=0.5)
    behavior = logp - 0.1 * np.sign(np.arange(logp.size).reshape(logp.shape) % 3 - 1)
    sums = accumulate(objective, student, teacher, {**batch, "behavior_logp": jnp.asarray(behavior)})
    weight = np.asarray(masked.per_sequence(batch["mask"], batch["segments"]))
    advantage = np.clip(expert - logp, -2, 2) + 0.5 * np.asarray(batch["advantage"])
    assert np.any(np.abs(expert - logp)[weight > 0] > 2)
    np.testing.assert_allclose(sums.loss, np.sum(-np.exp(logp - behavior) * advantage * logp * weight), rtol=1e-4)


def test_minillm_without_a_horizon_and_a_single_step_is_sampled_token_distillation(student, groups):
    teacher, batch = model(1), packed(groups, student)
    sums = accumulate(MiniLLM(discount=0.0, single=0.0, chunk=24), student, teacher, batch)
    plain = accumulate(OBJECTIVES["sampled"], student, teacher, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sums.grads, plain.grads)


def test_a_teachers_weight_scales_its_gradient_and_not_the_divisor(student, groups):
    teacher, batch = model(1), packed(groups, student)
    plain = accumulate(OBJECTIVES["sampled"], student, teacher, batch)
    weighed = accumulate(
        OBJECTIVES["sampled"], student, teacher, {**batch, "teacher_weight": jnp.full_like(batch["mask"], 2.5)}
    )
    assert weighed.weight == plain.weight and weighed.metrics["kl"] == plain.metrics["kl"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2.5 * b, atol=1e-5), weighed.grads, plain.grads)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_answer_weighs_the_same_however_it_is_packed(name, student, groups):
    teacher = model(1)
    together = accumulate(OBJECTIVES[name], student, teacher, packed(groups, student))
    apart = [accumulate(OBJECTIVES[name], student, teacher, packed([group], student)) for group in groups]
    np.testing.assert_allclose(together.loss, sum(one.loss for one in apart), rtol=1e-5)
    np.testing.assert_allclose(together.weight, sum(one.weight for one in apart), rtol=1e-6)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(one.grads for one in apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), together.grads, summed)


class Recorded(Teachers):
    """Teachers that write down whose turn it is and how much the device holds then."""

    def __call__(self, domain):
        given = super().__call__(domain)
        LOG.append((domain, given[1]["final_norm"].sum(), on_device()))
        return given


LOG: list = []


def on_device():
    """Number of embeddings on devices, optimizer state and gradients included."""
    shape = transformer.abstract_params(checkpoint.open_config("tiny"))["embedding"].shape
    return sum(x.shape == shape and x.sharding.memory_kind == "device" for x in jax.live_arrays())


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two models that are neither each other nor the tiny one."""
    folder, tiny = tmp_path_factory.mktemp("experts"), checkpoint.open_model("tiny", one_device())
    for index, name in enumerate(("north", "south")):
        params = jax.tree.map(partial(jnp.multiply, 2.0 + index), tiny.params)
        checkpoint.save_model(folder / name / "model", tiny._replace(params=params))
    return {name: str(folder / name) for name in ("north", "south")}


def stage(experts, **settings):
    mixed = Mixture(sources=(Likes(domain="north"), Likes(domain="south")), weights=(1.0, 1.0), size=32)
    given = {"start": "tiny", "teachers": experts, "tasks": mixed, "steps": 2, "prompts": 6}
    given |= {"sampling": Sampling(max_tokens=5), "compute": COMPUTE, "optimizer": AdamW(learning_rate=1e-3)}
    return Distill(**{**given, **settings})


@pytest.fixture(scope="module")
def routed(experts, tmp_path_factory):
    """A run, and per domain the micro-batches that were added with its teacher's constants."""
    LOG.clear()
    added, patch = [], pytest.MonkeyPatch()
    patch.setattr(distill, "Teachers", Recorded)
    add = distill.Updater.add

    def recorded(self, sums, now, batch, *constants):
        added.append((batch, sums is None))
        return add(self, sums, now, batch, *constants)

    patch.setattr(distill.Updater, "add", recorded)
    folder = tmp_path_factory.mktemp("routed")
    stage(experts, objective=SampledToken()).train(folder / "run", one_device())
    patch.undo()
    return added, list(LOG), folder / "run"


def test_each_answer_is_scored_by_exactly_its_domains_teacher(routed, experts):
    added, turns, _ = routed
    config = COMPUTE.configure(checkpoint.open_config("tiny"))
    scores = {name: checkpoint.open_model(path, one_device()).params for name, path in experts.items()}
    assert [name for name, *_ in turns] == ["north", "south"] * 2 and len(added) == 4
    tokenizer = tokenizers.tiny()
    for (batch, first), (domain, *_) in zip(added, turns, strict=True):
        assert first == (domain == "north")
        text = tokenizer.decode(np.asarray(batch["tokens"])[np.asarray(batch["segments"]) > 0].tolist())
        assert [name for name in experts if name in text] == [domain]
        at = np.asarray(batch["mask"]) > 0
        given = {field: value for field, value in batch.items() if field != "teacher_logp"}
        for name, params in scores.items():
            logp = np.asarray(score.token_logp(config, params, given))
            gap = np.max(np.abs(logp - np.asarray(batch["teacher_logp"]))[at])
            assert (gap < 1e-4) == (name == domain), (name, domain, gap)


def test_one_teacher_at_a_time_is_on_the_device(routed):
    _, turns, _ = routed
    kept = {domain: norm for domain, norm, _ in turns}
    assert kept["north"] != kept["south"]
    # Parameters, both moments of Adam, one teacher; gradients too once the first domain is added.
    assert [count for *_, count in turns] == [4, 5, 4, 5]


def test_the_log_holds_the_distance_to_the_teachers(routed):
    lines = metrics.read(routed[2] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        np.testing.assert_allclose(line["weight"], 6, rtol=1e-6)
        assert line["kl"] > 0 and {"reward/north", "reward/south"} <= set(line)


def test_answers_mixed_with_a_teachers_are_weighed_by_the_students_share_of_them(experts, tmp_path):
    mixed = {"teacher_share": 0.2, "objective": MiniLLM(chunk=24), "steps": 1, "prompts": 4}
    stage(experts, **mixed).train(tmp_path, one_device())
    (line,) = metrics.read(tmp_path / "metrics.jsonl")
    # Of each token's probability at least 0.8 times the student's is in the mixture, so the ratio is at most 1.25.
    assert line["mismatch"] > 0.01 and line["mismatch_outside"] == 0
    drawn = [json.loads(text) for text in (tmp_path / "rollouts" / "000000.jsonl").read_text().splitlines()]
    assert {one["domain"] for one in drawn} == {"north", "south"}


def test_domains_without_a_teacher_and_teachers_of_other_tokens_are_refused(experts, tmp_path):
    with pytest.raises(ValueError, match="is of domain 'south' and teachers are for \\['north'\\]: add one"):
        stage({"north": experts["north"]}).train(tmp_path / "a", one_device())
    tiny = checkpoint.open_model("tiny", one_device())
    other = tokenizers.tiny()
    other.backend.add_special_tokens(["<|new|>"])
    checkpoint.save_model(tmp_path / "other" / "model", tiny._replace(tokenizer=other))
    given = {**experts, "south": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="teacher .*other has another tokenizer .* SequenceLevel and on_policy 0"):
        stage(given).train(tmp_path / "b", one_device())
    # Its answers are text, and text can be learned: the loss falls although no token is shared.
    whole = {"prompts": 8, "steps": 6, "sampling": Sampling(max_tokens=5, temperature=0.5)}
    stage(given, objective=SequenceLevel(), on_policy=0.0, **whole).train(tmp_path / "c", one_device())
    losses = [line["loss"] for line in metrics.read(tmp_path / "c" / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


def test_answers_of_another_tokenizer_become_the_tokens_that_training_text_has():
    ours, theirs = tokenizers.tiny(), tokenizers.tiny()
    theirs.backend.add_special_tokens(["<|new|>"])
    task = Likes(domain="north")[0]
    spoken = np.asarray([*theirs.encode("Yes, 3."), theirs.eos_ids[0]])
    answer = Rollout(
        task=task, prompt=[1], tokens=spoken, logp=np.ones(len(spoken), np.float32), reward=1.0, reason="",
        finish="stop", version=0,
    )  # fmt: skip
    (heard,) = retold([answer], theirs, ours)
    prompt = chat.render(ours, task.messages, add_generation_prompt=True)
    assert heard.prompt == prompt and ours.decode(heard.tokens[:-1].tolist(), skip_special=False) == "Yes, 3."
    assert heard.tokens[-1] in ours.eos_ids and not np.any(heard.logp)
    (cut,) = retold([dataclasses.replace(answer, tokens=spoken[:-1], finish="length")], theirs, ours)
    assert cut.tokens.tolist() == heard.tokens[:-1].tolist()
    assert retold([answer], theirs, theirs) == [answer]


def test_settings_that_do_not_fit_together_are_refused(experts):
    endpoint = Endpoint(url="http://127.0.0.1:1/v1", model="m")
    for message, settings in {
        "weights for \\['west'\\], and teachers are for": {"weights": {"west": 2.0}},
        "on_policy is 1.5: it is a share": {"on_policy": 1.5},
        "sequence-level distillation learns the teachers' answers; set it to 0": {"objective": SequenceLevel()},
        "SampledToken has a policy gradient": {"objective": SampledToken(), "on_policy": 0.5},
        "endpoints, which give log-probabilities": {"teachers": {"north": endpoint}},
        "teacher_share is 1.0: it is a part": {"teacher_share": 1.0},
        "cannot be mixed with the student's token by token": {"teachers": {"north": endpoint}, "teacher_share": 0.2},
    }.items():
        with pytest.raises(ValueError, match=message):
            stage(experts, **settings)


class Server(ThreadingHTTPServer):
    """What it serves, and how often it was asked."""

    served: Any = None
    asked = 0


class Served(BaseHTTPRequestHandler):
    """The echo of vLLM's completions, computed by a real model."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served, tokens = self.server.served, body["prompt"]
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        places = np.arange(128, dtype=np.int32)[None]
        segments = np.where(places < len(tokens), np.int32(1024), np.int32(0))
        batch = {"tokens": padded, "targets": np.roll(padded, -1, 1), "segments": segments, "positions": places}
        logp = np.asarray(score.token_logp(served.config, served.params, batch))[0]
        self.server.asked += 1
        state = 503 if self.server.asked == 2 else 200
        echoed = [None, *map(float, logp[: len(tokens) - 1]), -1.0]  # the last is of the token that was not asked for
        echoed = echoed[:1] if body["model"] == "short" else echoed
        choice = {"text": served.tokenizer.decode(tokens), "logprobs": {"token_logprobs": echoed}}
        reply = json.dumps({"choices": [choice]}).encode()
        self.send_response(state)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format, *args):
        """Say nothing."""


@pytest.fixture
def endpoint(experts):
    """The north expert behind a server, which fails once."""
    server = Server(("127.0.0.1", 0), Served)
    server.served = checkpoint.open_model(experts["north"], one_device())
    server.served = server.served._replace(config=COMPUTE.configure(server.served.config))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Endpoint(url=f"http://127.0.0.1:{server.server_address[1]}/v1", model="north", concurrency=2, pause=0.0)
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_teacher_behind_an_endpoint_teaches_what_the_same_checkpoint_does(endpoint, experts, tmp_path):
    given = {"tasks": Likes(domain="north"), "prompts": 3, "objective": SampledToken()}
    for name, teacher in (("near", experts["north"]), ("far", endpoint)):
        stage({"north": teacher}, **given).train(tmp_path / name, one_device())
    near, far = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("near", "far"))
    for a, b in zip(near, far, strict=True):
        np.testing.assert_allclose([a["kl"], a["loss"], a["reward"]], [b["kl"], b["loss"], b["reward"]], rtol=1e-3)
    with pytest.raises(EndpointError, match="gives 1 log-probabilities for 2 tokens: it must support echo"):
        Client(dataclasses.replace(endpoint, model="short")).echo([5, 6])


def test_an_outcome_advantage_needs_two_answers(experts):
    with pytest.raises(ValueError, match="outcome weight of 0.5 needs at least 2 samples to a prompt, not 1"):
        stage(experts, objective=SampledToken(outcome=0.5))
    assert stage(experts, objective=FullVocabulary(outcome=0.5), samples=2).samples == 2


@pytest.mark.parametrize("objective", [FullVocabulary(), SampledToken()], ids=["full", "sampled"])
def test_a_student_recovers_its_teachers_gain(objective, graduates, tmp_path):
    tasks, before, teacher = graduates
    given = {"tasks": tasks, "teachers": {"copy": teacher}, "start": before, "steps": 40, "prompts": 48}
    stage({}, **given, objective=objective).train(tmp_path / "run", one_device())
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    reward, kl = ([line[name] for line in lines] for name in ("reward", "kl"))
    # Seen: rewards 0.27 -> 0.99 (full) and 0.92 (sampled), KL 2.6 -> 0.01 and 0.2; the teacher earns 1.0.
    assert np.mean(reward[-5:]) > np.mean(reward[:5]) + 0.4
    assert np.mean(kl[-5:]) < 0.3 * np.mean(kl[:5])


@pytest.fixture(scope="module")
def graduates(tmp_path_factory):
    """Tasks, a model that has learned some of them, and the same after more lessons."""
    folder, tasks = tmp_path_factory.mktemp("graduates"), Characters(operation="copy", length=2, letters=4)
    for name, start, steps in (("before", "tiny", 30), ("teacher", str(folder / "before"), 60)):
        lessons = SFT(
            start=start, data=Demonstrations(tasks=tasks), steps=steps, batch_size=16, compute=COMPUTE,
            optimizer=AdamW(learning_rate=2e-3, warmup_steps=5),
        )  # fmt: skip
        lessons.train(folder / name, one_device())
    return tasks, str(folder / "before"), str(folder / "teacher")
