"""What people train with: autocast, Lightning, Accelerate, FSDP2, pipelines of feature extraction, captum."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.kernels.processes import said
from tests.passes.compare import unlike

X = torch.randn(8, 3, 8, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


def network():
    return unlike(nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(192, 2)))


def pair():
    theirs = network()
    return theirs, bn.upgrade(copy.deepcopy(theirs))[0]


def test_autocast():
    theirs, ours = pair()
    outputs = []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(X)
        output.float().sum().backward()
        outputs.append(output)
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert_close(outputs[1], outputs[0], rtol=0.05, atol=0.05)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad.dtype == other.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_fits_the_same(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Fit(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 3, 8, 8)), batch_size=4)
    models = pair()
    for model in models:
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Fit(model), data)
    assert models[1][0].norm.num_batches_tracked == 8
    assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_accelerate_prepares_the_same():
    accelerate = pytest.importorskip("accelerate")
    models = pair()
    for model in models:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(2):
            loss = prepared(X).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert type(accelerator.unwrap_model(prepared)) is nn.Sequential
    assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-4)


IN_PARALLEL = """
import copy, tempfile, warnings
import torch, torch.distributed as dist
from torch import nn
import batchnorm as bn
from tests.interop.test_training_tools import X, pair
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
models = pair()
for model in models:
    {wrap}
    for _ in range(2):
        parallel(X).square().mean().backward()
        with torch.no_grad():
            for each in parallel.parameters():
                each.sub_(0.05 * each.grad)
                each.grad = None
whole = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value
states = [{{name: whole(value) for name, value in model.state_dict().items()}} for model in models]
torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        "parallel = nn.parallel.DistributedDataParallel(model)",
        "from torch.distributed.fsdp import fully_shard; fully_shard(model[0]); parallel = fully_shard(model)",
    ],
    ids=["DDP", "FSDP2"],
)
def test_wrapped_for_many_processes_it_trains_the_same(wrap):
    assert said(IN_PARALLEL.format(wrap=wrap)).splitlines()[-1] == "the same"


@pytest.mark.slow
def test_feature_extraction_returns_what_has_been_fused():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = pytest.importorskip("torchvision").models
    theirs = unlike(models.resnet18(num_classes=4)).eval()
    nodes = {"layer1": "layer1", "layer2.0.bn1": "bn1"}
    x = torch.randn(2, 3, 64, 64)
    expected = extraction.create_feature_extractor(theirs, nodes)(x)
    fused = extraction.create_feature_extractor(bn.upgrade(copy.deepcopy(theirs))[0], nodes)(x)
    assert_close(fused["layer1"], expected["layer1"], rtol=1e-4, atol=1e-4)
    assert_close(
        fused["bn1"], expected["bn1"].relu(), rtol=1e-4, atol=1e-4
    )  # a node is a layer, with what was fused
    swapped = extraction.create_feature_extractor(bn.upgrade(copy.deepcopy(theirs), fuse=False)[0], nodes)(x)
    assert_close(swapped, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
def test_captum_attributes_the_same(fuse):
    attr = pytest.importorskip("captum.attr")
    theirs = network().eval()
    ours, _ = bn.upgrade(copy.deepcopy(theirs), fuse=fuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in ("Saliency", "IntegratedGradients"):
            found = [getattr(attr, method)(model).attribute(X, target=1) for model in (theirs, ours)]
            assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
        if not fuse:  # it hooks the activations, which must be modules that are called
            found = [attr.GuidedBackprop(model).attribute(X, target=1) for model in (theirs, ours)]
            assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
        layer = [attr.LayerActivation(model, model[0].norm).attribute(X) for model in (theirs, ours)]
    if fuse:
        assert_close(layer[1], (layer[0] + X).relu(), rtol=1e-3, atol=1e-4)
    else:
        assert_close(layer[1], layer[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_trains_and_saves_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3
    )
    theirs = unlike(transformers.ResNetForImageClassification(config))
    ours, report = bn.upgrade(copy.deepcopy(theirs))
    assert report.count("swapped") == 8  # its forward is not traceable, so nothing is fused
    generator = torch.Generator().manual_seed(0)
    data = [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": torch.tensor(n % 3)}
        for n in range(16)
    ]
    for model in (theirs, ours):
        options = transformers.TrainingArguments(
            str(tmp_path / "run"), per_device_train_batch_size=4, num_train_epochs=2, optim="sgd", learning_rate=0.05,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        transformers.Trainer(model, options, train_dataset=data).train()
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-4)
    ours.eval().save_pretrained(tmp_path / "saved")
    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "saved").eval()
    x = torch.randn(4, 3, 32, 32)
    assert type(loaded.resnet.embedder.embedder.normalization) is nn.BatchNorm2d
    assert_close(loaded(x).logits, ours(x).logits, rtol=1e-5, atol=1e-5)
