"""What the compiler for TPUs, which needs no TPU, makes of the kernels and of a train step."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import compiled_for_tpu
import pytest

from posttrain.launch import flags

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
CONFIG = compiled_for_tpu.CONFIG
KERNELS = compiled_for_tpu.KERNELS


@pytest.fixture(scope="module")
def compiled():
    script = Path(compiled_for_tpu.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("generation", compiled_for_tpu.GENERATIONS)
def test_the_attention_kernels_compile_for(compiled, generation, dim):
    assert compiled["kernels"][f"{generation} {dim}"] == KERNELS


@pytest.mark.parametrize("generation", [*compiled_for_tpu.GENERATIONS, "v4"])
def test_every_preset_of_flags_is_one_that_the_compiler_takes_for(compiled, generation):
    found = compiled["presets"][generation]
    assert found and set(found.values()) == {""}


def test_a_preset_that_a_compiler_refuses_is_not_offered_with_it():
    assert flags.options("fused", "v5e", "0.0.50.1") == flags.options("fused", "v5p", "0.0.42.1")
    with pytest.raises(ValueError, match="no such preset for v5p with libtpu 0.0.50.1; there are vmem, overlap"):
        flags.options("fused", "v5p", "0.0.50.1")
    with pytest.raises(ValueError, match="there is no TPU here; leave it out"):
        flags.use("vmem")


def test_a_step_compiled_for_a_tpu_attends_with_the_kernels(compiled):
    assert compiled["step"]["kernels"] == KERNELS + 1, "the forward kernel runs once more in the backward pass"


def test_a_device_holds_neither_its_rows_logits_nor_a_whole_embedding(compiled):
    """It looks up its own columns, and gathers the head piece by piece."""
    whole = CONFIG.vocab_size * CONFIG.embed_dim
    assert CONFIG.num_layers * CONFIG.embed_dim * CONFIG.mlp_dim / 4 < compiled["step"]["largest"] < whole


def test_outside_the_layers_devices_exchange_activations_and_no_parameter(compiled):
    outside = compiled["step"]["outside"]
    assert outside and max(outside) <= CONFIG.context * CONFIG.embed_dim < CONFIG.embed_dim * CONFIG.mlp_dim


def test_parameters_moments_and_gradients_are_split_over_the_devices(compiled):
    step = compiled["step"]
    state = 12 * CONFIG.num_params / step["devices"]
    assert state <= step["arguments"] < 1.05 * state
