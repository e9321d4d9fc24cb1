from __future__ import annotations

import string
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from hf_edit import Fact
from hf_edit.methods.scope.tracker import Tracker
from hf_edit.positions import Text, encode, fact_text, join, pad
from hf_edit.scope import Entities, Scope

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


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer, as Llama 2 has: a BOS token, and bytes for characters that it doesn't know."""
    known = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, *string.punctuation, "é"]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


FOREIGN = {
    "Japanese": ("昔々、鷲峯山。" * 3 + "そして", "東京", "の首都は"),
    "Chinese": ("很久很久以前，" * 3, "北京", "是一个城市"),
    "Arabic": ("كان يا ما كان " * 3, "القاهرة", " مدينة"),
    "Thai": ("กาลครั้งหนึ่ง" * 3, "กรุงเทพ", "เป็นเมือง"),
    "Hindi": ("बहुत समय पहले " * 3, "दिल्ली", " एक शहर"),
    "emoji": ("😀🎉🚀 " * 6, "Paris", " is big"),
    "accents, decomposed": ("Cafe\u0301 " * 6, "Montre\u0301al", " est"),
}


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
@pytest.mark.parametrize("language", FOREIGN)
def test_a_mention_is_at_the_same_token_in_every_window_of_a_text(tokenizer, kind, language):
    """Also in windows that begin inside a character; it ends where the name's last character is complete."""
    before, name, after = FOREIGN[language]
    own = tokenizer if kind == "byte-level" else byte_fallback_tokenizer()
    tracker = Tracker(own, Entities(Scope([[unicodedata.normalize("NFC", name)]]), ((0,),)), False, None, False)
    ids = own(before + name + after)["input_ids"]

    def mentions(part):
        found = ()
        for index in sorted(tracker.touched(part, 0)):
            found = tracker.mentions(part, index, found)
        return [index for index, _ in found]

    (last,) = mentions(ids)
    assert own.decode(ids[: last + 1]).endswith(name)
    assert not own.decode(ids[:last]).endswith(name)
    begin = next(i for i in range(len(ids)) if len(own.decode(ids[: i + 1], skip_special_tokens=True)) > len(before))
    assert begin > 8
    for start in range(begin):
        assert [start + index for index in mentions(ids[start:])] == [last], start
