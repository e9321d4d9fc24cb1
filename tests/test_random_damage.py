"""Whatever is changed in a pack's files at random, loading it ends with an error of ours or with the pack as it was saved."""

from __future__ import annotations

import random
import shutil

import pytest
from conftest import same
from hostile import rehash

from hf_edit import EditPack, HfEditError

COUNT = 150  # changes of each kind


def _flip(data, rng):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(data, rng):
    data[rng.randrange(len(data))] = rng.choice(b'\0\xff\n "{}[]0-9')


def _cut(data, rng):
    del data[rng.randrange(len(data)) :]


def _drop(data, rng):
    begin = rng.randrange(len(data))
    del data[begin : begin + rng.randint(1, 20)]


def _insert(data, rng):
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.randint(1, 20))


def _changed(original, change, rng):
    data = bytearray(original)
    while data == original:
        change(data, rng)
    return data


CHANGES = (_flip, _overwrite, _cut, _drop, _insert)


@pytest.mark.parametrize("method", ["steam", "lks"])
@pytest.mark.parametrize("name", ["edit_config.json", "edits.safetensors", "facts.jsonl"])
def test_a_random_change_never_loads_unnoticed(world, tmp_path, method, name):
    pack = world.copy(tmp_path, method)
    original = (pack / name).read_bytes()
    saved = EditPack.from_pretrained(pack)
    rng = random.Random(f"{method} {name}")
    refused = 0
    for number in range(COUNT):
        (pack / name).write_bytes(_changed(original, CHANGES[number % len(CHANGES)], rng))
        try:
            found = EditPack.from_pretrained(pack)
        except HfEditError:
            refused += 1
        else:  # white space of the configuration
            assert name == "edit_config.json"
            assert found == saved
            assert found.digest == saved.digest
    assert refused > 0.9 * COUNT


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_a_random_change_of_a_header_whose_hash_was_made_right_ends_with_an_error_or_a_sound_pack(world, tmp_path, method):
    """What an attacker can do, whom no hash keeps out: the process lives, the model comes back bit for bit."""
    pack = world.copy(tmp_path, method)
    path = pack / "edits.safetensors"
    original = path.read_bytes()
    config = (pack / "edit_config.json").read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    rng = random.Random(method)
    world.model.rollback()
    refused = 0
    for number in range(COUNT):
        path.write_bytes(_changed(original[:end], CHANGES[number % 2], rng) + original[end:])
        (pack / "edit_config.json").write_bytes(config)
        try:
            world.model.load_pack(rehash(pack))
        except HfEditError:
            refused += 1
        assert all(fact.subject for fact in world.model.list_edits())
        world.model.rollback()
    assert same(world.clean, world.model.base_model)
    assert refused > 0.9 * COUNT


def test_a_file_of_another_pack_never_loads_unnoticed(world, tmp_path):
    pack = world.copy(tmp_path, "steam")
    for name in ("edit_config.json", "edits.safetensors", "facts.jsonl"):
        shutil.copy(world.folder / "lks" / name, pack / name)
        if (world.folder / "lks" / name).read_bytes() != (world.folder / "steam" / name).read_bytes():
            with pytest.raises(HfEditError):
                EditPack.from_pretrained(pack)
        shutil.copy(world.folder / "steam" / name, pack / name)
