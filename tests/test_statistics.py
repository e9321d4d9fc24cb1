"""Key statistics: what they are, how they are kept, shared and put together."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from conftest import CORPUS, FACTS, QUICK_STEAM, TEMPLATE, tiny_model

from hf_edit import (
    BaseMismatchError,
    EditableModelForCausalLM,
    KeyStatistics,
    PackFormatError,
    PackSecurityError,
    SteamConfig,
    moments,
    statistics,
)
from hf_edit.base import Base
from hf_edit.lm.chat import chat_frame
from hf_edit.moments import Moment, folded, unfolded
from hf_edit.statistics import _Samples, cached_statistics
from hf_edit.texts import STARTERS, sample_chats, sample_freely

NAME = "model.layers.1.mlp.down_proj"
TEXTS = CORPUS[:72]


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache folder that starts empty."""
    monkeypatch.setenv("HF_EDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _other_model() -> torch.nn.Module:
    """A model of the same shape with other weights."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1.5)
    return model


def _same(one: KeyStatistics, other: KeyStatistics) -> bool:
    return one.moments.keys() == other.moments.keys() and all(
        m.tokens == other.moments[n].tokens and torch.equal(m.total, other.moments[n].total) for n, m in one.moments.items()
    )


def _counted(monkeypatch) -> list[int]:
    """The rows of each forward from here on."""
    seen: list[int] = []
    read = statistics.read_keys_and_states

    def counting(model, layout, texts, *args, **kwargs):
        seen.append(len(texts))
        return read(model, layout, texts, *args, **kwargs)

    monkeypatch.setattr(statistics, "read_keys_and_states", counting)
    return seen


# --- what is computed ----------------------------------------------------------------------------------------------------


def test_a_moment_is_the_mean_of_k_kt_over_all_tokens(model, tokenizer, own_cache):
    found = KeyStatistics.compute(model, tokenizer, TEXTS, num_tokens=10**6, modules=[1], progress=False).moments[NAME]
    keys = []
    handle = model.get_submodule(NAME).register_forward_pre_hook(lambda _, args: keys.append(args[0][0].double()))
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    K = torch.cat(keys)
    assert found.tokens == len(K)
    torch.testing.assert_close(found.matrix, K.T @ K / len(K), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["list", "generator", "rows", "txt", "jsonl"])
def test_texts_come_in_every_form(model, tokenizer, own_cache, tmp_path, form):
    path = tmp_path / f"texts.{form}"
    path.write_text("\n".join(TEXTS if form == "txt" else [json.dumps({"text": t}) for t in TEXTS]) + "\n\n")
    rows = [{"text": t, "url": "x"} for t in TEXTS]
    texts = {"list": TEXTS, "generator": (t for t in TEXTS), "rows": rows, "txt": path, "jsonl": str(path)}[form]
    expected = KeyStatistics.compute(model, tokenizer, TEXTS, modules=[1], resume=False, progress=False)
    assert _same(KeyStatistics.compute(model, tokenizer, texts, modules=[1], progress=False), expected)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no token"),
        (["a", 3], "item 2"),
        ([{"content": "a"}], "item 1.*'text'"),
        (3, "texts are strings"),
        ("texts.md", r"\.txt files"),
    ],
)
def test_what_is_no_text_is_refused(model, tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        KeyStatistics.compute(model, tokenizer, texts, progress=False)


def test_the_budget_is_kept_to_the_row(model, tokenizer, own_cache):
    found = KeyStatistics.compute(model, tokenizer, num_tokens=1000, modules=[1], progress=False)
    assert found.moments[NAME].tokens == 1024
    (read,) = KeyStatistics.compute(model, tokenizer, TEXTS, num_tokens=20, modules=[1], progress=False).moments.values()
    lengths = [len(tokenizer(t)["input_ids"]) for t in TEXTS]
    assert read.tokens == min(n for i in range(len(lengths)) if (n := sum(lengths[:i])) >= 20)


def test_modules_are_blocks_or_names_and_by_default_those_that_are_edited(architecture, tokenizer, own_cache):
    model = tiny_model(architecture)
    layout = Base(model, tokenizer).layout()
    found = KeyStatistics.compute(model, tokenizer, TEXTS[:4], progress=False)
    assert list(found.moments) == [layout.projection(b) for b in layout.recall_blocks()]
    by_name = KeyStatistics.compute(model, tokenizer, TEXTS[:4], modules=[2, layout.projection(1)], progress=False)
    assert set(by_name.moments) == {layout.projection(1), layout.projection(2)}
    shared = set(found.moments) & set(by_name.moments)
    assert all(torch.equal(found.moments[n].total, by_name.moments[n].total) for n in shared)
    with pytest.raises(ValueError, match="no module"):
        KeyStatistics.compute(model, tokenizer, TEXTS[:4], modules=["lm_head"], progress=False)


def test_an_editable_model_is_read_without_its_edits(tokenizer, own_cache):
    model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    clean = KeyStatistics.compute(model, texts=TEXTS, modules=[4], resume=False, progress=False)
    model.edit(FACTS[0], progress=False, verify=False, **{**QUICK_STEAM, "steps": 5})
    again = KeyStatistics.compute(model, texts=TEXTS, modules=[4], resume=False, progress=False)
    assert clean.fingerprint == again.fingerprint
    assert _same(clean, again)


def test_own_samples_are_of_three_kinds_at_any_budget(tokenizer, own_cache):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    base = Base(tiny_model("llama"), chatty)
    frame = chat_frame(chatty)
    rows = _Samples(base, 8 * 64, 0, True, False).rows()
    assert len(rows) == 8
    texts = chatty.batch_decode(rows)
    assert [text.startswith(frame.before) and frame.between in text for text in texts] == [False, False, False, True] * 2
    assert texts[1].startswith(STARTERS[0])
    assert texts[5].startswith(STARTERS[1])
    assert {len(rows[i]) for i in (0, 1, 2, 4, 5, 6)} == {64}
    assert _Samples(base, 8 * 64, 0, True, False).rows() == rows, "kept"
    assert _Samples(base, 8 * 64, 0, False, False).rows() == rows, "sampled again"
    without = _Samples(Base(base.model, tokenizer), 8 * 64, 0, True, False).rows()
    assert {len(row) for row in without} == {64}
    assert without[0] == rows[0], "only chats need a template"


@pytest.mark.parametrize("bos", [False, True])
def test_free_samples_begin_with_a_special_token_only_where_the_tokenizer_sets_one(tokenizer, bos_tokenizer, bos):
    base = Base(tiny_model("llama"), bos_tokenizer if bos else tokenizer)
    rows = sample_freely(base, 3, 10, 0)
    assert [len(row) for row in rows] == [10] * 3
    assert all((row[0] == base.tokenizer.bos_token_id) == bos for row in rows)
    assert rows == sample_freely(base, 3, 10, 0)
    assert rows != sample_freely(base, 3, 10, 1)


def test_a_chat_that_does_not_fit_is_not_sampled(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    base = Base(tiny_model("llama"), chatty)
    assert len(sample_chats(base, 2, 8, 0)) == 2
    base.model.config.max_position_embeddings = 24
    assert sample_chats(base, 2, 8, 0) == []
    assert sample_chats(Base(base.model, tokenizer), 2, 8, 0) == []


# --- never twice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_a_run_that_is_cut_short_goes_on_where_it_stopped(monkeypatch, model, tokenizer, own_cache, own):
    source = {"texts": None, "num_tokens": 72 * 64} if own else {"texts": TEXTS}
    whole = KeyStatistics.compute(model, tokenizer, **source, modules=[1, 2], resume=False, progress=False)
    monkeypatch.setattr(statistics, "_CHECKPOINT_SECONDS", 0.0)
    read, put = statistics.read_keys_and_states, statistics._Sum.put
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    def failing_put(self, *args):
        put(self, *args)
        if len(calls) == 3 and self.module == NAME:
            raise KeyboardInterrupt  # one module's sum is written and the other's isn't

    monkeypatch.setattr(statistics, "read_keys_and_states", failing)
    monkeypatch.setattr(statistics._Sum, "put", failing_put)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            KeyStatistics.compute(model, tokenizer, **source, modules=[1, 2], progress=False)
    monkeypatch.undo()
    monkeypatch.setenv("HF_EDIT_CACHE", str(own_cache))
    seen = _counted(monkeypatch)
    found = KeyStatistics.compute(model, tokenizer, **source, modules=[1, 2], progress=False)
    assert seen == [32, 8, 8], "block 2 from row 32 on, block 1 from row 64 on"
    assert _same(found, whole)
    assert len(list(own_cache.rglob("model.layers.*.safetensors"))) == 2, "nothing unfinished is left"


def test_sampling_that_is_cut_short_goes_on_where_it_stopped(monkeypatch, model, tokenizer, own_cache):
    settings = {"num_tokens": 130 * 64, "modules": [1], "progress": False}
    whole = KeyStatistics.compute(model, tokenizer, resume=False, **settings)
    sample = statistics.sample_ids
    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(statistics, "sample_ids", failing)
    with pytest.raises(KeyboardInterrupt):
        KeyStatistics.compute(model, tokenizer, **settings)
    assert _same(KeyStatistics.compute(model, tokenizer, **settings), whole)
    assert len(calls) == 4, "two pieces of three were left"


@pytest.mark.parametrize("own", [True, False])
def test_more_tokens_extend_what_is_there(monkeypatch, model, tokenizer, own_cache, own):
    texts = None if own else TEXTS
    tokens = sum(len(tokenizer(t)["input_ids"]) for t in TEXTS[:32]) if not own else 32 * 64
    few = KeyStatistics.compute(model, tokenizer, texts, tokens, [1], progress=False)
    whole = KeyStatistics.compute(model, tokenizer, texts, 72 * 64, [1], resume=False, progress=False)
    seen = _counted(monkeypatch)
    assert _same(KeyStatistics.compute(model, tokenizer, texts, 72 * 64, [1], progress=False), whole)
    assert sum(seen) == 40
    assert _same(KeyStatistics.compute(model, tokenizer, texts, tokens, [1], progress=False), few)
    assert sum(seen) == 40, "the smaller budget is still there, and a budget gives the same whatever was computed before"


def test_other_texts_with_the_same_beginning_are_not_taken_for_the_same(model, tokenizer, own_cache):
    settings = {"modules": [1], "progress": False}
    KeyStatistics.compute(model, tokenizer, TEXTS[:40], **settings)
    other = [*TEXTS[:39], *TEXTS[50:70]]
    expected = KeyStatistics.compute(model, tokenizer, other, resume=False, **settings)
    assert _same(KeyStatistics.compute(model, tokenizer, other, **settings), expected)


def test_another_models_statistics_are_never_taken_from_the_cache(tokenizer, own_cache):
    base = Base(tiny_model("llama"), tokenizer)
    first = cached_statistics(base, [NAME], num_tokens=512, progress=False)
    with torch.no_grad():
        base.model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1.5)
    base.forget()
    second = cached_statistics(base, [NAME], num_tokens=512, progress=False)
    assert not torch.equal(first.moments[NAME].total, second.moments[NAME].total)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-64] + b"\xff" * 64, lambda b: b""])
def test_damaged_sums_in_the_cache_are_not_built_upon(model, tokenizer, own_cache, damage):
    settings = {"modules": [1], "progress": False}
    KeyStatistics.compute(model, tokenizer, TEXTS[:32], **settings)
    (path,) = own_cache.rglob(f"{NAME}-*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    expected = KeyStatistics.compute(model, tokenizer, TEXTS, resume=False, **settings)
    assert _same(KeyStatistics.compute(model, tokenizer, TEXTS, **settings), expected)


# --- as files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(model, tokenizer):
    return KeyStatistics.compute(model, tokenizer, TEXTS, modules=[1, 2], resume=False, progress=False)


def test_saved_statistics_are_read_back_bit_for_bit(computed, tmp_path):
    computed.save_pretrained(tmp_path / "statistics")
    again = KeyStatistics.from_pretrained(tmp_path / "statistics", fingerprint=computed.fingerprint)
    assert _same(again, computed)
    assert (again.fingerprint, again.sources) == (computed.fingerprint, computed.sources)
    assert "texts" in again.sources[0]
    again.save_pretrained(tmp_path / "statistics")  # over the file that it reads from
    assert _same(KeyStatistics.from_pretrained(tmp_path / "statistics"), computed)
    files = {p.name for p in (tmp_path / "statistics").iterdir()}
    assert files == {"key_statistics.json", "key_statistics.safetensors"}


def test_statistics_of_another_model_are_refused(computed, tmp_path, tokenizer):
    computed.save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="another model"):
        KeyStatistics.from_pretrained(tmp_path, fingerprint="0" * 32)
    other = EditableModelForCausalLM(_other_model(), tokenizer)
    for given in (tmp_path, str(tmp_path), computed):
        with pytest.raises(BaseMismatchError, match="another model"):
            other.edit(FACTS[0], progress=False, statistics=given, **_quick())


def _matrices(found: KeyStatistics) -> list[torch.Tensor]:
    return [moment.matrix for moment in found.moments.values()]


def _edited(config, **changes):
    return json.dumps({**config, **changes})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("json", lambda c, b: "{", "not valid JSON"),
        ("json", lambda c, b: "[]", "no description"),
        ("json", lambda c, b: _edited(c, format_version=2), "pip install --upgrade"),
        ("json", lambda c, b: _edited(c, extra=1), "no description"),
        ("json", lambda c, b: _edited(c, sources=[1]), "sources"),
        ("json", lambda c, b: _edited(c, modules={NAME: {"tokens": True, "width": 96, "digest": ""}}), "no description"),
        ("json", lambda c, b: _edited(c, modules={NAME: c["modules"][NAME]}), "not written together"),
        ("safetensors", lambda c, b: b[:100], "can't be read"),
        ("safetensors", lambda c, b: b"", "can't be read"),
        ("safetensors", lambda c, b: b[:-4000] + bytes(4000), "damaged"),
        ("safetensors", lambda c, b: b[:-8] + b"\x00\x00\x00\x00\x00\x00\xf8\x7f", "damaged"),
    ],
)
def test_damaged_statistics_are_refused(computed, tmp_path, name, damage, message):
    computed.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "key_statistics.json").read_text())
    path = tmp_path / f"key_statistics.{name}"
    changed = damage(config, path.read_bytes())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(PackFormatError, match=message):
        _matrices(KeyStatistics.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["json", "safetensors"])
def test_statistics_are_not_read_through_a_link_out_of_their_folder(computed, tmp_path, name):
    computed.save_pretrained(tmp_path / "stats")
    path = tmp_path / "stats" / f"key_statistics.{name}"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackSecurityError, match="link out of"):
        KeyStatistics.from_pretrained(tmp_path / "stats")


def test_a_folder_without_statistics_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no key statistics"):
        KeyStatistics.from_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        KeyStatistics("x").save_pretrained(tmp_path / "file")


# --- put together --------------------------------------------------------------------------------------------------------


def test_several_machines_sums_add_up_to_one(model, tokenizer, own_cache):
    settings = {"modules": [1], "progress": False}
    one = KeyStatistics.compute(model, tokenizer, TEXTS[:40], **settings)
    two = KeyStatistics.compute(model, tokenizer, TEXTS[40:], modules=[1, 2], progress=False)
    whole = KeyStatistics.compute(model, tokenizer, TEXTS, **settings).moments[NAME]
    both = one + two
    assert both.moments[NAME].tokens == whole.tokens
    torch.testing.assert_close(both.moments[NAME].matrix, whole.matrix, atol=1e-7, rtol=1e-6)
    assert len(both.moments) == 2, "a module of one of them is taken over"
    assert both.sources == (*one.sources, *two.sources)


def test_what_can_not_be_added_is_refused(model, tokenizer, own_cache):
    settings = {"num_tokens": 256, "progress": False}
    one = KeyStatistics.compute(model, tokenizer, modules=[1], **settings)
    with pytest.raises(ValueError, match="another seed"):
        one + KeyStatistics.compute(model, tokenizer, modules=[1, 2], **settings)
    assert len((one + KeyStatistics.compute(model, tokenizer, modules=[2], **settings)).moments) == 2
    assert (one + KeyStatistics.compute(model, tokenizer, modules=[1], seed=1, **settings)).moments[NAME].tokens == 512
    with pytest.raises(BaseMismatchError, match="two models"):
        one + KeyStatistics.compute(_other_model(), tokenizer, modules=[1], **settings)


# --- in an edit ----------------------------------------------------------------------------------------------------------


def _quick(**changes):
    settings = {**QUICK_STEAM, "steps": 5, **changes}
    del settings["statistics_tokens"]
    return settings


@pytest.mark.parametrize("saved", [True, False])
def test_an_edit_works_with_given_statistics(tokenizer, tmp_path, saved):
    model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    given = KeyStatistics.compute(model, texts=TEXTS, progress=False)
    if saved:
        given = str(given.save_pretrained(tmp_path))
    packs = []
    for settings in ({"statistics": given}, {}):
        model.edit(FACTS[0], progress=False, verify=False, **_quick(**settings))
        packs.append(model.packs["default"])
        model.rollback()
    right = f"{packs[0].fit.modules[0]}.right"
    assert not torch.allclose(packs[0].tensors[right], packs[1].tensors[right])
    assert packs[0].config.to_dict()["statistics"] == (str(tmp_path) if saved else "given")


def test_given_statistics_must_hold_the_edited_modules(tokenizer, own_cache):
    model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    other = KeyStatistics.compute(model, texts=TEXTS[:4], modules=[4], progress=False)
    with pytest.raises(ValueError, match=r"have no model\.layers\.1.*modules="):
        model.edit(FACTS[0], progress=False, verify=False, statistics=other, **_quick())
    with pytest.raises(ValueError, match="folder of saved ones"):
        model.edit(FACTS[0], progress=False, verify=False, statistics=3, **_quick())
    with pytest.raises(ValueError, match="leave it out"):
        SteamConfig(statistics="folder", statistics_tokens=5)


# --- factors -------------------------------------------------------------------------------------------------------------


def _moment(width=40, tokens=400, seed=0) -> Moment:
    """Keys that use all directions but the last ten, which they hardly use."""
    K = torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    K[:, -10:] *= 1e-2
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))[0]
    K = K @ turn
    return Moment(K.T @ K / tokens, tokens)


@pytest.fixture
def kept(monkeypatch, own_cache):
    """Factors are kept however small they are."""
    monkeypatch.setattr(moments, "_WORTH_KEEPING", 1)
    return own_cache / "key_factors"


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_a_folded_triangle_unfolds_to_itself_in_half_the_room(n):
    square = torch.randn(n, n)
    assert folded(square).shape == (n + 1, (n + 1) // 2)
    assert torch.equal(unfolded(folded(square)), square.tril())


def test_an_edit_in_a_new_process_factorises_nothing(monkeypatch, kept):
    keys = torch.randn(40, 3)
    solved = _moment().solve(keys)
    monkeypatch.setattr(torch.linalg, "cholesky", None)
    assert torch.equal(_moment().solve(keys), solved)
    with pytest.raises(TypeError):
        _moment(seed=1).solve(keys)  # another matrix has a factor of its own


def test_small_factors_are_not_kept(own_cache):
    _moment().solve(torch.randn(40, 1))
    assert not (own_cache / "key_factors").exists()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-40] + bytes(40), lambda b: b.replace(b"lower", b"upper")],
)
def test_damaged_factors_are_made_again(kept, damage):
    keys = torch.randn(40, 3)
    solved = _moment().solve(keys)
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert torch.equal(_moment().solve(keys), solved)
    assert torch.equal(unfolded(safetensors.torch.load_file(path)["lower"]), unfolded(safetensors.torch.load(whole)["lower"]))


def test_a_full_disk_costs_no_edit(monkeypatch, kept, caplog):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(moments, "save_file", full)
    assert _moment().solve(torch.randn(40, 1)).shape == (40, 1)
    assert "no space left" in caplog.text


@pytest.mark.parametrize(("threshold", "dimension"), [(1e-2, 10), (100.0, 40)])
def test_the_null_space_is_spanned_by_eigenvectors_below_the_threshold(kept, threshold, dimension):
    moment = _moment()
    for _ in range(2):  # computed, then from disk
        found = _moment().null_space(threshold)
        k = found.basis.shape[1]
        assert found.dimension == dimension
        assert k == min(dimension, 40 - dimension)
        torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(k, dtype=torch.float64))
    P = found.project(torch.eye(40))
    torch.testing.assert_close(P @ P, P)
    torch.testing.assert_close(P, P.T)
    values, vectors = torch.linalg.eigh(moment.matrix)
    below = vectors[:, values < threshold]
    torch.testing.assert_close(P, below @ below.T)


def test_the_larger_null_space_is_kept_as_its_complement(kept):
    values = torch.linalg.eigvalsh(_moment().matrix)
    threshold = float(values[29:31].mean())
    found = _moment().null_space(threshold)
    assert found.complement
    assert (found.dimension, found.basis.shape[1]) == (30, 10)


def test_eigenvectors_are_computed_once_for_all_thresholds_and_again_where_damaged(monkeypatch, kept):
    first = _moment().null_space(1e-2)
    (path,) = kept.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", None)
        assert torch.equal(_moment().null_space(1e-2).basis, first.basis)
        assert _moment().null_space(1.0).dimension > 10
    data = bytearray(path.read_bytes())
    start = len(data) - 40 * 40 * 8  # the first eigenvectors
    data[start : start + 8] = bytes(8)
    path.write_bytes(data)
    assert torch.equal(_moment().null_space(1e-2).basis, first.basis)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1e-9])
def test_a_threshold_that_leaves_no_null_space_is_an_error(threshold):
    with pytest.raises(ValueError, match="threshold"):
        _moment().null_space(threshold)
