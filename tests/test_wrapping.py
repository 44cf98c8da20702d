"""Which modules become units, on a tiny model of every architecture that `scripts/breadth` trains?"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from hf_mics.errors import ConfigError
from hf_mics.plugin import MiCSPlugin
from hf_mics.sharding import checkpoint_activations, unit_plan
from hf_mics.wrapping import WrapPlan, class_name, plan_units

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from _architectures import ARCHITECTURES, build

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.cache
def model_of(name: str) -> nn.Module:
    return build(name)


def units_of(plan: WrapPlan) -> list[tuple[str, nn.Module]]:
    return plan.layers + plan.embeddings + plan.heads


def names_of(plan: WrapPlan) -> list[str]:
    return sorted(name for name, _ in plan.layers)


@every_architecture
def test_no_unit_shares_a_parameter_with_a_module_outside_of_it(name):
    model = model_of(name)
    for unit_name, unit in units_of(plan_units(model)):
        members = set(unit.modules())
        inside = {id(p) for p in unit.parameters()}
        outside = {id(p) for m in model.modules() if m not in members for p in m.parameters(recurse=False)}
        assert not inside & outside, unit_name


@every_architecture
def test_every_unit_holds_parameters_and_none_is_chosen_twice(name):
    units = units_of(plan_units(model_of(name)))
    assert all(any(True for _ in unit.parameters()) for _, unit in units)
    assert len({id(unit) for _, unit in units}) == len(units)


@every_architecture
def test_inner_units_come_first(name):
    layers = [layer for _, layer in plan_units(model_of(name)).layers]
    for position, layer in enumerate(layers):
        assert not any(later in set(layer.modules()) for later in layers[position + 1 :])


@every_architecture
def test_repeated_layers_are_found_in_all_but_albert_which_has_one(name):
    layers = plan_units(model_of(name)).layers
    assert bool(layers) == (name != "albert")


@every_architecture
def test_checkpointed_model_gets_the_same_layers(name):
    plain_names = names_of(plan_units(model_of(name)))
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=MiCSPlugin(activation_checkpointing=True)))
    wrapped = checkpoint_activations(accelerator, build(name))
    wrapped_names = names_of(plan_units(wrapped))
    assert sorted(found.replace("._checkpoint_wrapped_module", "") for found in wrapped_names) == plain_names


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_bert_needs_no_hint(name):
    plan = plan_units(model_of(name))
    assert [layer_name.rpartition(".")[2] for layer_name in names_of(plan)] == ["0", "1", "2"]
    assert {class_name(layer).removesuffix("Layer") for _, layer in plan.layers} <= {"Bert", "Roberta", "XLMRoberta"}
    assert not plan.embeddings
    assert not plan.heads
    assert any("Embeddings" in reason for reason in plan.skipped)


def test_stack_that_no_split_modules_forgets_is_found():
    model = model_of("speech_to_text")
    assert model._no_split_modules == {"Speech2TextEncoderLayer"}
    assert {"Speech2TextEncoderLayer", "Speech2TextDecoderLayer"} <= {
        class_name(layer) for _, layer in plan_units(model).layers
    }


def test_attention_inside_a_layer_is_no_unit_but_layers_inside_a_stage_are():
    assert {class_name(layer) for _, layer in plan_units(model_of("mbart")).layers} == {
        "MBartEncoderLayer",
        "MBartDecoderLayer",
    }
    assert {class_name(layer) for _, layer in plan_units(model_of("convnext")).layers} == {
        "ConvNextLayer",
        "ConvNextStage",
    }


def test_untied_embedding_and_head_are_units_and_tied_ones_are_not():
    untied, tied = plan_units(model_of("llama")), plan_units(model_of("gpt2"))
    assert [name for name, _ in untied.embeddings + untied.heads] == ["model.embed_tokens", "lm_head"]
    assert not tied.embeddings + tied.heads


def test_embedding_whose_weight_the_head_reads_by_function_stays_in_the_root():
    assert not plan_units(model_of("deberta-v2")).embeddings


def test_user_named_classes_win():
    plan = plan_units(model_of("bert"), class_names=["BertAttention"])
    assert {class_name(layer) for _, layer in plan.layers} == {"BertAttention"}
    assert len(plan.layers) == 3
    assert "BertAttention" in plan.reason


def test_user_policy_wins():
    plan = plan_units(model_of("gpt2"), policy=lambda module: type(module).__name__ == "GPT2MLP")
    assert {class_name(layer) for _, layer in plan.layers} == {"GPT2MLP"}


def test_size_based_policy_chooses_what_is_called_and_a_size_of_0_is_no_policy():
    model, size = model_of("gpt2"), 1000
    large = {name for name, m in model.named_modules() if sum(p.numel() for p in m.parameters()) > size}
    assert "transformer.h" in large, "the list of layers itself is larger"
    expected = sorted(large - {"transformer.h", "", "transformer", "transformer.wte", "lm_head"})
    policy = MiCSPlugin(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=size, activation_checkpointing=True)
    assert names_of(unit_plan(policy, model)) == expected
    assert "transformer.h.0" in expected
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=policy))
    found = names_of(unit_plan(policy, checkpoint_activations(accelerator, build("gpt2"))))
    assert sorted(name.replace("._checkpoint_wrapped_module", "") for name in found) == expected
    automatic = MiCSPlugin(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=0)
    assert names_of(unit_plan(automatic, model)) == names_of(plan_units(model))


def test_a_policy_that_accelerates_fsdp2_ignores_is_ignored_and_said_so():
    mine = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: False)
    model = model_of("gpt2")
    plan = unit_plan(MiCSPlugin(auto_wrap_policy=mine), model)
    assert names_of(plan) == names_of(plan_units(model))
    assert "auto_wrap_policy lambda_auto_wrap_policy is ignored, as by accelerate's FSDP2" in plan.describe()


def test_unknown_class_name_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="BertBlock") as caught:
        plan_units(model_of("bert"), class_names=["BertBlock", "BertLayer"])
    assert "BertLayer" in str(caught.value)
    assert "BertForMaskedLM does not contain" in str(caught.value)


def test_user_named_class_that_shares_weights_is_left_to_the_root_and_said_so():
    plan = plan_units(model_of("bert"), class_names=["BertEmbeddings", "BertLayer"])
    assert {class_name(layer) for _, layer in plan.layers} == {"BertLayer"}
    assert len(plan.skipped) == 1


def test_plain_stack_of_torch_modules_is_cut_at_its_repeated_children():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2))
    assert names_of(plan_units(model)) == ["0", "2", "3"]


class Front(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())


class LanguageModel(nn.Module):
    """An embedding inside another module, two blocks and a head, each with weights of its own."""

    def __init__(self, *declared: str, **more: nn.Module) -> None:
        super().__init__()
        self._no_split_modules = declared
        self.front, self.blocks, self.head = Front(), nn.ModuleList([Block(), Block()]), nn.Linear(4, 11)
        for name, module in more.items():
            setattr(self, name, module)

    def get_input_embeddings(self) -> nn.Module:
        return self.front.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


BLOCKS = ["blocks.0", "blocks.1"]


def test_the_root_is_named_where_it_has_parameters_of_its_own():
    parts = "2 Block, front.embed (Embedding), head (Linear)"
    for more, root in (({}, ""), ({"norm": nn.LayerNorm(4)}, ", the root")):
        plan = plan_units(LanguageModel(**more))
        assert plan.leaves_root == bool(root)
        assert plan.describe().startswith(f"{parts}{root} [")


def test_a_declared_module_that_holds_the_embedding_is_a_unit_beside_declared_layers_alone():
    assert names_of(plan_units(LanguageModel("Front"))) == BLOCKS
    assert names_of(plan_units(LanguageModel("Front", "Block"))) == ["blocks.0", "blocks.1", "front"]


def test_an_embedding_of_a_chosen_module_is_a_unit_of_its_own_only_if_that_module_is_left_to_the_root():
    model = LanguageModel()
    assert not plan_units(model, class_names=["Front", "Block"]).embeddings
    model.scale = model.front.scale = nn.Parameter(torch.ones(4))
    plan = plan_units(model, class_names=["Front", "Block"])
    assert names_of(plan) == BLOCKS
    assert [name for name, _ in plan.embeddings] == ["front.embed"]


def test_an_untied_head_is_a_unit_though_the_config_speaks_of_a_tie_and_what_is_no_linear_layer_is_none():
    model = LanguageModel()
    model.config = SimpleNamespace(tie_word_embeddings=True)
    plan = plan_units(model)
    assert [name for name, _ in plan.embeddings + plan.heads] == ["head"]
    assert not plan_units(LanguageModel(head=nn.Bilinear(4, 4, 11))).heads


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_an_embedding_that_the_model_cannot_tell_and_a_head_made_for_the_call_are_no_units(error: type[Exception]):
    class Mute(LanguageModel):
        def get_input_embeddings(self) -> nn.Module:
            raise error

        def get_output_embeddings(self) -> nn.Module:
            head = nn.Linear(4, 11)
            head.weight, head.bias = self.head.weight, self.head.bias
            return head

    assert [name for name, _ in units_of(plan_units(Mute()))] == BLOCKS


def test_a_stack_is_no_stack_of_layers_if_it_contains_or_is_contained_in_declared_ones():
    assert names_of(plan_units(LanguageModel("Linear", head=nn.Identity()))) == ["blocks.0.inner", "blocks.1.inner"]
    assert names_of(plan_units(LanguageModel("Stage", blocks=Stage()))) == ["blocks"]
    assert names_of(plan_units(LanguageModel("Stage", "Block", blocks=Stage()))) == [
        "blocks", "blocks.blocks.0", "blocks.blocks.1",
    ]  # fmt: skip
    assert names_of(plan_units(LanguageModel("Bilinear", block=nn.Bilinear(4, 4, 4)))) == ["block", *BLOCKS]


def test_a_list_of_small_or_of_different_modules_is_no_stack_and_a_stack_in_a_stack_is_part_of_it():
    small = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert names_of(plan_units(LanguageModel(small=small))) == BLOCKS
    different = (nn.Linear(4, 4), nn.Bilinear(4, 4, 4))
    for members in (different, tuple(checkpoint_wrapper(member) for member in different)):
        plan = plan_units(LanguageModel(blocks=nn.ModuleList(members)))
        assert not units_of(plan)
        assert plan.describe().startswith("the whole model as one unit [")
    assert names_of(plan_units(LanguageModel(blocks=nn.ModuleList([Stage(), Stage()])))) == BLOCKS


def test_named_classes_are_found_once_each_below_the_model_and_with_parameters_only():
    model = LanguageModel(blocks=nn.ModuleList(checkpoint_wrapper(Block()) for _ in range(2)), drop=nn.Dropout())
    assert names_of(plan_units(model, class_names=["Block", "Dropout"])) == BLOCKS
    with pytest.raises(ConfigError, match="names LanguageModel, which this LanguageModel does not contain"):
        plan_units(model, class_names=["LanguageModel"])
