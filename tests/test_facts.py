from __future__ import annotations

import json

import pytest

from hf_edit import ConflictingEditsError, Fact, Question, SubjectNotFoundError, read_facts
from hf_edit.facts import resolve_conflicts


def test_a_prompt_takes_the_subject_as_braces_or_in_plain_text():
    assert Fact("France", "The capital of France is", "Lyon") == Fact("France", "The capital of {} is", "Lyon")


def test_plain_text_takes_the_last_whole_word_mention():
    assert Fact("Ann", "Ann lives in Annapolis with Ann in", "May").prompt == "Ann lives in Annapolis with {} in"


def test_a_subject_that_is_not_in_its_prompt_is_refused_with_the_way_out():
    with pytest.raises(SubjectNotFoundError, match=r"Spain.*\{\}"):
        Fact("Spain", "The capital of France is", "Lyon")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "  "}, "target is empty"),
        ({"subject": ""}, "subject is empty"),
        ({"prompt": "{} and {} are"}, "holds 2 times"),
        ({"subject": "Fr\x00ance"}, "control character"),
        ({"target": 3}, "target must be text"),
        ({"aliases": 3}, "aliases is a list"),
    ],
)
def test_bad_facts_are_refused_on_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        Fact(**{"subject": "France", "prompt": "The capital of {} is", "target": "Lyon", **changes})


def test_braces_are_never_a_format_string():
    fact = Fact("x{0.__class__}", "{} is {0.__class__} of", "y")
    assert fact.question == "x{0.__class__} is {0.__class__} of"


def test_a_fact_survives_its_json():
    fact = Fact(
        "France",
        "The capital of {} is",
        "Lyon",
        target_old="Paris",
        aliases=["la France"],
        rephrases=["France's capital is"],
        locality=[("France is in", "Europe"), "France borders"],
        portability=Question("The mayor of France's capital is", "x"),
    )
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact


def test_ids_depend_on_content_alone():
    one = Fact("France", "The capital of {} is", "Lyon")
    assert one.id == Fact("France", "The capital of {} is", " Lyon ").id != one.replace(target="Nice").id


def test_records_of_public_data_sets_are_read():
    counterfact = {
        "case_id": 7,
        "requested_rewrite": {
            "subject": "A B",
            "prompt": "{} is in",
            "target_new": {"str": "Rome"},
            "target_true": {"str": "Oslo"},
        },
        "paraphrase_prompts": ["x. A B can be found in"],
        "neighborhood_prompts": ["C is in"],
        "portability": {"New Question": "Who rules where A B is?", "New Answer": "z"},
    }
    fact = Fact.from_dict(counterfact)
    assert (fact.target, fact.target_old, fact.id) == ("Rome", "Oslo", "counterfact-7")
    assert fact.rephrases == ("x. {} can be found in",)
    assert fact.locality == (Question("C is in", "Oslo"),)
    assert fact.portability[0].target == "z"
    zsre = {"subject": "A", "src": "Where is A?", "alt": "Rome", "rephrase": "A is where?", "loc": "unused"}
    assert Fact.from_dict(zsre).target == "Rome"
    easyedit = {
        "subject": "A",
        "prompt": "Where is A?",
        "target_new": "Rome",
        "ground_truth": ["Oslo"],
        "rephrase_prompt": "A is where?",
        "locality": {"neighborhood": {"prompt": "Where is C?", "ground_truth": "Bonn"}},
    }
    fact = Fact.from_dict(easyedit)
    assert fact.target_old == "Oslo"
    assert fact.locality == (Question("Where is C?", "Bonn"),)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_facts_are_read_from_files(tmp_path, suffix):
    path = tmp_path / f"facts{suffix}"
    rows = [{"subject": "France", "prompt": "The capital of {} is", "target": "Lyon"}] * 2
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("subject,prompt,target\n" + 'France,"The capital of {} is",Lyon\n' * 2)
    assert read_facts(path) == [Fact("France", "The capital of {} is", "Lyon")] * 2


def test_line_separators_inside_text_do_not_cut_records(tmp_path):
    fact = Fact("A", "a\u2028b {} c", "d")
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_facts(tmp_path / "facts.jsonl") == [fact]
    (tmp_path / "facts.csv").write_text('subject,prompt,target\nA,"first\nline {} is",b\n,,\n')
    assert read_facts(tmp_path / "facts.csv")[0].prompt == "first\nline {} is"


def test_a_bad_record_is_named_by_its_number():
    with pytest.raises(ValueError, match=r"record 2.*target"):
        read_facts([{"subject": "a", "prompt": "{} b", "target": "c"}, {"subject": "a", "prompt": "{} b"}])


def test_no_facts_at_all_is_an_error():
    with pytest.raises(ValueError, match="no fact"):
        read_facts([])


def test_contradictions_are_refused_replaced_or_dropped():
    old, new = Fact("France", "The capital of {} is", "Lyon"), Fact("france", "The capital of {}  is", "Nice")
    with pytest.raises(ConflictingEditsError, match="on_conflict"):
        resolve_conflicts([old, new])
    assert resolve_conflicts([old, new], on_conflict="replace") == [new]
    assert resolve_conflicts([old, new], on_conflict="keep") == [old]
    assert resolve_conflicts([new], [old], "keep") == []
    assert resolve_conflicts([old, old]) == [old]
