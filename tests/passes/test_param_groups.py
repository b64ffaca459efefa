"""Every parameter in one group, by what it is a parameter of."""

import pytest
import torch
from torch import nn

import batchnorm as bn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Conv2d(3, 4, 3)  # of that name
        self.bn, self.ours = nn.BatchNorm2d(4), bn.BatchNorm2d(4, activation=nn.PReLU())
        self.embedding = nn.Embedding(5, 1)
        self.scale = nn.Parameter(torch.ones(4))  # of that shape
        self.layer = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names(model, groups):
    paths = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: {paths[each] for each in group["params"]} for group in groups}


def test_by_type_and_each_once():
    model = Model()
    groups = bn.param_groups(model, 1e-4, biases=2e-4, lr=0.1)
    found = names(model, groups)
    norms = {f"{layer}.{name}" for layer in ("bn", "ours", "layer") for name in ("weight", "bias")}
    assert found["normalization"] == norms
    assert found["biases"] == {"norm.bias", "linear.bias"}
    assert found["weights"] == {
        "norm.weight",
        "ours.activation.weight",
        "embedding.weight",
        "scale",
        "linear.weight",
    }
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(1e-4, 0.1), (0, 0.1), (2e-4, 0.1)]
    assert sum(map(len, found.values())) == sum(each.requires_grad for each in model.parameters())


def test_shared_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    assert len(names(model, bn.param_groups(model, 1e-4))["weights"]) == 1
    model[1].bias = model[2].bias
    assert sum(len(group["params"]) for group in bn.param_groups(model, 1e-4)) == 4  # both do not decay
    with pytest.raises(
        ValueError, match=r"1\.bias and 2\.bias are one parameter, of biases and of normalization"
    ):
        bn.param_groups(model, 1e-4, biases=1e-4)


def test_the_optimizers_of_torch_and_timm_take_them():
    model = Model()
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        make(bn.param_groups(model, 1e-4), lr=0.1)
    optim = pytest.importorskip("timm.optim")
    for name in ("sgd", "lamb", "adamw", "rmsproptf"):
        optimizer = optim.create_optimizer_v2(bn.param_groups(model, 1e-4), opt=name, lr=0.1)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0, 0]


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "evonorm", "vit_tiny_patch16_224"])
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model({"evonorm": "resnetv2_50d_evos"}.get(name, name))
    groups = bn.param_groups(model, 1e-4)
    found = names(model, groups)
    assert sum(map(len, found.values())) == len(list(model.parameters()))
    small = {
        path
        for path, each in model.named_parameters()
        if "norm" in path.rpartition(".")[0].rpartition(".")[2]
    }
    assert small <= found["normalization"]


def test_the_scales_can_be_a_group_of_their_own():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False)
    )
    groups = {each["name"]: each for each in bn.param_groups(model, 1e-4, scales=1e-3)}
    assert {id(p) for p in groups["scales"]["params"]} == {id(model[1].weight), id(model[2].weight)}
    assert groups["scales"]["weight_decay"] == 1e-3 and len(groups["normalization"]["params"]) == 2


def test_biases_of_recurrent_layers_and_attention_and_norms_with_an_activation():
    import timm

    norm = timm.layers.FilterResponseNormAct2d(4)  # type: ignore[attr-defined]
    model = nn.ModuleList([nn.LSTM(4, 4), nn.MultiheadAttention(4, 2), norm])
    groups = {each["name"]: {id(p) for p in each["params"]} for each in bn.param_groups(model, 1e-4)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("bias" in names[each] for each in groups["biases"]) and len(groups["biases"]) == 4
    assert {names[each] for each in groups["weights"]} == {
        "0.weight_ih_l0", "0.weight_hh_l0", "1.in_proj_weight", "1.out_proj.weight",
    }  # fmt: skip
