# SPDX-License-Identifier: Apache-2.0
"""Whatever kind a language model's tokenizer is: a piece of a conversation has the ids that it has alone."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from processing import HoneybeeProcessor, check_processor, prepare_tokenizer
from tests.tiny import byte_tokenizer, image_processor, picture, tiny_config, word_tokenizer

CORPUS = ["What is in the picture ? a brown dog The following is a conversation between a curious human"] * 4
ALPHABET = [chr(code) for code in range(32, 127)] + ["\n", "\t", "▁"]
BLANK = normalizers.Replace(" ", "▁")
READ_BLANK = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
# pieces of a conversation that are not among those that are checked when a tokenizer is prepared
PIECES = [
    "Where is the dog?",
    "  two blanks in front",
    "x ",
    "No.\n\n1. one",
    "12345 dogs",
    "",
    "ends in AI:",
    "été",
    "line\n",
    "\n\n",
]


def trained(kind, normalizer, pre_tokenizer, decoder, eos="</s>", **special):
    special_tokens = ["<unk>", "<s>", AddedToken(eos, special=True, **special)]
    backend, settings = {
        "bpe": (models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), {}),
        "bytes": (models.BPE(), {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}),
        "unigram": (models.Unigram(), {"unk_token": "<unk>"}),
        "words": (models.WordPiece(unk_token="<unk>"), {}),
    }[kind]
    backend = Tokenizer(backend)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    trainer = {"unigram": trainers.UnigramTrainer, "words": trainers.WordPieceTrainer}.get(kind, trainers.BpeTrainer)
    settings = {"vocab_size": 300, "initial_alphabet": ALPHABET, **settings}
    backend.train_from_iterator(CORPUS, trainer(special_tokens=special_tokens, show_progress=False, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=eos)


def metaspace(scheme, split):
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)


def with_tokens(tokenizer, *tokens):
    """With tokens that are found in the text as it was written."""
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return tokenizer


DIGITS = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")
TOKENIZERS = {
    "Llama's": word_tokenizer,
    "Qwen's": byte_tokenizer,
    "Gemma's": lambda: trained("bpe", BLANK, pre_tokenizers.Split(" ", "merged_with_previous"), READ_BLANK),
    "without a pre-tokenizer": lambda: trained("bpe", BLANK, None, READ_BLANK),
    "Mistral's": lambda: trained("bpe", None, metaspace("first", False), READ_BLANK),
    "T5's": lambda: trained("unigram", normalizers.NFKC(), metaspace("always", True), decoders.Metaspace()),
    "one prefix": lambda: trained("unigram", None, metaspace("first", True), decoders.Metaspace()),
    "no prefix": lambda: trained("unigram", None, metaspace("never", True), decoders.Metaspace(prepend_scheme="never")),
    "Llama 3's": lambda: trained("bytes", None, pre_tokenizers.Sequence([DIGITS, BYTES]), decoders.ByteLevel()),
    "with a blank": lambda: trained("bytes", normalizers.NFC(), pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
    "words": lambda: trained("words", normalizers.Lowercase(), pre_tokenizers.Whitespace(), decoders.WordPiece()),
    "an end that takes blanks": lambda: trained("bpe", BLANK, None, READ_BLANK, lstrip=True, rstrip=True),
    "Gemma 3's": lambda: with_tokens(TOKENIZERS["Gemma's"](), "\n", "\n\n", "\n\n\n", "▁▁", "<b>"),
    "with tokens of blanks": lambda: with_tokens(byte_tokenizer(), "  ", "   ", "\t\t"),
    "an end in normalized text": lambda: trained("bpe", BLANK, None, READ_BLANK, eos="</ s>", normalized=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_those_of_the_own_tokenizer(kind):
    tokenizer = TOKENIZERS[kind]()
    processor = HoneybeeProcessor(image_processor(), prepare_tokenizer(tokenizer), num_image_tokens=4)
    # The fast form of Mistral's takes a blank in front for the one that sentencepiece adds.
    added = "▁" if kind == "Mistral's" else ""

    def own(text):
        return tokenizer((added if text.startswith(" ") else "") + text, add_special_tokens=False)["input_ids"]

    for question in PIECES:
        for answer in filter(None, PIECES):
            messages = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": question},
            ]
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            ids = processor(text=text, images=[picture()], add_special_tokens=False)["input_ids"][0]
            human, ai = own("\nHuman: "), own("\nAI: ")
            start = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
            expected = [*start, *own("Be brief."), *human, *[processor.image_token_id] * 4, *human, *own(question)]
            expected += [*ai, *own(answer), tokenizer.eos_token_id, *human, *own(question), *ai]
            assert ids == expected, (question, answer)


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "words"])
def test_a_conversation_is_read_back_as_it_was(kind):
    tokenizer = prepare_tokenizer(TOKENIZERS[kind]())
    text = "Be brief.\nHuman: what is in the picture\nAI: a brown dog"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).lstrip(" ") == text


def strips():
    normalizer = normalizers.Sequence([normalizers.Strip(left=False, right=True), BLANK])
    return trained("bpe", normalizer, None, READ_BLANK)


def splits_nothing():
    return trained("bytes", normalizers.ByteLevel(), None, decoders.ByteLevel())


@pytest.mark.parametrize("tokenizer", [strips, splits_nothing])
def test_pieces_that_would_get_other_ids_are_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"the piece '\\nHuman: ' is \[.*\] in .*; use a language model whose tokenizer"
    ):
        prepare_tokenizer(tokenizer())


@pytest.mark.parametrize("eos", [None, ""])
def test_a_tokenizer_that_cannot_end_is_refused(eos):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = eos
    with pytest.raises(ValueError, match="no answer would end.*name the token that ends its texts as eos_token"):
        prepare_tokenizer(tokenizer)
    config = tiny_config(config={"image_token_id": 300})
    processor = HoneybeeProcessor(image_processor(), prepare_tokenizer(byte_tokenizer()), num_image_tokens=4)
    processor.tokenizer.eos_token = eos
    with pytest.raises(ValueError, match="no answer would end"):
        check_processor(config, processor)


def test_an_end_that_is_no_token_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<|nowhere|>"  # its id is that of `unk`
    with pytest.raises(ValueError, match="eos_token='<|nowhere|>' is no token of the tokenizer"):
        prepare_tokenizer(tokenizer)


def test_an_end_beyond_the_models_vocabulary_is_refused():
    processor = HoneybeeProcessor(image_processor(), prepare_tokenizer(word_tokenizer()), num_image_tokens=4)
    processor.tokenizer.add_special_tokens({"eos_token": "<|later|>"})
    config = tiny_config(config={"image_token_id": processor.image_token_id})
    check_processor(config, processor)
    config.text_config.vocab_size = last = processor.tokenizer.eos_token_id
    with pytest.raises(
        ValueError, match=f"'<.later.>' has the id {last}, and the model's vocabulary ends at {last - 1}"
    ):
        check_processor(config, processor)
