"""Sources of reference facts: which known facts have this object?"""

from __future__ import annotations

import json
import sys
import threading
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hf_edit import EditPack, Fact, SourceUnavailableError, SteamConfig, read_facts
from hf_edit.facts import fold
from hf_edit.references import Reference, balanced, bank, bank_relations, open_source, references_for
from hf_edit.wikidata import Wikidata

ROWS = [
    {"subject": "Lake Alma", "prompt": "{} is in", "target": "Peru"},
    {"subject": "Oslo", "prompt": "{} is in", "target": "Norway"},
    {"subject": "Cusco", "prompt": "{} is a city of", "target": "PERU"},
]


def _subjects(found):
    return [r.subject for r in found]


# --- a fact's own references ---------------------------------------------------------------------------------------------


def test_a_fact_carries_references_as_texts_facts_mappings_or_pairs():
    fact = Fact(
        "Lima",
        "{} lies in",
        "Peru",
        references=[
            "Machu Picchu is in",
            Fact("Cusco", "{} is in", "Peru", source="atlas"),
            {"subject": "Lake Alma", "prompt": "Lake Alma is in"},
            ("Arequipa", "{} is in"),
            "Machu Picchu is in",
        ],
    )
    own = ["Machu Picchu is in", *(Fact(s, "{} is in", "Peru") for s in ("Cusco", "Lake Alma", "Arequipa"))]
    assert list(fact.references) == own


def test_a_facts_references_survive_its_json_and_csv_and_leave_other_facts_ids_alone(tmp_path):
    fact = Fact("Lima", "{} lies in", "Peru", references=["Machu Picchu is in", ("Cusco", "{} is in")])
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact
    plain = Fact("Lima", "{} lies in", "Peru")
    assert plain.id == "28962ee73d5fc52e" != fact.id
    assert "references" not in plain.to_dict()
    path = tmp_path / "facts.csv"
    path.write_text('subject,prompt,target,references\nLima,{} lies in,Peru,"[""Machu Picchu is in""]"\n')
    assert read_facts(path)[0].references == ("Machu Picchu is in",)


def test_a_facts_references_survive_its_pack(llama, tmp_path):
    from conftest import QUICK_STEAM

    fact = Fact("France", "The capital of {} is", "Tokyo", references=["The capital of Japan is", ("Edo", "{} is now")])
    llama.edit(fact, progress=False, verify=False, **{**QUICK_STEAM, "steps": 1})
    llama.save_pretrained(tmp_path)
    assert EditPack.from_pretrained(tmp_path).facts == (fact,)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{} is in", "names no subject"),
        ("  ", "references is empty"),
        (3, "a reference is"),
        ("The people of LIMA live in", "mentions 'Lima'"),
        (("Lima", "{} is in"), "mentions 'Lima'"),
        (Fact("Oslo", "{} is in", "Norway"), "share the fact's target 'Peru'"),
        ({"subject": "Oslo", "prompt": "{} is in", "target": "Norway"}, "share the fact's target 'Peru'"),
        ({"prompt": "{} is in"}, "no 'subject'"),
    ],
)
def test_references_that_contradict_their_fact_or_are_ill_formed_are_refused(reference, message):
    with pytest.raises(ValueError, match=message):
        Fact("Lima", "{} lies in", "Peru", references=[reference])


def test_a_name_inside_a_word_is_no_mention_of_the_subject():
    assert Fact("Ann", "{} lives in", "Rome", references=["Annapolis is twinned with"]).references


# --- sources -------------------------------------------------------------------------------------------------------------


class _Rows:
    """Rows that can only be iterated, as those of a data set."""

    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize("form", ["list", "facts", "references", "jsonl", "json", "csv", "path", "rows", "generator", "one"])
def test_users_facts_are_a_source_in_every_form_that_facts_come_in(tmp_path, form):
    facts = [Fact(**row) for row in ROWS]
    path = tmp_path / f"own.{'json' if form == 'path' else form}"
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif form in ("json", "path"):
        path.write_text(json.dumps(ROWS))
    elif form == "csv":
        path.write_text("subject,prompt,target\n" + "".join(",".join(row.values()) + "\n" for row in ROWS))
    source = {
        "list": ROWS,
        "facts": facts,
        "references": [Reference(f.prompt, f.subject, (f.prompt,), f.target) for f in facts],
        "path": path,
        "rows": _Rows(),
        "generator": (row for row in ROWS),
        "one": ROWS[0],
    }.get(form, str(path))
    find = open_source(source)
    expected = ["Lake Alma"] if form == "one" else ["Lake Alma", "Cusco"]
    assert _subjects(find("peru")) == _subjects(find("Peru")) == expected
    assert find("Chile") == []


def test_a_source_is_read_once_however_many_objects_are_asked_for():
    class Counted(_Rows):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return super().__iter__()

    rows = Counted()
    find = open_source(rows)
    for obj in ("Peru", "Norway", "Chile"):
        find(obj)
    assert rows.reads == 1


def test_a_function_of_the_object_is_a_source():
    def own(obj):
        yield {"subject": f"Things of {obj}", "prompt": "{} come from"}
        yield Fact("Oslo", "{} lies in", "Norway")

    found = references_for("Peru", own)
    assert found[0] == Reference("{} come from", "Things of Peru", ("{} come from",), "Peru")
    assert found[1].object == "Norway", "a function may answer with another object's facts: controls need it"


def test_several_sources_are_joined_in_their_order_and_repetitions_dropped(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(ROWS))
    france = Fact("The Eiffel Tower", "{} is in the country of", "France")
    found = references_for("Peru", ("facts", ROWS[2], str(tmp_path / "own.json"), ROWS))
    assert _subjects(found) == ["Cusco", "Lake Alma"]
    joined = references_for("France", ["bank", france, {**ROWS[0], "target": "France"}])
    assert joined[:-1] == references_for("France", "bank"), "the bank has the Eiffel Tower in these words already"
    assert joined[-1].subject == "Lake Alma"


@pytest.mark.parametrize("source", ["facts", "bank", ("bank", "facts"), ROWS])
def test_facts_own_references_come_first_whatever_the_source(source):
    fact = Fact("Lima", "{} lies in", "Peru", references=["Machu Picchu is in", ("Nazca", "{} is in")])
    found = open_source(source, facts=[fact])("Peru")
    assert [r.prompts[0].replace("{}", r.subject) for r in found[:2]] == ["Machu Picchu is in", "Nazca is in"]
    assert (len(found) == 2) == (source == "facts")


def test_no_reference_mentions_an_edited_subject_as_whole_words_in_any_case():
    rows = [
        {"subject": subject, "prompt": "{} is in", "target": "Peru"}
        for subject in ("LIMA", "The port of  Lima", "Limatambo", "Lima's cathedral", "Cusco")
    ]
    rows.append({"subject": "The mayor", "prompt": "In Lima, {} speaks for", "target": "Peru"})
    facts = [Fact("lima", "{} lies in", "Chile")]
    assert _subjects(open_source(rows, facts=facts)("Peru")) == ["Limatambo", "Cusco"]
    assert _subjects(references_for("Peru", rows, exclude=["Lima", "Cusco"])) == ["Limatambo"]


def test_every_object_of_the_bank_is_found_by_its_name():
    find = open_source("bank")
    assert all(len(find(group[0].object)) >= 1 for group in bank().values())
    assert find(" pARIS ") == find("Paris")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikipedia", "no source of references 'wikipedia'.*'bank'"),
        ("given", "give them again"),
        (3, "references come from 'bank'"),
        ([{"subject": "a"}], r"record 1.*prompt"),
        (lambda obj: [{"subject": "a"}], r"record 1.*prompt"),
        (["bank", 3], "references come from"),
    ],
)
def test_what_is_no_source_is_refused_with_the_way_out(source, message):
    with pytest.raises(ValueError, match=message):
        references_for("Peru", source)


def test_a_data_set_is_loaded_by_name_and_its_package_is_asked_for_only_then(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_source("datasets:me/facts")
    asked = []
    rows = [{**row, "popularity": 3, "comment": None} for row in ROWS]  # columns that no reference needs
    fake = types.SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert _subjects(references_for("Peru", "datasets:me/facts")) == ["Lake Alma", "Cusco"]
    assert _subjects(references_for("Norway", ["datasets:me/facts:test"])) == ["Oslo"]
    assert asked == [("me/facts", "train"), ("me/facts", "test")]


def test_relations_take_turns_up_to_the_limits():
    found = [Reference(relation, f"{relation}{n}", ("{} is",), "x") for relation in "aab" for n in range(3)]
    assert _subjects(balanced(found, 5, 2)) == ["a0", "b0", "a1", "b1"]
    assert _subjects(balanced(found, 3, 9)) == ["a0", "b0", "a1"]
    assert balanced([], 5, 2) == []


def test_a_configuration_names_sources_and_calls_objects_given():
    named = SteamConfig(references=("facts", "bank", "my.jsonl"))
    assert named.to_dict()["references"] == ["facts", "bank", "my.jsonl"]
    assert references_for("Paris", SteamConfig.from_dict({"references": ["facts", "bank"]}).references)
    assert SteamConfig(references=ROWS).to_dict()["references"] == "given"
    assert SteamConfig(references=["bank", len]).to_dict()["references"] == ["bank", "given"]


def test_steam_reads_its_anchors_from_any_source(llama):
    from conftest import FACTS, QUICK_STEAM

    quick = {**QUICK_STEAM, "steps": 1, "anchor_weight": 1.0, "min_references": 1}
    prompts = [p.replace("{}", "Number 7") for relation in bank_relations() for p in relation.prompts]
    answers = zip(prompts, llama.ask(prompts, max_new_tokens=1), strict=True)
    prompt, said = next((p, a.strip()) for p, a in answers if a[:1] == " " and a[1:].isalpha())  # so this one is recalled
    own = FACTS[0].replace(target=said, references=[prompt])
    asked = []

    def source(obj):
        asked.append(obj)
        return ()

    (result,) = llama.edit(own, progress=False, references=source, **quick)
    assert result.note == "1 references"
    assert asked == [said]


# --- Wikidata ------------------------------------------------------------------------------------------------------------


class _Service(BaseHTTPRequestHandler):
    """A SPARQL service that knows Peru."""

    queries: list[str] = []  # noqa: RUF012 (cleared by the fixture)
    broken = False

    def do_POST(self):
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        (query,) = form["query"]
        self.queries.append(query)
        if '"Peru"@en' in query:
            rows = [{"item": "http://www.wikidata.org/entity/Q419"}]
        elif "wd:Q419 " in query:
            rows = [
                {"name": "Lima", "property": "P1376", "label": ""},
                {"name": "Bank of Peru", "property": "P17", "label": ""},
                {"name": "Lake Titicaca", "property": "P205", "label": "basin country"},
                {"name": "Lima", "property": "P1376", "label": "capital of"},
            ]
        else:
            rows = []
        bindings = [{name: {"type": "literal", "value": value} for name, value in row.items()} for row in rows]
        body = b"<html>" if self.broken else json.dumps({"results": {"bindings": bindings}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(_Service, "queries", [])
    server = HTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/sparql"
    server.shutdown()
    server.server_close()
    thread.join()


def test_wikidata_words_common_properties_as_the_bank_does(service):
    found = references_for("Peru", Wikidata(service))
    said = [r.prompts[0].replace("{}", r.subject) for r in found]
    assert said == ["The city of Lima serves as the capital of", "Lake Titicaca, basin country:"]
    assert all(r.object == "Peru" for r in found)


def test_wikidata_is_asked_once_an_object(service, tmp_path):
    first = Wikidata(service)("Peru")
    asked = len(_Service.queries)
    assert asked == 2
    assert Wikidata(service)("Peru") == first
    assert Wikidata(service)('A "quoted" thing') == Wikidata(service)('A "quoted" thing') == []
    assert len(_Service.queries) == asked + 1
    for path in tmp_path.rglob("wikidata/*.json"):
        path.write_text("{")  # a damaged file is fetched again
    assert Wikidata(service)("Peru") == first


def test_a_name_can_not_break_out_of_its_query(service):
    Wikidata(service)('Peru"@en } INSERT { x\n')
    assert r'"Peru\"@en } INSERT { x\n"@en' in _Service.queries[0]


def test_wikidata_that_does_not_answer_is_a_clear_error_that_names_another_source(monkeypatch, service):
    with pytest.raises(SourceUnavailableError, match=r"no answer.*references='bank'"):
        Wikidata("http://127.0.0.1:9/sparql", timeout=2)("Peru")
    monkeypatch.setattr(_Service, "broken", True)
    with pytest.raises(ConnectionError, match="no answer"):
        references_for("Peru", ("bank", Wikidata(service)))
    monkeypatch.setattr(_Service, "broken", False)
    assert Wikidata(service)("Peru"), "a failure is not remembered"


def test_the_word_wikidata_opens_the_source_without_a_request():
    assert callable(open_source("wikidata"))


def test_folding_is_what_objects_are_compared_by():
    assert fold(" Straße  X") == fold("STRASSE x")
