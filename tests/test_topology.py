"""TPU slices by name: their chips, devices and speeds, and sentences for those that do not exist."""

import pytest

from posttrain.sharding import topology
from posttrain.sharding.topology import GENERATIONS, parse


@pytest.mark.parametrize(
    ("text", "name", "chips", "devices"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 64),
        ("v5p-128", "v5p:4x4x4", 64, 64),  # the name counts TensorCores
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v5litepod-64", "v5e:8x8", 64, 64),
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v6e-8", "v6e:2x4", 8, 8),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, 8),  # two devices a chip
    ],
)
def test_a_name_stands_for_a_slice(text, name, chips, devices):
    found = parse(text)
    assert (str(found), found.chips, found.devices) == (name, chips, devices)


@pytest.mark.parametrize(
    ("text", "hosts", "name"),
    [
        ("v4-8", 1, "v4-8"),
        ("v4-32", 4, "v4-32"),
        ("v5litepod-8", 1, "v5litepod-8"),  # a flat slice of up to eight chips is one host
        ("v6e:2x2", 1, "v6e-4"),
        ("v6e-16", 4, "v6e-16"),
        ("v5litepod-256", 64, "v5litepod-256"),
        ("v5p-128", 16, "v5p-128"),
        ("v5p:4x4x12", 48, ""),  # no name stands for it
        ("tpu7x:4x4x4", 16, ""),
    ],
)
def test_a_slice_has_hosts_and_a_name_in_the_cloud(text, hosts, name):
    found = parse(text, slices=2)
    assert (found.hosts_per_slice, found.accelerator_type) == (hosts, name)


def test_slices_multiply_chips_and_not_the_shape():
    found = parse("v5p:4x4x4", slices=64)
    assert (found.chips, found.devices_per_slice, found.slice_name) == (4096, 64, "v5p:4x4x4")
    assert str(found) == "64 x v5p:4x4x4"


def test_half_a_tpu7x_chip_is_a_device():
    found, chip = parse("tpu7x:2x2x1"), GENERATIONS["tpu7x"]
    assert (found.flops, found.hbm_bandwidth) == (chip.flops / 2, chip.hbm_bandwidth / 2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("v9:4x4", "unknown topology 'v9:4x4': give a generation \\(v4, v5e, v5p, v6e, tpu7x\\) with a shape"),
        ("", "unknown topology ''"),
        ("v5p:4x4", "a v5p slice has 3 sizes of at least 1, such as v5p:4x4x4"),
        ("v6e:4x4x4", "a v6e slice has 2 sizes"),
        ("v6e:0x4", "a v6e slice has 2 sizes"),
        ("v5p-100", "there is no accelerator 'v5p-100': choose one of v5p-8, v5p-16, "),
        ("v5p-7", "there is no accelerator 'v5p-7'"),
        ("tpu7x-8", "unknown topology 'tpu7x-8'"),
    ],
)
def test_what_does_not_exist_is_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(text)
    with pytest.raises(ValueError, match="--slices 0"):
        parse("v6e:4x4", slices=0)


def test_a_group_talks_over_the_axes_that_it_spans():
    cube = parse("v5p:4x4x4")
    everyone = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    link = cube.generation.link
    assert cube.ici(everyone) == 6 * link  # three rings
    assert cube.ici([(x, 0, 0) for x in range(4)]) == 2 * link  # one ring
    assert cube.ici([(x, 0, 0) for x in range(2)]) == link  # half of one is a line
    assert parse("v6e:8x8").ici([(x, y) for x in range(8) for y in range(8)]) == 2 * GENERATIONS["v6e"].link
    assert parse("v6e:16x16").ici([(x, 0) for x in range(16)]) == 2 * GENERATIONS["v6e"].link


def test_devices_of_one_chip_do_not_need_its_links():
    pair = parse("tpu7x:2x2x1")
    assert pair.ici([(0, 0, 0), (0, 0, 0)]) == pair.hbm_bandwidth
    assert topology.GENERATIONS["tpu7x"].devices_per_chip == 2
