"""Small random bases and adapters, and an inference process's application to ask about them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from inference.batch import Batch
from tests.support.waiting import until

ALPHABET = "0123456789+-*()=,#?"


CONTEXT = 48


def save_base(folder: Path, seed: int, chat: bool = False) -> None:
    """A random Qwen2 of a few thousand parameters over single characters."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    if chat:
        fast.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def save_adapter(base: Path, folder: Path, seed: int, base_name: str, rank: int = 4) -> None:
    """A LoRA adapter with random weights large enough to change every answer."""
    config = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.5)
    model.save_pretrained(folder)
    (folder / "bridge.json").write_text(json.dumps({"base_model": base_name, "step": 1}))


def serving(app: Any) -> TestClient:
    """A client that calls the application by a name of its own."""
    return TestClient(app, base_url="http://127.0.0.1")


def load(client: Any, name: str, path: Path, base: str | None = None) -> Any:
    body = {"lora_name": name, "lora_path": str(path), "base_model": base}
    return client.post("/v1/load_lora_adapter", json=body)


def complete(client: Any, model: str, prompt: str = "12+3-5?", **fields: Any) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0} | fields
    return client.post("/v1/completions", json=body)


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def reference(house: Path, base: str, adapter: str | None, prompt: str = "12+3-5?") -> str:
    """Greedy decoding by plain PEFT with one adapter alone, token by token, without any cache."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(house / base)
    model: Any = Qwen2ForCausalLM.from_pretrained(house / base).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, house / adapter).eval()
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(16):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            if token == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


class Held:
    """Keeps the thread that computes from going on until `release`."""

    def __init__(self, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running, self._release = threading.Event(), threading.Event()
        advance = Batch.advance

        def held(batch: Batch, tell: Any) -> None:
            self.running.set()
            self._release.wait(60)
            advance(batch, tell)

        monkeypatch.setattr(Batch, "advance", held)
        self.release = self._release.set
        self.scheduler = app.state.scheduler

    def waiting(self, count: int) -> None:
        until(lambda: self.scheduler.figures()["waiting"] >= count)


def loaded(client: Any) -> set[str]:
    return {card["id"] for card in client.get("/v1/models").json()["data"]}
