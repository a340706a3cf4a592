"""Plans: every program of every stage compiles for every TPU generation, and the sums agree with the compiler's."""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_stages import STAGES

from posttrain.launch import compiled, cost, plan_page
from posttrain.launch.commands import plan as command
from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint

needs_compiler = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu exists for Linux on x86-64")
HERE = Path(__file__).parent
CACHE = HERE.parent / ".jax_cache" / "tpu"
TARGETS = [("v5e:2x2", 1), ("v4:2x2x1", 1), ("v5p:2x2x1", 1), ("v6e:2x2", 1), ("tpu7x:2x2x1", 1), ("v5e:2x2", 2)]


@pytest.fixture(scope="session")
def plans():
    """What tpu_programs.py prints for every target, two processes at a time."""

    def one(target):
        words = [sys.executable, str(HERE / "tpu_programs.py"), target[0], str(target[1]), str(CACHE)]
        environment = compiled.environment(os.environ)
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(TARGETS, pool.map(one, TARGETS), strict=True))
    for target, process in done.items():
        assert process.returncode == 0, (target, process.stderr[-4000:])
    return {target: json.loads(process.stdout.splitlines()[-1]) for target, process in done.items()}


@needs_compiler
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[1]}x{target[0]}")
def test_every_program_of_every_stage_compiles_and_fits(plans, target):
    stages = plans[target]["stages"]
    assert len(stages) == len(STAGES)
    for stage, programs in stages.items():
        assert bool(programs) != stage.endswith(("Convert", "Curate", "Pair", "OverSeeds")), stage
        for name, one in programs.items():
            assert one["fits"] and 0 < one["memory"]["needed"] < one["memory"]["available"], (stage, name)
            assert one["bytes"] > 0 and one["seconds"] > 0 and one["calls"] > 0, (stage, name)
            assert (one["flops"] > 0) == (name.split()[-1] not in ("update", "merge", "decoder")), (stage, name)
            assert one["mfu"] is None or 0 < one["mfu"] < 1, (stage, name)


@needs_compiler
def test_flops_and_bytes_are_the_compilers_where_no_loop_hides_them(plans):
    found = plans[TARGETS[0]]["unrolled"]
    ours, theirs = found["flops"]
    assert ours == pytest.approx(theirs, rel=0.05)
    ours, theirs = found["bytes"]
    assert ours == pytest.approx(theirs, rel=0.05)


@needs_compiler
def test_arguments_take_the_memory_that_the_compiler_says(plans):
    ours, theirs = plans[TARGETS[0]]["unrolled"]["arguments"]
    assert ours == pytest.approx(theirs, rel=0.05)


@needs_compiler
def test_collectives_in_a_loop_over_layers_count_once_a_layer(plans):
    two, six = (plans[TARGETS[0]]["layers"][layers] for layers in ("2", "6"))
    per_layer = (sum(times * size for _, times, size in found) for found in (two, six))
    first, second = per_layer
    ends = first - (second - first) / 4 * 2  # what does not grow with the layers
    assert ends >= 0 and second - first > 0
    repeated = {times for _, times, _ in six if times > 1}
    assert 6 in repeated


@needs_compiler
def test_gradients_cross_the_slices_and_nothing_else_does_in_one(plans):
    def across(target):
        rows = plans[target]["stages"]["0 SFT"]["gradients"]["collectives"]
        return sum(one["bytes"] for one in rows if one["network"] == "DCN")

    assert across(("v5e:2x2", 1)) == 0
    params = sum(x.size for x in jax.tree.leaves(transformer.abstract_params(checkpoint.open_config("tiny"))))
    assert across(("v5e:2x2", 2)) > params / 4 * 2  # at least a shard of them, in bfloat16


@needs_compiler
def test_what_does_not_fit_says_what_it_wants(plans):
    found = plans[TARGETS[0]]["too large"]
    assert not found["fits"] and found["seconds"] is None and found["bound"] == "memory"
    assert found["memory"]["needed"] > 64 * 2**30
    assert any("GiB of HBM and a device has 15.8: use more chips" in warning for warning in found["warnings"])


@needs_compiler
def test_what_a_donated_argument_leaves_to_the_result_counts_once(plans):
    weights, saved = 4 * 4096 * 4096, 4 * 8192 * 4096
    by_hand = 4 * weights + 4 * weights + 2 * weights + 2 * saved  # float32 with gradient, a bfloat16 copy, the inputs
    stream = 2 * 8192 * 4096  # one at a time beside them, and the argument
    assert by_hand <= plans[TARGETS[0]]["donated"]["needed"] <= by_hand + 3 * stream


def test_matrix_products_are_counted_through_loops_branches_and_derivatives():
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    one = 2 * 8 * 16 * 16

    def layers(x, w):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    def flops(f, *args, trips=1):
        return cost.matmul_flops(jax.make_jaxpr(f)(*args), trips=trips)

    assert flops(layers, x, w) == 5 * one
    assert flops(jax.jit(layers), x, w) == 5 * one
    assert flops(jax.grad(lambda w, x: layers(x, w).sum()), w, x) in (14 * one, 15 * one)
    remat = jax.checkpoint(lambda c, w: jnp.tanh(c @ w) @ w)
    assert flops(jax.grad(lambda c, w: remat(c, w).sum()), x, jax.ShapeDtypeStruct((16, 16), x.dtype)) >= 5 * one
    batched = jax.ShapeDtypeStruct((3, 8, 16), jnp.float32), jax.ShapeDtypeStruct((3, 16, 4), jnp.float32)
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *batched) == 2 * 3 * 8 * 16 * 4
    square = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    turning = lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)  # noqa: E731
    assert flops(turning, square, trips=7) == 7 * 2 * 16**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)  # noqa: E731
    assert flops(branch, square) == 2 * 2 * 16**3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--topology", "v9:4x4"], "posttrain: unknown topology 'v9:4x4'"),
        (["--topology", "v5e:2x2", "--mesh", "fsdp=3"], "needs 3 devices, there are 4: change the sizes"),
        (["--topology", "v5e:2x2", "--mesh", "rows=2"], "posttrain: --mesh 'rows=2': give AXIS=SIZE"),
        (["--topology", "v5e:2x2", "--chips-per-host", "big"], "posttrain: --chips-per-host 'big'"),
        (["--topology", "v5e:2x2", "--slices", "2", "--mesh", "data=1"], "does not divide over 2 slices"),
    ],
)
@needs_compiler
def test_a_wrong_request_is_one_sentence(words, sentence, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.launch.cli", "plan", "sft", "--model", "tiny", *words, "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_a_compiler_that_is_missing_or_another_is_one_sentence(monkeypatch):
    def missing(name):
        raise compiled.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiled.metadata, "requires", lambda _: ["libtpu==0.0.42.*; extra == 'tpu'"])
    monkeypatch.setattr(compiled.metadata, "version", missing)
    with pytest.raises(ImportError, match="^planning needs the TPU compiler: run `pip install libtpu==0.0.42.\\*`$"):
        compiled.check_compiler()
    monkeypatch.setattr(compiled.metadata, "version", lambda _: "0.0.4")
    with pytest.raises(ImportError, match="^libtpu 0.0.4 does not go with jax .*: run `pip install libtpu==0.0.42"):
        compiled.check_compiler()


def test_published_shapes_open_without_weights_and_only_without():
    assert checkpoint.open_config("llama3.1-8b").num_params == 8_030_261_248
    assert checkpoint.open_config("llama3.1-70b").num_params == 70_553_706_496
    assert checkpoint.open_config("qwen2.5-32b").num_params == pytest.approx(32_763_876_352, rel=1e-4)
    with pytest.raises(FileNotFoundError, match="'llama3.1-8b' is a shape without weights"):
        checkpoint.open_model("llama3.1-8b", meshes.make_mesh())
    assert set(configs.PUBLISHED) == {"llama3.1-8b", "qwen2.5-32b", "llama3.1-70b", "qwen3-30b-a3b"}


@needs_compiler
def test_a_recipe_is_planned_from_the_command_line(tmp_path):
    words = ["plan", "sft", "--model", "tiny", "--row-tokens", "64", "--topology", "v5e:1x1", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.launch.cli", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["chips"] == 1
    (stage,) = found["stages"]
    assert set(stage["programs"]) == {"gradients", "update"}
    assert "fits; at least" in done.stdout and "gradients" in done.stdout
    page = (tmp_path / "plan.html").read_text()
    assert plan_page.verdict(found) in page and "gradients" in page
    assert command.axes("fsdp=4,tensor=2") == {"fsdp": 4, "tensor": 2}
