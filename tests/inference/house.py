"""Small random bases and adapters, and an inference process's application to ask about them."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from httpx import URL
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from inference.batch import Batch
from inference.requests import Generation
from tests.support.waiting import PATIENCE, until

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


def complete(client: Any, model: str, prompt: str | list[str] = "12+3-5?", **fields: Any) -> Any:
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

    def __init__(self, app: Any, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
        """`after`: so many tokens of each row are written first."""
        self.running, self._release = threading.Event(), threading.Event()
        self.generations: set[Generation] = set()
        """Those that had been sent when it held."""
        self.written = 0
        """Tokens, of all rows."""
        advance, took, left = Batch.advance, Batch._took, after

        def held(batch: Batch, tell: Any) -> None:
            nonlocal left
            if left:
                left -= 1
            else:
                self.generations |= {*batch.waiting, *batch.running()}
                self.running.set()
                if not self._release.wait(60):
                    self.release()  # the test has failed; it is to end too
            advance(batch, tell)

        def counted(batch: Batch, *row_and_token: Any) -> bool:
            self.written += 1
            return took(batch, *row_and_token)

        monkeypatch.setattr(Batch, "advance", held)
        monkeypatch.setattr(Batch, "_took", counted)
        self.release = self._release.set
        self.scheduler = app.state.scheduler

    def waiting(self, count: int) -> None:
        until(lambda: self.scheduler.figures()["waiting"] >= count)

    def ended(self) -> None:
        until(lambda: not any(self.scheduler.figures().values()))


def hang_up_on(held: Held, url: str, path: str, **body: Any) -> int:
    """Asks, leaves while the answer is held, and lets go on what is left of it. So many tokens were
    written; checked is that none of them came afterwards."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection((URL(url).host, URL(url).port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert held.running.wait(PATIENCE)
        written = held.written
    until(lambda: all(generation.cancelled for generation in held.generations))
    held.release()
    held.ended()
    assert held.generations
    assert held.written == written
    return written


def loaded(client: Any) -> set[str]:
    return {card["id"] for card in client.get("/v1/models").json()["data"]}
