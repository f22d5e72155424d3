"""What a run trained, as a folder of its own: a loop's is loaded by OuroborosForCausalLM, LoRA's by peft; LoRA with
further passes by `load` alone.

Such a folder, results/<profile>/checkpoints/<run id>/, refers to the base instead of holding it.
"""

from pathlib import Path

import safetensors.torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from ..errors import InputError, first_line
from ..experiment.arms import ARMS
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..log import write_atomic
from ..model.modeling import OuroborosForCausalLM
from .build import build, cut_layers

TENSORS = "trained.safetensors"  # of an arm that no library knows: every trained tensor, by its name in the model


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
    folder.mkdir(parents=True, exist_ok=True)
    if ARMS[spec.arm].passes:
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        write_atomic(folder / TENSORS, safetensors.torch.save(trained, {"format": "pt", "run": spec.id}))
        return
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path, adapter.inference_mode = base, True
    # as PeftModel names them, around a model whose adapter isn't called anything
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": p.detach().cpu().contiguous()
               for name, p in model.named_parameters() if ".lora_" in name}
    adapter.save_pretrained(folder)
    write_atomic(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))


def load(folder: Path, spec: RunSpec, profile: Profile, base: nn.Module) -> nn.Module:
    """The model that a run trained, on `base`. Raises InputError where the folder isn't there or doesn't fit it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint; it is written when the run is made, if the profile lists it "
                         "under 'checkpoints'")
    if ARMS[spec.arm].loops:
        return OuroborosForCausalLM.from_pretrained(folder, base=base)
    if ARMS[spec.arm].passes:
        return _load_tensors(build(spec, profile, base), folder / TENSORS)
    kept = cut_layers(base, profile.split_of(spec.arm), ARMS[spec.arm].more)
    return PeftModel.from_pretrained(kept, folder).get_base_model()


def _load_tensors(model: nn.Module, file: Path) -> nn.Module:
    """Raises InputError where the file isn't there, or its tensors aren't those that the model trains."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        found = safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: can't be read ({first_line(error)}); restore it") from None
    if odd := {name: p.shape for name, p in wanted.items()}.items() ^ {n: t.shape for n, t in found.items()}.items():
        raise InputError(f"{file}: tensor '{min(odd)[0]}' isn't what its run trains; restore the file")
    model.load_state_dict(found, strict=False)
    return model
