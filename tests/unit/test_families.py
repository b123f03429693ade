"""Qwen2, Llama and Qwen3, with all that sets them apart: trained, sampled, exported, ended."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from bridge_engine.data.example import Example
from bridge_engine.data.template import demonstration, prompt_tokens
from bridge_engine.events import EventReader, EventWriter
from bridge_engine.export import AdapterCard, export_adapter
from bridge_engine.forward.sequences import TokenSequence, pad
from bridge_engine.policy import Policy
from bridge_engine.rollout import SamplingParams, sample
from bridge_engine.spec.checks import resolve_spec
from bridge_engine.spec.train import LoraSpec, RuntimeSpec, TemplateSpec, TrainSpec
from bridge_engine.trainer import Trainer
from inference.batch import Batch
from inference.sampling import SamplingParams as ServingParams
from tests.support.batches import written_by
from tests.support.families import FAMILIES, PADDING, save

NAMES = ("student", "teacher")
EXAMPLE = Example("e", "12+3-5?", "10", solution="12+3=15,15-5=10#10")
SPEC = {
    "method": "bridge",
    "data": {
        "prompts": "arithmetic",
        "demos": {"name": "arithmetic", "limit": 4},
        "eval": {"name": "arithmetic", "limit": 5},
    },
    "steps": 2,
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 16},
    "sft": {"batch_size": 4},
    "rl": {"kl_coef": 0.1},  # has something to say even where no answer is right
    "lora": {"rank": 4, "alpha": 8},
    "optimizer": {"student_lr": 1e-2, "teacher_lr": 1e-2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder of each family; `llama-base` has no chat template, as the real one."""
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        save(name, root / name)
    save("llama", root / "llama-base", chat=False)
    return root


@pytest.fixture(autouse=True)
def _models(folders, monkeypatch, one_thread):
    monkeypatch.setenv("BRIDGE_MODEL_DIR", str(folders))


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def policy_of(name, seed=0):
    """The family's model by its folder's name, with two adapters that do something."""
    policy = Policy.load(name, LoraSpec(rank=4, alpha=8.0), RuntimeSpec(device="cpu"))
    rng = torch.Generator().manual_seed(seed)
    for adapter in NAMES:
        policy.adapters.add(adapter, seed)
        with torch.no_grad():
            for parameter in policy.adapters.parameters(adapter):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return policy


def sampled(policy, *, merged=False, max_new_tokens=24, repeats=4):
    template = TemplateSpec(kind="plain")
    prompts = [prompt_tokens(p, template, policy.tokenizer) for p in ("1+2?", "35-4*2?", "7?")]
    with policy.using(*NAMES, merged=merged):
        completions = sample(
            policy.model,
            prompts,
            SamplingParams(max_new_tokens),
            eos_ids=policy.eos_ids,
            pad_id=policy.pad_id,
            generator=torch.Generator().manual_seed(3),
            repeats=repeats,
        )
    owners = [prompt for prompt in prompts for _ in range(repeats)]
    return list(zip(owners, completions, strict=True))


# --------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("merged", [False, True])
def test_the_samplers_logprobs_are_those_of_training_and_of_the_models_own_forward(family, merged):
    policy = policy_of(family.name)
    rows = sampled(policy, merged=merged)
    sequences = [TokenSequence(p, c.tokens, c.logprobs) for p, c in rows]
    batch = pad(sequences, pad_id=policy.pad_id, device=policy.device)
    with torch.no_grad(), policy.using(*NAMES):
        trained_BT, _ = policy.logprobs(batch)
        for row, (prompt, completion) in enumerate(rows):
            tokens = torch.tensor([prompt + completion.tokens])
            logits = policy.model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            own = logits.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
            drawn = torch.tensor(completion.logprobs)
            torch.testing.assert_close(drawn, own, atol=1e-4, rtol=0)
            torch.testing.assert_close(trained_BT[row, : len(own)], own, atol=1e-4, rtol=0)


def test_the_export_loaded_by_peft_gives_the_policys_logprobs(family, folders, tmp_path):
    policy = policy_of(family.name)
    card = AdapterCard(
        base_model=family.name,
        method="bridge",
        step=1,
        rank=8,
        template={"kind": "chat"},
        max_new_tokens=8,
    )
    export_adapter(policy.adapters, NAMES, tmp_path / "adapter", card)
    base = AutoModelForCausalLM.from_pretrained(folders / family.name, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokens = torch.randint(0, 290, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = policy.model(tokens).logits.log_softmax(-1)
        with policy.using(*NAMES):
            expected = policy.model(tokens).logits.log_softmax(-1)
        actual = theirs(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert (bare - expected).abs().max() > 0.05, "an adapter that does nothing proves nothing"


def test_all_linear_is_the_layers_peft_means_by_it_and_those_of_the_paper(family, folders):
    base = AutoModelForCausalLM.from_pretrained(folders / family.name)
    theirs = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped = {
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    layers = policy_of(family.name).adapters.layers
    assert set(layers) == wrapped
    assert {path.rpartition(".")[2] for path in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert len(layers) == 2 * 7


def test_the_tiny_models_are_of_their_family(folders):
    """What each is here for; a family that lost its quirk would prove nothing."""

    def tensors(name):
        model = AutoModelForCausalLM.from_pretrained(folders / name)
        return model, dict(model.named_parameters())

    model, has = tensors("qwen2")
    assert has["model.layers.0.self_attn.q_proj.bias"].abs().min() > 0
    assert "lm_head.weight" not in has
    model, has = tensors("llama")
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.model.rotary_emb.attention_scaling == 1.0
    assert "lm_head.weight" not in has
    assert not [path for path in has if path.endswith("bias")]
    model, has = tensors("qwen3")
    assert "lm_head.weight" in has
    assert has["model.layers.0.self_attn.q_norm.weight"].std() > 0
    assert model.config.head_dim * model.config.num_attention_heads == 2 * model.config.hidden_size


# --------------------------------------------------------------------------- begin and end


@pytest.mark.parametrize(("name", "kind"), [("llama", "chat"), ("llama", "plain"),
                                            ("llama-base", "plain")])  # fmt: skip
def test_llamas_begin_of_text_comes_once_and_first(name, kind):
    policy = policy_of(name)
    begin = policy.tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    demo = demonstration(EXAMPLE, TemplateSpec(kind=kind), policy.tokenizer, policy.eos_ids[0])
    assert demo.prompt[0] == begin
    assert (demo.prompt + demo.completion).count(begin) == 1


@pytest.mark.parametrize("kind", ["chat", "plain"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_qwen_has_no_begin_of_text(name, kind):
    policy = policy_of(name)
    ids = prompt_tokens("12+3?", TemplateSpec(kind=kind), policy.tokenizer)
    assert policy.tokenizer.eos_token_id not in ids
    if kind == "plain":
        assert policy.tokenizer.decode(ids) == "12+3?"


def test_a_chat_demonstration_ends_as_the_template_ends_an_answer(family):
    policy = policy_of(family.name)
    tokenizer = policy.tokenizer
    demo = demonstration(EXAMPLE, TemplateSpec(kind="chat"), tokenizer, policy.eos_ids[0])
    assert tokenizer.decode(demo.completion) == EXAMPLE.solution + family.answer_end
    conversation = [
        {"role": "user", "content": EXAMPLE.problem},
        {"role": "assistant", "content": EXAMPLE.solution},
    ]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    written = tokenizer.decode(demo.completion)
    assert whole.rstrip("\n").endswith(written), "the template itself would have written otherwise"
    if family.name == "qwen2":  # the two others put a date or their thoughts in between
        assert whole == tokenizer.decode(demo.prompt + demo.completion) + "\n"


def test_a_plain_demonstration_ends_with_the_end_of_text(family):
    policy = policy_of(family.name)
    demo = demonstration(EXAMPLE, TemplateSpec(kind="plain"), policy.tokenizer, policy.eos_ids[0])
    assert policy.tokenizer.decode(demo.completion) == EXAMPLE.solution + family.specials[0]


def test_sampling_stops_at_the_end_of_text_and_at_the_end_of_an_answer(family):
    policy = policy_of(family.name)
    ends = policy.tokenizer.convert_ids_to_tokens(policy.eos_ids)
    assert ends == [family.specials[0], family.answer_end]
    for end in policy.eos_ids:  # each in turn made likely, as a trained policy would
        with torch.no_grad():
            bias = torch.zeros(policy.model.config.vocab_size)
            bias[end] = 9.0
            policy.model.get_output_embeddings().bias = torch.nn.Parameter(bias)
        completions = [c for _, c in sampled(policy)]
        assert any(c.finished and c.tokens[-1] == end and len(c.tokens) > 1 for c in completions)
        for completion in completions:
            assert completion.finished == (completion.tokens[-1] in policy.eos_ids)
            assert not set(completion.tokens[:-1]) & set(policy.eos_ids)


def test_serving_stops_where_sampling_did(family):
    for end in policy_of(family.name).eos_ids:
        policy = policy_of(family.name)
        with torch.no_grad():
            bias = torch.zeros(policy.model.config.vocab_size)
            bias[end] = 50.0
            policy.model.get_output_embeddings().bias = torch.nn.Parameter(bias)
        batch = Batch(policy.model, policy.tokenizer, policy.eos_ids, rows=4, places=100)
        (written,) = written_by(batch, [5, 6, 7], ServingParams(20))
        assert (written.finish_reason, written.count) == ("stop", 1)


def test_a_base_model_without_template_has_one_end():
    assert policy_of("llama-base").eos_ids == [290]


# --------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("name", [*FAMILIES, "llama-base"])
def test_a_bridge_run_trains_evaluates_and_exports(name, folders, tmp_path):
    spec = resolve_spec(TrainSpec.model_validate({**SPEC, "model": name}))
    trainer = Trainer(spec, tmp_path, EventWriter(tmp_path))
    vocabulary = trainer.policy.model.config.vocab_size
    assert vocabulary == len(trainer.policy.tokenizer) + PADDING  # ids that mean nothing are drawn
    assert trainer.run()

    events = EventReader(tmp_path / "events.jsonl").read()
    done = events[-1]
    assert done.type == "done"
    assert done.result["eval_n"] == 5
    first, last = [e.metrics for e in events if e.type == "metric" and e.step > 0]
    assert last["sft/nll"] < first["sft/nll"], (
        "four demonstrations, twice: the second time is nearer"
    )
    for who in ("student", "teacher", "shadow"):
        assert last[f"grad_norm/{who}"] > 0
    (checkpoint,) = [e for e in events if e.type == "checkpoint"]
    base = AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / checkpoint.adapter)).eval()
    tokens = torch.randint(0, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trainer.policy.using(*NAMES):
        expected = trainer.policy.model(tokens).logits.log_softmax(-1)
        torch.testing.assert_close(
            theirs(tokens).logits.log_softmax(-1), expected, atol=1e-4, rtol=0
        )
    card = json.loads((tmp_path / checkpoint.adapter / "bridge.json").read_text())
    assert card["base_model"] == name
    assert card["template"]["kind"] == ("plain" if name == "llama-base" else "chat")


def test_a_full_student_trains_and_its_merged_model_is_the_policy(family, tmp_path):
    given = {**SPEC, "model": family.name, "student": "full"}
    given["optimizer"] = {"student_lr": 1e-3, "teacher_lr": 1e-2}
    trainer = Trainer(
        resolve_spec(TrainSpec.model_validate(given)), tmp_path, EventWriter(tmp_path)
    )
    assert trainer.run()
    (folder,) = tmp_path.glob("models/step-??????")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with trainer.policy.using():
            before = trainer.policy.module(tokens).logits.log_softmax(-1)
        with trainer.policy.using(*NAMES):
            expected = trainer.policy.module(tokens).logits.log_softmax(-1)
        actual = whole(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert (before - expected).abs().max() > 0.01, "a student that learned nothing proves nothing"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == trainer.policy.eos_ids, "whoever serves the folder stops where sampling did"
