"""Fresh networks of torchvision and timm with measured statistics: no error or warning may be found in them."""

import json
import sys
import warnings
from collections import Counter
from typing import Any

import torch

import batchnorm as bn
from batchnorm.graph.modules import layers_of

TIMM = [
    "adv_inception_v3", "bat_resnext26ts", "botnet26t_256", "cait_xxs24_224", "coat_tiny", "coatnet_nano_rw_224",
    "convmixer_768_32", "crossvit_tiny_240", "cs3darknet_s", "cspresnet50", "darknet17", "densenet121", "dla34",
    "dm_nfnet_f0", "dpn48b", "eca_nfnet_l0", "ecaresnet26t", "edgenext_xx_small", "efficientformer_l1",
    "efficientformerv2_s0", "efficientnet_b0", "efficientnet_lite0", "efficientvit_b0", "efficientvit_m0",
    "ese_vovnet19b_dw", "fastvit_t8", "fbnetc_100", "fbnetv3_b", "gcresnet33ts", "gernet_s", "ghostnet_050",
    "ghostnetv2_100", "halonet26t", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0", "hrnet_w18_small",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lambda_resnet26t", "lcnet_050", "lcnet_100",
    "legacy_seresnet18", "legacy_xception", "levit_128s", "mixnet_s", "mnasnet_small", "mobilenetv1_100",
    "mobilenetv2_050", "mobilenetv3_large_100", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0",
    "mobilevit_xxs", "mobilevitv2_050", "nasnetalarge", "nest_tiny", "pit_ti_224", "pnasnet5large",
    "poolformer_s12", "pvt_v2_b0", "regnetx_002", "regnety_002", "regnetz_005", "repghostnet_050", "repvgg_a0",
    "repvit_m0_9", "res2net50_14w_8s", "resnest14d", "resnet18", "resnet50d", "resnetrs50", "resnext50_32x4d",
    "rexnet_100", "selecsls42", "semnasnet_075", "seresnet50", "skresnet18", "spnasnet_100", "starnet_s1",
    "tf_efficientnet_b0", "tf_mixnet_s", "tinynet_a", "tinynet_e", "tresnet_m", "vgg11_bn", "visformer_tiny",
    "vovnet39a", "xception41", "xcit_nano_12_p16_224",
]  # fmt: skip


def torchvision_networks():
    from torchvision import models

    kinds = (models, models.segmentation)
    names = [name for kind in kinds for name in models.list_models(module=kind)]
    return [name for name in names if "b5" not in name and "b6" not in name and "b7" not in name]


def make(name):
    if name.startswith("timm:"):
        import timm

        model: Any = timm.create_model(name[5:])
        return model, model.default_cfg.get("input_size", (3, 224, 224))[1]
    from torchvision import models

    more: dict[str, Any] = (
        {"weights_backbone": None} if name in models.list_models(module=models.segmentation) else {}
    )
    if name in ("googlenet", "inception_v3"):
        more["init_weights"] = False
    return models.get_model(name, weights=None, **more), 299 if name == "inception_v3" else None


def examined(name):
    """Its number of layers, and what is found."""
    torch.manual_seed(0)
    model, size = make(name)
    if not layers_of(model):
        return 0, None
    error: Exception = RuntimeError(name)
    for side in (128, size or 224, 224):
        data = torch.randn(32 if side <= 128 else 16, 3, side, side).split(16 if side <= 128 else 8)
        try:
            forward = (
                (lambda m, x: m(x)["out"]) if "deeplab" in name or "fcn" in name or "lraspp" in name else None
            )
            bn.population(model, data, forward=forward)
            optimizer = torch.optim.SGD(bn.param_groups(model, 1e-4), lr=0.1)
            return len(layers_of(model)), bn.examine(model.train(), data, optimizer, forward=forward)
        except (RuntimeError, AssertionError, ValueError) as why:
            error = why
    raise error


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or [*torchvision_networks(), *(f"timm:{name}" for name in TIMM)]
    for name in names:
        try:
            number, found = examined(name)
        except Exception as why:
            print(json.dumps({"name": name, "failed": f"{type(why).__name__}: {why}"[:200]}), flush=True)
            continue
        if found is not None:
            serious = [[each.code, each.layer, each.message] for each in found if each.severity != "info"]
            infos = Counter(each.code for each in found.of("info"))
            print(
                json.dumps(
                    {
                        "name": name,
                        "layers": number,
                        "found": serious,
                        "info": infos,
                        "skipped": found.skipped,
                    }
                ),
                flush=True,
            )
