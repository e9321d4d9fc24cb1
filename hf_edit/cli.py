"""The command line: ``hf-edit``, which is ``hf edit`` where it is an extension of the Hub's. Nothing heavy is imported
before a command needs it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .model import EditableModelForCausalLM

__all__ = ["main"]

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_MISTAKES = (OSError, ValueError, RuntimeError, NotImplementedError, KeyError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 on success only, 1 where the command failed, 2 for wrong arguments, 130 when interrupted.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _MISTAKES as error:
        if options.debug or os.environ.get("HF_EDIT_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"hf-edit: {message or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-edit: interrupted", file=sys.stderr)
        return 130
    return 0


# --- arguments ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-edit",
        description="Edit what a Hugging Face language model knows, and share the edits as packs.",
        epilog="MODEL and PACK are folders or ids on the Hub. Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"hf-edit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    edit = _command(commands, "edit", _edit, "edit facts and save them as a pack")
    edit.add_argument("model", metavar="MODEL", help="a model, or a pack that the facts join")
    edit.add_argument("facts", metavar="FACTS", help="a .jsonl, .json or .csv file: subject, prompt and target of each fact")
    _add_output(edit, "folder for the pack")
    edit.add_argument("--method", default="steam", help="see 'hf-edit methods' (default: steam)")
    edit.add_argument("--pack-name", default="default", metavar="NAME", help="the pack that the facts join")
    edit.add_argument("--on-conflict", default="error", choices=("error", "replace", "keep"))
    edit.add_argument("--seed", type=int, default=0)
    edit.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeatable")
    _add_loading(edit)

    ask = _command(commands, "ask", _ask, "answers before and after a pack's edits, side by side")
    ask.add_argument("model", metavar="PACK", help="a pack, or a model")
    ask.add_argument("prompt", metavar="PROMPT", nargs="+", help="texts to go on with")
    ask.add_argument("--chat", action="store_true", help="put each text to the model as a user's turn, by its chat template")
    ask.add_argument(
        "--max-new-tokens", type=int, help="length of an answer at most (default: 16, and 64 in a chat)", metavar="N"
    )
    _add_loading(ask)

    evaluate = _command(commands, "evaluate", _evaluate, "how a pack's edits do: efficacy, paraphrases, locality, portability")
    evaluate.add_argument("model", metavar="PACK", help="a pack, or a model")
    evaluate.add_argument(
        "facts",
        metavar="FACTS",
        nargs="?",
        help="what to ask about, a .jsonl, .json or .csv file; by default the pack's facts",
    )
    evaluate.add_argument("--mode", default="generate", choices=("generate", "teacher_forced", "both"))
    evaluate.add_argument("--metric", action="append", dest="metrics", metavar="NAME", help="only this one; repeatable")
    evaluate.add_argument("--batch-size", type=int, default=32)
    evaluate.add_argument(
        "--max-new-tokens", type=int, default=20, help="of an answer, and more where its target needs more (default: 20)"
    )
    _add_loading(evaluate)

    inspect = _command(commands, "inspect", _inspect, "what a pack holds; reads and downloads no tensor")
    inspect.add_argument("pack", metavar="PACK")
    inspect.add_argument("--pack-name", default="default", metavar="NAME", help="which, of several")
    _add_source(inspect)

    merge = _command(commands, "merge", _merge, "write weight edits into a plain model that needs no hf_edit")
    merge.add_argument("pack", metavar="PACK")
    _add_output(merge, "folder for the model")
    _add_loading(merge, "float32", "float32; into coarser ones the edit is rounded")

    push = _command(
        commands, "push", _push, "share a pack, an LKS editor, or key statistics on the Hub: one commit, no base weights"
    )
    push.add_argument("folder", metavar="PACK", type=Path, help="folder of a pack, an editor, or key statistics")
    push.add_argument("repo_id", metavar="REPO", help="USER/NAME, or NAME for your own; made where there is none")
    push.add_argument("--private", action="store_true", default=None, help="make the repo private, where it is made")
    push.add_argument("--revision", metavar="BRANCH", help="the branch to push to (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.add_argument("--message", dest="commit_message", metavar="TEXT", help="of the commit")
    push.add_argument("--description", dest="commit_description", metavar="TEXT", help="of the commit or pull request")
    push.add_argument("--tag", action="append", dest="tags", metavar="TAG", help="a tag for the model card; repeatable")
    _add_token(push)

    export = _command(commands, "export-peft", _export_peft, "write a pack of weight edits as a LoRA adapter for PEFT")
    export.add_argument("pack", metavar="PACK")
    _add_output(export, "folder for the adapter")
    export.add_argument("--pack-name", default="default", metavar="NAME", help="which, of several")
    _add_source(export)

    _command(commands, "methods", _methods, "the editing methods and their settings")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--debug", action="store_true", help="show where an error comes from (also: HF_EDIT_DEBUG=1)")
    command.set_defaults(run=run)
    return command


def _add_output(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help=help)


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", metavar="NAME", help="branch, tag or sha on the Hub of what is loaded")
    command.add_argument("--local-files-only", action="store_true", help="take nothing from the Hub but what is in the cache")
    _add_token(command)


def _add_loading(command: argparse.ArgumentParser, dtype: str | None = None, default: str = "as the model was saved") -> None:
    """Options of commands that load a model."""
    command.add_argument("--dtype", choices=_DTYPES, default=dtype, help=f"of the weights (default: {default})")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--device", type=_device, help="where the model goes: cuda, cuda:1, mps, cpu")
    where.add_argument("--device-map", metavar="MAP", help="how several devices share it: auto, balanced, sequential")
    _add_source(command)


def _device(name: str) -> str:
    import torch

    try:
        return str(torch.empty(0, device=name).device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"there is no device {name!r} here, as cuda, cuda:1, mps or cpu ({reason})") from error


def _add_token(command: argparse.ArgumentParser) -> None:
    command.add_argument("--token", help="for the Hub; better: log in with 'hf auth login', or set HF_TOKEN")


def _source(options: argparse.Namespace) -> dict[str, Any]:
    return {"revision": options.revision, "local_files_only": options.local_files_only, "token": options.token}


def _load(name: str, options: argparse.Namespace) -> EditableModelForCausalLM:
    """The model that a command works on, where and as its options say."""
    from .model import EditableModelForCausalLM

    where = {"": options.device} if options.device else options.device_map
    chosen = {"dtype": options.dtype, "device_map": where}
    given = {name: value for name, value in chosen.items() if value is not None}
    return EditableModelForCausalLM.from_pretrained(name, **given, **_source(options))


def _check_output(folder: Path) -> None:
    """Fail before the work rather than after it.

    Raises:
        OSError: nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there} can't be written to; give another folder")


def _print(options: argparse.Namespace, value: Any, text: Any) -> None:
    """The result: for programs or for people."""
    print(json.dumps(value, ensure_ascii=False, indent=2) if options.json else text)


# --- commands -----------------------------------------------------------------------------------------------------------


def _edit(options: argparse.Namespace) -> None:
    from .reading import read_facts

    facts = read_facts(options.facts)
    _check_output(options.output)
    settings = dict(_setting(text) for text in options.set)
    model = _load(options.model, options)
    report = model.edit(
        facts,
        options.method,
        config=settings,
        pack_name=options.pack_name,
        on_conflict=options.on_conflict,
        seed=options.seed,
    )
    model.save_pretrained(options.output)
    _print(options, report.to_dict(), report)


def _ask(options: argparse.Namespace) -> None:
    model = _load(options.model, options)
    how = {"chat": options.chat, "max_new_tokens": options.max_new_tokens}
    with model.disable_edits():
        before = model.ask(options.prompt, **how)
    after = model.ask(options.prompt, **how) if model.active_packs else before
    rows = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(options.prompt, before, after, strict=True)]
    lines = [f"{row['prompt']}\n  before  {row['before'].strip()!r}\n  after   {row['after'].strip()!r}" for row in rows]
    _print(options, rows, "\n".join(lines))


def _evaluate(options: argparse.Namespace) -> None:
    from .reading import read_facts

    facts = None if options.facts is None else read_facts(options.facts)
    model = _load(options.model, options)
    report = model.evaluate(
        facts,
        metrics=options.metrics,
        mode=options.mode,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    _print(options, report.to_dict(), report)


def _inspect(options: argparse.Namespace) -> None:
    from .pack import EditPack

    found = EditPack.inspect(options.pack, pack_name=options.pack_name, **_source(options))
    base = found["base_model_name_or_path"] or f"a {found['base_model_type']} model"
    at = f" at {found['base_model_revision'][:8]}" if found["base_model_revision"] else ""
    head = f"{found['num_facts']} facts by {found['method']} for {base}{at}, {found['bytes'] / 1e6:.2f} MB"
    tensors = [f"  {name}  {tensor['dtype']} {tensor['shape']}" for name, tensor in found["tensors"].items()]
    others = [f"also there, and loaded along: {name} (see --pack-name {name})" for name in found["other_packs"]]
    _print(options, dict(sorted(found.items())), "\n".join([head, *tensors, *others]))


def _merge(options: argparse.Namespace) -> None:
    _check_output(options.output)
    model = _load(options.pack, options)
    if not model.active_packs:
        raise ValueError(f"{options.pack} holds no edit pack, so there is nothing to merge")
    tokenizer = model.tokenizer
    model.merge_and_unload().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    _print(options, {"output": str(options.output)}, f"a plain model: {options.output}")


def _push(options: argparse.Namespace) -> None:
    if not options.folder.is_dir():
        raise FileNotFoundError(f"there is no folder {options.folder}")
    from .hub import PushToHub
    from .methods.lks import LKSEditor
    from .share import PackFolder
    from .statistics import KeyStatistics

    kinds: dict[str, Callable[[Path], PushToHub]] = {
        "key_statistics.json": KeyStatistics.from_pretrained,
        "editor_config.json": LKSEditor.from_pretrained,
    }
    kind = next((kind for file, kind in kinds.items() if (options.folder / file).exists()), PackFolder)
    shared = kind(options.folder)
    names = ("private", "revision", "create_pr", "commit_message", "commit_description", "tags", "token")
    commit = shared.push_to_hub(options.repo_id, **{name: getattr(options, name) for name in names})
    found = {"repo_id": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}
    _print(options, found, commit.pr_url or commit.commit_url)


def _export_peft(options: argparse.Namespace) -> None:
    from .pack import EditPack

    _check_output(options.output)
    pack = EditPack.from_pretrained(options.pack, pack_name=options.pack_name, **_source(options))
    pack.export_peft(options.output)
    _print(options, {"output": str(options.output)}, f"a LoRA adapter: {options.output}")


def _methods(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from .methods import available_methods, get_method

    found: dict[str, dict[str, Any]] = {}
    for name in available_methods():
        config = get_method(name).config_class
        found[name] = {f.name: {"default": f.default, "help": f.metadata["help"]} for f in fields(config)}
    lines = []
    for name, settings in found.items():
        lines += [name, *(f"  {setting} = {about['default']!r}: {about['help']}" for setting, about in settings.items())]
    _print(options, found, "\n".join(lines))


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--set takes NAME=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
