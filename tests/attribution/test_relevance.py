"""Relevance propagation: the forward is unchanged, and relevance adds up to what it explains."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_inversion.attribution.measures import TokenMeasure
from lightning_inversion.attribution.methods import Task, gradient_times_input
from lightning_inversion.attribution.model import LogitReader, undisturbed
from lightning_inversion.attribution.relevance import relevance_rules
from tests.tiny import FAMILIES, each, shared_tiny_model, tiny_model

TARGET = 4


def scores_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    reader = LogitReader(model)  # type: ignore[arg-type]
    measure = TokenMeasure(torch.tensor([TARGET]), None, "logit", "drop")
    task = Task(reader, reader.embed(ids), torch.tensor([len(ids) - 1]), measure)
    with undisturbed(model), relevance_rules(model):
        return gradient_times_input(task, "sum")[0]


def logit_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, -1, TARGET]


@each(FAMILIES)
def test_a_forward_is_unchanged_and_the_rules_end(family: str, ids: Tensor) -> None:
    model = shared_tiny_model(family)
    embeds = model.get_input_embeddings()(ids[None]).detach().requires_grad_()

    def logits_and_gradient() -> tuple[Tensor, Tensor]:
        logits = model(inputs_embeds=embeds).logits[0, -1]
        return logits.detach(), torch.autograd.grad(logits[TARGET], embeds)[0]

    plain, gradient = logits_and_gradient()
    with relevance_rules(model):
        ruled, relevance = logits_and_gradient()
    torch.testing.assert_close(ruled, plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(relevance, gradient)
    torch.testing.assert_close(logits_and_gradient()[1], gradient)


def test_without_attention_the_last_token_has_all_of_the_logit(ids: Tensor) -> None:
    model: LlamaForCausalLM = tiny_model("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    scores = scores_of(model, ids)
    torch.testing.assert_close(scores[-1], logit_of(model, ids))
    assert not scores[:-1].any()


def test_attention_weights_take_half_of_what_attention_adds(ids: Tensor) -> None:
    """With equal weights nothing flows on through them: of the attended values half is left."""
    model: LlamaForCausalLM = tiny_model("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    del model.model.layers[1:]
    added = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *given: added.append(given[2][0]))
    last = []
    model.model.norm.register_forward_hook(lambda *given: last.append(given[1][0]))
    logit = logit_of(model, ids)
    attended, state = added[0][0, -1], last[0][0, -1]
    norm = torch.rsqrt(state.square().mean() + model.config.rms_norm_eps)
    head = model.model.norm.weight * model.lm_head.weight[TARGET]
    attention = (attended * norm * head).sum().detach()
    scores = scores_of(model, ids)
    torch.testing.assert_close(scores.sum(), logit - attention / 2)
    assert (scores[:-1] != 0).all()


def test_activations_that_are_written_as_products_are_elementwise(ids: Tensor) -> None:
    """GPT-2's GELU is a product of two functions of its input; without biases all adds up."""
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, activation_function="gelu_new"
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wpe.weight.data.zero_()  # a bias of the input
    for name, parameter in model.named_parameters():
        if "attn.c_proj.weight" in name or name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(scores_of(model, ids)[-1], logit_of(model, ids))
