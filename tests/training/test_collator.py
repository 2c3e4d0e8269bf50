# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.tiny import byte_tokenizer, picture, tiny_processor, word_tokenizer
from training.collator import HoneybeeDataCollator

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


def says(words):
    return {"role": "assistant", "content": [{"type": "text", "text": words}]}


def example(*answers, images=1):
    messages = []
    for turn, answer in enumerate(answers):
        messages += [QUESTION if turn == 0 and images else {"role": "user", "content": "And?"}, says(answer)]
    return {"messages": messages, "images": [picture(seed) for seed in range(images)]}


@pytest.mark.parametrize("tokenizer", [word_tokenizer, byte_tokenizer])
def test_only_the_assistants_words_are_supervised(tokenizer):
    processor = tiny_processor(tokenizer=tokenizer())
    batch = HoneybeeDataCollator(processor)([example("a brown dog", " yes"), example("no", images=0)])
    eos = processor.tokenizer.eos_token
    for row, expected in enumerate([f"a brown dog{eos} yes{eos}", f"no{eos}"]):
        labels = batch["labels"][row]
        learned = processor.tokenizer.decode(labels[labels != -100])
        # sentencepiece shows the blank that starts each piece
        assert learned.replace(" ", "") == expected.replace(" ", "")
        supervised = labels != -100
        assert torch.equal(labels[supervised], batch["input_ids"][row][supervised])
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert (batch["attention_mask"][1].diff() <= 0).all(), "padding stands on the right"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"][batch["input_ids"] == processor.image_token_id] == -100).all()


@pytest.mark.parametrize("tokenizer", [word_tokenizer, byte_tokenizer])
def test_ids_are_those_of_the_processor(tokenizer):
    processor = tiny_processor(tokenizer=tokenizer())
    sample = example("a brown dog", "\nyes <image>")
    batch = HoneybeeDataCollator(processor)([sample])
    rendered = processor.apply_chat_template(sample["messages"])
    whole = processor(images=sample["images"], text=rendered, add_special_tokens=False, return_tensors="pt")
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    assert torch.equal(batch["pixel_values"], whole["pixel_values"])


def test_caption_sample():
    processor = tiny_processor()
    messages = [{"role": "user", "content": [{"type": "image"}]}, says("a dog")]
    batch = HoneybeeDataCollator(processor)([{"messages": messages, "images": [picture()], "chat_template": "caption"}])
    ids = batch["input_ids"][0].tolist()
    assert ids[:5] == [1] + [processor.image_token_id] * 4
    assert batch["labels"][0].tolist() == [-100] * 5 + ids[5:]


def test_text_only_batch_has_no_pixels():
    assert "pixel_values" not in HoneybeeDataCollator(tiny_processor())([example("yes", images=0)])


def test_images_without_item_go_to_the_first_question():
    processor = tiny_processor()
    sample = {"messages": [{"role": "user", "content": "What?"}, says("a dog")], "images": [picture()]}
    explicit = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                             says("a dog")], "images": [picture()]}  # fmt: skip
    collator = HoneybeeDataCollator(processor)
    assert torch.equal(collator([sample])["input_ids"], collator([explicit])["input_ids"])


def rows_equal(collator, sample, explicit):
    ours, expected = collator([sample]), collator([explicit])
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("given", [{"image": picture()}, {"image": picture(), "images": None}, {"image": [picture()]}])
def test_one_picture_under_its_other_name(given):
    messages = [{"role": "user", "content": "What?"}, says("a dog")]
    collator = HoneybeeDataCollator(tiny_processor())
    assert rows_equal(collator, {"messages": messages, **given}, {"messages": messages, "images": [picture()]})


def test_pictures_under_both_names_are_refused():
    with pytest.raises(ValueError, match="`images` and `image`.*one of the two"):
        HoneybeeDataCollator(tiny_processor())([{**example("a"), "image": picture()}])


def test_a_system_column_is_the_first_message():
    sample, system = example("a"), {"role": "system", "content": "Be brief."}
    collator = HoneybeeDataCollator(tiny_processor())
    assert rows_equal(
        collator, {**sample, "system": "Be brief."}, {**sample, "messages": [system, *sample["messages"]]}
    )
    with pytest.raises(ValueError, match="message 1 has the role 'system'"):
        collator([{**sample, "system": "x", "messages": [system, *sample["messages"]]}])


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        (["First <image> then <image>: same?"], [["First", IMAGE, "then", IMAGE, ": same?"]]),
        (["<image>\nWhat is it?"], [[IMAGE, "What is it?"]]),
        (["What is it?\n<image>"], [["What is it?", IMAGE]]),
        (["<image><image>Same?"], [[IMAGE, IMAGE, "Same?"]]),
        (["<image>"], [[IMAGE]]),
        (["<image> one", "and <image> this?"], [[IMAGE, "one"], ["and", IMAGE, "this?"]]),
        (["a", "  b <image>"], [["a"], ["  b", IMAGE]]),
        ([[{"type": "text", "text": "<image> a"}, {"type": "text", "text": " b "}]], [[IMAGE, "a", " b "]]),
    ],
)
def test_tags_in_a_text_are_the_places_of_the_images(questions, expected):
    def sample(contents):
        turns = [turn for content in contents for turn in ({"role": "user", "content": content}, says("see <image>"))]
        return {"messages": turns, "images": [picture(seed) for seed in range(tags)]}

    tags = sum(item == IMAGE for content in expected for item in content)
    items = [[{"type": "text", "text": i} if isinstance(i, str) else i for i in content] for content in expected]
    processor = tiny_processor(tokenizer=byte_tokenizer())
    collator = HoneybeeDataCollator(processor)
    assert rows_equal(collator, sample(questions), sample(items))
    ids = collator([sample(questions)])["input_ids"]
    assert int((ids == processor.image_token_id).sum()) == tags * processor.num_image_tokens


def test_typed_tags_stay_text_beside_image_items_and_without_images():
    processor = tiny_processor(tokenizer=byte_tokenizer())
    collator = HoneybeeDataCollator(processor)
    typed = {"type": "text", "text": "what is <image>?"}
    for content, images in (([IMAGE, typed], 1), ([typed], 0)):
        messages = [{"role": "user", "content": content}, says("a tag")]
        batch = collator([{"messages": messages, "images": [picture()] * images}])
        assert int((batch["input_ids"] == processor.image_token_id).sum()) == images * processor.num_image_tokens
        assert "what is <image>?" in processor.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)


def test_order_of_images_in_a_batch():
    processor = tiny_processor()
    samples = [example("a", images=0), example("b"), {**example("c"), "images": [picture(7)]}]
    batch = HoneybeeDataCollator(processor)(samples)
    for index, image in enumerate([picture(0), picture(7)]):
        assert torch.equal(
            batch["pixel_values"][index], processor(images=image, return_tensors="pt")["pixel_values"][0]
        )


def test_images_by_path_and_bytes(tmp_path):
    picture().save(tmp_path / "dog.png")
    processor = tiny_processor()
    collator = HoneybeeDataCollator(processor, image_root=str(tmp_path))
    expected = collator([example("a")])["pixel_values"]
    data = (tmp_path / "dog.png").read_bytes()
    for image in ("dog.png", str(tmp_path / "dog.png"), {"path": None, "bytes": data}):
        assert torch.equal(collator([{**example("a"), "images": [image]}])["pixel_values"], expected)


def test_long_rows_are_cut_but_never_through_an_image():
    processor = tiny_processor()
    full = HoneybeeDataCollator(processor)([example("a brown dog " * 20)])
    cut = HoneybeeDataCollator(processor, max_length=90)([example("a brown dog " * 20)])
    assert cut["input_ids"].shape == (1, 90)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], full[name][:, :90])
    with pytest.raises(ValueError, match="max_length=20 would cut an image; raise max_length to"):
        HoneybeeDataCollator(processor, max_length=20)([example("a")])


def talk(*items):
    return [{"role": "user", "content": [{"type": "image", **item} for item in items]}, says("a")]


def test_what_a_message_says_of_itself_changes_nothing():
    collator = HoneybeeDataCollator(tiny_processor())
    messages = talk({"index": 0, "text": None}, {"index": 1, "text": None})
    labelled = [{**messages[0], "name": "me", "tool_calls": []}, {**messages[1], "weight": 1, "images": None}]
    pictures = [picture(0), picture(1)]
    assert rows_equal(
        collator, {"messages": labelled, "images": pictures}, {"messages": talk({}, {}), "images": pictures}
    )


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"messages": []}, "conversation is empty"),
        ({"messages": [QUESTION], "images": [picture()]}, "ends with the user"),
        ({"messages": [QUESTION, says("")], "images": [picture()]}, "message 1 is an empty answer"),
        ({"messages": [QUESTION, says("a")], "images": []}, "1 image placeholders.*0 images"),
        ({"messages": [QUESTION, says("a")], "images": [picture()] * 2}, "1 image placeholders.*2 images"),
        (
            {"messages": [{"role": "user", "content": "<image> or"}, says("a")], "images": [picture()] * 2},
            "1 <image> tags, but the sample has 2 images",
        ),
        ({"messages": [QUESTION, says("a")], "images": ["no_such.png"]}, "'no_such.png' does not exist"),
        ({"messages": [{"role": "human", "content": "q"}, says("a")]}, "message 0 has the role 'human'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, says("a")]}, "of type image or text"),
        ({"messages": [QUESTION, says("a")], "images": [picture()], "chat_template": "caption"}, "of type image"),
        (
            {"messages": [QUESTION, says("a")], "images": [picture()], "chat_template": "poem"},
            "'poem' is unknown; use default or caption",
        ),
        (
            {"messages": [{"role": "user", "content": "What?"}, says("see <image>")], "images": [picture()]},
            "<image> tags are in messages of the system or the assistant",
        ),
        (
            {"messages": [{**QUESTION, "images": ["a.png"]}, says("a")]},
            "message 0 .user. has images, which .* not read",
        ),
        ({"messages": [QUESTION, {**says("a"), "tool_calls": [{}]}]}, "message 1 .assistant. has tool_calls"),
        ({"messages": [QUESTION, {**says("a"), "weight": 0}]}, "weight=0, and all answers are learned"),
        ({"messages": talk({"index": 1}, {"index": 0}), "images": [picture()] * 2}, "'index': 1.* is number 0"),
        ({"messages": talk({"path": "b.png"}), "images": ["a.png"]}, "'path': 'b.png'.* is number 0"),
    ],
)
def test_bad_samples_are_named(sample, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        HoneybeeDataCollator(tiny_processor())([sample])
