"""What a run trained, as a folder of its own: a loop's is loaded by OuroborosForCausalLM, LoRA's by peft.

Such a folder, results/<profile>/checkpoints/<run id>/, refers to the base instead of holding it.
"""

from pathlib import Path

import safetensors.torch
from peft import PeftModel
from torch import nn

from ..errors import InputError
from ..experiment.arms import ARMS
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..log import write_atomic
from ..model.modeling import OuroborosForCausalLM
from .build import cut_layers


def folder_of(profile: Profile, run_id: str, root: Path) -> Path:
    """Where a run's checkpoint is committed."""
    return profile.folder(root) / "checkpoints" / run_id


def save(model: nn.Module, spec: RunSpec, profile: Profile, folder: Path) -> None:
    """Write what a run's model trained, without the base's weights, as the run's own float32."""
    base = profile.base_name
    if ARMS[spec.arm].loops:
        model.config.base_reference["name"] = model.config.base.name_or_path = base
        model.save_pretrained(folder, self_contained=False)
        return
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path, adapter.inference_mode = base, True
    # as PeftModel names them, around a model whose adapter isn't called anything
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": p.detach().cpu().contiguous()
               for name, p in model.named_parameters() if ".lora_" in name}
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save_pretrained(folder)
    write_atomic(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))


def load(folder: Path, spec: RunSpec, profile: Profile, base: nn.Module) -> nn.Module:
    """The model that a run trained, on `base`. Raises InputError where the folder isn't there or doesn't fit it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint; it is written when the run is made, if the profile lists it "
                         "under 'checkpoints'")
    if ARMS[spec.arm].loops:
        return OuroborosForCausalLM.from_pretrained(folder, base=base)
    return PeftModel.from_pretrained(cut_layers(base, profile.split), folder).get_base_model()
