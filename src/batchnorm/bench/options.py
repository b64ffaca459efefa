"""The options of a measurement."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16"]

# The number of steps in a sample, by network: enough to make timer and call overhead negligible.
NETWORKS = {
    "mlp": 50,
    "resnet18": 1,
    "resnet50": 1,
    "googlenet": 1,
    "densenet121": 1,
    "mobilenet_v2": 1,
}


# Networks of evaluation whose layers can be folded.
FOLDED = (
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "googlenet",
    "densenet121",
    "regnet_y_400mf",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "timm/repvgg_a0",
)


# Networks whose memory is measured.
LARGE = ("mobilenet_v2", "densenet121", "googlenet", "resnet18", "resnet50", "vgg11_bn")


class Options(BaseModel):
    """The options of all commands; each uses those that apply to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seconds: float = Field(5.0, ge=0, description="duration of the rounds of one row")
    least: int = Field(7, ge=1, description="smallest number of rounds of a row")
    dtypes: tuple[Dtype, ...] = Field(
        ("float32", "bfloat16"), description="of the layers' inputs, separated by commas"
    )
    networks: tuple[str, ...] = Field((), description="separated by commas")
    size: int = Field(64, ge=32, description="height and width of the networks' images")
    batch: int = Field(32, ge=2, description="images in a batch; the MLP has the paper's 60")
    batches: tuple[int, ...] = Field((1, 16), description="sizes of the batches, separated by commas")
    full: bool = Field(False, description="BN alone, and BN with a residual and ReLU, too")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="of the layers; on cuda ours are Triton's kernels"
    )
    compile: bool = Field(False, description="compare torch.compile too; compiling takes minutes")
    quick: bool = Field(
        False, description="tiny shapes and three rounds, to test that it runs, not to measure"
    )
