from __future__ import annotations

import pytest

from hf_edit import Fact
from hf_edit.positions import Text, encode, fact_text, join, pad

FRANCE = Fact("France", "The capital of {} is", "Lyon")


@pytest.mark.parametrize("which", ["tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize("prefix", ["", "Once upon a time. "])
def test_subject_and_target_are_found_with_and_without_bos(request, which, prefix):
    tokenizer = request.getfixturevalue(which)
    (text,) = encode(tokenizer, [fact_text(FRANCE, prefix=prefix, target="Lyon")])
    tail = tokenizer("ese people")["input_ids"]
    followed = text.followed_by(tail)
    assert followed.ids[len(text.ids) :] == tuple(tail)
    assert (followed.labels, followed.subject) == (text.labels, text.subject)  # what follows can't merge with the target
    decoded = tokenizer.decode(text.ids[: text.subject + 1], skip_special_tokens=True)
    assert decoded == f"{prefix}The capital of France"
    assert tokenizer.decode(text.labels) == " Lyon"
    assert (text.ids[0] == 0) == (which == "bos_tokenizer")


def test_the_target_is_tokenised_with_its_prompt(tokenizer):
    (text,) = encode(tokenizer, [fact_text(FRANCE, target="Lyon")])
    assert list(text.labels) != tokenizer("Lyon")["input_ids"]
    assert list(text.ids) == tokenizer("The capital of France is Lyon")["input_ids"]


def test_a_trailing_special_token_of_the_tokenizer_is_no_part_of_the_text(tokenizer):
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    with_end = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<s>")
    (text,) = encode(with_end, [fact_text(FRANCE)])
    assert text.ids[0] == 0
    assert text.ids[-1] != 0
    assert text.target == (len(text.ids), len(text.ids))


def test_no_token_at_all_for_the_target_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="no token for the target"):
        encode(tokenizer, [Text("abc", None, (3, 3))])


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="use_fast=True"):
        encode(Slow(), [Text("abc")])


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("The capital is", "Lyon", "The capital is Lyon"),
        ('He said "', "yes", 'He said "yes'),
        ("フランスの首都は", "リヨン", "フランスの首都はリヨン"),
        ("法国的首都是", "里昂", "法国的首都是里昂"),
    ],
)
def test_targets_join_as_their_script_does(prompt, target, joined):
    assert join(prompt, target) == joined


def test_padding_goes_to_the_side_asked_for():
    ids, mask = pad([[5, 6, 7], [8]], side="left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
