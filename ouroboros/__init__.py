"""Ouroboros (arXiv 2604.02051), reproduced: one shared transformer layer, modulated at every recurrence step.

`import ouroboros` is cheap, and analysis never imports torch: the two public classes are loaded, and registered with
the Auto classes of transformers, when first asked for.
"""

__version__ = "0.1.0"
__all__ = ["OuroborosConfig", "OuroborosForCausalLM"]


def __getattr__(name: str):  # PEP 562
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from transformers import AutoConfig, AutoModelForCausalLM

    from .model.configuration import OuroborosConfig
    from .model.modeling import OuroborosForCausalLM

    AutoConfig.register(OuroborosConfig.model_type, OuroborosConfig, exist_ok=True)
    AutoModelForCausalLM.register(OuroborosConfig, OuroborosForCausalLM, exist_ok=True)
    globals().update(OuroborosConfig=OuroborosConfig, OuroborosForCausalLM=OuroborosForCausalLM)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
