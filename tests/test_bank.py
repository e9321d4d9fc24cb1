"""The shipped reference facts."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from hf_edit import Fact
from hf_edit.references import bank, bank_relations, references_for


def test_the_bank_covers_many_objects_by_several_relations():
    facts = sum(map(len, bank().values()))
    rich = [refs for refs in bank().values() if len(refs) >= 5 and len({r.relation for r in refs}) >= 2]
    assert facts >= 1500
    assert len(bank()) >= 250
    assert len(rich) >= 250


def test_every_reference_fact_is_well_formed():
    owners = Counter(prompt.casefold() for relation in bank_relations() for prompt in relation.prompts)
    assert max(owners.values()) == 1, "a wording belongs to one relation"
    for relation in bank_relations():
        subjects = defaultdict(set)
        for subject, obj in relation.facts:
            subjects[subject.casefold()].add(obj)
            assert obj.casefold() not in subject.casefold(), (subject, obj)
            assert all(Fact(subject, prompt, obj).prompt == prompt for prompt in relation.prompts)
        assert all(len(objects) == 1 for objects in subjects.values()), relation.name


def test_references_never_mention_an_edited_subject():
    assert any("France" in r.subject for r in references_for("Paris", "bank"))
    assert not any("France" in r.subject for r in references_for("paris", "bank", exclude=["france"]))


@pytest.mark.parametrize("form", ["list", "path"])
def test_users_may_give_their_own_references(tmp_path, form):
    own = [
        {"subject": "Lake Alma", "prompt": "{} is in", "target": "Peru"},
        {"subject": "Oslo", "prompt": "{} is in", "target": "Norway"},
    ]
    source = own
    if form == "path":
        import json

        source = str(tmp_path / "own.json")
        (tmp_path / "own.json").write_text(json.dumps(own))
    assert [r.subject for r in references_for("Peru", source)] == ["Lake Alma"]
