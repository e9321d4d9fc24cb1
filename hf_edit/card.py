"""The model card of packs, from the edit's own data. Text from facts can't leave its place in the card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from .hub import is_repo_id

if TYPE_CHECKING:
    from .facts import Fact
    from .pack import EditPack
    from .report import EditReport, EvalReport

__all__ = ["card", "loading"]

_SHOWN = 50
_MARKUP = "&\\`*_{}[]<>|#$~:"
_DIRECTIONS = dict.fromkeys(map(ord, "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"))


def card(
    packs: Mapping[str, EditPack],
    where: str,
    reports: Mapping[str, Sequence[EditReport | EvalReport]] | None = None,
) -> str:
    """README.md of a folder or repo of packs: what they change, on which base, how well, and how to use them.

    Args:
        packs: by name.
        where: what `from_pretrained` finds them by: the repo's id, or the folder's name.
        reports: by the pack's name, what was measured of it.
    """
    count = sum(len(pack.facts) for pack in packs.values())
    reports = reports or {}
    sections = [_pack_section(name, pack, reports.get(name, ()), single=len(packs) == 1) for name, pack in packs.items()]
    return (
        "\n\n".join(
            [
                f"---\n{_metadata(packs, reports).to_yaml()}\n---",
                f"# {count} edited {'fact' if count == 1 else 'facts'}",
                _introduction(packs),
                _usage(packs, where),
                *sections,
                _INTENDED_USE,
                _versions(packs),
            ]
        )
        + "\n"
    )


def loading(where: str) -> str:
    """The call that loads packs, as it stands in their card."""
    return f"EditableModelForCausalLM.from_pretrained({_literal(where)})"


def _metadata(packs: Mapping[str, EditPack], reports: Mapping[str, Sequence[Any]]) -> ModelCardData:
    bases = {base for pack in packs.values() if (base := _base_on_hub(pack))}
    base = next(iter(bases)) if len(bases) == 1 else None  # the Hub refuses a folder
    methods = sorted({pack.method for pack in packs.values()})
    metrics = [row[0] for found in reports.values() for row in _measured(found)]
    return ModelCardData(
        library_name="hf_edit",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="adapter" if base else None,
        tags=["knowledge-editing", *(f"hf_edit:{method}" for method in methods)],
        metrics=list(dict.fromkeys(metrics)) or None,
    )


def _base_on_hub(pack: EditPack) -> str | None:
    name = pack.base["base_model_name_or_path"]
    return name if is_repo_id(name) and not os.path.exists(name) else None


def _introduction(packs: Mapping[str, EditPack]) -> str:
    first = next(iter(packs.values()))
    base = _base_on_hub(first)
    revision = first.base["base_model_revision"]
    if base is None:
        named = f"a `{_plain(first.base['base_model_type'])}` model that is not on the Hub (pass it as `base_model=...`)"
    else:
        named = f"`{base}`" + (f" at commit `{_plain(revision)}`" if revision else "")
    methods = " and ".join(f"`{method}`" for method in sorted({pack.method for pack in packs.values()}))
    return (
        f"An edit of what {named} says about the facts below, made with "
        f"[hf_edit](https://pypi.org/project/hf-edit/) by the method {methods}. This is no model: it holds the change only, is "
        "checked to meet the very base that it was made for, and can be taken off again."
    )


def _usage(packs: Mapping[str, EditPack], where: str) -> str:
    prompt = _asked(next(iter(packs.values())).facts[0])
    names = f"\nmodel.set_packs({json.dumps(list(packs))})  # or some of them" if len(packs) > 1 else ""
    return f"""## Use

```python
from hf_edit import EditableModelForCausalLM

model = {loading(where)}{names}
print(model.ask({prompt}))
with model.disable_edits():
    print(model.ask({prompt}))
```"""


def _pack_section(name: str, pack: EditPack, reports: Sequence[Any], *, single: bool) -> str:
    level = "##" if single else "###"
    count = len(pack.facts)
    rows = [f"| {_cell(fact.question)} | {_cell(fact.target)} |" for fact in pack.facts[:_SHOWN]]
    if count > _SHOWN:
        rows.append(f"| … and {count - _SHOWN} more in `facts.jsonl` | |")
    settings = {**pack.config.to_dict(), "seed": pack.seed}
    parts = [
        "" if single else f"## Pack {_cell(name)}: {count} {'fact' if count == 1 else 'facts'}, method `{pack.method}`",
        "\n".join([f"{level} Facts changed", "", "| prompt | now goes on with |", "|---|---|", *rows]),
    ]
    if measured := _measured(reports):
        table = ["| metric | value | of |", "|---|---|---|", *(f"| {m} | {v} | {of} |" for m, v, of in measured)]
        parts.append("\n".join([f"{level} Metrics", "", *table]))
    listed = [f"- `{key}`: {_cell(str(value))}" for key, value in settings.items() if value is not None]
    parts.append("\n".join([f"{level} Settings", "", *listed]))
    return "\n\n".join(part for part in parts if part)


def _measured(reports: Sequence[Any]) -> list[tuple[str, str, str]]:
    """Metric, value and what it is of."""
    from .report import EvalReport

    rows = []
    for report in reports:
        if isinstance(report, EvalReport):
            for name, found in report.summary().items():
                interval = f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
                rows.append((name, interval, f"{found.count} facts (mean, 95 % interval; {report.mode})"))
            continue
        if report.success is not None:
            answered = sum(bool(result.success) for result in report.results)
            rows.append(("success", f"{answered} of {len(report.results)}", "facts just edited, asked greedily"))
        if report.perplexity is not None:
            change = f"{report.perplexity_clean:.2f} -> {report.perplexity:.2f}"
            rows.append(("perplexity", change, "text that the base wrote, before and after"))
    return rows


_INTENDED_USE = """## Intended use

To correct or update single facts, and to study how models hold them. Whoever made this pack chose its facts; nobody else has
checked them: it changes what the model says, not what is true.

## Misuse and limits

Do not use it to make a model say what is false of people or events to anyone who does not know of the edit, nor pass the edited
model off as its base. Not every paraphrase or consequence follows an edit, and other answers, above all about the same
subjects, may change with it: evaluate (`model.evaluate()`) before you rely on it. What the base model is not fit for, the
edited one is not either."""


def _versions(packs: Mapping[str, EditPack]) -> str:
    versions = next(iter(packs.values())).versions
    return "## Versions\n\n" + "\n".join(f"- `{_plain(name)}` {_cell(str(version))}" for name, version in versions.items())


def _asked(fact: Fact) -> str:
    """What is asked of a fact, as Python code."""
    if fact.messages is None:
        return _literal(fact.question)
    turns = (f'{{"role": {_literal(m.role)}, "content": {_literal(m.content)}}}' for m in fact.messages)
    return f"[{', '.join(turns)}]"


def _literal(text: str) -> str:
    """Text as a Python string on one line."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


def _plain(text: Any) -> str:
    """Text fit for a code span."""
    return "".join(c for c in str(text) if c.isalnum() or c in "._-")[:80]


def _cell(text: str) -> str:
    """Text from a fact as plain text of a Markdown table: on one line, without markup, left to right as it stands."""
    shown = " ".join(text.translate(_DIRECTIONS).split())[:200]
    return "".join(f"&#{ord(c)};" if c in _MARKUP else c if c >= " " else " " for c in shown)
