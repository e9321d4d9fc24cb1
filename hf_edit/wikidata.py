"""Reference facts from Wikidata, as STEAM (arXiv 2510.10398) takes them: an online source for objects the bank lacks.

Two queries an object, answered once: the item that has the object as its label (of several, the one with the most articles),
then known subjects of common properties with that item as value. What comes back is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.parse
import urllib.request
from functools import cache
from typing import Any

from ._version import __version__
from .cache import atomic_path, cache_folder
from .errors import SourceUnavailableError
from .facts import fold
from .references import Reference, bank_relations

__all__ = ["Wikidata"]

_ENDPOINT = "https://query.wikidata.org/sparql"
_SUBJECTS = 20  # of a property
_ARTICLES = 30  # subjects with articles in fewer languages are hardly known to a model
_MAX_BYTES = 1 << 22

# Properties whose statements a relation of the bank words.
_RELATIONS = {
    "P17": "landmark_country", "P19": "birth_city", "P20": "death_city", "P27": "home_country", "P30": "feature_continent",
    "P36": "capital", "P37": "official_language", "P38": "currency", "P50": "book_author", "P57": "film_director",
    "P69": "university_alumnus", "P86": "composition_composer", "P101": "field_of_work", "P103": "native_language",
    "P131": "landmark_city", "P135": "art_movement", "P136": "artist_genre", "P140": "religion", "P159": "company_city",
    "P170": "painting_artist", "P175": "song_band", "P176": "product_company", "P264": "record_label",
    "P364": "film_language", "P397": "planet_moon", "P407": "work_language", "P449": "tv_network", "P463": "band_member",
    "P495": "dish_country", "P641": "athlete_sport", "P1303": "plays_instrument", "P1376": "capital_of_country",
}  # fmt: skip

_ITEM = """SELECT ?item WHERE {{ ?item rdfs:label {label}@en ; wikibase:sitelinks ?articles }}
ORDER BY DESC(?articles) LIMIT 1"""
_KNOWN = """{{ SELECT ?subject ("{property}" AS ?property) ("" AS ?label) WHERE {{
  ?subject wdt:{property} wd:{item} ; wikibase:sitelinks ?articles . FILTER(?articles >= {articles}) }} LIMIT {subjects} }}"""
_OTHERS = """{{ SELECT ?subject ?property ?label WHERE {{
  ?subject ?direct wd:{item} ; wikibase:sitelinks ?articles . FILTER(?articles >= {articles})
  ?entity wikibase:directClaim ?direct ; rdfs:label ?label . FILTER(LANG(?label) = "en")
  BIND(STRAFTER(STR(?entity), "/entity/") AS ?property) }} LIMIT {subjects} }}"""
_STATEMENTS = """SELECT ?name ?property ?label WHERE {{ {parts}
?subject rdfs:label ?name . FILTER(LANG(?name) = "en") }}"""


class Wikidata:
    """Wikidata's public query service as a source (see `hf_edit.references.open_source`).

    Common properties get the wordings of the bank's relations; others read "{}, <property>:".

    Args:
        endpoint: address of a SPARQL service over Wikidata.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, endpoint: str = _ENDPOINT, timeout: float = 20.0) -> None:
        self.endpoint = endpoint
        self.timeout = timeout

    def __call__(self, obj: str) -> list[Reference]:
        """References whose object is `obj`, in English and as written: Wikidata's labels know upper and lower case.

        Raises:
            SourceUnavailableError: the service does not answer, or not with what was asked for.
        """
        key = hashlib.sha256(json.dumps([self.endpoint, obj]).encode()).hexdigest()[:32]
        path = cache_folder("wikidata") / f"{key}.json"
        try:
            statements = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            statements = self._statements(obj)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(statements, ensure_ascii=False), "utf-8")
        references = (_worded(name, property, label, obj) for name, property, label in statements)
        return [r for r in references if fold(obj) not in fold(r.subject)]

    def _statements(self, obj: str) -> list[tuple[str, str, str]]:
        """(subject, property's id, property's label) of statements about the object."""
        items = self._rows(_ITEM.format(label=json.dumps(obj, ensure_ascii=False)), "item")
        if not items:
            return []
        limits = {"item": items[0][0].rpartition("/")[2], "articles": _ARTICLES, "subjects": _SUBJECTS}
        parts = [_KNOWN.format(property=property, **limits) for property in _RELATIONS]
        query = _STATEMENTS.format(parts="\nUNION ".join([*parts, _OTHERS.format(**limits)]))
        found = self._rows(query, "name", "property", "label")
        return [row for row in found if not row[2] or row[1] not in _RELATIONS]

    def _rows(self, query: str, *columns: str) -> list[Any]:
        request = urllib.request.Request(
            self.endpoint,
            urllib.parse.urlencode({"query": query, "format": "json"}).encode(),
            {"Accept": "application/sparql-results+json", "User-Agent": f"hf-edit/{__version__} (Python urllib)"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                bindings = json.loads(answer.read(_MAX_BYTES))["results"]["bindings"]
            return [tuple(str(row[column]["value"]) for column in columns) for row in bindings]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceUnavailableError(
                f"Wikidata ({urllib.parse.urlsplit(self.endpoint).hostname}) gives no answer: {error}. Without a network take "
                "another source: references='bank', or a path or list of facts of your own."
            ) from error


@cache
def _prompts() -> dict[str, tuple[str, ...]]:
    return {relation.name: relation.prompts for relation in bank_relations()}


def _worded(name: str, property: str, label: str, obj: str) -> Reference:
    relation = _RELATIONS.get(property)
    prompts = _prompts()[relation] if relation else (f"{{}}, {label}:",)
    return Reference(relation or property, name.replace("{}", ""), prompts, obj)
