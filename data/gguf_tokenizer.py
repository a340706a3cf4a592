"""The byte-level BPE tokenizer inside a GGUF file's metadata."""

import mmap
import struct
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# Token types of the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
CONTROL = 3
USER_DEFINED = 4

# Value types of the same, and how struct spells them.
SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
STRING = 8
ARRAY = 9

# Splitting rules as in the tokenizer.json that the families publish.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file as Python values, by key.

    gguf.GGUFReader gives the same and takes seconds for it, with two arrays made for each of 100,000 strings.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        try:
            return _read(view)
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged or not a GGUF file ({error!r}); download it again") from error


def _read(view: mmap.mmap) -> dict[str, Any]:
    """https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, two counts, then key, type, value."""
    magic, version, _, num_pairs = struct.unpack_from("<4sIQQ", view)
    if magic != b"GGUF" or version not in (2, 3):
        raise struct.error(f"it starts with {magic!r}, version {version}")
    place = struct.calcsize("<4sIQQ")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key, place = _string(view, place)
        (kind,) = struct.unpack_from("<I", view, place)
        metadata[key], place = _value(view, place + 4, kind)
    return metadata


def _string(view: mmap.mmap, place: int) -> tuple[str, int]:
    end = place + 8 + int.from_bytes(view[place : place + 8], "little")
    if end > len(view):
        raise struct.error(f"a string of {end - place - 8} bytes in a file of {len(view)}")
    return view[place + 8 : end].decode("utf-8"), end


def _value(view: mmap.mmap, place: int, kind: int) -> tuple[Any, int]:
    if kind == STRING:
        return _string(view, place)
    if kind != ARRAY:
        (value,) = struct.unpack_from(SCALARS[kind], view, place)
        return value, place + struct.calcsize(SCALARS[kind])
    inner, count = struct.unpack_from("<IQ", view, place)
    place += struct.calcsize("<IQ")
    if inner in SCALARS:
        form = f"<{count}{SCALARS[inner][1]}"
        return list(struct.unpack_from(form, view, place)), place + struct.calcsize(form)
    values = []
    for _ in range(count):
        value, place = _value(view, place, inner)
        values.append(value)
    return values, place


def build(metadata: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    """The tokenizer that the metadata of the GGUF file `path` describes.

    Raises ValueError naming the tokenizer model or the pre-tokenizer if it is not one of those known here.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(
            f"{path} holds a tokenizer of the kind {model!r} and only byte-level BPE ('gpt2') is read; "
            "convert it to a Hugging Face directory with tokenizer.json"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    normalizer, splitter, ignore_merges = _pre_tokenizer(pre, path)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    control = [token for token, kind in kinds if kind == CONTROL]
    defined = [token for token, kind in kinds if kind == USER_DEFINED]
    # A token that the vocabulary already has keeps its id.
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in defined])
    return backend


def _pre_tokenizer(
    name: str | None, path: Path
) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer, bool]:
    """Normalizer, pre-tokenizer, and whether a word that is in the vocabulary skips the merges."""
    match name:
        case "gpt-2":
            return None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), False
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            return None, pre_tokenizers.Sequence([digits, words]), False
        case "llama-bpe":
            return None, _split(LLAMA3), True
        case "qwen2":
            return normalizers.NFC(), _split(QWEN2), False
    raise ValueError(
        f"{path} names the pre-tokenizer {name!r} and only gpt-2, smollm, llama-bpe and qwen2 are known; "
        "convert the model to a Hugging Face directory with tokenizer.json"
    )


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    splitter = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
