"""Writing to pipes that take a part at a time."""

import os


def write(descriptor: int, data: bytes) -> None:
    """All the bytes, however many the pipe takes at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
