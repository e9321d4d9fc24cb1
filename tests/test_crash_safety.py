"""A save or an edit that is cut off anywhere leaves what was there, or all of the new; never something in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import FACTS, interrupted, same

import hf_edit.methods
import hf_edit.storage
from hf_edit import EditableModelForCausalLM, EditPack, PackFormatError
from hf_edit.methods import Fit
from hf_edit.methods.steam import SteamConfig
from hf_edit.methods.steam.method import Steam

FILES = {"README.md", "edit_config.json", "edits.safetensors", "facts.jsonl"}


@pytest.fixture(scope="module")
def two(world):
    """Two packs, the second without one of the first's facts."""
    one = EditPack.from_pretrained(world.folder / "steam")
    return one, one.remove([str(FACTS[0].id)])


# Saves packs in child processes, each stopped at its n-th line in the modules that write, for every n until a save ends:
# killed, then with an error of a full disk. Then two processes save into one folder while a third reads; and one that may
# write no file above a size. All in one process, which has imported torch once.
_SAVES = """
import errno, json, os, resource, shutil, signal, sys
from pathlib import Path
import hf_edit.pack, hf_edit.storage, hf_edit.methods.steam
from hf_edit import EditPack
from hf_edit.pack import save_packs

work = Path(sys.argv[3])
old, new = packs = [EditPack.from_pretrained(name) for name in sys.argv[1:3]]
watched = {hf_edit.pack.__file__, hf_edit.storage.__file__}
os.fsync = lambda descriptor: None  # of no matter to a process that dies while the system lives, and slow

def child(action):
    number = os.fork()
    if number == 0:
        try:
            action()
        except OSError as error:
            os._exit(1 if error.errno == errno.ENOSPC else 2)
        except BaseException:
            os._exit(3)
        os._exit(0)
    return number

def one(pack, _):
    pack.save_pretrained(work)

def several(first, second):
    save_packs({work / "more": (second, "card"), work: (first, "card"), work / "third": (second, "card")})

def version_of_one():
    return name_of(EditPack.from_pretrained(work).digest)

def version_of_several():
    read = [EditPack.from_pretrained(work, pack_name=name).digest for name in ("default", "more", "third")]
    return {(old.digest, new.digest, new.digest): "old", (new.digest, old.digest, old.digest): "new"}.get(tuple(read), "other")

def cut_off(how, at, save):
    lines = 0
    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            lines += 1
            if lines == at and how == "kill":
                os._exit(9)
            if lines == at:
                raise OSError(errno.ENOSPC, "No space left on device")
        return trace
    sys.settrace(trace)
    save(new, old)
    os._exit(0 if lines < at else 5)  # 5: the save got over it

def name_of(digest):
    return {old.digest: "old", new.digest: "new"}.get(digest, "other")

found = {}
ways = [(how, *what) for what in ((one, version_of_one), (several, version_of_several)) for how in ("kill", "full")]
for how, save, version in ways:
    seen, code = {"points": 0, "old": 0, "new": 0, "other": 0}, None
    while code != 0:
        seen["points"] += 1 if save is one else 3  # of several every third: each takes as long as several
        shutil.rmtree(work, ignore_errors=True)
        save(old, new)
        code = os.waitstatus_to_exitcode(os.waitpid(child(lambda: cut_off(how, seen["points"], save)), 0)[1])
        assert code in (0, 1, 5, 9), code
        seen[version()] += 1
        if seen["points"] % 4 == 0:  # now and then the next save goes on from what was left
            if save is several:  # first of one of them alone
                was = version()
                EditPack.from_pretrained(work, pack_name="more").save_pretrained(work / "more")
                assert version() == was
            save(old, new)
            assert version() == "old"
            assert not [*work.rglob(".incoming*")]
    found[how + " " + save.__name__] = seen

shutil.rmtree(work)
old.save_pretrained(work)
writers = [child(lambda pack=pack: [pack.save_pretrained(work) for _ in range(200)]) for pack in packs]
seen = {"reads": 0, "old": 0, "new": 0, "other": 0, "failed": 0}
while writers:
    ended = {w: status for w in writers if (status := os.waitpid(w, os.WNOHANG)) != (0, 0)}
    seen["failed"] += sum(status != 0 for _, status in ended.values())
    writers = [w for w in writers if w not in ended]
    seen["reads"] += 1
    seen[name_of(EditPack.from_pretrained(work).digest)] += 1
found["at once"] = {**seen, "files": sorted(p.name for p in work.iterdir())}

old.save_pretrained(work)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    new.save_pretrained(work)
    error = "none"
except OSError as raised:
    error = "OSError: " + str(raised)
found["limit"] = {"error": error, "files": sorted(p.name for p in work.iterdir())}
found["limit"]["left"] = name_of(EditPack.from_pretrained(work).digest)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saves(two, tmp_path_factory):
    """What came of all the saves."""
    folder = tmp_path_factory.mktemp("saves")
    for name, pack in zip(("old", "new"), two, strict=True):
        pack.save_pretrained(folder / name)
    arguments = [str(folder / name) for name in ("old", "new", "work")]
    done = subprocess.run([sys.executable, "-c", _SAVES, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return json.loads(done.stdout)


def _of_two_packs(world, two, folder):
    """A model with one version of two packs, which lies in a folder, and a model with another."""
    models = []
    for first, second in (two, reversed(two)):
        model = EditableModelForCausalLM(world.model.base_model, world.model.tokenizer)
        model._packs = {"default": first, "more": second}
        models.append(model)
    models[0].save_pretrained(folder)
    return models


def _version(folder, two):
    """Which of its packs' versions a folder of two packs holds."""
    names = {pack.digest: name for pack, name in zip(two, ("old", "new"), strict=True)}
    first, second = (EditPack.from_pretrained(folder, pack_name=name).digest for name in ("default", "more"))
    return names[first], {"old": "new", "new": "old"}[names[second]]


def test_several_packs_take_effect_together(world, two, tmp_path, monkeypatch):
    """Whatever the save has written when it is killed."""
    _, new = _of_two_packs(world, two, tmp_path / "packs")
    seen = []

    def watched(step):
        def run(*arguments, **named):
            seen.append(_version(tmp_path / "packs", two))
            return step(*arguments, **named)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", watched(os.rename))
        patch.setattr(Path, "replace", watched(Path.replace))
        patch.setattr(hf_edit.pack, "write_tensors", watched(hf_edit.pack.write_tensors))
        patch.setattr(hf_edit.pack, "file_digest", watched(hf_edit.pack.file_digest))
        new.save_pretrained(tmp_path / "packs")
    writing = 2 * 3 + 1  # tensors and two hashes of each pack, then the renaming
    assert seen[:writing] == [("old", "old")] * writing
    assert seen[writing:] == [("new", "new")] * 8  # their files are moved one by one
    assert _version(tmp_path / "packs", two) == ("new", "new")


@pytest.mark.parametrize("name", ["write_tensors", "file_digest"])
def test_an_error_in_the_last_of_several_packs_leaves_all_as_they_were(world, two, tmp_path, monkeypatch, name):
    _, new = _of_two_packs(world, two, tmp_path / "packs")
    step, calls = getattr(hf_edit.pack, name), []

    def full(*arguments):
        calls.append(arguments)
        if "more" in str(arguments):
            raise OSError(errno.ENOSPC, "No space left on device")
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(hf_edit.pack, name, full)
        with pytest.raises(OSError, match="No space left"):
            new.save_pretrained(tmp_path / "packs")
    assert len(calls) > 1
    assert _version(tmp_path / "packs", two) == ("old", "old")
    assert set(os.listdir(tmp_path / "packs")) == {*FILES, "more"}
    assert set(os.listdir(tmp_path / "packs" / "more")) == FILES


@pytest.mark.parametrize("how", ["kill one", "full one", "kill several", "full several"])
def test_a_save_cut_off_anywhere_leaves_the_old_pack_or_the_new_one(saves, how):
    found = saves[how]
    assert found["points"] > 80
    assert found["other"] == 0
    assert found["old"] > 40
    assert found["new"] > 5


def test_two_writers_and_a_reader_never_see_a_mixture(saves):
    assert saves["at once"]["reads"] > 1
    assert saves["at once"]["other"] == saves["at once"]["failed"] == 0
    assert set(saves["at once"]["files"]) == FILES


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_pack(saves):
    """By a real limit on the size of files."""
    assert saves["limit"]["error"].startswith("OSError")
    assert saves["limit"]["left"] == "old"
    assert set(saves["limit"]["files"]) == FILES


def test_a_read_only_folder_is_an_error_of_the_system_and_stays_as_it_was(two, tmp_path, monkeypatch):
    two[0].save_pretrained(tmp_path / "pack")

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "pack"))

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(OSError, match=r"Read-only file system: .*pack"):
        two[1].save_pretrained(tmp_path / "pack")
    monkeypatch.undo()
    assert EditPack.from_pretrained(tmp_path / "pack") == two[0]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_the_right_to_write(two, tmp_path):
    two[0].save_pretrained(tmp_path / "pack")
    (tmp_path / "pack").chmod(0o555)
    with pytest.raises(PermissionError, match="pack"):
        two[1].save_pretrained(tmp_path / "pack")
    assert EditPack.from_pretrained(tmp_path / "pack") == two[0]


def test_saving_over_the_pack_that_was_loaded_from_there(world, two, tmp_path):
    two[0].save_pretrained(tmp_path / "pack")
    world.model.rollback()
    world.model.load_pack(tmp_path / "pack")
    before = world.model.packs["default"].digest
    world.model.save_pretrained(tmp_path / "pack")
    world.model.remove_edits(str(FACTS[0].id))
    world.model.save_pretrained(tmp_path / "pack")
    assert world.model.packs["default"].digest != before
    assert EditPack.from_pretrained(tmp_path / "pack").digest == world.model.packs["default"].digest
    assert set(os.listdir(tmp_path / "pack")) == FILES
    world.model.rollback()


def test_a_save_under_way_is_never_half_read_by_another_user(world, two, tmp_path, monkeypatch):
    """Whose cache does not hold the key that the save is named by."""
    _, new = _of_two_packs(world, two, tmp_path / "packs")
    digests, seen = {pack.digest for pack in two}, []

    def watched(replace):
        def run(*arguments):
            with monkeypatch.context() as patch:
                patch.setattr(hf_edit.storage, "_key", lambda _: b"another")
                for name in ("default", "more"):
                    try:
                        seen.append(EditPack.from_pretrained(tmp_path / "packs", pack_name=name).digest)
                    except PackFormatError as error:
                        seen.append("refused" if "hash differs" in str(error) else str(error))
            return replace(*arguments)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", watched(Path.replace))
        new.save_pretrained(tmp_path / "packs")
    assert set(seen) == {*digests, "refused"}


def _cut_off(pack, folder, after):
    """A save that is killed when so many of its files have been moved into place."""
    replace, moved = Path.replace, []

    def stop(*arguments):
        if len(moved) == after:
            raise KeyboardInterrupt
        moved.append(replace(*arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            pack.save_pretrained(folder)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cut_off_save_is_forgotten_once_something_else_was_saved_there(two, tmp_path, monkeypatch, after):
    """By another user, or by copying files over it."""
    one, other = two
    one.save_pretrained(tmp_path / "pack")
    _cut_off(other, tmp_path / "pack", after)
    assert EditPack.from_pretrained(tmp_path / "pack") == other
    third = other.remove([str(FACTS[1].id)])
    with monkeypatch.context() as patch:
        patch.setattr(hf_edit.storage, "_key", lambda _: b"another")
        third.save_pretrained(tmp_path / "pack")
        assert EditPack.from_pretrained(tmp_path / "pack") == third
    assert EditPack.from_pretrained(tmp_path / "pack") == third


@pytest.mark.parametrize("damage", ["none", "short", "folder"])
def test_the_key_of_saves_is_kept_in_the_cache_and_made_anew_when_damaged(two, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("HF_EDIT_CACHE", str(tmp_path / "cache"))
    hf_edit.storage._key.cache_clear()
    two[0].save_pretrained(tmp_path / "pack")
    kept = tmp_path / "cache" / "save_key"
    key = kept.read_bytes()
    assert len(key) == 32
    assert kept.stat().st_mode & 0o777 == 0o600
    if damage != "none":
        kept.unlink()
        kept.mkdir() if damage == "folder" else kept.write_bytes(b"")
    hf_edit.storage._key.cache_clear()
    two[1].save_pretrained(tmp_path / "pack")
    assert EditPack.from_pretrained(tmp_path / "pack") == two[1]
    assert set(os.listdir(tmp_path / "pack")) == FILES
    if damage != "folder":
        assert (kept.read_bytes() == key) == (damage == "none")
    hf_edit.storage._key.cache_clear()


def test_a_save_needs_no_cache(two, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way of the cache")
    monkeypatch.setenv("HF_EDIT_CACHE", str(tmp_path / "file" / "cache"))
    for pack in two:
        pack.save_pretrained(tmp_path / "pack")
        assert EditPack.from_pretrained(tmp_path / "pack") == pack


def test_tensors_do_not_change_when_the_file_they_came_from_does(two, tmp_path):
    two[0].save_pretrained(tmp_path / "pack")
    loaded = EditPack.from_pretrained(tmp_path / "pack")
    path = tmp_path / "pack" / "edits.safetensors"
    with path.open("r+b") as file:  # as cp and rsync --inplace do
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(10)
    assert loaded == two[0]


def test_what_a_killed_save_left_is_swept_away_in_time(two, tmp_path):
    two[0].save_pretrained(tmp_path / "pack")
    for name, age in ((".saving-old", 7200), (".saving-new", 0)):
        (tmp_path / "pack" / name).mkdir()
        stamp = (tmp_path / "pack").stat().st_mtime - age
        os.utime(tmp_path / "pack" / name, (stamp, stamp))
    two[0].save_pretrained(tmp_path / "pack")
    assert set(os.listdir(tmp_path / "pack")) == {*FILES, ".saving-new"}


def test_a_folder_where_a_file_of_the_pack_would_go(two, tmp_path):
    (tmp_path / "pack" / "README.md").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="move it away"):
        two[0].save_pretrained(tmp_path / "pack")
    assert os.listdir(tmp_path / "pack") == ["README.md"]


def test_what_could_not_be_loaded_is_not_saved(two, tmp_path):
    name = next(iter(two[0].tensors))
    two[0].save_pretrained(tmp_path / "pack")
    fit = two[0].fit
    broken = {**fit.tensors, name: fit.tensors[name] * float("nan")}
    with pytest.raises(ValueError, match="NaN"):
        EditPack("steam", two[0].config, Fit(broken, fit.modules, fit.facts), two[0].base).save_pretrained(tmp_path / "pack")
    assert EditPack.from_pretrained(tmp_path / "pack") == two[0]


class _Given(Steam):
    """A method whose fit is known beforehand, and whose work on the model has nothing to protect it."""

    def __init__(self, fit: Fit) -> None:
        super().__init__("given")
        self.config_class = SteamConfig
        self._fit = fit

    def fit(self, base, facts, config, *, previous, clean, seed, progress):
        with clean():
            pass
        module = base.model.get_submodule(self._fit.modules[0])
        weight = module.weight
        original = weight.data
        weight.requires_grad_(False)
        handle = module.register_forward_hook(lambda *_: None)
        weight.data = original + 1
        weight.data = original
        handle.remove()
        weight.requires_grad_(True)
        return Fit(self._fit.tensors, self._fit.modules, tuple(facts))


@pytest.mark.usefixtures("interruptible")
def test_an_edit_interrupted_anywhere_leaves_the_model_as_it_was(world, two, monkeypatch):
    model = world.model
    model.rollback()
    method = _Given(two[0].fit)
    monkeypatch.setitem(hf_edit.methods._methods, "given", method)
    others = [fact.replace(subject=fact.subject + "ia") for fact in FACTS[1:]]
    model.load_pack(EditPack("steam", two[1].config, Fit(two[1].tensors, two[1].fit.modules, tuple(others)), two[1].base), "a")
    edited = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    folder = Path(hf_edit.__file__).parent
    watched = {str(folder / name) for name in ("model.py", "restore.py", "weights/attach.py")} | {__file__}

    def edit():
        model.edit(FACTS, "given", pack_name="b", verify=False, progress=False)

    # interrupts in the middle of what must be done whole come when it is done
    points = 0
    while interrupted(edit, watched, 1 + 13 * points):
        points += 1
        assert same(edited, model.base_model), points
        assert model.active_packs == ["a"]
        assert list(model.packs) == ["a"]
        assert not any(module._forward_hooks for module in model.base_model.modules())
        assert all(parameter.requires_grad for parameter in model.base_model.parameters())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(f"{points} interrupts")
    assert points > 30
    assert model.active_packs == ["a", "b"]
    model.rollback()
    assert same(world.clean, model.base_model)


def test_a_save_that_is_under_way_is_not_taken_for_a_pack(world, tmp_path):
    shutil.copytree(world.folder / "steam", tmp_path / "packs" / "one")
    shutil.copytree(world.folder / "lks", tmp_path / "packs" / ".saving-x")
    assert list(EditableModelForCausalLM.from_pretrained(tmp_path / "packs").packs) == ["one"]
