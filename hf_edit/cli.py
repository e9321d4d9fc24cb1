"""The command line: ``hf-edit``. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0 only on success."""
    parser = _parser()
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"hf-edit: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-edit: interrupted, nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-edit", description="Edit what a Hugging Face language model knows.")
    parser.add_argument("--version", action="version", version=f"hf-edit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    edit = commands.add_parser("edit", help="edit facts and save them as a pack")
    edit.add_argument("model", help="id or folder of a model, or folder of a pack that the facts join")
    edit.add_argument("facts", help="a .jsonl, .json or .csv file: subject, prompt and target of each fact")
    edit.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the pack")
    edit.add_argument("--method", default="steam", help="see 'hf-edit methods' (default: steam)")
    edit.add_argument("--on-conflict", default="error", choices=("error", "replace", "keep"))
    edit.add_argument("--seed", type=int, default=0)
    edit.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeatable")
    edit.add_argument("--json", action="store_true", help="print the report as JSON")
    edit.set_defaults(run=_edit)

    ask = commands.add_parser("ask", help="answers before and after a pack's edits")
    ask.add_argument("model", help="id or folder of a model, or folder of a pack")
    ask.add_argument("prompt", nargs="+", help="texts to go on with")
    ask.add_argument("--max-new-tokens", type=int, default=16)
    ask.add_argument("--json", action="store_true")
    ask.set_defaults(run=_ask)

    evaluate = commands.add_parser("evaluate", help="how a pack's edits do: efficacy, paraphrases, locality, portability")
    evaluate.add_argument("model", help="folder of a pack, or id or folder of a model")
    evaluate.add_argument(
        "facts", nargs="?", help="what to ask about, a .jsonl, .json or .csv file; by default the pack's facts"
    )
    evaluate.add_argument("--mode", default="generate", choices=("generate", "teacher_forced", "both"))
    evaluate.add_argument("--metric", action="append", dest="metrics", metavar="NAME", help="only this one; repeatable")
    evaluate.add_argument("--batch-size", type=int, default=32)
    evaluate.add_argument("--max-new-tokens", type=int, default=20)
    evaluate.add_argument("--json", action="store_true", help="print the report as JSON, a row a fact")
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser("inspect", help="what a pack holds; reads no tensor")
    inspect.add_argument("pack", type=Path, help="folder of a pack")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)

    methods = commands.add_parser("methods", help="the editing methods and their settings")
    methods.add_argument("--json", action="store_true")
    methods.set_defaults(run=_methods)
    return parser


def _edit(options: argparse.Namespace) -> int:
    from .facts import read_facts
    from .model import EditableModelForCausalLM

    facts = read_facts(options.facts)
    if options.output.exists() and not options.output.is_dir():
        raise NotADirectoryError(f"{options.output} is a file; give a folder to save the pack in")
    settings = dict(_setting(text) for text in options.set)
    model = EditableModelForCausalLM.from_pretrained(options.model)
    report = model.edit(facts, options.method, on_conflict=options.on_conflict, seed=options.seed, config=settings)
    model.save_pretrained(options.output)
    print(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) if options.json else report)
    return 0


def _ask(options: argparse.Namespace) -> int:
    from .model import EditableModelForCausalLM

    model = EditableModelForCausalLM.from_pretrained(options.model)
    with model.disable_edits():
        before = model.ask(options.prompt, max_new_tokens=options.max_new_tokens)
    after = model.ask(options.prompt, max_new_tokens=options.max_new_tokens) if model.active_packs else before
    rows = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(options.prompt, before, after, strict=True)]
    if options.json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        for row in rows:
            print(f"{row['prompt']}\n  before  {row['before'].strip()!r}\n  after   {row['after'].strip()!r}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from .facts import read_facts
    from .model import EditableModelForCausalLM

    facts = None if options.facts is None else read_facts(options.facts)
    model = EditableModelForCausalLM.from_pretrained(options.model)
    report = model.evaluate(
        facts,
        metrics=options.metrics,
        mode=options.mode,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    print(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) if options.json else report)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .pack import EditPack

    found = EditPack.inspect(options.pack)
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=2, sort_keys=True))
        return 0
    base = found["base_model_name_or_path"] or f"a {found['base_model_type']} model"
    print(f"{found['num_facts']} facts by {found['method']} for {base}, {found['bytes'] / 1e6:.2f} MB")
    for name, tensor in found["tensors"].items():
        print(f"  {name}  {tensor['dtype']} {tensor['shape']}")
    return 0


def _methods(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from .methods import available_methods, get_method

    found: dict[str, dict[str, Any]] = {}
    for name in available_methods():
        config = get_method(name).config_class
        found[name] = {f.name: {"default": f.default, "help": f.metadata["help"]} for f in fields(config)}
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return 0
    for name, settings in found.items():
        print(name)
        for setting, about in settings.items():
            print(f"  {setting} = {about['default']!r}: {about['help']}")
    return 0


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--set takes NAME=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
