"""The byte-level BPE tokenizer inside a GGUF file's metadata."""

from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# Token types of the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
CONTROL = 3
USER_DEFINED = 4

# Splitting rules as in the tokenizer.json that the families publish.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def read_metadata(path: Path) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file as Python values."""
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


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
