"""Several hosts that run one program: who writes, where they wait for each other, and work divided among them.

A host is a process of `jax.distributed`. With one process everything here is the identity.
"""

import itertools
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the service that processes find each other by; JAX exports no way to ask it
from jax.experimental import multihost_utils

T = TypeVar("T")

WAIT_SECONDS = 3600
"""How long hosts wait for one that is late; a host that died or hangs is noticed long before."""

_barriers = itertools.count()


def is_first() -> bool:
    """Whether this host is the one that writes logs, reports and progress bars."""
    return jax.process_index() == 0


def name() -> str:
    """What messages call this host, such as `host 2 (t1v-n-1234-w-2)`."""
    return f"host {jax.process_index()} ({socket.gethostname()})"


def client() -> Any:
    """JAX's connection to the coordinator: keys, values and barriers over the network, without the devices."""
    return distributed.global_state.client


def barrier() -> None:
    """Wait until every host is here. All hosts must meet at the same barriers in the same order."""
    if jax.process_count() > 1:
        client().wait_at_barrier(f"posttrain/barrier/{next(_barriers)}", WAIT_SECONDS * 1000)


def gathered(value: Any) -> list[Any]:
    """Every host's value (plain JSON), in the order of the hosts, the same on all."""
    if jax.process_count() == 1:
        return [value]
    barrier()  # a collective of processes that come too far apart fails on CPUs
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray(text.size, np.int32)))
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # powers of two: few shapes to compile
    padded[: text.size] = text
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes.reshape(-1), strict=True)]


def from_first(read: Callable[[], T]) -> T:
    """What the first host reads (plain JSON), on all: of a disk that they share another may see more, or less."""
    return gathered(read() if is_first() else None)[0]


def share(items: Sequence[T]) -> Sequence[T]:
    """This host's part of work on `items`: parts are consecutive, and equal but for the last."""
    size = -(-len(items) // jax.process_count())
    return items[jax.process_index() * size : (jax.process_index() + 1) * size]


def together(results: Sequence[Any]) -> list[Any]:
    """What all hosts made of their shares (plain JSON), in the order of the items, the same on all."""
    return [result for part in gathered(list(results)) for result in part]
