"""The engine draws from the trainer's own distribution, whatever slot, batch, order or mesh computes an answer."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.data.pack import Example, Group, pack_groups, unpack
from posttrain.model import config as configs
from posttrain.model import decoding, sample, transformer
from posttrain.model.processing import Sampling
from posttrain.model.sample import Noise
from posttrain.model.speaker import Mixed
from posttrain.sharding import mesh as meshes

CONFIG = configs.ModelConfig(
    vocab_size=90, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, context=40,
    tie_embeddings=True, init_std=0.3,
)  # fmt: skip
STOPS = (3, 14, 15, 35, 65, 79, 89)
SAMPLING = Sampling(max_tokens=7, stop_ids=STOPS)
SAMPLES = 2


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: transformer.init(CONFIG, key))(jax.random.key(5))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, size).tolist() for size in (1, 9, 4, 16, 5)]


@pytest.fixture(scope="module")
def answers(params, prompts):
    return generate(params, prompts)


def generate(params, prompts, *, sampling=SAMPLING, num_samples=SAMPLES, noise=None, **settings):
    noise = noise or Noise(seed=11, step=2)
    return sample.generate(CONFIG, params, prompts, num_samples=num_samples, sampling=sampling, noise=noise, **settings)


def same(left, right):
    """Equal tokens and endings, and log-probabilities as equal as floating point allows."""
    flat = [[answer for group in groups for answer in group] for groups in (left, right)]
    assert len(flat[0]) == len(flat[1])
    for one, other in zip(*flat, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.finish == other.finish
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


def trainer_logp(params, prompts, answers, temperature):
    """Log-probabilities of all answers, group by group, as the trainer's packed rows give them."""
    groups = [
        Group(prompt=prompt, answers=[Example(tokens=a.tokens, mask=np.ones(len(a.tokens))) for a in group])
        for prompt, group in zip(prompts, answers, strict=True)
    ]
    batch, spans = pack_groups(groups, length=32, rows=6)

    @jax.jit
    def score(params, batch):
        hidden, _ = transformer.apply(
            CONFIG, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
        )
        return transformer.token_logp(CONFIG, params, hidden, batch["targets"], temperature=temperature)

    return unpack(np.asarray(score(params, batch)), spans)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainers(params, prompts, temperature):
    sampling = Sampling(max_tokens=7, stop_ids=STOPS, temperature=temperature)
    answers = generate(params, prompts, sampling=sampling)
    expected = trainer_logp(params, prompts, answers, temperature)
    flat = [answer for group in answers for answer in group]
    assert len({len(answer.tokens) for answer in flat}) > 2
    for answer, logp in zip(flat, expected, strict=True):
        np.testing.assert_allclose(answer.logp, logp, atol=1e-5)


def test_the_temperature_matters_to_that_comparison(params, prompts, answers):
    tempered = np.concatenate(trainer_logp(params, prompts, answers, 0.7))
    assert np.max(np.abs(tempered - np.concatenate([a.logp for group in answers for a in group]))) > 0.1


@pytest.mark.parametrize("slots", [2, 3])
def test_answers_do_not_depend_on_the_number_of_slots(params, prompts, answers, slots):
    same(generate(params, prompts, slots=slots), answers)


def test_answers_do_not_depend_on_their_company(params, prompts, answers):
    for index in (4, 1):
        noise = Noise(seed=11, step=2, first_row=index * SAMPLES)
        same(generate(params, [prompts[index]], noise=noise, slots=2), [answers[index]])


def test_more_samples_than_slots_are_the_samples_of_many_slots(params, prompts):
    few = generate(params, prompts[1:3], num_samples=5, slots=2)
    same(few, generate(params, prompts[1:3], num_samples=5, slots=10))
    assert [len(group) for group in few] == [5, 5]


def test_seed_step_and_row_each_change_the_noise(params, prompts):
    def draw(**noise):
        groups = generate(params, [prompts[1]], noise=Noise(**noise), slots=2)
        return [tuple(answer.tokens) for answer in groups[0]]

    first = draw(seed=1, step=1)
    assert draw(seed=1, step=1) == first
    drawn = [first[0], first[1], draw(seed=2, step=1)[0], draw(seed=1, step=2)[0], draw(seed=2, step=2)[0]]
    assert len(set(drawn)) == 5
    assert draw(seed=1, step=1, first_row=1)[0] == first[1]


def test_greedy_answers_are_the_argmax_of_full_forwards(params, prompts):
    sampling = Sampling(max_tokens=7, temperature=0.0, stop_ids=STOPS)

    @jax.jit
    def scores(params, tokens, length):
        at = jnp.arange(32)[None]
        hidden, _ = transformer.apply(
            CONFIG, params, tokens, positions=at, segments=jnp.where(at < length, 1024, 0).astype(jnp.int32)
        )
        return jax.nn.log_softmax(transformer.logits(CONFIG, params, hidden[:, length - 1][:, None])[0, 0])

    for prompt, (answer,) in zip(prompts, generate(params, prompts, sampling=sampling, num_samples=1), strict=True):
        text = list(prompt)
        for token, logp in zip(answer.tokens, answer.logp, strict=True):
            expected = scores(params, np.asarray([text + [0] * (32 - len(text))], np.int32), len(text))
            assert token == np.argmax(expected)
            np.testing.assert_allclose(logp, expected[token], atol=1e-5)
            text.append(int(token))


def test_the_stop_token_is_kept_and_a_cut_answer_says_so(answers):
    flat = [answer for group in answers for answer in group]
    assert {answer.finish for answer in flat} == {"stop", "length"}
    for answer in flat:
        assert not set(answer.tokens[:-1]) & set(STOPS)
        assert (answer.finish == "stop") == (answer.tokens[-1] in STOPS)
        assert len(answer.tokens) == 7 or answer.finish == "stop"
        assert len(answer.logp) == len(answer.tokens)


def test_other_prompt_lengths_and_numbers_of_a_bucket_compile_nothing(params, prompts, answers):
    compiled = decoding.admit._cache_size(), decoding.decode._cache_size(), decoding.start._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    generate(params, [prompt + [1] * (16 - len(prompt)) for prompt in prompts], noise=Noise(seed=3))
    generate(params, [*prompts[::-1], [5, 6, 7]])
    assert (decoding.admit._cache_size(), decoding.decode._cache_size(), decoding.start._cache_size()) == compiled  # pyright: ignore[reportAttributeAccessIssue]


def test_the_cache_is_allocated_once_and_updated_in_place(params, prompts, monkeypatch):
    starts, states, decode = [], [], decoding.decode
    start = decoding.start
    monkeypatch.setattr(decoding, "start", lambda *args: starts.append(start(*args)) or starts[-1])
    monkeypatch.setattr(decoding, "decode", lambda *args: states.append(args[3]) or decode(*args))
    generate(params, prompts, slots=2)
    assert len(starts) == 1 and len(states) > 3
    assert all(leaf.is_deleted() for state in (*starts, *states) for leaf in jax.tree.leaves(state.cache))


@pytest.mark.parametrize("split", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_eight_devices_say_what_one_says_with_the_cache_split_over_them(params, prompts, answers, split, monkeypatch):
    mesh = meshes.make_mesh(**{"fsdp": 1, **split})
    sharded = jax.device_put(params, transformer.shardings(CONFIG, mesh))
    caches, decode = [], decoding.decode

    def look(*args):
        caches.append([(x.shape, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(args[3].cache)])
        return decode(*args)

    monkeypatch.setattr(decoding, "decode", look)
    same(generate(sharded, prompts, mesh=mesh), answers)
    tensor = split.get("tensor", 1)
    for whole, part in caches[0] + caches[-1]:
        assert part == (whole[0] * tensor // 8, whole[1] // tensor, *whole[2:])


def test_no_device_is_sent_the_keys_of_prompts_that_others_computed():
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    sharded = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        transformer.abstract_params(CONFIG), transformer.shardings(CONFIG, mesh),
    )  # fmt: skip
    prefill = sample.programs(CONFIG, sharded, SAMPLING, slots=16, group=2, prompt_tokens=16, mesh=mesh)["prefill"]
    with jax.set_mesh(mesh):
        text = prefill.function.lower(*prefill.static, *prefill.arguments).compile().as_text()
    sent = re.findall(r" = \w+\[([\d,]+)\]\S* all-(?:gather|to-all|reduce)\(", text)
    shapes = [tuple(map(int, shape.split(","))) for shape in sent]
    prompts, width = prefill.arguments[3].shape
    assert any(math.prod(shape) > CONFIG.vocab_size for shape in shapes)  # it does find what devices exchange
    keys = prompts * CONFIG.num_kv_heads * width * CONFIG.head_dim
    assert max(map(math.prod, shapes)) < keys


def test_errors_name_the_prompt_and_the_numbers(params):
    with pytest.raises(ValueError, match="prompt 1 has 34 tokens, which with 7 new ones exceeds .* context of 40"):
        generate(params, [[1], [1] * 34])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(params, [[]])
    with pytest.raises(ValueError, match="9 stop ids, at most 8"):
        generate(params, [[1]], sampling=Sampling(max_tokens=1, stop_ids=tuple(range(9))))
    assert generate(params, []) == []


def test_tokens_of_a_student_mixed_with_its_teacher_are_drawn_from_the_mixture_of_their_distributions(params, prompts):
    teacher = jax.jit(lambda key: transformer.init(CONFIG, key))(jax.random.key(6))
    mixed = Mixed(student=CONFIG, teacher=CONFIG, teacher_share=0.3)
    sampling, noise = Sampling(max_tokens=7, temperature=0.7, stop_ids=STOPS), Noise(seed=1)
    found = sample.generate(mixed, (params, teacher), prompts, num_samples=SAMPLES, sampling=sampling, noise=noise)
    own, theirs = (trainer_logp(one, prompts, found, 0.7) for one in (params, teacher))
    flat = [answer for group in found for answer in group]
    for answer, student, taught in zip(flat, own, theirs, strict=True):
        np.testing.assert_allclose(answer.logp, np.log(0.7 * np.exp(student) + 0.3 * np.exp(taught)), atol=1e-4)
    assert max(np.max(np.abs(a.logp - b)) for a, b in zip(flat, own, strict=True)) > 0.1
    with pytest.raises(ValueError, match="90 tokens and the teacher 91: distributions over different vocabularies"):
        Mixed(student=CONFIG, teacher=CONFIG.replace(vocab_size=91), teacher_share=0.3)
