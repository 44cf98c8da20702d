"""Which modules become communication units of their own?

A unit is gathered before it runs and freed after, so units should be the model's repeated layers. In order: the
classes or sizes that the user named; the model's `_no_split_modules` and the stacks of layers that it forgets
(Speech2Text names its encoder only); repeated children of ModuleLists. A large embedding or head that shares its
weights with nobody is a unit too. What is left belongs to the root.

No unit may hold a parameter that is reachable from outside it: FSDP2 would shard it twice. That is what stock
accelerate trips over on BERT, whose `_no_split_modules` names the embeddings that the head is tied to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_mics._torch_compat import class_before_sharding, is_wrapped, plain
from hf_mics.errors import ConfigError

# A ModuleList that holds less of the model than this is not its stack of layers (a list of heads, a few convolutions).
_MIN_SHARE_OF_STACK = 0.05


@dataclass
class WrapPlan:
    """Modules to shard, each with its name, `layers` inner ones first; `leaves_root` if some parameters are in none."""

    layers: list[tuple[str, nn.Module]] = field(default_factory=list)
    embeddings: list[tuple[str, nn.Module]] = field(default_factory=list)
    heads: list[tuple[str, nn.Module]] = field(default_factory=list)
    reason: str = ""
    leaves_root: bool = True
    skipped: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line: what was wrapped, how many units, and why these."""
        counts = Counter(class_name(module) for _, module in self.layers)
        parts = [f"{count} {name}" for name, count in counts.items()]
        parts += [f"{name} ({class_name(module)})" for name, module in [*self.embeddings, *self.heads]]
        parts += ["the root"] if self.leaves_root and parts else []
        return f"{', '.join(parts) or 'the whole model as one unit'} [{self.reason}]"


def plan_units(
    model: nn.Module, *, class_names: Iterable[str] = (), policy: Callable[[nn.Module], bool] | None = None
) -> WrapPlan:
    """Chooses the units of `model`.

    Args:
        model: not yet sharded; compiled and activation-checkpointed modules are looked through.
        class_names: classes to wrap, as the user named them; they win over everything found.
        policy: a size-based policy of the user's; wins likewise.

    Raises:
        ConfigError: a named class does not occur in the model.
    """
    names = list(class_names)
    if names:
        plan = WrapPlan(_instances(model, names, strict=True), reason=f"named in the config: {', '.join(names)}")
    elif policy is not None:
        chosen = [(name, m) for name, m in model.named_modules() if m is not model and _can_be_unit(name, m)]
        plan = WrapPlan([(name, m) for name, m in chosen if policy(m)], reason="by the config's policy")
    else:
        plan = _automatic(model)
    _drop_shared(model, plan)
    _add_embedding_and_head(model, plan)
    plan.layers.sort(key=lambda item: item[0].count("."), reverse=True)
    wrapped = {id(p) for _, unit in plan.layers + plan.embeddings + plan.heads for p in unit.parameters()}
    plan.leaves_root = any(id(p) not in wrapped for p in model.parameters())
    return plan


def class_name(module: nn.Module) -> str:
    """The class that the user wrote, before FSDP2 put its own in front."""
    inner = plain(module)
    return (class_before_sharding(inner) if isinstance(inner, FSDPModule) else type(inner)).__name__


def _automatic(model: nn.Module) -> WrapPlan:
    declared = getattr(model, "_no_split_modules", None) or ()
    layers = _without_parts(model, _instances(model, declared, strict=False))
    stacked = [(name, module) for name, module in layers if not holds_input_embeddings(model, module)]
    stacks = _stacks(model)
    if stacked:
        reason = f"_no_split_modules of {class_name(model)}"
        forgotten = [item for item in stacks if not any(_overlap(item[0], name) for name, _ in layers)]
        return WrapPlan(layers + forgotten, reason=reason + (" and the stacks it leaves out" if forgotten else ""))
    if stacks:
        return WrapPlan(stacks, reason="repeated children of its ModuleList or Sequential")
    return WrapPlan(reason="no repeated layers found: name them with fsdp_transformer_layer_cls_to_wrap")


def _instances(model: nn.Module, class_names: Iterable[str], *, strict: bool) -> list[tuple[str, nn.Module]]:
    wanted = set(class_names)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if module is not model and class_name(module) in wanted and not is_wrapped(name)
    ]
    missing = wanted - {class_name(module) for _, module in found}
    if strict and missing:
        classes = sorted({class_name(module) for module in model.modules() if _has_parameters(module)})
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(sorted(missing))}, which this "
            f"{class_name(model)} does not contain. Leave it out to let hf_mics find the layers, or choose "
            f"from: {', '.join(classes)}."
        )
    return [(name, module) for name, module in found if _has_parameters(module)]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _can_be_unit(name: str, module: nn.Module) -> bool:
    """Whether `module` is called: nobody calls a ModuleList or a ModuleDict, so nothing would gather it."""
    return type(module).forward is not nn.Module.forward and not is_wrapped(name)


def _without_parts(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Leaves out a chosen layer's attention or mixer: as units of their own they only make more, smaller messages.

    Layers of a chosen stage (ConvNext) are members of a stack, and stay.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    members = {id(child) for stack in stacks for child in stack.children()}
    names = [name for name, _ in layers]
    return [
        (name, module)
        for name, module in layers
        if id(module) in members or not any(name.startswith(outer + ".") for outer in names)
    ]


def _overlap(name: str, other: str) -> bool:
    """Whether one module is, or contains, the other."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def _stacks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children of the outermost ModuleLists that hold a good part of the model and repeat one class."""
    total = sum(p.numel() for p in model.parameters())
    chosen: list[tuple[str, nn.Module]] = []
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        if any(list_name.startswith(name + ".") for name, _ in chosen):
            continue
        children = [(f"{list_name}.{key}" if list_name else key, child) for key, child in module.named_children()]
        (_, repeats), *_ = Counter(type(plain(child)) for _, child in children).most_common(1)
        share = sum(p.numel() for p in module.parameters()) / max(total, 1)
        if repeats >= 2 and share >= _MIN_SHARE_OF_STACK:
            chosen += [(name, child) for name, child in children if _has_parameters(child)]
    return chosen


def _drop_shared(model: nn.Module, plan: WrapPlan) -> None:
    """Leaves to the root every chosen module that shares a parameter with a module outside it."""
    holders = _holders(model)
    kept = []
    for name, module in plan.layers:
        if all(holders[key] == count for key, count in _holders(module).items()):
            kept.append((name, module))
        else:
            plan.skipped.append(f"{name} ({class_name(module)}) shares weights with another module")
    plan.layers = kept


def _holders(module: nn.Module) -> Counter[int]:
    """In how many modules of `module` each parameter stands, by its id."""
    return Counter(id(p) for child in module.modules() for p in child.parameters(recurse=False))


def _add_embedding_and_head(model: nn.Module, plan: WrapPlan) -> None:
    """Units for an embedding and a head whose weights are their own, and which no chosen module contains.

    Tied ones stay in the root, which is gathered from the start of forward to the end of backward: exactly as long as
    they are needed. An untied head is kept between forward and backward, which follow each other there. So does an
    embedding whose config speaks of a tie that no shared parameter shows: its weight may be read outside of it
    (DeBERTa's newer head multiplies by it).
    """
    if not plan.layers:
        return
    covered = {id(p) for _, module in plan.layers for p in module.parameters()}
    holders = _holders(model)
    names = {id(module): name for name, module in model.named_modules()}
    for getter, target in (("get_input_embeddings", plan.embeddings), ("get_output_embeddings", plan.heads)):
        found = _call_or_none(model, getter)
        expected = nn.Embedding if target is plan.embeddings else nn.Linear
        if not isinstance(found, expected) or id(found) not in names:
            continue
        if target is plan.embeddings and _ties_embeddings(model):
            continue
        if all(id(p) not in covered and holders[id(p)] == 1 for p in found.parameters()):
            target.append((names[id(found)], found))


def _ties_embeddings(model: nn.Module) -> bool:
    config = getattr(plain(model), "config", None)
    return bool(getattr(config, "tie_word_embeddings", False))


def holds_input_embeddings(model: nn.Module, module: nn.Module) -> bool:
    """Whether `module` contains the model's input embeddings: then it is no layer, whatever its class is listed as."""
    embeddings = _call_or_none(model, "get_input_embeddings")
    return embeddings is not None and any(child is embeddings for child in module.modules())


def _call_or_none(model: nn.Module, method: str) -> nn.Module | None:
    """`model.method()`; None where an architecture has no such part, which transformers tells by raising."""
    getter = getattr(model, method, None)
    if getter is None:
        return None
    try:
        return getter()
    except (NotImplementedError, AttributeError):
        return None
