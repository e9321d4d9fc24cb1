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


ANN = {"subject": "Ann", "prompt": "{} lives in", "target": "Oslo"}
HEADER = "subject,prompt,target\n"
MQUAKE = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Croatia", "id": "Q224"},
            "target_true": {"str": "Norway", "id": "Q20"},
            "subject": "Ann",
            "question": "Which country is Ann a citizen of?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Rome", "id": "Q220"},
            "target_true": {"str": "Zagreb", "id": "Q1435"},
            "subject": "Croatia",
            "question": "What is the capital of Croatia?",
        },
    ],
    "questions": ["What is the capital of Ann's country?", "Ann's country has which capital?"],
    "answer": "Oslo",
    "answer_alias": ["Christiania"],
    "new_answer": "Rome",
    "new_answer_alias": ["Roma"],
    "single_hops": [],
    "new_single_hops": [],
    "orig": {"triples": []},
}


def _one_rewrite(record):
    return {**record, "requested_rewrite": record["requested_rewrite"][:1]}


def test_a_record_of_several_rewrites_gives_a_fact_for_each():
    first, second = read_facts([MQUAKE])
    assert first == Fact(
        "Ann", "{} is a citizen of", "Croatia", "Norway", rephrases=["Which country is {} a citizen of?"], id="mquake-3-0"
    )
    assert (second.subject, second.target, second.target_old, second.id) == ("Croatia", "Rome", "Zagreb", "mquake-3-1")
    assert read_facts([MQUAKE]) == [first, second]
    assert len({fact.id for fact in read_facts([MQUAKE, {**MQUAKE, "case_id": 4}])}) == 4


def test_questions_about_a_chain_of_rewrites_belong_to_its_last_fact():
    first, second = read_facts([MQUAKE])
    assert first.portability == ()
    assert second.portability == tuple(Question(question, "Rome") for question in MQUAKE["questions"])


def test_a_list_of_one_rewrite_is_one_fact_without_a_number_in_its_id():
    fact = Fact.from_dict(_one_rewrite(MQUAKE))
    assert fact.id == "mquake-3"
    assert fact.portability == tuple(Question(question, "Rome") for question in MQUAKE["questions"])
    chain = {"questions": ["Who is Ann's boss?"], "answers": ["Bob"], "prompts": ["{}'s boss is"], "subjects": ["Ann"]}
    knowgic = {key: MQUAKE[key] for key in ("case_id", "requested_rewrite")} | {"chain": chain, "broader_context": chain}
    fact = Fact.from_dict(_one_rewrite(knowgic))
    assert (fact.id, fact.target, fact.locality, fact.portability) == ("knowgic-3", "Croatia", (), ())


def test_a_single_fact_is_not_read_from_a_record_of_several():
    with pytest.raises(ValueError, match=r"holds 2 facts; read_facts"):
        Fact.from_dict(MQUAKE)


def test_what_stands_beside_several_rewrites_and_belongs_to_one_of_them_is_refused():
    with pytest.raises(ValueError, match=r"'paraphrase_prompts'.*belongs to one of them"):
        read_facts([{**MQUAKE, "paraphrase_prompts": ["Ann comes from"]}])


def test_fields_beside_a_rewrite_are_kept():
    counterfact = {"requested_rewrite": {"subject": "Ann", "prompt": "{} is in", "target_new": {"str": "Oslo"}}}
    fact = Fact.from_dict({**counterfact, "id": "mine", "source": "atlas", "aliases": ["Bea"], "rephrases": ["Bea sits in"]})
    assert (fact.id, fact.source, fact.aliases, fact.rephrases) == ("mine", "atlas", ("Bea",), ("{} sits in",))
    with pytest.raises(ValueError, match="'subject' is given twice"):
        Fact.from_dict({**counterfact, "subject": "Bob"})


@pytest.mark.parametrize(
    "fields",
    [
        {"locality": [{"loc": "Who rules?", "loc_ans": "Bob"}]},
        {"loc": "Who rules?", "loc_ans": "Bob"},
        {"loc": ["Who rules?"], "loc_ans": ["Bob"]},
        {"locality_prompt": "Who rules?", "locality_ground_truth": "Bob"},
        {"locality_prompt": ["Who rules?"], "locality_ground_truth": [["Bob", "Bobby"]]},
        {"locality": {"neighborhood": {"prompt": "Who rules?", "ground_truth": ["Bob"]}, "distracting": None}},
        {"locality": {"Relation_Specificity": [{"prompt": "Who rules?", "ground_truth": [["Bob"]]}], "Forgetfulness": []}},
        {"locality": {"neighborhood": {"prompt": ["Who rules?"], "ground_truth": ["Bob"]}}},
        {"neighborhood_prompts": [{"prompt": "Who rules?", "target": "Bob"}]},
        {"neighborhood_prompts": ["Who rules?"], "ground_truth": "Bob"},
    ],
)
def test_locality_questions_are_read_as_each_dataset_writes_them(fields):
    assert Fact.from_dict({**ANN, **fields}).locality == (Question("Who rules?", "Bob"),)


@pytest.mark.parametrize(
    "fields",
    [
        {"portability": {"Recalled Relation": "(x)", "New Question": "Who rules?", "New Answer": "Bob"}},
        {"portability": {"Reasoning": [{"prompt": "Who rules?", "ground_truth": [["Bob"]]}]}},
        {"portability_prompt": "Who rules?", "portability_ground_truth": "Bob"},
    ],
)
def test_portability_questions_are_read_as_each_dataset_writes_them(fields):
    assert Fact.from_dict({**ANN, **fields}).portability == (Question("Who rules?", "Bob"),)


def test_fields_of_public_datasets_that_no_fact_needs_are_accepted():
    zsre = {"subject": "Ann", "src": "Where does Ann live?", "pred": "Rome", "rephrase": "Ann lives where?", "alt": "Oslo"}
    zsre |= {"answers": ["Bergen"], "loc": "nq question: who rules", "loc_ans": "Bob", "cond": "Rome >> Oslo || Where"}
    assert Fact.from_dict(zsre).locality == (Question("nq question: who rules", "Bob"),)
    unused = {"case_id": 1, "pararel_idx": 2, "relation_id": "P1", "attribute_prompts": ["a"], "generation_prompts": ["b"]}
    assert Fact.from_dict({**ANN, **unused}) == Fact.from_dict(ANN)


def test_ids_of_qaedit_are_unique_although_each_of_its_sources_counts_anew():
    facts = read_facts([{**ANN, "id": 918, "source": source} for source in ("NQ", "TQA")])
    assert [fact.id for fact in facts] == ["qaedit-NQ-918", "qaedit-TQA-918"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**ANN, "rephases": ["Ann's home is in"]}, "unknown field 'rephases'; did you mean 'rephrases'"),
        ({**ANN, "REPHRASES": ["Ann's home is in"]}, "'REPHRASES'; did you mean 'rephrases'"),
        ({**ANN, "comment": "mine"}, "unknown field 'comment'. Rename or drop it. The fields are: subject, prompt, target"),
        ({**ANN, "answers": ["Bergen"]}, "unknown field 'answers'"),
        ({**ANN, "question": "Where does Ann live?"}, "unknown field 'question'"),
        ({**ANN, "rephases": None}, "unknown field 'rephases'"),
        ({**ANN, "locality": [{"prompt": "Bob lives in", "traget": "Bonn"}]}, "'traget'; did you mean 'target'"),
        ({"requested_rewrite": {**ANN, "target_neu": "Rome"}}, "'target_neu'; did you mean 'target_new'"),
        ({**MQUAKE, "quetions": []}, "'quetions'; did you mean 'questions'"),
        ({**ANN, "target_new": "Bergen"}, "gives target twice: 'target': 'Oslo' and 'target_new': 'Bergen'"),
        ({**ANN, "loc": ["a", "b"], "loc_ans": ["c"]}, "2 prompts and 1 answers"),
        ({**ANN, "loc_ans": "c"}, "no prompt"),
        ({**ANN, "locality_prompt": 3}, "a prompt is text, not int"),
        ({**ANN, "locality": [("Who rules?", 3)]}, "a question is"),
        ({**ANN, "target": {"string": "Oslo"}}, "target is text, or a mapping with 'str'"),
        ({"requested_rewrite": ["x"]}, "requested_rewrite is a mapping or a list of mappings"),
        ({"requested_rewrite": []}, "requested_rewrite is a mapping or a list of mappings"),
        (("Ann", "{} lives in", "Oslo"), "not from tuple.*subject, prompt and target"),
    ],
)
def test_a_field_that_would_be_lost_is_an_error_that_says_what_to_write(record, message):
    with pytest.raises(ValueError, match=f"^facts, record 2: .*{message}"):
        read_facts([ANN, record])


@pytest.mark.parametrize(
    ("locality", "message"),
    [
        ({"promt": "Bob lives in"}, "'promt' is neither a question's prompt nor its target; did you mean 'prompt'"),
        (
            {"promt": ["Bob lives in"], "taget": ["Rome"]},
            "'promt' is neither a question's prompt nor its target; did you mean 'prompt'",
        ),
        ({"neighborhood": ["Bob lives in"]}, "A group of questions holds mappings with prompt and target"),
        ({"neighborhood": {"promt": ["Bob lives in"]}}, "unknown field 'promt'; did you mean 'prompt'"),
        ({"Recalled Relation": "(x)"}, "'Recalled Relation' is neither a question's prompt nor its target"),
    ],
)
def test_a_misspelt_key_of_a_question_is_never_taken_for_a_group_of_questions(locality, message):
    with pytest.raises(ValueError, match=message):
        Fact.from_dict({**ANN, "locality": locality})


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            {"prompt": "a is", "question": "b is", "target": "x"},
            "gives its prompt twice: 'prompt': 'a is' and 'question': 'b is'",
        ),
        (
            {"prompt": "a is", "target": "x", "ground_truth": "y"},
            "gives its answer twice: 'target': 'x' and 'ground_truth': 'y'",
        ),
        ({"prompt": ["a is"], "target": ["x"], "ground_truth": ["y"]}, "gives its answer twice"),
    ],
)
def test_a_second_prompt_or_answer_of_a_question_is_an_error_and_an_equal_one_is_not(question, message):
    with pytest.raises(ValueError, match=message):
        Fact.from_dict({**ANN, "portability": question})
    same = {"prompt": "a is", "question": "a is", "target": "x", "ground_truth": ["x"], "answer": []}
    assert Fact.from_dict({**ANN, "portability": same}).portability == (Question("a is", "x"),)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_text_that_begins_with_a_bracket_is_text_outside_a_table(tmp_path, suffix):
    record = {**ANN, "loc": "[MASK] rules", "rephrases": '{"Ann" lives in', "portability": "[1] Ann is"}
    for fact in (Fact.from_dict(record), *read_facts(_file(tmp_path, f"f{suffix}", json.dumps(record)))):
        assert fact.locality == (Question("[MASK] rules"),)
        assert fact.rephrases == ('{"{}" lives in',)
        assert fact.portability == (Question("[1] Ann is"),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("old_target", "; did you mean 'target_old'"),
        ("rephases", "; did you mean 'rephrases'"),
        ("Subject", "; did you mean 'subject'"),
        ("New-Target", "; did you mean 'target_new'"),
        ("object", ". Rename or drop it. The fields are: subject, prompt, target"),
        ("text", ". Rename or drop it. The fields are: subject, prompt, target"),
    ],
)
def test_the_name_that_is_suggested_is_spelt_alike_or_has_the_same_words(name, message):
    with pytest.raises(ValueError, match=f"unknown field '{name}'{message}"):
        Fact.from_dict({**ANN, name: "Rome"})


@pytest.mark.parametrize(
    "field", [{"target_old": "Rome"}, {"ground_truth": "Rome"}, {"locality": "Bob is"}, {"loc": "Bob is"}, {"target": "Rome"}]
)
def test_what_belongs_to_one_of_several_rewrites_is_refused_beside_them(field):
    with pytest.raises(ValueError, match=f"'{next(iter(field))}' of a record with 2 rewrites belongs to one of them"):
        read_facts([{**MQUAKE, **field}])


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({key: value for key, value in MQUAKE.items() if key != "new_answer"}, "'questions' has no 'new_answer'"),
        ({**ANN, "portability_prompt": "Who rules?"}, "'portability_prompt' has no 'portability_ground_truth'"),
    ],
)
def test_portability_questions_without_the_field_of_their_answers_are_refused(record, names):
    with pytest.raises(ValueError, match=names):
        read_facts([record])


def test_a_dataset_with_splits_is_refused_with_the_advice_to_pass_one():
    with pytest.raises(ValueError, match=r"splits \(train, test\). Pass one: facts\['train'\]"):
        read_facts({"train": [ANN], "test": []})
    with pytest.raises(ValueError, match="unknown field 'rephases'"):
        read_facts({"rephases": []})
    assert len(read_facts({"requested_rewrite": [ANN]})) == 1


def test_a_column_of_none_is_an_absent_field():
    nothing = dict.fromkeys(("target_old", "rephrases", "locality", "portability", "loc", "loc_ans", "source", "id", "case_id"))
    assert Fact.from_dict({**ANN, **nothing, "requested_rewrite": None}) == Fact.from_dict(ANN)
    questions = [{"prompt": None, "target": None, "loc": "Who rules?", "loc_ans": "Bob"}, {"prompt": "Bob is", "target": None}]
    fact = Fact.from_dict({**ANN, "locality": [*questions, {"prompt": None, "target": None}]})
    assert fact.locality == (Question("Who rules?", "Bob"), Question("Bob is"))


def test_a_bad_record_is_named_by_its_number():
    with pytest.raises(ValueError, match=r"record 2.*target"):
        read_facts([{"subject": "a", "prompt": "{} b", "target": "c"}, {"subject": "a", "prompt": "{} b"}])


def _file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", json.dumps(ANN) + '\n\n{"subject": \n', "f.jsonl, line 3: not valid JSON"),
        ("f.jsonl", json.dumps(ANN) + '\n\n{"subject": "Ann"}\n', r"f.jsonl, record 2 \(line 3\): .*no 'prompt'"),
        ("f.json", json.dumps([ANN, {"subject": "Ann"}]), "f.json, record 2: .*no 'prompt'"),
        ("f.json", '[\n{"subject": ]', "f.json, line 2: not valid JSON"),
        ("f.json", "3", "f.json: .*list of objects, not int"),
        ("f.csv", HEADER + '"Ann",{} lives in,"Oslo\nlo"\n\nAnn,,Oslo\n', r"f.csv, record 2 \(line 5\): .*no 'prompt'"),
    ],
)
def test_an_error_in_a_file_names_its_record_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_facts(_file(tmp_path, name, content))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "the JSON is nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
        ('{"a": 1, "a": 2}', "a JSON object gives the key 'a' twice"),
    ],
)
def test_json_that_cannot_be_read_is_named_by_file_and_line(tmp_path, text, reason):
    ann = json.dumps(ANN)
    with pytest.raises(ValueError, match=f"f.jsonl, line 3: {reason}"):
        read_facts(_file(tmp_path, "f.jsonl", f"{ann}\n\n{text}\n"))
    with pytest.raises(ValueError, match=f"f.json, line 4: {reason}"):
        read_facts(_file(tmp_path, "f.json", f"[\n{ann},\n\n{text},\n{ann}]"))
    cell = f"[{text}".replace('"', '""')
    with pytest.raises(ValueError, match=f"f.csv, line 3: {reason}"):
        read_facts(_file(tmp_path, "f.csv", f'subject,prompt,target,loc\n,,,\nAnn,{{}} is,Oslo,"{cell}]"\n'))


@pytest.mark.parametrize(
    ("column", "cell", "fields"),
    [
        ("target_new", {"str": "Oslo"}, {}),
        ("target_new", ["Oslo", "Christiania"], {}),
        ("ground_truth", ["Rome", "Roma"], {"target_old": "Rome"}),
        ("rephrases", ["Ann sits in"], {"rephrases": ["Ann sits in"]}),
        ("locality", {"prompt": "Who rules?", "target": "Bob"}, {"locality": [("Who rules?", "Bob")]}),
        ("locality", {}, {}),
    ],
)
@pytest.mark.parametrize("before", ["", " \n"])
def test_a_cell_of_a_table_may_hold_a_list_or_a_mapping_as_json(tmp_path, column, cell, fields, before):
    text = (before + json.dumps(cell)).replace('"', '""')
    target = "" if column == "target_new" else "Oslo"
    path = _file(tmp_path, "f.csv", f'subject,prompt,target,{column}\nAnn,{{}} lives in,{target},"{text}"\n')
    assert read_facts(path) == [Fact(**{**ANN, **fields})]


@pytest.mark.parametrize("cell", ["['Oslo']", "{'str': 'Oslo'}", "[MASK] rules"])
@pytest.mark.parametrize("column", ["target_new", "target_old", "rephrases", "loc"])
def test_a_cell_that_looks_like_a_python_list_is_refused_with_the_way_out(tmp_path, column, cell):
    path = _file(tmp_path, "f.csv", f"subject,prompt,{column}\nAnn,{{}} lives in,{cell}\n")
    with pytest.raises(ValueError, match=rf"f.csv, line 2: the cell of '{column}' begins like JSON .*with double quotes"):
        read_facts(path)


@pytest.mark.parametrize("row", ['Ann, "{} lives, she said, in", Oslo', 'Ann, "{} lives in", Oslo', 'Ann,{} lives in,\t"Oslo"'])
def test_a_blank_before_a_quoted_cell_is_named_as_the_cause(tmp_path, row):
    with pytest.raises(ValueError, match=r"f.csv, line 2: there is a blank before the double quote"):
        read_facts(_file(tmp_path, "f.csv", f"{HEADER}{row}\n"))


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv"])
@pytest.mark.parametrize(
    ("target", "encoding"), [("Malmö", "latin-1"), ("Malmö", "utf-16"), ("Oslo", "utf-16-le"), ("Oslo", "utf-32")]
)
def test_a_file_in_another_encoding_is_refused_by_name_with_the_way_out(tmp_path, name, target, encoding):
    text = (
        f"{HEADER}Ann,{{}} lives in,{target}" if name == "f.csv" else json.dumps({**ANN, "target": target}, ensure_ascii=False)
    )
    with pytest.raises(ValueError, match=rf"{name} .*Save it as UTF-8"):
        read_facts(_file(tmp_path, name, text.encode(encoding)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "Ann,{} lives in,Oslo\nAnn,{} lives in,Oslo,Bergen\n", "line 3: .*'Bergen'.*double quotes"),
        ("subject,prompt,target,\nAnn,{} lives in,Oslo,Bergen\n", "line 2: .*'Bergen'"),
        (HEADER + 'Ann,{} lives in,Oslo\nAnn,{} lives in,"Oslo\nBob,{} lives in,Bonn\n', "line 3: not valid CSV"),
        ("subject;prompt;target\nAnn;{} lives in;Oslo\n", "line 1: columns are separated by commas, not by ';'"),
        ("subject\tprompt\ttarget\n", r"line 1: columns are separated by commas, not by '\\t'"),
        ("Subject,Prompt,Target\nAnn,{} lives in,Oslo\n", "line 1: unknown field 'Subject'; did you mean 'subject'"),
        ("Ann,{} lives in,Oslo\n", "line 1: unknown field 'Ann'.*The first line of a .csv file names its columns"),
        ("subject,prompt,target,comment\nAnn,{} lives in,Oslo,\n", "line 1: unknown field 'comment'. Rename or drop it"),
        ("subject,prompt,target,target\nAnn,{} lives in,Oslo,Bergen\n", "line 1: there are two columns 'target'"),
    ],
)
def test_a_table_that_would_be_read_wrongly_is_refused_by_line_with_the_way_out(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"f.csv, {message}"):
        read_facts(_file(tmp_path, "f.csv", content))


def test_the_index_and_the_empty_columns_that_programs_write_are_no_fields(tmp_path):
    assert read_facts(_file(tmp_path, "f.csv", f",{HEADER}0,Ann,{{}} lives in,Oslo\n")) == [Fact.from_dict(ANN)]
    assert read_facts(_file(tmp_path, "f.csv", HEADER.replace("\n", ",\n") + "Ann,{} lives in,Oslo,\n")) == [
        Fact.from_dict(ANN)
    ]


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
