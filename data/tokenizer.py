"""Text to tokens and back: a Hugging Face directory, a GGUF file, or a tiny byte-level tokenizer made on the spot."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from . import gguf_tokenizer, template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    `eos_ids` holds every token that ends a response: `eos_id`, and the end of turn that the chat template writes.
    """

    backend: tokenizers.Tokenizer
    eos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None = None
    unk_id: int | None = None
    chat_template: str | None = None

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id. A model's embedding may be padded beyond it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges, special tokens and chat template: equal if and only if ids mean the same."""
        content = json.loads(self.backend.to_str())
        model = content["model"]
        merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model.get("merges", [])]
        added = [(token["id"], token["content"], token["special"]) for token in content["added_tokens"]]
        vocab = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        parts = [vocab, merges, sorted(added), sorted(self.eos_ids), self.chat_template]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens by their text, such as `<|im_end|>`."""
        return {
            token.content: index for index, token in self.backend.get_added_tokens_decoder().items() if token.special
        }

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        added = [token for token in self.backend.get_added_tokens_decoder().values() if token.special]
        added.sort(key=lambda token: len(token.content), reverse=True)
        found = [
            (r"\s*" if token.lstrip else "") + f"({re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
            for token in added
        ]
        return re.compile("|".join(found) if found else r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text: nothing is prepended, and `<|im_end|>` in the text is six ordinary characters or so.

        This is for text from people and data sets, which must not be able to write control tokens.
        """
        return self._literal.encode(text, add_special_tokens=False).ids

    def encode_with_specials(self, text: str) -> list[int]:
        """Tokens of trusted text, in which the names of special tokens stand for them. Nothing is prepended."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Like encode_with_specials, but a name with `mark` inside is plain text; the marks themselves are removed."""
        if mark not in text:
            return self.encode_with_specials(text)
        ids, start = [], 0
        for match in self._special_pattern.finditer(text):
            ids += self.encode(text[start : match.start()].replace(mark, ""))
            ids.append(self.special_tokens[match[match.lastindex or 0]])
            start = match.end()
        return ids + self.encode(text[start:].replace(mark, ""))

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def special_variables(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... by name, as chat templates and tokenizer_config.json call them."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "unk_token": self.unk_id}
        texts = {name: self.backend.id_to_token(index) for name, index in ids.items() if index is not None}
        return {name: text for name, text in texts.items() if text is not None}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a directory that `load` and transformers.AutoTokenizer read: tokenizer.json, its config, the template.

        The stop tokens go into generation_config.json, where inference engines look for them.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            **self.special_variables(),
        }
        _write_json(folder / "tokenizer_config.json", config)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        generation: dict[str, Any] = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        if self.bos_id is not None:
            generation["bos_token_id"] = self.bos_id
        _write_json(folder / "generation_config.json", generation)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a Hugging Face directory (tokenizer.json and its config) or of a GGUF file."""
    location = Path(path)
    if location.is_file() and location.suffix == ".gguf":
        return _from_gguf(location)
    if not (location / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{location} is neither a .gguf file nor a directory with tokenizer.json; give the path of one or the other"
        )
    return _from_directory(location)


def tiny() -> Tokenizer:
    """A byte-level tokenizer of 267 tokens with ChatML markers and no default system prompt, for smoke runs.

    The names of the roles are tokens too, which makes a short conversation a third shorter.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    added = ["<think>", "</think>", "<tool_call>", "</tool_call>", "system", "user", "assistant"]
    names = special + added + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    backend.add_tokens([tokenizers.AddedToken(name, normalized=False, special=False) for name in added])
    return Tokenizer(backend=backend, eos_id=2, eos_ids=(2,), pad_id=3, bos_id=0, chat_template=CHATML)


def _from_directory(folder: Path) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    ids = {name: _id_of(backend, config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    listed = generation.get("eos_token_id", [])
    stops = [ids["eos_token"], *(listed if isinstance(listed, list) else [listed])]
    return _finish(backend, chat_template=_template_of(folder, config), stops=stops, ids=ids)


def _from_gguf(path: Path) -> Tokenizer:
    metadata = gguf_tokenizer.read_metadata(path)
    backend = gguf_tokenizer.build(metadata, path)
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    stops = [ids["eos_token"], *(metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))]
    return _finish(backend, chat_template=metadata.get("tokenizer.chat_template"), stops=stops, ids=ids)


def _finish(
    backend: tokenizers.Tokenizer,
    *,
    chat_template: str | None,
    stops: Sequence[int | None],
    ids: dict[str, int | None],
) -> Tokenizer:
    known = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if not known:
        raise ValueError("the tokenizer names no eos_token; add one to tokenizer_config.json or generation_config.json")
    pad = ids["pad_token"]
    draft = Tokenizer(
        backend=backend,
        eos_id=known[0],
        eos_ids=tuple(known),
        pad_id=known[0] if pad is None else pad,
        bos_id=ids["bos_token"],
        unk_id=ids["unk_token"],
        chat_template=chat_template,
    )
    end_of_turn = _end_of_turn(draft)
    if end_of_turn is None or end_of_turn in known:
        return draft
    return dataclasses.replace(draft, eos_ids=(*known, end_of_turn))


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes after an assistant's answer, if any."""
    if tokenizer.chat_template is None:
        return None
    answer = "MARKED-ANSWER"
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": answer}]
    try:
        text = template.render(
            tokenizer.chat_template,
            messages,
            add_generation_prompt=False,
            tools=None,
            documents=None,
            **tokenizer.special_variables(),
        ).text
    except ValueError:  # a template for another shape of messages: rendering a real chat will say what is wrong
        return None
    special = tokenizer.special_tokens
    tokens = tokenizer.encode_with_specials(text.rpartition(answer)[2])
    return next((token for token in tokens if token in special.values()), None)


def _id_of(backend: tokenizers.Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    text = token["content"] if isinstance(token, dict) else token
    return None if text is None else backend.token_to_id(text)


def _template_of(folder: Path, config: dict[str, Any]) -> str | None:
    """The default chat template: chat_template.jinja, or the string or named list in the config."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    inside = config.get("chat_template")
    if isinstance(inside, list):
        return next((entry["template"] for entry in inside if entry["name"] == "default"), None)
    return inside


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
