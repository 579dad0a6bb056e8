"""Several images at every door of a model: generate, read, chat; the tiny random model."""

import numpy as np
import pytest
from generating import CFG, FIND, TOKENIZER, close, image

from cxr_jax.data import prompts as data_prompts
from cxr_jax.errors import UserError
from cxr_jax.inference import model as inference_model


def greedy_by_logits(model, pictures, prompt, steps):
    """Token by token, by the arrays that a Hugging Face processor gives, the whole row anew each time."""
    prepared = [model.prepare(picture) for picture in pictures]
    grids = [grid for _, grid in prepared]
    patches = np.concatenate([own for own, _ in prepared])
    ids, logprobs = model.render(prompt, grids), []
    start = len(ids)
    for _ in range(steps):
        logits = model.logits([ids], patches, grids)[0, -1].astype(np.float64)
        logits[list(model.special["suppress"])] = -np.inf
        ids = [*ids, int(logits.argmax())]
        logprobs.append(logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return ids[start:], logprobs


STUDY = data_prompts.ask_of_roles(["frontal", "lateral"], FIND)


@pytest.mark.parametrize("prompt", [FIND, STUDY, "Was <image> so before <image>?"])
def test_several_images_give_the_tokens_of_the_exact_call(model, prompt):
    pair = [image(0), image(1)]
    [[got]] = model.generate([pair], prompt, 5)
    ids, logprobs = greedy_by_logits(model, pair, prompt, len(got.token_ids))
    assert got.token_ids == ids
    np.testing.assert_allclose(got.logprobs, logprobs, atol=1e-4)
    [[other]] = model.generate([pair[::-1]], prompt, 5)
    assert np.abs(np.subtract(other.logprobs, got.logprobs)).max() > 1e-3  # each in its place


def test_an_image_is_encoded_once_however_many_prompts_show_it(model, calls):
    a, b = image(0), image(1)
    images = [[a, b], b, [a], [b, a], None, [a, a]]
    together = model.generate(images, FIND, 4, temperature=1.0, n=2)
    assert [call for call in calls if call[0] == "vision"] == [("vision", 1)] * 2
    for one, got in zip(images, together, strict=True):
        [alone] = model.generate([one], FIND, 4, temperature=1.0, n=2)
        for mine, other in zip(got, alone, strict=True):
            close(mine, other)
    [in_a_list], [bare] = model.generate([[a], a], FIND, 4)
    close(in_a_list, bare)


def test_several_images_are_read_together(model):
    pair = [image(2), image(3)]
    result = model.read(pair, STUDY, 2, 40)
    [[shown]] = model.generate([pair], STUDY, 40)
    close(result.shown, shown)
    after = model.finding_probabilities(pair, STUDY, result.samples)
    assert after["mean"] == pytest.approx(result.probabilities, abs=1e-3)
    alone = model.read(pair[0], FIND, 2, 40)
    assert alone.probabilities != result.probabilities


def test_a_conversation_begins_with_several_images_and_may_show_more(model, calls):
    a, b, c = (image(number) for number in range(3))
    chat = model.chat([a, b])
    first = chat.ask(STUDY, max_new_tokens=4)
    [[want]] = model.generate([[a, b]], [[chat.messages[0]]], 4)
    close(first, want)
    calls.clear()
    chat.ask("Sure?", max_new_tokens=4)
    assert [call[0] for call in calls if call[0] != "decode"] == ["extend"]

    # A third image later: only it is encoded, and the whole is as if it were read at once.
    before = list(chat.messages)
    with pytest.raises(UserError, match="2 places for an image .* and 1 images"):
        chat.ask("<image> and <image>?", images=c)
    with pytest.raises(UserError, match="1 places for an image .* and 0 images"):
        chat.ask("And <image>?")
    assert chat.messages == before
    calls.clear()
    later = chat.ask("And now?", images=c, max_new_tokens=4)
    assert [call[0] for call in calls].count("vision") == 1
    said = [*before, {"role": "user", "content": "<image>And now?"}]
    [[whole]] = model.generate([[a, b, c]], [said], 4)
    close(later, whole)
    assert chat.messages[-2]["content"] == "And now?"  # as it was said
    chat.ask("Sure?", max_new_tokens=2)
    assert chat.computed[-1] < 30


def test_images_that_a_later_turn_marks_leave_the_first_where_it_was(model):
    chat = model.chat(image(0))
    chat.ask("What is it?", max_new_tokens=3)
    answer = chat.ask("Older: <image> Newer?", images=[image(1)], max_new_tokens=3)
    said = [{**message} for message in chat.messages[:-1]]
    said[0]["content"] = "<image>" + said[0]["content"]
    [[want]] = model.generate([[image(0), image(1)]], [said], 3)
    close(answer, want)


def nested(picture):
    return [list(map(float, row)) for row in picture]


def test_nested_lists_of_numbers_are_still_one_image(model):
    small = np.random.default_rng(0).random((60, 60), np.float32)
    [[got], [want]] = model.generate([nested(small), small], FIND, 3)
    close(got, want)


BAD = {
    "a list of images must hold images alone": [image(0), None],
    "a list of images must hold images alone ": [image(0), [image(1), image(1)]],
    "image 2 of 2: an image array must be": [image(0), image(0) - 1],
    "image 1 of 2: .*no such file": ["nowhere.png", image(0)],
    "the prompt has .* tokens: with max_new_tokens=9 that is more than the 400 positions": [
        image(number) for number in range(6)
    ],
    "1 places for an image .*, and 2 images": ([image(0), image(1)], "What is <image>?"),
    "2 places for an image .*, and 1 images": (image(0), "What is <image><image>?"),
}


@pytest.mark.parametrize("reason", BAD)
def test_images_that_cannot_be_read_so_are_one_line(model, calls, reason):
    images, prompt = BAD[reason] if isinstance(BAD[reason], tuple) else (BAD[reason], FIND)
    for ask in (
        lambda: model.generate([images], prompt, 9),
        lambda: model.read(images, prompt, 2, 9),
        lambda: model.chat(images).ask(prompt, max_new_tokens=9),
    ):
        # A conversation calls its prompt so.
        with pytest.raises(
            UserError, match=reason.strip().replace("the prompt", "the .*")
        ) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert not calls


def test_a_strip_among_several_images_is_named(model):
    made = inference_model.Model(CFG, model.params)  # of the published sizes, not of one square
    with pytest.raises(
        UserError, match="^image 2 of 2: the picture is 1 x 300: its aspect ratio is"
    ):
        made.pictures([image(0), np.zeros((300, 1), np.float32)])


def test_what_is_asked_is_in_the_prompt(model):
    ids = model.render(STUDY, [(1, 16, 16), (1, 4, 8)])
    text = TOKENIZER.decode(ids)
    shown = "Current frontal: <|vision_start|>{}<|vision_end|> Current lateral: <|vision_start|>{}<|vision_end|>\n"
    assert shown.format("<|image_pad|>" * 64, "<|image_pad|>" * 8) + FIND in text


def test_images_are_numbered_on_request_over_the_whole_conversation(model, monkeypatch):
    monkeypatch.setattr(model, "number_images", True)
    text = TOKENIZER.decode(model.render("<image> or <image>?", [(1, 2, 2)] * 2))
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"Picture 1: {pad} or Picture 2: {pad}?" in text
    chat = model.chat([image(0), image(1)])
    chat.ask(FIND, max_new_tokens=3)
    answer = chat.ask("And?", images=image(2), max_new_tokens=3)
    said = [{**message} for message in chat.messages[:-1]]
    said[0]["content"], said[2]["content"] = "<image><image>" + FIND, "<image>And?"
    [[want]] = model.generate([[image(0), image(1), image(2)]], [said], 3)
    close(answer, want)
    monkeypatch.setattr(model, "number_images", False)
    [[other]] = model.generate([[image(0), image(1), image(2)]], [said], 3)
    assert other.logprobs != pytest.approx(want.logprobs, abs=1e-4)
